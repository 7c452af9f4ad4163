"""Dataset folders: the types that others write, damage, what is wrong with a row."""

import datasets
import numpy as np
import pytest
from test_formats import assert_same, write

from data import formats
from data.rollouts import FEATURES, read_rollouts, write_rollouts

LISTS = datasets.List(datasets.List(datasets.Value("float32"), length=10))
WAYS = {
    "states all null": {"states": datasets.Value("null")},
    "fixed-size lists": {"observations": LISTS},
    "Array2D": {"observations": datasets.Array2D((None, 10), "float64")},
    "large lists": {
        "observations": datasets.LargeList(datasets.LargeList(datasets.Value("float64")))
    },
}


@pytest.mark.parametrize("changed", WAYS.values(), ids=WAYS)
def test_a_dataset_folder_is_read_in_the_types_that_others_write(
    world, rollouts, tmp_path, changed
):
    columns = {
        name: [r.get(name) for r in rollouts[:5]]
        for name in FEATURES
        if name not in ("explanation", "dynamics_error")
    }
    if "states" in changed:
        columns["states"] = [None] * 5
    types = datasets.Features({**{name: FEATURES[name] for name in columns}, **changed})
    datasets.Dataset.from_dict(columns, features=types).save_to_disk(str(tmp_path / "theirs"))
    before = formats.content_hash(tmp_path / "theirs")
    assert_same(
        formats.read(tmp_path / "theirs", world)[0],
        rollouts[:5],
        skip=("states",) if "states" in changed else (),
    )
    assert formats.content_hash(tmp_path / "theirs") == before


def test_a_damaged_arrow_file_is_refused_and_does_not_end_the_process(
    world, rollouts, tmp_path
):  # found by the fuzz
    write_rollouts(tmp_path / "own", rollouts[:4])
    (file,) = (tmp_path / "own").glob("*.arrow")
    whole = file.read_bytes()
    for at in range(0, len(whole), 997):
        write(file, whole[:at] + b"\xff\xff\xff\x7f" + whole[at + 4 :])
        try:
            read_rollouts(tmp_path / "own", world)
        except ValueError as error:
            assert str(tmp_path / "own") in str(error)


WRONG = {
    "no steps": ({"actions": np.zeros(0, int)}, "at least one action"),
    "a state too few": ({"observations": np.zeros((1, 10))}, "observations must have shape"),
    "a reward too many": ({"rewards": np.zeros(99)}, "rewards must have shape"),
    "states of another world": ({"states": np.zeros((2, 3))}, "states must have shape"),
    "NaN": ({"rewards": np.full(1, np.nan)}, "rewards has NaN"),
    "action 40": ({"actions": np.array([40])}, r"actions must be in 0\.\.39, got 40\.\.40"),
    "null actions": ({"actions": None}, "at least one action"),
    "null success": ({"success": None}, "success must be true or false"),
    "null relations": ({"relations": None}, "relations must be a list"),
    "no text": ({"goal": None}, "a goal's text"),
    "pink": ({"relations": [["pink", "blue", "left"]]}, "unknown colour 'pink'"),
}


@pytest.mark.parametrize("change, said", WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_row_is_said_with_folder_row_and_field(
    world, rollouts, tmp_path, change, said
):
    r = rollouts[0]
    short = {"observations": r["observations"][:2], "actions": r["actions"][:1]}
    short |= {"rewards": r["rewards"][:1], "states": r["states"][:2]}
    write_rollouts(tmp_path / "own", [rollouts[1], {**r, **short, **change}])
    with pytest.raises(ValueError, match=f"own, row 1: .*{said}"):
        read_rollouts(tmp_path / "own", world, with_states=True)


def test_columns_that_are_missing_or_of_no_use_are_named(world, rollouts, tmp_path):
    write_rollouts(tmp_path / "own", rollouts[:2])
    data = datasets.load_from_disk(str(tmp_path / "own"))
    data.remove_columns("rewards").save_to_disk(str(tmp_path / "short"))
    texts = data.remove_columns("rewards").add_column("rewards", ["much", "more"])
    texts.save_to_disk(str(tmp_path / "texts"))
    with pytest.raises(ValueError, match="short: column 'rewards' is missing"):
        read_rollouts(tmp_path / "short", world)
    with pytest.raises(ValueError, match="texts is not a rollouts dataset"):
        read_rollouts(tmp_path / "texts", world)


def test_states_stay_on_disk_unless_they_are_wanted(world, rollouts, tmp_path):
    write_rollouts(tmp_path / "own", rollouts[:3])
    assert all("states" not in record for record in read_rollouts(tmp_path / "own", world))
    assert_same(read_rollouts(tmp_path / "own", world, with_states=True), rollouts[:3])
