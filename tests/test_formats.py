"""Recordings from elsewhere: what is read, what is refused and in which words."""

import importlib.util

import numpy as np
import pytest
from conftest import ROOT
from fuzz import arrays_only, authors_layout, fuzz, npy, npz, plain_npy, write_hdf5

import env
from data import formats, minari_io, recordings
from data.rollouts import FEATURES, write_rollouts

AUTHORS = ROOT.parent / "shared" / "reference" / "clevr_robot_40.npy"
needs_recording = pytest.mark.skipif(
    not AUTHORS.is_file(), reason="the authors' recordings are not here"
)
needs_minari = pytest.mark.skipif(
    not importlib.util.find_spec("minari"), reason="minari is not installed"
)
FORMATS = ["npz", "own", *(["minari"] if importlib.util.find_spec("minari") else [])]


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


def imaginebench_layout(rollouts, arrays):
    """The same with an encoding behind the observations and a plain sentence, without goals."""
    triples = [r["relations"][0] for r in rollouts[: len(arrays["masks"])]]
    texts = [
        f"Push the {ball} ball to the {way} of the {other} ball" for ball, other, way in triples
    ]
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


# ----------------------------------------------------------------------------------------------
# the authors' .npy


@needs_recording
def test_the_authors_pickle_holds_what_its_plain_twin_holds(world):
    with np.load(AUTHORS.with_suffix(".npz")) as plain:
        found = recordings.READERS[".npy"](AUTHORS)
        assert set(found) == set(recordings.FIELDS) & set(plain.files)
        for name, array in found.items():
            np.testing.assert_array_equal(array, plain[name])
    records, notes = formats.read(AUTHORS, world)
    assert len(records) == 40 and all(r["success"] for r in records) and not notes


@needs_recording
def test_the_relation_is_read_right_from_each_of_the_authors_sentences(world):
    found = recordings.READERS[".npy"](AUTHORS)
    for code, sentences in zip(found["goals"], found["instructions"]):
        relations = world.recorded_goal("Any", code).relations
        assert {world.recorded_goal(str(s)).relations for s in sentences} == {relations}


@pytest.mark.parametrize("protocol", range(6))
def test_recordings_in_the_authors_layout_become_the_rollouts_that_they_record(
    world, rollouts, recorded, tmp_path, protocol
):
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
    for same in (
        texts.astype(object),
        np.asfortranarray(texts),
        texts.tolist(),
        rows,
        list(texts),
        [list(row) for row in texts],
    ):
        path = write(tmp_path / "b.npy", npy({**recorded, "instructions": same}))
        assert_same(formats.read(path, world)[0], plain)
    single = write(
        tmp_path / "c.npy", npy({**recorded, "instructions": ["\ufeff" + t for t in texts[:, 0]]})
    )
    assert [r["goal"] for r in formats.read(single, world)[0]] == texts[:, 0].tolist()


@pytest.mark.parametrize("field", ("masks", "actions", "rewards", "terminals"))
def test_a_last_axis_of_one_means_nothing(world, recorded, tmp_path, field):
    plain = formats.read(write(tmp_path / "a.npy", npy(recorded)), world)[0]
    recorded[field] = (
        recorded[field].reshape(12, 20, 1) if recorded[field].ndim == 2 else recorded[field][..., 0]
    )
    assert_same(formats.read(write(tmp_path / "b.npy", npy(recorded)), world)[0], plain)


@pytest.mark.parametrize(
    "field, step, value", [("rewards", 0, 55), ("terminals", 0, True), ("terminals", -1, False)]
)
def test_what_the_judge_contradicts_is_counted_and_the_judge_believed(
    world, rollouts, recorded, tmp_path, field, step, value
):
    last = int(recorded["masks"][4].sum())
    recorded[field][4, step % last] = value
    path = write(tmp_path / "a.npy", npy(recorded))
    records, notes = formats.read(path, world)
    np.testing.assert_array_equal(records[4]["rewards"], rollouts[4]["rewards"])
    assert notes == {"contradicted": 1} and records[4]["success"]
    assert "in 1 the recorded rewards or terminals" in formats.read_offline(path, world)[1]


