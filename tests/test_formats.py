"""Recordings from elsewhere: what is read, what is refused, that nothing in a file runs, and that what is written reads back."""

import copyreg
import importlib.util
import json
import os
import pickle
import shutil
import struct
import sys
import tracemalloc
import warnings

import datasets
import gymnasium
import numpy as np
import pytest
import torch
from conftest import ROOT
from fuzz import arrays_only, authors_layout, fuzz, npy, npz, plain_npy, store, write_hdf5
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import env
import kalm
from data import formats, minari_io, padded, recordings
from data.rollouts import FEATURES, read_rollouts, write_rollouts

AUTHORS = ROOT.parent / "shared" / "reference" / "clevr_robot_40.npy"
needs_recording = pytest.mark.skipif(not AUTHORS.is_file(), reason="the authors' recordings are not here")
needs_minari = pytest.mark.skipif(not importlib.util.find_spec("minari"), reason="minari is not installed")
FORMATS = ["npz", "own", *(["minari"] if importlib.util.find_spec("minari") else [])]


def write(path, content):
    path.write_bytes(content)
    return path


def write_as(data_format, path, records, world):
    """Records in one of FORMATS; the path of what was written."""
    path = path / f"{data_format}-v0"
    if data_format == "npz":
        path = path.with_suffix(".npz")
        padded.write_npz(path, records)
    elif data_format == "own":
        write_rollouts(path, records)
    else:
        minari_io.write_minari(path, records, world)
    return path


@pytest.fixture
def recorded(rollouts):
    return authors_layout(rollouts[:12], 20)


def imaginebench_layout(rollouts, arrays):
    """The same without goals: an encoding behind the observations, one plain sentence each, no next observations."""
    triples = [r["relations"][0] for r in rollouts[: len(arrays["masks"])]]
    texts = [f"Push the {ball} ball to the {way} of the {other} ball" for ball, other, way in triples]
    seen = arrays["observations"]
    seen = np.concatenate([seen, np.full((*seen.shape[:2], 6), 0.5, np.float32)], -1)
    kept = {k: arrays[k] for k in ("actions", "rewards", "masks")}
    return {**kept, "observations": seen, "instructions": np.array(texts)}


def assert_same(read, written, skip=()):
    """Records are equal in every field that either has."""
    assert len(read) == len(written)
    for ours, theirs in zip(read, written):
        for field in set(FEATURES) - set(skip):
            a, b = ours.get(field), theirs.get(field)
            assert (a is None) == (b is None), field
            if a is not None:
                np.testing.assert_array_equal(a, b, err_msg=field)
                assert getattr(a, "dtype", None) == getattr(b, "dtype", None), field


def goes_on(world, record, more):
    """The record with actions after its end, and the states that the physics gives."""
    states, actions = [*record["states"]], [*record["actions"], *more]
    for action in more:
        states.append(world.step_batch(states[-1][None], np.array([action]))[0])
    goal = env.goal_of(record)
    states = np.array(states)
    return env.rollout_record(world, goal, world.observe(states), np.array(actions), states)


# ------------------------------------------------------------------------------------------------- the authors' .npy


@needs_recording
def test_the_authors_pickle_holds_what_its_plain_twin_holds(world):
    with np.load(AUTHORS.with_suffix(".npz")) as plain:
        found = recordings.arrays_of(AUTHORS)
        assert set(found) == set(recordings.FIELDS) & set(plain.files)
        for name, array in found.items():
            np.testing.assert_array_equal(array, plain[name])
    records, notes = formats.read(AUTHORS, world)
    assert len(records) == 40 and all(r["success"] for r in records) and not notes


@needs_recording
def test_the_relation_is_read_right_from_each_of_the_authors_sentences(world):
    found = recordings.arrays_of(AUTHORS)
    for code, sentences in zip(found["goals"], found["instructions"]):
        relations = world.recorded_goal("Any", code).relations
        assert {world.recorded_goal(str(s)).relations for s in sentences} == {relations}


@pytest.mark.parametrize("protocol", range(6))
def test_recordings_in_the_authors_layout_become_the_rollouts_that_they_record(world, rollouts, recorded, tmp_path, protocol):
    records, notes = formats.read(write(tmp_path / "a.NPY", npy(recorded, protocol)), world)
    assert not notes
    assert_same(records, rollouts[:12], skip=("goal", "states"))
    assert all(r["goal"] in texts for r, texts in zip(records, recorded["instructions"]))


