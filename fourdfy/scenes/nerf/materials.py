"""Materials: from a geometry's features to colours.

N points, C features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from fourdfy.bounds import number
from fourdfy.config import inner_slot
from fourdfy.ops.activations import get_activation
from fourdfy.registry import register
from fourdfy.scenes.nerf.base import Material, ShadingPoints
from fourdfy.scenes.nerf.encodings import CompositeEncoding, Encoding
from fourdfy.scenes.nerf.mlp import VanillaMLP
from fourdfy.types import FieldOutput, StepContext


@register("no-material")
class NoMaterial(Material):
    """The features are the colours, up to an activation (and a network, if the config has one)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Material.Config):
        n_output_dims: int = number(3, 3, 3)
        """Channels of a colour."""
        color_activation: str | None = "sigmoid"
        """Activation, any name of ``ops.activations``."""
        input_feature_dims: int | None = number(None, 1, 256)
        """Features that the network reads; only with ``mlp_network_config``."""
        mlp_network_config: Any = inner_slot(VanillaMLP, "otype")

        def __post_init__(self) -> None:
            get_activation(self.color_activation)
            if bool(self.mlp_network_config) != (self.input_feature_dims is not None):
                raise ValueError("input_feature_dims and mlp_network_config go together; set both or neither")

        def check_features(self, count: int) -> None:
            _expect_features(count, self.input_feature_dims or self.n_output_dims)

    cfg: Config

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.color_activation = get_activation(cfg.color_activation)
        self.network: VanillaMLP | None = None
        if cfg.mlp_network_config:
            self.network = cfg.mlp_network_config.build(cfg.input_feature_dims, cfg.n_output_dims)

    def forward(
        self, field: FieldOutput, points: ShadingPoints, context: StepContext
    ) -> Float[Tensor, "N 3"]:
        return self.color_activation(self.network(field.features) if self.network else field.features)


@register("diffuse-with-point-light-material")
class DiffuseWithPointLight(Material):
    """Lambertian shading by one point light and an ambient one (Poole et al. 2022, eq. 9).

    In training, one draw per call decides between colours alone, shading alone, and both, so that texture
    can't stand in for geometry.
    """

    requires_normal = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Material.Config):
        ambient_light_color: tuple[float, float, float] = number((0.1, 0.1, 0.1), 0, 10)
        """RGB of the ambient light."""
        diffuse_light_color: tuple[float, float, float] = number((0.9, 0.9, 0.9), 0, 10)
        """RGB of the point light."""
        ambient_only_steps: int = number(1000, 0)
        """Before this step, colours are not shaded."""
        diffuse_prob: float = number(0.75, 0, 1)
        """Probability of shading a call, after ``ambient_only_steps``."""
        textureless_prob: float = number(0.5, 0, 1)
        """Probability that a shaded call shows the shading without the colours."""
        albedo_activation: str | None = "sigmoid"
        """Activation, any name of ``ops.activations``."""
        soft_shading: bool = False
        """In training, also draw the share of the diffuse light at random."""

        def __post_init__(self) -> None:
            get_activation(self.albedo_activation)

        def check_features(self, count: int) -> None:
            _expect_features(min(count, 3), 3)

    cfg: Config

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.albedo_activation = get_activation(cfg.albedo_activation)

    def forward(
        self, field: FieldOutput, points: ShadingPoints, context: StepContext
    ) -> Float[Tensor, "N 3"]:
        """Evaluation shades, once ``ambient_only_steps`` are over.

        Raises:
            ValueError: no normals.
        """
        cfg = self.cfg
        albedo = self.albedo_activation(field.features[:, :3])
        if context.step < cfg.ambient_only_steps:
            return albedo.clamp(0, 1)
        if field.normals is None:
            raise ValueError("shading needs normals; use geometry.normal_type=finite_difference")

        ambient, diffuse = (
            albedo.new_tensor(cfg.ambient_light_color),
            albedo.new_tensor(cfg.diffuse_light_color),
        )
        lambert = _lambert(field.normals, points)
        if context.generator is None:
            return (albedo * (ambient + diffuse * lambert)).clamp(0, 1)

        # The draws stay on the device: reading one back would stop the host until the GPU caught up.
        draws = torch.rand(3, generator=context.generator, device=context.generator.device)
        shaded, textureless, share = draws.to(albedo)
        if cfg.soft_shading:
            ambient, diffuse = (1 - share).expand(3), share.expand(3)
        light = ambient + diffuse * lambert
        alone = torch.where(textureless < cfg.textureless_prob, light, albedo * light)
        return torch.where(shaded > cfg.diffuse_prob, albedo, alone).clamp(0, 1)


@register("neural-radiance-material")
class NeuralRadiance(Material):
    """A small network of the features and of the viewing direction, as in NeRF."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Material.Config):
        input_feature_dims: int = number(8, 1, 256)
        """Number of features; must equal ``geometry.n_feature_dims``."""
        color_activation: str | None = "sigmoid"
        """Activation, any name of ``ops.activations``."""
        dir_encoding_config: Any = inner_slot(Encoding, "otype", {"otype": "SphericalHarmonics"})
        mlp_network_config: Any = inner_slot(
            VanillaMLP, "otype", {"otype": "VanillaMLP", "n_neurons": 16, "n_hidden_layers": 2}
        )

        def __post_init__(self) -> None:
            get_activation(self.color_activation)

        def check_features(self, count: int) -> None:
            _expect_features(count, self.input_feature_dims)

    cfg: Config

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoding = CompositeEncoding(cfg.dir_encoding_config, 3)
        width = cfg.input_feature_dims + self.encoding.n_output_dims
        self.network: VanillaMLP = cfg.mlp_network_config.build(width, 3)
        self.color_activation = get_activation(cfg.color_activation)

    def forward(
        self, field: FieldOutput, points: ShadingPoints, context: StepContext
    ) -> Float[Tensor, "N 3"]:
        features = field.features
        with torch.autocast(features.device.type, enabled=False):
            unit_cube = (points.directions.to(features.dtype) + 1) / 2
            seen_from = self.encoding(unit_cube, torch.zeros_like(unit_cube[:, :1]), step=context.step)
            return self.color_activation(self.network(torch.cat([features, seen_from.features], dim=-1)))


def _expect_features(count: int, wanted: int) -> None:
    if count != wanted:
        raise ValueError(
            f"the material reads {wanted} features and the geometry gives {count}; "
            f"use system.geometry.n_feature_dims={wanted}"
        )


def _lambert(normals: Float[Tensor, "N 3"], points: ShadingPoints) -> Float[Tensor, "N 1"]:
    to_light = normalize(points.light_positions - points.positions, dim=-1)
    return (normals * to_light).sum(dim=-1, keepdim=True).clamp(min=0)
