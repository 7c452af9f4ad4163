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

import numpy as np
import pytest
import torch
from conftest import ROOT
from fuzz import fuzz, npy, npz, plain_npy

import env
import kalm
import rollout
from data import formats, pickled
from data.rollouts import FEATURES

AUTHORS = ROOT.parent / "shared" / "reference" / "clevr_robot_40.npy"
needs_recording = pytest.mark.skipif(not AUTHORS.is_file(), reason="the authors' recordings are not here")
needs_h5py = pytest.mark.skipif(not importlib.util.find_spec("h5py"), reason="h5py is not installed")


def write(path, content):
    path.write_bytes(content)
    return path


def authors_layout(rollouts):
    """Expert rollouts as the authors record them: a dict of arrays padded to 20 steps, three instructions each."""
    count, steps = len(rollouts), 20
    arrays = {"observations": np.zeros((count, steps, 10), np.float32), "next_observations": np.zeros((count, steps, 10), np.float32),
              "actions": np.zeros((count, steps), np.int32), "rewards": np.zeros((count, steps, 1), np.float32),
              "terminals": np.zeros((count, steps, 1), bool), "masks": np.zeros((count, steps), np.int32),
              "goals": np.zeros((count, steps, 6), np.float32)}
    for row, r in enumerate(rollouts):
        n, ((ball, other, way),) = len(r["actions"]), env.goal_of(r).relations
        arrays["observations"][row, :n], arrays["next_observations"][row, :n] = r["observations"][:-1], r["observations"][1:]
        arrays["actions"][row, :n], arrays["rewards"][row, :n, 0], arrays["masks"][row, :n] = r["actions"], r["rewards"], 1
        arrays["terminals"][row, n - 1] = r["success"]
        arrays["goals"][row, :, ball], arrays["goals"][row, :, other], arrays["goals"][row, :, 5] = 1, 2, way
    arrays["instructions"] = np.array([[f"{r['goal']} ({i})" for i in range(3)] for r in rollouts])
    return {"num_trajectories": count, **arrays}


@pytest.fixture
def recorded(rollouts):
    return authors_layout(rollouts[:12])


def imaginebench_layout(arrays):
    """The same without goals: an encoding behind the observations, one plain sentence each, no next observations."""
    texts = []
    for code in arrays["goals"]:
        ball, other, way = formats.relation_of_code(code)
        texts.append(f"Push the {env.COLORS[ball]} ball to the {env.DIRECTIONS[way]} of the {env.COLORS[other]} ball")
    kept = {k: arrays[k] for k in ("actions", "rewards", "masks")}
    seen = arrays["observations"]
    seen = np.concatenate([seen, np.full((*seen.shape[:2], 6), 0.5, np.float32)], -1)
    return {**kept, "observations": seen, "instructions": np.array(texts)}


def assert_same(read, written):
    """Records are equal in every field that either has."""
    assert len(read) == len(written)
    for ours, theirs in zip(read, written):
        for field in FEATURES:
            a, b = ours.get(field), theirs.get(field)
            assert (a is None) == (b is None), field
            if a is not None:
                np.testing.assert_array_equal(a, b, err_msg=field)
                assert getattr(a, "dtype", None) == getattr(b, "dtype", None), field


# ------------------------------------------------------------------------------------------------- the authors' .npy

@needs_recording
def test_the_authors_pickle_holds_what_its_plain_twin_holds():
    with np.load(AUTHORS.with_suffix(".npz")) as plain:
        found = formats.arrays_of(AUTHORS)
        assert set(found) == set(formats.FIELDS) & set(plain.files)
        for name, array in found.items():
            np.testing.assert_array_equal(array, plain[name])
    records, odd = formats.read(AUTHORS)
    assert len(records) == 40 and all(r["success"] for r in records) and not any(odd.values())


@needs_recording
def test_the_relation_is_read_right_from_each_of_the_authors_sentences():
    found = formats.arrays_of(AUTHORS)
    for code, sentences in zip(found["goals"], found["instructions"]):
        assert {formats.relation_of_text(str(s)).relations for s in sentences} == {(formats.relation_of_code(code),)}


@pytest.mark.parametrize("text", ["Gather the balls", "Push the red ball to the left", "Blue and red: behind, please", "red left of red",
                                  "Push red left of blue and behind green", "Left of red goes blue"])
