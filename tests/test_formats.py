"""Recordings from elsewhere: what is read, what is refused and in which words."""

import importlib.util

import numpy as np
import pytest
from conftest import ROOT, rollout_record
from fuzz import arrays_only, authors_layout, fuzz, hdf5, npy, npz

import env
from data import formats, minari_io, recordings
from data.rollouts import FEATURES, write_rollouts

AUTHORS = ROOT.parent / "shared" / "reference" / "clevr_robot_40.npy"
HAS_MINARI = importlib.util.find_spec("minari") is not None
FORMATS = ["npz", "own", *["minari"] * HAS_MINARI]


def write(path, content):
    path.write_bytes(content)
    return path


def write_as(data_format, folder, records, world):
    path = folder / ("npz-v0.npz" if data_format == "npz" else f"{data_format}-v0")
    if data_format == "minari":
        minari_io.write_minari(path, records, world)
    else:
        {"npz": recordings.write_npz, "own": write_rollouts}[data_format](path, records)
    return path


@pytest.fixture
def recorded(rollouts):
    return authors_layout(rollouts[:12], 20)


def imaginebench_layout(rollouts, arrays, last):
    """An encoding behind the observations and plain sentences without goals; last: T+1 states."""
    seen, sentences = np.full((12, 20 + last, 16), 0.5, np.float32), []
    for row, r in enumerate(rollouts[:12]):
        steps = len(r["actions"]) + last
        seen[row, :steps, :10] = r["observations"][:steps]
        ball, other, way = r["relations"][0]
        sentences.append(f"Push the {ball} ball to the {way} of the {other} ball")
    kept = {name: arrays[name] for name in ("actions", "rewards", "masks")}
    return {**kept, "observations": seen, "instructions": np.array(sentences)}


def assert_same(read, written, skip=()):
    assert len(read) == len(written)
    for ours, theirs in zip(read, written):
        for field in set(FEATURES) - set(skip):
            a, b = ours.get(field), theirs.get(field)
            np.testing.assert_array_equal(a, b, err_msg=field, strict=True)


def goes_on(world, record, more):
    states, actions = [*record["states"]], [*record["actions"], *more]
    for action in more:
        states.append(world.step_batch(states[-1][None], np.array([action]))[0])
    goal, states = env.goal_of(record), np.array(states)
    return rollout_record(world, goal, world.observe(states), np.array(actions), states)


@pytest.mark.skipif(not AUTHORS.is_file(), reason="the authors' recordings are not here")
def test_the_authors_pickle_holds_what_its_plain_twin_holds(world):
    with np.load(AUTHORS.with_suffix(".npz")) as plain:
        found = recordings.READERS[".npy"](AUTHORS)
        assert set(found) == set(recordings.FIELDS) & set(plain.files)
        for name, array in found.items():
            np.testing.assert_array_equal(array, plain[name])
    records, notes = formats.read(AUTHORS, world)
    assert len(records) == 40 and all(r["success"] for r in records) and not notes


def test_the_authors_layout_is_what_it_records(world, rollouts, recorded, tmp_path):
    path = write(tmp_path / "a.NPY", npy(recorded))
    records, notes = formats.read(path, world)
    assert not notes
    assert_same(records, rollouts[:12], skip=("goal", "states"))
    texts = [[r["goal"] for r in formats.read(path, world, seed)[0]] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]  # the seed draws the instruction
    assert all(text in row for text, row in zip(texts[0], recorded["instructions"]))


