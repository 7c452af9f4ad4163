"""A run's folder: files written whole or not at all, what is done and from what, one process at a
time.

manifest.json lists the finished stages with their settings and the checksums of their files.
Nothing here knows what a stage does or what its files mean; nothing here imports other parts of the
project.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock

# ----------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """`with replacing(path) as aside:` write a file or folder to `aside`; at the end it takes the
    place of `path`.

    If the block fails or the process is killed, what was at `path` stays. A killed process may
    leave `aside` behind,
    which the next `replacing` deletes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    remove(aside)
    try:
        yield aside
        _flush(aside)
        if path.is_dir():
            remove(
                path
            )  # a folder cannot be replaced in one step; its stage counts as undone without it
        os.replace(aside, path)
    finally:
        remove(aside)


def _flush(path):
    """Wait until a file, or all files of a folder, are on the disk and not in memory alone."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """JSON, written aside and renamed."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_json(path: Path, **entry) -> None:
    """Append one JSON object, with the time (Unix, s), to a file of JSON lines that others may
    follow.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": round(time.time(), 1), **entry}, ensure_ascii=False)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_room(folder: Path, needed: float, what: str) -> None:
    """Raise OSError unless so many bytes are free where a folder is."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{what} writes about {needed / 1e6:.3g} MB to {folder}, where {free / 1e6:.3g} MB are "
            "free; make room, or give another --output_dir"
        )


# ----------------------------------------------------------------------------------------------
# The folder of a run


class Manifest:
    """manifest.json of a run: {stage: {fingerprint, run, settings, inputs, time_s, files}} of what
    is done.

    Raises ValueError where the folder is a file, or has files but no manifest, or a broken one.
    """

    def __init__(self, run: Path):
        self.run = run
        self.stages = {}
        if run.exists() and not run.is_dir():
            raise ValueError(f"--output_dir {run} is a file; give a folder")
        self.read()

    def read(self) -> None:
        """Take up what is in the file."""
        path = self.run / "manifest.json"
        if not path.is_file():
            files = {file.name for file in self.run.glob("*")} - LEFT_AT_ONCE
            if files:
                raise ValueError(
                    f"--output_dir {self.run} has files but no manifest.json, so it is not a KALM "
                    "run; give a new folder"
                )
            return
        try:
            self.stages = read_json(path)["stages"]
            for record in self.stages.values():
                for part in ("run", "settings", "files"):
                    record[part].items()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path} is not a manifest of a KALM run as this code writes it; give another "
                "--output_dir"
            ) from None

    def fingerprint(self, name: str, settings: dict, reads: Sequence[str]) -> str:
        """Hash of what a stage's result follows from: its settings, and the stages it reads."""
        read = {stage: self.stages.get(stage, {}).get("fingerprint") for stage in reads}
        text = json.dumps([name, settings, read], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def is_done(self, name: str, fingerprint: str) -> bool:
        """Whether a stage was finished with this fingerprint, and its files are still there."""
        record = self.stages.get(name, {})
        files = [self.run / file for file in record.get("files", {})]
        return record.get("fingerprint") == fingerprint and all(file.is_file() for file in files)

    def begin(self, work: Path, anew: bool) -> None:
        """Make the folder of what a stage has not finished. Those of other settings are deleted,
        and with anew what an earlier try left in this one.
        """
        if not (self.run / "manifest.json").is_file():
            self._write()
        for other in work.parent.glob("*"):
            if anew or other != work:
                remove(other)
        work.mkdir(parents=True, exist_ok=True)

    def note(self, name: str, writes: Iterable[str]) -> None:
        """Note a finished stage with the checksums of what it wrote; what was unfinished goes."""
        for written in writes:
            for path in sorted([self.run / written, *(self.run / written).rglob("*")]):
                if path.is_file():
                    file = path.relative_to(self.run).as_posix()
                    self.stages[name]["files"][file] = sha256(path)
        self._write()
        remove(self.run / UNFINISHED)

    def _write(self):
        content = {"format": "kalm-run", "version": 2, "stages": self.stages}
        write_json(self.run / "manifest.json", content)

    def check_files(self, names: Iterable[str]) -> None:
        """Raise ValueError, naming file and stage, where a file is not as its stage wrote it."""
        for name in names:
            for file, digest in self.stages[name]["files"].items():
                path = self.run / file
                problem = None
                if not path.resolve().is_relative_to(self.run.resolve()):
                    problem = "is outside of the folder"
                elif not path.is_file():
                    problem = "is missing"
                elif sha256(path) != digest:
                    problem = "has changed"
                if problem:
                    raise ValueError(
                        f"{self.run}: {file} {problem} since stage {name!r} wrote it; redo it with "
                        f"`--stage {name} --force`"
                    )


LEFT_AT_ONCE = {".lock", "manifest.json.partial"}  # all that a run that was killed at once leaves
UNFINISHED = "unfinished"


def begin_stretch(work: Path) -> float:
    """Note that work on an unfinished stage begins. Returns the seconds that earlier stretches of
    it took.

    A stretch that was killed lasted until the last file that it wrote: what came after is done
    again.
    """
    path = work / "stretches.json"
    earlier = 0.0
    if path.is_file():
        before = read_json(path)
        last_write = max(file.stat().st_mtime for file in work.rglob("*") if file.is_file())
        earlier = before["earlier"] + max(0.0, last_write - before["began"])
    write_json(path, {"earlier": earlier, "began": time.time()})
    return earlier


@contextlib.contextmanager
def locked(run: Path, mine: bool = True) -> Iterator[None]:
    """Hold a run folder, made if need be, while the block runs. Raises ValueError if another
    process holds it.

    The lock ends with the process, however it ends; a lock file left by a killed one is no
    obstacle.
    """
    if not mine:  # another process of this command holds it for all
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"{run} is in use by another process; wait for it, or give another --output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


# ----------------------------------------------------------------------------------------------
# A clean stop


def stop_cleanly() -> None:
    """Let Ctrl-C end this process with exit code 130 and SIGTERM with 143, after a sentence and no
    traceback.

    Nothing more is written then: every file is whole at any moment.
    """

    def stop(number, frame):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            name = signal.Signals(number).name
            os.write(2, f"\nkalm: stopped by {name}; the same command goes on\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
