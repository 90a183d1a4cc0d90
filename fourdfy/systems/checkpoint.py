"""Checkpoints: small, safe to read, never half written; a damaged one is replaced by the one before."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping, ValuesView
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fourdfy import __version__
from fourdfy.config import ConfigError
from fourdfy.files.atomic import warn_once, whole_file
from fourdfy.files.checksum import check_file, save_with_checksum
from fourdfy.files.safe_load import read_torch_file
from fourdfy.ops.finite import not_finite

logger = logging.getLogger(__name__)

MADE_HERE = "fourdfy"
"""The key of a checkpoint that holds the version of fourdfy which wrote it."""

LAST = Path("ckpts", "last.ckpt")
"""Path of the newest checkpoint inside a trial folder."""


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write to a temporary name, sync, rename: the old file stays until the new one is complete.

    It then stays as ``one_before(path)``, unless it is damaged or the disk has no room for three.

    Raises:
        FloatingPointError: a tensor of the scene is not finite; nothing is written.
        WriteError: the disk is full, for example; ``path`` stays as it was.
    """
    target = Path(path)
    if broken := not_finite(checkpoint["state_dict"]):
        raise FloatingPointError(
            f"global step {checkpoint['global_step']}: {broken[0]} is not finite (is its learning rate too "
            f"high?); {target} stays as it was"
        )
    try:
        _write(checkpoint, target)
    except OSError as error:
        spare = one_before(target) if _is_whole(target) else target
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not spare.exists():
            raise
        logger.warning("%s: no space; deleting %s to make room", target, spare.name)
        spare.unlink()
        write_checkpoint(checkpoint, target)


def _write(checkpoint: Mapping[str, Any], target: Path) -> None:
    # The replaced file takes its new name last: there is a whole one under either name at any time.
    with (
        whole_file(one_before(target)) if _is_whole(target) else nullcontext() as replaced,
        whole_file(target, size=tensor_bytes(checkpoint), sync=True) as half_written,
    ):
        save_with_checksum({MADE_HERE: __version__, **checkpoint}, half_written)
        if replaced:
            try:
                os.link(target, replaced)
            except OSError:  # a file system without hard links
                shutil.copyfile(target, replaced)


def tensor_bytes(content: Any) -> int:
    """The bytes of all tensors in nested mappings and sequences."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, Mapping) else content
    return sum(map(tensor_bytes, parts)) if isinstance(parts, ValuesView | list | tuple) else 0


def _is_whole(path: Path) -> bool:
    try:
        return bool(_read(path))
    except ConfigError:
        return False


def checkpoint_file(path: str | Path) -> Path:
    """The file itself or, for a trial folder, its newest checkpoint."""
    return Path(path) / LAST if Path(path).is_dir() else Path(path)


def one_before(path: Path) -> Path:
    """The checkpoint that ``path`` replaced."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def has_checkpoint(path: str | Path) -> bool:
    """Whether there is the file, or a trial's newest checkpoint, or the one before."""
    path = checkpoint_file(path)
    return path.is_file() or one_before(path).is_file()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, ours or the original's, with tensors on the CPU; nothing in it can run code.

    If the file is damaged or missing: that of the one before, with a warning.

    Args:
        path: the file, or a trial folder.

    Raises:
        ConfigError: no such file, or not a checkpoint.
    """
    path = checkpoint_file(path)
    try:
        return _read(path)
    except ConfigError as error:
        if not one_before(path).is_file():
            others = sorted(str(file) for file in path.parent.glob("[!.]*.ckpt") if file != path)
            raise ConfigError(f"{error}; there is {', '.join(others)}" if others else str(error)) from error
        try:
            checkpoint = _read(one_before(path))
        except ConfigError as other:
            raise ConfigError(f"{error}; {other}; to train anew, move {path.parent} away") from error
        warn_once(f"{error}; using the one before, {one_before(path).name}")
        return checkpoint


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such checkpoint")
    try:
        check_file(path)
        checkpoint = read_torch_file(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    if not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ConfigError(f"{path}: not a checkpoint of a scene (it has no state_dict)")
    return checkpoint


def scene_hash(path: str | Path) -> str | None:
    """A hash of the names and numbers of a checkpoint's scene; None if there is no such checkpoint."""
    if not has_checkpoint(path):
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(read_checkpoint(path)["state_dict"].items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def step_of(path: str | Path) -> int:
    """The global step of a checkpoint from which training can continue; read only if it has changed since.

    Raises:
        ConfigError: see ``read_own_checkpoint``.
    """
    file = checkpoint_file(path)
    files = [kept for kept in (file, one_before(file)) if kept.exists()]
    return _step_of(file, *((kept, kept.stat().st_mtime_ns, kept.stat().st_size) for kept in files))


@lru_cache(maxsize=100)
def _step_of(path: Path, *versions: object) -> int:
    return read_own_checkpoint(path)["global_step"]


def read_own_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint from which training can continue.

    Raises:
        ConfigError: as in ``read_checkpoint``, or other code wrote it, whose optimizer has other groups.
    """
    checkpoint = read_checkpoint(path)
    if MADE_HERE not in checkpoint:
        raise ConfigError(
            f"resume={path}: written by other code; training can't go on from its optimizer, but can "
            f"start from its scene: system.weights={path}"
        )
    return checkpoint
