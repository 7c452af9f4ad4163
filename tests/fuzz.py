"""Mutated files for the readers: each must be read, or refused in one clear sentence.

    python tests/fuzz.py SECONDS SEED

Anything but a ValueError that names the file in one line, or 5 seconds for a file, is a finding.
Bytes of HDF5 files are left alone: the library itself, in C, runs for ever on some damaged heaps.
"""

import importlib.util
import io
import json
import re
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

import env  # noqa: E402
from data import formats, minari_io, recordings, rollouts  # noqa: E402

COLORS = ("red", "blue", "green", "purple", "cyan")
DIRECTIONS = ("behind", "left", "front", "right")


def padded(values, steps):
    array = recordings._padded(values)
    past = [(0, 0), (0, steps - array.shape[1])]
    return np.pad(array, past + [(0, 0)] * (array.ndim - 2))


def authors_layout(records, steps, texts=3):
    """Records as the authors write them: arrays padded to so many steps, several instructions."""
    arrays = {
        "observations": padded([r["observations"][:-1] for r in records], steps),
        "next_observations": padded([r["observations"][1:] for r in records], steps),
        "actions": padded([r["actions"].astype(np.int32) for r in records], steps),
        "rewards": padded([r["rewards"][:, None] for r in records], steps),
        "terminals": np.zeros((len(records), steps, 1), bool),
        "masks": padded([np.ones(len(r["actions"]), np.int32) for r in records], steps),
        "goals": np.zeros((len(records), steps, 6), np.float32),
    }
    for row, r in enumerate(records):
        ((ball, other, direction),) = r["relations"]
        arrays["terminals"][row, len(r["actions"]) - 1] = r["success"]
        arrays["goals"][row, :, [COLORS.index(ball), COLORS.index(other)]] = [[1], [2]]
        arrays["goals"][row, :, 5] = DIRECTIONS.index(direction)
    sentences = [[f"{r['goal']} ({i})" for i in range(texts)] for r in records]
    return {"num_trajectories": len(records), **arrays, "instructions": np.array(sentences)}


def npy(value):
    """The bytes of an .npy file; what is no array is pickled, as the authors do."""
    stream = io.BytesIO()
    np.save(stream, value)
    return stream.getvalue()


