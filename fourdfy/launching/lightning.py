"""The only place where a system, its data and callbacks meet Lightning: thin shells that only delegate.

Nothing here waits for a GPU. What must not be late is settled before anything is saved or shown, see
``systems.finite``.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import Precision
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.utils.data import DataLoader

from fourdfy.callbacks.base import Callback, Run
from fourdfy.data.base import DataModule, EvalBatch
from fourdfy.devices import memory_capped
from fourdfy.files.atomic import WriteError, by_product, lost
from fourdfy.launching.experiment import PARSED, TrainerConfig
from fourdfy.launching.retries import make_room, until_it_fits
from fourdfy.launching.trial import program
from fourdfy.ops.ranks import largest, of_first_rank, ranks, sum_gradients
from fourdfy.ops.replay import release_recordings
from fourdfy.seeds import generator_states, set_generator_states
from fourdfy.systems.broken_step import REPLAY, StepRecord, write_step
from fourdfy.systems.checkpoint import read_checkpoint, write_checkpoint
from fourdfy.systems.finite import FiniteCheck, StepNumbers, is_fused
from fourdfy.systems.learning_rates import advance, continued
from fourdfy.types import RenderOutput, StepBatch, TensorRecord

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

RESERVE = 0.1
"""Share of a GPU's memory that is left to fragments, libraries and what is held for moments."""


