"""Recordings as dicts of padded arrays, one a field: rollouts first, then steps.

Read are the authors' pickled .npy (several instructions, `goals` as numbers) and ImagineBench's
.npz, .npy and .hdf5 (an encoding behind the observations, goals in words); written is .npz.
Files are read as data: nothing that one names is imported or called. This file judges nothing.
"""

import json
import pickletools
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data import rollouts
from experiment import folder

LARGEST = 8 * 2**30  # bytes of arrays that are read from one file
PER_STEP = ("actions", "rewards", "terminals", "masks", "dynamics_error")
TEXTS = ("instructions", "level", "kind", "relations", "explanations")  # one or more a rollout
FIELDS = ("observations", "next_observations", "goals", "states", "imagined", *PER_STEP, *TEXTS)


def recordings_of(path: Path, seed: int) -> Iterator[dict]:
    """Rollouts of a file as recordings (`formats.judged`); `masks` says which steps are real.

    seed: draws one of several instructions. Raises ValueError that names the field.
    """
    fields = READERS[path.suffix.lower()](path)
    for name in ("observations", "actions", "masks", "instructions"):
        if name not in fields:
            raise ValueError(f"field {name!r} is missing; data/README.md describes the format")
    count = len(fields["masks"])
    for name, values in fields.items():
        if name not in TEXTS:
            fields[name] = numbers(name, values)
        if name in PER_STEP and values.shape[2:] == (1,):
            fields[name] = values[..., 0]
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} rollouts, masks {count}")
    rng = np.random.default_rng(seed)
    rows = ({name: values[row] for name, values in fields.items()} for row in range(count))
    return (_recording(row, rng) for row in rows)


def _recording(fields, rng):
    mask = fields["masks"]
    steps = int((mask != 0).sum())
    if mask.ndim != 1 or (mask != (np.arange(len(mask)) < steps)).any():
        raise ValueError("masks must be ones for the steps of the rollout, then zeros")
    goal = {"goal": _drawn(fields["instructions"], rng)}
    for name in ("level", "kind", "relations"):
        if name in fields:
            goal[name] = text_of(name, fields[name])
    if "goals" in fields:
        goal["code"] = fields["goals"]
    recording = {"goal": goal, "imagined": fields.get("imagined", False)}
    if "explanations" in fields:
        recording["explanation"] = text_of("explanations", fields["explanations"])
    for name in ("actions", "rewards", "terminals", "dynamics_error", "next_observations"):
        if name in fields:
            recording[name] = fields[name][:steps]
    for name in ("observations", "states"):
        if name in fields:  # perhaps with what follows the last action
            recording[name] = fields[name][: steps + len(fields[name]) - len(mask)]
    for name in ("states", "dynamics_error"):
        if np.isnan(recording.get(name, 0)).all():  # this rollout does not have it
            del recording[name]
    return recording


def _drawn(texts, rng):
    """One of a rollout's instructions."""
    if isinstance(texts, (str, bytes)):
        texts = [texts]
    if np.ndim(texts) != 1 or len(texts) == 0:
        raise ValueError("instructions must be texts, one or several a rollout")
    return text_of("instructions", texts[rng.integers(len(texts))])


def text_of(field: str, value: object) -> str:
    """An element of an array of texts as a string."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise ValueError(f"{field} must be a text, got {type(value).__name__}")
    return str(value)


def numbers(field: str, values: object) -> np.ndarray:
    """The values, if they are an array of numbers."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        found = getattr(values, "dtype", type(values).__name__)
        raise ValueError(f"{field} must be an array of numbers, got {found}")
    return values


# ----------------------------------------------------------------------------------------------
# Files


def _read_npy(path):
    with open(path, "rb") as stream:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        if shape != () or dtype != object:
            raise ValueError("it holds a single array; a recording is a dict of arrays")
        found = unpickle(stream.read())
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}; a recording is a dict of arrays")
    return {name: found[name] for name in FIELDS if name in found}


def _read_npz(path):
    with zipfile.ZipFile(path) as archive:
        members = {name: f"{name}.npy" for name in FIELDS if f"{name}.npy" in archive.namelist()}
        _check_size(archive.getinfo(member).file_size for member in members.values())
        arrays = {}
        for name, member in members.items():
            with archive.open(member) as stream:
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    return arrays


def _read_hdf5(path):
    with open_hdf5(path) as file:
        return {name: file[name][()] for name in FIELDS if name in file}


def _check_size(sizes):
    size = sum(sizes)
    if size > LARGEST:
        raise ValueError(f"its arrays take {size} bytes; at most {LARGEST} are read from a file")


