"""What one training step consists of: parts, kernels, launches, synchronisations."""

from __future__ import annotations

import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import synchronize
from torch.profiler import ProfilerActivity, profile

from fourdfy.systems.base import System

PARTS = ("occupancy", "march and prune", "shade", "VAE", "U-Net", "guidance", "backward", "optimizer", "rest")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
"""Beginnings of the names of the CUDA calls that start work on the GPU."""


class PartTimes:
    """Seconds spent in each part of the steps, with a synchronisation at every change of part.

    A part that is called inside another is not counted there. What has no name in ``watch`` is "backward"
    until the gradients are there, "optimizer" until the step ends, else "rest".
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack = ["rest"]
        self._restore: list[Callable[[], None]] = []
        synchronize()
        self._since = time.perf_counter()

    @contextmanager
    def watch(self, system: System) -> Iterator[PartTimes]:
        """Time the steps of ``system`` inside."""
        self._watch(system, "before_step", "occupancy")
        self._watch(system.scene, "render", "shade")
        for module in system.scene.modules():
            self._watch(module, "_samples", "march and prune")
        for kind in system.plan.kinds:
            guidance = getattr(system, kind.module)
            self._watch(guidance, "forward", "guidance")
            self._watch(guidance.prior, "encode", "VAE")
            for method in ("denoise", "predict"):
                self._watch(guidance.prior, method, "U-Net")
            for method in ("denoise_renderings", "recorded_lora"):
                self._watch(guidance, method, "U-Net")
        self._watch(system, "training_step", "rest", then="backward")
        self._watch(system, "after_backward", "rest", then="optimizer")
        try:
            yield self
        finally:
            for restore in self._restore:
                restore()

    def end_step(self) -> None:
        self._change(lambda: self._stack.__setitem__(0, "rest"))

    def _watch(self, owner: Any, method: str, part: str, then: str | None = None) -> None:
        if (original := getattr(owner, method, None)) is None:
            return

        def timed(*args: Any, **keywords: Any) -> Any:
            self._change(lambda: self._stack.append(part))
            try:
                return original(*args, **keywords)
            finally:
                self._change(self._stack.pop)
                if then:
                    self._stack[0] = then

        own = method in vars(owner)
        self._restore.append(
            partial(setattr, owner, method, original) if own else partial(delattr, owner, method)
        )
        setattr(owner, method, timed)

    def _change(self, change: Callable[[], Any]) -> None:
        synchronize()
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        change()
        self._since = time.perf_counter()


@contextmanager
def kernels(steps: int) -> Iterator[dict[str, Any]]:
    """Fill a dict with the GPU's work inside, as means of a step: kernels' ms and number, launches, and the
    ten longest kernels."""
    found: dict[str, Any] = {}
    if not torch.cuda.is_available():
        yield found
        return
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as prof:
        yield found
        synchronize()
    times, counts, launches = Counter[str](), Counter[str](), 0
    for event in prof.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time_total
            counts[event.name] += 1
        else:
            launches += event.name.startswith(LAUNCHES)
    found["kernels_ms"] = sum(times.values()) / 1000 / steps
    found["kernels"] = sum(counts.values()) / steps
    found["launches"] = launches / steps
    found["longest"] = [
        (round(us / 1000 / steps, 3), counts[name] / steps, name[:90]) for name, us in times.most_common(10)
    ]


@contextmanager
def synchronisations() -> Iterator[Counter[str]]:
    """Count where the CPU waits for the GPU inside: file and line -> how often."""
    found = Counter[str]()
    if not torch.cuda.is_available():
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing" in str(warning.message):
            found[f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"] += 1
