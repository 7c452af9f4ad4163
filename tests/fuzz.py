"""Mutated files for the readers: each must be read, or refused in one clear sentence.

    python tests/fuzz.py --seconds 600 --seed 0

Anything but a ValueError that names the file in one line is a finding, and so is a case that takes
more than 5 seconds. The file of each finding is kept. Bytes of HDF5 files are left alone: the HDF5
library itself, in C, runs for ever on some damaged heaps of texts, and nothing outside can help.
"""

import argparse
import importlib.util
import io
import json
import pickle
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

SLOW = 5.0  # seconds
COLORS = ("red", "blue", "green", "purple", "cyan")
DIRECTIONS = ("behind", "left", "front", "right")


def authors_layout(records, steps, texts=3):
    """Records as the authors write them: arrays padded to so many steps, several instructions."""
    count = len(records)
    arrays = {
        "observations": np.zeros((count, steps, 10), np.float32),
        "next_observations": np.zeros((count, steps, 10), np.float32),
        "actions": np.zeros((count, steps), np.int32),
        "rewards": np.zeros((count, steps, 1), np.float32),
        "terminals": np.zeros((count, steps, 1), bool),
        "masks": np.zeros((count, steps), np.int32),
        "goals": np.zeros((count, steps, 6), np.float32),
    }
    for row, r in enumerate(records):
        n = len(r["actions"])
        ((ball, other, direction),) = r["relations"]
        arrays["observations"][row, :n] = r["observations"][:-1]
        arrays["next_observations"][row, :n] = r["observations"][1:]
        arrays["actions"][row, :n] = r["actions"]
        arrays["rewards"][row, :n, 0] = r["rewards"]
        arrays["masks"][row, :n] = 1
        arrays["terminals"][row, n - 1] = r["success"]
        arrays["goals"][row, :, COLORS.index(ball)] = 1
        arrays["goals"][row, :, COLORS.index(other)] = 2
        arrays["goals"][row, :, 5] = DIRECTIONS.index(direction)
    sentences = [[f"{r['goal']} ({i})" for i in range(texts)] for r in records]
    return {"num_trajectories": count, **arrays, "instructions": np.array(sentences)}


def npy(value, protocol=4):
    """The bytes of an .npy file that holds a pickled object, as the authors' do."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    boxed = np.empty((), object)
    boxed[()] = value
    return head.getvalue() + pickle.dumps(boxed, protocol)


def plain_npy(array):
    """The bytes of an .npy file that holds an array."""
    stream = io.BytesIO()
    np.save(stream, np.asarray(array))
    return stream.getvalue()


def npz(members, compression=zipfile.ZIP_STORED):
    """The bytes of an .npz file; members: {name: array or number, or the bytes of an .npy file}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, value in members.items():
            archive.writestr(f"{name}.npy", value if isinstance(value, bytes) else plain_npy(value))
    return file.getvalue()


def hdf5(members):
    """The bytes of an HDF5 file, texts with variable length."""
    import h5py

    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for name, value in members.items():
            file[name] = value.astype(h5py.string_dtype()) if value.dtype.kind == "U" else value
    return stream.getvalue()


def arrays_only(fields):
    """Fields as arrays of numbers and texts, without those that can only be pickled."""
    found = {}
    for name, value in fields.items():
        try:
            found[name] = np.asarray(value)
        except ValueError:
            continue
    return {name: value for name, value in found.items() if value.dtype != object}


def store(path, world, episodes, observation_space=None, data_format="hdf5"):
    """Episodes, objects with the fields of Minari's, through Minari's own storage."""
    minari = minari_io.package()
    face = env.WorldEnv(world)
    path.mkdir()
    spaces = observation_space or face.observation_space, face.action_space
    new_storage = minari.dataset.minari_storage.MinariStorage.new
    data = new_storage(path / "data", *spaces, data_format=data_format)
    fields = ("observations", "actions", "rewards", "terminations", "truncations", "infos")
    for episode in episodes:
        told = {name: getattr(episode, name) for name in fields}
        if data_format != "hdf5":  # there a text is a text, and an array has two axes
            plain = {k: v if np.ndim(v) > 1 else np.asarray(v) for k, v in told["infos"].items()}
            plain = {k: v.astype(str) if v.dtype.kind in "SO" else v for k, v in plain.items()}
            told["infos"] = {k: v if np.ndim(v) > 1 else v.tolist() for k, v in plain.items()}
        data.update_episodes([minari.data_collector.EpisodeBuffer(**told)])
    data.update_metadata({"dataset_id": "kalm/theirs-v0", "minari_version": minari.__version__})
    return path


# ----------------------------------------------------------------------------------------------
# Mutations


def pick(rng, values):
    return values[rng.integers(len(values))]


