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


def padded(rows, steps):
    """Arrays as one, each padded to so many steps."""
    array = np.zeros((len(rows), steps, *rows[0].shape[1:]), rows[0].dtype)
    for padded_row, values in zip(array, rows):
        padded_row[: len(values)] = values
    return array


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


def npz(members):
    """The bytes of an .npz file; members: {name: array or number, or the bytes of an .npy file}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
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
    ragged = {name for name, value in fields.items() if isinstance(value, list)}
    arrays = {name: np.asarray(value) for name, value in fields.items() if name not in ragged}
    return {name: array for name, array in arrays.items() if array.dtype != object}


def store(path, world, episodes, observation_space=None, data_format="hdf5"):
    """Episodes, objects with the fields of Minari's, through Minari's own storage."""
    minari = minari_io.package()
    face = env.WorldEnv(world)
    path.mkdir()
    spaces = observation_space or face.observation_space, face.action_space
    new_storage = minari.dataset.minari_storage.MinariStorage.new
    data = new_storage(path / "data", *spaces, data_format=data_format)
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
        value = np.array(arrays.pop(name))
        if value.dtype.kind in "fiub" and value.size and rng.random() < 0.5:
            value = value.astype(np.float64)
            value.flat[rng.integers(value.size)] = pick(rng, NUMBERS)
            value = value.astype(pick(rng, TYPES), casting="unsafe")
        strange = [value.T, value[..., :0] if value.ndim else value, value.tolist(), value[None]]
        arrays[name] = pick(rng, [value, value, *strange, pick(rng, STRANGE)])
        if rng.random() < 0.2:
            arrays[pick(rng, recordings.FIELDS)] = arrays.pop(name)
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
        if kind == "folder":
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(pick(rng, folders), path)
            files = [file for file in sorted(path.rglob("*")) if file.is_file()]
            file = pick(rng, [file for file in files if file.suffix != ".hdf5"])
            content = mutate_bytes(file.read_bytes(), rng)
            if file.suffix == ".json" and rng.random() < 0.5:
                content = json.dumps(mutate_json(json.loads(file.read_text()), rng)).encode()
            file.write_bytes(content)
        else:
            make = {
                "jsonl": lambda: mutate_bytes("\n".join(map(json.dumps, lines)).encode(), rng),
                "jsonl fields": lambda: json.dumps(mutate_json(lines[0], rng)).encode(),
                "npy": lambda: mutate_bytes(npy(layout, int(rng.integers(6))), rng),
                "npy fields": lambda: npy(mutate_arrays(layout, rng)),
                "npz": lambda: mutate_bytes(npz(layout), rng),
                "npz member": lambda: npz(
                    {**layout, name: mutate_bytes(plain_npy(layout[name]), rng)}
                ),
                "npz fields": lambda: npz(arrays_only(mutate_arrays(layout, rng))),
                "hdf5 fields": lambda: hdf5(arrays_only(mutate_arrays(layout, rng))),
            }
            path.write_bytes(make[kind]())
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
