"""Rollouts of other people and for other people: dicts of arrays, Minari datasets, our folders.

Every reader ends in `judged`: success and rewards are the world's to judge, whatever a file says.
A rollout ends with its first success, or is truncated. This file knows nothing of learning.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import env
from data import minari_io, recordings, rollouts
from experiment import folder

LEAST = 3  # rollouts: two are held out, one is learned from
REWARD_TOLERANCE = 0.01
NOTES = {  # what is said of the rollouts of a recording that needed it
    "cut": "{} went on after their goal was reached and end there",
    "contradicted": "in {} the recorded rewards or terminals are not the judge's, who was believed",
    "completed": "in {} the state after the last action was not recorded and is the physics'",
}


def read(path: str | Path, world: env.World, seed: int = 0) -> tuple[list[dict], Counter]:
    """Rollout records of a file or folder, judged anew, and how many each of NOTES is true of.

    seed: draws one of several instructions. Raises ValueError that names file, row and field.
    """
    notes = Counter()
    records = []
    found = _recordings(Path(path), world, seed)
    with rollouts.naming(lambda: f"{path}, row {len(records)}"):
        for recording in found:
            record, row_notes = judged(recording, world)
            records.append(record)
            notes.update(row_notes)
    return records, notes


def _recordings(path, world, seed):
    """What a file or folder holds. Raises ValueError that names the file."""
    if (path / "state.json").is_file():
        return rollouts.read_rollouts(path, world, with_states=True)
    with rollouts.naming(path):
        if path.is_dir():
            return minari_io.recordings_of(path)
        return recordings.recordings_of(path, seed)


def read_offline(path: str | Path, world: env.World, seed: int = 0) -> tuple[list[dict], str]:
    """Rollouts to learn from: those of a recording that fulfil their goal, and a sentence on them.

    Raises ValueError as `read` does, and for what offline data cannot have: novel goals, rollouts
    longer than an episode, observations out of reach, fewer than LEAST that fulfil their goal.
    """
    if not Path(path).exists():
        raise ValueError(f"--data {path}: no such file or folder")
    records, notes = read(path, world, seed)
    known = world.sample_goals("offline", "train", 100, np.random.default_rng(0))
    kinds = {goal.kind for goal in known}
    for row, record in enumerate(records):
        with rollouts.naming(f"{path}, row {row}"):
            _check_offline(record, world, kinds)
    kept = [record for record in records if record["success"]]
    said = f"{len(kept)} of {len(records)} rollouts of {path} fulfil their goal"
    if len(kept) < LEAST:
        raise ValueError(f"{path}: {said}; at least {LEAST} are needed")
    sentences = [f"{said} and are kept"]
    for note, count in sorted(notes.items()):
        sentences.append(NOTES[note].format(count))
    return kept, "; ".join(sentences)


def _check_offline(record, world, kinds):
    level, kind = record["level"], record["kind"]
    steps = len(record["actions"])
    if level != "offline" or kind not in kinds:
        raise ValueError(f"level {level!r}, kind {kind!r} is not offline; see --goals")
    if steps > world.max_steps:
        raise ValueError(f"actions has {steps} steps; an episode has at most {world.max_steps}")
    if np.abs(record["observations"]).max() > world.observation_limit:
        raise ValueError(f"observations reach beyond {world.observation_limit}, the world's limit")


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's. Raises ValueError if none."""
    found = [Path(path), *Path(path).rglob("*")]
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise ValueError(f"{path}: no such file or folder, or nothing in it")
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix()
        digest.update(f"{name}\0{folder.sha256(file)}\0".encode())
    return digest.hexdigest()


