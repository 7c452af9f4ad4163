"""Rollouts of other people and for other people: the authors' .npy, ImagineBench's arrays (.npy, .npz), Minari, our folders.

Every reader ends in `env.rollout_record`: success and rewards are judged here, whatever a file says, and where it says
otherwise that is counted. Files are read as data: no unpickling (see pickled.py), no links followed, no array larger
than the file can hold. This file knows nothing of learning or of stages.
"""
import collections
import hashlib
import json
import math
import re
import shutil
import tempfile
import tokenize
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np

import env
from data import pickled, rollouts

LARGEST = 8 * 2 ** 30   # bytes of arrays that are read from one file
LEAST = 3               # rollouts: two are held out, one is learned from
REACH = 2.0             # metres: further out no ball can be seen
REWARD_TOLERANCE = 0.01
FIELDS = ("observations", "next_observations", "actions", "rewards", "terminals", "masks", "instructions", "goals", "level", "kind",
          "relations", "imagined", "states", "explanations", "dynamics_error")

# ------------------------------------------------------------------------------------------------------------------
# Reading


def read(path, seed=0):
    """Rollout records of a file or folder in any format above, judged anew, and a Counter of what was odd:

    "contradicted", rollouts whose recorded rewards or terminals the judge contradicts; "completed", those whose last state
    was not recorded and is the physics' answer to the last action. seed: draws one of several instructions.
    Raises ValueError that names the file, the row and the field.
    """
    path = Path(path)
    if (path / "state.json").is_file() or (path / "dataset_info.json").is_file():
        recordings = own_recordings(path)
    elif path.is_dir():
        recordings = minari_recordings(path)
    elif path.is_file() and path.suffix in (".npy", ".npz"):
        recordings = array_recordings(path, arrays_of(path), seed)
    else:
        raise ValueError(f"{path} is no recording; give a rollouts dataset folder, a Minari dataset folder, an .npy or an .npz file"
                         if path.exists() else f"{path}: no such file or folder")
    records, odd = [], collections.Counter(contradicted=0, completed=0)
    for row, recording in enumerate(recordings):
        try:
            record, contradicted = judged(recording)
        except ValueError as error:
            raise ValueError(f"{path}, row {row}: {error}") from None
        records.append(record)
        odd["contradicted"] += contradicted
        odd["completed"] += recording.get("completed", False)
    if not records:
        raise ValueError(f"{path}: no rollouts in it; a recording needs at least one")
    return records, odd


def read_offline(path, seed=0):
    """Rollouts to learn from: those of a recording that fulfil their goal, and a sentence about them.

    Raises ValueError as `read` does, and for what offline data cannot have: novel levels, goals other than one relation,
    rollouts longer than an episode, balls out of reach, fewer than LEAST rollouts that fulfil their goal.
    """
    records, odd = read(path, seed)
    for row, record in enumerate(records):
        if (record["level"], record["kind"]) != ("offline", "relation"):
            raise ValueError(f"{path}, row {row}: level {record['level']!r}, kind {record['kind']!r}; rollouts to learn from are of level "
                             "'offline', kind 'relation'; novel goals go into --goals")
        if len(record["actions"]) > env.MAX_STEPS:
            raise ValueError(f"{path}, row {row}: actions has {len(record['actions'])} steps; an episode has at most {env.MAX_STEPS}")
        try:
            check_reach(record["observations"])
        except ValueError as error:
            raise ValueError(f"{path}, row {row}: {error}") from None
    kept = [r for r in records if r["success"]]
    if len(kept) < LEAST:
        raise ValueError(f"{path}: {len(kept)} of {len(records)} rollouts fulfil their goal; at least {LEAST} are needed")
    sentence = f"{len(kept)} of {len(records)} rollouts of {path} fulfil their goal and are kept"
    if odd["contradicted"]:
        sentence += f"; in {odd['contradicted']} the recorded rewards or terminals are not the judge's, who was believed"
    if odd["completed"]:
        sentence += f"; in {odd['completed']} the state after the last action was not recorded and is the physics'"
    return kept, sentence