def test_a_sentence_that_does_not_tell_one_relation_in_order_is_refused(text):
    with pytest.raises(ValueError, match="cannot tell|two different balls"):
        formats.relation_of_text(text)


@pytest.mark.parametrize("protocol", range(6))
def test_recordings_in_the_authors_layout_become_the_rollouts_that_they_record(rollouts, recorded, tmp_path, protocol):
    records, odd = formats.read(write(tmp_path / "a.npy", npy(recorded, protocol)))
    assert not any(odd.values())
    assert_same([{**r, "goal": ""} for r in records], [{**r, "goal": "", "states": None} for r in rollouts[:12]])
    assert all(r["goal"] in texts for r, texts in zip(records, recorded["instructions"]))


def test_the_seed_draws_the_instruction(recorded, tmp_path):
    path = write(tmp_path / "a.npy", npy(recorded))
    texts = [[r["goal"] for r in formats.read(path, seed)[0]] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_instructions_in_an_object_array_or_a_list_are_read(recorded, tmp_path):
    plain = formats.read(write(tmp_path / "a.npy", npy(recorded)))[0]
    for texts in (recorded["instructions"].astype(object), np.asfortranarray(recorded["instructions"])):
        assert_same(formats.read(write(tmp_path / "b.npy", npy({**recorded, "instructions": texts})))[0], plain)
    one = formats.read(write(tmp_path / "c.npy", npy({**recorded, "instructions": recorded["instructions"][:, 0].tolist()})))[0]
    assert [r["goal"] for r in one] == recorded["instructions"][:, 0].tolist()


@pytest.mark.parametrize("field, step, value", [("rewards", 0, 55), ("terminals", 0, True), ("terminals", -1, False)])
def test_what_the_judge_contradicts_is_counted_and_the_judge_believed(rollouts, recorded, tmp_path, field, step, value):
    last = int(recorded["masks"][4].sum())
    recorded[field][4, step % last] = value
    path = write(tmp_path / "a.npy", npy(recorded))
    records, odd = formats.read(path)
    np.testing.assert_array_equal(records[4]["rewards"], rollouts[4]["rewards"])
    assert odd["contradicted"] == 1 and records[4]["success"]
    assert "in 1 the recorded rewards or terminals" in formats.read_offline(path)[1]


def test_rollouts_that_miss_their_goal_are_left_out_of_what_is_learned_from(recorded, tmp_path):
    lengths = recorded["masks"].sum(1)
    recorded["masks"][lengths.argmax(), lengths.max() - 1] = 0  # the last, successful step of one is lost
    kept, sentence = formats.read_offline(write(tmp_path / "a.npy", npy(recorded)))
    assert len(kept) == 11 and sentence.startswith("11 of 12 rollouts") and all(r["success"] for r in kept)


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
    values = {"os.system": run, "builtins.eval": Calls(eval, f"__import__('os').system({command!r})"),
              "builtins.exec": Calls(exec, f"import os; os.system({command!r})"),
              "nested reduce": Calls(list, Calls(map, Calls(getattr, Calls(__import__, "os"), "system"), [command])),
              "in a dict of arrays": {"actions": np.zeros(3), "masks": run}, "in a list": [1, [run]],
              "in an object array": np.array([run, "text"], object), "beside an array": (np.zeros(2), run)}
    found = {f"{name}, protocol {protocol}": pickle.dumps(value, protocol) for name, value in values.items() for protocol in range(6)}
    mapped = b"cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n(" + text(command) + b"lt"
    return {
        **found, "GLOBAL": b"cos\nsystem\n" + told + b"tR.", "INST": told + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text(command) + b"o.",
        "EXT1": b"\x82\x70" + told + b"tR.", "EXT2": b"\x83\x70\0" + told + b"tR.", "EXT4": b"\x84\x70\0\0\0" + told + b"tR.",
        "NEWOBJ": mapped + b"\x81tR.", "NEWOBJ_EX": mapped + b"}\x92tR.",
        "BUILD": b"ctest_formats\nRuns\n)\x81" + text(command) + b"b.",
        "names from the memo": text("os") + b"\x94" + text("system") + b"\x9400h\0h\1\x93" + told + b"tR.",
        "a memo entry put twice": text("numpy") + b"q\0" + b"0" + text("os") + b"q\0" + b"0h\0" + text("system") + b"\x93" + told + b"tR.",
        "a dotted name": b"\x80\4" + text("shutil") + text("os.system") + b"\x93" + told + b"tR.",
        "thrown away": b"cos\nsystem\n" + told + b"tR0}."}


MARKER = "kalm_was_here"


@pytest.mark.parametrize("name", payloads(MARKER))
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    payload, marker = payloads(MARKER)[name], tmp_path / MARKER
    pickle.loads(payload)
    assert marker.exists()  # the payload is live
    marker.unlink()
    path = write(tmp_path / "evil.npy", npy({})[:128] + payload)
    with pytest.raises(ValueError, match=r"evil\.npy: the pickle (names|has the opcode) ") as refused:
        formats.read(path)
    assert "\n" not in str(refused.value) and not marker.exists()


def test_a_refused_name_is_said(tmp_path):
    for value, name in ((Calls(os.system, "true"), "posix.system"), (torch.zeros(2), "torch._utils._rebuild_tensor_v2"),
                        (np.random.default_rng(0), "numpy.random"), (Calls(np.load, "x.npy"), "numpy.load")):
        with pytest.raises(ValueError, match=f"names {name}"):
            pickled.read(pickle.dumps(value))


@pytest.mark.parametrize("name, code", [
    ("INST", b"(icopyreg\n_reconstructor\n"), ("OBJ", b"(cnumpy\nndarray\no"), ("NEWOBJ", b"cnumpy\nndarray\n)\x81"),
    ("NEWOBJ_EX", b"cnumpy\nndarray\n)}\x92"), ("EXT1", b"\x82\1"), ("EXT2", b"\x83\1\0"), ("EXT4", b"\x84\1\0\0\0"), ("PERSID", b"Pid\n"),
    ("BINPERSID", b"NQ"), ("NEXT_BUFFER", b"\x97"), ("READONLY_BUFFER", b"N\x98"), ("POP", b"N0"), ("DUP", b"N2"), ("POP_MARK", b"(1"),
    ("EMPTY_SET", b"\x8f"), ("ADDITEMS", b"\x8f(\x90"), ("FROZENSET", b"(\x91")])
def test_an_opcode_that_no_array_needs_is_refused_by_name(name, code):
    with pytest.raises(ValueError, match="opcode " + (name if name != "ADDITEMS" else "EMPTY_SET")):
        pickled.read(code + b".")


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\1btR"
FLOATS = b"cnumpy\ndtype\n(U\x02f8\x89\x88tR(K\3U\1<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
SHAPED = b"K\1J%bJ%b\x86" + FLOATS + b"\x89C\x08abcdefgh"


@pytest.mark.parametrize("code, said", [
    (RECONSTRUCT + b"(" + SHAPED.replace(b"%b", struct.pack("<i", 2 ** 31 - 1)) + b"tb.", "8 bytes of content"),
    (RECONSTRUCT + b"(" + SHAPED.replace(b"%b", struct.pack("<i", -1)) + b"tb.", "impossible shape"),
    (b"\x96" + struct.pack("<Q", 2 ** 40) + b"short.", "damaged"), (b"\x8e" + struct.pack("<Q", 2 ** 40) + b"short.", "damaged"),
    (b"Nr\xff\xff\xff\x7f)b.", "changes the state"), (b"\x95" + struct.pack("<Q", 2 ** 62) + b"N", "damaged"),
    (b"t.", "damaged"), (b"L" + b"9" * 10 ** 5 + b"L\n.", "damaged"),
    (b"cnumpy\ndtype\n(U\x04V999\x89\x88tR.", "only numbers and texts"), (b"h\7.", "damaged"),
    (b".", "damaged"), (b"N", "damaged"), (b"", "damaged"),
    (RECONSTRUCT + b".", "used before it is filled"), (b"}(K\1Nu.", "keys are not all texts"), (b"cnumpy\ndtype\n)R.", "damaged"),
    (b"c_codecs\nencode\n(U\1xU\3rottR.", "other arguments")])
def test_a_pickle_that_is_damaged_or_asks_for_memory_is_refused_without_taking_it(code, said):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=said):
            pickled.read(code)
        assert tracemalloc.get_traced_memory()[1] < 10 ** 7
    finally:
        tracemalloc.stop()


