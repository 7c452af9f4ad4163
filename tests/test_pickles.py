"""Pickles of strangers: nothing in one runs, none takes memory that it does not hold."""

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

from data import formats


class Calls:  # pickled, it calls a function
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Runs:  # unpickled, it runs its state
    def __setstate__(self, state):
        os.system(state)


def text(value):  # the opcode that puts a short text on the stack
    return b"\x8c" + bytes([len(value)]) + value.encode()


def payloads(marker):
    command = f"touch {marker}"
    copyreg.add_extension("os", "system", 0x70)  # the same twice is no error
    run, told = Calls(os.system, command), b"(" + text(command)
    system = Calls(getattr, Calls(__import__, "os"), "system")
    values = {
        "os.system": run,
        "eval": Calls(eval, f"__import__('os').system({command!r})"),
        "nested": Calls(list, Calls(map, system, [command])),
        "in a dict of arrays": {"actions": np.zeros(3), "masks": run},
        "in an object array": np.array([run, "text"], object),
    }
    found = {f"{n}, protocol {p}": pickle.dumps(v, p) for n, v in values.items() for p in (0, 4)}
    mapped = b"cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n(" + text(command) + b"lt"
    memo = text("os") + b"\x94" + text("system") + b"\x9400h\0h\1\x93" + told + b"tR."
    twice = text("numpy") + b"q\x000" + text("os") + b"q\x000h\0" + text("system") + b"\x93"
    return {
        **found,
        "GLOBAL": b"cos\nsystem\n" + told + b"tR.",
        "INST": told + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text(command) + b"o.",
        "EXT1": b"\x82\x70" + told + b"tR.",
        "NEWOBJ": mapped + b"\x81tR.",
        "NEWOBJ_EX": mapped + b"}\x92tR.",
        "BUILD": b"ctest_pickles\nRuns\n)\x81" + text(command) + b"b.",
        "names from the memo": memo,
        "a memo entry put twice": twice + told + b"tR.",
        "a dotted name": b"\x80\4" + text("shutil") + text("os.system") + b"\x93" + told + b"tR.",
        "thrown away": b"cos\nsystem\n" + told + b"tR0}.",
    }


@pytest.mark.parametrize("name", payloads("marker"))
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(world, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    payload, marker = payloads("marker")[name], tmp_path / "marker"
    pickle.loads(payload)
    assert marker.exists()  # the payload is live
    marker.unlink()
    path = write(tmp_path / "evil.npy", npy({})[:128] + payload)
    with pytest.raises(ValueError, match=r"evil\.npy: the pickle (names|has the opcode) .*refused"):
        formats.read(path, world)
    assert not marker.exists()


NONE = b"J\xff\xff\xff\xff"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\1btR"
DTYPE = b"cnumpy\ndtype\n(U\x02f8\x89\x88tR(K\3U\1<NNN" + NONE + NONE + b"K\0tb"


def array(size):  # of 8 bytes, says that it is of size x size numbers
    shape = b"K\1" + (b"J" + struct.pack("<i", size)) * 2 + b"\x86"
    return RECONSTRUCT + b"(" + shape + DTYPE + b"\x89C\x08abcdefghtb."


DAMAGED = {
    "more numbers than bytes": array(2**31 - 1),
    "fewer than none": array(-1),
    "bytes of a tebibyte": b"\x96" + struct.pack("<Q", 2**40) + b"short.",
    "a frame without end": b"\x95" + struct.pack("<Q", 2**62) + b"N",
    "a memo of gibibytes": b"Nr\xff\xff\xff\x7f.",
    "an array of another type": b"cnumpy\ndtype\n(U\x04V999\x89\x88tR.",
    "a state of no array": RECONSTRUCT + b"]b.",
    "a tuple as deep as the stack": b"}()" + b"\x85" * 10**6 + b"Nu.",
    "a doubling list": b"]\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(200)) + b".",
    "a list in itself": b"]\x94h\0a.",
    "a tensor": pickle.dumps(torch.zeros(2)),
    "fields": pickle.dumps({"actions": np.zeros(2, "f4,i4")}),
    "dicts in an array": pickle.dumps({"masks": np.array([{}, "x"], object), "actions": [1]}),
}


@pytest.mark.parametrize("code", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_pickle_is_refused_and_takes_no_memory(world, tmp_path, code):
    path = write(tmp_path / "a.npy", npy({})[:128] + code)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"a\.npy: "):
            formats.read(path, world)
        assert tracemalloc.get_traced_memory()[1] < 3 * 10**7
    finally:
        tracemalloc.stop()


def test_every_cut_of_a_recording_is_refused(world, rollouts, tmp_path):
    recorded = authors_layout(rollouts[:12], 20)
    for path, content in ((tmp_path / "a.npy", npy(recorded)), (tmp_path / "a.npz", npz(recorded))):
        for end in [*range(0, 300, 7), *range(300, len(content), 4001), len(content) - 1]:
            with pytest.raises(ValueError, match=path.name):
                formats.read(write(path, content[:end]), world)
