"""Mutated files for the readers of goals and of foreign recordings: each must be read, or refused in one clear sentence.

    python tests/fuzz.py --minutes 10 --seed 0

Anything but a ValueError that names the file in one line is a finding, and so is a case that takes more than 5 seconds. The file of
each finding is kept. HDF5 files are fuzzed where h5py is installed, in one process with the rest: a crash of the HDF5 library ends it.
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
from data import formats  # noqa: E402

SLOW = 5.0  # seconds


def recordings(rng, count=4):
    """A valid dict of arrays in the authors' layout, of random play."""
    goals = env.sample_goals("offline", "train", count, rng)
    records = env.run_episodes(lambda obs, rows: rng.integers(40, size=len(rows)), goals, env.unfulfilled_states(rng, goals), 4)
    arrays = {"observations": np.zeros((count, 5, 10), np.float32), "next_observations": np.zeros((count, 5, 10), np.float32),
              "actions": np.zeros((count, 5), np.int32), "rewards": np.zeros((count, 5, 1), np.float32),
              "terminals": np.zeros((count, 5, 1), bool), "masks": np.zeros((count, 5), np.int32),
              "goals": np.zeros((count, 5, 6), np.float32)}
    for row, r in enumerate(records):
        steps, ((ball, other, way),) = len(r["actions"]), goals[row].relations
        arrays["observations"][row, :steps], arrays["next_observations"][row, :steps] = r["observations"][:-1], r["observations"][1:]
        arrays["actions"][row, :steps], arrays["rewards"][row, :steps, 0], arrays["masks"][row, :steps] = r["actions"], r["rewards"], 1
        arrays["terminals"][row, steps - 1] = r["success"]
        arrays["goals"][row, :, [ball, other]], arrays["goals"][row, :, 5] = [[1], [2]], way
    arrays["instructions"] = np.array([[g.text, "Push the ball."] for g in goals])
    return {"num_trajectories": count, **arrays}, records


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
    """One to four random changes of bytes: flipped, cut, repeated, inserted, set to the edges of integers, or the end lost."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 16))
        if rng.random() < 0.5:
            at = min(at, int(rng.integers(400)))  # headers are at the start
        match rng.integers(6):
            case 0:
                data[at:at + 1] = bytes(b ^ (1 << int(rng.integers(8))) for b in data[at:at + 1])
            case 1:
                del data[at:at + length]
            case 2:
                data[at:at] = data[at:at + length] * int(rng.integers(1, 4))
            case 3:
                data[at:at] = rng.bytes(length)
            case 4:
                data[at:at + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"][rng.integers(4)]
            case 5 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


def mutate_arrays(arrays, rng):
    """The dict with one or two fields of another shape, type or content, under another name, or gone."""
    arrays = dict(arrays)
    for _ in range(rng.integers(1, 3)):
        name = list(arrays)[rng.integers(len(arrays))]
        value = np.array(arrays[name])
        strange = [np.nan, np.inf, -1, 40, 2 ** 62, 1e300, 0.5, "", "red ball left of blue", b"\xff\xfe", None, True]
        match rng.integers(7):
            case 0:
                del arrays[name]
            case 1:
                arrays[name] = value[..., :0] if value.ndim else value[None]
            case 2:
                arrays[name] = value.T
            case 3:
                arrays[name] = value.astype(["U3", "S3", "f2", "i1", "u8", "f8", "?", "U200"][rng.integers(8)], casting="unsafe") \
                    if value.dtype.kind in "biuf" else value.astype("S40")
            case 4:
                arrays[name] = strange[rng.integers(len(strange))]
            case 5 if value.size and value.dtype.kind in "fiu":
                value = value.astype(np.float64)
                value.flat[rng.integers(value.size)] = [np.nan, np.inf, -1, 40, 1e300, 0.5][rng.integers(6)]
                arrays[name] = value
            case 6:
                arrays[formats.FIELDS[rng.integers(len(formats.FIELDS))]] = value
        if not arrays:
            break
    return arrays


def mutate_json(record, rng):
    """A goals record, or a list of them, with a part of it replaced."""
    strange = [None, True, -1, 1e999, "", "  ", "\u2028", [], {}, [[]], [None], {"red": 1}, "red", ["red", "blue", "left"], 10 ** 30,
               "\ud800"]
    record = json.loads(json.dumps(record))
    place, key = record, list(record)[rng.integers(len(record))]
    while isinstance(place[key], (list, dict)) and place[key] and rng.random() < 0.7:
        place = place[key]
        key = list(place)[rng.integers(len(place))] if isinstance(place, dict) else int(rng.integers(len(place)))
    place[key] = strange[rng.integers(len(strange))]
    return record


def cases(folder, rng):
    """Endless (name, reader, path) of mutated files in a folder."""
    arrays, records = recordings(rng)
    goals = [g.to_json() for level in env.NOVEL_LEVELS for g in env.sample_goals(level, "test", 12, rng)]
    members = {name: np.asarray(value) for name, value in arrays.items()}
    imagined = {k: v for k, v in members.items() if k not in ("goals", "next_observations", "terminals")}
    imagined["instructions"] = np.array([f"Push the red ball {d} the blue ball" for d in env.DIRECTIONS])
    minari = folder / "minari"
    if importlib.util.find_spec("h5py"):
        formats.write_minari(folder / "valid-v0", records)
    formats.write_npz(folder / "ours.npz", records)
    with np.load(folder / "ours.npz") as file:
        ours = dict(file)
    while True:
        kind = ["goals", "goals text", "npy", "npy fields", "npz", "npz member", "npz fields", "minari", "hdf5"][rng.integers(9)]
        path, read = folder / f"case.{kind[:3]}", formats.read
        layout = (members, imagined, ours)[rng.integers(3)]
        if kind == "goals":
            path, read = folder / "case.jsonl", env.read_goals
            path.write_bytes("\n".join(json.dumps(mutate_json(goals[i], rng)) for i in rng.integers(len(goals), size=2)).encode())
        elif kind == "goals text":
            path, read = folder / "case.jsonl", env.read_goals
            path.write_bytes(mutate_bytes("\n".join(json.dumps(goals[i]) for i in rng.integers(len(goals), size=3)).encode(), rng))
        elif kind == "npy":
            path.write_bytes(mutate_bytes(npy(arrays if rng.random() < 0.5 else layout, int(rng.integers(6))), rng))
        elif kind == "npy fields":
            path.write_bytes(npy(mutate_arrays(arrays if rng.random() < 0.5 else layout, rng), int(rng.integers(6))))
        elif kind == "npz":
            path.write_bytes(mutate_bytes(npz(layout, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[rng.integers(2)]), rng))
        elif kind == "npz member":
            name = list(layout)[rng.integers(len(layout))]
            path.write_bytes(npz({**layout, name: mutate_bytes(plain_npy(layout[name]), rng)}))
        elif kind == "npz fields":
            fields = {name: np.asarray(value) for name, value in mutate_arrays(layout, rng).items()}
            path.write_bytes(npz({name: value for name, value in fields.items() if value.dtype != object}))
        elif not (folder / "valid-v0").exists():
            continue
        else:
            path = minari
            shutil.rmtree(minari, ignore_errors=True)
            shutil.copytree(folder / "valid-v0", minari)
            file = minari / "data" / ("metadata.json" if kind == "minari" else "main_data.hdf5")
            if kind == "minari" and rng.random() < 0.5:
                file.write_text(json.dumps(mutate_json(json.loads(file.read_text()), rng)))
            else:
                file.write_bytes(mutate_bytes(file.read_bytes(), rng))
        yield kind, read, path


def fuzz(seconds, seed, folder, keep=None):
    """Run mutated files for some seconds. Returns (cases, how many were read without an error, findings as texts)."""
    rng, findings, count, accepted = np.random.default_rng(seed), [], 0, 0
    end = time.monotonic() + seconds
    for kind, read, path in cases(Path(folder), rng):
        if time.monotonic() > end:
            return count, accepted, findings
        count, started, found = count + 1, time.monotonic(), None
        try:
            read(path)
            accepted += 1
        except ValueError as error:
            said = str(error)
            if "\n" in said or not said.startswith(str(path)) or not 20 < len(said) - len(str(path)) < 400:
                found = f"unclear: {said!r}"
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        if time.monotonic() - started > SLOW:
            found = f"took {time.monotonic() - started:.0f} s"
        if found:
            findings.append(f"case {count} ({kind}): {found}")
            if keep:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, Path(keep) / f"{count}.{path.name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kept = tempfile.mkdtemp(prefix="kalm-fuzz-")
    with tempfile.TemporaryDirectory() as work:
        count, accepted, findings = fuzz(60 * options.minutes, options.seed, work, kept)
    print(f"{count} cases, {accepted} of them read, {len(findings)} findings", *findings[:50], f"files of findings: {kept}", sep="\n")
    sys.exit(bool(findings))
