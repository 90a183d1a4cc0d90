"""The only place where a system and its data meet Lightning: thin shells that pass everything on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader

from fourdfy.data.base import DataModule, EvalBatch
from fourdfy.systems.base import System
from fourdfy.systems.checkpoint import read_checkpoint, write_checkpoint
from fourdfy.systems.finite import check_step
from fourdfy.systems.learning_rates import advance, continued
from fourdfy.types import RenderOutput, StepBatch, TensorRecord


class RunningMeans:
    """The mean of each scalar since it was last taken; nothing is read from the device before."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor | float, int]] = {}
        """Scalar -> its sum and count since it was last taken; all that a checkpoint needs."""
        self._taken: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """The means of what came since the last time, which then starts anew."""
        means = {name: float(total) / count for name, (total, count) in self.sums.items()}
        self.sums.clear()
        self._taken |= means
        return means

    def read(self) -> dict[str, float]:
        """Every scalar that ever came: its mean since it was last taken, else the one taken then."""
        return self._taken | {name: float(total) / count for name, (total, count) in self.sums.items()}


class LightningSystem(pl.LightningModule):
    """A system to Lightning; ``state_dict`` is the system's own, so checkpoints know no shell."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.system = system
        self._resumed: dict[str, Any] | None = None
        self.means = RunningMeans()
        """``loss/{kind}/{name}``, ``weight/{kind}/{name}`` and other ``{kind}/{name}``, for curves and
        progress. The loss ``total`` is the weighted sum, which is trained."""

    def state_dict(self, *args: Any, **keywords: Any) -> dict[str, Any]:
        return self.system.state_dict(*args, **keywords)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.system.load_checkpoint(checkpoint)
        self.means.sums = checkpoint.get("running_means", {})
        self._resumed = checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["running_means"] = self.means.sums
        checkpoint["optimizer"] = type(self.trainer.optimizers[0]).__name__

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> None:
        """Nothing: ``on_load_checkpoint`` took it, with the step that belongs to it."""

    @cached_property
    def optimization(self) -> tuple[torch.optim.Optimizer, Any]:
        """The optimizer, and the scheduler or None; what is wrong with their settings shows here."""
        optimizer = self.system.configure_optimizer()
        return optimizer, self.system.configure_scheduler(optimizer)

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.optimization
        if self._resumed is not None:
            # Lightning restores from the checkpoint after this; rates and options are the config's.
            if scheduler is not None:
                advance(scheduler, self.system.step)
            states, name = self._resumed["optimizer_states"], self._resumed.get("optimizer")
            states[:] = [continued(states[0], name, optimizer)]
            self._resumed["lr_schedulers"] = []
            self._resumed = None
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: StepBatch, batch_idx: int) -> None:
        if batch.part == 0:
            self.system.before_step(batch)
            self._losses: dict[str, Tensor] = {}

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        out = self.system.training_step(batch)
        self._batch = batch
        for name, loss in out.losses.items():  # of all parts of the step
            self._losses[name] = self._losses.get(name, 0) + loss
        losses = {**out.losses, "total": out.loss.detach()}
        self.means.add({f"loss/{batch.kind}/{name}": value for name, value in losses.items()})
        self.means.add({f"weight/{batch.kind}/{name}": value for name, value in out.loss_weights.items()})
        self.means.add({f"{batch.kind}/{name}": value for name, value in out.metrics.items()})
        return out.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        check_step(
            self._losses,
            optimizer.param_groups,
            f"global step {self._batch.step}, a {self._batch.kind} step",
            scaled=getattr(self.trainer.precision_plugin, "scaler", None) is not None,
        )
        self.system.after_backward(self._batch, optimizer)

    def on_train_batch_end(self, outputs: Any, batch: StepBatch, batch_idx: int) -> None:
        self.system.step = self.global_step

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> RenderOutput:
        return self.system.render(batch.cameras)

    test_step = validation_step


class LightningData(pl.LightningDataModule):
    """A data module to Lightning."""

    def __init__(self, data: DataModule) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> DataLoader:
        return self.data.train_dataloader(self.trainer.global_step, self.trainer.accumulate_grad_batches)

    def val_dataloader(self) -> DataLoader:
        return self.data.val_dataloader()

    def test_dataloader(self) -> DataLoader:
        return self.data.test_dataloader()

    def transfer_batch_to_device(
        self, batch: TensorRecord, device: torch.device, dataloader_idx: int
    ) -> TensorRecord:
        return batch.to(device)


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are never half written; reads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> Any:
        return read_checkpoint(path)
