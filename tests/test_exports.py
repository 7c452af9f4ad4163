"""What is written for others reads back; a run takes recordings and gives exports."""

import shutil

import numpy as np
import pytest
from fuzz import authors_layout, npy, npz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats import FORMATS, assert_same, damage, goes_on, write, write_as

import env
import kalm
from data import formats, recordings
from data.rollouts import read_rollouts


def test_a_folder_counts_by_the_names_and_content_of_its_files(tmp_path):
    write(tmp_path / "a", b"1"), write(tmp_path / "b", b"2")
    before = formats.content_hash(tmp_path)
    assert formats.content_hash(tmp_path) == before
    (tmp_path / "b").rename(tmp_path / "c")
    renamed = formats.content_hash(tmp_path)
    write(tmp_path / "c", b"3")
    assert len({before, renamed, formats.content_hash(tmp_path)}) == 3


def imaginary(world, rollouts):
    """Imagined records of every kind, with what the model says of them."""
    rng, records = np.random.default_rng(3), []
    goals = [g for level in env.NOVEL_LEVELS for g in world.sample_goals(level, "test", 8, rng)]
    for goal, r in zip(goals, rollouts):
        seen = (r["observations"] + rng.normal(0, 0.05, r["observations"].shape)).astype(np.float32)
        whole = {**goal.to_json(), "goal": goal.text, "observations": seen, "actions": r["actions"]}
        whole |= {
            "explanation": 'The rød ball, "1" \u2028.',
            "dynamics_error": rng.random(len(r["actions"])),
        }
        records.append(formats.judged(whole, world)[0])
    return records


@pytest.mark.parametrize("data_format", FORMATS)
def test_every_export_keeps_states_and_imagined_rollouts_with_goal_and_explanation(
    world, rollouts, tmp_path, data_format
):
    mixed = [rollouts[0], {**rollouts[1], "states": None}]
    for name, records in (
        ("real", rollouts[:20]),
        ("imagined", imaginary(world, rollouts)),
        ("mixed", mixed),
    ):
        read, notes = formats.read(write_as(data_format, tmp_path / name, records, world), world)
        assert_same(read, records)
        assert not notes and not list((tmp_path / name).glob("*.partial"))


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32),
    level=st.sampled_from(env.LEVELS),
    steps=st.integers(1, 12),
    more=st.integers(0, 4),
)
def test_an_episode_exported_and_read_back_is_the_same_up_to_its_first_success(
    world, tmp_path_factory, seed, level, steps, more
):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("cut")
    (goal,) = world.sample_goals(level, "train" if level == "offline" else "test", 1, rng)
    encoded, start = world.encode_goals([goal]), env.unfulfilled_states(world, rng, [goal])
    is_relation = level in ("offline", "rephrase")
    play = lambda obs, _: (
        world.expert_actions(encoded, obs)
        if is_relation
        else rng.integers(world.num_actions, size=1)
    )
    (whole,) = env.run_episodes(world, play, [goal], start, steps)
    long = goes_on(world, whole, rng.integers(world.num_actions, size=more))
    length = 1  # an oracle in plain steps: the first transition that succeeds is the last
    pairs = list(zip(long["observations"], long["observations"][1:], long["actions"]))
    while (
        length < len(pairs)
        and not world.success(encoded, *(part[None] for part in pairs[length - 1]))[0]
    ):
        length += 1
    cut = env.rollout_record(
        world,
        goal,
        long["observations"][: length + 1],
        long["actions"][:length],
        long["states"][: length + 1],
    )
    for data_format in FORMATS:
        first = formats.read(write_as(data_format, folder / "long", [long], world), world)[0]
        again = formats.read(write_as(data_format, folder / "cut", first, world), world)[0]
        assert_same(first, [cut])
        assert_same(again, [cut])
    with np.load(folder / "cut" / "npz-v0.npz") as file:
        assert file["terminals"][0].tolist() == [False] * (length - 1) + [cut["success"]]


def test_npz_is_plain_arrays_with_the_encoding_behind_the_observations(rollouts, tmp_path):
    recordings.write_npz(
        tmp_path / "a.npz", rollouts[:4], lambda texts: [[len(t), 7] for t in texts]
    )
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file["observations"].shape == (4, file["masks"].shape[1], 12)
        assert file["instructions"].tolist() == [r["goal"] for r in rollouts[:4]]
        for row, r in enumerate(rollouts[:4]):
            n = len(r["actions"])
            np.testing.assert_array_equal(
                file["observations"][row, :n, :10], r["observations"][:-1]
            )
            assert (file["observations"][row, :, 10:] == [len(r["goal"]), 7]).all() and file[
                "masks"
            ][row].sum() == n


# ----------------------------------------------------------------------------------------------
# --data, --export


def collect(run, world, *arguments):
    assert (
        kalm.main(
            [
                "--scale",
                "smoke",
                "--stage",
                "collect",
                "--output_dir",
                str(run),
                *map(str, arguments),
            ]
        )
        == 0
    )
    return read_rollouts(run / "rollouts" / "real", world)


def test_data_takes_the_place_of_the_expert_and_counts_by_its_content(
    world, rollouts, tmp_path, capsys
):
    recorded = authors_layout(rollouts[:12], 20)
    path = write(tmp_path / "a.npy", npy(recorded))
    records = collect(tmp_path / "run", world, "--data", path)
    np.testing.assert_array_equal(records[5]["observations"], rollouts[5]["observations"])
    assert len(records) == 12 and "12 of 12 rollouts" in capsys.readouterr().out
    other = write(tmp_path / "b.npy", path.read_bytes())
    collect(tmp_path / "run", world, "--data", other)
    assert "collect took" not in capsys.readouterr().out
    write(other, npy({k: v[:7] for k, v in recorded.items() if k != "num_trajectories"}))
    assert len(collect(tmp_path / "run", world, "--data", other)) == 7


def test_a_wrong_recording_is_said_in_one_line(rollouts, tmp_path, capsys):
    path = write(
        tmp_path / "bad.npz", npz(damage(authors_layout(rollouts[:12], 20), "actions", 40))
    )
    assert (
        kalm.main(["--scale", "smoke", "--output_dir", str(tmp_path / "run"), "--data", str(path)])
        == 2
    )
    err = capsys.readouterr().err.strip()
    assert err.startswith("kalm: ") and f"{path}, row 2: actions" in err and "\n" not in err


@pytest.mark.parametrize("data_format", FORMATS)
def test_exported_rollouts_are_data_for_another_run(world, rollouts, tmp_path, data_format):
    path = write_as(data_format, tmp_path, rollouts[:8], world)
    assert_same(collect(tmp_path / "run", world, "--data", path), rollouts[:8], skip=("states",))


def test_export_writes_every_rollout_of_a_run_with_its_goal_text_and_encoding(
    world, smoke_run, tmp_path
):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    assert kalm.main(["--scale", "smoke", "--output_dir", str(run), "--export", "npz"]) == 0
    assert {p.name for p in (run / "export").iterdir()} == {
        "real.npz",
        "rephrase.npz",
        "easy.npz",
        "hard.npz",
    }
    for path in (run / "export").iterdir():
        assert_same(
            formats.read(path, world)[0], formats.read(run / "rollouts" / path.stem, world)[0]
        )
        with np.load(path) as file:
            assert np.ptp(
                file["observations"][:, 0, 10:], -1
            ).all()  # the encodings that the policies see
    assert formats.read(run / "export" / "real.npz", world)[0][0]["states"] is not None
