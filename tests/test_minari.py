"""Minari: what it records of our worlds we read; what we write it loads, combines, recovers."""

import json
import sys
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from fuzz import store
from test_exports import imaginary
from test_formats import RED_LEFT, assert_same, needs_minari, write, write_as

import env
from data import formats, minari_io


def test_without_minari_one_sentence_says_what_to_install(world, rollouts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    write(tmp_path / "metadata.json", b"{}")
    for use in (
        lambda: minari_io.write_minari(tmp_path / "a-v0", rollouts, world),
        lambda: formats.read(tmp_path, world),
    ):
        with pytest.raises(ValueError, match=r'pip install "minari\[hdf5,arrow\]"'):
            use()


@needs_minari
def test_what_is_written_loads_combines_filters_and_recovers(
    world, rollouts, tmp_path, monkeypatch
):
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    seen, actions = rollouts[7]["observations"][:2], rollouts[7]["actions"][:1]
    lost = env.rollout_record(world, env.goal_of(rollouts[7]), seen, actions)
    sources = {"real": [*rollouts[:5], lost], "imagined": imaginary(world, rollouts)}
    for name, records in sources.items():
        minari_io.write_minari(tmp_path / "kalm" / f"{name}-v0", records, world)
    parts = [minari.load_dataset(f"kalm/{name}-v0") for name in sources]
    for episode, r in zip(parts[0], rollouts[:5]):
        np.testing.assert_array_equal(episode.infos["state"], r["states"])
        assert episode.terminations.tolist() == [False] * (len(r["actions"]) - 1) + [True]
        assert not episode.truncations.any()
    recovered = parts[0].recover_environment()
    assert recovered.spec.id == "KALM/ClevrRobot-v0"
    assert recovered.observation_space == parts[0].observation_space
    both = minari.combine_datasets(parts, "kalm/all-v0")
    records = formats.read(tmp_path / "kalm" / "all-v0", world)[0]
    assert_same(records, [*sources["real"], *sources["imagined"]])
    failed = both.filter_episodes(lambda e: e.truncations[-1] and not e.terminations[-1])
    assert len(failed) == sum(not r["success"] for r in records)


def played(world, goal, actions):
    """What minari.DataCollector keeps of an environment's steps; it itself needs jax."""
    face = env.WorldEnv(world)
    seen, info = face.reset(seed=1, options={"goal": goal})
    steps = [(seen, None, None, None, info), *map(face.step, actions)]
    observations, rewards, terminations, truncations, infos = zip(*steps)
    return SimpleNamespace(
        observations=list(observations),
        actions=actions,
        rewards=list(rewards[1:]),
        terminations=list(terminations[1:]),
        truncations=list(truncations[1:]),
        infos={key: [one[key] for one in infos] for key in info},
    )


@needs_minari
@pytest.mark.parametrize("data_format", ("hdf5", "arrow", "parquet"))
def test_what_minari_records_of_our_environment_is_read_with_goals_that_no_sentence_tells(
    world, tmp_path, data_format
):
    rng = np.random.default_rng(5)
    goals = [g for level in env.NOVEL_LEVELS for g in world.sample_goals(level, "test", 3, rng)]
    episodes = [played(world, goal, rng.integers(40, size=4).tolist()) for goal in goals]
    path = store(tmp_path / "d", world, episodes, data_format=data_format)
    records, notes = formats.read(path, world)
    assert [env.goal_of(r) for r in records] == goals and not notes["contradicted"]
    for record, episode in zip(records, episodes):
        states = np.array(episode.infos["state"])[: len(record["states"])]
        np.testing.assert_array_equal(record["states"], states)


@needs_minari
def test_a_goal_in_an_episodes_attributes_is_read_and_a_short_info_left_out(world, tmp_path):
    goal = world.sample_goals("hard", "test", 1, np.random.default_rng(0))[0]
    episode = played(world, goal, [1, 2, 3])
    episode.infos = {"state": episode.infos["state"][1:]}
    path = store(tmp_path / "d", world, [episode])
    told = goal.to_json()
    told |= {"goal": told["text"], "relations": json.dumps(told["relations"])}
    minari_io.package().MinariDataset(path / "data").storage.update_episode_metadata([told])
    (record,), _ = formats.read(path, world)
    assert env.goal_of(record) == goal and record["states"] is None


def of_dicts(episode):
    episode.observations = {"ball": np.array(episode.observations)}


def without_goal(episode):
    del episode.infos["goal"]


def with_two_goals(episode):
    episode.infos["goal"][-1] = "Blue left of red"


@needs_minari
@pytest.mark.parametrize(
    "change, said",
    [
        (of_dicts, "row 0: observations must be an array"),
        (without_goal, "row 0: no text of the goal"),
        (with_two_goals, "row 0: goal changes within the episode"),
    ],
)
def test_an_episode_that_cannot_be_judged_is_refused(world, tmp_path, change, said):
    episode = played(world, RED_LEFT, [1, 2, 3])
    change(episode)
    box = env.WorldEnv(world).observation_space
    space = gymnasium.spaces.Dict(ball=box) if change is of_dicts else box
    with pytest.raises(ValueError, match=said):
        formats.read(store(tmp_path / "d", world, [episode], space), world)


def virtual(h5py, episode):
    layout = h5py.VirtualLayout((3, 10), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "observations", (3, 10))
    episode.create_virtual_dataset("observations", layout)


def external(h5py, episode):
    places = [("secret", 0, h5py.h5f.UNLIMITED)]
    episode.create_dataset("observations", (3, 10), "f4", external=places)


ELSEWHERE = {
    "external": external,
    "virtual": virtual,
    "linked": lambda h5py, e: e.__setitem__("observations", h5py.ExternalLink("other.h5", "a")),
    "soft": lambda h5py, e: e.__setitem__("observations", h5py.SoftLink("/episode_1/rewards")),
    "huge": lambda h5py, e: e.create_dataset("observations", (2**40, 10), "f4", chunks=(1024, 10)),
}


@needs_minari
@pytest.mark.parametrize("name", ELSEWHERE)
def test_data_in_other_files_or_too_large_is_refused(world, rollouts, tmp_path, name):
    import h5py

    path = write_as("minari", tmp_path, rollouts[:3], world)
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        del file["episode_2/observations"]
        ELSEWHERE[name](h5py, file["episode_2"])
    with pytest.raises(ValueError, match="episode_2/observations is a link|arrays take"):
        formats.read(path, world)


@needs_minari
def test_metadata_that_are_not_minaris_are_refused_and_no_environment_made(
    world, rollouts, tmp_path
):
    path = write_as("minari", tmp_path, rollouts[:3], world) / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["observation_space"]  # Minari would then import and call the entry point
    metadata["env_spec"] = metadata["env_spec"].replace("env:WorldEnv", "test_formats:boom")
    for content in ("", "[]", "{}", '{"data_format": "hdf5"}', "[" * 10**5, json.dumps(metadata)):
        path.write_text(content)
        with pytest.raises(ValueError, match="minari-v0: "):
            formats.read(path.parent.parent, world)
    with pytest.raises(ValueError, match="no spaces, and the environment .* is not made"):
        formats.read(path.parent.parent, world)
