"""Rollouts of other people and for other people: dicts of arrays, Minari datasets, our folders.

Every reader ends in `judged`: success and rewards are the world's to judge, whatever a file says,
and where it says otherwise that is counted. A rollout ends with its first success; one that ends
without is truncated, not terminal. This file knows nothing of learning or of stages.
"""

import collections
import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import env
from data import minari_io, recordings, rollouts
from experiment import folder

LEAST = 3  # rollouts: two are held out, one is learned from
REWARD_TOLERANCE = 0.01
LARGEST_NUMBER = 1e30
NOTES = {  # what is said of the rollouts of a recording that needed it
    "cut": "{} went on after their goal was reached and end there",
    "contradicted": "in {} the recorded rewards or terminals are not the judge's, who was believed",
    "completed": "in {} the state after the last action was not recorded and is the physics'",
}

# ----------------------------------------------------------------------------------------------
# Reading


def read(
    path: str | Path, world: env.World, seed: int = 0
) -> tuple[list[dict], collections.Counter]:
    """Rollout records of a file or folder, judged anew, and how many each of NOTES is true of.

    seed: draws one of several instructions. Raises ValueError that names file, row and field.
    """
    path = Path(path)
    notes = collections.Counter()
    records = []
    found = _recordings(path, world, seed)
    try:
        for recording in found:
            record, row_notes = judged(recording, world)
            records.append(record)
            notes.update(row_notes)
    except ValueError as error:
        raise ValueError(f"{path}, row {len(records)}: {error}") from None
    if not records:
        raise ValueError(f"{path}: no rollouts in it; a recording needs at least one")
    return records, notes