def mutate_bytes(data, rng):
    """One to four changes: flipped, cut, repeated, inserted, edges of integers, the end lost."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 16))
        if rng.random() < 0.5:
            at = min(at, int(rng.integers(400)))  # headers are at the start
        match rng.integers(6):
            case 0 if at < len(data):
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length] * int(rng.integers(1, 4))
            case 3:
                data[at:at] = rng.bytes(length)
            case 4:
                edges = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"]
                data[at : at + 4] = pick(rng, edges)
            case 5 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


NUMBERS = [np.nan, np.inf, -1, 40, 2**62, 1e300, 0.5]
STRANGE = [*NUMBERS, "", "red ball left of blue", b"\xff\xfe", None, True, [["a"], "b"]]
TYPES = ["U3", "S3", "f2", "i1", "u8", "f8", "?", "U200"]


def mutate_arrays(arrays, rng):
    """The dict with a field or two of another shape, type, content or name, or gone."""
    arrays = dict(arrays)
    for _ in range(rng.integers(1, 3)):
        name = pick(rng, list(arrays))
        value = arrays[name]
        if isinstance(value, list):
            value = np.array(value, object)
        match rng.integers(8):
            case 0 if len(arrays) > 1:
                del arrays[name]
            case 1:
                arrays[name] = value[..., :0] if np.ndim(value) else value
            case 2:
                arrays[name] = np.array(value).T
            case 3 if np.asarray(value).dtype.kind in "biuf":
                arrays[name] = np.asarray(value).astype(pick(rng, TYPES), casting="unsafe")
            case 4:
                arrays[name] = pick(rng, STRANGE)
            case 5 if np.size(value) and np.asarray(value).dtype.kind in "fiu":
                arrays[name] = np.array(value, np.float64)
                arrays[name].flat[rng.integers(np.size(value))] = pick(rng, NUMBERS)
            case 6:
                arrays[pick(rng, recordings.FIELDS)] = value
            case 7:
                arrays[name] = np.array(value).tolist()
    return arrays


def mutate_json(record, rng):
    """A record, or a list of them, with a part of it replaced."""
    strange = [None, True, -1, 1e999, "", "\u2028", "\0", [], {}, [[]], [None], {"red": 1}, "red"]
    strange += [["red", "blue", "left"], 10**30, "\ud800"]
    record = json.loads(json.dumps(record))
    place, key = record, pick(rng, list(record))
    while isinstance(place[key], (list, dict)) and place[key] and rng.random() < 0.7:
        place = place[key]
        key = pick(rng, list(place) if isinstance(place, dict) else range(len(place)))
    place[key] = pick(rng, strange)
    return record


def seeds(folder, world, rng):
    """Whole recordings to mutate: (layouts of arrays, lines of a goals file, folders)."""
    offline = world.sample_goals("offline", "train", 4, rng)
    starts = env.unfulfilled_states(world, rng, offline)
    play = lambda obs, rows: rng.integers(40, size=len(rows))
    records = env.run_episodes(world, play, offline, starts, 4)
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
    levels = [world.sample_goals(level, "test", 12, rng) for level in env.NOVEL_LEVELS]
    return layouts, [goal.to_json() for goals in levels for goal in goals], folders


def cases(folder, world, rng):
    """Endless (name, reader, path) of mutated files in a folder."""
    layouts, goals, folders = seeds(folder, world, rng)
    kinds = ["jsonl", "jsonl fields", "npy", "npy fields", "npz", "npz member", "npz fields"]
    kinds += ["folder"] + ["hdf5 fields"] * (len(folders) > 1)
    while True:
        kind, layout = pick(rng, kinds), pick(rng, layouts)
        name = pick(rng, list(layout))
        lines = [pick(rng, goals) for _ in range(3)]
        path = folder / f"case.{kind.split()[0]}"
        match kind:
            case "jsonl":
                content = mutate_bytes("\n".join(map(json.dumps, lines)).encode(), rng)
            case "jsonl fields":
                content = "\n".join(json.dumps(mutate_json(r, rng)) for r in lines).encode()
            case "npy":
                content = mutate_bytes(npy(layout, int(rng.integers(6))), rng)
            case "npy fields":
                content = npy(mutate_arrays(layout, rng))
            case "npz":
                packed = pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
                content = mutate_bytes(npz(layout, packed), rng)
            case "npz member":
                content = npz({**layout, name: mutate_bytes(plain_npy(layout[name]), rng)})
            case "npz fields":
                content = npz(arrays_only(mutate_arrays(layout, rng)))
            case "hdf5 fields":
                content = hdf5(arrays_only(mutate_arrays(layout, rng)))
        if kind == "folder":
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(pick(rng, folders), path)
            files = [file for file in sorted(path.rglob("*")) if file.is_file()]
            file = pick(rng, [file for file in files if file.suffix != ".hdf5"])
            if file.suffix == ".json" and rng.random() < 0.5:
                file.write_text(json.dumps(mutate_json(json.loads(file.read_text()), rng)))
            else:
                file.write_bytes(mutate_bytes(file.read_bytes(), rng))
        else:
            path.write_bytes(content)
        yield kind, env.read_goals if path.suffix == ".jsonl" else formats.read, path


def fuzz(seconds, seed, folder, world, keep=None):
    """Run mutated files for some seconds. Returns (cases, how many were read, findings)."""
    rng, findings, count, accepted = np.random.default_rng(seed), [], 0, 0
    mutated = cases(Path(folder), world, rng)
    end = time.monotonic() + seconds
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
            found = f"{type(error).__name__}: {error}"
        if time.monotonic() - started > SLOW:
            found = f"took {time.monotonic() - started:.0f} s"
        if found:
            findings.append(f"case {count} ({kind}): {found}")
            if keep:
                copy = shutil.copytree if path.is_dir() else shutil.copy
                copy(path, Path(keep) / f"{count}.{path.name}")
    return count, accepted, findings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kept = tempfile.mkdtemp(prefix="kalm-fuzz-")
    with tempfile.TemporaryDirectory() as work, np.errstate(all="ignore"):
        count, accepted, findings = fuzz(options.seconds, options.seed, work, env.make(), kept)
    print(f"{count} cases, {accepted} of them read, {len(findings)} findings", *findings, sep="\n")
    print(f"files of findings: {kept}")
    sys.exit(bool(findings))
