"""Pickles of strangers: nothing in one runs, none takes memory or time that it does not hold."""

import copyreg
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from fuzz import authors_layout, npy, npz
from test_formats import write

from data import formats, recordings


class Calls:
    """Pickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Runs:
    """Unpickled, it runs its state."""

    def __setstate__(self, state):
        os.system(state)


def text(value):
    """The opcode that puts a short text on the stack."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def payloads(marker):
    """Pickles that make a file when Python's own unpickler reads them, by name."""
    command = f"touch {marker}"
    copyreg.add_extension("os", "system", 0x70)  # the same twice is no error
    run, told = Calls(os.system, command), b"(" + text(command)
    deep = Calls(list, Calls(map, Calls(getattr, Calls(__import__, "os"), "system"), [command]))
    values = {
        "os.system": run,
        "builtins.eval": Calls(eval, f"__import__('os').system({command!r})"),
        "builtins.exec": Calls(exec, f"import os; os.system({command!r})"),
        "nested reduce": deep,
        "in a dict of arrays": {"actions": np.zeros(3), "masks": run},
        "in a list": [1, [run]],
        "in an object array": np.array([run, "text"], object),
        "beside an array": (np.zeros(2), run),
    }
    found = {
        f"{name}, protocol {p}": pickle.dumps(value, p)
        for name, value in values.items()
        for p in range(6)
    }
    mapped = b"cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n(" + text(command) + b"lt"
    os_system = text("os") + b"\x94" + text("system") + b"\x9400h\0h\1\x93" + told + b"tR."
    twice = (
        text("numpy")
        + b"q\0"
        + b"0"
        + text("os")
        + b"q\0"
        + b"0h\0"
        + text("system")
        + b"\x93"
        + told
        + b"tR."
    )
    return {
        **found,
        "GLOBAL": b"cos\nsystem\n" + told + b"tR.",
        "INST": told + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text(command) + b"o.",
        "EXT1": b"\x82\x70" + told + b"tR.",
        "EXT2": b"\x83\x70\0" + told + b"tR.",
        "EXT4": b"\x84\x70\0\0\0" + told + b"tR.",
        "NEWOBJ": mapped + b"\x81tR.",
        "NEWOBJ_EX": mapped + b"}\x92tR.",
        "BUILD": b"ctest_pickles\nRuns\n)\x81" + text(command) + b"b.",
        "names from the memo": os_system,
        "a memo entry put twice": twice,
        "a dotted name": b"\x80\4" + text("shutil") + text("os.system") + b"\x93" + told + b"tR.",
        "thrown away": b"cos\nsystem\n" + told + b"tR0}.",
    }


MARKER = "kalm_was_here"


