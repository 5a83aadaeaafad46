"""What is written: each file whole or not at all, and a folder by one run at a time."""

import fcntl
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from flux.errors import FluxError

LOCK = ".flux.lock"  # the file in a folder that a run is writing into


class InUse(FluxError):
    """Another process writes into the folder."""


def name_fault(name: str) -> str | None:
    """What is wrong with a name for files of a folder, where they would be elsewhere or have none."""
    if name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        return "must be a name for files in the output folder, without / and \\"
    return None


@contextmanager
def replacing(path: Path, suffix: str = ".part", sync: bool = True) -> Iterator[Path]:
    """Where to write a file, which takes its name after the block; after an error there is none of it.

    suffix: of the other name, for writers that ask for one. sync: not to return before it is on the disk,
    so that neither a power cut nor a full disk leaves less than the file before. OSError as it comes.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    try:
        yield partial
        if sync:
            flush(partial)
        os.replace(partial, path)
        if sync:
            flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Returns when a file's content, or a folder's names, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if path.is_file():  # some file systems have no such thing for folders
            raise
    finally:
        os.close(number)


def check_writable(path: Path) -> None:
    """FluxError where a file of this name could not be written; called before the long work.

    It is begun under the other name and taken away again, which shows everything: rights, read-only disks,
    names that are too long. Where its folder is to be made first, this looks into the one that is there.
    """
    try:
        folder = next(each for each in path.absolute().parents if each.exists())
        partial = folder / f".{path.name}.{os.getpid()}.part"
        try:
            partial.touch(exist_ok=False)
        finally:  # also after Ctrl-C
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise FluxError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder that this process alone writes into within the block.

    FluxError where it cannot be written into, or another process is in such a block: the system ends its lock
    with the process, however that ends. The lock's file is removed, and a folder with nothing else in it.
    """
    is_new = not folder.exists()
    file = _lock(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        file.close()
        if is_new:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def _lock(folder: Path) -> TextIO:
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("a+", encoding="utf-8")
            _take(file, folder)
            if _is_at(file, path):
                break
            file.close()  # it was removed by the process that had it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    except OSError as error:
        raise FluxError(f"cannot write into the folder {folder}: {error.strerror}") from None
    return file


def _take(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(200) or "another process"
        file.close()
        raise InUse(
            f"{folder} is in use by {owner}: wait until it has ended, or give another folder"
        ) from None
    except OSError as error:  # a network's file system may have none
        warnings.warn(f"{folder} cannot be locked ({error.strerror}): start no other run in it", stacklevel=5)


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
