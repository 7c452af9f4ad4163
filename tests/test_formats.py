"""Recordings from elsewhere: what is read, what is refused and in which words."""

import importlib.util

import numpy as np
import pytest
from conftest import ROOT
from fuzz import arrays_only, authors_layout, fuzz, hdf5, npy, npz, plain_npy

import env
from data import formats, minari_io, recordings
from data.rollouts import FEATURES, write_rollouts

AUTHORS = ROOT.parent / "shared" / "reference" / "clevr_robot_40.npy"
HAS_MINARI = importlib.util.find_spec("minari") is not None
needs_minari = pytest.mark.skipif(not HAS_MINARI, reason="minari is not installed")
FORMATS = ["npz", "own", *["minari"] * HAS_MINARI]


def write(path, content):
    path.write_bytes(content)
    return path


def write_as(data_format, path, records, world):
    """Records in one of FORMATS; the path of what was written."""
    path = path / f"{data_format}-v0"
    if data_format == "npz":
        path = path.with_suffix(".npz")
        recordings.write_npz(path, records)
    elif data_format == "own":
        write_rollouts(path, records)
    else:
        minari_io.write_minari(path, records, world)
    return path


@pytest.fixture
def recorded(rollouts):
    return authors_layout(rollouts[:12], 20)


def imaginebench_layout(rollouts, arrays, last):
    """An encoding behind the observations and plain sentences without goals; last: T+1 states."""
    seen = np.full((12, 20 + last, 16), 0.5, np.float32)
    sentences = []
    for row, r in enumerate(rollouts[:12]):
        before = r["observations"] if last else r["observations"][:-1]
        seen[row, : len(before), :10] = before
        ball, way, other = r["relations"][0][0], r["relations"][0][2], r["relations"][0][1]
        sentences.append(f"Push the {ball} ball to the {way} of the {other} ball")
    kept = {name: arrays[name] for name in ("actions", "rewards", "masks")}
    return {**kept, "observations": seen, "instructions": np.array(sentences)}


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
    goal, states = env.goal_of(record), np.array(states)
    return env.rollout_record(world, goal, world.observe(states), np.array(actions), states)


@pytest.mark.skipif(not AUTHORS.is_file(), reason="the authors' recordings are not here")
def test_the_authors_pickle_holds_what_its_plain_twin_holds_and_sentences_tell_the_relation(world):
    with np.load(AUTHORS.with_suffix(".npz")) as plain:
        found = recordings.READERS[".npy"](AUTHORS)
        assert set(found) == set(recordings.FIELDS) & set(plain.files)
        for name, array in found.items():
            np.testing.assert_array_equal(array, plain[name])
    records, notes = formats.read(AUTHORS, world)
    assert len(records) == 40 and all(r["success"] for r in records) and not notes
    for code, sentences in zip(found["goals"], found["instructions"]):
        relations = world.recorded_goal("Any", code).relations
        assert {world.recorded_goal(str(s)).relations for s in sentences} == {relations}


@pytest.mark.parametrize("protocol", (3, 4))
def test_recordings_in_the_authors_layout_become_the_rollouts_that_they_record(
    world, rollouts, recorded, tmp_path, protocol
):
    path = write(tmp_path / "a.NPY", npy(recorded, protocol))
    records, notes = formats.read(path, world)
    assert not notes
    assert_same(records, rollouts[:12], skip=("goal", "states"))
    assert all(r["goal"] in texts for r, texts in zip(records, recorded["instructions"]))
    texts = [[r["goal"] for r in formats.read(path, world, seed)[0]] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]  # the seed draws the instruction


def in_a_column(arrays):
    return {k: v[..., None] if np.shape(v) == (12, 20) else v for k, v in arrays.items()}


