"""The 4D field of 4D-fy: an encoding of space and time, then one network each for density and features.

N points. Positions are in scene units inside the cube [-radius, radius]^3; the encoding sees them in
the unit cube. Nothing is clamped there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from fourdfy.bounds import number
from fourdfy.config import inner_slot
from fourdfy.ops.activations import get_activation
from fourdfy.registry import register
from fourdfy.scenes.nerf.base import Geometry
from fourdfy.scenes.nerf.encodings import (
    CompositeEncoding,
    Encoding,
    EncodingReadings,
    HashGridSpatialTimeDeform,
)
from fourdfy.scenes.nerf.mlp import VanillaMLP
from fourdfy.schedules import schedule_value
from fourdfy.types import FieldOutput

BLOBS = ("blob_dreamfusion", "blob_magic3d")


@dataclass(frozen=True, kw_only=True)
class BlobStdAnnealing:
    """A ramp of the density blob's width over the steps, constant before and after it."""

    min_anneal_step: int = number(low=0)
    """The global step until which the width is ``start_val``."""
    max_anneal_step: int = number(low=1)
    """The global step from which the width is ``end_val``."""
    start_val: float = number(above=0, high=1000)
    """Width at the start, in scene units."""
    end_val: float = number(above=0, high=1000)
    """Width at the end, in scene units."""


