"""What is written for others reads back; a run takes recordings and gives exports."""

import shutil

import numpy as np
from conftest import rollout_record
from fuzz import authors_layout, npy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats import FORMATS, assert_same, goes_on, write, write_as

import env
import kalm
from data import formats, recordings
from data.rollouts import read_rollouts


def test_a_folder_counts_by_the_names_and_content_of_its_files(tmp_path):
    hashes = [formats.content_hash(write(tmp_path / "a", b"1").parent)]
    hashes.append(formats.content_hash((tmp_path / "a").rename(tmp_path / "b").parent))
    hashes.append(formats.content_hash(write(tmp_path / "b", b"2").parent))
    assert len(set(hashes)) == 3 and formats.content_hash(tmp_path) == hashes[2]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), st.sampled_from(env.LEVELS), st.integers(1, 12), st.integers(0, 4))
def test_exports_read_back_up_to_the_goal(world, tmp_path_factory, seed, level, steps, more):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("cut")
    (goal,) = world.sample_goals(level, "train" if level == "offline" else "test", 1, rng)
    encoded, start = world.encode_goals([goal]), env.unfulfilled_states(world, rng, [goal])
    play = lambda obs, rows: rng.integers(world.num_actions, size=1)
    if level in ("offline", "rephrase"):
        play = lambda obs, rows: world.expert_actions(encoded, obs)
    (whole,) = env.run_episodes(world, play, [goal], start, steps)
    long = goes_on(world, whole, rng.integers(world.num_actions, size=more))
    seen, actions, end = long["observations"], long["actions"], 1
    met = lambda t: world.success(encoded, seen[t : t + 1], seen[t + 1 : t + 2], actions[t : t + 1])
    while end < len(actions) and not met(end - 1)[0]:
        end += 1  # an oracle in plain steps: the first transition that succeeds is the last
    cut = rollout_record(world, goal, seen[: end + 1], actions[:end], long["states"][: end + 1])
    for data_format in FORMATS:
        first = formats.read(write_as(data_format, folder / "long", [long], world), world)[0]
        again = formats.read(write_as(data_format, folder / "cut", first, world), world)[0]
        assert_same(first, [cut])
        assert_same(again, [cut])
    with np.load(folder / "cut" / "npz-v0.npz") as file:
        assert file["terminals"][0].tolist() == [False] * (end - 1) + [cut["success"]]


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


def test_data_counts_by_its_content(world, rollouts, tmp_path, capsys):
    recorded = authors_layout(rollouts[:12], 20)
    del recorded["num_trajectories"]
    command = ["--scale", "smoke", "--stage", "collect", "--output_dir", str(tmp_path / "run")]
    for name, count in (("a.npy", 12), ("b.npy", 12), ("b.npy", 7)):
        path = write(tmp_path / name, npy({k: v[:count] for k, v in recorded.items()}))
        assert kalm.main([*command, "--data", str(path)]) == 0
        records = read_rollouts(tmp_path / "run" / "rollouts" / "real", world)
        assert_same(records, rollouts[:count], skip=("goal", "states"))
        is_same_data = name == "b.npy" and count == 12
        assert ("collect took" in capsys.readouterr().out) != is_same_data


def test_export_writes_every_rollout_with_its_encoding(world, smoke_run, tmp_path):
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
    shutil.rmtree(run / "export")
    assert kalm.main(["--scale", "smoke", "--output_dir", str(run), "--export", "npz"]) == 0
    assert all(path.is_file() for path in paths.values())