SAME = {  # other ways to write the same
    "objects": lambda a: {**a, "instructions": a["instructions"].astype(object)},
    "Fortran order": lambda a: {**a, "instructions": np.asfortranarray(a["instructions"])},
    "lists": lambda a: {**a, "instructions": a["instructions"].tolist()},
    "list of arrays": lambda a: {**a, "instructions": list(a["instructions"])},
    "a last axis of one": in_a_column,
    "actions f8": lambda a: {**a, "actions": a["actions"].astype("f8")},
    "actions u1": lambda a: {**a, "actions": a["actions"].astype("u1")},
    "big-endian": lambda a: {**a, "actions": a["actions"].astype(">i4")},
    "numpy's numbers": lambda a: {**a, "num_trajectories": np.int64(12)},
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_plain_values_are_read_from_whatever_holds_them(world, recorded, tmp_path, change):
    plain = formats.read(write(tmp_path / "a.npy", npy(recorded)), world)[0]
    other = formats.read(write(tmp_path / "b.npy", npy(change(recorded))), world)[0]
    assert_same(other, plain)


@pytest.mark.parametrize("suffix", ["npz", "npy", "NPZ", pytest.param("hdf5", marks=needs_minari)])
def test_the_dict_of_arrays_with_texts_alone_is_judged_by_the_relation_that_they_tell(
    world, rollouts, recorded, tmp_path, suffix
):
    arrays = arrays_only(imaginebench_layout(rollouts, recorded, last=True))
    to_bytes = {"npz": npz, "npy": npy, "hdf5": hdf5}[suffix.lower()]
    records, notes = formats.read(write(tmp_path / f"a.{suffix}", to_bytes(arrays)), world)
    assert not notes
    assert_same(records, rollouts[:12], skip=("goal", "states"))


def test_a_last_state_that_was_not_recorded_is_the_physics_answer(
    world, rollouts, recorded, tmp_path
):
    arrays = imaginebench_layout(rollouts, recorded, last=False)
    path = write(tmp_path / "a.npz", npz(arrays))
    records, notes = formats.read(path, world)
    assert notes["completed"] == 12
    for ours, theirs in zip(records, rollouts):
        np.testing.assert_array_equal(ours["observations"][:-1], theirs["observations"][:-1])
        at_rest = world.state_from_observation(theirs["observations"][-2:-1])
        reached = world.observe(world.step_batch(at_rest, theirs["actions"][-1:]))
        np.testing.assert_array_equal(ours["observations"][-1:], reached)
    assert "in 12 the state after the last action" in formats.read_offline(path, world)[1]


@pytest.mark.parametrize(
    "field, step, value", [("rewards", 0, 55), ("terminals", 0, True), ("terminals", -1, False)]
)
def test_what_the_judge_contradicts_is_counted_and_the_judge_believed(
    world, rollouts, recorded, tmp_path, field, step, value
):
    recorded[field][4, step % int(recorded["masks"][4].sum())] = value
    path = write(tmp_path / "a.npy", npy(recorded))
    records, notes = formats.read(path, world)
    np.testing.assert_array_equal(records[4]["rewards"], rollouts[4]["rewards"])
    assert notes == {"contradicted": 1} and records[4]["success"]
    assert "in 1 the recorded rewards or terminals" in formats.read_offline(path, world)[1]


def test_rollouts_that_miss_their_goal_are_not_learned_from(world, recorded, tmp_path):
    lengths = recorded["masks"].sum(1)
    recorded["masks"][lengths.argmax(), lengths.max() - 1] = 0  # the last step of one is lost
    kept, sentence = formats.read_offline(write(tmp_path / "a.npy", npy(recorded)), world)
    assert len(kept) == 11 and all(r["success"] for r in kept)
    assert sentence.startswith("11 of 12 rollouts")


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


def damage(arrays, field, change):
    """The arrays with one field changed, in row 2 where it is an index or value, or taken out."""
    arrays = {name: np.array(value) for name, value in arrays.items()}
    if change is None:
        del arrays[field]
    elif callable(change):
        arrays[field] = change(arrays[field])
    else:
        arrays[field][2, 0] = change
    return arrays


LAST_OF_20 = (np.arange(20) == 19)[:, None]
WRONG = [  # of the authors' layout: field, what is done to it, what is said beside the file
    ("actions", None, ": field 'actions' is missing"),
    ("masks", None, ": field 'masks' is missing"),
    ("observations", np.nan, ", row 2: observations has NaN"),
    ("observations", lambda a: a * 100, ", row 0: next_observations of a step"),
    ("observations", lambda a: a[..., :9], ", row 0: "),
    ("observations", lambda a: a.reshape(12, -1), ", row 0: "),
    ("next_observations", np.inf, ", row 2: observations has NaN or infinite"),
    ("next_observations", lambda a: a + 0.5, ", row 0: next_observations of a step are not"),
    ("rewards", np.nan, ", row 2: rewards has NaN"),
    ("rewards", lambda a: a.astype("S8"), ", row 0: rewards must be an array of numbers"),
    ("actions", lambda a: a * np.nan, ", row 0: actions must be whole numbers"),
    ("actions", lambda a: a + 0.5, ", row 0: actions must be whole numbers"),
    ("actions", 40, ", row 2: actions must be in 0..39, got"),
    ("actions", -1, ", row 2: actions must be in 0..39, got -1"),
    ("actions", lambda a: a + 1e300, ", row 0: actions must be in 0..39"),
    ("actions", lambda a: a.astype(str), ", row 0: actions must be an array of numbers"),
    ("actions", lambda a: np.stack([a, a], -1), ", row 0: actions must have shape"),
    ("actions", lambda a: a[1:], ": actions has 11 rollouts"),
    ("actions", lambda a: a[:, 0], ", row 0: "),
    ("masks", lambda a: a[:, ::-1].copy(), ", row 0: masks must be ones"),
    ("masks", lambda a: a * (np.arange(12) != 2)[:, None], ", row 2: actions are none"),
    ("masks", lambda a: a[:, 0], ", row 0: "),
    ("masks", lambda a: a[:0], ": observations has 12 rollouts"),
    ("goals", 1, ", row 2: goals must"),
    ("goals", lambda a: a + LAST_OF_20 * (np.arange(6) == 5), ", row 0: goals must be"),
    ("instructions", lambda a: np.zeros((12, 3)), ", row 0: instructions must be a text"),
    ("instructions", lambda a: a[..., None], ", row 0: instructions must be a text"),
    ("instructions", lambda a: a[:, :0], ", row 0: a goal's text must be a sentence"),
    ("instructions", lambda a: np.array(["\ud800"] * 12), ", row 0: a goal's text must be whole"),
]


def assert_refused(path, world, said):
    with pytest.raises(ValueError) as refused:
        formats.read_offline(path, world)
    message = str(refused.value)
    assert message.startswith(f"{path}{said}") and "\n" not in message, message


@pytest.mark.parametrize("kind", (npy, npz))
@pytest.mark.parametrize("field, change, said", WRONG)
def test_what_is_wrong_with_a_recording_is_said_in_one_line(
    world, recorded, tmp_path, kind, field, change, said
):
    content = kind(damage(recorded, field, change))
    assert_refused(write(tmp_path / f"bad.{kind.__name__}", content), world, said)


HUGE = plain_npy(np.zeros(3)).replace(b"(3,), }" + b" " * 15, b"(1000000000000000,), }")
RED_LEFT = env.Goal("Red left of blue", kind="relation", relations=(("red", "blue", "left"),))
RED_STEP = env.Goal("Left", "easy", "step", (("red", None, "left"),))
FILES = {  # name, content made of a recording, what is said
    "a picture": ("x.png", lambda a: b"cat", ": give a folder or a file of .npy"),
    "one array": ("x.npy", lambda a: HUGE, ": it does not hold what a recording is"),
    "a list": ("x.npy", lambda a: npy([1]), ": it does not hold what a recording is"),
    "no npy": ("x.npy", lambda a: b"not an array", ": the magic string is not correct"),
    "no zip": ("x.npz", lambda a: b"PK, or not", ": damaged, or not of its format (BadZip"),
    "no hdf5": ("x.hdf5", lambda a: b"HDF, or not", ": "),
    "objects": ("x.npz", lambda a: npz({**a, "masks": npy([1])}), ": Object arrays cannot"),
    "more than memory": ("x.npz", lambda a: npz({**a, "masks": HUGE}), ": damaged"),
    "no rows": ("x.npz", lambda a: npz({k: a[k][:0] for k in a}), ": 0 of 0 rollouts"),
    "two": ("x.npz", lambda a: npz({k: a[k][:2] for k in a}), ": 2 of 2 rollouts"),
    "a sentence that tells nothing": (
        "x.npz",
        lambda a: npz({**damage(a, "goals", None), "instructions": ["Do."] * 12}),
        ", row 0: instructions: cannot tell the goal",
    ),
    "relations that are no JSON": (
        "x.npz",
        lambda a: npz({**damage(a, "goals", None), "relations": ["[" * 9999] * 12}),
        ", row 0: relations, a text, is not JSON",
    ),
}


@pytest.mark.parametrize("name, make, said", FILES.values(), ids=FILES)
def test_files_that_are_no_recording_to_learn_from_are_refused_in_one_line(
    world, recorded, tmp_path, name, make, said
):
    del recorded["num_trajectories"]
    assert_refused(write(tmp_path / name, make(recorded)), world, said)


@pytest.mark.parametrize(
    "goal, steps, place, said",
    [
        (RED_STEP, 1, 0.0, "level 'easy', kind"),
        (RED_LEFT, 51, 0.0, "actions has 51 steps"),
        (RED_LEFT, 1, 20.0, "observations reach beyond 2"),
    ],
)
def test_rollouts_that_no_offline_data_can_have_are_refused(
    world, tmp_path, goal, steps, place, said
):
    seen = np.full((steps + 1, 10), place, np.float32)
    path = tmp_path / "own"
    write_rollouts(path, [env.rollout_record(world, goal, seen, np.zeros(steps, int))])
    assert_refused(path, world, f", row 0: {said}")
    assert_refused(tmp_path, world, ": neither a rollouts dataset nor a Minari")


def test_a_file_that_would_unpack_to_more_than_the_limit_is_refused(
    world, recorded, tmp_path, monkeypatch
):
    size = sum(np.asarray(value).nbytes for value in recorded.values())
    monkeypatch.setattr(recordings, "LARGEST", size - 1)
    assert_refused(write(tmp_path / "a.npz", npz(recorded)), world, ": its arrays take")


@pytest.mark.parametrize("seed", (0, 1))
def test_mutated_files_are_read_or_refused_in_one_clear_sentence(world, tmp_path, seed):
    with np.errstate(all="ignore"):
        count, accepted, findings = fuzz(4, seed, tmp_path, world)
    assert findings == [] and count > 100 and 0 < accepted < count
