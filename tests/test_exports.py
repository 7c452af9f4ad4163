"""What is written for others reads back; a run takes recordings and gives exports."""

import shutil

import numpy as np
import pytest
from fuzz import authors_layout, npy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats import FORMATS, assert_same, goes_on, write, write_as

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
        noise = rng.normal(0, 0.05, r["observations"].shape)
        told = {**goal.to_json(), "goal": goal.text, "explanation": 'The rød ball, "1" \u2028.'}
        told["observations"] = (r["observations"] + noise).astype(np.float32)
        told["dynamics_error"] = rng.random(len(r["actions"])).astype(np.float32)
        records.append(formats.judged({**told, "actions": r["actions"]}, world)[0])
    return records


@pytest.mark.parametrize("data_format", FORMATS)
def test_every_export_keeps_states_and_imagined_rollouts_with_goal_and_explanation(
    world, rollouts, tmp_path, data_format
):
    for name, records in (("real", rollouts[:20]), ("imagined", imaginary(world, rollouts))):
        read, notes = formats.read(write_as(data_format, tmp_path / name, records, world), world)
        assert_same(read, records)
        assert not notes and not list((tmp_path / name).glob("*.partial"))


LEVELS = st.sampled_from(env.LEVELS)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), level=LEVELS, steps=st.integers(1, 12), more=st.integers(0, 4))
def test_an_episode_exported_and_read_back_is_the_same_up_to_its_first_success(
    world, tmp_path_factory, seed, level, steps, more
):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("cut")
    (goal,) = world.sample_goals(level, "train" if level == "offline" else "test", 1, rng)
    encoded, start = world.encode_goals([goal]), env.unfulfilled_states(world, rng, [goal])

    def play(obs, rows):
        if level in ("offline", "rephrase"):
            return world.expert_actions(encoded, obs)
        return rng.integers(world.num_actions, size=1)

    (whole,) = env.run_episodes(world, play, [goal], start, steps)
    long = goes_on(world, whole, rng.integers(world.num_actions, size=more))
    seen, actions, length = long["observations"], long["actions"], 0
    met = False  # an oracle in plain steps: the first transition that succeeds is the last
    while length < len(actions) and not met:
        step = slice(length, length + 1)
        met = world.success(encoded, seen[step], seen[1:][step], actions[step])[0]
        length += 1
    states = long["states"][: length + 1]
    cut = env.rollout_record(world, goal, seen[: length + 1], actions[:length], states)
    for data_format in FORMATS:
        first = formats.read(write_as(data_format, folder / "long", [long], world), world)[0]
        again = formats.read(write_as(data_format, folder / "cut", first, world), world)[0]
        assert_same(first, [cut])
        assert_same(again, [cut])
    with np.load(folder / "cut" / "npz-v0.npz") as file:
        assert file["terminals"][0].tolist() == [False] * (length - 1) + [cut["success"]]


def test_npz_is_plain_arrays_with_the_encoding_behind_the_observations(rollouts, tmp_path):
    path = tmp_path / "a.npz"
    recordings.write_npz(path, rollouts[:4], lambda texts: [[len(t), 7] for t in texts])
    with np.load(path, allow_pickle=False) as file:
        assert file["observations"].shape == (4, file["masks"].shape[1], 12)
        assert file["instructions"].tolist() == [r["goal"] for r in rollouts[:4]]
        for seen, mask, r in zip(file["observations"], file["masks"], rollouts):
            n = len(r["actions"])
            np.testing.assert_array_equal(seen[:n, :10], r["observations"][:-1])
            assert (seen[:, 10:] == [len(r["goal"]), 7]).all() and mask.sum() == n


def collect(run, world, path):
    stage = ("--scale", "smoke", "--stage", "collect", "--output_dir", str(run))
    assert kalm.main([*stage, "--data", str(path)]) == 0
    return read_rollouts(run / "rollouts" / "real", world)


def test_data_takes_the_place_of_the_expert_and_counts_by_its_content(
    world, rollouts, tmp_path, capsys
):
    recorded = authors_layout(rollouts[:12], 20)
    path = write(tmp_path / "a.npy", npy(recorded))
    records = collect(tmp_path / "run", world, path)
    np.testing.assert_array_equal(records[5]["observations"], rollouts[5]["observations"])
    assert len(records) == 12 and "12 of 12 rollouts" in capsys.readouterr().out
    other = write(tmp_path / "b.npy", path.read_bytes())
    collect(tmp_path / "run", world, other)
    assert "collect took" not in capsys.readouterr().out
    write(other, npy({k: v[:7] for k, v in recorded.items() if k != "num_trajectories"}))
    assert len(collect(tmp_path / "run", world, other)) == 7


@pytest.mark.parametrize("data_format", FORMATS)
def test_exported_rollouts_are_data_for_another_run(world, rollouts, tmp_path, data_format):
    path = write_as(data_format, tmp_path, rollouts[:8], world)
    assert_same(collect(tmp_path / "run", world, path), rollouts[:8], skip=("states",))


def test_export_writes_every_rollout_of_a_run_with_its_goal_text_and_encoding(
    world, smoke_run, tmp_path
):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    assert kalm.main(["--scale", "smoke", "--output_dir", str(run), "--export", "npz"]) == 0
    paths = {path.stem: path for path in (run / "export").iterdir()}
    assert paths.keys() == {"real", "rephrase", "easy", "hard"}
    for name, path in paths.items():
        records = formats.read(path, world)[0]
        assert_same(records, formats.read(run / "rollouts" / name, world)[0])
        assert name != "real" or records[0]["states"] is not None
        with np.load(path) as file:
            assert np.ptp(file["observations"][:, 0, 10:], -1).all()  # what policies see
