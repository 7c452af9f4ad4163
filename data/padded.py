"""Dicts of padded arrays, rollouts first, then steps: rows as recordings, records as .npz.

The layouts of the authors (several instructions, `goals` as numbers, `next_observations`) and of
ImagineBench (an encoding behind the observations, goals in words). This file judges nothing.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data import rollouts
from data.recordings import PER_ROLLOUT, PER_STEP, Refused, numbers, text_of
from experiment import folder


def recordings_of(arrays: dict[str, np.ndarray], seed: int) -> Iterator[dict]:
    """Rows of a dict of arrays as recordings (`formats.judged`); `masks` says which steps are real.

    seed: draws one of several instructions. Raises ValueError that names the field.
    """
    for name in ("observations", "actions", "masks", "instructions"):
        if name not in arrays:
            raise Refused(f"field {name!r} is missing; data/README.md describes the format")
    for name, array in arrays.items():
        if name in PER_STEP and array.shape[2:] == (1,):
            arrays[name] = array[..., 0]
    shape = arrays["masks"].shape
    if len(shape) != 2:
        raise Refused(f"masks must have shape (rollouts, steps), got {shape}")
    for name, array in arrays.items():
        axes = 1 if name in PER_ROLLOUT else 2
        if axes == 2 and array.dtype.hasobject:
            raise Refused(f"{name} must be numbers, got type object")
        wanted = [shape[:axes]]
        if name in ("observations", "states"):
            wanted.append((shape[0], shape[1] + 1))  # with what follows the last action
        if array.shape[:axes] not in wanted:
            raise Refused(
                f"{name} has shape {array.shape}, masks {shape}; both begin with rollouts, steps"
            )
    return _recordings(arrays, np.random.default_rng(seed))


def _recordings(arrays, rng):
    for row in range(len(arrays["masks"])):
        yield _recording({name: array[row] for name, array in arrays.items()}, rng)


def _recording(fields, rng):
    mask = numbers("masks", fields["masks"], (None,))
    steps = int((mask != 0).sum())
    if (mask != (np.arange(len(mask)) < steps)).any():
        raise Refused("masks must be ones for the steps of the rollout, then zeros")
    goal = {"goal": _draw(fields["instructions"], rng)}
    for name in ("level", "kind", "relations"):
        if name in fields:
            goal[name] = text_of(name, fields[name])
    if "goals" in fields:
        goal["code"] = numbers("goals", fields["goals"], (None, None))
    recording = {"goal": goal}
    if "imagined" in fields:
        recording["imagined"] = numbers("imagined", fields["imagined"], ())
    if "explanations" in fields:
        recording["explanation"] = text_of("explanations", fields["explanations"])
    for name in ("actions", "rewards", "terminals", "dynamics_error", "next_observations"):
        if name in fields:
            recording[name] = fields[name][:steps]
    for name in ("observations", "states"):
        if name in fields:
            recording[name] = fields[name][: steps + len(fields[name]) - len(mask)]
    return recording


def _draw(texts, rng):
    """One of a rollout's instructions."""
    if isinstance(texts, (str, bytes)):
        texts = [texts]
    if getattr(texts, "ndim", 1) != 1 or len(texts) == 0:
        raise Refused("instructions must be texts, one or several a rollout")
    return text_of("instructions", texts[rng.integers(len(texts))])


def write_npz(path: str | Path, records: Sequence[dict], encode: Callable | None = None) -> None:
    """Records as a dict of arrays, padded to the longest rollout.

    Observations end in the goal text's encoding, if there is one.
    """

    def column(name):
        return np.array([record.get(name) or "" for record in records])

    encodings = np.zeros((len(records), 0), np.float32)
    if encode is not None:
        encodings = np.asarray(encode([record["goal"] for record in records]), np.float32)
    lengths = np.array([len(record["actions"]) for record in records])
    steps = int(lengths.max())
    left = lengths[:, None] - np.arange(steps)  # the last step has one left
    success = np.array([record["success"] for record in records])
    fields = {
        "masks": (left > 0).astype(np.int32),
        "terminals": (left == 1) & success[:, None],
        "instructions": column("goal"),
        "level": column("level"),
        "kind": column("kind"),
        "relations": np.array([json.dumps(record["relations"]) for record in records]),
        "imagined": np.array([rollouts.is_imagined(record) for record in records]),
        "explanations": column("explanation"),
    }
    following = [record["observations"][1:] for record in records]
    fields["next_observations"] = _padded(following, steps)
    for name in ("actions", "rewards", "states", "dynamics_error"):
        values = [record.get(name) for record in records]
        if any(value is not None for value in values):
            fields[name] = _padded(values, steps + (name == "states"))
    with folder.replacing(path) as aside:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in fields.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)
            with archive.open("observations.npy", "w", force_zip64=True) as stream:
                _write_observations(stream, records, steps, encodings)


def _padded(values, steps):
    """Arrays of rollouts as one, (N, steps, ...): zero past the end; NaN in place of None."""
    like = next(value for value in values if value is not None)
    array = np.zeros((len(values), steps, *like.shape[1:]), like.dtype)
    for row, value in enumerate(values):
        if value is None:
            array[row] = np.nan
        else:
            array[row, : len(value)] = value
    return array


def _write_observations(stream, records, steps, encodings):
    """An .npy file, one rollout at a time: with encodings the array is large."""
    width = records[0]["observations"].shape[1]
    shape = (len(records), steps, width + encodings.shape[1])
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(stream, header)
    for record, encoding in zip(records, encodings):
        before = record["observations"][:-1]
        block = np.zeros(shape[1:], "<f4")
        block[:, width:] = encoding
        block[: len(before), :width] = before
        stream.write(block.tobytes())