@register("implicit-volume")
class ImplicitVolume(Geometry):
    """Density and features of a moving scene. All arithmetic in the parameters' dtype, also in autocast."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Geometry.Config):
        radius: float = number(1.0, above=0, high=1000)
        """Half side of the scene's cube, in scene units."""
        n_input_dims: int = number(3, 3, 3)
        """Dimensions of space; time is added to them."""
        n_feature_dims: int = number(3, 0, 256)
        """Channels for the material; 0 for none."""
        density_activation: str | None = "softplus"
        """Activation, any name of ``ops.activations``."""
        density_bias: float | int | str = number("blob_magic3d", -1e4, 1e4)
        """A number, ``blob_dreamfusion`` or ``blob_magic3d``; added before the activation."""
        density_blob_scale: float = number(10.0, 0, 1e4)
        """Density in the middle of the blob that is added, before the activation."""
        density_blob_std: float = number(0.5, above=0, high=1000)
        """Width of the blob, in scene units."""
        anneal_density_blob_std_config: BlobStdAnnealing | None = None
        """Replaces ``density_blob_std`` by a ramp over the steps."""
        pos_encoding_config: Any = inner_slot(Encoding, "otype", {"otype": "HashGrid"})
        mlp_network_config: Any = inner_slot(VanillaMLP, "otype", {"otype": "VanillaMLP"})
        normal_type: (
            Literal["finite_difference", "finite_difference_laplacian", "pred", "analytic"] | None
        ) = "finite_difference"
        """Central differences (4D-fy's and threestudio's names of the same six evaluations), a separate
        network, or autograd."""
        finite_difference_normal_eps: float | int | str = number(0.01, above=0, high=1000)
        """Step in scene units; ``progressive`` is one cell of the encoding's finest level in use."""

        def __post_init__(self) -> None:
            super().__post_init__()
            get_activation(self.density_activation)
            if isinstance(self.density_bias, str) and self.density_bias not in BLOBS:
                raise ValueError(
                    f"density_bias={self.density_bias!r}: expected a number, {' or '.join(BLOBS)}"
                )
            eps = self.finite_difference_normal_eps
            if isinstance(eps, str) and eps != "progressive":
                raise ValueError(
                    f"finite_difference_normal_eps={eps!r}: expected a number above 0 or 'progressive'"
                )
            ramp = self.anneal_density_blob_std_config
            if ramp and ramp.min_anneal_step >= ramp.max_anneal_step:
                raise ValueError(
                    f"anneal_density_blob_std_config: min_anneal_step={ramp.min_anneal_step} must be below "
                    f"max_anneal_step={ramp.max_anneal_step}"
                )

        @property
        def num_features(self) -> int:
            return self.n_feature_dims

        @property
        def has_normals(self) -> bool:
            return self.normal_type is not None

        @property
        def has_deformation(self) -> bool:
            encoding = self.pos_encoding_config
            return isinstance(encoding, HashGridSpatialTimeDeform.Config) and not encoding.static

    cfg: Config
    bbox: Float[Tensor, "2 3"]

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        corner = torch.full((3,), cfg.radius)
        self.register_buffer("bbox", torch.stack([-corner, corner]))
        self.encoding = CompositeEncoding(cfg.pos_encoding_config, cfg.n_input_dims)
        width = self.encoding.n_output_dims
        self.density_network: VanillaMLP = cfg.mlp_network_config.build(width, 1)
        if cfg.n_feature_dims > 0:
            self.feature_network: VanillaMLP = cfg.mlp_network_config.build(width, cfg.n_feature_dims)
        if cfg.normal_type == "pred":
            self.normal_network: VanillaMLP = cfg.mlp_network_config.build(width, 3)
        self.density_activation = get_activation(cfg.density_activation)

    @property
    def radius(self) -> float:
        return self.cfg.radius

    def dynamic_parameters(self) -> Iterator[nn.Parameter]:
        return self.encoding.dynamic_parameters()

    def forward(
        self,
        positions: Float[Tensor, "N 3"],
        times: Float[Tensor, "N 1"],
        *,
        step: int,
        want_normals: bool = False,
    ) -> FieldOutput:
        """See ``Geometry.forward``. One evaluation of the encoding serves density and features.

        Raises:
            ValueError: normals are requested and ``normal_type`` is null.
        """
        with torch.autocast(positions.device.type, enabled=False):
            positions, times = positions.to(self.bbox.dtype), times.to(self.bbox.dtype)
            networks = [self.density_network]
            if self.cfg.n_feature_dims > 0:
                networks.append(self.feature_network)
            if want_normals and self.cfg.normal_type == "pred":
                networks.append(self.normal_network)
            read = self._read(networks, positions, times, step)
            outputs = dict(zip(networks, read.outputs, strict=True))
            sigmas = self._sigmas(outputs[self.density_network], positions, step)
            if self.cfg.n_feature_dims > 0:
                features = outputs[self.feature_network]
            else:
                features = sigmas.new_zeros(len(sigmas), 0)
            normals = None
            if want_normals:
                predicted = outputs[self.normal_network] if self.cfg.normal_type == "pred" else None
                normals = self._normals(positions, times, step, predicted)
        return FieldOutput(sigmas=sigmas, features=features, normals=normals, deformation=read.deformation)

    def density(
        self, positions: Float[Tensor, "N 3"], times: Float[Tensor, "N 1"], *, step: int
    ) -> Float[Tensor, "N"]:
        with torch.autocast(positions.device.type, enabled=False):
            positions, times = positions.to(self.bbox.dtype), times.to(self.bbox.dtype)
            (raw,) = self._read([self.density_network], positions, times, step).outputs
            return self._sigmas(raw, positions, step)

    def density_bias(self, positions: Float[Tensor, "N 3"], *, step: int) -> Float[Tensor, "N"] | float | int:
        """The bias added to the density before its activation; a blob is a ball to start from."""
        cfg = self.cfg
        if not isinstance(cfg.density_bias, str):
            return cfg.density_bias
        distances, std = torch.linalg.vector_norm(positions, dim=-1), self.blob_std(step)
        if cfg.density_bias == "blob_dreamfusion":  # Poole et al. 2022, app. A.2
            return cfg.density_blob_scale * torch.exp(-0.5 * (distances / std) ** 2)
        return cfg.density_blob_scale * (1 - distances / std)  # Lin et al. 2023 (Magic3D), sec. 4.1

    def blob_std(self, step: int) -> float:
        """The blob's width at ``step``, in scene units."""
        ramp = self.cfg.anneal_density_blob_std_config
        if ramp is None:
            return self.cfg.density_blob_std
        return schedule_value(
            [ramp.min_anneal_step, ramp.start_val, ramp.end_val, ramp.max_anneal_step], step
        )

    def _read(
        self,
        networks: Sequence[VanillaMLP],
        positions: Float[Tensor, "N 3"],
        times: Float[Tensor, "N 1"],
        step: int,
    ) -> EncodingReadings:
        x = (positions - self.bbox[0]) / (self.bbox[1] - self.bbox[0])
        return self.encoding.read(networks, x, times, step=step)

    def _sigmas(
        self, raw: Float[Tensor, "N 1"], positions: Float[Tensor, "N 3"], step: int
    ) -> Float[Tensor, "N"]:
        return self.density_activation(raw[:, 0] + self.density_bias(positions, step=step))

    def _normals(
        self,
        positions: Float[Tensor, "N 3"],
        times: Float[Tensor, "N 1"],
        step: int,
        predicted: Float[Tensor, "N 3"] | None,
    ) -> Float[Tensor, "N 3"]:
        """Unit vectors in the direction of decreasing density."""
        match self.cfg.normal_type:
            case "pred":
                assert predicted is not None
                outward = predicted
            case "analytic":
                outward = -self._density_gradient(positions, times, step)
            case "finite_difference" | "finite_difference_laplacian":
                outward = -self._density_difference(positions, times, step)
            case _:
                raise ValueError(
                    "geometry.normal_type is null, but the material or a loss needs normals; "
                    "use geometry.normal_type=finite_difference"
                )
        return normalize(outward, dim=-1)

    def _density_difference(
        self, positions: Float[Tensor, "N 3"], times: Float[Tensor, "N 1"], step: int
    ) -> Float[Tensor, "N 3"]:
        """Column d is the change of density from one step before a point to one after it, along axis d.

        Six evaluations in one call; steps end at the faces of the scene's cube.
        """
        offsets = self._eps(step) * torch.eye(3).to(positions)
        shifted = (positions[:, None] + torch.cat([offsets, -offsets])).clamp(-self.radius, self.radius)
        all_times = times[:, None].expand(-1, 6, -1)
        densities = self.density(shifted.reshape(-1, 3), all_times.reshape(-1, 1), step=step).view(-1, 2, 3)
        return densities[:, 0] - densities[:, 1]

    def _eps(self, step: int) -> float:
        eps = self.cfg.finite_difference_normal_eps
        if isinstance(eps, str):
            return 2 * self.radius / self.encoding.encoding.finest_resolution(step)
        return eps

    def _density_gradient(
        self, positions: Float[Tensor, "N 3"], times: Float[Tensor, "N 1"], step: int
    ) -> Float[Tensor, "N 3"]:
        """Works in no_grad too; carries a graph where the caller's grad mode allows one."""
        trained = torch.is_grad_enabled()
        with torch.enable_grad():
            if not positions.requires_grad:
                positions = positions.detach().requires_grad_()
            sigmas = self.density(positions, times, step=step)
            (gradient,) = torch.autograd.grad(sigmas.sum(), positions, create_graph=trained)
        return gradient
