"""Files that survive: written aside, synced and renamed; checksums, the lock of a run folder, free space, a clean stop.

Nothing here knows what the files mean. A reader sees the old file or folder or the new one, never half of one.
"""
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

# ------------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as aside:` write a file or folder to `aside`; at the end it takes the place of `path`.

    If the block fails, what was at `path` stays. If the process is killed at any moment, the old or the new one is there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    remove(aside)
    try:
        yield aside
        sync(aside)
        swap(aside, path)
        sync(path.parent, deep=False)
    finally:
        remove(aside)


def swap(aside, path):
    """Rename `aside` to `path`. A folder that is there already trades places with it, in one system call where Linux can."""
    if not path.is_dir():
        return os.replace(aside, path)
    if exchange(aside, path):
        return None
    old = path.with_name(path.name + ".replaced")  # `recover` puts it back if the next line is never reached
    remove(old)
    os.rename(path, old)
    os.rename(aside, path)
    return remove(old)


def exchange(one, other):
    """Let two paths trade their contents at once; False where the system or the file system cannot."""
    at_cwd, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        return ctypes.CDLL(None).renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), both) == 0
    except AttributeError:
        return False


def recover(folder):
    """Mend what a killed process left in a folder and those below: unfinished files go, a folder set aside comes back."""
    for old in Path(folder).rglob("*.replaced"):
        if not (path := old.with_suffix("")).exists():
            os.rename(old, path)
        remove(old)
    for aside in [*Path(folder).rglob("*.partial")]:
        remove(aside)


def remove(path):
    """Delete a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path, deep=True):
    """Wait until a file, or a folder with all below it, is on the disk and not in memory alone."""
    for place in (path, *(path.rglob("*") if deep and path.is_dir() else ())):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path, value):
    """JSON written aside and renamed, so that no reader sees half a file."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------------
# Checksums

def sha256(path):
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder, names):
    """{path below the folder: sha256} of every file that `names`, files or folders in it, have; those absent are left out."""
    files = [f for name in names for f in [folder / name, *(folder / name).rglob("*")] if f.is_file()]
    return {f.relative_to(folder).as_posix(): sha256(f) for f in sorted(files)}


def damaged(folder, known):
    """The first of `checksums` that does not hold any more, as 'NAME is missing' or 'NAME has changed'; None if all hold."""
    for name, digest in known.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{name} is outside of the folder"
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} has changed"
    return None


def seal(path):
    """Say that a file or folder is complete: its checksums in a file beside it."""
    sync(path)
    write_json(path.with_name(path.name + ".sealed"), checksums(path.parent, [path.name]))


def is_sealed(path):
    """Whether a file or folder is as it was when it was sealed."""
    try:
        known = json.loads(path.with_name(path.name + ".sealed").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(known) and damaged(path.parent, known) is None


def last_sealed(folder, name):
    """The sealed file or folder NAME-N with the largest number N, or None."""
    found = [p for p in Path(folder).glob(f"{name}-*") if p.name.removeprefix(f"{name}-").isdecimal()]
    return next(filter(is_sealed, sorted(found, key=lambda p: -int(p.name.removeprefix(f"{name}-")))), None)


def keep_last(path):
    """Seal NAME-N, and delete the other NAME-* beside it."""
    seal(path)
    name, _, _ = path.name.rpartition("-")
    for other in path.parent.glob(f"{name}-*"):
        if other.name.removesuffix(".sealed") != path.name:
            remove(other)


# ------------------------------------------------------------------------------------------------------------------
# One process to a folder

FIRST_FILES = {".lock", "manifest.json.partial"}  # all that a run that was killed at once leaves


@contextlib.contextmanager
def locked(folder, mine=True):
    """Hold a folder while the block runs, made if need be. Raises ValueError that names the process that holds it already.

    The lock is the kernel's (flock) and ends with the process, however it ends; a file left by a killed one is no obstacle.
    """
    if not mine:  # another process of this run holds it for all
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 1000).decode(errors="replace") or "a process that has just begun"
            os.close(handle)
            raise ValueError(f"{folder} is in use by {holder}; wait for it, or give another --output_dir") from None
        if path.exists() and os.path.samestat(os.fstat(handle), os.stat(path)):
            break
        os.close(handle)  # its last holder deleted it between our two calls
    try:
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # a file system that has become read-only keeps the file, which harms nobody
            path.unlink(missing_ok=True)
        os.close(handle)


# ------------------------------------------------------------------------------------------------------------------
# Room

NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EROFS: "it is read-only",
           errno.EACCES: "permission is denied", errno.EPERM: "permission is denied"}


def size(number):
    """Bytes in words: 1.2 GB."""
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def reason_of(error):
    """Why a file could not be written, in words, or None where an error says something else; libraries word it their own way."""
    number = getattr(error, "errno", None)
    for code, words in NO_ROOM.items():
        if number == code or f"os error {code})" in str(error) or os.strerror(code) in str(error):
            return words
    return None


@contextlib.contextmanager
def room_for(needed, folder, what):
    """Check that `needed` bytes are free where a folder is, and say so plainly if the block cannot write all the same.

    Raises OSError with path and bytes; what: is writing, for the message.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{what} writes about {size(needed)} to {folder}, where {size(free)} are free; make room, or give another --output_dir")
    try:
        yield
    except Exception as error:
        if (words := reason_of(error)) is None:
            raise
        place = getattr(error, "filename", None) or folder
        raise OSError(f"{what} cannot write {place}: {words}; it needs about {size(needed)}, {size(shutil.disk_usage(folder).free)} are free. "
                      "Finished stages are kept: mend it and give the same command") from error


# ------------------------------------------------------------------------------------------------------------------
# A clean stop

def stop(number, _):
    """On SIGINT or SIGTERM: one sentence, then the end, with no further write; every file is complete at any moment."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"\nkalm: stopped by {signal.Signals(number).name}; the same command goes on from here\n".encode())
    os._exit(128 + number)


def stop_cleanly():
    """Let SIGINT (Ctrl-C) end this process with exit code 130 and SIGTERM with 143, after a message without a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