def _recordings(path, world, seed):
    """The recordings of a file or folder, one by one. Raises ValueError that names the file."""
    if (path / "state.json").is_file() or (path / "dataset_info.json").is_file():
        return map(_own_recording, rollouts.read_rollouts(path, world, with_states=True))
    try:
        if path.is_dir():
            return minari_io.recordings_of(path)
        if not path.exists():
            raise ValueError("no such file or folder")
        if path.suffix.lower() not in recordings.READERS:
            suffixes = ", ".join(recordings.READERS)
            raise ValueError(
                "no recording; give a rollouts dataset folder, a Minari dataset folder or a file "
                f"of arrays ({suffixes})"
            )
        return _array_recordings(recordings.arrays_of(path), world, seed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _own_recording(record):
    return {**record, "goal": env.goal_of(record), "imagined": rollouts.is_imagined(record)}


def read_offline(path: str | Path, world: env.World, seed: int = 0) -> tuple[list[dict], str]:
    """Rollouts to learn from: those of a recording that fulfil their goal, and a sentence on them.

    Raises ValueError as `read` does, and for what offline data cannot have: novel goals, rollouts
    longer than an episode, numbers that no observation has, fewer than LEAST rollouts to learn from.
    """
    records, notes = read(path, world, seed)
    known = world.sample_goals("offline", "train", 100, np.random.default_rng(0))
    kinds = {goal.kind for goal in known}
    for row, record in enumerate(records):
        level, kind, steps = record["level"], record["kind"], len(record["actions"])
        try:
            if level != "offline" or kind not in kinds:
                raise ValueError(
                    f"level {level!r}, kind {kind!r}; rollouts to learn from are of level 'offline', "
                    f"kind {' or '.join(sorted(kinds))}; novel goals go into --goals"
                )
            if steps > world.max_steps:
                raise ValueError(
                    f"actions has {steps} steps; an episode has at most {world.max_steps}"
                )
            _check_reach(record["observations"], world)
        except ValueError as error:
            raise ValueError(f"{path}, row {row}: {error}") from None
    kept = [record for record in records if record["success"]]
    if len(kept) < LEAST:
        raise ValueError(
            f"{path}: {len(kept)} of {len(records)} rollouts fulfil their goal; "
            f"at least {LEAST} are needed"
        )
    said = [f"{len(kept)} of {len(records)} rollouts of {path} fulfil their goal and are kept"]
    said += [NOTES[note].format(count) for note, count in sorted(notes.items())]
    return kept, "; ".join(said)


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's. Raises ValueError if none."""
    path = Path(path)
    if path.is_file():
        return folder.sha256(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(path).as_posix()}\0{folder.sha256(file)}\0".encode())
    return digest.hexdigest()


def judged(recording: dict, world: env.World) -> tuple[dict, list[str]]:
    """The rollout record of a recording, which ends with its first success, and its NOTES.

    recording: goal (a Goal, or a dict of `goal` and perhaps `level`, `kind`, `relations` as JSON
    text), observations (T+1, D or more), actions (T,), and where known rewards (T,),
    terminals (T,), states (T+1, S), imagined, explanation, dynamics_error (T,), completed.
    """
    goal = recording["goal"]
    if isinstance(goal, dict):
        goal = _goal_of_texts(goal, world)
    imagined = bool(recording.get("imagined", False))
    actions = _actions(recording["actions"], world)
    seen = _numbers("observations", recording["observations"], (len(actions) + 1, None))
    if seen.shape[1] < world.observation_dim:
        raise ValueError(
            f"observations must have shape ({len(seen)}, {world.observation_dim} or more), "
            f"got {seen.shape}"
        )
    seen = seen[:, : world.observation_dim].astype(np.float32)
    encoded = np.repeat(world.encode_goals([goal]), len(actions), 0)
    met = world.success(encoded, seen[:-1], seen[1:], actions, imagined)
    notes = ["completed"] if recording.get("completed") else []
    steps = int(met.argmax()) + 1 if met.any() else len(actions)
    if steps < len(actions):
        notes = ["cut"]
    states = recording.get("states")
    if states is not None and np.shape(states) == (len(seen), world.state_dim):
        states = _numbers("states", states, np.shape(states))[: steps + 1]
    else:
        states = None  # other numbers than ours, or a row short
    record = env.rollout_record(
        world, goal, seen[: steps + 1], actions[:steps], states, imagined=imagined
    )
    per_step = {}
    for name in ("rewards", "terminals", "dynamics_error"):
        if recording.get(name) is not None:
            per_step[name] = _numbers(name, recording[name], (len(actions),))[:steps]
    if "dynamics_error" in per_step:
        record["dynamics_error"] = per_step["dynamics_error"].astype(np.float32)
    if recording.get("explanation") is not None:
        record["explanation"] = recording["explanation"].replace("\0", "\ufffd")
    rollouts.check_record(record, world)
    off = np.abs(per_step.get("rewards", record["rewards"]) - record["rewards"])
    ended = per_step.get("terminals", met[:steps]) != 0
    if (off > REWARD_TOLERANCE).any() or (ended != met[:steps]).any():
        notes.append("contradicted")
    return record, notes


def _goal_of_texts(texts, world):
    """The goal of a recording's texts; one that names no relations is read from its sentence."""
    level = texts.get("level", "offline")
    if "relations" not in texts:
        return replace(world.recorded_goal(texts["goal"], texts.get("code")), level=level)
    try:
        relations = json.loads(texts["relations"])
    except (json.JSONDecodeError, RecursionError):
        raise ValueError('relations is not JSON; write [["red", "blue", "behind"]]') from None
    kind = texts.get("kind", world.kinds[0])
    record = {"text": texts["goal"], "level": level, "kind": kind, "relations": relations}
    return env.goal_from_json(record, world)


def _numbers(field, values, shape):
    """Values as an array of finite numbers of a shape, in which None stands for any size."""
    values = np.asarray(values)
    wanted = tuple(have if want is None else want for have, want in zip(values.shape, shape))
    if values.ndim != len(shape) or values.shape != wanted:
        raise ValueError(f"{field} must have shape {shape}, got {values.shape}")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{field} must be numbers, got type {values.dtype}")
    if not np.isfinite(values).all():
        raise ValueError(f"{field} has NaN or infinite values")
    if (
        field != "states"
        and values.size
        and np.abs(values.astype(np.float64)).max() > LARGEST_NUMBER
    ):
        raise ValueError(f"{field} has values beyond {LARGEST_NUMBER:g}")
    return values


def _actions(values, world):
    """Actions as int64. Raises ValueError unless they are one or more whole numbers in range."""
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iuf":
        raise ValueError(
            f"actions must be one whole number a step, got shape {values.shape}, type {values.dtype}"
        )
    if len(values) == 0:
        raise ValueError("actions is empty; a rollout needs at least one action")
    if not np.isfinite(values).all() or (values != np.floor(values)).any():
        raise ValueError("actions must be whole numbers, and some are not")
    if values.min() < 0 or values.max() >= world.num_actions:
        found = f"{values.min()}..{values.max()}"
        raise ValueError(f"actions must be in 0..{world.num_actions - 1}, got {found}")
    return values.astype(np.int64)


def _check_reach(observations, world):
    reach, limit = np.abs(observations).max(), world.observation_limit
    if reach > limit:
        raise ValueError(f"observations reach {reach:.3g}; in this world none is beyond {limit:g}")


# ----------------------------------------------------------------------------------------------
# Dicts of arrays


def _array_recordings(arrays, world, seed):
    """Rows of a dict of arrays (N, T, ...) as recordings; `masks` says which steps are real."""
    for name in ("observations", "actions", "masks", "instructions"):
        if name not in arrays:
            raise ValueError(f"field {name!r} is missing; data/README.md describes the format")
    for name in recordings.PER_STEP:
        if name in arrays and arrays[name].ndim == 3 and arrays[name].shape[2] == 1:
            arrays[name] = arrays[name][..., 0]
    shape = arrays["masks"].shape
    if len(shape) != 2:
        raise ValueError(f"masks must have shape (rollouts, steps), got {shape}")
    longer = (shape[0], shape[1] + 1)  # with the state after the last action
    for name, array in arrays.items():
        begin = array.shape[: 1 if name in recordings.PER_ROLLOUT else 2]
        if begin not in (shape, shape[:1], longer if name in ("observations", "states") else shape):
            raise ValueError(
                f"{name} has shape {array.shape}, masks {shape}; both begin with rollouts, steps"
            )
    rng = np.random.default_rng(seed)
    return (
        _row({name: array[row] for name, array in arrays.items()}, world, rng)
        for row in range(shape[0])
    )


def _row(fields, world, rng):
    """One row of a dict of arrays as a recording, see `judged`."""
    mask = _numbers("masks", fields["masks"], fields["masks"].shape)
    steps = int((mask != 0).sum())
    if not np.isin(mask, (0, 1)).all() or (mask[:steps] == 0).any():
        raise ValueError("masks must be ones for the steps of the rollout, then zeros")
    texts = np.atleast_1d(fields["instructions"])
    if texts.ndim != 1 or len(texts) == 0:
        raise ValueError(f"instructions must be texts, one or several a rollout, got {texts!r:.40}")
    goal = {"goal": recordings.text_of("instructions", texts[rng.integers(len(texts))])}
    for name in ("level", "kind", "relations"):
        if name in fields:
            goal[name] = recordings.text_of(name, fields[name])
    if "goals" in fields:
        goal["code"] = _numbers("goals", fields["goals"], fields["goals"].shape)
    recording = {"goal": goal, "imagined": fields.get("imagined", False)}
    for name in ("actions", "rewards", "terminals", "dynamics_error"):
        if name in fields and not _is_unknown(fields[name][:steps]):
            recording[name] = fields[name][:steps]
    if "states" in fields and not _is_unknown(fields["states"]):
        recording["states"] = fields["states"][: steps + 1]
    if "explanations" in fields:
        recording["explanation"] = (
            recordings.text_of("explanations", fields["explanations"]) or None
        )
    seen = fields["observations"]
    if len(seen) > len(mask) or steps == 0:
        return {**recording, "observations": seen[: steps + 1]}
    before = _numbers("observations", seen[:steps], (steps, None))[:, : world.observation_dim]
    if "next_observations" in fields:
        after = _numbers("next_observations", fields["next_observations"][:steps], (steps, None))
        after = after[:, : world.observation_dim]
        if (np.abs(after[:-1] - before[1:]) > 1e-4).any():
            raise ValueError("next_observations of a step are not the observations of the next")
    else:
        _check_reach(before, world)
        last = _actions(fields["actions"][:steps], world)[-1:]
        states = world.state_from_observation(before[-1:])
        after = world.observe(world.step_batch(states, last))
        recording["completed"] = True
    return {**recording, "observations": np.concatenate([before, after[-1:]])}


def _is_unknown(values):
    """Whether numbers of a rollout are NaN throughout, which stands for a field it does not have."""
    return values.dtype.kind == "f" and bool(np.isnan(values).all())


# ----------------------------------------------------------------------------------------------
# Writing


def export(
    target: Path, source: Path, kinds: Sequence[str], world: env.World, encode: Callable
) -> None:
    """Every rollouts folder in `source` in other formats: target/NAME.npz, target/kalm/NAME-v0.

    kinds: of "npz" and "minari". encode: from texts to their encodings (texts, E), which go behind
    the observations of .npz files.
    """
    for path in sorted(source.iterdir()):
        if not (path / "state.json").is_file():
            continue
        records, _ = read(path, world)
        if "npz" in kinds:
            write_npz(target / f"{path.name}.npz", records, encode)
        if "minari" in kinds:
            minari_io.write_minari(target / "kalm" / f"{path.name}-v0", records, world)


def write_npz(path: str | Path, records: Sequence[dict], encode: Callable | None = None) -> None:
    """Records as a dict of arrays, padded to the longest rollout.

    Observations end in the goal text's encoding, if there is one.
    """
    lengths = np.array([len(record["actions"]) for record in records])
    count, steps = len(records), lengths.max()
    place = np.arange(steps)
    success = np.array([record["success"] for record in records])
    fields = {
        "actions": _padded(records, "actions", steps),
        "rewards": _padded(records, "rewards", steps),
        "masks": (place < lengths[:, None]).astype(np.int32),
        "terminals": (place == lengths[:, None] - 1) & success[:, None],
        "instructions": np.array([record["goal"] for record in records]),
        "level": np.array([record["level"] for record in records]),
        "kind": np.array([record["kind"] for record in records]),
        "relations": np.array([json.dumps(record["relations"]) for record in records]),
        "imagined": np.array([rollouts.is_imagined(record) for record in records]),
    }
    if any(record.get("states") is not None for record in records):
        fields["states"] = _padded(records, "states", steps + 1)
    if any(record.get("explanation") is not None for record in records):
        fields["explanations"] = np.array([record.get("explanation") or "" for record in records])
        fields["dynamics_error"] = _padded(records, "dynamics_error", steps)
    encodings = np.zeros((count, 0), np.float32)
    if encode is not None:
        encodings = np.asarray(encode([record["goal"] for record in records]), np.float32)
    with folder.replacing(path) as aside:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in fields.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)
            _write_observations(archive, "observations", records, steps, encodings, 0)
            _write_observations(archive, "next_observations", records, steps, encodings[:, :0], 1)


def _padded(records, field, steps):
    """A field of records, (N, steps, ...), zero past the end; NaN where a record does not have it."""
    known = [record[field] for record in records if record.get(field) is not None]
    array = np.zeros((len(records), steps, *known[0].shape[1:]), known[0].dtype)
    for row, record in enumerate(records):
        values = record.get(field)
        if values is None:
            array[row] = np.nan
        else:
            array[row, : len(values)] = values
    return array


def _write_observations(archive, name, records, steps, encodings, first):
    """One rollout at a time: with encodings the array is large."""
    width = records[0]["observations"].shape[1]
    shape = (len(records), int(steps), width + encodings.shape[1])
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_2_0(stream, header)
        for record, encoding in zip(records, encodings):
            block = np.zeros(shape[1:], "<f4")
            seen = record["observations"][first : first + len(record["actions"])]
            block[: len(seen), :width] = seen
            block[:, width:] = encoding
            stream.write(block.tobytes())
