"""Learning curves while they grow: JSON lines in the run's logs, and trackers through accelerate.

This file knows numbers with a step, and nothing of what they measure.
"""

import contextlib
import importlib.util
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from accelerate import tracking
from transformers import TrainerCallback

from experiment import folder

PROJECT = "kalm"  # under which trackers show the runs


def check_trackers(names: Sequence[str], logs: Path) -> None:
    """Raise ValueError for a tracker of --report_to that is unknown or not installed.

    Those that keep files keep them in logs, unless the user's environment says where.
    """
    if names:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(logs / "grounding"))
        os.environ.setdefault("WANDB_DIR", str(logs))
    for name in names:
        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            known = ", ".join(map(str, tracking.LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"--report_to {name}: unknown tracker; there are {known}, or none")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--report_to {name} needs the package {name}: pip install {name}")


class LogLines(TrainerCallback):
    """The Trainer's log as JSON lines, which after a kill begin with the checkpoint's log."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Begin the file anew."""
        if state.is_world_process_zero:
            folder.remove(self.path)
            for entry in state.log_history:
                folder.append_json(self.path, **entry)

    def on_log(self, args, state, control, **kwargs) -> None:
        """Append the newest entry."""
        if state.is_world_process_zero:
            folder.append_json(self.path, **state.log_history[-1])

    def on_save(self, args, state, control, **kwargs) -> None:
        """Note the checksums of weights, which safetensors files lack."""
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sums = {path.name: folder.sha256(path) for path in checkpoint.glob("*.safetensors")}
            folder.write_json(checkpoint / "sums.json", sums)


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that is whole and unchanged."""
    found = [path.parent for path in work.glob("checkpoint-*/trainer_state.json")]
    for checkpoint in sorted(found, key=lambda path: -int(path.name.rpartition("-")[2])):
        if _is_whole(checkpoint):
            return str(checkpoint)
    return None


def _is_whole(checkpoint):
    try:
        folder.read_json(checkpoint / "trainer_state.json")  # the Trainer writes it last
        for path in checkpoint.glob("*.pt*"):
            folder.check_zip(path)
        for path in checkpoint.glob("sums.json"):
            sums = folder.read_json(path)
            return all(folder.sha256(checkpoint / name) == found for name, found in sums.items())
        return True
    except (ValueError, OSError, zipfile.BadZipFile):
        return False


@contextlib.contextmanager
def curve(logs: Path, name: str, trackers: Sequence[str]) -> Iterator[Callable[[int, float], None]]:
    """A function log(step, loss) for trackers and LOGS/NAME.jsonl, which is begun anew."""
    path = logs / f"{name}.jsonl"
    folder.remove(path)
    started = [_start(tracker, logs, name) for tracker in trackers]

    def log(step, loss):
        folder.append_json(path, step=step, loss=loss)
        for tracker in started:
            tracker.log({f"{name}/loss": loss}, step=step)

    yield log
    for tracker in started:
        tracker.finish()


def _start(name, logs, run_name):
    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        tracker = kind(run_name, logs)
    else:
        options = {"reinit": "finish_previous"} if name == "wandb" else {}
        tracker = kind(PROJECT, name=run_name, **options)
    tracker.main_process_only = False  # each process learns methods of its own
    tracker.start()
    return tracker
