"""Rollouts of other people and for other people: dicts of arrays, Minari datasets, our folders.

Every reader ends in `judged`: success and rewards are the world's to judge, whatever a file says,
and where it says otherwise that is counted. A rollout ends with its first success; one that ends
without is truncated, not terminal. This file knows nothing of learning or of stages.
"""

import collections
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import env
from data import minari_io, padded, recordings, rollouts
from data.recordings import is_unknown, numbers, whole_actions
from experiment import folder

LEAST = 3  # rollouts: two are held out, one is learned from
REWARD_TOLERANCE = 0.01
NOTES = {  # what is said of the rollouts of a recording that needed it
    "cut": "{} went on after their goal was reached and end there",
    "contradicted": "in {} the recorded rewards or terminals are not the judge's, who was believed",
    "completed": "in {} the state after the last action was not recorded and is the physics'",
}


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
        return padded.recordings_of(recordings.arrays_of(path), seed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _own_recording(record):
    return {**record, "goal": env.goal_of(record), "imagined": rollouts.is_imagined(record)}


def read_offline(path: str | Path, world: env.World, seed: int = 0) -> tuple[list[dict], str]:
    """Rollouts to learn from: those of a recording that fulfil their goal, and a sentence on them.

    Raises ValueError as `read` does, and for what offline data cannot have: novel goals, rollouts
    longer than an episode, observations out of reach, fewer than LEAST that fulfil their goal.
    """
    records, notes = read(path, world, seed)
    known = world.sample_goals("offline", "train", 100, np.random.default_rng(0))
    kinds = {goal.kind for goal in known}
    for row, record in enumerate(records):
        level, kind, steps = record["level"], record["kind"], len(record["actions"])
        try:
            if level != "offline" or kind not in kinds:
                raise ValueError(
                    f"level {level!r}, kind {kind!r}; offline rollouts are of level 'offline', "
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
    text and `code`, numbers), observations (T+1, D or more) or (T, ...) with next_observations or
    without, actions (T,), and where known rewards (T,), terminals (T,), states (T+1, S), imagined,
    explanation, dynamics_error (T,).
    """
    goal = recording["goal"]
    if isinstance(goal, dict):
        goal = _goal_of_texts(goal, world)
    imagined = bool(recording.get("imagined", False))
    actions = whole_actions(recording["actions"], world.num_actions)
    seen, is_completed = _observations(recording, actions, world)
    encoded = np.repeat(world.encode_goals([goal]), len(actions), 0)
    met = world.success(encoded, seen[:-1], seen[1:], actions, imagined)
    steps = int(met.argmax()) + 1 if met.any() else len(actions)
    states = recording.get("states")
    if np.shape(states) == (len(seen), world.state_dim) and not is_unknown(states):
        states = numbers("states", states, np.shape(states))[: steps + 1]
    else:
        states = None  # of another world, or a row short
    seen, actions = seen[: steps + 1], actions[:steps]
    record = env.rollout_record(world, goal, seen, actions, states, imagined)
    recorded = {"rewards": record["rewards"], "terminals": met[:steps]}
    for name in ("rewards", "terminals", "dynamics_error"):
        values = recording.get(name)
        if values is not None and not (name == "dynamics_error" and is_unknown(values)):
            recorded[name] = numbers(name, values, met.shape)[:steps]
    if "dynamics_error" in recorded:
        record["dynamics_error"] = recorded["dynamics_error"].astype(np.float32)
    if recording.get("explanation"):
        record["explanation"] = recording["explanation"].replace("\0", "\ufffd")
    rollouts.check_record(record, world)
    off = np.abs(recorded["rewards"] - record["rewards"]) > REWARD_TOLERANCE
    is_contradicted = off.any() or ((recorded["terminals"] != 0) != met[:steps]).any()
    is_cut = steps < len(met)
    found = {
        "completed": is_completed and not is_cut,
        "contradicted": is_contradicted,
        "cut": is_cut,
    }
    return record, [note for note in NOTES if found[note]]


def _observations(recording, actions, world):
    """(observations (T+1, D) float32, whether the last was not recorded and is the physics')."""
    seen = recording["observations"]
    shape = (len(actions), world.observation_dim)
    if np.shape(seen)[:1] != shape[:1]:
        shape = (shape[0] + 1, shape[1])
        return numbers("observations", seen, shape, longer=True), False
    before = numbers("observations", seen, shape, longer=True)
    following = recording.get("next_observations")
    if following is None:
        _check_reach(before, world)
        last = world.state_from_observation(before[-1:])
        after = world.observe(world.step_batch(last, actions[-1:]))
    else:
        after = numbers("next_observations", following, shape, longer=True)
        if (np.abs(after[:-1] - before[1:]) > 1e-4).any():
            raise ValueError("next_observations of a step are not the observations of the next")
    return np.concatenate([before, after[-1:]]), following is None


def _check_reach(observations, world):
    reach, limit = np.abs(observations).max(), world.observation_limit
    if reach > limit:
        raise ValueError(f"observations reach {reach:.3g}; in this world none is beyond {limit:g}")


def _goal_of_texts(texts, world):
    """The goal of a recording's texts; one that names no relations is read from its sentence."""
    level = texts.get("level", "offline")
    if "code" in texts or "relations" not in texts:
        return replace(world.recorded_goal(texts["goal"], texts.get("code")), level=level)
    try:
        relations = json.loads(texts["relations"])
    except (json.JSONDecodeError, RecursionError):
        raise ValueError('relations is not JSON; write [["red", "blue", "behind"]]') from None
    kind = texts.get("kind", world.kinds[0])
    record = {"text": texts["goal"], "level": level, "kind": kind, "relations": relations}
    return env.goal_from_json(record, world)


def export(run: Path, kinds: Sequence[str], world: env.World, encode: Callable) -> None:
    """Every rollouts folder of a run in other formats: export/NAME.npz, export/kalm/NAME-v0.

    kinds: of "npz" and "minari". encode: from texts to their encodings (texts, E), which go behind
    the observations of .npz files.
    """
    for state in sorted(run.glob("rollouts/*/state.json")):
        name = state.parent.name
        records, _ = read(state.parent, world)
        if "npz" in kinds:
            padded.write_npz(run / "export" / f"{name}.npz", records, encode)
        if "minari" in kinds:
            minari_io.write_minari(run / "export" / "kalm" / f"{name}-v0", records, world)
