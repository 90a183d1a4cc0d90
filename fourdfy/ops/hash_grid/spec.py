"""The shape of a hash grid, in tiny-cuda-nn's exact parameter layout.

One flat vector holds level 0's entries first, then level 1's, ...; within an entry its features
stand side by side. Checkpoints therefore move between the back ends, and to and from tiny-cuda-nn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

PRIMES = (1, 2654435761, 805459861, 3674653429, 2097192037, 1434869437, 2165219737)
"""A hashed entry is the xor of ``cell_d * PRIMES[d]`` in 32 bits, modulo the entries of its level."""


@dataclass(frozen=True)
class GridLevel:
    """One level's place in the flat parameters."""

    scale: float
    """Cells per unit length; float32-rounded. A point lies at ``scale * x + 0.5`` in cells."""
    resolution: int
    """Vertices per axis of a dense level: the stride base of its index."""
    offset: int
    """Entries before this level."""
    entries: int
    hashed: bool


@dataclass(frozen=True, kw_only=True)
class HashGridSpec:
    """The shape of a grid; everything else about it follows.

    Raises:
        ValueError: a number out of range.
    """

    n_input_dims: int = 3
    n_levels: int = 16
    n_features_per_level: int = 2
    log2_hashmap_size: int = 19
    base_resolution: int = 16
    per_level_scale: float = 1.447269237440378

    def __post_init__(self) -> None:
        bounds = {
            "n_input_dims": (1, len(PRIMES)),
            "n_levels": (1, 32),
            "n_features_per_level": (1, 8),
            "log2_hashmap_size": (3, 28),
            "base_resolution": (1, 1 << 16),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)}: expected {low} to {high}")
        if not 1 <= self.per_level_scale <= 16:
            raise ValueError(f"per_level_scale={self.per_level_scale}: expected 1 to 16")
        if not self.base_resolution * self.per_level_scale ** (self.n_levels - 1) < 1 << 24:
            raise ValueError(
                f"the finest of n_levels={self.n_levels} has over 2**24 cells per axis, more than float32 "
                f"can tell apart; lower n_levels, base_resolution or per_level_scale"
            )

    @cached_property
    def levels(self) -> tuple[GridLevel, ...]:
        """Coarse to fine. Every operation on a scale is rounded to float32, as tiny-cuda-nn has it."""
        levels, offset = [], 0
        log2_scale = np.float32(np.log2(np.float64(np.float32(self.per_level_scale))))
        # The largest grid whose dense index still fits 32 bits; anything finer is hashed.
        dense_limit = math.floor((2**32 - 1) ** (1 / self.n_input_dims) + 1e-9)
        for level in range(self.n_levels):
            growth = np.float32(np.exp2(np.float64(np.float32(level) * log2_scale)))
            scale = growth * np.float32(self.base_resolution) - np.float32(1)
            resolution = math.ceil(scale) + 1
            vertices = min(resolution**self.n_input_dims, (2**32 - 1) // 2)
            entries = min(-(-vertices // 8) * 8, 1 << self.log2_hashmap_size)
            hashed = entries < resolution**self.n_input_dims or resolution > dense_limit
            levels.append(GridLevel(float(scale), resolution, offset, entries, hashed))
            offset += entries
        return tuple(levels)

    @property
    def n_params(self) -> int:
        last = self.levels[-1]
        return (last.offset + last.entries) * self.n_features_per_level

    @property
    def n_output_dims(self) -> int:
        return self.n_levels * self.n_features_per_level


@cache
def over_time(spec: HashGridSpec) -> HashGridSpec:
    """The same shape with time as the last dimension."""
    return replace(spec, n_input_dims=spec.n_input_dims + 1)
