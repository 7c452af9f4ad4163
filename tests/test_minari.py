"""Minari: what it records of our worlds we read; what we write it loads, combines, recovers."""

import importlib.util
import json
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from fuzz import store
from test_exports import imaginary
from test_formats import RED_LEFT, assert_same, write, write_as

import env
from data import formats, minari_io

needs_minari = pytest.mark.skipif(
    not importlib.util.find_spec("minari"), reason="minari is not installed"
)


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
def test_what_is_written_loads_combines_filters_splits_and_recovers(
    world, rollouts, tmp_path, monkeypatch
):
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    lost = {
        **rollouts[7],
        **env.rollout_record(
            world,
            env.goal_of(rollouts[7]),
            rollouts[7]["observations"][:2],
            rollouts[7]["actions"][:1],
        ),
    }
    for name, records in (
        ("real", rollouts[:5]),
        ("more", [*rollouts[5:7], lost]),
        ("imagined", imaginary(world, rollouts)),
    ):
        minari_io.write_minari(tmp_path / "kalm" / f"{name}-v0", records, world)
    data = minari.load_dataset("kalm/real-v0")
    assert (
        data.total_episodes == 5
        and data.action_space.n == 40
        and data.observation_space.shape == (10,)
    )
    for episode, r in zip(data, rollouts):
        np.testing.assert_array_equal(episode.infos["state"], r["states"])
        assert (
            episode.terminations.tolist() == [False] * (len(r["actions"]) - 1) + [True]
            and not episode.truncations.any()
        )
    recovered = data.recover_environment()
    assert (
        recovered.spec.id == "KALM/ClevrRobot-v0"
        and recovered.observation_space == data.observation_space
    )
    parts = [minari.load_dataset(f"kalm/{name}-v0") for name in ("real", "more", "imagined")]
    both = minari.combine_datasets(parts, "kalm/all-v0")
    records = formats.read(tmp_path / "kalm" / "all-v0", world)[0]
    assert_same(records, [*rollouts[:7], lost, *imaginary(world, rollouts)])
    assert len(both.filter_episodes(lambda e: e.truncations[-1] and not e.terminations[-1])) == sum(
        not r["success"] for r in records
    )
    assert sum(len(part) for part in minari.split_dataset(data, [2, 3])) == 5


class Record:
    """What minari.DataCollector keeps of an environment's steps; it itself needs jax."""

    def __init__(self, world, goal, actions):
        face = env.WorldEnv(world)
        seen, info = face.reset(seed=1, options={"goal": goal})
        self.observations, self.infos = [seen], {key: [value] for key, value in info.items()}
        self.actions, self.rewards, self.terminations, self.truncations = actions, [], [], []
        for action in actions:
            seen, reward, terminated, truncated, info = face.step(action)
            self.observations.append(seen)
            self.rewards.append(reward)
            self.terminations.append(terminated)
            self.truncations.append(truncated)
            for key, value in info.items():
                self.infos[key].append(value)


@needs_minari
@pytest.mark.parametrize("data_format", ("hdf5", "arrow", "parquet"))
def test_what_minari_records_of_our_environment_is_read_with_goals_that_no_sentence_tells(
    world, tmp_path, data_format
):
    rng = np.random.default_rng(5)
    goals = [g for level in env.NOVEL_LEVELS for g in world.sample_goals(level, "test", 3, rng)]
    episodes = [Record(world, goal, rng.integers(40, size=4).tolist()) for goal in goals]
    records, notes = formats.read(
        store(tmp_path / "d", world, episodes, data_format=data_format), world
    )
    assert [env.goal_of(r) for r in records] == goals and not notes["contradicted"]
    for record, episode in zip(records, episodes):
        np.testing.assert_array_equal(
            record["states"], np.array(episode.infos["state"])[: len(record["states"])]
        )