def npz(members):
    """The bytes of an .npz file; members: {name: array or number, or the bytes of an .npy file}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, value in members.items():
            archive.writestr(f"{name}.npy", value if isinstance(value, bytes) else npy(value))
    return file.getvalue()


def hdf5(members):
    import h5py

    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for name, value in members.items():
            file[name] = value.astype(h5py.string_dtype()) if value.dtype.kind == "U" else value
    return stream.getvalue()


def arrays_only(fields):
    arrays = {name: np.asarray(v) for name, v in fields.items() if not isinstance(v, list)}
    return {name: array for name, array in arrays.items() if array.dtype != object}


def store(path, world, episodes, observation_space=None, data_format="hdf5"):
    """Episodes, objects with the fields of Minari's, through Minari's own storage."""
    minari, face = minari_io.package(), env.WorldEnv(world)
    path.mkdir()
    spaces = observation_space or face.observation_space, face.action_space
    new = minari.dataset.minari_storage.MinariStorage.new
    data = new(path / "data", *spaces, data_format=data_format)
    names = ("observations", "actions", "rewards", "terminations", "truncations", "infos")
    for episode in episodes:
        fields = {name: getattr(episode, name) for name in names}
        if data_format != "hdf5":  # there a text is a text, and an array has two axes
            for name, values in fields["infos"].items():
                texts = np.char.decode(values) if np.asarray(values).dtype.kind == "S" else values
                fields["infos"][name] = values if np.ndim(values) > 1 else list(texts)
        data.update_episodes([minari.data_collector.EpisodeBuffer(**fields)])
    data.update_metadata({"dataset_id": "kalm/theirs-v0", "minari_version": minari.__version__})
    return path


def pick(rng, values):
    return values[rng.integers(len(values))]


def mutate_bytes(data, rng):
    """One to four changes: flipped, cut, repeated, inserted, edges of integers, the end lost."""
    for _ in range(rng.integers(1, 5)):
        at, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 16))
        if rng.random() < 0.5:
            at = min(at, int(rng.integers(400)))  # headers are at the start
        edge = pick(rng, [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
        head, part, tail = data[:at], data[at : at + length], data[at + length :]
        flipped = bytes(byte ^ (1 << int(rng.integers(8))) for byte in part[:1]) + part[1:]
        middles = [flipped, b"", part * 3, rng.bytes(length) + part, edge + part[4:]]
        data = head if rng.random() < 0.05 else head + pick(rng, middles) + tail
    return data


NUMBERS = [np.nan, np.inf, -1, 40, 2**62, 1e300, 0.5]
STRANGE = [*NUMBERS, "", "red ball left of blue", b"\xff\xfe", None, True, [["a"], "b"]]
TYPES = ["U3", "S3", "f2", "i1", "u8", "f8", "?", "U200"]


def mutate_arrays(arrays, rng):
    """The dict with a field or two of another shape, type, content or name, or gone."""
    arrays = dict(arrays)
    names = {pick(rng, list(arrays)), pick(rng, list(arrays))}
    for name, value in [(name, np.array(arrays.pop(name))) for name in names]:
        if value.dtype.kind in "fiub" and value.size and rng.random() < 0.5:
            value = value.astype(np.float64)
            value.flat[rng.integers(value.size)] = pick(rng, NUMBERS)
            value = value.astype(pick(rng, TYPES), casting="unsafe")
        strange = [value.T, value[..., :0] if value.ndim else value, value.tolist(), value[None]]
        name = pick(rng, recordings.FIELDS) if rng.random() < 0.2 else name
        arrays[name] = pick(rng, [value, value, *strange, pick(rng, STRANGE)])
    return arrays


def mutate_json(record, rng):
    """The text of a record with a part of it replaced."""
    strange = ["null", "true", "-1", "Infinity", '""', '"red"', "[]", "[[]]", "[null]", "{}"]
    text = json.dumps(record)
    part = pick(rng, list(re.finditer(r'"[^"]*"|[0-9.]+|\[[^\[\]]*\]', text)))
    return (text[: part.start()] + pick(rng, strange) + text[part.end() :]).encode()


def seeds(folder, world, rng):
    """Whole recordings to mutate: (layouts of arrays, records of a goals file, folders)."""
    goals, play = world.sample_goals("offline", "train", 4, rng), lambda obs, rows: 8 * rows
    records = env.run_episodes(world, play, goals, env.unfulfilled_states(world, rng, goals), 4)
    authors = authors_layout(records, 5, texts=2)
    plain = {k: v for k, v in authors.items() if k not in ("goals", "next_observations")}
    plain["instructions"] = np.array([f"Push the red ball {d} the blue ball" for d in DIRECTIONS])
    recordings.write_npz(folder / "ours.npz", records)
    with np.load(folder / "ours.npz") as file:
        layouts = [authors, plain, dict(file)]
    folders = [folder / "own"]
    rollouts.write_rollouts(folders[0], records)
    if importlib.util.find_spec("minari"):
        folders.append(folder / "hdf5-v0")
        minari_io.write_minari(folders[-1], records, world)
        episodes = list(minari_io.package().MinariDataset(folders[-1] / "data"))
        for kind in ("arrow", "parquet"):
            folders.append(store(folder / kind, world, episodes, data_format=kind))
    goals = [g for level in env.NOVEL_LEVELS for g in world.sample_goals(level, "test", 12, rng)]
    return layouts, [goal.to_json() for goal in goals], folders


def mutate_folder(path, whole, rng):
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    file = pick(rng, [f for f in sorted(path.rglob("*")) if f.is_file() and f.suffix != ".hdf5"])
    content = mutate_bytes(file.read_bytes(), rng)
    if file.suffix == ".json" and rng.random() < 0.5:
        content = mutate_json(json.loads(file.read_text()), rng)
    file.write_bytes(content)


MUTATED = {  # bytes of a file, from a layout of arrays, a goal and rng
    "jsonl": lambda a, goal, rng: mutate_bytes(json.dumps(goal).encode(), rng),
    "jsonl fields": lambda a, goal, rng: mutate_json(goal, rng),
    "npy": lambda a, goal, rng: mutate_bytes(npy(a), rng),
    "npy fields": lambda a, goal, rng: npy(mutate_arrays(a, rng)),
    "npz": lambda a, goal, rng: mutate_bytes(npz(a), rng),
    "npz member": lambda a, goal, rng: npz({**a, "masks": mutate_bytes(npy(a["masks"]), rng)}),
    "npz fields": lambda a, goal, rng: npz(arrays_only(mutate_arrays(a, rng))),
    "hdf5 fields": lambda a, goal, rng: hdf5(arrays_only(mutate_arrays(a, rng))),
}


def cases(folder, world, rng):
    """Endless (name, reader, path) of mutated files in a folder."""
    layouts, goals, folders = seeds(folder, world, rng)
    while True:
        kind = pick(rng, [*MUTATED, "folder"])
        path = folder / f"case.{kind.split()[0]}"
        if kind == "folder":
            mutate_folder(path, pick(rng, folders), rng)
        elif kind != "hdf5 fields" or len(folders) > 1:
            path.write_bytes(MUTATED[kind](pick(rng, layouts), pick(rng, goals), rng))
        yield kind, env.read_goals if path.suffix == ".jsonl" else formats.read, path


def fuzz(seconds, seed, folder, world):
    """Run mutated files for some seconds. Returns (cases, how many were read, findings)."""
    findings, count, accepted, end = [], 0, 0, time.monotonic() + seconds
    mutated = cases(Path(folder), world, np.random.default_rng(seed))
    while time.monotonic() < end:
        kind, read, path = next(mutated)
        count, started, found = count + 1, time.monotonic(), None
        try:
            read(path, world)
            accepted += 1
        except ValueError as error:
            said = str(error).removeprefix(str(path))
            if "\n" in said or said == str(error) or not 10 < len(said) < 500:
                found = f"unclear: {error!r}"
        except BaseException as error:
            found = repr(error)
        if time.monotonic() - started > 5:
            found = f"took {time.monotonic() - started:.0f} s"
        if found:
            findings.append(f"case {count} ({kind}): {found}")
    return count, accepted, findings


if __name__ == "__main__":
    seconds, seed = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as work, np.errstate(all="ignore"):
        count, accepted, findings = fuzz(seconds, seed, work, env.make())
    print(f"{count} cases, {accepted} read, {len(findings)} findings", *findings, sep="\n")
    sys.exit(bool(findings))
