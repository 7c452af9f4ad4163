"""Minari datasets (HDF5, Arrow, Parquet), read and written by the optional package `minari`.

What is told of an episode lies in its infos, one value a step, as `minari.DataCollector` records
those of `env.WorldEnv` with record_infos=True: so it survives combining and filtering.
This file judges nothing.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import gymnasium
import numpy as np
import pyarrow.feather
from gymnasium.envs.registration import EnvSpec

import env
from data import recordings, rollouts
from data.recordings import Refused
from experiment import folder

TEXTS = ("goal", "level", "kind", "relations", "explanation")


def package():  # noqa: ANN201 - minari is optional
    """The module minari. Raises ValueError that says how to get it."""
    try:
        import minari
    except ImportError:
        raise Refused(
            "Minari datasets need an optional package, which is not installed; "
            '`pip install "minari[hdf5,arrow]"`'
        ) from None
    return minari


def recordings_of(path: Path) -> Iterator[dict]:
    """Episodes of a dataset folder as recordings (`formats.judged`). Raises ValueError."""
    data = path / "data" if (path / "data").is_dir() else path
    if not (data / "metadata.json").is_file():
        raise Refused("neither state.json of a rollouts dataset nor metadata.json of a Minari one")
    Storage = package().dataset.minari_storage.MinariStorage
    try:
        metadata = Storage.read_raw_metadata(data)
        for space in ("observation_space", "action_space"):
            if space not in metadata:  # Minari would make the environment that the file names
                raise Refused(f"metadata.json has no {space!r}; refused")
        if metadata["data_format"] == "hdf5":
            recordings.open_hdf5(data / "main_data.hdf5").close()
        elif metadata["data_format"] == "arrow":
            for file in data.glob("*/*.arrow"):  # a damaged one can end the process
                pyarrow.feather.read_table(file).validate(full=True)
        storage = Storage.read(data)
        rows = range(storage.total_episodes)
    except Refused:
        raise
    except Exception as error:  # what Minari meets in a damaged folder
        raise Refused(f"metadata.json or data are not Minari's ({_words(error)})") from None
    if not isinstance(storage.observation_space, gymnasium.spaces.Box):
        kind = type(storage.observation_space).__name__
        raise Refused(
            f"observations are a {kind}, not the array of numbers that the world gives; record "
            "them without wrappers, or with gymnasium.wrappers.FlattenObservation"
        )
    return _recordings(storage, rows)


def _recordings(storage, rows):
    try:
        for episode, told in zip(storage.get_episodes(rows), storage.get_episode_metadata(rows)):
            yield _recording(episode, told)
    except Refused:
        raise
    except Exception as error:  # what h5py and Arrow meet in a damaged file
        raise Refused(f"the episode is damaged or missing ({_words(error)})") from None


def _words(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def _recording(episode, told):
    """An episode: what is told of it is in its infos, one value a step, or in its attributes."""
    infos = episode["infos"] or {}
    texts = {}
    for name in TEXTS:
        values = infos.get(name, [told[name]] if name in told else [])
        found = {recordings.text_of(name, value) for value in values}
        if len(found) > 1:
            raise Refused(f"{name} changes within the episode; record one goal an episode")
        if found:
            texts[name] = found.pop()
    if "goal" not in texts:
        raise Refused(
            "no text of the goal in infos/goal or the attribute 'goal', so it cannot be judged; "
            "record with DataCollector(..., record_infos=True)"
        )
    steps = len(episode["actions"])
    errors = np.asarray(infos.get("dynamics_error", []))
    return {
        "goal": texts,
        "observations": episode["observations"],
        "actions": episode["actions"],
        "rewards": episode["rewards"],
        "terminals": episode["terminations"],
        "states": infos.get("state"),
        "imagined": np.any(infos.get("imagined", told.get("imagined", False))),
        "explanation": texts.pop("explanation", None),
        "dynamics_error": errors[1:] if len(errors) == steps + 1 else told.get("dynamics_error"),
    }


def write_minari(path: Path, records: Sequence[dict], world: env.World) -> None:
    """Records as a Minari dataset folder (HDF5) whose name ends in -v0.

    Minari finds it as FOLDER/NAME-v0 below $MINARI_DATASETS_PATH, and recovers the environment.
    """
    minari = package()
    face = env.WorldEnv(world)
    spec = EnvSpec(
        id=f"KALM/{type(world).__name__}-v0",
        entry_point="env:WorldEnv",
        kwargs={"world": world.name},
    )
    with folder.replacing(path) as aside:
        aside.mkdir()
        storage = minari.dataset.minari_storage.MinariStorage.new(
            aside / "data", face.observation_space, face.action_space, spec, "hdf5"
        )
        storage.update_episodes(
            minari.data_collector.EpisodeBuffer(**_episode(record)) for record in records
        )
        storage.update_metadata(
            {
                "dataset_id": f"{path.parent.name}/{path.name}",
                "minari_version": minari.__version__,
                "author": {"KALM"},
                "description": "Rollouts, real or imagined; infos tell goal, kind and relations",
            }
        )


def _episode(record):
    """The fields of a Minari episode. It terminates with success, or is truncated."""
    steps = len(record["actions"])
    last = np.arange(steps) == steps - 1
    told = {
        "goal": record["goal"],
        "level": record["level"],
        "kind": record["kind"],
        "relations": json.dumps(record["relations"]),
        "explanation": record.get("explanation") or "",
        "imagined": rollouts.is_imagined(record),
    }
    infos = {name: [value] * (steps + 1) for name, value in told.items()}
    infos["success"] = [False, *(last & record["success"]).tolist()]
    if record.get("states") is not None:
        infos["state"] = record["states"]
    if record.get("dynamics_error") is not None:
        infos["dynamics_error"] = [np.nan, *record["dynamics_error"].tolist()]
    return {
        "observations": record["observations"],
        "actions": record["actions"],
        "rewards": record["rewards"],
        "terminations": last & record["success"],
        "truncations": last & (not record["success"]),
        "infos": infos,
    }