def content_hash(path):
    """SHA-256 of a file, or of all files of a folder with their names. Raises ValueError if there is none."""
    path, digest = Path(path), hashlib.sha256()
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as stream:
            while block := stream.read(2 ** 20):
                digest.update(block)
    return digest.hexdigest()


def judged(recording):
    """(rollout record, whether the recorded rewards or terminals contradict it) of a recording:

    goal: Goal; observations (T+1, 10 or more); actions (T,); and where known rewards (T,), terminals (T,), states (T+1, 69),
    imagined, explanation, dynamics_error (T,).
    """
    goal, imagined = recording["goal"], recording.get("imagined", False)
    actions = whole_actions(recording["actions"])
    steps = len(actions)
    observations = numbers("observations", recording["observations"], (steps + 1, None))[:, :env.OBSERVATION_DIM].astype(np.float32)
    states = recording.get("states")
    record = env.rollout_record(goal, observations, actions, imagined=imagined, states=None if states is None else numbers(
        "states", states, (steps + 1, env.STATE_DIM)).astype(np.float64))
    if recording.get("dynamics_error") is not None:
        record["dynamics_error"] = numbers("dynamics_error", recording["dynamics_error"], (steps,)).astype(np.float32)
    if recording.get("explanation") is not None:
        record["explanation"] = str(recording["explanation"])
    rollouts.check_record(record)
    contradicted = False
    if recording.get("rewards") is not None:
        recorded = numbers("rewards", recording["rewards"], (steps,))
        contradicted = bool((np.abs(recorded - record["rewards"]) > REWARD_TOLERANCE).any())
    if recording.get("terminals") is not None:
        ended = numbers("terminals", recording["terminals"], (steps,)) != 0
        contradicted |= bool((ended != env.success(goal, observations[:-1], observations[1:], actions, imagined)).any())
    return record, contradicted


def numbers(field, values, shape):
    """Values as an array of finite numbers of a shape; None stands for any size, at least that of an observation."""
    values = np.asarray(values)
    fits = values.ndim == len(shape) and all(
        have >= env.OBSERVATION_DIM if want is None else have == want for have, want in zip(values.shape, shape))
    if not fits:
        wanted = ", ".join(f"{env.OBSERVATION_DIM} or more" if n is None else str(n) for n in shape)
        raise ValueError(f"{field} must have shape ({wanted}), got {values.shape}")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{field} must be numbers, got type {values.dtype}")
    if not np.isfinite(values).all():
        raise ValueError(f"{field} has NaN or infinite values")
    if field != "states" and values.size and np.abs(values.astype(np.float64)).max() > 1e30:
        raise ValueError(f"{field} has values beyond 1e30")
    return values


def whole_actions(values):
    """Actions as int64. Raises ValueError unless they are one or more whole numbers in 0..39."""
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iuf":
        raise ValueError(f"actions must be one whole number a step, got shape {values.shape}, type {values.dtype}")
    if len(values) == 0:
        raise ValueError("actions is empty; a rollout needs at least one action")
    if not np.isfinite(values).all() or (values != np.floor(values)).any():
        raise ValueError("actions must be whole numbers, and some are not")
    if values.min() < 0 or values.max() >= env.NUM_ACTIONS:
        raise ValueError(f"actions must be in 0..{env.NUM_ACTIONS - 1}, got {values.min()}..{values.max()}")
    return values.astype(np.int64)


def check_reach(observations):
    if np.abs(observations).max() > REACH:
        raise ValueError(f"observations reach {np.abs(observations).max():.3g}; they are metres, at most {REACH} from the middle")


