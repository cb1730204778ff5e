"""Which workers of a study are alive, told by a lock and by the age of a file.

Every worker holds a locked file in a folder that all of them see, and touches it again and again.
On the same machine the lock decides, which ends with its process, however that ended. Another
machine's locks cannot be trusted on every network disk: there the file's age decides, counted on
the clock of the disk.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # a system without it goes by the files' age alone
    fcntl = None  # type: ignore[assignment]

TOUCH_SECONDS = 20.0
GIVEN_UP_SECONDS = 180.0


class Worker:
    """This process among the workers of a study, until `close`.

    Args:
        folder: where all of them leave their files; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.name = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._descriptor = os.open(self._file(self.name), os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Be counted as gone from now on."""
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._file(self.name).unlink()
        os.close(self._descriptor)

    def is_alive(self, name: str) -> bool:
        """Whether the worker of this name still works, as far as can be told from here."""
        if name == self.name:
            return True
        file = self._file(name)
        if fcntl is not None and name.rsplit("-", 2)[0] == _host():
            return _is_locked(file)
        own = self._file(self.name)
        own.touch()  # the disk's clock, not ours
        try:
            return own.stat().st_mtime - file.stat().st_mtime < GIVEN_UP_SECONDS
        except FileNotFoundError:
            return False

    def _file(self, name: str) -> Path:
        return self.folder / name

    def _touch(self) -> None:
        while not self._closed.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._file(self.name))


@contextlib.contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Hold `file`'s lock, after waiting for it; on a system without locks, nothing."""
    if fcntl is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_free(file: Path) -> bool:
    """Whether nobody holds the lock of `file`; another may take it the next moment."""
    return fcntl is None or not _is_locked(file)


def _is_locked(file: Path) -> bool:
    try:
        descriptor = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _host() -> str:
    return socket.gethostname() or "unnamed"