def test_objects_in_an_array_are_texts_or_refused():
    for inside in ([1, 2], [["red"]], [np.zeros(2)], [None], [{"a": "b"}]):
        boxed = np.empty(len(inside) + 1, object)
        boxed[:-1] = inside
        boxed[-1] = "text"
        with pytest.raises(ValueError, match="other things than texts"):
            pickled.read(pickle.dumps(boxed))


def test_what_refers_to_itself_or_doubles_itself_by_the_memo_is_read_in_no_time_and_space(tmp_path):
    doubling = b"]\x94" + b"".join(b"h%c" % i + b"h%c" % i + b"\x86\x94" for i in range(200)) + b"."
    itself = b"]\x94h\0a."
    for code in (doubling, itself):
        with pytest.raises(ValueError, match="a recording is a dict"):
            formats.read(write(tmp_path / "a.npy", npy({})[:128] + code))


def test_every_cut_of_a_recording_is_refused(recorded, tmp_path):
    for content, path in ((npy(recorded), tmp_path / "a.npy"), (npz(recorded), tmp_path / "a.npz")):
        for end in [*range(0, 300, 7), *range(300, len(content), 4001), len(content) - 1]:
            with pytest.raises(ValueError, match=path.name):
                formats.read(write(path, content[:end]))


# ------------------------------------------------------------------------------------------------- ImagineBench's arrays

