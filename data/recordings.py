"""Recordings as dicts of arrays: the authors' pickled .npy, ImagineBench's .npz, .npy and .hdf5.

Each array holds one field, padded: rollouts first, then steps. Files are read as data: nothing that
one names is imported or called, no link is followed, no array is larger than its file says.
This file knows neither goals nor judges.
"""

import io
import math
import pickle
import pickletools
import re
import zipfile
from pathlib import Path

import numpy as np

LARGEST = 8 * 2**30  # bytes of arrays that are read from one file
LARGEST_NUMBER = 1e30
PER_STEP = ("actions", "rewards", "terminals", "masks", "dynamics_error")
PER_ROLLOUT = ("instructions", "level", "kind", "relations", "imagined", "explanations")
FIELDS = ("observations", "next_observations", "goals", "states", *PER_STEP, *PER_ROLLOUT)


class Refused(ValueError):
    """What is wrong with a file, in our own words."""


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """{field: array} of a file, of the fields in FIELDS. Raises Refused."""
    try:
        arrays = READERS[path.suffix.lower()](path)
        for name, array in arrays.items():
            _check_elements(name, array)
    except Refused:
        raise
    except Exception as error:  # what numpy, zipfile and h5py meet in a damaged file
        raise Refused(f"damaged, or no {path.suffix} file ({type(error).__name__})") from None
    return arrays