def relation_of_text(text):
    """The relation goal of a plain sentence that names two balls and one direction, in the order ball, direction, other ball.

    All the authors' sentences are of this kind. Raises ValueError for any other text.
    """
    words = re.findall(r"[a-z]+", text.lower())
    named = [word for word in words if word in env.COLORS or word in env.DIRECTIONS]
    if len(named) != 3 or named[0] not in env.COLORS or named[1] not in env.DIRECTIONS or named[2] not in env.COLORS:
        raise ValueError(f"instructions: cannot tell ball, direction and other ball from {text[:80]!r}, so the rollout cannot be judged; "
                         "add the field 'relations' (data/README.md)")
    ball, direction, other = named
    return env.Goal(text, relations=((env.COLORS.index(ball), env.COLORS.index(other), env.DIRECTIONS.index(direction)),))


def goal_of_fields(text, level="offline", kind="relation", relations=None):
    """Goal from plain fields; relations is JSON text as in a goals file, or None to read it from the sentence."""
    if relations is None:
        return relation_of_text(text)
    try:
        return env.Goal.from_json({"text": text, "level": level, "kind": kind, "relations": json.loads(relations)})
    except (json.JSONDecodeError, RecursionError):
        raise ValueError("relations is not JSON; write [[\"red\", \"blue\", \"behind\"]]") from None


# ------------------------------------------------------------------------------------------------------------------
# Our own folders

def own_recordings(path):
    """Rows of a rollouts dataset folder, with their states."""
    for record, states in zip(rollouts.read_rollouts(path), own_states(path), strict=True):
        yield {**record, "goal": env.goal_of(record), "states": states, "imagined": record["level"] != "offline"}


def own_states(path):
    """The states of a rollouts dataset folder: an array (T+1, 69) for each row, None where they are unknown."""
    data = datasets.load_from_disk(str(path))
    if "states" not in data.column_names:
        return [None] * len(data)
    found = []
    for chunk in data.select_columns("states").with_format("arrow").iter(1000):
        column = chunk["states"].combine_chunks()
        flat, lengths = column.flatten().flatten().to_numpy(zero_copy_only=False), column.value_lengths().to_pylist()
        if len(flat) != sum(n or 0 for n in lengths) * env.STATE_DIM:
            raise ValueError(f"{path}: column 'states' must have {env.STATE_DIM} numbers a state")
        parts = iter(np.split(flat.reshape(-1, env.STATE_DIM), np.cumsum([n for n in lengths if n is not None])[:-1]))
        found += [None if n is None else next(parts) for n in lengths]
    return found


# ------------------------------------------------------------------------------------------------------------------
# Dicts of arrays: the authors' .npy, ImagineBench's .npy and .npz

def arrays_of(path):
    """{field: array} of an .npy or .npz file, of the fields in FIELDS. Raises ValueError that names the file."""
    try:
        if path.suffix == ".npz":
            return npz_arrays(path)
        with open(path, "rb") as stream:
            shape, _, dtype = npy_header(stream)
            if dtype != object or shape != ():
                raise ValueError("it holds a single array; a recording is a dict of arrays")
            found = pickled.read(stream.read())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: it holds a {type(found).__name__}; a recording is a dict of arrays")
    return {name: as_array(path, name, found[name]) for name in FIELDS if name in found}


def as_array(path, name, value):
    """A field of a pickled dict as an array; lists of numbers or texts are taken too."""
    if isinstance(value, list) and value and all(type(v) is str for v in value):
        return np.array(value, object)
    if isinstance(value, list) and all(type(v) in (int, float, bool) for v in value):
        value = np.array(value)
    if not isinstance(value, np.ndarray) or value.dtype == object and any(type(v) is not str for v in value.flat):
        raise ValueError(f"{path}: field {name!r} is a {type(value).__name__}; it must be an array of numbers or texts")
    return value


def npy_header(stream):
    """(shape, Fortran order?, dtype) at the head of an .npy file."""
    try:
        version = np.lib.format.read_magic(stream)
        return {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version](stream)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        raise ValueError("it is no .npy file, or its header is damaged") from None