def test_the_dict_of_arrays_with_texts_alone_is_judged_by_the_relation_that_they_tell(rollouts, recorded, tmp_path):
    arrays = imaginebench_layout(recorded)
    observations = np.zeros((12, 21, 16), np.float32)  # with the state after the last action
    for row, r in enumerate(rollouts[:12]):
        observations[row, :len(r["observations"]), :10] = r["observations"]
    for path, content in ((tmp_path / "a.npz", npz({**arrays, "observations": observations})),
                          (tmp_path / "a.npy", npy({**arrays, "observations": observations}))):
        records, odd = formats.read(write(path, content))
        assert not any(odd.values())
        assert_same([{**r, "goal": ""} for r in records], [{**r, "goal": "", "states": None} for r in rollouts[:12]])


def test_a_last_state_that_was_not_recorded_is_the_physics_answer(rollouts, recorded, tmp_path):
    path = write(tmp_path / "a.npz", npz(imaginebench_layout(recorded)))
    records, odd = formats.read(path)
    assert odd["completed"] == 12
    for ours, theirs in zip(records, rollouts):
        np.testing.assert_array_equal(ours["observations"][:-1], theirs["observations"][:-1])
        at_rest = env.state_from_observation(theirs["observations"][-2:-1])
        np.testing.assert_array_equal(ours["observations"][-1:], env.observe(env.step_batch(at_rest, theirs["actions"][-1:])))
    assert "in 12 the state after the last action was not recorded" in formats.read_offline(path)[1]


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
    "goals without texts": ("instructions", None, "field 'instructions' is missing"),
    "NaN seen": ("observations", np.nan, "row 2: observations has NaN"),
    "infinity reached": ("next_observations", np.inf, "row 2: next_observations has NaN or infinite"),
    "NaN reward": ("rewards", np.nan, "row 2: rewards has NaN"),
    "action 40": ("actions", 40, "row 2: actions must be in 0..39, got"),
    "action -1": ("actions", -1, "row 2: actions must be in 0..39, got -1"),
    "an action no integer can hold": ("actions", lambda a: a + 1e300, "row 0: actions must be in 0..39, got 1e+300"),
    "half an action": ("actions", lambda a: a + 0.5, "row 0: actions must be whole numbers"),
    "actions as texts": ("actions", lambda a: a.astype(str), "row 0: actions must be one whole number a step, got"),
    "two numbers an action": ("actions", lambda a: np.stack([a, a], -1), "row 0: actions must be one whole number a step, got shape"),
    "a ball out of reach": ("observations", lambda a: a * 100, "observations"),
    "nine numbers": ("observations", lambda a: a[..., :9], "row 0: observations must have shape"),
    "flat observations": ("observations", lambda a: a.reshape(len(a), -1), "observations has shape (12, 200)"),
    "one row fewer": ("actions", lambda a: a[1:], "actions has shape (11, 20)"),
    "a gap in the mask": ("masks", lambda a: a[:, ::-1].copy(), "row 0: masks must be ones"),
    "no steps": ("masks", lambda a: a * (np.arange(12) != 2)[:, None], "row 2: actions is empty"),
    "masks of one axis": ("masks", lambda a: a[:, 0], "masks must have shape (rollouts, steps)"),
    "steps that do not follow": ("next_observations", lambda a: a + 0.5, "next_observations of a step are not the observations"),
    "two sources": ("goals", 1, "row 2: goals must"),
    "a direction 7": ("goals", lambda a: a + (np.arange(6) == 5) * 7, "row 0: goals must mark"),
    "a goal that changes": ("goals", lambda a: a + (np.arange(20) == 19)[:, None] * (np.arange(6) == 5),
                            "goals must be 6 numbers, the same at each"),
    "no rows": ("masks", lambda a: a[:0], "has shape (12,"),
}


