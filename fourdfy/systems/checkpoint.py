"""Checkpoints: small, safe to read, never half written."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from fourdfy import __version__
from fourdfy.config import ConfigError
from fourdfy.safe_load import read_torch_file

MADE_HERE = "fourdfy"
"""The key of a checkpoint that holds the version of fourdfy which wrote it."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, syncs, renames; reads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save({MADE_HERE: __version__, **checkpoint}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> Any:
        return read_checkpoint(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, ours or the original's, with tensors on the CPU; nothing in it can run code.

    Raises:
        ConfigError: no such file, or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(str(p) for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
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
    """A checkpoint that training can go on from.

    Raises:
        ConfigError: as ``read_checkpoint``; or other code wrote it, whose optimizer knows other groups.
    """
    checkpoint = read_checkpoint(path)
    if MADE_HERE not in checkpoint:
        raise ConfigError(
            f"resume={path}: written by other code; training can't go on from its optimizer, but can "
            f"start from its scene: system.weights={path}"
        )
    return checkpoint


class LastCheckpoint(pl.Callback):
    """Keeps ``last.ckpt`` fresh: every so many steps, at the end, and when the process is told to stop."""

    def __init__(self, path: Path, every_n_train_steps: int) -> None:
        self.path = path
        self.every_n_train_steps = every_n_train_steps
        self.signal: int | None = None
        """The signal that ended the run early, if one did."""
        self._saved_step = -1
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._stop_after_step)

    def _stop_after_step(self, number: int, frame: Any) -> None:
        if self.signal is not None:  # asked twice: the user does not want to wait for the step
            raise KeyboardInterrupt
        self.signal = number

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.signal is not None or trainer.global_step % self.every_n_train_steps == 0:
            self._save(trainer)
        trainer.should_stop |= self.signal is not None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._restore_handlers()

    def _save(self, trainer: pl.Trainer) -> None:
        if self._saved_step != trainer.global_step:
            trainer.save_checkpoint(self.path, weights_only=False)  # the optimizer too
            self._saved_step = trainer.global_step

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
