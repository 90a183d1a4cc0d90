"""The trial folder: what a run was made from, and its results."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import socket
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from fourdfy.config_files import CONFIGS, ConfigError, save_yaml
from fourdfy.files.atomic import by_product, check_writable, whole_file, write_whole
from fourdfy.launching.experiment import PARSED, Experiment, trial_of
from fourdfy.systems.checkpoint import one_before

if TYPE_CHECKING:
    from filelock import BaseFileLock

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
PATIENCE_SECONDS = 0.3
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of a file system without locks."""


IN_USE = 75
"""Exit status of a run whose trial another process owns: a failure that passes (EX_TEMPFAIL of BSD)."""
LOCK = ".lock"
"""The file in a trial by which a process owns it."""


class InUse(ConfigError):
    """Another process owns the trial."""


@contextmanager
def owned(trial: Path) -> Iterator[None]:
    """Create the folder and own it until the context or the process ends; an empty one is removed again.

    Raises:
        InUse: names the process that owns it.
    """
    from filelock import FileLock, Timeout

    created = [folder for folder in (trial, *trial.parents) if not folder.exists()]
    lock, owner = FileLock(trial / LOCK), trial / ".owner"
    try:
        _acquire(lock, trial)
    except Timeout as error:
        who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise InUse(
            f"{trial}: in use by {who}; wait until it ends, or give this run its own folder: tag=NAME"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: this file system has no locks; don't start the same run twice", trial)
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        if is_empty := os.listdir(trial) in ([], [LOCK]):
            with suppress(OSError):  # while it is ours: whoever waits for it then finds it gone
                (trial / LOCK).unlink()
        lock.release()
        if is_empty:
            with suppress(OSError):  # some other run's folder is in there by now
                for folder in created:
                    folder.rmdir()


def is_owned(trial: Path) -> bool:
    """Whether some process owns the trial; false where that can't be told."""
    from filelock import FileLock, Timeout

    file = trial / LOCK
    try:
        if file.exists():
            with FileLock(file, timeout=0):
                pass
    except Timeout:
        return True
    except OSError:  # a file system without locks, or read-only
        pass
    return False


def _acquire(lock: BaseFileLock, trial: Path) -> None:
    """Create the folder and lock it, with patience for an owner that is ending or has yet to write its name.

    It is a lock of the operating system, so a process that is killed leaves none behind.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            trial.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=PATIENCE_SECONDS, poll_interval=0.02)
            return
        except FileNotFoundError:  # an owner that had nothing to keep has just removed the folder
            if time.monotonic() > until:
                raise


def set_aside(trial: Path) -> Path:
    """Rename the folder of a trial, and return its new name.

    Raises:
        InUse: a run owns it.
    """
    with owned(trial):
        pass
    names = (trial.with_name(f"{trial.name}.old{number}") for number in count(1))
    return trial.rename(next(name for name in names if not name.exists()))


def prepare_trial(
    experiment: Experiment, files: Sequence[Path], command: Sequence[str], checkpoint_bytes: int = 0
) -> None:
    """Write the configs, the command line and a snapshot of the code into the trial folder.

    Raises:
        WriteError: checkpoints of this size, or the config, can't be written.
    """
    trial = experiment.trial_dir
    spare = one_before(experiment.last_checkpoint)  # it goes if there is no room
    check_writable(trial / "ckpts", checkpoint_bytes - (spare.stat().st_size if spare.exists() else 0))
    with whole_file(trial / PARSED, sync=True) as parsed:
        save_yaml(experiment.record(), parsed)
    if all(trial_of(file) != trial for file in files):  # else keep what it started with
        with by_product("raw.yaml"):
            raw = "".join(f"# {file.name}\n{file.read_text(encoding='utf-8')}\n" for file in files)
            write_whole(trial / "configs" / "raw.yaml", raw)
    with by_product("cmd.txt"), open(trial / "cmd.txt", "a", encoding="utf-8") as file:
        file.write(shlex.join(command) + "\n")  # a resumed trial has several
    with by_product("the copy of the code"), whole_file(trial / "code.zip") as archive:
        _snapshot_code(archive, experiment.cfg.plugins)


def command_for(trial: Path) -> str:
    """The command line for a trial without its mode, with the program as it was called now."""
    return f"{program()} --trial {shlex.quote(str(trial))}"


def program() -> str:
    """What to type to call the program as it was called now."""
    called = Path(sys.argv[0])
    launch = sys.argv[0] if called.name == "launch.py" else "launch.py"
    return "fourdfy" if called.stem == "fourdfy" else f"python {shlex.quote(launch)}"


def _snapshot_code(target: Path, plugins: Sequence[str]) -> None:
    """The package's sources, the configs that ship with it and the modules of ``plugins``, in one archive."""
    root = PACKAGE.parent
    sources = {path: path.relative_to(root) for path in (*PACKAGE.rglob("*.py"), *CONFIGS.rglob("*.yaml"))}
    for name in plugins:
        package = sys.modules[name.partition(".")[0]]
        folders = [Path(folder) for folder in getattr(package, "__path__", [])]
        files = [file for folder in folders for file in folder.rglob("*.py")] or [
            Path(package.__file__ or "")
        ]
        home = (folders or files)[0].parent
        sources |= {file: "plugins" / file.relative_to(home) for file in files}
    # Files of an image or an archive may be older than zip's calendar.
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for source, inside in sorted(sources.items()):
            archive.write(source, inside)