@pytest.mark.parametrize("kind", ("npy", "npz"))
@pytest.mark.parametrize("field, change, said", WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_recording_is_said_in_one_line_and_nothing_is_written(recorded, tmp_path, capsys, kind, field, change, said):
    arrays = damage(recorded, field, change)
    path = write(tmp_path / f"bad.{kind}", npy(arrays) if kind == "npy" else npz(arrays))
    assert kalm.main(["--scale", "smoke", "--output_dir", str(tmp_path / "run"), "--data", str(path)]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"kalm: {path}") and said in err and "\n" not in err
    assert list(tmp_path.iterdir()) == [path]


HUGE = plain_npy(np.zeros(3)).replace(b"(3,), }" + b" " * 15, b"(1000000000000000,), }")

RED_LEFT = env.Goal("Red left of blue", relations=((0, 1, 1),))
OTHER = {  # what --data names, by a function of a folder and the recording; what the message says
    "nothing": (lambda d, a: d / "absent", "no such file or folder"),
    "an empty folder": (lambda d, a: d, "neither state.json"),
    "a picture": (lambda d, a: write(d / "cat.png", b"cat"), "is no recording; give"),
    "one array": (lambda d, a: write(d / "one.npy", plain_npy(np.zeros(3))), "it holds a single array"),
    "a list": (lambda d, a: write(d / "list.npy", npy([1])), "it holds a list"),
    "no npy": (lambda d, a: write(d / "x.npy", b"not an array"), "it is no .npy file"),
    "no zip": (lambda d, a: write(d / "x.npz", b"PK, or not"), "damaged, or not as numpy writes it"),
    "neither text nor goal": (lambda d, a: write(d / "x.npz", npz(damage(imaginebench_layout(a), "instructions", None))), "no goal texts"),
    "an unreadable sentence": (lambda d, a: write(d / "x.npz", npz({**imaginebench_layout(a), "instructions": np.array(["Do it."] * 12)})),
                               "row 0: instructions: cannot tell"),
    "objects in an npz": (lambda d, a: write(d / "x.npz", npz({**a, "masks": npy([1])})), "field 'masks' has type object"),
    "a huge npz": (lambda d, a: write(d / "x.npz", npz({**a, "masks": HUGE})), "field 'masks' is to be (1000000000000000,) of"),
    "two rollouts": (lambda d, a: write(d / "x.npy", npy({k: v[:2] for k, v in a.items() if np.ndim(v)})), "at least 3 are needed"),
    "novel levels": (lambda d, a: save(d / "easy", env.Goal("Left", "easy", "step", ((0, None, 1),)), 1), "row 0: level 'easy', kind"),
    "an endless rollout": (lambda d, a: save(d / "long", RED_LEFT, 51), "row 0: actions has 51 steps"),
    "centimetres": (lambda d, a: save(d / "cm", RED_LEFT, 1, 20.0), "row 0: observations reach 20"),
}


def save(path, goal, steps, place=0.0):
    """A rollouts dataset folder with one rollout in which nothing moves."""
    rollout.write_rollouts(path, [env.rollout_record(goal, np.full((steps + 1, 10), place), np.zeros(steps, int))])
    return path


@pytest.mark.parametrize("make, said", OTHER.values(), ids=OTHER)
def test_data_that_is_no_recording_to_learn_from_is_refused_in_one_line(recorded, tmp_path, capsys, make, said):
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in", recorded)
    assert kalm.main(["--scale", "smoke", "--output_dir", str(tmp_path / "run"), "--data", str(path)]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"kalm: {path}") and said in err and "\n" not in err and not (tmp_path / "run").exists()


def test_an_npz_that_would_unpack_to_more_than_the_limit_is_refused(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST", sum(np.asarray(v).nbytes for v in recorded.values()) - 1)
    with pytest.raises(ValueError, match="would take the arrays past"):
        formats.read(write(tmp_path / "a.npz", npz(recorded)))


# ------------------------------------------------------------------------------------------------------- --data, --export

def collect(run, *arguments):
    assert kalm.main(["--scale", "smoke", "--stage", "collect", "--output_dir", str(run), *map(str, arguments)]) == 0
    return rollout.read_rollouts(run / "rollouts" / "real")


def test_data_takes_the_place_of_the_expert_and_counts_by_its_content(rollouts, recorded, tmp_path, capsys):
    path = write(tmp_path / "a.npy", npy(recorded))
    records = collect(tmp_path / "run", "--data", path)
    np.testing.assert_array_equal(records[5]["observations"], rollouts[5]["observations"])
    assert len(records) == 12 and "12 of 12 rollouts" in capsys.readouterr().out
    other = write(tmp_path / "b.npy", path.read_bytes())
    collect(tmp_path / "run", "--data", other)
    assert "collect took" not in capsys.readouterr().out
    write(other, npy({k: v[:7] for k, v in recorded.items() if k != "num_trajectories"}))
    assert len(collect(tmp_path / "run", "--data", other)) == 7


def test_our_own_rollouts_folder_is_data_too(rollouts, tmp_path):
    rollout.write_rollouts(tmp_path / "mine", rollouts[:9])
    collect(tmp_path / "run", "--data", tmp_path / "mine")
    assert_same(formats.read(tmp_path / "run" / "rollouts" / "real")[0], rollouts[:9])


def test_a_folder_counts_by_the_names_and_content_of_its_files(tmp_path):
    write(tmp_path / "a", b"1"), write(tmp_path / "b", b"2")
    before = formats.content_hash(tmp_path)
    assert formats.content_hash(tmp_path) == before
    (tmp_path / "b").rename(tmp_path / "c")
    renamed = formats.content_hash(tmp_path)
    write(tmp_path / "c", b"3")
    assert len({before, renamed, formats.content_hash(tmp_path)}) == 3


def imaginary(rollouts):
    """Imagined records of every kind, with what the model says of them; some steps too short to count as imagined moves."""
    rng, records = np.random.default_rng(3), []
    goals = [g for level in env.NOVEL_LEVELS for g in env.sample_goals(level, "test", 8, rng)]
    for goal, r in zip(goals, rollouts):
        n = 1 if goal.kind == "step" else len(r["actions"])
        seen = (r["observations"][:n + 1] + rng.normal(0, 0.05, (n + 1, 10))).astype(np.float32)
        records.append({**env.rollout_record(goal, seen, r["actions"][:n], imagined=True), "explanation": f"The rød ball, \"{n}\" \u2028.",
                        "dynamics_error": rng.random(n).astype(np.float32)})
    return records


def test_npz_keeps_real_rollouts_with_their_states_and_imagined_ones_with_goal_and_explanation(rollouts, tmp_path):
    for name, records, imagined in (("real", rollouts[:20], False), ("imagined", imaginary(rollouts), True)):
        formats.write_npz(tmp_path / f"{name}.npz", records, imagined=imagined)
        read, odd = formats.read(tmp_path / f"{name}.npz")
        assert_same(read, records)
        assert not any(odd.values()) and not list(tmp_path.glob("*.partial"))
    mixed = [rollouts[0], {**rollouts[1], "states": None}]
    formats.write_npz(tmp_path / "mixed.npz", mixed)
    assert_same(formats.read(tmp_path / "mixed.npz")[0], mixed)


def test_npz_is_plain_arrays_with_the_encoding_behind_the_observations(rollouts, tmp_path):
    formats.write_npz(tmp_path / "a.npz", rollouts[:4], lambda texts: [[len(t), 7] for t in texts])
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file["observations"].shape == (4, file["masks"].shape[1], 12)
        assert file["instructions"].tolist() == [r["goal"] for r in rollouts[:4]]
        for row, r in enumerate(rollouts[:4]):
            n = len(r["actions"])
            np.testing.assert_array_equal(file["observations"][row, :n, :10], r["observations"][:-1])
            assert (file["observations"][row, :, 10:] == [len(r["goal"]), 7]).all() and file["masks"][row].sum() == n


def test_export_writes_every_rollout_of_a_run_with_its_goal_text_and_encoding(smoke_run, tmp_path):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    assert kalm.main(["--scale", "smoke", "--output_dir", str(run), "--export", "npz"]) == 0
    table = kalm.rl.GoalTable.load(run / "policies" / "goals.safetensors")
    assert {p.name for p in (run / "export").iterdir()} == {"real.npz", "rephrase.npz", "easy.npz", "hard.npz"}
    for path in (run / "export").iterdir():
        assert_same(formats.read(path)[0], formats.read(run / "rollouts" / path.stem)[0])
        with np.load(path) as file:
            np.testing.assert_array_equal(file["observations"][:, 0, 10:], table.table[table.rows(file["instructions"].tolist())])
    assert formats.read(run / "export" / "real.npz")[0][0]["states"] is not None


def test_exported_rollouts_are_data_for_another_run(rollouts, tmp_path):
    formats.write_npz(tmp_path / "a.npz", rollouts[:8])
    assert_same([{**r, "states": None} for r in collect(tmp_path / "run", "--data", tmp_path / "a.npz")],
                [{**r, "states": None} for r in rollouts[:8]])


@pytest.mark.parametrize("arguments, said", [(["--export", "csv"], "--export takes"), (["--export", "npz,npz"], "each once")])
def test_an_unknown_export_is_refused(tmp_path, capsys, arguments, said):
    assert kalm.main(["--scale", "smoke", "--output_dir", str(tmp_path / "run"), *arguments]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------- Minari

def test_without_h5py_minari_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert kalm.main(["--scale", "smoke", "--output_dir", str(tmp_path / "run"), "--export", "minari"]) == 2
    assert "pip install h5py" in capsys.readouterr().err and not (tmp_path / "run").exists()


@needs_h5py
def test_a_minari_dataset_keeps_real_and_imagined_rollouts(rollouts, tmp_path):
    for name, records, imagined in (("real-v0", rollouts[:20], False), ("imagined-v0", imaginary(rollouts), True)):
        formats.write_minari(tmp_path / name, records, imagined)
        read, odd = formats.read(tmp_path / name)
        assert_same(read, records)
        assert not any(odd.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["imagined-v0", "real-v0"]
    assert len(collect(tmp_path / "run", "--data", tmp_path / "real-v0")) == 20


@needs_h5py
def test_minari_itself_loads_what_was_written(rollouts, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    formats.write_minari(tmp_path / "kalm" / "real-v0", rollouts[:5])
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data = minari.load_dataset("kalm/real-v0")
    assert data.total_episodes == 5 and data.action_space.n == 40 and data.observation_space.shape == (10,)
    for episode, attributes, r in zip(data, data.storage.get_episode_metadata(range(5)), rollouts):
        np.testing.assert_array_equal(episode.observations, r["observations"])
        np.testing.assert_array_equal(episode.infos["state"], r["states"])
        assert attributes["goal"] == r["goal"] and episode.terminations.tolist() == [False] * (len(r["actions"]) - 1) + [True]


@needs_h5py
def test_minari_data_in_other_files_too_large_or_without_a_goal_is_refused(rollouts, tmp_path):
    import h5py
    secret = write(tmp_path / "secret", np.zeros(1000).tobytes())
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["observations"] = np.zeros((5, 10))

    def outside(episode):
        n = len(episode["actions"])
        del episode["observations"]
        episode.create_dataset("observations", (n + 1, 10), "f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])

    def linked(episode):
        del episode["observations"]
        episode["observations"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "observations")

    def soft(episode):
        del episode["observations"]
        episode["observations"] = h5py.SoftLink("/episode_1/observations")

    def huge(episode):
        del episode["observations"]
        episode.create_dataset("observations", (2 ** 40, 10), "f4", chunks=(1024, 10))

    def virtual(episode):
        layout = h5py.VirtualLayout((len(episode["actions"]) + 1, 10), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "observations", (len(episode["actions"]) + 1, 10))
        del episode["observations"]
        episode.create_virtual_dataset("observations", layout)

    def texts(episode):
        del episode["actions"]
        episode["actions"] = ["a"] * 3

    def nameless(episode):
        del episode.attrs["goal"]

    for change, said in ((outside, "refused"), (linked, "is a link"), (soft, "is a link"), (huge, "larger than"), (virtual, "refused"),
                         (texts, "not numbers"), (nameless, "attribute 'goal'")):
        formats.write_minari(tmp_path / "bad-v0", rollouts[:3])
        with h5py.File(tmp_path / "bad-v0" / "data" / "main_data.hdf5", "a") as file:
            change(file["episode_2"])
        with pytest.raises(ValueError, match=rf"bad-v0, row 2: .*{said}"):
            formats.read(tmp_path / "bad-v0")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"total_episodes": "3", "data_format": "hdf5"}', "[" * 10 ** 5,
                                     '{"total_episodes": 3, "data_format": "arrow"}'])
def test_a_folder_whose_metadata_are_not_minaris_is_refused(tmp_path, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match="metadata.json"):
        formats.read(tmp_path)


# ------------------------------------------------------------------------------------------------------------------- fuzz

@pytest.mark.parametrize("seed", (0, 1))
def test_mutated_files_are_read_or_refused_in_one_clear_sentence(tmp_path, seed):
    with np.errstate(all="ignore"):
        count, accepted, findings = fuzz(4, seed, tmp_path)
    assert findings == [] and count > 100 and 0 < accepted < count


@pytest.mark.parametrize("kind", ("f8", "u1", "i8"))
def test_actions_of_another_type_are_the_same_actions(recorded, tmp_path, kind):  # found by the fuzz: an IndexError
    plain = formats.read(write(tmp_path / "a.npy", npy(recorded)))[0]
    assert_same(formats.read(write(tmp_path / "b.npy", npy({**recorded, "actions": recorded["actions"].astype(kind)})))[0], plain)


@pytest.mark.parametrize("code", (0x110000, 0xffffffff, 0xd800))
def test_texts_that_are_no_unicode_are_refused(recorded, tmp_path, code):  # found by the fuzz: a SystemError
    recorded["instructions"].view(np.uint32)[0] = code
    for path, content in ((tmp_path / "a.npy", npy(recorded)), (tmp_path / "a.npz", npz(recorded))):
        with pytest.raises(ValueError, match="no Unicode character"):
            formats.read(write(path, content))


@pytest.mark.parametrize("field", ("states", "dynamics_error"))
def test_texts_in_the_place_of_numbers_are_refused(rollouts, tmp_path, field):  # found by the fuzz: a TypeError
    formats.write_npz(tmp_path / "a.npz", [{**r, "dynamics_error": r["rewards"], "explanation": "x"} for r in rollouts[:3]])
    with np.load(tmp_path / "a.npz") as file:
        arrays = {**file, field: file[field].astype("S8")}
    with pytest.raises(ValueError, match=f"row 0: {field} must be numbers"):
        formats.read(write(tmp_path / "b.npz", npz(arrays)))


def test_a_number_no_float_can_hold_in_a_text_of_a_pickle_is_damage():  # found by the fuzz: bytes in the message
    with pytest.raises(ValueError, match="damaged or cut short$"):
        pickled.read(b"Fno\xff number\n.")


def test_a_goal_text_with_half_a_character_is_refused(tmp_path):  # JSON can spell it, but no UTF-8 file or tokenizer takes it
    line = {"text": "Roll \ud800.", "level": "hard", "kind": "line", "relations": []}
    with pytest.raises(ValueError, match="line 1: a goal's text must be whole Unicode characters"):
        env.read_goals(write(tmp_path / "g.jsonl", json.dumps(line).encode()))