def npz_arrays(path):
    """The known fields of an .npz file, each no larger than the zip says, all together no larger than LARGEST."""
    arrays, left = {}, LARGEST
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            for name in FIELDS:
                size = sizes.get(f"{name}.npy")
                if size is None:
                    continue
                left -= size
                if left < 0:
                    raise ValueError(f"field {name!r} would take the arrays past {LARGEST >> 30} GiB")
                with archive.open(f"{name}.npy") as stream:
                    arrays[name] = npy_array(stream, name, size)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"damaged, or not as numpy writes it ({type(error).__name__})") from None
    return arrays


def npy_array(stream, name, size):
    """An array of numbers or texts from a stream of `size` bytes, which must be just as many as its header says."""
    shape, fortran, dtype = npy_header(stream)
    if dtype.kind not in "biufSU":
        raise ValueError(f"field {name!r} has type {dtype}; only numbers and texts are read")
    wanted = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or wanted > size or dtype.itemsize == 0 or len(shape) > 32:
        raise ValueError(f"field {name!r} is to be {shape} of {dtype}, more than its {size} bytes")
    content = stream.read(wanted)
    if len(content) < wanted:
        raise ValueError(f"field {name!r} is cut short")
    return pickled.array_over(content, dtype, shape, "F" if fortran else "C")


def array_recordings(path, arrays, seed):
    """Rows of a dict of arrays (N, T, ...), padded to T steps; `masks` says which are real.

    Each row's goal is in `relations` or `goals`, else in the text of `instructions`; of several texts one is drawn.
    """
    for name in ("observations", "actions", "masks"):
        if name not in arrays:
            raise ValueError(f"{path}: field {name!r} is missing; data/README.md describes the format")
    if "instructions" not in arrays:
        if "goals" in arrays or "relations" in arrays:
            raise ValueError(f"{path}: field 'instructions' is missing: a goal needs its text")
        raise ValueError(f"{path}: no goal texts (field 'instructions') and no relations ('goals' or 'relations'), so no rollout can be "
                         "judged; ImagineBench's encoding alone does not tell the goal, add its texts")
    shape = arrays["masks"].shape
    if len(shape) != 2:
        raise ValueError(f"{path}: masks must have shape (rollouts, steps), got {shape}")
    for name, array in arrays.items():
        if name in ("actions", "rewards", "terminals") and array.shape == (*shape, 1):
            arrays[name] = array = array[..., 0]
        ends = shape[1] + (name == "states"), shape[1] + (name == "observations")
        per_step = name not in ("instructions", "level", "kind", "relations", "imagined", "explanations")
        if array.shape[:1] != shape[:1] or per_step and (array.ndim < 2 or array.shape[1] not in (shape[1], *ends)):
            raise ValueError(f"{path}: {name} has shape {array.shape}, masks {shape}; both begin with rollouts, steps")
    rng = np.random.default_rng(seed)
    for row, mask in enumerate(arrays["masks"]):
        try:
            yield array_recording({name: array[row] for name, array in arrays.items()}, mask, rng)
        except ValueError as error:
            raise ValueError(f"{path}, row {row}: {error}") from None