class LightningSystem(pl.LightningModule):
    """Wraps a run's system for Lightning; ``state_dict`` is the system's own, without the shell.

    Args:
        callbacks: by the names of their states in a checkpoint; called in this order.
        memory_budget_gb, max_skipped_steps: of the trainer's config.
    """

    def __init__(
        self,
        run: Run,
        callbacks: Mapping[str, Callback],
        memory_budget_gb: float | None = None,
        max_skipped_steps: int = 0,
    ) -> None:
        super().__init__()
        self.memory_budget_gb, self.max_skipped_steps = memory_budget_gb, max_skipped_steps
        self.system, self.run, self.callbacks = run.system, run, callbacks
        self._resumed: dict[str, Any] | None = None
        self._check: FiniteCheck | None = None
        self._skipped_before = 0
        self._halved: dict[str, int] = {}
        self._loss: Tensor | None = None
        """Of the step, until its backward pass. Nothing else holds its graph, so that all of a step that does
        not fit into memory can be let go."""

    def state_dict(self, *args: Any, **keywords: Any) -> dict[str, Any]:
        return self.system.state_dict(*args, **keywords)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.system.load_checkpoint(checkpoint)
        self.run.means.sums = checkpoint.get("running_means", {})
        self._skipped_before = checkpoint.get("skipped_steps", 0)
        self.run.grew_from = checkpoint.get("grew_from")
        states = checkpoint.get("callback_states", {})
        for name in states.keys() & self.callbacks.keys():
            self.callbacks[name].load_state_dict(states[name])
        self._resumed = checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["running_means"] = self.run.means.sums
        checkpoint["grew_from"] = self.run.grew_from
        checkpoint["optimizer"] = type(self.optimizer).__name__
        checkpoint["skipped_steps"] = self._check.skipped if self._check else self._skipped_before
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        if parts := batches["processed"] % self.trainer.accumulate_grad_batches:  # of a given-up step
            batches.update(dict.fromkeys(batches, batches["processed"] - parts))
        if states := {name: state for name, c in self.callbacks.items() if (state := c.state_dict())}:
            checkpoint["callback_states"] = states

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> None:
        """Do nothing: ``on_load_checkpoint`` has loaded it, with its step."""

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.optimizer, self.run.scheduler
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

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        assert self.run.optimizer is not None, "asked for in training alone"
        return self.run.optimizer

    def on_train_start(self) -> None:
        self._check = FiniteCheck(self.optimizer, allowed=self.max_skipped_steps, keep=self._keep)
        self._check.skipped = self._skipped_before
        for tensor in self.system.state_dict().values():
            of_first_rank(tensor)
        # Of a training before this one: Lightning has moved what is trained to main memory and back since.
        release_recordings()
        if self.device.type == "cuda":
            with self.trainer.precision_plugin.forward_context():
                self.system.bound_memory(memory_budget(self.device, self.memory_budget_gb))
        self.run.save = self._save
        self.tell("begin")

    def on_train_batch_start(self, batch: StepBatch, batch_idx: int) -> None:
        if batch.part == 0:
            self._record = StepRecord.begin(self.device)
            self.optimizer.zero_grad()  # Lightning's own comes after the forward pass, which would hold both
            self._fitting(lambda: self.system.before_step(batch))
            self._losses: dict[str, Tensor] = {}

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        """The loss, without its graph; see ``backward``."""
        self._record.parts[batch.part :] = [batch]  # an optimizer may evaluate a step several times
        self._draws = generator_states(self.device)
        out = self._fitting(lambda: self.system.training_step(batch), batch)
        for name, loss in out.losses.items():  # of all parts of the step
            self._losses[name] = self._losses[name] + loss if name in self._losses else loss
        losses = {**out.losses, "total": out.loss.detach()}
        self.run.means.add({f"loss/{batch.kind}/{name}": value for name, value in losses.items()})
        self.run.means.add({f"weight/{batch.kind}/{name}": value for name, value in out.loss_weights.items()})
        self.run.means.add({f"{batch.kind}/{name}": value for name, value in out.metrics.items()})
        self._loss, self._scaled = out.loss, out.loss.detach().requires_grad_()
        return self._scaled

    def backward(self, loss: Tensor, *args: Any, **keywords: Any) -> None:
        loss.backward()  # through what the loss was multiplied with since
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        of_earlier_parts = [p.grad for p in parameters]
        self._fitting(self._backward, self._record.parts[-1])
        for parameter, grad in zip(parameters, of_earlier_parts, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
        if self._record.parts[-1].part + 1 == self.trainer.accumulate_grad_batches:
            sum_gradients(parameters)

    def _backward(self) -> None:
        self.optimizer.zero_grad()
        loss, self._loss = self._loss, None
        if loss is None:  # this is a repetition
            with self.trainer.precision_plugin.forward_context():
                loss = self.system.training_step(self._record.parts[-1]).loss
        assert self._scaled.grad is not None
        loss.backward(self._scaled.grad / ranks().count)  # this rank's part of it; see ``ops.ranks``

    def _fitting(self, work: Callable[[], Result], batch: StepBatch | None = None) -> Result:
        """``work()`` within the memory; without a ``batch``, nothing of it has gradients."""

        def halve() -> dict[str, int]:
            """All settings so far, as a recipe takes them, if one was halved."""
            stage, _, stages = self.run.label.removeprefix("stage ").partition("/")
            prefix = f"stage_{stage}." if stages not in ("", "1") else ""
            halved = {prefix + key: value for key, value in self.system.halve_chunks(batch).items()}
            self._halved |= halved
            if batch is not None:
                set_generator_states(self._draws, self.device)
            return self._halved if halved else {}

        where = f"global step {self.global_step}" if batch is None else str(self._record)
        return until_it_fits(work, halve, where)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and is_fused(optimizer):
            scaler.unscale_(optimizer)  # Lightning leaves it to the fused kernels
        assert self._check is not None
        if self._check.reads_late:
            self._record.buffers = [buffer.clone() for buffer in self.system.buffers()]
        if self._check(self._losses, self._record, scaled=scaler is not None):
            self.system.after_backward(self._record.parts[-1], optimizer)
        if not (optimizer.state and is_fused(optimizer)):
            self._fitting(lambda: make_room(optimizer))

    def _keep(self, numbers: StepNumbers) -> str:
        """Write the replay file of a step that is not finite, on the first rank; gives what to type."""
        if not ranks().is_first:
            return ""
        file, parsed = self.run.folder / REPLAY, self.run.folder / PARSED
        with by_product("the replay file"):
            config = parsed.read_text(encoding="utf-8") if parsed.exists() else ""
            write_step(file, self.system, numbers, config)
            return f"; to find the first cause: {program()} --replay {shlex.quote(str(file))}"
        return ""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning does, also for fused optimizers in mixed precision, as gradients are unscaled."""
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        Precision.clip_gradients(
            self.trainer.precision_plugin, optimizer, gradient_clip_val or 0.0, algorithm
        )

    def on_train_batch_end(self, outputs: Any, batch: StepBatch, batch_idx: int) -> None:
        parts = self.trainer.accumulate_grad_batches
        if batch.part + 1 == parts:  # half a step can't be continued
            self.system.step = self.global_step
            losses = self._losses
            if parts > 1:
                losses = {name: loss / parts for name, loss in losses.items()}
            self.tell("after_step", batch, losses)
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """A callback may have asked on one rank."""
        self.run.stopping = any(largest([self.run.stopping]))
        if self.run.stopping:
            self.trainer.should_stop = True
            self.trainer.limit_val_batches = 0  # Lightning would render a validation before it stops

    def on_train_end(self) -> None:
        self._settle()
        self.tell("end", None)

    def on_validation_start(self) -> None:
        self._settle()

    def _settle(self) -> None:
        if self._check is not None:
            self._check.settle()

    def _save(self, path: Path) -> None:
        self._settle()
        self.trainer.save_checkpoint(path, weights_only=False)  # the optimizer too

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> RenderOutput | None:
        return self.test_step(batch, batch_idx) if ranks().is_first and not self.run.stopping else None

    def test_step(self, batch: EvalBatch, batch_idx: int) -> RenderOutput:
        return self._fitting(lambda: self.system.render(batch.cameras))

    def on_validation_batch_end(self, outputs: RenderOutput | None, batch: EvalBatch, batch_idx: int) -> None:
        trainer = self.trainer
        count = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        if outputs is not None:
            self.tell("after_frames", batch, outputs, done=batch_idx + 1, total=count[0])
        self._stop_if_asked()

    def on_validation_epoch_end(self) -> None:
        if not self.run.stopping:
            self.tell("after_validation")

    def on_test_batch_end(self, outputs: RenderOutput, batch: EvalBatch, batch_idx: int) -> None:
        total = self.trainer.num_test_batches[0]
        self.tell("after_frames", batch, outputs, done=batch_idx + 1, total=total)

    def on_test_epoch_end(self) -> None:
        self.tell("after_test")

    def tell(self, hook: str, *args: Any, **keywords: Any) -> None:
        """Call a hook of every callback; an error's note says whose it is. Most files can be done without."""
        for name, callback in self.callbacks.items():
            try:
                getattr(callback, hook)(self.run, *args, **keywords)
            except Exception as error:
                if isinstance(error, WriteError) and not callback.is_essential:
                    lost(f"files of the callback {name!r}", str(error))
                    continue
                error.add_note(f"raised by {hook} of the callback {name!r} ({type(callback).__name__})")
                raise


class LightningData(pl.LightningDataModule):
    """Wraps a data module for Lightning."""

    def __init__(self, data: DataModule) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        return self.data.train_dataloader(self.trainer.global_step, self.trainer.accumulate_grad_batches)

    def val_dataloader(self) -> DataLoader:
        return self.data.val_dataloader()

    def test_dataloader(self) -> DataLoader:
        return self.data.test_dataloader()

    def transfer_batch_to_device(
        self, batch: TensorRecord, device: torch.device, dataloader_idx: int
    ) -> TensorRecord:
        if device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(device, non_blocking=True)


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically; what training continues from has been read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, Any] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> Any:
        content, self.read = self.read, None  # its tensors may become the optimizer's
        assert content is not None, "fit was given its path alone"
        return content