@needs_minari
def test_minaris_collector_records_our_environment(world, tmp_path, monkeypatch):
    pytest.importorskip("jax")
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collector = minari.DataCollector(gymnasium.make("KALM/ClevrRobot-v0"), record_infos=True)
    for seed in range(3):
        collector.reset(seed=seed)
        for action in (0, 9, 18):
            collector.step(action)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collector.create_dataset("kalm/recorded-v0")
    records, notes = formats.read(tmp_path / "kalm" / "recorded-v0", world)
    assert (
        len(records) == 3
        and all(r["states"] is not None for r in records)
        and not notes["contradicted"]
    )


@needs_minari
def test_a_goal_in_an_episodes_attributes_is_read(world, tmp_path):
    goal = world.sample_goals("hard", "test", 1, np.random.default_rng(0))[0]
    episode = Record(world, goal, [1, 2, 3])
    episode.infos = {}
    path = store(tmp_path / "d", world, [episode])
    record = goal.to_json()
    told = {**record, "goal": record["text"], "relations": json.dumps(record["relations"])}
    minari_io.package().MinariDataset(path / "data").storage.update_episode_metadata([told])
    (read,), _ = formats.read(path, world)
    assert env.goal_of(read) == goal


@needs_minari
def test_an_info_that_is_a_row_short_is_left_out(world, tmp_path):
    episode = Record(world, RED_LEFT, [1, 2, 3])
    episode.infos["state"] = episode.infos["state"][1:]
    (record,), _ = formats.read(store(tmp_path / "d", world, [episode]), world)
    assert record["states"] is None and len(record["actions"]) == 3


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
        (of_dicts, "observations are a Dict, not"),
        (without_goal, "row 0: no text of the goal"),
        (with_two_goals, "row 0: goal changes within the episode"),
    ],
)
def test_a_minari_episode_that_cannot_be_judged_is_refused_in_a_sentence(
    world, tmp_path, change, said
):
    episode = Record(world, RED_LEFT, [1, 2, 3])
    change(episode)
    box = env.WorldEnv(world).observation_space
    space = gymnasium.spaces.Dict(ball=box) if change is of_dicts else box
    with pytest.raises(ValueError, match=said):
        formats.read(store(tmp_path / "d", world, [episode], space), world)


@needs_minari
def test_minari_data_in_other_files_or_too_large_is_refused(world, rollouts, tmp_path):
    import h5py

    secret = write(tmp_path / "secret", np.zeros(1000).tobytes())

    def virtual(episode):
        layout = h5py.VirtualLayout((3, 10), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "observations", (3, 10))
        episode.create_virtual_dataset("observations", layout)

    changes = {
        "external": lambda e: e.create_dataset(
            "observations", (3, 10), "f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)]
        ),
        "linked": lambda e: e.__setitem__(
            "observations", h5py.ExternalLink("other.h5", "observations")
        ),
        "soft": lambda e: e.__setitem__("observations", h5py.SoftLink("/episode_1/observations")),
        "virtual": virtual,
        "huge": lambda e: e.create_dataset("observations", (2**40, 10), "f4", chunks=(1024, 10)),
    }
    for name, change in changes.items():
        path = write_as("minari", tmp_path / name, rollouts[:3], world)
        with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
            del file["episode_2/observations"]
            change(file["episode_2"])
        with pytest.raises(
            ValueError, match="episode_2/observations (is a link to|lies in another|is larger than)"
        ):
            formats.read(path, world)


@needs_minari
@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"total_episodes": "3", "data_format": "hdf5"}', "[" * 10**5]
)
def test_a_folder_whose_metadata_are_not_minaris_is_refused(world, tmp_path, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match="metadata.json"):
        formats.read(tmp_path, world)


@needs_minari
def test_an_environment_that_metadata_name_is_not_made(world, rollouts, tmp_path):
    path = write_as("minari", tmp_path, rollouts[:3], world) / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["observation_space"]  # Minari would then import and call the entry point
    metadata["env_spec"] = metadata["env_spec"].replace("env:WorldEnv", "test_formats:boom")
    path.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="has no 'observation_space'; refused"):
        formats.read(path.parent.parent, world)
