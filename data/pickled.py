"""What a pickle file holds, read as data: numpy arrays, dicts, lists, tuples, texts, numbers, bytes.

Python's own unpickler imports and calls what a file names. This one has the standard library list the file's opcodes,
which runs none of them, and builds values by itself; names are looked up nowhere. The few that numpy writes are known
here, every other name and every opcode that calls, imports or changes an object is refused.
"""
import math
import pickletools
import re
from dataclasses import dataclass

import numpy as np

# What numpy's arrays name in a pickle of any protocol; numpy 1 says numpy.core, numpy 2 numpy._core.
KNOWN = {"numpy.core.multiarray._reconstruct": "array", "numpy.core.multiarray.scalar": "scalar", "numpy.dtype": "dtype",
         "numpy.core.numeric._frombuffer": "buffer", "numpy.ndarray": "ndarray", "_codecs.encode": "encode",
         "builtins.bytes": "bytes", "__builtin__.bytes": "bytes"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
            "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
            "BYTEARRAY8"}


@dataclass(frozen=True)
class Name:
    """A name that a file mentions: one of the values of KNOWN."""
    kind: str


@dataclass
class Unfinished:
    """An array or dtype between the opcode that makes it and the one that fills it."""
    kind: str
    code: str = ""
    value: object = None


def read(data):
    """The value of pickled bytes. Raises ValueError that says what was refused and by which name, or what is damaged."""
    try:
        return _run(data)
    except (IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"the pickle is damaged ({type(error).__name__})") from None


def _run(data):
    stack, marks, memo = [], [], {}

    def take(count):
        values = stack[len(stack) - count:]
        if len(values) < count:
            raise IndexError
        del stack[len(stack) - count:]
        return [_finished(v) for v in values]

    def take_marked():
        return take(len(stack) - marks.pop())

    for opcode, argument, _ in _opcodes(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return take(1)[0]
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in LITERALS:
                stack.append(argument)
            case "MARK":
                marks.append(len(stack))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode.name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(take(int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(take_marked()))
            case "LIST":
                stack.append(take_marked())
            case "DICT":
                stack.append(_pairs(take_marked()))
            case "APPEND" | "APPENDS":
                items = take(1) if opcode.name == "APPEND" else take_marked()
                _expect(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = take(2) if opcode.name == "SETITEM" else take_marked()
                _expect(stack[-1], dict).update(_pairs(items))
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*(_expect(part, str) for part in take(2))))
            case "REDUCE":
                stack.append(_call(*take(2)))
            case "BUILD":
                _fill(stack[-2], *take(1))
            case name:
                raise ValueError(f"the pickle has the opcode {name}{_shown(argument)}, which an array or plain value never needs; refused")


def _opcodes(data):
    try:
        yield from pickletools.genops(data)
    except ValueError:
        raise ValueError("the pickle is damaged or cut short") from None


def _shown(argument):
    """An opcode's argument for a message: names and numbers that are short."""
    return "" if argument is None else " of " + re.sub(r"[^\w. ]", "?", str(argument)[:60]).replace(" ", ".")


def _expect(value, kind):
    if type(value) is not kind:
        raise TypeError
    return value


def _finished(value):
    """A value that is whole; of an array or dtype the numpy object."""
    if isinstance(value, Unfinished):
        if value.value is None:
            raise ValueError(f"the pickle is damaged (a {value.kind} is used before it is filled)")
        return value.value
    return value


def _pairs(items):
    keys, values = items[::2], items[1::2]
    if len(keys) != len(values) or any(type(key) is not str for key in keys):
        raise ValueError("the pickle has a dict whose keys are not all texts; refused")
    return dict(zip(keys, values))


def _name(module, attribute):
    name = f"{module}.{attribute}"
    kind = KNOWN.get(name.replace("numpy._core.", "numpy.core."))
    if kind is None:
        raise ValueError(f"the pickle names{_shown(name).removeprefix(' of')}, which is no array and no plain value; refused")
    return Name(kind)


def _call(called, arguments):
    """What numpy's own pickles call, done by hand."""
    kind, arguments = _expect(called, Name).kind, _expect(arguments, tuple)
    if kind == "array" and arguments[0] == Name("ndarray"):
        return Unfinished("array")
    if kind == "dtype":
        code = _expect(arguments[0], str)
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|[SU][1-9]\d{0,6}|O8?", code):
            raise ValueError(f"the pickle has an array of type{_shown(code).removeprefix(' of')}; only numbers and texts are read")
        return Unfinished("dtype", code[:1] if code[0] == "O" else code)
    if kind == "scalar":
        return _array(arguments[1], arguments[0], ()).item()
    if kind == "buffer":
        values, dtype, shape, order = arguments
        return _array(values, dtype, shape, order)
    if kind == "encode" and arguments[1] == "latin1":
        return _expect(arguments[0], str).encode("latin1")
    if kind == "bytes" and arguments == ():
        return b""
    raise ValueError(f"the pickle calls {kind} with other arguments than numpy does; refused")


def _fill(target, state):
    """BUILD: the state of a dtype (its byte order) or an array (shape, dtype, order, contents), once."""
    state = _expect(state, tuple)
    if not isinstance(target, Unfinished) or target.value is not None:
        raise ValueError("the pickle changes the state of something that is no fresh array; refused")
    if target.kind == "dtype":
        order, described = state[1], state[2:5]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in described):
            raise ValueError("the pickle has an array with fields; only numbers and texts are read")
        target.value = np.dtype(target.code if order == "|" else order + target.code)
        return
    _, shape, dtype, fortran, contents = state
    if isinstance(contents, list) and dtype == object:
        target.value = _objects(contents, shape)
    else:
        target.value = _array(contents, dtype, shape, "F" if fortran else "C")


def _objects(contents, shape):
    """Contents of an object array: of one without dimensions its one value, else texts and nothing more."""
    if shape == () and len(contents) == 1 and contents[0] is not None:
        return contents[0]
    if any(type(value) is not str for value in contents):
        raise ValueError("the pickle has an object array that holds other things than texts; refused")
    return np.array(contents, object).reshape(_sizes(shape))


def _sizes(shape):
    if type(shape) is not tuple or len(shape) > 32 or any(type(n) is not int or not 0 <= n < 2 ** 48 for n in shape):
        raise ValueError("the pickle has an array of an impossible shape; refused")
    return shape


def _array(contents, dtype, shape, order="C"):
    """An array over bytes that the file holds: nothing is allocated, and sizes must agree."""
    contents = contents.encode("latin1") if isinstance(contents, str) else contents  # Python 2 wrote bytes as text
    if not isinstance(contents, (bytes, bytearray)) or not isinstance(dtype, np.dtype) or dtype.kind == "O" or order not in ("C", "F"):
        raise TypeError
    if math.prod(_sizes(shape)) * dtype.itemsize != len(contents):
        raise ValueError(f"the pickle has an array of shape {shape}, type {dtype} with {len(contents)} bytes of content; refused")
    return array_over(contents, dtype, shape, order)


def array_over(contents, dtype, shape, order):
    """Bytes as an array of that many elements, shared, not copied. Raises ValueError for texts with what is no Unicode."""
    if dtype.kind == "U" and contents:
        codes = np.frombuffer(contents, np.dtype("u4").newbyteorder(dtype.byteorder))
        if codes.max() > 0x10ffff or ((codes >= 0xd800) & (codes <= 0xdfff)).any():
            raise ValueError("a text array holds what is no Unicode character; the file is damaged")
    return np.frombuffer(contents, dtype).reshape(shape, order=order)