class OneProcess(LightningEnvironment):
    """A run of one process, regardless of what a cluster's scheduler left in the environment. Several ranks
    have one each: what they compute together (``ops.ranks``) is no affair of Lightning's loop.

    Lightning would take rank and size of the run from it, and with the rank whether to log at all.
    """

    creates_processes_externally = False

    def __init__(self) -> None:
        super().__init__()
        # Also for users of rank_zero_only, which read the environment at import.
        self.set_global_rank(ranks().rank)

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0

    def teardown(self) -> None:
        """Leave the environment as it is."""


class Interrupted(BaseException):
    """A KeyboardInterrupt, hidden from Lightning: it would ignore SIGINT from then on and call ``exit``."""


class OneDevice(SingleDeviceStrategy):
    """A run in this process, as its own launcher."""

    is_interactive_compatible = True

    @property
    def launcher(self) -> Any:
        return self

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **keywords: Any) -> Any:
        try:
            return function(*args, **keywords)
        except KeyboardInterrupt as error:
            raise Interrupted from error

    def kill(self, number: int) -> None:
        """There are no other processes."""


class Trainer:
    """Trains and renders the system of a run, on this process's device.

    Args:
        callbacks: by the names of their states in a checkpoint; called in this order.
    """

    def __init__(
        self, cfg: TrainerConfig, run: Run, callbacks: Mapping[str, Callback], *, device: str
    ) -> None:
        self.system = LightningSystem(run, callbacks, cfg.memory_budget_gb, cfg.max_skipped_steps)
        self.data, self.device = LightningData(run.data), device
        self.loops = build_loops(cfg, run.folder, device)

    def fit(self, resume_from: Path | None, content: dict[str, Any] | None = None) -> None:
        """Train from the start, or from a checkpoint with this ``content``, which is taken over."""
        if resume_from is not None:
            checkpoints = cast(SafeCheckpointIO, self.loops.strategy.checkpoint_io)
            checkpoints.read = content or read_checkpoint(resume_from)
        with memory_capped(self.device, self.system.memory_budget_gb):
            self._run(self.loops.fit, ckpt_path=resume_from)

    def validate(self) -> None:
        self._run(self.loops.validate, verbose=False)

    def test(self) -> None:
        self._run(self.loops.test, verbose=False)

    def _run(self, loop: Callable[..., Any], **given: Any) -> None:
        try:
            loop(self.system, self.data, weights_only=True, **given)
        except BaseException as error:
            self.system.tell("end", error)
            if isinstance(error, Interrupted):
                raise KeyboardInterrupt from error
            raise


