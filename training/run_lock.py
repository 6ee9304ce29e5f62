"""One run at a time in a folder: a lock that the system takes back when its process ends, however that comes about."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

LOCK_FILE = ".running"

if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: TextIO) -> None:
        file.seek(1 << 30)  # far behind the text, which others have to read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _try_lock(file: TextIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While entered nobody else can enter for that folder: no other process, nor this one a second time.

    The file that carries the lock is removed at the end; one that a killed process left behind holds nobody up. Where
    the file system knows no locks, a warning says so.

    Raises:
        BlockingIOError: somebody is in there; the message has the process's number.
    """
    path = folder / LOCK_FILE
    while not _is_still_there(file := _open_locked(path), path):
        file.close()  # the run that made it removed it meanwhile
    try:
        with file:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                if sys.platform != "win32":
                    path.unlink(missing_ok=True)  # before it is free, or it might be somebody else's by then
    finally:
        if sys.platform == "win32":
            with suppress(OSError):  # which removes no open file: somebody may have it by now
                path.unlink()


def _open_locked(path: Path) -> TextIO:
    file = path.open("a+", encoding="ascii")
    try:
        _try_lock(file)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        with file:
            raise BlockingIOError(f"process {file.read() or '?'}") from error
    except OSError as error:
        logger.warning("%s: cannot be locked (%s); see to it that no other run writes there.", path.parent, error)
    return file


def _is_still_there(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
