"""Minari: what it records of our worlds we read; what we write it loads, combines, recovers."""

import json
import sys
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from conftest import rollout_record
from fuzz import store
from test_formats import HAS_MINARI, RED_LEFT, assert_same, write, write_as

import env
from data import formats, minari_io

pytestmark = pytest.mark.skipif(not HAS_MINARI, reason="minari is not installed")


def test_without_minari_one_sentence_says_what_to_install(world, rollouts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    write(tmp_path / "metadata.json", b"{}")
    with pytest.raises(ValueError, match=r'pip install "minari\[hdf5,arrow\]"'):
        formats.read(tmp_path, world)


def test_without_h5py_one_sentence_says_what_to_install(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    path = write(tmp_path / "a.hdf5", b"")
    with pytest.raises(ValueError, match=r'a.hdf5: .*h5py.*pip install "minari\[hdf5,arrow\]"'):
        formats.read(path, world)


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


def test_what_is_written_combines_filters_and_recovers(world, rollouts, tmp_path, monkeypatch):
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    seen, actions = rollouts[7]["observations"][:2], rollouts[7]["actions"][:1]
    lost = rollout_record(world, env.goal_of(rollouts[7]), seen, actions)
    sources = {"real": [*rollouts[:5], lost], "imagined": imaginary(world, rollouts)}
    for name, records in sources.items():
        minari_io.write_minari(tmp_path / "kalm" / f"{name}-v0", records, world)
    parts = [minari.load_dataset(f"kalm/{name}-v0") for name in sources]
    for episode, r in zip(parts[0], rollouts[:5]):
        np.testing.assert_array_equal(episode.infos["state"], r["states"])
        assert episode.terminations.nonzero()[0] == [len(r["actions"]) - 1]
    for episode, r in zip(parts[1], sources["imagined"]):
        ends = [[*column] for column in (episode.terminations, episode.truncations)]
        unfinished = [False] * (len(r["actions"]) - 1)  # and a limit of time is no terminal
        assert ends == [[*unfinished, r["success"]], [*unfinished, not r["success"]]]
    assert parts[0].recover_environment().observation_space == parts[0].observation_space
    both = minari.combine_datasets(parts, "kalm/all-v0")
    records = formats.read(tmp_path / "kalm" / "all-v0", world)[0]
    assert_same(records, [*sources["real"], *sources["imagined"]])
    failed = both.filter_episodes(lambda e: e.truncations[-1] and not e.terminations[-1])
    assert len(failed) == sum(not r["success"] for r in records)


def played(world, goal, actions):
    """What minari.DataCollector keeps of an environment's steps; it itself needs jax."""
    face = env.WorldEnv(world)
    start = face.reset(seed=1, options={"goal": goal})
    steps = [(start[0], None, None, None, start[1]), *map(face.step, actions)]
    observations, rewards, terminations, truncations, infos = map(list, zip(*steps))
    episode = SimpleNamespace(observations=observations, actions=actions, rewards=rewards[1:])
    episode.terminations, episode.truncations = terminations[1:], truncations[1:]
    episode.infos = {key: [info[key] for info in infos] for key in infos[0]}
    return episode


@pytest.mark.parametrize("data_format", ("hdf5", "arrow", "parquet"))
def test_what_minari_records_is_read_with_goals_that_no_sentence_tells(
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


@pytest.mark.parametrize("data_format", ("hdf5", "arrow", "parquet"))
def test_what_its_collector_records_is_read(world, tmp_path, monkeypatch, data_format):
    pytest.importorskip("jax", reason="minari.DataCollector needs jax")
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng, goals = np.random.default_rng(4), []
    face = gymnasium.make("KALM/ClevrRobot-v0")
    face = minari.DataCollector(face, record_infos=True, data_format=data_format)
    for level in env.NOVEL_LEVELS:
        goals += world.sample_goals(level, "test", 3, rng)
    for goal in goals:
        record = {**goal.to_json(), "relations": json.dumps(goal.to_json()["relations"])}
        face.reset(options={"goal": record.pop("text"), **record})
        is_over = False
        for action in rng.integers(40, size=5):
            is_over = is_over or any(face.step(int(action))[2:4])
    face.create_dataset("kalm/mine-v0")
    records, notes = formats.read(tmp_path / "kalm" / "mine-v0", world)
    assert [env.goal_of(r) for r in records] == goals and not notes["contradicted"]


def test_a_goal_in_attributes_is_read_and_a_short_info_left_out(world, tmp_path):
    goal = world.sample_goals("hard", "test", 1, np.random.default_rng(0))[0]
    episode = played(world, goal, [1, 2, 3])
    attributes = {name: episode.infos[name][0] for name in ("goal", "level", "kind", "relations")}
    episode.infos = {"state": episode.infos["state"][1:]}
    path = store(tmp_path / "d", world, [episode])
    data = minari_io.package().MinariDataset(path / "data")
    data.storage.update_episode_metadata([attributes])
    (record,), _ = formats.read(path, world)
    assert env.goal_of(record) == goal and record["states"] is None


@pytest.mark.parametrize("said", ("observations must be", "no text of the goal", "goal changes"))
def test_an_episode_that_cannot_be_judged_is_refused(world, tmp_path, said):
    episode, space = played(world, RED_LEFT, [1, 2, 3]), None
    if said == "observations must be":
        episode.observations = {"ball": np.array(episode.observations)}
        space = gymnasium.spaces.Dict(ball=env.WorldEnv(world).observation_space)
    elif said == "goal changes":
        episode.infos["goal"][-1] = "Blue left of red"
    else:
        del episode.infos["goal"]
    with pytest.raises(ValueError, match=f"row 0: {said}"):
        formats.read(store(tmp_path / "d", world, [episode], space), world)


@pytest.mark.parametrize("kind", ("external", "virtual", "linked", "soft", "huge"))
def test_data_in_other_files_or_too_large_is_refused(world, rollouts, tmp_path, kind):
    import h5py

    path, name = write_as("minari", tmp_path, rollouts[:3], world), "observations"
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        episode = file["episode_2"]
        del episode[name]
        if kind == "external":
            places = [("secret", 0, h5py.h5f.UNLIMITED)]
            episode.create_dataset(name, (3, 10), "f4", external=places)
        elif kind == "virtual":
            layout = h5py.VirtualLayout((3, 10), "f4")
            layout[:] = h5py.VirtualSource("other.h5", name, (3, 10))
            episode.create_virtual_dataset(name, layout)
        elif kind == "huge":
            episode.create_dataset(name, (2**40, 10), "f4", chunks=(1024, 10))
        else:
            soft = h5py.SoftLink("/episode_1/observations")
            episode[name] = h5py.ExternalLink("other.h5", "a") if kind == "linked" else soft
    with pytest.raises(ValueError, match="episode_2/observations is a link|arrays take"):
        formats.read(path, world)


def test_other_metadata_are_refused_and_no_environment_made(world, rollouts, tmp_path):
    path = write_as("minari", tmp_path, rollouts[:3], world) / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["observation_space"]  # Minari would then import and call the entry point
    metadata["env_spec"] = metadata["env_spec"].replace("env:WorldEnv", "test_formats:boom")
    for content in ("", "[]", '{"data_format": "hdf5"}', "[" * 10**5, json.dumps(metadata)):
        path.write_text(content)
        with pytest.raises(ValueError, match="minari-v0: ") as refused:
            formats.read(path.parent.parent, world)
    assert "no spaces, and the environment that it names is not made" in str(refused.value)