def array_recording(fields, mask, rng):
    """One row of a dict of arrays as a recording, see `judged`."""
    mask = numbers("masks", mask, mask.shape)
    steps = int((mask != 0).sum())
    if not np.isin(mask, (0, 1)).all() or (mask[:steps] == 0).any():
        raise ValueError("masks must be ones for the steps of the rollout, then zeros")
    texts = np.atleast_1d(fields["instructions"])
    if texts.ndim != 1 or len(texts) == 0 or texts.dtype.kind not in "SUO":
        raise ValueError(f"instructions must be texts, one or several a rollout, got shape {texts.shape}, type {texts.dtype}")
    text = plain_text("instructions", texts[rng.integers(len(texts))])
    if "goals" in fields:
        goal = env.Goal(text, relations=(relation_of_code(fields["goals"]),))
    else:
        named = {name: plain_text(name, fields[name]) for name in ("level", "kind", "relations") if name in fields}
        goal = goal_of_fields(text, **named)
    actions, observations = fields["actions"][:steps], fields["observations"]
    recording = {"goal": goal, "actions": actions, "imagined": bool(fields.get("imagined", False)),
                 **{name: fields[name][:steps] for name in ("rewards", "terminals", "dynamics_error") if name in fields}}
    if "states" in fields and len(fields["states"]) == len(mask) + 1 and not unknown(fields["states"]):
        recording["states"] = fields["states"][:steps + 1]
    if "explanations" in fields and (said := plain_text("explanations", fields["explanations"])):
        recording["explanation"] = said
    if "dynamics_error" in recording and unknown(recording["dynamics_error"]):
        del recording["dynamics_error"]
    if len(observations) == len(mask) + 1 or steps == 0:
        return {**recording, "observations": observations[:steps + 1]}
    before = numbers("observations", observations[:steps], (steps, None))[:, :env.OBSERVATION_DIM]
    if "next_observations" in fields:
        after = numbers("next_observations", fields["next_observations"][:steps], (steps, None))[:, :env.OBSERVATION_DIM]
        if (np.abs(after[:-1] - before[1:]) > 1e-4).any():
            raise ValueError("next_observations of a step are not the observations of the step after it")
        return {**recording, "observations": np.concatenate([before, after[-1:]])}
    check_reach(before)
    last = whole_actions(actions)[-1:]
    reached = env.observe(env.step_batch(env.state_from_observation(before[-1:]), last))
    return {**recording, "observations": np.concatenate([before, reached]), "completed": True}


def unknown(values):
    """Whether the numbers of a rollout are NaN throughout, which stands for a field that it does not have."""
    return values.dtype.kind == "f" and bool(np.isnan(values).all())


