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
    arrays["instructions"] = np.array(
        [[f"{r['goal']} ({i})" for i in range(texts)] for r in records]
    )
    return {"num_trajectories": count, **arrays}


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


def mutate_bytes(data, rng):
    """One to four changes: flipped, cut, repeated, inserted, edges of integers, the end lost."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 16))
        if rng.random() < 0.5:
            at = min(at, int(rng.integers(400)))  # headers are at the start
        match rng.integers(6):
            case 0:
                data[at : at + 1] = bytes(
                    b ^ (1 << int(rng.integers(8))) for b in data[at : at + 1]
                )
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length] * int(rng.integers(1, 4))
            case 3:
                data[at:at] = rng.bytes(length)
            case 4:
                edges = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"]
                data[at : at + 4] = edges[rng.integers(4)]
            case 5 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


def mutate_arrays(arrays, rng):
    """The dict with a field or two of another shape, type, content or name, or gone."""
    arrays = dict(arrays)
    strange = [
        np.nan,
        np.inf,
        -1,
        40,
        2**62,
        1e300,
        0.5,
        "",
        "red ball left of blue",
        b"\xff\xfe",
        None,
        True,
        [["a"], "b"],
    ]
    for _ in range(rng.integers(1, 3)):
        name = list(arrays)[rng.integers(len(arrays))]
        value = arrays[name] if isinstance(arrays[name], list) else np.array(arrays[name])
        match rng.integers(8):
            case 0:
                del arrays[name]
            case 1 | 2 | 3 | 5 if isinstance(value, list):
                arrays[name] = value[1:]
            case 1:
                arrays[name] = value[..., :0] if value.ndim else value[None]
            case 2:
                arrays[name] = value.T
            case 3:
                kind = ["U3", "S3", "f2", "i1", "u8", "f8", "?", "U200"][rng.integers(8)]
                is_number = value.dtype.kind in "biuf"
                arrays[name] = (
                    value.astype(kind, casting="unsafe") if is_number else value.astype("S40")
                )
            case 4:
                arrays[name] = strange[rng.integers(len(strange))]
            case 5 if value.size and value.dtype.kind in "fiu":
                value = value.astype(np.float64)
                value.flat[rng.integers(value.size)] = [np.nan, np.inf, -1, 40, 1e300, 0.5][
                    rng.integers(6)
                ]
                arrays[name] = value
            case 6:
                arrays[recordings.FIELDS[rng.integers(len(recordings.FIELDS))]] = value
            case 7 if isinstance(value, np.ndarray):
                arrays[name] = value.tolist()
        if not arrays:
            break
    return arrays


def mutate_json(record, rng):
    """A record, or a list of them, with a part of it replaced."""
    strange = [
        None,
        True,
        -1,
        1e999,
        "",
        "  ",
        "\u2028",
        "\0",
        [],
        {},
        [[]],
        [None],
        {"red": 1},
        "red",
    ]
    strange += [["red", "blue", "left"], 10**30, "\ud800"]
    record = json.loads(json.dumps(record))
    place, key = record, list(record)[rng.integers(len(record))]
    while isinstance(place[key], (list, dict)) and place[key] and rng.random() < 0.7:
        place = place[key]
        key = (
            list(place)[rng.integers(len(place))]
            if isinstance(place, dict)
            else int(rng.integers(len(place)))
        )
    place[key] = strange[rng.integers(len(strange))]
    return record


KINDS = (
    "goals",
    "goals text",
    "npy",
    "npy fields",
    "npz",
    "npz member",
    "npz fields",
    "hdf5 fields",
    "folder",
)


def cases(folder, world, rng):
    """Endless (name, reader, path) of mutated files in a folder."""
    offline = world.sample_goals("offline", "train", 4, rng)
    starts = env.unfulfilled_states(world, rng, offline)
    records = env.run_episodes(
        world, lambda obs, rows: rng.integers(40, size=len(rows)), offline, starts, 4
    )
    arrays = authors_layout(records, 5, texts=2)
    goals = [
        g.to_json()
        for level in env.NOVEL_LEVELS
        for g in world.sample_goals(level, "test", 12, rng)
    ]
    members = {name: np.asarray(value) for name, value in arrays.items()}
    imagined = {
        k: v for k, v in members.items() if k not in ("goals", "next_observations", "terminals")
    }
    imagined["instructions"] = np.array(
        [f"Push the red ball {d} the blue ball" for d in DIRECTIONS]
    )
    recordings.write_npz(folder / "ours.npz", records)
    with np.load(folder / "ours.npz") as file:
        ours = dict(file)
    valid = [folder / "valid"]
    rollouts.write_rollouts(valid[0], records)
    has_minari = importlib.util.find_spec("minari")
    if has_minari:
        valid.append(folder / "hdf5-v0")
        minari_io.write_minari(valid[-1], records, world)
        for data_format in ("arrow", "parquet"):
            episodes = list(minari_io.package().MinariDataset(valid[1] / "data"))
            valid.append(store(folder / data_format, world, episodes, data_format=data_format))
    while True:
        kind = KINDS[rng.integers(len(KINDS))]
        path, read = folder / f"case.{kind[:3]}", formats.read
        layout = (members, imagined, ours)[rng.integers(3)]
        if kind == "goals":
            path, read = folder / "case.jsonl", env.read_goals
            lines = [
                json.dumps(mutate_json(goals[i], rng)) for i in rng.integers(len(goals), size=2)
            ]
            path.write_bytes("\n".join(lines).encode())
        elif kind == "goals text":
            path, read = folder / "case.jsonl", env.read_goals
            lines = [json.dumps(goals[i]) for i in rng.integers(len(goals), size=3)]
            path.write_bytes(mutate_bytes("\n".join(lines).encode(), rng))
        elif kind == "npy":
            path.write_bytes(
                mutate_bytes(
                    npy(arrays if rng.random() < 0.5 else layout, int(rng.integers(6))), rng
                )
            )
        elif kind == "npy fields":
            path.write_bytes(
                npy(
                    mutate_arrays(arrays if rng.random() < 0.5 else layout, rng),
                    int(rng.integers(6)),
                )
            )
        elif kind == "npz":
            path.write_bytes(
                mutate_bytes(
                    npz(layout, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[rng.integers(2)]), rng
                )
            )
        elif kind == "npz member":
            name = list(layout)[rng.integers(len(layout))]
            path.write_bytes(npz({**layout, name: mutate_bytes(plain_npy(layout[name]), rng)}))
        elif kind == "npz fields":
            path.write_bytes(npz(arrays_only(mutate_arrays(layout, rng))))
        elif kind == "hdf5 fields":
            if not has_minari:
                continue
            path = folder / "case.HDF5"
            write_hdf5(path, arrays_only(mutate_arrays(layout, rng)))
        else:
            path = folder / "case"
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(valid[rng.integers(len(valid))], path)
            files = [
                file
                for file in sorted(path.rglob("*"))
                if file.is_file() and file.suffix != ".hdf5"
            ]
            file = files[rng.integers(len(files))]
            if file.suffix == ".json" and rng.random() < 0.5:
                file.write_text(json.dumps(mutate_json(json.loads(file.read_text()), rng)))
            else:
                file.write_bytes(mutate_bytes(file.read_bytes(), rng))
        yield kind, read, path


def store(path, world, episodes, observation_space=None, data_format="hdf5"):
    """Episodes, objects with the fields of Minari's, through Minari's own storage."""
    minari = minari_io.package()
    face = env.WorldEnv(world)
    path.mkdir()
    spaces = observation_space or face.observation_space, face.action_space
    data = minari.dataset.minari_storage.MinariStorage.new(
        path / "data", *spaces, data_format=data_format
    )
    fields = ("observations", "actions", "rewards", "terminations", "truncations", "infos")
    for episode in episodes:
        told = {name: getattr(episode, name) for name in fields}
        if data_format != "hdf5":  # there a text is a text, and an array has two axes
            told["infos"] = {k: v if np.ndim(v) > 1 else texts(v) for k, v in told["infos"].items()}
        data.update_episodes([minari.data_collector.EpisodeBuffer(**told)])
    data.update_metadata({"dataset_id": "kalm/theirs-v0", "minari_version": minari.__version__})
    return path


def texts(values):
    """A list of plain values, of what HDF5 gives for it."""
    return [v.decode() if isinstance(v, bytes) else v for v in np.asarray(values).tolist()]


def arrays_only(fields):
    """Fields as arrays of numbers and texts, without those that can only be pickled."""
    found = {}
    for name, value in fields.items():
        try:
            value = np.asarray(value)
        except ValueError:
            continue
        if value.dtype != object:
            found[name] = value
    return found


def write_hdf5(path, fields):
    """Fields as datasets of an HDF5 file, texts with variable length."""
    import h5py

    with h5py.File(path, "w") as file:
        for name, value in fields.items():
            file[name] = value.astype(h5py.string_dtype()) if value.dtype.kind == "U" else value


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
            said = str(error)
            if (
                "\n" in said
                or not said.startswith(str(path))
                or not 20 < len(said) - len(str(path)) < 400
            ):
                found = f"unclear: {said!r}"
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        if time.monotonic() - started > SLOW:
            found = f"took {time.monotonic() - started:.0f} s"
        if found:
            findings.append(f"case {count} ({kind}): {found}")
            if keep:
                (shutil.copytree if path.is_dir() else shutil.copy)(
                    path, Path(keep) / f"{count}.{path.name}"
                )
    return count, accepted, findings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kept = tempfile.mkdtemp(prefix="kalm-fuzz-")
    with tempfile.TemporaryDirectory() as work, np.errstate(all="ignore"):
        count, accepted, findings = fuzz(options.seconds, options.seed, work, env.make(), kept)
    print(
        f"{count} cases, {accepted} of them read, {len(findings)} findings",
        *findings[:50],
        f"files of findings: {kept}",
        sep="\n",
    )
    sys.exit(bool(findings))
