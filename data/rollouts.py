"""Rollouts on disk: Hugging Face datasets of rollout records (`env.rollout_record`), one row a rollout, checked when they are read.

The columns are described in data/README.md. Nothing here knows where a rollout comes from or what it is for.
"""
import datasets
import numpy as np

import env
from data import store

FEATURES = datasets.Features({
    "goal": datasets.Value("string"), "level": datasets.Value("string"), "kind": datasets.Value("string"),
    "relations": datasets.List(datasets.List(datasets.Value("string"))),
    "observations": datasets.List(datasets.List(datasets.Value("float32"))),
    "actions": datasets.List(datasets.Value("int64")), "rewards": datasets.List(datasets.Value("float32")),
    "success": datasets.Value("bool"), "states": datasets.List(datasets.List(datasets.Value("float64"))),
    "explanation": datasets.Value("string"), "dynamics_error": datasets.List(datasets.Value("float32"))})
OPTIONAL = ("states", "explanation", "dynamics_error")


def write_rollouts(path, records):
    """Write rollout records as a Hugging Face dataset folder, aside and then renamed."""
    columns = {k: [v.tolist() if isinstance(v := r.get(k), np.ndarray) else v for r in records] for k in FEATURES}
    with store.replacing(path) as aside:
        datasets.Dataset.from_dict(columns, features=FEATURES).save_to_disk(str(aside))


def read_rollouts(path):
    """Rollout records of a dataset folder, checked: shapes, finite numbers, actions in range, goals that can be judged.

    `states` are left on disk. Raises ValueError that names the folder, the row and the field.
    """
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"{path} is not a rollouts dataset ({str(error).splitlines()[0]})") from None
    needed = [name for name in FEATURES if name not in OPTIONAL]
    missing = [name for name in needed if name not in data.column_names]
    if missing:
        raise ValueError(f"{path}: column {missing[0]!r} is missing; data/README.md describes the format")
    records = data.select_columns([*needed, *(c for c in OPTIONAL[1:] if c in data.column_names)]).to_list()
    for number, record in enumerate(records):
        try:
            record["observations"] = np.array(record["observations"], np.float32).reshape(len(record["observations"]) or 1, -1)
            record["actions"] = np.array(record["actions"], np.int64)
            record["rewards"] = np.array(record["rewards"], np.float32)
            if record.get("dynamics_error") is not None:
                record["dynamics_error"] = np.array(record["dynamics_error"], np.float32)
            check_record(record)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, row {number}: {error}") from None
    if not records:
        raise ValueError(f"{path}: the dataset has no rows")
    return records


def check_record(record):
    """Raise ValueError that says what is wrong with a rollout record, if anything is."""
    steps = len(record["actions"])
    if steps == 0:
        raise ValueError("a rollout needs at least one action")
    for field, shape in (("observations", (steps + 1, env.OBSERVATION_DIM)), ("rewards", (steps,))):
        if record[field].shape != shape:
            raise ValueError(f"{field} must have shape {shape} for {steps} actions, got {record[field].shape}")
        if not np.isfinite(record[field]).all():
            raise ValueError(f"{field} has NaN or infinite values")
    if record["actions"].min() < 0 or record["actions"].max() >= env.NUM_ACTIONS:
        raise ValueError(f"actions must be in 0..{env.NUM_ACTIONS - 1}, got {record['actions'].min()}..{record['actions'].max()}")
    if not isinstance(record["success"], bool):
        raise ValueError(f"success must be true or false, got {record['success']!r}")
    env.goal_of(record)