SAME = {  # other ways to write the same
    "objects": lambda a: {"instructions": a["instructions"].astype(object)},
    "Fortran order": lambda a: {"instructions": np.asfortranarray(a["instructions"])},
    "lists": lambda a: {"instructions": a["instructions"].tolist()},
    "list of arrays": lambda a: {"instructions": list(a["instructions"])},
    "a last axis": lambda a: {name: a[name][..., None] for name in ("actions", "masks")},
    "no last axis": lambda a: {name: a[name][..., 0] for name in ("rewards", "terminals")},
    "big-endian": lambda a: {"actions": a["actions"].astype(">f8")},
    "lists of numbers": lambda a: {k: a[k].tolist() for k in ("observations", "actions", "masks")},
    "numpy's numbers": lambda a: {"num_trajectories": np.int64(12)},
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_plain_values_are_read_from_whatever_holds_them(world, recorded, tmp_path, change):
    plain = formats.read(write(tmp_path / "a.npy", npy(recorded)), world)[0]
    path = write(tmp_path / "b.npy", npy({**recorded, **change(recorded)}))
    assert_same(formats.read(path, world)[0], plain)


@pytest.mark.parametrize("suffix", ["npz", "npy", "NPZ", *["hdf5"] * HAS_MINARI])
def test_texts_alone_tell_the_relation(world, rollouts, recorded, tmp_path, suffix):
    arrays = arrays_only(imaginebench_layout(rollouts, recorded, last=True))
    to_bytes = {"npz": npz, "npy": npy, "hdf5": hdf5}[suffix.lower()]
    records, notes = formats.read(write(tmp_path / f"a.{suffix}", to_bytes(arrays)), world)
    assert not notes
    assert_same(records, rollouts[:12], skip=("goal", "states"))


def test_a_last_state_not_recorded_is_the_physics_answer(world, rollouts, recorded, tmp_path):
    path = write(tmp_path / "a.npz", npz(imaginebench_layout(rollouts, recorded, last=False)))
    records, notes = formats.read(path, world)
    assert notes["completed"] == 12
    for ours, theirs in zip(records, rollouts):
        np.testing.assert_array_equal(ours["observations"][:-1], theirs["observations"][:-1])
        at_rest = world.state_from_observation(theirs["observations"][-2:-1])
        reached = world.observe(world.step_batch(at_rest, theirs["actions"][-1:]))
        np.testing.assert_array_equal(ours["observations"][-1:], reached)
    assert "in 12 the state after the last action" in formats.read_offline(path, world)[1]


@pytest.mark.parametrize("field, value", [("rewards", 55), ("terminals", True)])
def test_the_judge_is_believed(world, rollouts, recorded, tmp_path, field, value):
    recorded[field][4, 0] = value
    path = write(tmp_path / "a.npy", npy(recorded))
    records, notes = formats.read(path, world)
    np.testing.assert_array_equal(records[4]["rewards"], rollouts[4]["rewards"])
    assert notes == {"contradicted": 1} and records[4]["success"]
    assert "in 1 the recorded rewards or terminals" in formats.read_offline(path, world)[1]


def test_rollouts_end_with_their_goal_and_must_reach_it(world, rollouts, tmp_path):
    long = [goes_on(world, r, [0, 39, 8, 17]) for r in rollouts[:12]]
    recorded = authors_layout([*long, rollouts[12]], 30)
    recorded["masks"][12, len(rollouts[12]["actions"]) - 1] = 0  # its last step is lost
    kept, sentence = formats.read_offline(write(tmp_path / "a.npy", npy(recorded)), world)
    assert_same(kept, rollouts[:12], skip=("goal", "states"))
    assert sentence.startswith("12 of 13 rollouts")
    assert "12 went on after their goal was reached" in sentence


def damage(arrays, field, change):
    """The arrays with one field changed, in row 2 where it is an index or value, or taken out."""
    arrays = {name: np.array(value) for name, value in arrays.items() if name != field or change}
    if callable(change):
        arrays[field] = change(arrays[field])
    elif change:
        arrays[field][2, 0] = change
    return arrays


LAST_OF_20 = (np.arange(20) == 19)[:, None]
WRONG = [  # of the authors' layout: field, what is done to it, what is said beside the file
    ("actions", None, ": field 'actions' is missing"),
    ("observations", np.nan, ", row 2: observations has NaN"),
    ("observations", lambda a: a[..., :9], ", row 0: "),
    ("next_observations", np.inf, ", row 2: observations has NaN or infinite"),
    ("next_observations", lambda a: a + 0.5, ", row 0: next_observations of a step are not"),
    ("rewards", lambda a: a.astype("S8"), ", row 0: rewards must be an array of numbers"),
    ("actions", lambda a: a * np.nan, ", row 0: actions must be whole numbers"),
    ("actions", 40, ", row 2: actions must be in 0..39, got"),
    ("actions", -1, ", row 2: actions must be in 0..39, got -1"),
    ("actions", lambda a: np.stack([a, a], -1), ", row 0: actions must have shape"),
    ("actions", lambda a: a[1:], ": actions has 11 rollouts"),
    ("masks", lambda a: a[:, ::-1].copy(), ", row 0: masks must be ones"),
    ("masks", lambda a: a * (np.arange(12) != 2)[:, None], ", row 2: actions are none"),
    ("masks", lambda a: a[:, 0], ", row 0: "),
    ("goals", 1, ", row 2: goals must"),
    ("goals", lambda a: a + LAST_OF_20 * (np.arange(6) == 5), ", row 0: goals must be"),
    ("instructions", lambda a: np.zeros((12, 3)), ", row 0: instructions must be a text"),
    ("instructions", lambda a: a[:, :0], ", row 0: a goal's text must be a sentence"),
    ("instructions", lambda a: np.array(["\ud800"] * 12), ", row 0: a goal's text must be whole"),
]


def assert_refused(path, world, said):
    with pytest.raises(ValueError) as refused:
        formats.read_offline(path, world)
    message = str(refused.value)
    assert message.startswith(f"{path}{said}") and "\n" not in message, message


@pytest.mark.parametrize("field, change, said", WRONG)
def test_what_is_wrong_is_said_in_one_line(world, recorded, tmp_path, field, change, said):
    damaged = damage(recorded, field, change)
    for path, content in ((tmp_path / "a.npy", npy(damaged)), (tmp_path / "a.npz", npz(damaged))):
        assert_refused(write(path, content), world, said)


HUGE = npy(np.zeros(3)).replace(b"(3,), }" + b" " * 15, b"(1000000000000000,), }")
RED_LEFT = env.Goal("Red left of blue", kind="relation", relations=(("red", "blue", "left"),))
RED_STEP = env.Goal("Left", "easy", "step", (("red", None, "left"),))
DO = {"instructions": ["Do."] * 12}
DEEP = {"relations": ["[" * 9999] * 12}
FILES = [  # name, content made of a recording, what is said
    ("x.png", lambda a: b"cat", ": give a folder or a file of .npy"),
    ("x.npy", lambda a: npy(np.zeros(3)), ": it does not hold what a recording is"),
    ("x.npy", lambda a: npy({1, 2}), ": it does not hold what a recording is"),
    ("x.npy", lambda a: b"not an array", ": the magic string is not correct"),
    ("x.npz", lambda a: b"PK, or not", ": damaged, or not of its format (BadZip"),
    ("x.hdf5", lambda a: b"HDF, or not", ": "),
    ("x.npz", lambda a: npz({**a, "masks": npy({})}), ": Object arrays cannot"),
    ("x.npz", lambda a: npz({**a, "masks": HUGE}), ": damaged"),
    ("x.npz", lambda a: npz({k: a[k][:0] for k in a}), ": 0 of 0 rollouts"),
    ("x.npz", lambda a: npz({**damage(a, "goals", None), **DO}), ", row 0: instructions: cannot"),
    (
        "x.npz",
        lambda a: npz({**damage(a, "goals", None), **DEEP}),
        ", row 0: field 'relations' is a text",
    ),
]


@pytest.mark.parametrize("name, make, said", FILES)
def test_a_file_that_is_no_recording_is_refused(world, recorded, tmp_path, name, make, said):
    del recorded["num_trajectories"]
    assert_refused(write(tmp_path / name, make(recorded)), world, said)


OFFLINE = [(RED_STEP, 1, 0, "level 'e"), (RED_LEFT, 51, 0, "actions"), (RED_LEFT, 1, 20, "observa")]


@pytest.mark.parametrize("goal, steps, place, said", OFFLINE)
def test_what_no_offline_data_can_be_is_refused(world, tmp_path, goal, steps, place, said):
    seen = np.full((steps + 1, 10), place, np.float32)
    record = rollout_record(world, goal, seen, np.zeros(steps, int))
    write_rollouts(tmp_path / "own", [record])
    assert_refused(tmp_path / "own", world, f", row 0: {said}")
    assert_refused(tmp_path, world, ": neither one rollouts dataset")


def test_more_than_the_limit_is_not_unpacked(world, recorded, tmp_path, monkeypatch):
    size = sum(np.asarray(value).nbytes for value in recorded.values())
    monkeypatch.setattr(recordings, "LARGEST", size - 1)
    assert_refused(write(tmp_path / "a.npz", npz(recorded)), world, ": its arrays take")


@pytest.mark.parametrize("seed", (0, 1))
def test_mutated_files_are_read_or_refused(world, tmp_path, seed):
    with np.errstate(all="ignore"):
        count, accepted, findings = fuzz(4, seed, tmp_path, world)
    assert findings == [] and count > 100 and 0 < accepted < count
