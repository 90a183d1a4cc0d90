"""Checkpoints: small, safe to read, never half written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fourdfy import __version__
from fourdfy.config import ConfigError
from fourdfy.files.atomic import whole_file
from fourdfy.files.safe_load import read_torch_file
from fourdfy.systems.finite import not_finite

MADE_HERE = "fourdfy"
"""The key of a checkpoint that holds the version of fourdfy which wrote it."""

LAST = Path("ckpts", "last.ckpt")
"""Path of the newest checkpoint inside a trial folder."""


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write to a temporary name, sync, rename: the old file stays until the new one is complete.

    Raises:
        FloatingPointError: a tensor of the scene is not finite; nothing is written.
    """
    target = Path(path)
    if broken := not_finite(checkpoint["state_dict"]):
        raise FloatingPointError(
            f"global step {checkpoint['global_step']}: {broken[0]} is not finite (is its learning rate too "
            f"high?); {target} stays as it was"
        )
    with whole_file(target, sync=True) as half_written:
        torch.save({MADE_HERE: __version__, **checkpoint}, half_written)


def checkpoint_file(path: str | Path) -> Path:
    """The file itself or, for a trial folder, its newest checkpoint."""
    return Path(path) / LAST if Path(path).is_dir() else Path(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, ours or the original's, with tensors on the CPU; nothing in it can run code.

    Args:
        path: the file, or a trial folder.

    Raises:
        ConfigError: no such file, or not a checkpoint.
    """
    path = checkpoint_file(path)
    if not path.is_file():
        there = sorted(str(p) for p in path.parent.glob("[!.]*.ckpt")) if path.parent.is_dir() else []
        hint = f"; there is {', '.join(there)}" if there else ""
        raise ConfigError(f"{path}: no such checkpoint{hint}")
    try:
        checkpoint = read_torch_file(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ConfigError(f"{path}: not a checkpoint of a scene (it has no state_dict)")
    return checkpoint


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
