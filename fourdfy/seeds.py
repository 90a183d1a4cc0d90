"""Randomness as an argument: a generator for each (seed, step, stream).

Nothing draws from global state, so a step can be repeated exactly from (checkpoint, step).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


def step_seed(seed: int, step: int, stream: str) -> int:
    """A 63-bit seed, a pure function of its arguments."""
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def step_generator(
    seed: int, step: int, stream: str, device: torch.device | str = "cpu", part: int = 0
) -> torch.Generator:
    """A fresh generator on ``device`` for one stream ("camera", "render", "guidance") of one step, or of one
    of the parts in which it is accumulated."""
    stream = f"{stream}/{part}" if part else stream
    return torch.Generator(device=device).manual_seed(step_seed(seed, step, stream))


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's global generators, of the CPU and of ``device``, by type of device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Let the global generators draw what they drew from these ``states`` on, if those are of a ``device``
    of the same type."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which modules are initialised from ``seed``; it restores the global generators."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
