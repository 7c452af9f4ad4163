"""Rollouts on disk: Hugging Face dataset folders, one row a rollout, checked when they are read.

The columns are described in data/README.md; a row is a rollout record (`env.rollout_records`).
Nothing here knows where a rollout comes from or what it is for.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from datasets.table import table_cast

import env
from experiment import folder

TEXT = datasets.Value("string")
FLOATS = datasets.List(datasets.Value("float32"))
FEATURES = datasets.Features(
    goal=TEXT, level=TEXT, kind=TEXT, relations=datasets.List(datasets.List(TEXT)),
    observations=datasets.List(FLOATS), actions=datasets.List(datasets.Value("int64")),
    rewards=FLOATS, success=datasets.Value("bool"),
    states=datasets.List(datasets.List(datasets.Value("float64"))),
    explanation=TEXT, claims=FLOATS, dynamics_error=FLOATS,
)  # fmt: skip
OPTIONAL = ("states", "explanation", "claims", "dynamics_error")
ARRAYS = {"actions": np.int64, "states": np.float64}
ARRAYS |= dict.fromkeys(("observations", "rewards", "claims", "dynamics_error"), np.float32)


def terminals_of(record: dict) -> np.ndarray:
    """Where a rollout terminates, (T,): with its success. A limit of time is no terminal."""
    terminals = np.zeros(len(record["actions"]), bool)
    terminals[-1] = record["success"]
    return terminals


def write_rollouts(path: str | Path, records: Sequence[dict]) -> None:
    """Write rollout records as a Hugging Face dataset folder, aside and then renamed."""
    columns = {}
    for name in FEATURES:
        columns[name] = [record.get(name) for record in records]
    with folder.replacing(path) as aside:
        datasets.Dataset.from_dict(columns, features=FEATURES).save_to_disk(str(aside))


def read_rollouts(path: str | Path, world: env.World, with_states: bool = False) -> list[dict]:
    """Rollout records of a dataset folder, checked.

    States, which are large, stay on disk unless they are wanted. Types that can be cast to ours
    will do. Raises ValueError that names the folder, the row and the field.
    """
    with naming(f"{path} is not a rollouts dataset"):
        table = _read_table(path, with_states)
    records = []
    with naming(lambda: f"{path}, row {len(records)}"):
        for batch in table.to_batches(max_chunksize=1000):
            for record in batch.to_pylist():
                for name, dtype in ARRAYS.items():
                    if record.get(name) is not None:
                        record[name] = np.array(record[name], dtype)
                check_arrays(record, world)
                env.goal_from_json({**record, "text": record["goal"]}, world)
                records.append(record)
    return records


def _read_table(path, with_states):
    """The columns of a dataset folder that we know, in our types. Arrow data, and no code."""
    data = datasets.load_from_disk(str(path)).with_format("arrow")
    lacking = [name for name in OPTIONAL if name not in data.column_names]
    skipped = lacking if with_states else [*lacking, "states"]
    features = {name: FEATURES[name] for name in FEATURES if name not in skipped}
    table = data.select_columns(list(features))[:]
    table.validate(full=True)  # what Arrow believes of a damaged file can end the process
    if len(table) == 0:
        raise ValueError("it has no rows")
    columns = {}
    for name, feature in features.items():
        with naming(f"column {name!r}"):
            schema = datasets.Features({name: feature}).arrow_schema
            columns[name] = table_cast(table.select([name]), schema)[name]
    return pyarrow.table(columns)


@contextlib.contextmanager
def naming(where: str | Path | Callable[[], str]) -> Iterator[None]:
    """Whatever is raised in the block becomes a ValueError in one sentence that says where."""
    try:
        yield
    except Exception as error:  # libraries raise whatever they meet in a damaged file
        words = " ".join(str(error).split())[:300]
        if isinstance(error, ImportError):
            words += '; `pip install "minari[hdf5,arrow]"` has what these files need'
        elif not isinstance(error, (ValueError, OSError)):
            words = f"damaged, or not of its format ({type(error).__name__}: {words})"
        place = where() if callable(where) else where
        raise ValueError(f"{place}: {words}") from error


def check_arrays(arrays: dict, world: env.World) -> None:
    """Raise ValueError unless arrays have a record's shapes, are finite, and actions in range."""
    steps = np.size(arrays["actions"])
    if steps == 0:
        raise ValueError("actions are none; a rollout needs at least one action")
    shapes = dict.fromkeys(("actions", "rewards", "terminals", "dynamics_error"), (steps,))
    shapes["observations"] = (steps + 1, world.observation_dim)
    shapes["states"] = (steps + 1, world.state_dim)
    shapes["claims"] = (np.size(arrays.get("claims")),)
    for field, shape in shapes.items():
        values = arrays.get(field)
        if values is None and field in ("terminals", *OPTIONAL):
            continue
        if np.shape(values) != shape:
            raise ValueError(f"{field} must have shape {shape}, got {np.shape(values)}")
        if not np.isfinite(values).all():
            raise ValueError(f"{field} has NaN or infinite values")
    least, most = arrays["actions"].min(), arrays["actions"].max()
    if least < 0 or most >= world.num_actions:
        raise ValueError(f"actions must be in 0..{world.num_actions - 1}, got {least}..{most}")