def open_hdf5(path: Path):  # noqa: ANN201 - h5py is optional
    """An h5py.File that holds all its data itself, and no more of it than is read."""
    try:
        import h5py
    except ImportError:
        raise ValueError('HDF5 needs an optional package; `pip install "minari[hdf5]"`') from None
    file = h5py.File(path)
    sizes = []

    def lies_elsewhere(name, link):
        if not isinstance(link, h5py.HardLink):
            return name
        if isinstance(file[name], h5py.Dataset):
            sizes.append(file[name].nbytes)
            if file[name].external or file[name].is_virtual:
                return name
        return None

    found = file.visititems_links(lies_elsewhere)
    if found is not None:
        raise ValueError(f"{found} is a link, or lies in another file; refused")
    _check_size(sizes)
    return file


READERS = {".npy": _read_npy, ".npz": _read_npz, ".hdf5": _read_hdf5, ".h5": _read_hdf5}

# ----------------------------------------------------------------------------------------------
# Pickles: a stack machine for the opcodes that plain values and arrays need, which calls nothing


class _Dtype:
    """A dtype, made from a code; then told its byte order."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|[SU][1-9]\d{0,6}|O8?", code):
            raise ValueError(f"the pickle has an array of type {code!a}, not numbers or texts")
        self.value = np.dtype(code.removesuffix("8") if code[0] == "O" else code)


STAND_INS = {  # for what a pickle may name
    "numpy.ndarray": None,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0),
    "numpy.core.multiarray.scalar": lambda dtype, data: np.frombuffer(data, dtype.value)[0],
}
TAKEN = {  # values from the top of the stack; None: all above the mark
    "TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "APPENDS": None,
    "SETITEM": 2, "SETITEMS": None, "STACK_GLOBAL": 2, "REDUCE": 2, "BUILD": 1,
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
VALUES = """BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE BINUNICODE8
SHORT_BINUNICODE BINBYTES BINBYTES8 SHORT_BINBYTES""".split()


def unpickle(data: bytes) -> object:
    """The value of pickled bytes, as numpy.save writes them. Raises ValueError, and others."""
    stack, marks, memo = [], [], {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        taken = []
        if name in TAKEN:
            start = marks.pop() if TAKEN[name] is None else len(stack) - TAKEN[name]
            taken = stack[start:]
            del stack[start:]
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name.startswith("TUPLE"):
            stack.append(tuple(taken))
        elif name.startswith("APPEND"):
            stack[-1].extend(taken)
        elif name.startswith("SETITEM"):
            _set_items(stack[-1], taken)
        elif name.endswith("GLOBAL"):
            stack.append(_stand_in(".".join(taken) or argument.replace(" ", ".")))
        elif name == "REDUCE":
            stack.append(taken[0](*taken[1]))
        elif name == "BUILD":
            _set_state(stack[-1], *taken)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"the pickle has the opcode {name}, which no array needs; refused")
    value = stack.pop()
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _stand_in(name):
    name = name.replace("numpy._core.", "numpy.core.")
    if name not in STAND_INS:
        raise ValueError(f"the pickle names {name[:60]!a}, no array and no plain value; refused")
    return STAND_INS[name]


def _set_items(target, items):
    for key in items[::2]:
        if not isinstance(key, (str, int)):  # the hash of nested tuples can take for ever
            raise ValueError("the pickle has a dict whose keys are no texts; refused")
    target.update(zip(items[::2], items[1::2]))


def _set_state(target, state):
    if isinstance(target, _Dtype):
        target.value = target.value.newbyteorder(state[1])
    else:  # numpy sees to it that the bytes fill the shape
        version, shape, dtype, is_fortran, data = state
        np.ndarray.__setstate__(target, (version, shape, dtype.value, is_fortran, data))


# ----------------------------------------------------------------------------------------------
# Writing


def write_npz(path: str | Path, records: Sequence[dict], encode: Callable | None = None) -> None:
    """Records as a dict of arrays, padded to the longest rollout.

    Observations end in the goal text's encoding, if there is one.
    """
    path = Path(path)
    lengths = np.array([len(record["actions"]) for record in records])
    steps = int(lengths.max())
    left = lengths[:, None] - np.arange(steps)  # the last step has one left
    success = np.array([record["success"] for record in records])
    fields = {
        "masks": (left > 0).astype(np.int32),
        "terminals": (left == 1) & success[:, None],
        "relations": np.array([json.dumps(record["relations"]) for record in records]),
        "imagined": np.array([rollouts.is_imagined(record) for record in records]),
        "next_observations": _padded([record["observations"][1:] for record in records], steps),
    }
    texts = {"instructions": "goal", "level": "level", "kind": "kind", "explanations": "explanation"}
    for name, field in texts.items():
        fields[name] = np.array([record.get(field) or "" for record in records])
    for name in ("actions", "rewards", "states", "dynamics_error"):
        values = [record.get(name) for record in records]
        if any(value is not None for value in values):
            fields[name] = _padded(values, steps + (name == "states"))
    before = _padded([record["observations"][:-1] for record in records], steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with folder.replacing(path) as aside, tempfile.TemporaryFile(dir=path.parent) as scratch:
        if encode is not None:
            ...
        with open(aside, "wb") as stream:
            np.savez_compressed(stream, **fields)
