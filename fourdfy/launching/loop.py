"""The loop of a run: training steps, validations and tests, and what a checkpoint holds of them.

Nothing here waits for a GPU: what a step computed is read while the next ones run. What must not be late is
settled before anything is saved or shown, see ``systems.finite``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fourdfy.callbacks.base import Callback, Run
from fourdfy.launching.experiment import TrainerConfig
from fourdfy.systems.checkpoint import read_checkpoint, write_checkpoint
from fourdfy.systems.finite import FiniteCheck
from fourdfy.systems.learning_rates import advance, continued
from fourdfy.types import StepBatch

logger = logging.getLogger(__name__)

SCALER = "MixedPrecision"
"""The key of the gradient scaler's state in a checkpoint: Lightning's, which wrote the older ones."""

RESERVE = 0.1
"""Share of a GPU's memory that is left to fragments, libraries and what is held for moments."""


class Trainer:
    """Trains and renders the system of a run, on one device.

    Args:
        callbacks: by the names of their states in a checkpoint; called in this order.
    """

    def __init__(
        self, cfg: TrainerConfig, run: Run, callbacks: Mapping[str, Callback], *, device: str
    ) -> None:
        self.cfg, self.run, self.callbacks = cfg, run, callbacks
        self.system, self.device = run.system.to(device), torch.device(device)
        dtype = half_precision(cfg, self.device.type)
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if dtype is not None:
            # Without the cache, which would reuse casts of parameters that no_grad made, without a graph.
            self.autocast = partial(torch.autocast, self.device.type, dtype, cache_enabled=False)
        self.scaler = torch.amp.GradScaler(self.device.type) if dtype == torch.float16 else None

    def fit(self, resume_from: Path | None) -> None:
        """Train until ``max_steps``, or until the run is stopped."""
        cfg, run = self.cfg, self.run
        every = cfg.steps_between_validations
        with self._errors_told(), torch.autograd.set_detect_anomaly(cfg.detect_anomaly):
            if resume_from is not None:
                self._resume(read_checkpoint(resume_from))
            elif every:
                self._validate(cfg.num_sanity_val_steps)
            if run.step >= cfg.max_steps:
                return
            self.check = FiniteCheck(self.optimizer)
            if self.device.type == "cuda":
                with self.autocast():
                    self.system.bound_memory(memory_budget(self.device, cfg.memory_budget_gb))
            run.save = self.save
            self.tell("begin")
            batches = iter(run.data.train_dataloader(run.step, cfg.accumulate_grad_batches))
            while run.step < cfg.max_steps and not run.stopping:
                self._step([*islice(batches, cfg.accumulate_grad_batches)])
                if every and (run.step % every == 0 or run.stopping):
                    self.check.settle()
                    self._validate()
            self.check.settle()
            self.tell("end", None)

    def validate(self) -> None:
        with self._errors_told():
            self._validate()

    def test(self) -> None:
        with self._errors_told():
            batches = self.run.data.test_dataloader()
            self._render(batches, len(batches))
            self.tell("after_test")

    def save(self, path: Path) -> None:
        """Write a checkpoint from which training can be continued.

        Raises:
            FloatingPointError: the scene or the last step is not finite; nothing is written.
        """
        self.check.settle()
        run = self.run
        states = {name: state for name, c in self.callbacks.items() if (state := c.state_dict())}
        write_checkpoint(
            {
                "global_step": run.step,
                "state_dict": self.system.state_dict(),
                "optimizer": type(self.optimizer).__name__,
                "optimizer_states": [self.optimizer.state_dict()],
                "running_means": run.means.sums,
                **({"callback_states": states} if states else {}),
                **({} if self.scaler is None else {SCALER: self.scaler.state_dict()}),
            },
            path,
        )

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        run = self.run
        self.system.load_checkpoint(checkpoint)
        run.means.sums = checkpoint.get("running_means", {})
        states = checkpoint.get("callback_states", {})
        for name in states.keys() & self.callbacks.keys():
            self.callbacks[name].load_state_dict(states[name])
        if run.scheduler is not None:
            advance(run.scheduler, self.system.step)
        # Rates and options are the config's; the moments are the checkpoint's.
        saved, name = checkpoint["optimizer_states"][0], checkpoint.get("optimizer")
        self.optimizer.load_state_dict(continued(saved, name, self.optimizer))
        if self.scaler is not None and SCALER in checkpoint:
            self.scaler.load_state_dict(checkpoint[SCALER])

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        assert self.run.optimizer is not None, "asked for in training alone"
        return self.run.optimizer

    # -- training -------------------------------------------------------------------------------

    def _step(self, parts: list[StepBatch]) -> None:
        """One global step, whose gradients are the means over its parts."""
        run, optimizer = self.run, self.optimizer
        parts = [self._moved(batch) for batch in parts]
        self.system.before_step(parts[0])
        if isinstance(optimizer, torch.optim.LBFGS):  # it evaluates a step several times
            optimizer.step(lambda: self._gradients(parts))
        else:
            self._gradients(parts)
            optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        if run.scheduler is not None:
            run.scheduler.step()
        self.system.step += 1
        self.tell("after_step", parts[-1], self._losses)

    def _gradients(self, parts: list[StepBatch]) -> Tensor:
        """The gradients of a step, checked and clipped; returns the loss."""
        optimizer, cfg, batch = self.optimizer, self.cfg, parts[-1]
        optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for part in parts:
            with self.autocast():
                out = self.system.training_step(part)
            loss = out.loss / len(parts)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            for name, value in out.losses.items():
                sums[name] = sums[name] + value if name in sums else value
            self._note(part.kind, {**out.losses, "total": out.loss.detach()}, out.loss_weights, out.metrics)
        self._losses = {name: value / len(parts) for name, value in sums.items()} if parts[1:] else sums
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        where = f"global step {batch.step}, a {batch.kind} step"
        self.check(sums, where, scaled=self.scaler is not None)
        self.system.after_backward(batch, optimizer)
        if cfg.gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            by_value = cfg.gradient_clip_algorithm == "value"
            clip = nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_
            clip(parameters, cfg.gradient_clip_val)
        return loss

    def _note(
        self, kind: str, losses: Mapping[str, Any], weights: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> None:
        for place, values in ((f"loss/{kind}", losses), (f"weight/{kind}", weights), (kind, metrics)):
            self.run.means.add({f"{place}/{name}": value for name, value in values.items()})

    def _moved(self, batch: Any) -> Any:
        """The batch on the device; from pinned memory the host does not wait for its copy."""
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)

    # -- evaluation -----------------------------------------------------------------------------

    def _validate(self, most: int | None = None) -> None:
        """Render the validation views, ``most`` of their batches."""
        batches = self.run.data.val_dataloader()
        limits = (n for n in (most, self.cfg.limit_val_batches) if n is not None)
        if total := min([len(batches), *limits]):
            self._render(batches, total)
            self.tell("after_validation")

    @torch.no_grad()
    def _render(self, batches: DataLoader, total: int) -> None:
        with evaluating(self.system):
            for done, batch in enumerate(islice(batches, total), 1):
                batch = self._moved(batch)
                with self.autocast():
                    frames = self.system.render(batch.cameras)
                self.tell("after_frames", batch, frames, done=done, total=total)

    # -- callbacks ------------------------------------------------------------------------------

    def tell(self, hook: str, *args: Any, **keywords: Any) -> None:
        """Call a hook of every callback; an error's note says whose it is."""
        for name, callback in self.callbacks.items():
            try:
                getattr(callback, hook)(self.run, *args, **keywords)
            except Exception as error:
                error.add_note(f"raised by {hook} of the callback {name!r} ({type(callback).__name__})")
                raise

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        if self.cfg.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(self.cfg.deterministic)  # the caller restores it (on_device)
        try:
            yield
        except BaseException as error:
            self.tell("end", error)
            raise


def memory_budget(device: torch.device, gib: float | None) -> float:
    """The bytes of a GPU that a run should take: of ``gib``, or else of what is free or already its own."""
    if gib is not None:
        return (1 - RESERVE) * gib * 2**30
    free, _ = torch.cuda.mem_get_info(device)
    return (1 - RESERVE) * (free + torch.cuda.memory_reserved(device))


def half_precision(cfg: TrainerConfig, device: str) -> torch.dtype | None:
    """The type that autocast computes in, None for float32; warns where the CPU lacks it."""
    if cfg.precision in (32, "32-true"):
        return None
    if cfg.precision in ("bf16", "bf16-mixed"):
        return torch.bfloat16
    if device == "cpu":
        logger.warning("trainer.precision=%s: not possible on a CPU; bf16-mixed is used", cfg.precision)
        return torch.bfloat16
    return torch.float16


@contextmanager
def evaluating(system: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode; afterwards each in the mode it was in."""
    training = [module for module in system.modules() if module.training]
    system.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