@pytest.mark.parametrize("name", payloads(MARKER))
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(world, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    payload, marker = payloads(MARKER)[name], tmp_path / MARKER
    pickle.loads(payload)
    assert marker.exists()  # the payload is live
    marker.unlink()
    path = write(tmp_path / "evil.npy", npy({})[:128] + payload)
    with pytest.raises(
        ValueError, match=r"evil\.npy: the pickle (names|has the opcode) "
    ) as refused:
        formats.read(path, world)
    assert "\n" not in str(refused.value) and not marker.exists()


@pytest.mark.parametrize(
    "value, name",
    [
        (Calls(os.system, "true"), "posix.system"),
        (torch.zeros(2), "torch._utils._rebuild_tensor_v2"),
        (np.random.default_rng(0), "numpy.random"),
        (Calls(np.load, "x.npy"), "numpy.load"),
    ],
)
def test_a_refused_name_is_said(value, name):
    with pytest.raises(ValueError, match=f"names '{name}"):
        recordings.unpickle(pickle.dumps(value))


@pytest.mark.parametrize(
    "name, code",
    [
        ("INST", b"(icopyreg\n_reconstructor\n"),
        ("OBJ", b"(cnumpy\nndarray\no"),
        ("NEWOBJ", b"cnumpy\nndarray\n)\x81"),
        ("NEWOBJ_EX", b"cnumpy\nndarray\n)}\x92"),
        ("EXT1", b"\x82\1"),
        ("EXT2", b"\x83\1\0"),
        ("EXT4", b"\x84\1\0\0\0"),
        ("PERSID", b"Pid\n"),
        ("BINPERSID", b"NQ"),
        ("NEXT_BUFFER", b"\x97"),
        ("READONLY_BUFFER", b"N\x98"),
        ("POP", b"N0"),
        ("DUP", b"N2"),
        ("POP_MARK", b"(1"),
        ("EMPTY_SET", b"\x8f"),
        ("EMPTY_SET", b"\x8f(\x90"),
        ("FROZENSET", b"(\x91"),
    ],
)
def test_an_opcode_that_no_array_needs_is_refused_by_name(name, code):
    with pytest.raises(ValueError, match="opcode " + name):
        recordings.unpickle(code + b".")


NONE = b"J\xff\xff\xff\xff"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\1btR"
FLOATS = b"cnumpy\ndtype\n(U\x02f8\x89\x88tR(K\3U\1<NNN" + NONE + NONE + b"K\0tb"
SHAPED = b"K\1J%bJ%b\x86" + FLOATS + b"\x89C\x08abcdefgh"


@pytest.mark.parametrize(
    "code, said",
    [
        (
            RECONSTRUCT + b"(" + SHAPED.replace(b"%b", struct.pack("<i", 2**31 - 1)) + b"tb.",
            "8 bytes for",
        ),
        (RECONSTRUCT + b"(" + SHAPED.replace(b"%b", struct.pack("<i", -1)) + b"tb.", "8 bytes for"),
        (b"\x96" + struct.pack("<Q", 2**40) + b"short.", "damaged"),
        (b"\x8e" + struct.pack("<Q", 2**40) + b"short.", "damaged"),
        (b"Nr\xff\xff\xff\x7f.", "nests or repeats"),
        (b"\x95" + struct.pack("<Q", 2**62) + b"N", "damaged"),
        (b"t.", "damaged"),
        (b"L" + b"9" * 10**5 + b"L\n.", "damaged"),
        (b"Fno\xff number\n.", "damaged"),
        (b"h\7.", "damaged"),
        (b"cnumpy\ndtype\n(U\x04V999\x89\x88tR.", "not numbers or texts"),
        (b".", "damaged"),
        (b"N", "damaged"),
        (b"", "damaged"),
        (b"cnumpy\ndtype\n)R.", "damaged"),
        (b"c_codecs\nencode\n(tR.", "damaged"),
        (RECONSTRUCT + b"]b.", "as numpy never does"),
        (b"}(" + b")\x85" * 10**5 + b"Nu.", "nests or repeats"),
        (b"}(" + b"cbuiltins\nbytes\n)R" * 10**4 + b")\x85" * 10**5 + b"Nu.", "nests or repeats"),
        (
            b"}(N\x85\x94" + b"".join(b"h%c\x86\x94" % i for i in range(60)) + b"Nu.",
            "nests or repeats",
        ),
    ],
)
def test_a_pickle_that_is_damaged_or_asks_for_memory_or_time_is_refused_at_once(code, said):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=said):
            recordings.unpickle(code)
        assert tracemalloc.get_traced_memory()[1] < 3 * 10**7
    finally:
        tracemalloc.stop()


def test_what_a_pickle_does_to_a_name_stays_in_it(tmp_path):
    set_default = b"c_codecs\nencode\nN}" + text("__kwdefaults__") + text("x") + b"s\x86b0."
    for code in (b"cnumpy\ndtype\n}" + text("x") + b"Nsb.", set_default.replace(b"b0.", b"b.")):
        before = {
            key: dict(vars(value))
            for key, value in vars(recordings).items()
            if hasattr(value, "__dict__")
        }
        try:
            recordings.unpickle(code)
        except ValueError:
            pass
        after = {
            key: dict(vars(value))
            for key, value in vars(recordings).items()
            if hasattr(value, "__dict__")
        }
        assert before == after and np.dtype("f8").byteorder == "="


@pytest.mark.parametrize("inside", [[np.zeros(2), {}], [None], [{"a": "b"}], [1j]])
def test_objects_in_an_array_are_texts_or_refused(inside):
    boxed = np.empty(len(inside) + 1, object)
    boxed[:-1] = inside
    boxed[-1] = "text"
    with pytest.raises(ValueError, match="other things than numbers and texts|damaged|no array"):
        recordings.unpickle(pickle.dumps(boxed))


def test_what_refers_to_itself_or_doubles_itself_by_the_memo_is_read_in_no_time_and_space(
    world, tmp_path
):
    lists = b"]\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(200)) + b"."
    itself = b"]\x94h\0a."
    for code in (lists, itself):
        with pytest.raises(ValueError, match="a recording is a dict"):
            formats.read(write(tmp_path / "a.npy", npy({})[:128] + code), world)


def test_every_cut_of_a_recording_is_refused(world, rollouts, tmp_path):
    recorded = authors_layout(rollouts[:12], 20)
    for content, path in ((npy(recorded), tmp_path / "a.npy"), (npz(recorded), tmp_path / "a.npz")):
        for end in [*range(0, 300, 7), *range(300, len(content), 4001), len(content) - 1]:
            with pytest.raises(ValueError, match=path.name):
                formats.read(write(path, content[:end]), world)
