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

from data import rollouts
from experiment import folder

LARGEST = 8 * 2**30  # bytes of arrays that are read from one file
PER_STEP = ("actions", "rewards", "terminals", "dynamics_error")
TEXTS = {name: name for name in ("level", "kind", "relations")}
TEXTS |= {"instructions": "goal", "explanations": "explanation"}  # fields, and names in records
FIELDS = ("observations", "next_observations", "states", "masks", "goals", *PER_STEP, *TEXTS)


def recordings_of(path: Path, seed: int) -> Iterator[dict]:
    """Rollouts of a file as recordings (`formats.judged`); seed draws one of their instructions."""
    if path.suffix.lower() not in READERS:
        raise ValueError(f"give a folder or a file of {', '.join(READERS)}")
    fields = READERS[path.suffix.lower()](path)
    for name in ("masks", "observations", "actions", "instructions", *fields):
        if name not in fields:
            raise ValueError(f"field {name!r} is missing; data/README.md describes the format")
        if len(fields[name]) != len(fields["masks"]):
            raise ValueError(f"{name} has {len(fields[name])} rollouts, masks another number")
    rng = np.random.default_rng(seed)
    return (_recording(dict(zip(fields, row)), rng) for row in zip(*fields.values()))


def _recording(fields, rng):
    padded = len(fields["masks"])
    mask = numbers("masks", fields.pop("masks")).reshape(padded)
    steps = int((mask != 0).sum())
    if (mask != (np.arange(padded) < steps)).any():
        raise ValueError("masks must be ones for the steps of the rollout, then zeros")
    recording = {}
    for name, values in fields.items():
        if name in TEXTS:
            recording[TEXTS[name]] = text_of(name, values, rng)
        elif name == "goals":
            recording["code"] = numbers(name, values)
        else:
            after = len(values) - padded  # states may have what follows the last action
            recording[name] = values[: steps + after]
    return recording


def texts_of(record: dict) -> dict[str, str]:
    """What a record says in words, relations as JSON; without NUL, which HDF5 cannot hold."""
    texts = {"relations": json.dumps(record["relations"])}
    for name in ("goal", "level", "kind", "explanation"):
        texts[name] = str(record.get(name) or "").replace("\0", " ")
    return texts


def text_of(field: str, value: object, rng: np.random.Generator | None = None) -> str:
    """An element of an array of texts as a string; one of several is drawn."""
    if rng is not None and not isinstance(value, (str, bytes)):
        value = value[rng.integers(len(value))] if len(value) else ""
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
    columns = {
        "observations": [record["observations"][:-1] for record in records],
        "next_observations": [record["observations"][1:] for record in records],
        "masks": [np.ones(len(record["actions"]), np.int32) for record in records],
        "terminals": [rollouts.terminals_of(record) for record in records],
    }
    for name in ("actions", "rewards", "states", "dynamics_error"):
        values = [record.get(name) for record in records]
        if all(value is not None for value in values):
            columns[name] = values
    fields = {name: _padded(values) for name, values in columns.items()}
    texts = [texts_of(record) for record in records]
    for name, field in TEXTS.items():
        fields[name] = np.array([text[field] for text in texts])
    if encode is not None:
        encodings = np.asarray(encode(fields["instructions"].tolist()), np.float32)
        seen = fields["observations"]
        of_steps = np.repeat(encodings[:, None], seen.shape[1], axis=1)
        fields["observations"] = np.concatenate([seen, of_steps], -1)
    with folder.replacing(path) as aside, open(aside, "wb") as stream:
        np.savez_compressed(stream, **fields)


def _padded(values):
    """Arrays of rollouts as one, (N, T of the longest, ...), zero past their end."""
    longest = max(values, key=len)
    array = np.zeros((len(values), *longest.shape), longest.dtype)
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
        members = [file.zip.getinfo(f"{name}.npy") for name in names]
        _check_size(member.file_size for member in members)
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
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value.item()
    return value


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