def judged(recording: dict, world: env.World) -> tuple[dict, list[str]]:
    """The rollout record of a recording, which ends with its first success, and its NOTES.

    recording: a rollout record, or of it goal (text), observations, actions and what is known, with
    relations as JSON text or the goal's code (numbers), terminals (T,), observations wider or
    without the last, which is in next_observations (T, D), or else is what the physics gives.
    """
    goal = _goal(recording, world)
    arrays, is_completed = _arrays(recording, world)
    imagined = goal.level != "offline" and "states" not in arrays  # physics would have them
    seen, actions = arrays["observations"], arrays["actions"]
    encoded = world.encode_goals([goal])
    encoded = np.repeat(encoded, len(actions), 0)
    met = world.success(encoded, seen[:-1], seen[1:], actions, imagined)
    surplus = 0  # steps after the goal was met
    if met.any():
        surplus = len(met) - 1 - int(met.argmax())
    kept = {name: values[: len(values) - surplus] for name, values in arrays.items()}
    seen, actions = kept["observations"], kept["actions"]
    episode = (seen, actions, kept.get("states"))
    (record,) = env.rollout_records(world, [goal], [episode], imagined)
    record["dynamics_error"] = kept.get("dynamics_error")
    record["explanation"] = recording.get("explanation") or None
    notes = []
    if surplus:
        notes.append("cut")
    elif is_completed:
        notes.append("completed")
    judge = {"rewards": record["rewards"], "terminals": rollouts.terminals_of(record)}
    for name, truth in judge.items():
        if not np.allclose(kept.get(name, truth), truth, rtol=0, atol=REWARD_TOLERANCE):
            notes.append("contradicted")
            break
    return record, notes


def _goal(recording, world):
    """The goal of a recording; one that names no relations is read from its code or sentence."""
    if "goal" not in recording:
        raise ValueError("no text of the goal, so it cannot be judged; record infos/goal with it")
    record = {"level": "offline", "kind": world.kinds[0], **recording, "text": recording["goal"]}
    if "code" in record or "relations" not in record:
        goal = world.recorded_goal(record["goal"], record.get("code"))
        return replace(goal, level=record["level"])
    return env.goal_from_json(record, world)


def _arrays(recording, world):
    """The arrays of a recording as a record has them, and whether the physics gave the last one."""
    arrays = {}
    for name in (*rollouts.ARRAYS, "next_observations", "terminals"):
        if recording.get(name) is not None:
            arrays[name] = _array(name, recording[name], world)
    actions, seen = arrays["actions"], arrays["observations"]
    following = arrays.pop("next_observations", None)
    lacks_last = len(seen) == len(actions)
    is_completed = lacks_last and following is None
    if is_completed:
        seen = np.concatenate([seen, seen[-1:]])  # until all is checked
    elif lacks_last:
        if not np.allclose(following[:-1], seen[1:], rtol=0, atol=1e-4):
            raise ValueError("next_observations of a step are not the observations of the next")
        seen = np.concatenate([seen, following[-1:]])
    arrays["observations"] = seen
    if np.shape(arrays.get("states")) != (len(seen), world.state_dim):
        arrays.pop("states", None)  # of another world, or a row short
    rollouts.check_arrays({"rewards": np.zeros(len(actions)), **arrays}, world)
    if is_completed:
        limit = world.observation_limit
        before = world.state_from_observation(np.clip(seen[-2:-1], -limit, limit))
        after = world.step_batch(before, actions[-1:])
        seen[-1:] = world.observe(after)
    return arrays, is_completed


def _array(name, values, world):
    """A field of a recording as an array of the type that records have."""
    array = recordings.numbers(name, values)
    if name == "actions" and (array != np.floor(array)).any():
        raise ValueError("actions must be whole numbers, and some are not")
    if name in ("observations", "next_observations"):
        array = array[..., : world.observation_dim]
    elif name in recordings.PER_STEP and array.shape[1:] == (1,):
        array = array[:, 0]
    return array.astype(rollouts.ARRAYS.get(name, np.float32))


def export(run: Path, kinds: Sequence[str], world: env.World, encode: Callable) -> None:
    """Every rollouts folder of a run as export/NAME.npz and export/kalm/NAME-v0, a Minari dataset.

    kinds: of "npz" and "minari". encode: from texts to encodings (texts, E), for .npz files.
    """
    target = run / "export"
    for source in sorted(run.glob("rollouts/*")):
        records, _ = read(source, world)
        if "npz" in kinds:
            recordings.write_npz(target / f"{source.name}.npz", records, encode)
        if "minari" in kinds:
            minari_io.write_minari(target / "kalm" / f"{source.name}-v0", records, world)
