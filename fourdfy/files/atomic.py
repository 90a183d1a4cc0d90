"""Writing of files: a file appears under its name only when it is complete, and what is said if it can't be.

A run can't do without its checkpoints and its settings: a ``WriteError`` ends it. Everything else, pictures,
curves, copies, is a ``by_product``: it costs a warning, and the run continues.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from uuid import uuid4

logger = logging.getLogger(__name__)

ELSEWHERE = "write elsewhere: exp_root_dir=DIR"
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"free some space, or {ELSEWHERE}"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), f"check its permissions, or {ELSEWHERE}"),
    errno.EROFS: ELSEWHERE,
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "move away what is there"),
    errno.ENAMETOOLONG: "choose a shorter exp_root_dir or tag",
}
"""What a user can do about an error of the operating system."""

HOST = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
PROCESS = uuid4().hex[:8]
"""Tells this process from an earlier one of the same number."""
_files = itertools.count()
ALIVE_SECONDS = 600
"""A file of another machine that nobody has written to for so long has no writer any more."""


class WriteError(OSError):
    """A file or folder could not be written. The message says which, why, and what is safe.

    Args:
        size: bytes that it needs, as far as they are known.
    """

    def __init__(self, path: Path, cause: OSError, size: int = 0) -> None:
        super().__init__(cause.errno, cause.strerror or str(cause), str(path))
        self.size = size

    def __str__(self) -> str:
        path, reason = Path(self.filename), str(self.strerror)
        folder = next((folder for folder in path.parents if folder.exists()), path.parent)
        if self.errno in (errno.EEXIST, errno.ENOTDIR):
            in_the_way = path if path.is_file() else folder
            return f"{path} can't be written: {in_the_way} is a file where a folder is needed"
        if self.errno == errno.ENOSPC:
            size = self.size or (path.stat().st_size if path.is_file() else 0)
            needed = f"{_size(size)} needed, " if size else ""
            reason += f" ({needed}{_size(free_bytes(folder) or 0)} free)"
        kept = "; the file of before is unchanged" if path.is_file() else ""
        return f"{path} can't be written: {reason}{kept}"


@contextmanager
def writing(path: Path, size: int = 0) -> Iterator[None]:
    """A context that writes ``path``.

    Raises:
        WriteError: the operating system refuses.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error, size) from error


@contextmanager
def whole_file(path: Path, *, size: int = 0, sync: bool = False) -> Iterator[Path]:
    """A temporary path in the same folder (made if missing); renamed to ``path`` on success, else removed.

    With ``sync`` the content is on the disk before the name is: after a power cut it is the old or the new.

    Args:
        size: bytes to write, if they are known.

    Raises:
        WriteError: the operating system refuses; ``path`` is as it was before.
    """
    # No two writers share a name, whichever machine they are on. The suffix stays last: writers choose
    # the format by it.
    writer = f"{HOST}-{os.getpid()}-{PROCESS}-{next(_files)}"
    half_written = path.with_name(f".{path.stem}.{writer}.tmp{path.suffix}")
    try:
        with writing(path, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield half_written
            if sync:
                with half_written.open("rb+") as file:
                    os.fsync(file.fileno())
            half_written.replace(path)
    finally:
        with suppress(OSError):
            half_written.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str, *, sync: bool = False) -> None:
    """Write bytes, or text as UTF-8; see ``whole_file``."""
    encoded = content if isinstance(content, bytes) else content.encode()
    with whole_file(path, size=len(encoded), sync=sync) as half_written:
        half_written.write_bytes(encoded)


def check_writable(folder: Path, size: int = 0) -> None:
    """Make a folder if it is missing, and write a byte into it.

    Raises:
        WriteError: that can't be done, or there is no room for ``size`` bytes.
    """
    with writing(folder, size):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
        free = free_bytes(folder)
        if free is not None and free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def free_bytes(folder: Path) -> int | None:
    """Free space for this user; None if the file system does not tell."""
    with suppress(OSError):
        usage = shutil.disk_usage(folder)
        return usage.free if usage.total else None
    return None


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers have left in a folder and in those below it."""
    for path in folder.rglob(".*.tmp*"):
        # The second form is that of earlier versions.
        if match := re.search(r"\.(\w{8})-(\d+)-(\w{8})-\d+\.tmp|\.\d+\.tmp$", path.name):
            host, number, process = match[1], int(match[2] or 0), match[3]
            with suppress(OSError):
                if process == PROCESS and number == os.getpid():  # a fork has the first alone
                    continue
                if host != HOST or os.name == "nt":
                    is_alive = time.time() - path.stat().st_mtime < ALIVE_SECONDS
                else:
                    is_alive = number != os.getpid() and _is_running(number)
                if not is_alive:
                    path.unlink()


def _is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # else it is somebody else's
    return True


# ---------------------------------------------------------------------------------------------
# By-products

_missing: ContextVar[dict[str, str]] = ContextVar("_missing", default={})  # noqa: B039  # one for the process


@contextmanager
def losses_noted() -> Iterator[dict[str, str]]:
    """A run: each of its by-products is warned of once. Gives those that were lost, with the reasons."""
    missing: dict[str, str] = {}
    token = _missing.set(missing)
    try:
        yield missing
    finally:
        _missing.reset(token)


@contextmanager
def by_product(what: str) -> Iterator[None]:
    """A context for optional writing: if it fails, one warning says why, and the run continues."""
    try:
        yield
    except Exception as error:  # of any kind: hours of training are worth more
        lost(what, str(error) if isinstance(error, WriteError) else f"{type(error).__name__}: {error}")


def lost(what: str, reason: str) -> None:
    """Note that a by-product, or some of it, is lost; warn if it is the first time in this run."""
    if not is_lost(what):
        logger.warning("%s could not be written; the run continues (%s)", what, reason)
        _missing.get()[what] = reason


def is_lost(what: str) -> bool:
    """Whether some of it was lost in this run."""
    return what in _missing.get()


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


warn_once = cache(logger.warning)
