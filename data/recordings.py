"""Recordings as dicts of padded arrays, one a field: rollouts first, then steps.

`masks` says which steps are real. Read are the authors' pickled .npy and ImagineBench's .npz, .npy
and .hdf5; written is .npz. Nothing that a file names is imported or called, and nothing judged.
"""

import io
import json
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from experiment import folder

LARGEST = 8 * 2**30  # bytes of arrays that are read from one file
PER_STEP = ("actions", "rewards", "terminals", "dynamics_error")
TEXTS = {name: name for name in ("level", "kind", "relations")}
TEXTS |= {"instructions": "goal", "explanations": "explanation"}  # fields, and names in records
FIELDS = ("observations", "next_observations", "states", "masks", "goals", *PER_STEP, *TEXTS)


def recordings_of(path: Path, seed: int) -> Iterator[dict]:
    """Rollouts of a file as recordings (`formats.judged`); seed draws one of their instructions."""
    fields = READERS[path.suffix.lower()](path)
    for name in ("masks", "observations", "actions", "instructions", *fields):
        if name not in fields:
            raise ValueError(f"field {name!r} is missing; data/README.md describes the format")
        if len(fields[name]) != len(fields["masks"]):
            raise ValueError(f"{name} has {len(fields[name])} rollouts, masks another number")
    rng = np.random.default_rng(seed)
    return (_recording(dict(zip(fields, row)), rng) for row in zip(*fields.values()))


def _recording(fields, rng):
    mask = numbers("masks", fields["masks"]).reshape(len(fields["masks"]))
    steps = int((mask != 0).sum())
    if (mask != (np.arange(len(mask)) < steps)).any():
        raise ValueError("masks must be ones for the steps of the rollout, then zeros")
    texts = fields["instructions"]
    if not isinstance(texts, (str, bytes)):
        fields["instructions"] = texts[rng.integers(len(texts))] if len(texts) else ""
    recording = {}
    for name in TEXTS.keys() & fields.keys():
        recording[TEXTS[name]] = text_of(name, fields[name])
    if "goals" in fields:
        recording["code"] = numbers("goals", fields["goals"])
    for name in {"next_observations", *PER_STEP} & fields.keys():
        recording[name] = fields[name][:steps]
    for name in {"observations", "states"} & fields.keys():
        after = len(fields[name]) - len(mask)  # with what follows the last action, or without
        recording[name] = fields[name][: steps + after]
    return recording


def texts_of(record: dict) -> dict[str, str]:
    """What a record says in words, relations as JSON; without NUL, which HDF5 cannot hold."""
    texts = {name: str(record.get(name) or "").replace("\0", " ") for name in TEXTS.values()}
    return {**texts, "relations": json.dumps(record["relations"])}


def text_of(field: str, value: object) -> str:
    """An element of an array of texts as a string."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise ValueError(f"{field} must be a text, got {type(value).__name__}")
    return str(value)


def numbers(field: str, values: object) -> np.ndarray:
    """The values as an array, if they are numbers."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{field} must be an array of numbers, got {type(values).__name__}")
    return array


def write_npz(path: str | Path, records: Sequence[dict], encode: Callable | None = None) -> None:
    """Records as padded arrays; observations end in the goal text's encoding, if there is one."""
    last = np.array([[len(record["actions"]) - 1] for record in records])
    steps = int(last.max()) + 1
    success = np.array([[record["success"]] for record in records])
    seen = _padded([record["observations"][:-1] for record in records], steps)
    texts = [texts_of(record) for record in records]
    fields = {name: np.array([text[field] for text in texts]) for name, field in TEXTS.items()}
    fields["masks"] = (np.arange(steps) <= last).astype(np.int32)
    fields["terminals"] = (np.arange(steps) == last) & success
    fields["next_observations"] = _padded([r["observations"][1:] for r in records], steps)
    for name in ("actions", "rewards", "states", "dynamics_error"):
        values = [record.get(name) for record in records]
        if all(value is not None for value in values):
            fields[name] = _padded(values, steps + (name == "states"))
    if encode is not None:
        encodings = np.asarray(encode([text["goal"] for text in texts]), np.float32)
        seen = np.concatenate([seen, np.repeat(encodings[:, None], steps, 1)], -1)
    with folder.replacing(path) as aside, open(aside, "wb") as stream:
        np.savez_compressed(stream, observations=seen, **fields)


