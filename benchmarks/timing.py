"""What all benchmarks share: where they run, how they repeat, and their tables in Markdown."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from fourdfy.devices import device_name

MATMUL_TFLOPS, TERABYTES_PER_SECOND = 790.0, 3.0
"""What an H100 80GB reached in half-precision matrix products, and when it copied memory."""


def floor_ms(operations: float = 0.0, n_bytes: float = 0.0) -> float:
    """The least time for so many operations in half precision and bytes of memory, on an H100."""
    return 1000 * max(operations / (MATMUL_TFLOPS * 1e12), n_bytes / (TERABYTES_PER_SECOND * 1e12))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def now_ms() -> float:
    """The wall clock, once the device is idle."""
    synchronize()
    return 1000 * time.perf_counter()


def times_ms(run: Callable[[], object], repeats: int, warm_up: int) -> list[float]:
    """Wall-clock ms of each repetition, from an idle device to an idle device."""
    times = []
    for _ in range(warm_up + repeats):
        start = now_ms()
        run()
        times.append(now_ms() - start)
    return times[warm_up:]


@dataclass
class TwoPasses:
    """Repetitions of a forward and a backward pass."""

    forward: list[float] = field(default_factory=list)
    """ms."""
    backward: list[float] = field(default_factory=list)
    """ms."""
    kept: int = 0
    """Bytes that torch held between the passes, beyond what it held before; 0 on a CPU."""
    peak: int = 0
    """The most bytes that it held at once, likewise."""

    @property
    def median(self) -> float:
        """ms of both together."""
        return statistics.median(map(sum, zip(self.forward, self.backward, strict=True)))


def two_passes(
    forward: Callable[[], Any], backward: Callable[[Any], Any], device: str, repeats: int, warm_up: int
) -> TwoPasses:
    """Time ``backward(forward())``."""
    found, cuda = TwoPasses(), device != "cpu"
    for repeat in range(warm_up + repeats):
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = now_ms()
        outputs = forward()
        middle = now_ms()
        kept = torch.cuda.memory_allocated() - before if cuda else 0
        backward(outputs)
        end = now_ms()
        del outputs
        if repeat >= warm_up:
            found.forward.append(middle - start)
            found.backward.append(end - middle)
            found.kept = max(found.kept, kept)
            found.peak = max(found.peak, torch.cuda.max_memory_allocated() - before if cuda else 0)
    return found


def spread_of(ms: list[float]) -> str:
    """The median, and the 10th to 90th percentile."""
    ordered = sorted(ms)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return f"{statistics.median(ordered):.1f} ({low:.1f}-{high:.1f})"


def row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*columns: str) -> str:
    return "\n".join([row(columns), row(["---"] * len(columns))])


def where(device: str) -> str:
    """Device, versions and commit."""
    versions = [f"torch {torch.__version__}", f"python {platform.python_version()}", f"commit {_commit()}"]
    if device != "cpu" and find_spec("triton"):
        import triton

        versions.insert(1, f"triton {triton.__version__}")
    return "; ".join([device_name(device), ", ".join(versions)])


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
