"""Which processor a run uses."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

from fourdfy.config import ConfigError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]  # the module or None


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Have ``device`` as CUDA's current one for a while, and leave PyTorch's global settings as they were."""
    import torch

    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with nullcontext() if device == "cpu" else torch.cuda.device(device):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def memory_capped(device: str, gib: float | None) -> Iterator[None]:
    """Have PyTorch reserve no more than so much of a GPU for a while: it rather gives back what it has freed.

    Beyond that it raises an ``OutOfMemoryError``, as if the GPU had no more.
    """
    if device == "cpu" or gib is None:
        yield
        return
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def memory_of(device: str) -> int | float:
    """The bytes that a device has in all; infinite if the system doesn't tell."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return float("inf")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """The most bytes that this process has taken so far, of the GPU if there is one; 0 if nothing tells."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return 0
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def device_name(device: str) -> str:
    """Of ``cpu`` or a GPU, as its maker calls it."""
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@cache
def keep_freed_memory() -> None:
    """Let the whole process keep what it frees, for later; without effect if the C library is not glibc.

    A large block else goes back to the system, which clears its pages when they are asked for again: a tenth
    of a training step on the CPU, and a third of an evaluation.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # another C library; Windows
        return
    trim_threshold, mmap_threshold = -1, -3  # <malloc.h>
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


LAUNCHED = "FOURDFY_RANKS"
"""The variable that tells a process that it was started as one of several ranks of a training."""


def by_torchrun() -> bool:
    """Whether torchrun has started this process, with others or alone."""
    return {"TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"} <= os.environ.keys()


def local_rank() -> int:
    """Which of the processes of a training on this machine this is."""
    return int(os.environ["LOCAL_RANK"]) if by_torchrun() or LAUNCHED in os.environ else 0


def is_first_rank() -> bool:
    """Whether this process is the first of a training, on all machines."""
    return (int(os.environ["RANK"]) if by_torchrun() else local_rank()) == 0


def select_devices(gpu: str | None, given_as: str = "--gpu ") -> list[str]:
    """The devices of a training, for each process on this machine one: those of a list such as ``0,1`` or
    ``cpu,cpu``; under torchrun as many as it has started processes.

    Raises:
        ConfigError: see ``select_device``; a GPU named twice, or another number of devices than of processes.
    """
    names = [gpu] if gpu is None else gpu.split(",")
    started = int(os.environ["LOCAL_WORLD_SIZE"]) if by_torchrun() else len(names)
    if by_torchrun() and gpu in (None, "cuda", "cpu"):
        is_cpu = gpu == "cpu" or (gpu is None and select_device(None) == "cpu")
        names = ["cpu" if is_cpu else f"cuda:{number}" for number in range(started)]
    if len(names) != started:
        raise ConfigError(
            f"{given_as}{gpu} names {len(names)} device{'s' * (len(names) > 1)}, and torchrun has started "
            f"{started} processes here; give one for each, or none"
        )
    devices = [select_device(name, given_as) for name in names]
    if len(devices) > 1 and "cpu" in devices and {*devices} != {"cpu"}:
        raise ConfigError(f"{given_as}{gpu}: a step is computed on GPUs or on the CPU, not on both")
    if twice := [device for device in devices if device != "cpu" and devices.count(device) > 1]:
        raise ConfigError(f"{given_as}{gpu}: names {twice[0]} twice; give each GPU once, e.g. {given_as}0,1")
    return devices


def select_device(gpu: str | None, given_as: str = "--gpu ") -> str:
    """``cpu`` or ``cuda:N`` for a value of ``--gpu``; without one the first GPU, or the CPU if there is none.

    N counts the GPUs that CUDA_VISIBLE_DEVICES leaves visible, as everywhere in CUDA; if that is a single
    number, N may also be that number, as in the original.

    Args:
        given_as: what stands before the value, in messages.

    Raises:
        ConfigError: there is no such GPU, or the value names none or several.
    """
    match = re.fullmatch(r"cpu|cuda|(?:cuda:)?(\d+)", "cuda" if gpu is None else gpu)
    if not match and "," in str(gpu):
        raise ConfigError(f"{given_as}{gpu}: only a training uses several; give one, e.g. {given_as}0")
    if not match:
        raise ConfigError(f"{given_as}{gpu}: expected cpu, cuda, cuda:N, or N, the number of a GPU")
    if gpu == "cpu":
        return "cpu"
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = 0 if match[1] == visible else int(match[1] or 0)
    count = torch.cuda.device_count()
    if index < count:
        return f"cuda:{index}"
    if gpu is None:
        return "cpu"
    of = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
    if count == 0:
        raise ConfigError(
            f"{given_as}{gpu}: PyTorch {torch.__version__} sees no GPU{of}; "
            f"without {given_as.strip(' =')} the run is on the CPU"
        )
    known = f"only {given_as}0" if count == 1 else f"{given_as}0 to {given_as}{count - 1}"
    raise ConfigError(f"{given_as}{gpu}: no such GPU; PyTorch sees {known}{of}")