def test_the_seed_draws_the_instruction(world, recorded, tmp_path):
    path = write(tmp_path / "a.npy", npy(recorded))
    texts = [[r["goal"] for r in formats.read(path, world, seed)[0]] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_instructions_are_read_from_every_plain_container(world, recorded, tmp_path):
    plain = formats.read(write(tmp_path / "a.npy", npy(recorded)), world)[0]
    texts = recorded["instructions"]
    rows = np.empty(len(texts), object)
    rows[:] = [list(row) for row in texts]
    for same in (texts.astype(object), np.asfortranarray(texts), texts.tolist(), rows, list(texts), [list(row) for row in texts]):
        path = write(tmp_path / "b.npy", npy({**recorded, "instructions": same}))
        assert_same(formats.read(path, world)[0], plain)
    single = write(tmp_path / "c.npy", npy({**recorded, "instructions": ["\ufeff" + t for t in texts[:, 0]]}))
    assert [r["goal"] for r in formats.read(single, world)[0]] == texts[:, 0].tolist()


@pytest.mark.parametrize("field", ("masks", "actions", "rewards", "terminals"))
def test_a_last_axis_of_one_means_nothing(world, recorded, tmp_path, field):
    plain = formats.read(write(tmp_path / "a.npy", npy(recorded)), world)[0]
    recorded[field] = recorded[field].reshape(12, 20, 1) if recorded[field].ndim == 2 else recorded[field][..., 0]
    assert_same(formats.read(write(tmp_path / "b.npy", npy(recorded)), world)[0], plain)


@pytest.mark.parametrize("field, step, value", [("rewards", 0, 55), ("terminals", 0, True), ("terminals", -1, False)])
def test_what_the_judge_contradicts_is_counted_and_the_judge_believed(world, rollouts, recorded, tmp_path, field, step, value):
    last = int(recorded["masks"][4].sum())
    recorded[field][4, step % last] = value
    path = write(tmp_path / "a.npy", npy(recorded))
    records, notes = formats.read(path, world)
    np.testing.assert_array_equal(records[4]["rewards"], rollouts[4]["rewards"])
    assert notes == {"contradicted": 1} and records[4]["success"]
    assert "in 1 the recorded rewards or terminals" in formats.read_offline(path, world)[1]


def test_rollouts_that_miss_their_goal_are_left_out_of_what_is_learned_from(world, recorded, tmp_path):
    lengths = recorded["masks"].sum(1)
    recorded["masks"][lengths.argmax(), lengths.max() - 1] = 0  # the last, successful step of one is lost
    kept, sentence = formats.read_offline(write(tmp_path / "a.npy", npy(recorded)), world)
    assert len(kept) == 11 and sentence.startswith("11 of 12 rollouts") and all(r["success"] for r in kept)


@pytest.mark.parametrize("data_format", ["authors", *FORMATS])
def test_a_recording_that_goes_on_after_its_goal_ends_there(world, rollouts, tmp_path, data_format):
    long = [goes_on(world, r, [0, 39, 8, 17]) for r in rollouts[:12]]
    if data_format == "authors":
        path = write(tmp_path / "a.npy", npy(authors_layout(long, 30)))
    else:
        path = write_as(data_format, tmp_path, long, world)
    kept, sentence = formats.read_offline(path, world)
    assert_same(kept, rollouts[:12], skip=("goal", "states"))
    assert "12 went on after their goal was reached" in sentence


# ---------------------------------------------------------------------------------------- pickles that want to run code


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
    found = {f"{name}, protocol {p}": pickle.dumps(value, p) for name, value in values.items() for p in range(6)}
    mapped = b"cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n(" + text(command) + b"lt"
    os_system = text("os") + b"\x94" + text("system") + b"\x9400h\0h\1\x93" + told + b"tR."
    twice = text("numpy") + b"q\0" + b"0" + text("os") + b"q\0" + b"0h\0" + text("system") + b"\x93" + told + b"tR."
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
        "BUILD": b"ctest_formats\nRuns\n)\x81" + text(command) + b"b.",
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
    with pytest.raises(ValueError, match=r"evil\.npy: the pickle (names|has the opcode) ") as refused:
        formats.read(path, world)
    assert "\n" not in str(refused.value) and not marker.exists()


@pytest.mark.parametrize("value, name", [
    (Calls(os.system, "true"), "posix.system"), (torch.zeros(2), "torch._utils._rebuild_tensor_v2"),
    (np.random.default_rng(0), "numpy.random"), (Calls(np.load, "x.npy"), "numpy.load")])  # fmt: skip
def test_a_refused_name_is_said(value, name):
    with pytest.raises(ValueError, match=f"names '{name}"):
        recordings.unpickle(pickle.dumps(value))


@pytest.mark.parametrize("name, code", [
    ("INST", b"(icopyreg\n_reconstructor\n"), ("OBJ", b"(cnumpy\nndarray\no"), ("NEWOBJ", b"cnumpy\nndarray\n)\x81"),
    ("NEWOBJ_EX", b"cnumpy\nndarray\n)}\x92"), ("EXT1", b"\x82\1"), ("EXT2", b"\x83\1\0"), ("EXT4", b"\x84\1\0\0\0"),
    ("PERSID", b"Pid\n"), ("BINPERSID", b"NQ"), ("NEXT_BUFFER", b"\x97"), ("READONLY_BUFFER", b"N\x98"), ("POP", b"N0"),
    ("DUP", b"N2"), ("POP_MARK", b"(1"), ("EMPTY_SET", b"\x8f"), ("EMPTY_SET", b"\x8f(\x90"), ("FROZENSET", b"(\x91")])  # fmt: skip
def test_an_opcode_that_no_array_needs_is_refused_by_name(name, code):
    with pytest.raises(ValueError, match="opcode " + name):
        recordings.unpickle(code + b".")


NONE = b"J\xff\xff\xff\xff"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\1btR"
FLOATS = b"cnumpy\ndtype\n(U\x02f8\x89\x88tR(K\3U\1<NNN" + NONE + NONE + b"K\0tb"
SHAPED = b"K\1J%bJ%b\x86" + FLOATS + b"\x89C\x08abcdefgh"


@pytest.mark.parametrize("code, said", [
    (RECONSTRUCT + b"(" + SHAPED.replace(b"%b", struct.pack("<i", 2 ** 31 - 1)) + b"tb.", "8 bytes for"),
    (RECONSTRUCT + b"(" + SHAPED.replace(b"%b", struct.pack("<i", -1)) + b"tb.", "8 bytes for"),
    (b"\x96" + struct.pack("<Q", 2 ** 40) + b"short.", "damaged"), (b"\x8e" + struct.pack("<Q", 2 ** 40) + b"short.", "damaged"),
    (b"Nr\xff\xff\xff\x7f.", "nests or repeats"), (b"\x95" + struct.pack("<Q", 2 ** 62) + b"N", "damaged"),
    (b"t.", "damaged"), (b"L" + b"9" * 10 ** 5 + b"L\n.", "damaged"), (b"Fno\xff number\n.", "damaged"), (b"h\7.", "damaged"),
    (b"cnumpy\ndtype\n(U\x04V999\x89\x88tR.", "not numbers or texts"), (b".", "damaged"), (b"N", "damaged"), (b"", "damaged"),
    (b"cnumpy\ndtype\n)R.", "damaged"), (b"c_codecs\nencode\n(tR.", "damaged"),
    (RECONSTRUCT + b"]b.", "as numpy never does"), (b"}(" + b")\x85" * 10 ** 5 + b"Nu.", "nests or repeats"),
    (b"}(" + b"cbuiltins\nbytes\n)R" * 10 ** 4 + b")\x85" * 10 ** 5 + b"Nu.", "nests or repeats"),
    (b"}(N\x85\x94" + b"".join(b"h%c\x86\x94" % i for i in range(60)) + b"Nu.", "nests or repeats")])  # fmt: skip
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
        before = {key: dict(vars(value)) for key, value in vars(recordings).items() if hasattr(value, "__dict__")}
        try:
            recordings.unpickle(code)
        except ValueError:
            pass
        after = {key: dict(vars(value)) for key, value in vars(recordings).items() if hasattr(value, "__dict__")}
        assert before == after and np.dtype("f8").byteorder == "="


@pytest.mark.parametrize("inside", [[np.zeros(2), {}], [None], [{"a": "b"}], [1j]])
def test_objects_in_an_array_are_texts_or_refused(inside):
    boxed = np.empty(len(inside) + 1, object)
    boxed[:-1] = inside
    boxed[-1] = "text"
    with pytest.raises(ValueError, match="other things than numbers and texts|damaged|no array"):
        recordings.unpickle(pickle.dumps(boxed))


def test_what_refers_to_itself_or_doubles_itself_by_the_memo_is_read_in_no_time_and_space(world, tmp_path):
    lists = b"]\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(200)) + b"."
    itself = b"]\x94h\0a."
    for code in (lists, itself):
        with pytest.raises(ValueError, match="a recording is a dict"):
            formats.read(write(tmp_path / "a.npy", npy({})[:128] + code), world)


def test_every_cut_of_a_recording_is_refused(world, recorded, tmp_path):
    for content, path in ((npy(recorded), tmp_path / "a.npy"), (npz(recorded), tmp_path / "a.npz")):
        for end in [*range(0, 300, 7), *range(300, len(content), 4001), len(content) - 1]:
            with pytest.raises(ValueError, match=path.name):
                formats.read(write(path, content[:end]), world)


# ------------------------------------------------------------------------------------------------- ImagineBench's arrays


@pytest.mark.parametrize("suffix", ["npz", "npy", "NPZ", pytest.param("hdf5", marks=needs_minari)])
def test_the_dict_of_arrays_with_texts_alone_is_judged_by_the_relation_that_they_tell(world, rollouts, recorded, tmp_path, suffix):
    arrays = imaginebench_layout(rollouts, recorded)
    arrays["observations"] = np.zeros((12, 21, 16), np.float32)  # with the state after the last action
    for row, r in enumerate(rollouts[:12]):
        arrays["observations"][row, : len(r["observations"]), :10] = r["observations"]
    path = tmp_path / f"a.{suffix}"
    if suffix == "hdf5":
        write_hdf5(path, arrays_only(arrays))
    else:
        write(path, npy(arrays) if suffix == "npy" else npz(arrays))
    records, notes = formats.read(path, world)
    assert not notes
    assert_same(records, rollouts[:12], skip=("goal", "states"))


def test_a_last_state_that_was_not_recorded_is_the_physics_answer(world, rollouts, recorded, tmp_path):
    path = write(tmp_path / "a.npz", npz(imaginebench_layout(rollouts, recorded)))
    records, notes = formats.read(path, world)
    assert notes["completed"] == 12
    for ours, theirs in zip(records, rollouts):
        np.testing.assert_array_equal(ours["observations"][:-1], theirs["observations"][:-1])
        at_rest = world.state_from_observation(theirs["observations"][-2:-1])
        reached = world.observe(world.step_batch(at_rest, theirs["actions"][-1:]))
        np.testing.assert_array_equal(ours["observations"][-1:], reached)
    assert "in 12 the state after the last action was not recorded" in formats.read_offline(path, world)[1]


def damage(arrays, field, change):
    """The arrays with one field changed, in row 2 where it is an index or value, or taken out."""
    arrays = {k: np.array(v) for k, v in arrays.items()}
    if change is None:
        del arrays[field]
    elif callable(change):
        arrays[field] = change(arrays[field])
    else:
        arrays[field][2, 0] = change
    return arrays


WRONG = {  # field, what is done to it, what the message says beside the file; of the authors' layout
    "no actions": ("actions", None, "field 'actions' is missing"),
    "no observations": ("observations", None, "field 'observations' is missing"),
    "no masks": ("masks", None, "field 'masks' is missing"),
    "no texts": ("instructions", None, "field 'instructions' is missing"),
    "NaN seen": ("observations", np.nan, "row 2: observations has NaN"),
    "infinity reached": ("next_observations", np.inf, "row 2: next_observations has NaN or infinite"),
    "NaN reward": ("rewards", np.nan, "row 2: rewards has NaN"),
    "all rewards NaN": ("rewards", lambda a: a * np.nan, "row 0: rewards has NaN"),
    "all actions NaN": ("actions", lambda a: a * np.nan, "row 0: actions has NaN"),  # found by the fuzz
    "action 40": ("actions", 40, "row 2: actions must be in 0..39, got"),
    "action -1": ("actions", -1, "row 2: actions must be in 0..39, got -1"),
    "an action no integer can hold": ("actions", lambda a: a + 1e300, "row 0: actions has values beyond"),
    "half an action": ("actions", lambda a: a + 0.5, "row 0: actions must be whole numbers"),
    "actions as texts": ("actions", lambda a: a.astype(str), "row 0: actions must be numbers, got"),
    "actions as objects": ("actions", lambda a: a.astype(str).astype(object), "must be numbers, got|other things|only numbers"),
    "two numbers an action": ("actions", lambda a: np.stack([a, a], -1), "row 0: actions must have shape (any,), got"),
    "a ball out of reach": ("observations", lambda a: a * 100, "observations"),
    "nine numbers": ("observations", lambda a: a[..., :9], "row 0: observations must have shape"),
    "flat observations": ("observations", lambda a: a.reshape(len(a), -1), "observations has shape (12, 200)"),
    "one row fewer": ("actions", lambda a: a[1:], "actions has shape (11, 20)"),
    "a number a rollout": ("actions", lambda a: a[:, 0], "actions has shape (12,)"),  # found by the fuzz
    "a gap in the mask": ("masks", lambda a: a[:, ::-1].copy(), "row 0: masks must be ones"),
    "no steps": ("masks", lambda a: a * (np.arange(12) != 2)[:, None], "row 2: actions is empty"),
    "masks of one axis": ("masks", lambda a: a[:, 0], "masks must have shape (rollouts, steps)"),
    "steps that do not follow": ("next_observations", lambda a: a + 0.5, "next_observations of a step are not the observations"),
    "two sources": ("goals", 1, "row 2: goals must"),
    "a direction 7": ("goals", lambda a: a + (np.arange(6) == 5) * 7, "row 0: goals must"),
    "a goal that changes": ("goals", lambda a: a + (np.arange(20) == 19)[:, None] * (np.arange(6) == 5), "row 0: goals must be"),
    "texts as numbers": ("instructions", lambda a: np.zeros((12, 3)), "row 0: instructions must be a text"),
    "texts of two axes": ("instructions", lambda a: a[..., None], "row 0: instructions must be texts"),
    "no rows": ("masks", lambda a: a[:0], "has shape (12,"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ("npy", "npz"))
@pytest.mark.parametrize("field, change, said", WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_recording_is_said_in_one_line(world, recorded, tmp_path, kind, field, change, said):
    arrays = damage(recorded, field, change)
    path = write(tmp_path / f"bad.{kind}", npy(arrays) if kind == "npy" else npz(arrays))
    with pytest.raises(ValueError) as refused:
        formats.read_offline(path, world)
    message = str(refused.value)
    assert message.startswith(str(path)) and any(part in message for part in said.split("|")) and "\n" not in message


HUGE = plain_npy(np.zeros(3)).replace(b"(3,), }" + b" " * 15, b"(1000000000000000,), }")
RED_LEFT = env.Goal("Red left of blue", kind="relation", relations=(("red", "blue", "left"),))
OTHER = {  # what --data names, by a function of a folder, the recording and a world; what the message says
    "nothing": (lambda d, a, w: d / "absent", "no such file or folder"),
    "an empty folder": (lambda d, a, w: d, "neither state.json"),
    "a picture": (lambda d, a, w: write(d / "cat.png", b"cat"), "no recording; give"),
    "one array": (lambda d, a, w: write(d / "one.npy", plain_npy(np.zeros(3))), "it holds a single array"),
    "a list": (lambda d, a, w: write(d / "list.npy", npy([1])), "it holds a list"),
    "no npy": (lambda d, a, w: write(d / "x.npy", b"not an array"), "it is no .npy file"),
    "no zip": (lambda d, a, w: write(d / "x.npz", b"PK, or not"), "damaged, or no .npz file"),
    "no hdf5": (lambda d, a, w: write(d / "x.hdf5", b"HDF, or not"), ".hdf5 file|minari[hdf5]"),
    "an unreadable sentence": (lambda d, a, w: write(d / "x.npz", npz({**damage(a, "goals", None), "instructions": np.array(["Do."] * 12)})),
                               "row 0: instructions: cannot tell"),
    "a NUL in a goal": (lambda d, a, w: write(d / "x.npz", npz({**a, "instructions": np.array(["Do\0it."] * 12)})), "row 0: a goal's text"),
    "objects in an npz": (lambda d, a, w: write(d / "x.npz", npz({**a, "masks": npy([1])})), "field 'masks'"),
    "a huge npz": (lambda d, a, w: write(d / "x.npz", npz({**a, "masks": HUGE})), "field 'masks', (1000000000000000,) of"),
    "two rollouts": (lambda d, a, w: write(d / "x.npy", npy({k: v[:2] for k, v in a.items() if np.ndim(v)})), "at least 3 are needed"),
    "novel levels": (lambda d, a, w: save(d, env.Goal("Left", "easy", "step", (("red", None, "left"),)), 1, w), "row 0: level 'easy', kind"),
    "an endless rollout": (lambda d, a, w: save(d, RED_LEFT, 51, w), "row 0: actions has 51 steps"),
    "centimetres": (lambda d, a, w: save(d, RED_LEFT, 1, w, 20.0), "row 0: observations reach 20"),
}  # fmt: skip


def save(path, goal, steps, world, place=0.0):
    """A rollouts dataset folder with one rollout in which nothing moves."""
    seen = np.full((steps + 1, 10), place, np.float32)
    write_rollouts(path / "own", [env.rollout_record(world, goal, seen, np.zeros(steps, int))])
    return path / "own"


@pytest.mark.parametrize("make, said", OTHER.values(), ids=OTHER)
def test_data_that_is_no_recording_to_learn_from_is_refused_in_one_line(world, recorded, tmp_path, make, said):
    path = make(tmp_path, recorded, world)
    with pytest.raises(ValueError) as refused:
        formats.read_offline(path, world)
    message = str(refused.value)
    assert message.startswith(str(path)) and any(part in message for part in said.split("|")) and "\n" not in message


def test_an_npz_that_would_unpack_to_more_than_the_limit_is_refused(world, recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(recordings, "LARGEST", sum(np.asarray(v).nbytes for v in recorded.values()) - 1)
    with pytest.raises(ValueError, match="past the .* that are read"):
        formats.read(write(tmp_path / "a.npz", npz(recorded)), world)


# ------------------------------------------------------------------------------------------------------- folders, exports


LISTS = datasets.List(datasets.List(datasets.Value("float32"), length=10))
WAYS = {
    "states all null": {"states": datasets.Value("null")},
    "fixed-size lists": {"observations": LISTS},
    "Array2D": {"observations": datasets.Array2D((None, 10), "float64")},
    "large lists": {"observations": datasets.LargeList(datasets.LargeList(datasets.Value("float64")))},
}


@pytest.mark.parametrize("changed", WAYS.values(), ids=WAYS)
def test_a_dataset_folder_is_read_in_the_types_that_others_write(world, rollouts, tmp_path, changed):
    columns = {name: [r.get(name) for r in rollouts[:5]] for name in FEATURES if name not in ("explanation", "dynamics_error")}
    if "states" in changed:
        columns["states"] = [None] * 5
    types = datasets.Features({**{name: FEATURES[name] for name in columns}, **changed})
    datasets.Dataset.from_dict(columns, features=types).save_to_disk(str(tmp_path / "theirs"))
    before = formats.content_hash(tmp_path / "theirs")
    assert_same(formats.read(tmp_path / "theirs", world)[0], rollouts[:5], skip=("states",) if "states" in changed else ())
    assert formats.content_hash(tmp_path / "theirs") == before


def test_a_damaged_arrow_file_is_refused_and_does_not_end_the_process(world, rollouts, tmp_path):  # found by the fuzz
    write_rollouts(tmp_path / "own", rollouts[:4])
    (file,) = (tmp_path / "own").glob("*.arrow")
    whole = file.read_bytes()
    for at in range(0, len(whole), 997):
        write(file, whole[:at] + b"\xff\xff\xff\x7f" + whole[at + 4 :])
        try:
            read_rollouts(tmp_path / "own", world)
        except ValueError as error:
            assert str(tmp_path / "own") in str(error)


def test_a_folder_counts_by_the_names_and_content_of_its_files(tmp_path):
    write(tmp_path / "a", b"1"), write(tmp_path / "b", b"2")
    before = formats.content_hash(tmp_path)
    assert formats.content_hash(tmp_path) == before
    (tmp_path / "b").rename(tmp_path / "c")
    renamed = formats.content_hash(tmp_path)
    write(tmp_path / "c", b"3")
    assert len({before, renamed, formats.content_hash(tmp_path)}) == 3


def imaginary(world, rollouts):
    """Imagined records of every kind, with what the model says of them; some steps too short to count as imagined moves."""
    rng, records = np.random.default_rng(3), []
    goals = [g for level in env.NOVEL_LEVELS for g in world.sample_goals(level, "test", 8, rng)]
    for goal, r in zip(goals, rollouts):
        seen = (r["observations"] + rng.normal(0, 0.05, r["observations"].shape)).astype(np.float32)
        whole = {"goal": goal, "observations": seen, "actions": r["actions"], "imagined": True}
        whole |= {"explanation": 'The rød ball, "1" \u2028.', "dynamics_error": rng.random(len(r["actions"]))}
        records.append(formats.judged(whole, world)[0])
    return records


@pytest.mark.parametrize("data_format", FORMATS)
def test_every_export_keeps_real_rollouts_with_their_states_and_imagined_ones_with_goal_and_explanation(world, rollouts, tmp_path, data_format):
    mixed = [rollouts[0], {**rollouts[1], "states": None}]
    for name, records in (("real", rollouts[:20]), ("imagined", imaginary(world, rollouts)), ("mixed", mixed)):
        read, notes = formats.read(write_as(data_format, tmp_path / name, records, world), world)
        assert_same(read, records)
        assert not notes and not list((tmp_path / name).glob("*.partial"))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), level=st.sampled_from(env.LEVELS), steps=st.integers(1, 12), more=st.integers(0, 4))
def test_an_episode_cut_exported_and_read_back_has_the_same_transitions_terminals_and_goal(world, tmp_path_factory, seed, level, steps, more):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("cut")
    (goal,) = world.sample_goals(level, "train" if level == "offline" else "test", 1, rng)
    encoded, start = world.encode_goals([goal]), env.unfulfilled_states(world, rng, [goal])
    is_relation = level in ("offline", "rephrase")
    play = lambda obs, _: world.expert_actions(encoded, obs) if is_relation else rng.integers(world.num_actions, size=1)
    (whole,) = env.run_episodes(world, play, [goal], start, steps)
    long = goes_on(world, whole, rng.integers(world.num_actions, size=more))
    length = 1  # an oracle in plain steps: the first transition that succeeds is the last
    pairs = list(zip(long["observations"], long["observations"][1:], long["actions"]))
    while length < len(pairs) and not world.success(encoded, *(part[None] for part in pairs[length - 1]))[0]:
        length += 1
    cut = env.rollout_record(world, goal, long["observations"][: length + 1], long["actions"][:length], long["states"][: length + 1])
    for data_format in FORMATS:
        first = formats.read(write_as(data_format, folder / "long", [long], world), world)[0]
        again = formats.read(write_as(data_format, folder / "cut", first, world), world)[0]
        assert_same(first, [cut])
        assert_same(again, [cut])
    with np.load(folder / "cut" / "npz-v0.npz") as file:
        assert file["terminals"][0].tolist() == [False] * (length - 1) + [cut["success"]]


def test_npz_is_plain_arrays_with_the_encoding_behind_the_observations(rollouts, tmp_path):
    padded.write_npz(tmp_path / "a.npz", rollouts[:4], lambda texts: [[len(t), 7] for t in texts])
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file["observations"].shape == (4, file["masks"].shape[1], 12)
        assert file["instructions"].tolist() == [r["goal"] for r in rollouts[:4]]
        for row, r in enumerate(rollouts[:4]):
            n = len(r["actions"])
            np.testing.assert_array_equal(file["observations"][row, :n, :10], r["observations"][:-1])
            assert (file["observations"][row, :, 10:] == [len(r["goal"]), 7]).all() and file["masks"][row].sum() == n


# ----------------------------------------------------------------------------------------------------------------- Minari


def test_without_minari_one_sentence_says_what_to_install(world, rollouts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    write(tmp_path / "metadata.json", b"{}")
    for use in (lambda: minari_io.write_minari(tmp_path / "a-v0", rollouts, world), lambda: formats.read(tmp_path, world)):
        with pytest.raises(ValueError, match=r'pip install "minari\[hdf5,arrow\]"'):
            use()


@needs_minari
def test_what_is_written_loads_combines_filters_splits_and_recovers(world, rollouts, tmp_path, monkeypatch):
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    lost = {**rollouts[7], **env.rollout_record(world, env.goal_of(rollouts[7]), rollouts[7]["observations"][:2], rollouts[7]["actions"][:1])}
    for name, records in (("real", rollouts[:5]), ("more", [*rollouts[5:7], lost]), ("imagined", imaginary(world, rollouts))):
        minari_io.write_minari(tmp_path / "kalm" / f"{name}-v0", records, world)
    data = minari.load_dataset("kalm/real-v0")
    assert data.total_episodes == 5 and data.action_space.n == 40 and data.observation_space.shape == (10,)
    for episode, r in zip(data, rollouts):
        np.testing.assert_array_equal(episode.infos["state"], r["states"])
        assert episode.terminations.tolist() == [False] * (len(r["actions"]) - 1) + [True] and not episode.truncations.any()
    recovered = data.recover_environment()
    assert recovered.spec.id == "KALM/ClevrRobot-v0" and recovered.observation_space == data.observation_space
    parts = [minari.load_dataset(f"kalm/{name}-v0") for name in ("real", "more", "imagined")]
    both = minari.combine_datasets(parts, "kalm/all-v0")
    records = formats.read(tmp_path / "kalm" / "all-v0", world)[0]
    assert_same(records, [*rollouts[:7], lost, *imaginary(world, rollouts)])
    assert len(both.filter_episodes(lambda e: e.truncations[-1] and not e.terminations[-1])) == sum(not r["success"] for r in records)
    assert sum(len(part) for part in minari.split_dataset(data, [2, 3])) == 5


class Record:
    """What minari.DataCollector keeps of an environment's steps; it itself needs jax."""

    def __init__(self, world, goal, actions):
        face = env.WorldEnv(world)
        seen, info = face.reset(seed=1, options={"goal": goal})
        self.observations, self.infos = [seen], {key: [value] for key, value in info.items()}
        self.actions, self.rewards, self.terminations, self.truncations = actions, [], [], []
        for action in actions:
            seen, reward, terminated, truncated, info = face.step(action)
            self.observations.append(seen)
            self.rewards.append(reward)
            self.terminations.append(terminated)
            self.truncations.append(truncated)
            for key, value in info.items():
                self.infos[key].append(value)


@needs_minari
@pytest.mark.parametrize("data_format", ("hdf5", "arrow", "parquet"))
def test_what_minari_records_of_our_environment_is_read_with_goals_that_no_sentence_tells(world, tmp_path, data_format):
    rng = np.random.default_rng(5)
    goals = [g for level in env.NOVEL_LEVELS for g in world.sample_goals(level, "test", 3, rng)]
    episodes = [Record(world, goal, rng.integers(40, size=4).tolist()) for goal in goals]
    records, notes = formats.read(store(tmp_path / "d", world, episodes, data_format=data_format), world)
    assert [env.goal_of(r) for r in records] == goals and not notes["contradicted"]
    for record, episode in zip(records, episodes):
        np.testing.assert_array_equal(record["states"], np.array(episode.infos["state"])[: len(record["states"])])


@needs_minari
def test_minaris_collector_records_our_environment(world, tmp_path, monkeypatch):
    pytest.importorskip("jax")
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collector = minari.DataCollector(gymnasium.make("KALM/ClevrRobot-v0"), record_infos=True)
    for seed in range(3):
        collector.reset(seed=seed)
        for action in (0, 9, 18):
            collector.step(action)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collector.create_dataset("kalm/recorded-v0")
    records, notes = formats.read(tmp_path / "kalm" / "recorded-v0", world)
    assert len(records) == 3 and all(r["states"] is not None for r in records) and not notes["contradicted"]


@needs_minari
def test_an_info_that_is_a_row_short_is_left_out(world, tmp_path):
    episode = Record(world, RED_LEFT, [1, 2, 3])
    episode.infos["state"] = episode.infos["state"][1:]
    (record,), _ = formats.read(store(tmp_path / "d", world, [episode]), world)
    assert record["states"] is None and len(record["actions"]) == 3


def of_dicts(episode):
    episode.observations = {"ball": np.array(episode.observations)}


def without_goal(episode):
    del episode.infos["goal"]


def with_two_goals(episode):
    episode.infos["goal"][-1] = "Blue left of red"


@needs_minari
@pytest.mark.parametrize("change, said", [(of_dicts, "observations are a Dict, not"), (without_goal, "row 0: no text of the goal"),
                                          (with_two_goals, "row 0: goal changes within the episode")])  # fmt: skip
def test_a_minari_episode_that_cannot_be_judged_is_refused_in_a_sentence(world, tmp_path, change, said):
    episode = Record(world, RED_LEFT, [1, 2, 3])
    change(episode)
    box = env.WorldEnv(world).observation_space
    space = gymnasium.spaces.Dict(ball=box) if change is of_dicts else box
    with pytest.raises(ValueError, match=said):
        formats.read(store(tmp_path / "d", world, [episode], space), world)


@needs_minari
def test_minari_data_in_other_files_or_too_large_is_refused(world, rollouts, tmp_path):
    import h5py

    secret = write(tmp_path / "secret", np.zeros(1000).tobytes())

    def virtual(episode):
        layout = h5py.VirtualLayout((3, 10), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "observations", (3, 10))
        episode.create_virtual_dataset("observations", layout)

    changes = {
        "external": lambda e: e.create_dataset("observations", (3, 10), "f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)]),
        "linked": lambda e: e.__setitem__("observations", h5py.ExternalLink("other.h5", "observations")),
        "soft": lambda e: e.__setitem__("observations", h5py.SoftLink("/episode_1/observations")),
        "virtual": virtual,
        "huge": lambda e: e.create_dataset("observations", (2**40, 10), "f4", chunks=(1024, 10)),
    }
    for name, change in changes.items():
        path = write_as("minari", tmp_path / name, rollouts[:3], world)
        with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
            del file["episode_2/observations"]
            change(file["episode_2"])
        with pytest.raises(ValueError, match="episode_2/observations (is a link to|lies in another|is larger than)"):
            formats.read(path, world)


@needs_minari
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"total_episodes": "3", "data_format": "hdf5"}', "[" * 10 ** 5])
def test_a_folder_whose_metadata_are_not_minaris_is_refused(world, tmp_path, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match="metadata.json"):
        formats.read(tmp_path, world)


@needs_minari
def test_an_environment_that_metadata_name_is_not_made(world, rollouts, tmp_path):
    path = write_as("minari", tmp_path, rollouts[:3], world) / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["observation_space"]  # Minari would then import and call the entry point
    metadata["env_spec"] = metadata["env_spec"].replace("env:WorldEnv", "test_formats:boom")
    path.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="has no 'observation_space'; refused"):
        formats.read(path.parent.parent, world)


# ------------------------------------------------------------------------------------------------------------------- fuzz


@pytest.mark.parametrize("seed", (0, 1))
def test_mutated_files_are_read_or_refused_in_one_clear_sentence(world, tmp_path, seed):
    with np.errstate(all="ignore"):
        count, accepted, findings = fuzz(4, seed, tmp_path, world)
    assert findings == [] and count > 100 and 0 < accepted < count


@pytest.mark.parametrize("kind", ("f8", "u1", "i8"))
def test_actions_of_another_type_are_the_same_actions(world, recorded, tmp_path, kind):  # found by the fuzz: an IndexError
    plain = formats.read(write(tmp_path / "a.npy", npy(recorded)), world)[0]
    path = write(tmp_path / "b.npy", npy({**recorded, "actions": recorded["actions"].astype(kind)}))
    assert_same(formats.read(path, world)[0], plain)


@pytest.mark.parametrize("code", (0x110000, 0xFFFFFFFF, 0xD800))
def test_texts_that_are_no_unicode_are_refused(world, recorded, tmp_path, code):  # found by the fuzz: a SystemError
    recorded["instructions"].view(np.uint32)[0] = code
    for path, content in ((tmp_path / "a.npy", npy(recorded)), (tmp_path / "a.npz", npz(recorded))):
        with pytest.raises(ValueError, match="no Unicode character"):
            formats.read(write(path, content), world)


@pytest.mark.parametrize("field", ("states", "dynamics_error"))
def test_texts_in_the_place_of_numbers_are_refused(world, rollouts, tmp_path, field):  # found by the fuzz: a TypeError
    padded.write_npz(tmp_path / "a.npz", [{**r, "dynamics_error": r["rewards"], "explanation": "x"} for r in rollouts[:3]])
    with np.load(tmp_path / "a.npz") as file:
        arrays = {**file, field: file[field].astype("S8")}
    with pytest.raises(ValueError, match=f"row 0: {field} must be numbers"):
        formats.read(write(tmp_path / "b.npz", npz(arrays)), world)


# ------------------------------------------------------------------------------------------------------- --data, --export


def collect(run, world, *arguments):
    assert kalm.main(["--scale", "smoke", "--stage", "collect", "--output_dir", str(run), *map(str, arguments)]) == 0
    return read_rollouts(run / "rollouts" / "real", world)


def test_data_takes_the_place_of_the_expert_and_counts_by_its_content(world, rollouts, recorded, tmp_path, capsys):
    path = write(tmp_path / "a.npy", npy(recorded))
    records = collect(tmp_path / "run", world, "--data", path)
    np.testing.assert_array_equal(records[5]["observations"], rollouts[5]["observations"])
    assert len(records) == 12 and "12 of 12 rollouts" in capsys.readouterr().out
    other = write(tmp_path / "b.npy", path.read_bytes())
    collect(tmp_path / "run", world, "--data", other)
    assert "collect took" not in capsys.readouterr().out
    write(other, npy({k: v[:7] for k, v in recorded.items() if k != "num_trajectories"}))
    assert len(collect(tmp_path / "run", world, "--data", other)) == 7


def test_a_wrong_recording_is_said_in_one_line_and_nothing_is_written(recorded, tmp_path, capsys):
    path = write(tmp_path / "bad.npz", npz(damage(recorded, "actions", 40)))
    assert kalm.main(["--scale", "smoke", "--output_dir", str(tmp_path / "run"), "--data", str(path)]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("kalm: ") and f"{path}, row 2: actions" in err and "\n" not in err


@pytest.mark.parametrize("data_format", FORMATS)
def test_exported_rollouts_are_data_for_another_run(world, rollouts, tmp_path, data_format):
    path = write_as(data_format, tmp_path, rollouts[:8], world)
    assert_same(collect(tmp_path / "run", world, "--data", path), rollouts[:8], skip=("states",))


def test_export_writes_every_rollout_of_a_run_with_its_goal_text_and_encoding(world, smoke_run, tmp_path):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    assert kalm.main(["--scale", "smoke", "--output_dir", str(run), "--export", "npz"]) == 0
    assert {p.name for p in (run / "export").iterdir()} == {"real.npz", "rephrase.npz", "easy.npz", "hard.npz"}
    for path in (run / "export").iterdir():
        assert_same(formats.read(path, world)[0], formats.read(run / "rollouts" / path.stem, world)[0])
        with np.load(path) as file:
            assert np.ptp(file["observations"][:, 0, 10:], -1).all()  # the encodings that the policies see
    assert formats.read(run / "export" / "real.npz", world)[0][0]["states"] is not None
