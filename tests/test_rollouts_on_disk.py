"""Dataset folders: the types that others write, damage, what is wrong with a row."""

import datasets
import numpy as np
import pytest
from test_formats import assert_same, write

from data import formats
from data.rollouts import FEATURES, read_rollouts, write_rollouts

FLOATS = datasets.List(datasets.Value("float32"), length=10)
WAYS = {
    "states all null": {"states": datasets.Value("null")},
    "fixed-size lists": {"observations": datasets.List(FLOATS)},
    "Array2D": {"observations": datasets.Array2D((None, 10), "float64")},
}


@pytest.mark.parametrize("changed", WAYS.values(), ids=WAYS)
def test_a_folder_is_read_in_the_types_that_others_write(world, rollouts, tmp_path, changed):
    lost = {"explanation", "claims", "dynamics_error"}
    columns = {name: [r.get(name) for r in rollouts[:5]] for name in set(FEATURES) - lost}
    if "states" in changed:
        columns["states"] = [None] * 5
    types = datasets.Features({**{name: FEATURES[name] for name in columns}, **changed})
    datasets.Dataset.from_dict(columns, features=types).save_to_disk(str(tmp_path))
    assert_same(formats.read(tmp_path, world)[0], rollouts[:5], skip=changed.keys() & {"states"})


def test_a_damaged_arrow_file_is_refused_and_does_not_end_the_process(world, rollouts, tmp_path):
    write_rollouts(tmp_path / "own", rollouts[:4])
    (file,) = (tmp_path / "own").glob("*.arrow")
    whole = file.read_bytes()
    for at in range(0, len(whole), 997):
        write(file, whole[:at] + b"\xff\xff\xff\x7f" + whole[at + 4 :])
        try:
            read_rollouts(tmp_path / "own", world)
        except ValueError as error:
            assert str(tmp_path / "own") in str(error)


WRONG = [
    ({"actions": np.zeros(0, int)}, "at least one action"),
    ({"observations": np.zeros((1, 10))}, "observations must have shape"),
    ({"states": np.zeros((2, 3))}, "states must have shape"),
    ({"rewards": np.full(1, np.nan)}, "rewards has NaN"),
    ({"actions": np.array([40])}, r"actions must be in 0\.\.39"),
    ({"actions": None}, "actions must have shape"),
    ({"relations": None}, "field 'relations' must be a list"),
    ({"relations": [["pink", "blue", "left"]]}, "unknown colour 'pink'"),
]


@pytest.mark.parametrize("change, said", WRONG)
def test_what_is_wrong_is_said_with_folder_row_and_field(world, rollouts, tmp_path, change, said):
    r = rollouts[0]
    short = {"observations": r["observations"][:2], "actions": r["actions"][:1]}
    short |= {"rewards": r["rewards"][:1], "states": r["states"][:2]}
    write_rollouts(tmp_path / "own", [rollouts[1], {**r, **short, **change}])
    with pytest.raises(ValueError, match=f"own, row 1: .*{said}"):
        read_rollouts(tmp_path / "own", world, with_states=True)


def test_columns_that_are_missing_or_of_no_use_are_named(world, rollouts, tmp_path):
    write_rollouts(tmp_path / "own", rollouts[:2])
    assert all("states" not in record for record in read_rollouts(tmp_path / "own", world))
    short = datasets.load_from_disk(str(tmp_path / "own")).remove_columns("rewards")
    for name, data, said in (
        ("short", short, ".*'rewards'"),
        ("texts", short.add_column("rewards", ["much", "more"]), "column 'rewards': "),
    ):
        data.save_to_disk(str(tmp_path / name))
        with pytest.raises(ValueError, match=f"{name} is not a rollouts dataset: {said}"):
            read_rollouts(tmp_path / name, world)


def test_several_datasets_in_one_folder_are_refused_by_their_name(world, rollouts, tmp_path):
    write_rollouts(tmp_path / "own", rollouts[:2])
    data = datasets.load_from_disk(str(tmp_path / "own"))
    datasets.DatasetDict(train=data, test=data).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match="both: neither one rollouts dataset, as save_to_disk"):
        formats.read(tmp_path / "both", world)
    assert_same(formats.read(tmp_path / "both" / "train", world)[0], rollouts[:2])