def test_rollouts_that_miss_their_goal_are_left_out_of_what_is_learned_from(
    world, recorded, tmp_path
):
    lengths = recorded["masks"].sum(1)
    recorded["masks"][lengths.argmax(), lengths.max() - 1] = (
        0  # the last, successful step of one is lost
    )
    kept, sentence = formats.read_offline(write(tmp_path / "a.npy", npy(recorded)), world)
    assert (
        len(kept) == 11
        and sentence.startswith("11 of 12 rollouts")
        and all(r["success"] for r in kept)
    )


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


# ----------------------------------------------------------------------------------------------
# ImagineBench's arrays


@pytest.mark.parametrize("suffix", ["npz", "npy", "NPZ", pytest.param("hdf5", marks=needs_minari)])
def test_the_dict_of_arrays_with_texts_alone_is_judged_by_the_relation_that_they_tell(
    world, rollouts, recorded, tmp_path, suffix
):
    arrays = imaginebench_layout(rollouts, recorded)
    arrays["observations"] = np.zeros(
        (12, 21, 16), np.float32
    )  # with the state after the last action
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


def test_a_last_state_that_was_not_recorded_is_the_physics_answer(
    world, rollouts, recorded, tmp_path
):
    path = write(tmp_path / "a.npz", npz(imaginebench_layout(rollouts, recorded)))
    records, notes = formats.read(path, world)
    assert notes["completed"] == 12
    for ours, theirs in zip(records, rollouts):
        np.testing.assert_array_equal(ours["observations"][:-1], theirs["observations"][:-1])
        at_rest = world.state_from_observation(theirs["observations"][-2:-1])
        reached = world.observe(world.step_batch(at_rest, theirs["actions"][-1:]))
        np.testing.assert_array_equal(ours["observations"][-1:], reached)
    assert (
        "in 12 the state after the last action was not recorded"
        in formats.read_offline(path, world)[1]
    )


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


WRONG = {  # of the authors' layout: field, what is done to it, what is said beside the file
    "no actions": ("actions", None, "field 'actions' is missing"),
    "no observations": ("observations", None, "field 'observations' is missing"),
    "no masks": ("masks", None, "field 'masks' is missing"),
    "no texts": ("instructions", None, "field 'instructions' is missing"),
    "NaN seen": ("observations", np.nan, "row 2: observations has NaN"),
    "infinity reached": (
        "next_observations",
        np.inf,
        "row 2: next_observations has NaN or infinite",
    ),
    "NaN reward": ("rewards", np.nan, "row 2: rewards has NaN"),
    "all rewards NaN": ("rewards", lambda a: a * np.nan, "row 0: rewards has NaN"),
    "all actions NaN": (
        "actions",
        lambda a: a * np.nan,
        "row 0: actions has NaN",
    ),  # found by the fuzz
    "action 40": ("actions", 40, "row 2: actions must be in 0..39, got"),
    "action -1": ("actions", -1, "row 2: actions must be in 0..39, got -1"),
    "an action no integer can hold": (
        "actions",
        lambda a: a + 1e300,
        "row 0: actions has values beyond",
    ),
    "half an action": ("actions", lambda a: a + 0.5, "row 0: actions must be whole numbers"),
    "actions as texts": ("actions", lambda a: a.astype(str), "row 0: actions must be numbers, got"),
    "actions as objects": (
        "actions",
        lambda a: a.astype(str).astype(object),
        "must be numbers, got|other things|only numbers",
    ),
    "two numbers an action": (
        "actions",
        lambda a: np.stack([a, a], -1),
        "row 0: actions must have shape (any,), got",
    ),
    "a ball out of reach": ("observations", lambda a: a * 100, "observations"),
    "nine numbers": ("observations", lambda a: a[..., :9], "row 0: observations must have shape"),
    "flat observations": (
        "observations",
        lambda a: a.reshape(len(a), -1),
        "observations has shape (12, 200)",
    ),
    "one row fewer": ("actions", lambda a: a[1:], "actions has shape (11, 20)"),
    "a number a rollout": (
        "actions",
        lambda a: a[:, 0],
        "actions has shape (12,)",
    ),  # found by the fuzz
    "a gap in the mask": ("masks", lambda a: a[:, ::-1].copy(), "row 0: masks must be ones"),
    "no steps": ("masks", lambda a: a * (np.arange(12) != 2)[:, None], "row 2: actions is empty"),
    "masks of one axis": ("masks", lambda a: a[:, 0], "masks must have shape (rollouts, steps)"),
    "steps that do not follow": (
        "next_observations",
        lambda a: a + 0.5,
        "next_observations of a step are not the observations",
    ),
    "two sources": ("goals", 1, "row 2: goals must"),
    "a direction 7": ("goals", lambda a: a + (np.arange(6) == 5) * 7, "row 0: goals must"),
    "a goal that changes": (
        "goals",
        lambda a: a + (np.arange(20) == 19)[:, None] * (np.arange(6) == 5),
        "row 0: goals must be",
    ),
    "texts as numbers": (
        "instructions",
        lambda a: np.zeros((12, 3)),
        "row 0: instructions must be a text",
    ),
    "texts of two axes": (
        "instructions",
        lambda a: a[..., None],
        "row 0: instructions must be texts",
    ),
    "no rows": ("masks", lambda a: a[:0], "has shape (12,"),
}