def memory_budget(device: torch.device, gib: float | None) -> float:
    """The bytes of a GPU that a run should take: of ``gib``, or else of what is free or already its own."""
    if gib is not None:
        return (1 - RESERVE) * gib * 2**30
    free, _ = torch.cuda.mem_get_info(device)
    return (1 - RESERVE) * (free + torch.cuda.memory_reserved(device))


def build_loops(cfg: TrainerConfig, folder: Path, device: str) -> pl.Trainer:
    """Lightning's Trainer, without its own writing, logging and saving."""
    if device == "cpu" and cfg.precision in (16, "16-mixed"):
        logger.warning("trainer.precision=%s: not possible on a CPU; bf16-mixed is used", cfg.precision)
    if device == "cpu" and cfg.memory_budget_gb is not None:
        logger.warning("trainer.memory_budget_gb: without effect on a CPU")
    loops = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu" if device == "cpu" else "gpu",
        strategy=OneDevice(device),
        devices=1 if device == "cpu" else [torch.device(device).index or 0],
        max_steps=cfg.max_steps,
        min_epochs=0,
        log_every_n_steps=cfg.log_every_n_steps,
        num_sanity_val_steps=cfg.num_sanity_val_steps,
        val_check_interval=cfg.steps_between_validations * cfg.accumulate_grad_batches or None,
        limit_val_batches=cfg.limit_val_batches if cfg.val_check_interval else 0,
        precision=cfg.precision,
        accumulate_grad_batches=cfg.accumulate_grad_batches,
        gradient_clip_val=cfg.gradient_clip_val,
        gradient_clip_algorithm=cfg.gradient_clip_algorithm,
        detect_anomaly=cfg.detect_anomaly,
        deterministic=cfg.deterministic,
        inference_mode=False,
        logger=False,
        plugins=[SafeCheckpointIO(), OneProcess()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Signals are the program's. Lightning's own handler of SIGTERM would end a run with exit status 0.
    loops._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return loops
