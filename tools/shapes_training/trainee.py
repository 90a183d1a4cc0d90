"""A model in training: its average, its optimizer, how far it has come and the time that it has left."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourdfy.seeds import step_seed
from tools.shapes_training import store
from tools.shapes_training.models import DENOISERS, TEXTS, VAES, build

logger = logging.getLogger(__name__)

BATCH = {"vae": 192, "image": 256, "multi_view": 128, "video": 64, "wan_vae": 8, "wan": 128}
BATCH |= dict.fromkeys(TEXTS, 256)
LEARNING_RATE = dict.fromkeys(TEXTS, 2e-3) | dict.fromkeys(VAES, 1.5e-3) | dict.fromkeys(DENOISERS, 6e-4)
EMA_DECAY = 0.999
WARMUP_STEPS = 200
LAST_LR_FRACTION = 0.02
SAVE_EVERY_SECONDS = 90.0
LOG_EVERY = 200


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a part is trained in one call."""

    part: str
    out: Path
    device: torch.device
    minutes: float
    """Wall clock of this call, set-up and saving included."""
    seed: int = 0
    max_steps: int | None = None
    """End after this many steps of this call, if time has not run out before."""
    batch: int | None = None
    """Scenes per step; None takes the part's own (BATCH)."""
    pool: int | None = None
    """Scenes kept on the device; None takes the part's own (POOL)."""
    lr: float | None = None
    phase: tuple[float, float] = (0.0, 1.0)
    """From where to where the learning rate falls in this call, if several calls share one fall."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


class Trainee:
    """One part in one call."""

    def __init__(self, options: Options) -> None:
        self._began = time.perf_counter()
        self.options, part = options, options.part
        # The last seconds are for measuring and saving.
        self._budget = max(1e-6, 60 * options.minutes - (0 if part in TEXTS else 3))
        self.batch, self.peak_lr = options.batch or BATCH[part], options.lr or LEARNING_RATE[part]
        self.last_losses: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._count, self._saved_at = 0, 0.0
        torch.manual_seed(step_seed(options.seed, 0, part))
        in_2d = part in ("vae", "image", "multi_view")
        layout = torch.channels_last if in_2d else torch.contiguous_format
        self.model = build(part).to(options.device, memory_format=layout).train().requires_grad_(True)
        self._restore()
        self.first_step = self.step

    def _restore(self) -> None:
        """Continue from the saved state or, if there is none, from the averaged weights."""
        out, part = self.options.out, self.options.part
        state, record = store.load_state(out, part), {"steps": 0, "seconds": 0.0}
        if state is None and store.weights_path(out, part).exists():
            self.model.load_state_dict(store.load_part(out, part).state_dict())
            record = store.read_record(out, part)
        self.step, self._earlier_seconds = record["steps"], record["seconds"]
        on_gpu = self.options.on_gpu
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            # Read on the device, where a recorded step finds its new value.
            torch.tensor(self.peak_lr, device=self.options.device) if on_gpu else self.peak_lr,
            (0.9, 0.99),
            weight_decay=0.01,
            fused=on_gpu,
            capturable=on_gpu,
        )
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.ema = {name: value.to(self.options.device) for name, value in state["ema"].items()}
            # Its settings stay as they are: a learning rate on the device would come back as another one.
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
            self.step, self._earlier_seconds = state["step"], state["seconds"]
        current = self.model.state_dict()
        names = [name for name, value in current.items() if value.is_floating_point()]
        self._averages, self._currents = [self.ema[n] for n in names], [current[n] for n in names]

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.options.device) if self.options.on_gpu else "CPU"

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._began

    @property
    def fraction(self) -> float:
        """Share of this call's time that has passed; above 1 when it is over."""
        return self.elapsed / self._budget

    def seed(self, stream: str) -> int:
        """Seed of a stream of random numbers; it differs between calls that continue a training."""
        return step_seed(self.options.seed, self.step, stream)

    def autocast(self) -> torch.autocast:
        """bfloat16 on an accelerator, but for the causal VAE, whose convolutions may be slow in it.

        Without a cache of cast weights: what is recorded or compiled must not depend on one.
        """
        on_gpu = self.options.on_gpu
        enabled = on_gpu and self.options.part != "wan_vae"
        return torch.autocast(
            "cuda" if on_gpu else "cpu", torch.bfloat16, enabled=enabled, cache_enabled=False
        )

    def goes_on(self) -> bool:
        """Whether there is time for another step; sets its learning rate, and sometimes logs and saves."""
        done, limit = self.step - self.first_step, self.options.max_steps
        if self.fraction >= 1 or (limit is not None and done >= limit):
            return False
        self._set_lr(max(self.fraction, done / limit if limit else 0))
        if done and done % LOG_EVERY == 0:
            losses = ", ".join(f"{name} {value:.5f}" for name, value in self._mean_losses().items())
            rate, share = done / self.elapsed, 100 * self.fraction
            logger.info(
                "%s: step %d, %s, %.1f steps/s, %.0f %%", self.options.part, self.step, losses, rate, share
            )
        if self.elapsed - self._saved_at > SAVE_EVERY_SECONDS:
            self._saved_at = self.elapsed
            self.save()
        return True

    def learn(self, losses: dict[str, Tensor]) -> None:
        """One optimizer step on the sum of ``losses``, which must be weighted."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack([*losses.values()]).sum().backward()
        self._update()
        self.count_step(losses)

    def descend(self, losses: Sequence[Tensor]) -> None:
        """Change the weights by the gradients of the sum of ``losses``, as a recording of a step can."""
        parameters = [*self.model.parameters()]
        gradients = torch.autograd.grad(torch.stack([*losses]).sum(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # In the parameter's own layout, which a convolution's gradient need not have.
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        self._update()

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def count_step(self, losses: dict[str, Tensor]) -> None:
        """What follows each step: the average of the weights, and what is logged."""
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self._averages, self._currents, 1 - decay)
        self._sums = {name: self._sums.get(name, 0) + loss.detach() for name, loss in losses.items()}
        self._count += 1

    def save(self, **measured: Any) -> None:
        """State, averaged weights and record."""
        options, seconds = self.options, self._earlier_seconds + self.elapsed
        state = {"model": self.model.state_dict(), "ema": self.ema, "optimizer": self.optimizer.state_dict()}
        store.save_state(options.out, options.part, state | {"step": self.step, "seconds": seconds})
        store.save_weights(options.out, options.part, self.ema)
        store.update_record(
            options.out,
            options.part,
            seed=options.seed,
            steps=self.step,
            seconds=round(seconds, 1),
            batch=self.batch,
            peak_lr=self.peak_lr,
            device=self.device_name,
            parameters=sum(p.numel() for p in self.model.parameters()),
            losses=self._mean_losses(),
            **measured,
        )

    def _set_lr(self, fraction: float) -> None:
        """Warm-up in steps, then this call's phase of a cosine over ``fraction`` (0..1) of its time."""
        warmup = min(1.0, (self.step - self.first_step + 1) / WARMUP_STEPS)
        start, end = self.options.phase
        cosine = 0.5 + 0.5 * math.cos(math.pi * (start + (end - start) * min(1.0, fraction)))
        lr = self.peak_lr * warmup * (LAST_LR_FRACTION + (1 - LAST_LR_FRACTION) * cosine)
        for group in self.optimizer.param_groups:
            if self.options.on_gpu:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _mean_losses(self) -> dict[str, float]:
        """Means since the last call that had any; waits for the device."""
        if self._count:
            self.last_losses = {name: float(value) / self._count for name, value in self._sums.items()}
        self._sums, self._count = {}, 0
        return self.last_losses
