"""Where a run writes what happens: JSON lines in its logs folder, and the trackers that --report_to names.

This file knows numbers with a step, and nothing of what they measure.
"""
import importlib.util
import json
import os
import time
from pathlib import Path

TRACKERS = ("none", "tensorboard", "wandb", "trackio")
PROJECT = "kalm"  # under which wandb and trackio show the runs


def check_trackers(report_to, folder=None):
    """The trackers of --report_to as a list; those that keep files keep them in the folder. Raises ValueError if one is not installed."""
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    if folder:
        os.environ["WANDB_DIR"] = str(Path(folder).absolute())
    wanted = [name for name in report_to.split(",") if name != "none"]
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--report_to {name} needs the package {name}: pip install {name}")
    return wanted


def write_line(path, **entry):
    """Append one JSON object, with the time (Unix, s), to a file of JSON lines, which readers may follow while it grows."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"time": round(time.time(), 1), **entry}, ensure_ascii=False) + "\n")


class Curve:
    """One learning curve: `log(step, loss)` appends to FOLDER/NAME.jsonl, begun anew, and tells the trackers (accelerate's)."""

    def __init__(self, folder, name, report_to="none"):
        self.path, self.name = Path(folder) / f"{name}.jsonl", name
        self.path.unlink(missing_ok=True)
        self.trackers = [_tracker(tracker, folder, name) for tracker in check_trackers(report_to)]

    def log(self, step, loss):
        write_line(self.path, step=step, loss=loss)
        for tracker in self.trackers:
            tracker.log({f"{self.name}/loss": loss}, step=step)

    def finish(self):
        for tracker in self.trackers:
            tracker.finish()


def _tracker(tracker, folder, name):
    from accelerate import tracking
    kind = tracking.LOGGER_TYPE_TO_CLASS[tracker]
    started = kind(name, folder) if kind.requires_logging_directory else kind(PROJECT, name=name, **(
        {"dir": str(folder), "reinit": "finish_previous"} if tracker == "wandb" else {}))
    started.main_process_only = False  # each process learns methods of its own
    started.start()
    return started
