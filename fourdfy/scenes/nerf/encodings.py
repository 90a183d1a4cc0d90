"""Encodings: from a point of the unit cube and its time to the features that the networks read.

N points, D dimensions of a point, C features. An encoding holds its tables under the names of
4D-fy's checkpoints: ``encoding.params`` (space), ``encoding_time`` (space and time), ``time_network``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.bounds import number
from fourdfy.config import Component, inner_slot
from fourdfy.ops.field import field, serves
from fourdfy.ops.hash_grid import OPERATION, hash_grid
from fourdfy.ops.hash_grid.spec import HashGridSpec, over_time
from fourdfy.ops.spherical_harmonics import MAX_DEGREE, spherical_harmonics
from fourdfy.registry import register
from fourdfy.scenes.nerf.mlp import VanillaMLP, stacked, stacked_sizes
from fourdfy.types import TensorRecord

INIT_SEED = 1337
"""As in tiny-cuda-nn, every grid draws from the same seed, so two of the same shape start equal."""
INIT_BOUND = 1e-4


@dataclass(frozen=True, kw_only=True)
class EncodingOutput(TensorRecord):
    """Features of N points, and how far they were displaced to find them."""

    features: Float[Tensor, "N C"]
    deformation: Float[Tensor, "N 3"] | None = None
    """In unit-cube coordinates; None without a deformation."""


@dataclass(frozen=True, kw_only=True)
class EncodingReadings:
    """What networks make of the features of N points."""

    outputs: list[Tensor]
    """[N, O] of each network."""
    deformation: Float[Tensor, "N 3"] | None = None
    """See ``EncodingOutput``."""


class Encoding(Component, nn.Module, ABC):
    """Features of points at their times."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        include_xyz: bool = False
        """Put the point itself, scaled to -1..1, before the features."""

    cfg: Config
    n_output_dims: int

    def __init__(self, cfg: Config, n_input_dims: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.n_input_dims = n_input_dims

    @abstractmethod
    def forward(self, x: Float[Tensor, "N D"], times: Float[Tensor, "N 1"], *, step: int) -> EncodingOutput:
        """Features of ``x``, nominally in the unit cube, at ``times`` in 0..1."""

    def read(
        self,
        networks: Sequence[VanillaMLP],
        x: Float[Tensor, "N D"],
        times: Float[Tensor, "N 1"],
        *,
        step: int,
    ) -> EncodingReadings:
        """What ``networks`` make of the features at ``x``."""
        return _read(self(x, times, step=step), networks)

    def dynamic_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that matter only if the scene moves."""
        return iter(())

    def finest_resolution(self, step: int) -> float:
        """Cells per axis of the finest level in use.

        Raises:
            ValueError: the encoding has no levels.
        """
        raise ValueError(
            f"{type(self).__name__} has no resolution; give finite_difference_normal_eps a number"
        )


def _read(out: EncodingOutput, networks: Sequence[VanillaMLP]) -> EncodingReadings:
    outputs = [network(out.features) for network in networks]
    return EncodingReadings(outputs=outputs, deformation=out.deformation)


class CompositeEncoding(nn.Module):
    """An encoding, preceded by the point itself if its config says ``include_xyz``."""

    def __init__(self, cfg: Encoding.Config, n_input_dims: int) -> None:
        super().__init__()
        self.encoding: Encoding = cfg.build(n_input_dims)
        self.include_xyz = cfg.include_xyz
        self.n_output_dims = self.encoding.n_output_dims + (n_input_dims if cfg.include_xyz else 0)

    def forward(self, x: Float[Tensor, "N D"], times: Float[Tensor, "N 1"], *, step: int) -> EncodingOutput:
        out = self.encoding(x, times, step=step)
        if not self.include_xyz:
            return out
        features = torch.cat([2 * x - 1, out.features], dim=-1)
        return EncodingOutput(features=features, deformation=out.deformation)

    def read(
        self,
        networks: Sequence[VanillaMLP],
        x: Float[Tensor, "N D"],
        times: Float[Tensor, "N 1"],
        *,
        step: int,
    ) -> EncodingReadings:
        """See ``Encoding.read``."""
        if not self.include_xyz:
            return self.encoding.read(networks, x, times, step=step)
        return _read(self(x, times, step=step), networks)

    def dynamic_parameters(self) -> Iterator[nn.Parameter]:
        return self.encoding.dynamic_parameters()


class HashTable(nn.Module):
    """The parameters of one hash grid."""

    def __init__(self, spec: HashGridSpec, backend: str) -> None:
        super().__init__()
        self.spec, self.backend = spec, backend
        generator = torch.Generator().manual_seed(INIT_SEED)
        uniform = torch.rand(spec.n_params, generator=generator)
        self.params = nn.Parameter(uniform.mul_(2).sub_(1).mul_(INIT_BOUND))  # in place: it is large

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        return hash_grid(x, self.params, self.spec, self.backend)


# ---------------------------------------------------------------------------------------------
# Grids over their inputs alone


MOST_ENTRIES = 2**30
"""Numbers in the tables of a hash grid; the paper's have 2^24."""


@register("HashGrid")
class HashGrid(Encoding):
    """A hash grid that does not depend on time."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoding.Config):
        n_levels: int = number(16, 1, 32)
        """Number of grids, from coarse to fine, whose features are concatenated."""
        n_features_per_level: int = number(2, 1, 8)
        """Channels of each grid."""
        log2_hashmap_size: int = number(19, 3, 24)
        """Entries of a level's table, as a power of two; finer grids share them by hashing."""
        base_resolution: int = number(16, 1, 4096)
        """Cells along each axis of the coarsest level."""
        per_level_scale: float = number(1.447269237440378, 1, 16)
        """Ratio of two levels' resolutions; with 16 levels from 16 on the finest has 4096 cells."""
        backend: str = "auto"
        """Back end of ``ops.hash_grid``."""
        static: bool = False
        """Whether the scene has no time. 4D-fy's files set it in all grids; only space-time grids use it."""

        def __post_init__(self) -> None:
            self.spec(3)
            OPERATION.check(self.backend)
            if (
                entries := self.n_levels * self.n_features_per_level << self.log2_hashmap_size
            ) > MOST_ENTRIES:
                raise ValueError(
                    f"n_levels, n_features_per_level, log2_hashmap_size: tables of {entries:,} numbers; "
                    f"expected {MOST_ENTRIES:,} at most"
                )

        def spec(self, n_input_dims: int) -> HashGridSpec:
            return HashGridSpec(
                n_input_dims=n_input_dims,
                n_levels=self.n_levels,
                n_features_per_level=self.n_features_per_level,
                log2_hashmap_size=self.log2_hashmap_size,
                base_resolution=self.base_resolution,
                per_level_scale=self.per_level_scale,
            )

        def table(self, n_input_dims: int) -> HashTable:
            return HashTable(self.spec(n_input_dims), self.backend)

    cfg: Config

    def __init__(self, cfg: Config, n_input_dims: int = 3) -> None:
        super().__init__(cfg, n_input_dims)
        self.encoding = cfg.table(n_input_dims)
        self.n_output_dims = self.encoding.spec.n_output_dims

    def forward(self, x: Float[Tensor, "N D"], times: Float[Tensor, "N 1"], *, step: int) -> EncodingOutput:
        return EncodingOutput(features=self.encoding(x))

    def finest_resolution(self, step: int) -> float:
        return self._resolution(self.cfg.n_levels)

    def _resolution(self, n_levels: int) -> float:
        return self.cfg.base_resolution * self.cfg.per_level_scale ** (n_levels - 1)


@register("Grid")
class Grid(HashGrid):
    """tiny-cuda-nn's own name for a hash grid; what ``time_encoding_config`` holds."""

    @dataclass(frozen=True, kw_only=True)
    class Config(HashGrid.Config):
        type: Literal["Hash"] = "Hash"
        """Kind of grid; ``Hash`` is the only one."""


@register("ProgressiveBandHashGrid")
class ProgressiveBandHashGrid(HashGrid):
    """A hash grid whose finer levels are switched on one by one (coarse to fine, as in Neuralangelo)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(HashGrid.Config):
        start_level: int = number(low=1, high=32)
        """Levels in use until ``start_step + update_steps``."""
        start_step: int = number(low=0)
        """The global step from which levels are counted up."""
        update_steps: int = number(low=1)
        """Steps between one level and the next."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.start_level > self.n_levels:
                raise ValueError(f"start_level={self.start_level}: expected 1 to n_levels={self.n_levels}")

    cfg: Config

    def forward(self, x: Float[Tensor, "N D"], times: Float[Tensor, "N 1"], *, step: int) -> EncodingOutput:
        features = self.encoding(x)
        n_open = self.open_levels(step) * self.cfg.n_features_per_level
        open_columns = torch.arange(features.shape[1], device=features.device) < n_open
        return EncodingOutput(features=features * open_columns)

    def open_levels(self, step: int) -> int:
        """How many levels, from the coarsest on, are in use at ``step``."""
        cfg = self.cfg
        return min(cfg.start_level + max(step - cfg.start_step, 0) // cfg.update_steps, cfg.n_levels)

    def finest_resolution(self, step: int) -> float:
        return self._resolution(self.open_levels(step))


# ---------------------------------------------------------------------------------------------
# Grids over space and time


class OverTime(HashGrid):
    """A grid over space beside one over space and time."""

    @dataclass(frozen=True, kw_only=True)
    class Config(HashGrid.Config):
        time_scale: float = number(1.0, above=0, high=1)
        """Cells of the space-time grid along its axis of time, for each one along an axis of space. With less
        than 1, what is learned at a moment is shared by more of its neighbours. Not more than 1: the grids
        wrap around."""

    cfg: Config

    def moments(self, x: Float[Tensor, "N D"], times: Float[Tensor, "N 1"]) -> Float[Tensor, "N 1"]:
        """Coordinates on the axis of time; of a static scene, those of time 0."""
        return (torch.zeros_like(times) if self.cfg.static else times * self.cfg.time_scale).to(x.dtype)


@register("HashGridSpatialTime")
class HashGridSpatialTime(OverTime):
    """The sum of a grid over space and a grid over space and time (Bahmani et al. 2024, sec. 3.1).

    A static scene still reads the second grid, at time 0, so that training a static scene first does not
    change it at time 0 later.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(OverTime.Config):
        time_encoding_config: Any = inner_slot(Grid, "otype")
        """The shape of the space-time grid; null: that of the space grid."""

        def __post_init__(self) -> None:
            super().__post_init__()
            time = self.time_encoding_config
            if time and time.spec(4).n_output_dims != self.spec(3).n_output_dims:
                raise ValueError(
                    f"the time grid gives {time.spec(4).n_output_dims} features and the space grid "
                    f"{self.spec(3).n_output_dims}, but they are added; make n_levels * n_features_per_level "
                    f"of time_encoding_config equal"
                )
            if time and time.include_xyz:
                raise ValueError("time_encoding_config.include_xyz: the two grids are added; leave it false")

    cfg: Config

    def __init__(self, cfg: Config, n_input_dims: int = 3) -> None:
        super().__init__(cfg, n_input_dims)
        self.encoding_time = (cfg.time_encoding_config or cfg).table(n_input_dims + 1)

    def forward(self, x: Float[Tensor, "N D"], times: Float[Tensor, "N 1"], *, step: int) -> EncodingOutput:
        there = torch.cat([x, self.moments(x, times)], dim=-1)
        return EncodingOutput(features=self.encoding(x) + self.encoding_time(there))

    def read(
        self,
        networks: Sequence[VanillaMLP],
        x: Float[Tensor, "N D"],
        times: Float[Tensor, "N 1"],
        *,
        step: int,
    ) -> EncodingReadings:
        """In one operation, whose features are never seen, where ``ops.field`` has a fast back end for it."""
        spec, alike = self.encoding.spec, self.encoding_time.spec == over_time(self.encoding.spec)
        plain = all(network.is_plain for network in networks)
        auto = {self.encoding.backend, self.encoding_time.backend} == {"auto"}
        if not (plain and alike and auto and serves(x, spec, stacked_sizes(networks))):
            return super().read(networks, x, times, step=step)
        tables = self.encoding.params, self.encoding_time.params
        columns = field(x, self.moments(x, times)[:, 0], *tables, spec, *stacked(networks)).split(
            [len(network.matrices[1]) for network in networks], dim=1
        )
        return EncodingReadings(
            outputs=[network.output_activation(some) for network, some in zip(networks, columns, strict=True)]
        )

    def dynamic_parameters(self) -> Iterator[nn.Parameter]:
        return self.encoding_time.parameters()


@register("HashGridSpatialTimeDeform")
class HashGridSpatialTimeDeform(OverTime):
    """A grid over space, read where a deformation over space and time sends the point.

    The displacement is in unit-cube coordinates and may leave the cube. A static scene is not
    displaced, and its deformation is None; if the scene moves, the grid over space is no longer trained.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(OverTime.Config):
        time_encoding_config: Any = inner_slot(
            Encoding, "otype", {"otype": "Grid", "n_levels": 8, "base_resolution": 4}
        )
        """The grid over space and time that the deformation reads."""
        time_network_config: Any = inner_slot(
            VanillaMLP, "otype", {"otype": "VanillaMLP", "n_hidden_layers": 2}
        )
        """The network from its features to the displacement."""

    cfg: Config

    def __init__(self, cfg: Config, n_input_dims: int = 3) -> None:
        super().__init__(cfg, n_input_dims)
        self.encoding_time = CompositeEncoding(cfg.time_encoding_config, n_input_dims + 1)
        self.time_network: VanillaMLP = cfg.time_network_config.build(
            self.encoding_time.n_output_dims, n_input_dims
        )
        self.encoding.requires_grad_(cfg.static)

    def forward(self, x: Float[Tensor, "N D"], times: Float[Tensor, "N 1"], *, step: int) -> EncodingOutput:
        if self.cfg.static:
            return EncodingOutput(features=self.encoding(x))
        here_and_now = torch.cat([x, self.moments(x, times)], dim=-1)
        moved = self.time_network(self.encoding_time(here_and_now, times, step=step).features)
        return EncodingOutput(features=self.encoding(x + moved), deformation=moved)

    def dynamic_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.encoding_time.parameters()
        yield from self.time_network.parameters()


# ---------------------------------------------------------------------------------------------
# Directions


@register("SphericalHarmonics")
class SphericalHarmonics(Encoding):
    """Harmonics of directions given as (d + 1) / 2, as all inputs are nominally in the unit cube."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoding.Config):
        degree: int = number(3, 1, MAX_DEGREE)
        """Bands of harmonics; there are degree^2 of them."""

    cfg: Config

    def __init__(self, cfg: Config, n_input_dims: int = 3) -> None:
        super().__init__(cfg, n_input_dims)
        self.encoding = _NoTable()
        self.n_output_dims = cfg.degree**2

    def forward(self, x: Float[Tensor, "N D"], times: Float[Tensor, "N 1"], *, step: int) -> EncodingOutput:
        return EncodingOutput(features=spherical_harmonics(2 * x - 1, self.cfg.degree))


class _NoTable(nn.Module):
    """The parameter of length 0 that 4D-fy's checkpoints hold where an encoding has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.params = nn.Parameter(torch.zeros(0))