def text_of(field: str, value: object) -> str:
    """An element of an array of texts as a string."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise Refused(f"{field} must be a text, got {type(value).__name__}")
    return str(value).removeprefix("\ufeff")


def numbers(field: str, values: object, shape: tuple, longer: bool = False) -> np.ndarray:
    """Values as an array of finite numbers of a shape, in which None stands for any size.

    longer: the last axis may be longer, is cut, and becomes float32. Raises Refused.
    """
    values = np.asarray(values)
    found = values.shape
    if longer and len(found) == len(shape):
        values = values[..., : shape[-1]]
    wanted = tuple(have if want is None else want for have, want in zip(values.shape, shape))
    if len(found) != len(shape) or values.shape != wanted:
        allowed = str(shape).replace("None", "any") + " or longer" * longer
        raise Refused(f"{field} must have shape {allowed}, got {found}")
    if values.dtype.kind not in "biuf":
        raise Refused(f"{field} must be numbers, got type {values.dtype}")
    if not np.isfinite(values).all():
        raise Refused(f"{field} has NaN or infinite values")
    if values.size and np.abs(values.astype(np.float64)).max() > LARGEST_NUMBER:
        raise Refused(f"{field} has values beyond {LARGEST_NUMBER:g}")
    return values.astype(np.float32) if longer else values


def is_unknown(values: object) -> bool:
    """Whether numbers of a rollout are all NaN, which stands for a field that it does not have."""
    values = np.asarray(values)
    return values.dtype.kind == "f" and bool(np.isnan(values).all())


def whole_actions(values: object, num_actions: int) -> np.ndarray:
    """Actions as int64. Raises Refused unless they are one or more whole numbers in range."""
    values = numbers("actions", values, (None,))
    if len(values) == 0:
        raise Refused("actions is empty; a rollout needs at least one action")
    if values.dtype.kind == "b" or (values != np.floor(values)).any():
        raise Refused("actions must be whole numbers, and some are not")
    if values.min() < 0 or values.max() >= num_actions:
        raise Refused(
            f"actions must be in 0..{num_actions - 1}, got {values.min()}..{values.max()}"
        )
    return values.astype(np.int64)


def _check_elements(name, array):
    """Raise unless an array holds numbers or texts, and these are Unicode."""
    if array.dtype.kind not in "biufSUO" or array.dtype.itemsize == 0:
        raise Refused(f"field {name!r} has type {array.dtype}; only numbers and texts are read")
    if array.dtype.kind == "U" and array.size:
        codes = array.ravel(order="K").view(np.dtype("u4").newbyteorder(array.dtype.byteorder))
        if codes.max() > 0x10FFFF or ((codes >= 0xD800) & (codes < 0xE000)).any():
            raise Refused(f"field {name!r} holds what is no Unicode character; the file is damaged")


def _read_npy(path):
    with open(path, "rb") as stream:
        shape, dtype = _npy_header(stream)
        if not dtype.hasobject or shape != ():
            raise Refused("it holds a single array; a recording is a dict of arrays")
        found = unpickle(stream.read())
    if not isinstance(found, dict):
        raise Refused(f"it holds a {type(found).__name__}; a recording is a dict of arrays")
    return {name: _as_array(name, found[name]) for name in FIELDS if name in found}


def _npy_header(stream):
    """(shape, dtype) at the head of an .npy file."""
    try:
        if np.lib.format.read_magic(stream) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    except Exception:  # numpy parses it as Python source, which fails in many ways
        raise Refused("it is no .npy file, or its header is damaged") from None
    return shape, dtype


def _read_npz(path):
    arrays = {}
    left = LARGEST
    with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as file:
        for name in FIELDS:
            member = f"{name}.npy"
            if member not in archive.namelist():
                continue
            size = archive.getinfo(member).file_size
            left -= size
            with archive.open(member) as stream:
                shape, dtype = _npy_header(stream)
            if dtype.hasobject:
                raise Refused(f"field {name!r} has type object; only numbers and texts are read")
            if left < 0 or math.prod(shape) * dtype.itemsize > size:
                raise Refused(
                    f"field {name!r}, {shape} of {dtype}, is more than its {size} bytes, "
                    f"or past the {LARGEST >> 30} GiB that are read"
                )
            arrays[name] = file[member]
    return arrays


def _read_hdf5(path):
    with open_hdf5(path) as file:
        return {name: np.asarray(file[name][()]) for name in FIELDS if name in file}


def open_hdf5(path: Path):  # noqa: ANN201 - h5py is optional
    """An h5py.File that holds all its data itself, and no more of it than is read."""
    try:
        import h5py
    except ImportError:
        raise Refused('HDF5 needs an optional package; `pip install "minari[hdf5]"`') from None
    left = LARGEST
    file = h5py.File(path)

    def problem(name, link):
        nonlocal left
        if not isinstance(link, h5py.HardLink):
            return f"{name} is a link to data in another place; refused"
        found = file[name]
        if isinstance(found, h5py.Dataset):
            left -= found.nbytes
            if found.external or found.is_virtual:
                return f"{name} lies in another file; refused"
        return f"{name} is larger than is read" if left < 0 else None

    said = file.visititems_links(problem)
    if said is not None:
        file.close()
        raise Refused(said)
    return file


READERS = {".npy": _read_npy, ".npz": _read_npz, ".hdf5": _read_hdf5, ".h5": _read_hdf5}

# ----------------------------------------------------------------------------------------------
# Pickles: Python's own unpickler, given nothing that could run

OPCODES_REFUSED = """EXT1 EXT2 EXT4 INST OBJ NEWOBJ NEWOBJ_EX PERSID BINPERSID NEXT_BUFFER
READONLY_BUFFER DUP POP POP_MARK EMPTY_SET ADDITEMS FROZENSET""".split()
MOST_TUPLES = 1000  # that no call has used up: so deep they can nest, and hashing them recurses


def unpickle(data: bytes) -> object:
    """The value of pickled bytes: plain values, arrays over these bytes. Raises Refused."""
    try:
        _check_opcodes(data)
        return _finished(_Unpickler(io.BytesIO(data), encoding="latin1").load())
    except Refused:
        raise
    except Exception as error:  # the unpickler raises whatever it meets
        raise Refused(f"the pickle is damaged or cut short ({type(error).__name__})") from None


def _check_opcodes(data):
    """Refuse what gets past find_class, takes memory, or makes the hash of a tuple endless."""
    memo_has_tuple = {}
    is_tuple = False  # what lies on top of the stack
    tuples = 0
    for opcode, argument, position in pickletools.genops(data):
        name = opcode.name
        if name in OPCODES_REFUSED:
            raise Refused(f"the pickle has the opcode {name}, which no array needs; refused")
        if name == "MEMOIZE" or name.endswith("PUT"):
            index = len(memo_has_tuple) if argument is None else argument
            memo_has_tuple[index] = is_tuple
            is_endless = index > position
        else:
            is_tuple = "TUPLE" in name or (is_tuple and name == "FRAME")
            tuples += ("TUPLE" in name) - (name in ("REDUCE", "BUILD"))
            is_endless = name.endswith("GET") and memo_has_tuple.get(argument, False)
        if is_endless or tuples > MOST_TUPLES:
            raise Refused("the pickle nests or repeats values as no recording does; refused")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        """What stands in for a name: made anew each time, as a pickle can change what it names."""
        stand_ins = {
            "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
            "numpy.core.multiarray.scalar": lambda dtype, data: _array(data, dtype, ()).item(),
            "numpy.core.numeric._frombuffer": lambda *state: _Array(_array(*state)),
            "numpy.dtype": lambda code, *_: _Dtype(code),
            "numpy.ndarray": lambda: None,
            "_codecs.encode": lambda text, _: text.encode("latin1"),
            "builtins.bytes": lambda: b"",
        }
        name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if name not in stand_ins:
            raise Refused(f"the pickle names {name[:60]!a}, no array and no plain value; refused")
        return stand_ins[name]


class _Dtype:
    """A dtype, made from a code; then told its byte order."""

    def __init__(self, code):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|[SU][1-9]\d{0,6}|O8?", code):
            raise Refused(f"the pickle has an array of type {code[:20]!a}, not numbers or texts")
        self.value = np.dtype(code.replace("O8", "O"))

    def __setstate__(self, state):
        _, order, *described = _tuple(state)[:5]
        if described != [None, None, None]:
            raise Refused("the pickle has an array with fields; only numbers and texts are read")
        self.value = self.value.newbyteorder(order)


class _Array:
    """An array, made empty; then filled."""

    def __init__(self, value=None):
        self.value = value

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = _tuple(state)
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _tuple(state):
    if not isinstance(state, tuple):  # _check_opcodes counts on it
        raise Refused("the pickle sets a state as numpy never does; refused")
    return state


def _array(data, dtype, shape, order="C"):
    """An array over bytes that the file holds, or of texts: sizes must agree."""
    if dtype.value.hasobject:
        return _finished(data[0]) if shape == () else _as_array("of objects", data).reshape(shape)
    if isinstance(data, str):
        data = data.encode("latin1")  # Python 2 wrote bytes as text
    size = math.prod(shape[:32]) * dtype.value.itemsize
    if min(shape, default=0) < 0 or len(shape) > 32 or size != len(data):
        raise Refused(f"the pickle has {len(data)} bytes for {shape} of {dtype.value}; refused")
    return np.frombuffer(data, dtype.value).reshape(shape, order=order)


def _finished(value):
    return value.value if isinstance(value, _Array) else value


def _as_array(name, value):
    """A field of a pickled dict as an array: lists of numbers, texts or lists of texts too."""
    value = _finished(value)
    if isinstance(value, list):
        items = [_finished(item) for item in value]
        kinds = {type(item) for item in items}
        if kinds <= {int, float, bool}:
            return np.array(items)
        if kinds <= {str, list, tuple, np.ndarray}:
            value = np.empty(len(items), object)
            for row, item in enumerate(items):
                value[row] = item
    if not isinstance(value, np.ndarray):
        raise Refused(f"field {name!r} holds other things than numbers and texts")
    return value