def plain_text(field, value):
    """An element of an array of texts as a string."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise ValueError(f"{field} must be a text, got {type(value).__name__}")
    return str(value)


def relation_of_code(code):
    """(ball, other, direction) of the authors' `goals` of one rollout, (steps, 6): per ball 0, 1 (moved) or 2 (the other), then

    the direction.
    """
    code = numbers("goals", code, code.shape)
    if code.ndim != 2 or code.shape[1] != len(env.COLORS) + 1 or (code != code[:1]).any():
        raise ValueError(f"goals must be {len(env.COLORS) + 1} numbers, the same at each step, got shape {code.shape}")
    *balls, direction = code[0].tolist()
    if sorted(balls) != [0, 0, 0, 1, 2] or direction not in range(len(env.DIRECTIONS)):
        raise ValueError(f"goals must mark one ball with 1, one with 2 and end in a direction 0..3, got {code[0].tolist()}")
    return balls.index(1), balls.index(2), int(direction)


# ------------------------------------------------------------------------------------------------------------------
# Minari (HDF5)

def hdf5():
    """The h5py module. Raises ValueError that says how to get it."""
    try:
        import h5py
    except ImportError:
        raise ValueError("Minari datasets need the package h5py, which is not installed; `pip install h5py`") from None
    return h5py


def minari_recordings(path):
    """Episodes of a Minari dataset folder as recordings. A goal is in an episode's attributes: `goal` (the text) and, unless the

    text tells it, `level`, `kind` and `relations` (JSON), as `write_minari` writes them.
    """
    folder = path / "data" if (path / "data").is_dir() else path
    try:
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        count, kind = metadata["total_episodes"], metadata["data_format"]
    except FileNotFoundError:
        raise ValueError(f"{path} is no dataset: neither state.json of a rollouts dataset nor metadata.json of a Minari one") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{folder / 'metadata.json'} is not the metadata of a Minari dataset") from None
    if kind != "hdf5" or type(count) is not int:
        raise ValueError(f"{folder / 'metadata.json'}: total_episodes {str(count)[:20]!r} and data_format {str(kind)[:20]!r}; they must be "
                         "a number and 'hdf5'")
    h5py = hdf5()
    try:
        with h5py.File(folder / "main_data.hdf5", "r") as file:
            left = LARGEST
            for row in range(count):
                try:
                    recording, size = minari_recording(h5py, file, f"episode_{row}", left)
                except ValueError as error:
                    raise ValueError(f"{path}, row {row}: {error}") from None
                left -= size
                yield recording
    except (OSError, RuntimeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{folder / 'main_data.hdf5'}: the HDF5 file is damaged or missing ({type(error).__name__})") from None


def minari_recording(h5py, file, name, limit):
    """(recording, bytes read) of an episode group; links to other files are not followed."""
    episode, size, found = plain_member(h5py, file, name, h5py.Group), 0, {}
    for field, key in (("observations", "observations"), ("actions", "actions"), ("rewards", "rewards"), ("terminals", "terminations"),
                       ("states", "infos/state")):
        group = episode
        for part in key.split("/")[:-1]:
            group = plain_member(h5py, group, part, h5py.Group) if group is not None and part in group else None
        part = key.split("/")[-1]
        if group is None or part not in group:
            if field in ("observations", "actions"):
                raise ValueError(f"{field} is missing")
            continue
        data = plain_member(h5py, group, part, h5py.Dataset)
        if data.external is not None or data.is_virtual or data.dtype.kind not in "biuf" or data.size * data.dtype.itemsize > limit - size:
            raise ValueError(f"{field} is in another file, not numbers, or larger than {LARGEST >> 30} GiB; refused")
        size += data.size * data.dtype.itemsize
        found[field] = data[()]
    attributes = {key: episode.attrs[key] for key in ("goal", "level", "kind", "relations", "explanation", "dynamics_error", "imagined")
                  if key in episode.attrs}
    if "goal" not in attributes:
        raise ValueError("the episode has no attribute 'goal', its text, so it cannot be judged")
    named = {key: plain_text(key, attributes.pop(key)) for key in ("goal", "level", "kind", "relations") if key in attributes}
    found["goal"] = goal_of_fields(named.pop("goal"), **named)
    return {**found, **attributes, "imagined": bool(attributes.get("imagined", False))}, size


def plain_member(h5py, group, name, kind):
    """A group or dataset that is in the file itself."""
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink) or not isinstance(member := group[name], kind):
        raise ValueError(f"{name} is missing or is a link out of its place; refused")
    return member


# ------------------------------------------------------------------------------------------------------------------
# Writing

def export(run, kinds, encode):
    """Every rollouts folder of a run in other formats -> RUN/export: SOURCE.npz and Minari datasets kalm/SOURCE-v0.

    encode: function from texts to their encodings (texts, E), which go behind the observations in .npz files.
    """
    folder = Path(run) / "export"
    for source in sorted(p for p in (Path(run) / "rollouts").iterdir() if (p / "state.json").is_file()):
        records, _ = read(source)
        imagined = source.name != "real"
        if "npz" in kinds:
            write_npz(folder / f"{source.name}.npz", records, encode, imagined)
        if "minari" in kinds:
            write_minari(folder / "kalm" / f"{source.name}-v0", records, imagined)


def write_npz(path, records, encode=None, imagined=False):
    """Records as a dict of arrays, padded to the longest rollout; observations end in the goal text's encoding, if there is one."""
    count, steps = len(records), max(len(r["actions"]) for r in records)
    encodings = np.zeros((count, 0), np.float32) if encode is None else np.asarray(encode([r["goal"] for r in records]), np.float32)

    def padded(field, length, width=(), dtype=np.float32, unknown=0):
        array = np.zeros((count, length, *width), dtype)
        for row, record in enumerate(records):
            values = record.get(field)
            array[row, :0 if values is None else len(values)] = 0 if values is None else values
            if values is None:
                array[row] = unknown
        return array

    lengths = np.array([len(r["actions"]) for r in records])
    real = np.arange(steps) < lengths[:, None]
    fields = {"actions": padded("actions", steps, dtype=np.int64), "rewards": padded("rewards", steps), "masks": real.astype(np.int32),
              "terminals": real & (np.arange(steps) == lengths[:, None] - 1) & np.array([r["success"] for r in records])[:, None],
              "instructions": np.array([r["goal"] for r in records]), "level": np.array([r["level"] for r in records]),
              "kind": np.array([r["kind"] for r in records]), "relations": np.array([json.dumps(r["relations"]) for r in records]),
              "imagined": np.full(count, imagined)}
    if any(r.get("states") is not None for r in records):
        fields["states"] = padded("states", steps + 1, (env.STATE_DIM,), np.float64, np.nan)
    if any(r.get("explanation") is not None for r in records):
        fields["explanations"] = np.array([r.get("explanation") or "" for r in records])
        fields["dynamics_error"] = padded("dynamics_error", steps, unknown=np.nan)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, width in (("observations", encodings.shape[1]), ("next_observations", 0)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_2_0(stream, {
                    "descr": "<f4", "fortran_order": False, "shape": (count, steps, env.OBSERVATION_DIM + width)})
                for row, record in enumerate(records):  # one at a time: with encodings the array is large
                    block = np.zeros((steps, env.OBSERVATION_DIM + width), "<f4")
                    own = record["observations"][:-1] if name == "observations" else record["observations"][1:]
                    block[:len(own), :env.OBSERVATION_DIM] = own
                    block[:, env.OBSERVATION_DIM:] = encodings[row, :width]
                    stream.write(block.tobytes())
        for name, array in fields.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
    aside.replace(path)


def write_minari(folder, records, imagined=False):
    """Records as a Minari dataset folder; its name ends in -v0, and Minari finds it below $MINARI_DATASETS_PATH."""
    h5py, folder = hdf5(), Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=folder.name + ".partial", dir=folder.parent))
    data = aside / "data"
    data.mkdir()
    with h5py.File(data / "main_data.hdf5", "w", track_order=True) as file:
        for row, record in enumerate(records):
            episode, steps = file.create_group(f"episode_{row}"), len(record["actions"])
            last = np.arange(steps) == steps - 1
            episode.attrs.update({"id": row, "total_steps": steps, "goal": record["goal"], "level": record["level"], "kind": record["kind"],
                                  "relations": json.dumps(record["relations"]), "imagined": imagined})
            episode.attrs.update({k: record[k] for k in ("explanation", "dynamics_error") if record.get(k) is not None})
            for name, values in (("observations", record["observations"]), ("actions", record["actions"]), ("rewards", record["rewards"]),
                                 ("terminations", last & record["success"]), ("truncations", last & (not record["success"]))):
                episode.create_dataset(name, data=values)
            infos = episode.create_group("infos")
            if record.get("states") is not None:
                infos.create_dataset("state", data=record["states"])
    seen = {"type": "Box", "dtype": "float32", "shape": [env.OBSERVATION_DIM], "low": [-REACH] * env.OBSERVATION_DIM,
            "high": [REACH] * env.OBSERVATION_DIM}
    (data / "metadata.json").write_text(json.dumps({
        "total_episodes": len(records), "total_steps": sum(len(r["actions"]) for r in records), "data_format": "hdf5",
        "observation_space": json.dumps(seen), "action_space": json.dumps({"type": "Discrete", "dtype": "int64", "start": 0,
                                                                           "n": env.NUM_ACTIONS}),
        "dataset_id": f"{folder.parent.name}/{folder.name}", "minari_version": "0.5.3", "jpeg_encoding": False,
        "dataset_size": round((data / "main_data.hdf5").stat().st_size / 1e6, 1), "author": ["KALM"],
        "description": "CLEVR-Robot rollouts, real or imagined by a language model; each episode has its goal's text as an attribute"}),
        encoding="utf-8")
    aside.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