@pytest.mark.parametrize("kind", ("npy", "npz"))
@pytest.mark.parametrize("field, change, said", WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_recording_is_said_in_one_line(
    world, recorded, tmp_path, kind, field, change, said
):
    arrays = damage(recorded, field, change)
    path = write(tmp_path / f"bad.{kind}", npy(arrays) if kind == "npy" else npz(arrays))
    with pytest.raises(ValueError) as refused:
        formats.read_offline(path, world)
    message = str(refused.value)
    assert (
        message.startswith(str(path))
        and any(part in message for part in said.split("|"))
        and "\n" not in message
    )


HUGE = plain_npy(np.zeros(3)).replace(b"(3,), }" + b" " * 15, b"(1000000000000000,), }")
RED_LEFT = env.Goal("Red left of blue", kind="relation", relations=(("red", "blue", "left"),))
OTHER = {  # a path made from folder, recording and world; what is said
    "nothing": (lambda d, a, w: d / "absent", "no such file or folder"),
    "an empty folder": (lambda d, a, w: d, "neither state.json"),
    "a picture": (lambda d, a, w: write(d / "cat.png", b"cat"), "no recording; give"),
    "one array": (
        lambda d, a, w: write(d / "one.npy", plain_npy(np.zeros(3))),
        "it holds a single array",
    ),
    "a list": (lambda d, a, w: write(d / "list.npy", npy([1])), "it holds a list"),
    "no npy": (lambda d, a, w: write(d / "x.npy", b"not an array"), "it is no .npy file"),
    "no zip": (lambda d, a, w: write(d / "x.npz", b"PK, or not"), "damaged, or no .npz file"),
    "no hdf5": (lambda d, a, w: write(d / "x.hdf5", b"HDF, or not"), ".hdf5 file|minari[hdf5]"),
    "an unreadable sentence": (
        lambda d, a, w: write(
            d / "x.npz", npz({**damage(a, "goals", None), "instructions": np.array(["Do."] * 12)})
        ),
        "row 0: instructions: cannot tell",
    ),
    "a NUL in a goal": (
        lambda d, a, w: write(d / "x.npz", npz({**a, "instructions": np.array(["Do\0it."] * 12)})),
        "row 0: a goal's text",
    ),
    "objects in an npz": (
        lambda d, a, w: write(d / "x.npz", npz({**a, "masks": npy([1])})),
        "field 'masks'",
    ),
    "a huge npz": (
        lambda d, a, w: write(d / "x.npz", npz({**a, "masks": HUGE})),
        "field 'masks', (1000000000000000,) of",
    ),
    "two rollouts": (
        lambda d, a, w: write(d / "x.npy", npy({k: v[:2] for k, v in a.items() if np.ndim(v)})),
        "at least 3 are needed",
    ),
    "novel levels": (
        lambda d, a, w: save(d, env.Goal("Left", "easy", "step", (("red", None, "left"),)), 1, w),
        "row 0: level 'easy', kind",
    ),
    "an endless rollout": (lambda d, a, w: save(d, RED_LEFT, 51, w), "row 0: actions has 51 steps"),
    "centimetres": (lambda d, a, w: save(d, RED_LEFT, 1, w, 20.0), "row 0: observations reach 20"),
}


def save(path, goal, steps, world, place=0.0):
    """A rollouts dataset folder with one rollout in which nothing moves."""
    seen = np.full((steps + 1, 10), place, np.float32)
    write_rollouts(path / "own", [env.rollout_record(world, goal, seen, np.zeros(steps, int))])
    return path / "own"


@pytest.mark.parametrize("make, said", OTHER.values(), ids=OTHER)
def test_data_that_is_no_recording_to_learn_from_is_refused_in_one_line(
    world, recorded, tmp_path, make, said
):
    path = make(tmp_path, recorded, world)
    with pytest.raises(ValueError) as refused:
        formats.read_offline(path, world)
    message = str(refused.value)
    assert (
        message.startswith(str(path))
        and any(part in message for part in said.split("|"))
        and "\n" not in message
    )


def test_an_npz_that_would_unpack_to_more_than_the_limit_is_refused(
    world, recorded, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        recordings, "LARGEST", sum(np.asarray(v).nbytes for v in recorded.values()) - 1
    )
    with pytest.raises(ValueError, match="past the .* that are read"):
        formats.read(write(tmp_path / "a.npz", npz(recorded)), world)


# ----------------------------------------------------------------------------------------------
# fuzz


@pytest.mark.parametrize("seed", (0, 1))
def test_mutated_files_are_read_or_refused_in_one_clear_sentence(world, tmp_path, seed):
    with np.errstate(all="ignore"):
        count, accepted, findings = fuzz(4, seed, tmp_path, world)
    assert findings == [] and count > 100 and 0 < accepted < count


@pytest.mark.parametrize("kind", ("f8", "u1", "i8"))
def test_actions_of_another_type_are_the_same_actions(
    world, recorded, tmp_path, kind
):  # found by the fuzz: an IndexError
    plain = formats.read(write(tmp_path / "a.npy", npy(recorded)), world)[0]
    path = write(tmp_path / "b.npy", npy({**recorded, "actions": recorded["actions"].astype(kind)}))
    assert_same(formats.read(path, world)[0], plain)


@pytest.mark.parametrize("code", (0x110000, 0xFFFFFFFF, 0xD800))
def test_texts_that_are_no_unicode_are_refused(
    world, recorded, tmp_path, code
):  # found by the fuzz: a SystemError
    recorded["instructions"].view(np.uint32)[0] = code
    for path, content in ((tmp_path / "a.npy", npy(recorded)), (tmp_path / "a.npz", npz(recorded))):
        with pytest.raises(ValueError, match="no Unicode character"):
            formats.read(write(path, content), world)


@pytest.mark.parametrize("field", ("states", "dynamics_error"))
def test_texts_in_the_place_of_numbers_are_refused(
    world, rollouts, tmp_path, field
):  # found by the fuzz: a TypeError
    recordings.write_npz(
        tmp_path / "a.npz",
        [{**r, "dynamics_error": r["rewards"], "explanation": "x"} for r in rollouts[:3]],
    )
    with np.load(tmp_path / "a.npz") as file:
        arrays = {**file, field: file[field].astype("S8")}
    with pytest.raises(ValueError, match=f"row 0: {field} must be numbers"):
        formats.read(write(tmp_path / "b.npz", npz(arrays)), world)