def _padded(values, steps):
    """Arrays of rollouts as one, (N, steps, ...), zero past their end."""
    array = np.zeros((len(values), steps, *values[0].shape[1:]), values[0].dtype)
    for row, value in enumerate(values):
        array[row, : len(value)] = value
    return array


def _read_npy(path):
    with open(path, "rb") as stream:
        np.lib.format.read_magic(stream)
        shape, _, _ = np.lib.format.read_array_header_1_0(stream)
        found = unpickle(stream.read()) if shape == () else None
    if not isinstance(found, dict):
        raise ValueError("it does not hold what a recording is, a dict of arrays")
    return {name: found[name] for name in FIELDS if name in found}


def _read_npz(path):
    with np.lib.npyio.NpzFile(path) as file:
        names = [name for name in FIELDS if name in file]
        _check_size(file.zip.getinfo(f"{name}.npy").file_size for name in names)
        return {name: file[name] for name in names}


def _read_hdf5(path):
    with open_hdf5(path) as file:
        return {name: file[name][()] for name in FIELDS if name in file}


def open_hdf5(path: Path):  # noqa: ANN201 - h5py is optional
    """An h5py.File that holds all its data itself, and no more than is read. Raises ValueError."""
    import h5py

    file = h5py.File(path)
    sizes = []

    def name_if_elsewhere(name, link):
        found = file[name] if isinstance(link, h5py.HardLink) else None
        sizes.append(getattr(found, "nbytes", 0))
        is_elsewhere = getattr(found, "external", None) or getattr(found, "is_virtual", False)
        return name if found is None or is_elsewhere else None

    elsewhere = file.visititems_links(name_if_elsewhere)
    if elsewhere is not None:
        raise ValueError(f"{elsewhere} is a link, or lies in another file; refused")
    _check_size(sizes)
    return file


def _check_size(sizes):
    size = sum(sizes)
    if size > LARGEST:
        raise ValueError(f"its arrays take {size} bytes; at most {LARGEST} are read from a file")


READERS = {".npy": _read_npy, ".npz": _read_npz, ".hdf5": _read_hdf5, ".h5": _read_hdf5}

# ----------------------------------------------------------------------------------------------
# Pickles: Python's own unpickler, given nothing that could run


def unpickle(data: bytes) -> object:
    """The value of pickled bytes: plain values and arrays. Raises ValueError, and others."""
    tuples = 0  # so deep they can nest, and hashing them recurses
    for opcode, argument, position in pickletools.genops(data):  # finds sizes beyond the data
        tuples += opcode.name.startswith("TUPLE")
        takes_memory = opcode.name.endswith("PUT") and int(argument) > position
        if takes_memory or tuples > 5000 or opcode.name.startswith("EXT"):  # past find_class
            raise ValueError(f"the pickle has the opcode {opcode.name} as no recording; refused")
    value = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        """What stands in for a name: made anew each time, as a pickle can change what it names."""
        stand_ins = {
            "numpy.core.multiarray._reconstruct": lambda *_: _Array(0),
            "numpy.core.multiarray.scalar": lambda dtype, data: np.frombuffer(data, dtype.value)[0],
            "numpy.dtype": lambda code, *_: _Dtype(code),
            "numpy.ndarray": lambda: None,
        }
        name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if name not in stand_ins:
            raise ValueError(f"the pickle names {name[:60]!a}, which is no array; refused")
        return stand_ins[name]


class _Dtype:
    """A dtype, made from a code; then told its byte order."""

    def __init__(self, code):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|[SU][1-9]\d{0,6}|O8?", code):
            raise ValueError(f"the pickle has an array of type {code!a}, not numbers or texts")
        self.value = np.dtype(code.replace("O8", "O"))

    def __setstate__(self, state):
        self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array, made empty; then filled. numpy sees to it that the bytes fill the shape."""

    def __setstate__(self, state):
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, dtype.value, is_fortran, data))
