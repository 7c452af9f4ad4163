"""A run's folder: files written whole or not at all, and what is done from what.

manifest.json lists the finished stages with their settings and the checksums of their files.
Nothing here knows what a stage does or what files mean, nor imports other parts of the project.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock

LEFT_AT_ONCE = {".lock", "manifest.json.partial"}  # all that a run that was killed at once leaves
UNFINISHED = "unfinished"

# ----------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """`with replacing(path) as aside:` write a file or folder there; then it takes path's place.

    If the block fails or the process is killed, what was at `path` stays. What a killed process
    leaves aside, the next `replacing` deletes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    remove(aside)
    try:
        yield aside
        for file in [aside, *aside.rglob("*")]:
            if file.is_file():
                with open(file, "rb+") as stream:  # on the disk, not in memory alone
                    os.fsync(stream.fileno())
        if path.is_dir():  # cannot be replaced in one step: between two, its stage counts as undone
            remove(path)
        os.replace(aside, path)
    finally:
        remove(aside)


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Whatever a library raises in the block is an OSError in words where path's disk is full."""
    try:
        yield
    except Exception as error:
        if shutil.disk_usage(path).free < 2**17:  # bytes, in which a library's buffer may not fit
            raise OSError(f"No space left on the disk of {path} ({error})") from error
        raise


def write_json(path: Path, value) -> None:
    """JSON, written aside and renamed."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_json(path: Path, **entry) -> None:
    """Append a JSON object, with the time (Unix, s), to a file of lines that others may follow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": round(time.time(), 1), **entry}, ensure_ascii=False)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_zip(path: Path) -> None:
    """Raise an exception where what torch.save wrote has changed, as torch.load does not."""
    with zipfile.ZipFile(path) as archive:
        if changed := archive.testzip():
            raise ValueError(f"{path}: {changed} has changed")


# ----------------------------------------------------------------------------------------------
# The folder of a run


class Manifest:
    """manifest.json: {stage: {fingerprint, run, settings, inputs, time_s, files}} of what is done.

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
            if {file.name for file in self.run.glob("*")} - LEFT_AT_ONCE:
                found = f"--output_dir {self.run} has files but no manifest.json"
                raise ValueError(f"{found}, so it is not a KALM run; give a new folder")
            return
        try:
            self.stages = read_json(path)["stages"]
            for record in self.stages.values():
                for part in ("run", "settings", "files"):
                    record[part].items()
        except (ValueError, KeyError, TypeError, AttributeError):
            problem = f"{path} is not a manifest of a KALM run as this code writes it"
            raise ValueError(f"{problem}; give another --output_dir") from None

    def is_done(self, name: str, fingerprint: str) -> bool:
        """Whether a stage was finished with this fingerprint, and its files are still there."""
        record = self.stages.get(name, {})
        files = [self.run / file for file in record.get("files", {})]
        return record.get("fingerprint") == fingerprint and all(file.is_file() for file in files)

    def begin(self, work: Path, anew: bool) -> float:
        """Make the folder of what a stage has not finished; those of other settings, and with anew
        its own content, are deleted. Returns the seconds that killed tries at this stage took.

        A killed try lasted until the last file that it wrote: what came after is done again.
        """
        if not (self.run / "manifest.json").is_file():
            self._write()
        for other in work.parent.glob("*"):
            if anew or other != work:
                remove(other)
        work.mkdir(parents=True, exist_ok=True)
        path = work / "tries.json"
        earlier = 0.0
        if path.is_file():
            before = read_json(path)
            last_write = max(file.stat().st_mtime for file in work.rglob("*"))
            earlier = before["earlier"] + max(0.0, last_write - before["began"])
        write_json(path, {"earlier": earlier, "began": time.time()})
        return earlier

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
                    what = f"{self.run}: {file} {problem} since stage {name!r} wrote it"
                    raise ValueError(f"{what}; redo it with `--stage {name} --force`")


@contextlib.contextmanager
def locked(run: Path, mine: bool = True) -> Iterator[None]:
    """Hold a run folder while the block runs. Raises ValueError if another process holds it.

    mine: else another process of this command holds it for all. The lock ends with the process; a
    lock file left by a killed one is no obstacle.
    """
    if not mine:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(run / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        in_use = f"{run} is in use by another process"
        raise ValueError(f"{in_use}; wait for it, or give another --output_dir") from None


def stop_cleanly() -> None:
    """Let Ctrl-C end this process with exit code 130 and SIGTERM with 143, after one sentence.

    Nothing more is written then: every file is whole at any moment.
    """

    def stop(number, frame):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            name = signal.Signals(number).name
            os.write(2, f"\nkalm: stopped by {name}; the same command goes on\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
