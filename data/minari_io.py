"""Minari datasets (HDF5, Arrow, Parquet), read and written by the optional package `minari`.

Goals lie in infos, as `minari.DataCollector` records those of `env.WorldEnv` with
record_infos=True: so they survive combining and filtering. This file judges nothing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.feather
from gymnasium.envs.registration import EnvSpec

import env
from data import recordings, rollouts
from experiment import folder


def package():  # noqa: ANN201 - minari is optional
    """The module minari. Raises ValueError that says how to get it."""
    try:
        import minari
    except ImportError:
        raise ValueError('no package Minari; `pip install "minari[hdf5,arrow]"`') from None
    return minari


def recordings_of(path: Path) -> Iterator[dict]:
    """Episodes of a dataset folder as recordings (`formats.judged`). Raises ValueError."""
    data = path / "data" if (path / "data").is_dir() else path
    if not (data / "metadata.json").is_file():
        raise ValueError(
            "neither one rollouts dataset, as save_to_disk writes it, nor a Minari dataset, which "
            "has metadata.json"
        )
    MinariStorage = package().dataset.minari_storage.MinariStorage
    metadata = MinariStorage.read_raw_metadata(data)
    if not {"observation_space", "action_space"} <= metadata.keys():
        raise ValueError(
            "metadata.json has no spaces, and the environment that it names is not made"
        )
    if metadata["data_format"] == "hdf5":
        recordings.open_hdf5(data / "main_data.hdf5").close()
    for file in data.glob("*/*.arrow"):  # a damaged one can end the process
        pyarrow.feather.read_table(file).validate(full=True)
    storage = MinariStorage.read(data)
    rows = range(storage.total_episodes)
    return map(_recording, storage.get_episodes(rows), storage.get_episode_metadata(rows))


def _recording(episode, attributes):
    """An episode: its goal is told in its infos, one value a step, or in its attributes."""
    infos = {name: [value] for name, value in attributes.items()}
    infos.update(episode["infos"] or {})
    recording = {name: episode[name] for name in ("observations", "actions", "rewards")}
    recording |= {"terminals": episode["terminations"], "states": infos.get("state")}
    if "dynamics_error" in infos:
        recording["dynamics_error"] = np.asarray(infos["dynamics_error"], np.float32)[1:]
    for name in recordings.TEXTS.values():
        texts = {recordings.text_of(name, value) for value in infos.get(name, [])}
        if len(texts) > 1:
            raise ValueError(f"{name} changes within the episode; record one goal an episode")
        recording.update((name, text) for text in texts)
    return recording


def write_minari(path: Path, records: Sequence[dict], world: env.World) -> None:
    """Records as a Minari dataset folder (HDF5) whose name ends in -v0.

    Minari finds it as FOLDER/NAME-v0 below $MINARI_DATASETS_PATH, and recovers the environment.
    """
    minari = package()
    face = env.WorldEnv(world)
    spec = EnvSpec(f"KALM/{type(world).__name__}-v0", "env:WorldEnv", kwargs={"world": world.name})
    name = f"{path.parent.name}/{path.name}"
    with folder.replacing(path) as aside:
        aside.mkdir()
        storage = minari.dataset.minari_storage.MinariStorage.new(
            aside / "data", face.observation_space, face.action_space, spec, "hdf5"
        )
        episodes = map(_episode, records)
        storage.update_episodes(minari.data_collector.EpisodeBuffer(**e) for e in episodes)
        storage.update_metadata({"dataset_id": name, "minari_version": minari.__version__})


def _episode(record):
    """The fields of a Minari episode. It terminates with success, or is truncated."""
    steps = len(record["actions"])
    infos = {name: [text] * (steps + 1) for name, text in recordings.texts_of(record).items()}
    if record.get("states") is not None:
        infos["state"] = record["states"]
    if record.get("dynamics_error") is not None:
        infos["dynamics_error"] = [np.nan, *record["dynamics_error"].tolist()]
    episode = {name: record[name] for name in ("observations", "actions", "rewards")}
    episode["terminations"] = rollouts.terminals_of(record)
    episode["truncations"] = np.zeros(steps, bool)
    episode["truncations"][-1] = not record["success"]
    return {**episode, "infos": infos}
