"""Backgrounds: what a ray sees behind the scene.

F frames of H x W pixels. Backgrounds do not move: they know directions only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from fourdfy.bounds import number
from fourdfy.config import inner_slot
from fourdfy.ops.activations import get_activation
from fourdfy.registry import register
from fourdfy.scenes.nerf.base import Background
from fourdfy.scenes.nerf.encodings import CompositeEncoding, Encoding
from fourdfy.scenes.nerf.mlp import VanillaMLP


@dataclass(frozen=True, kw_only=True)
class AugmentedConfig(Background.Config):
    """Settings that the backgrounds share."""

    n_output_dims: int = number(3, 3, 3)
    """Channels of a colour."""
    random_aug: bool = False
    """In training, sometimes replace the background by one random colour."""
    random_aug_prob: float = number(0.5, 0, 1)
    """Probability of ``random_aug`` per call; all frames of a call share the colour."""
    random_aug_colors: list[list[float]] | None = number(None, 0, 1)
    """Colours to draw from; null: uniform in the colour cube."""

    def __post_init__(self) -> None:
        colors = self.random_aug_colors
        if colors is not None and (not colors or any(len(color) != 3 for color in colors)):
            raise ValueError(
                f"random_aug_colors={colors}: expected a list of [r, g, b], e.g. [[1, 1, 1], [0, 0, 0]]"
            )

    def augment(
        self, colors: Float[Tensor, "F H W 3"], generator: torch.Generator | None
    ) -> Float[Tensor, "F H W 3"]:
        """``colors``, or with the config's probability one colour for all of them."""
        if not self.random_aug or generator is None:
            return colors
        # The draws stay on the device: reading one back would stop the host until the GPU caught up.
        chance, pick, *channels = torch.rand(5, generator=generator, device=generator.device).to(colors)
        color = torch.stack(channels)
        if self.random_aug_colors is not None:
            palette = torch.tensor(self.random_aug_colors, pin_memory=colors.is_cuda)
            palette = palette.to(colors, non_blocking=True)
            # rounded to half precision a draw may be 1, one past the last colour
            index = (pick * len(palette)).long().clamp(max=len(palette) - 1)
            color = palette.index_select(0, index[None])[0]
        return torch.where(chance < self.random_aug_prob, color, colors)


@register("neural-environment-map-background")
class NeuralEnvironmentMap(Background):
    """A small network of the direction."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AugmentedConfig):
        color_activation: str | None = "sigmoid"
        """Activation, any name of ``ops.activations``."""
        dir_encoding_config: Any = inner_slot(Encoding, "otype", {"otype": "SphericalHarmonics"})
        mlp_network_config: Any = inner_slot(
            VanillaMLP, "otype", {"otype": "VanillaMLP", "n_neurons": 16, "n_hidden_layers": 2}
        )
        eval_color: tuple[float, float, float] | None = number(None, 0, 1)
        """Colour in evaluation, instead of the network's."""

        def __post_init__(self) -> None:
            super().__post_init__()
            get_activation(self.color_activation)

    cfg: Config

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoding = CompositeEncoding(cfg.dir_encoding_config, 3)
        self.network: VanillaMLP = cfg.mlp_network_config.build(self.encoding.n_output_dims, 3)
        self.color_activation = get_activation(cfg.color_activation)

    def forward(
        self, directions: Float[Tensor, "F H W 3"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "F H W 3"]:
        if generator is None and self.cfg.eval_color is not None:
            return directions.new_tensor(self.cfg.eval_color).expand_as(directions)
        with torch.autocast(directions.device.type, enabled=False):
            x = (directions.reshape(-1, 3).to(self.network.dtype) + 1) / 2
            encoded = self.encoding(x, x.new_zeros(len(x), 1), step=0)
            colors = self.color_activation(self.network(encoded.features)).view_as(directions)
        return self.cfg.augment(colors, generator)


@register("textured-background")
class Textured(Background):
    """An image wrapped around the scene: longitude along its height, the angle from +z along its width."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AugmentedConfig):
        height: int = number(64, 1, 4096)
        """Texels over the longitude."""
        width: int = number(64, 1, 4096)
        """Texels over the angle from +z."""
        color_activation: str | None = "sigmoid"
        """Activation, any name of ``ops.activations``."""

        def __post_init__(self) -> None:
            super().__post_init__()
            get_activation(self.color_activation)

    cfg: Config

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.texture = nn.Parameter(torch.randn(1, 3, cfg.height, cfg.width))
        self.color_activation = get_activation(cfg.color_activation)

    def forward(
        self, directions: Float[Tensor, "F H W 3"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "F H W 3"]:
        x, y, z = directions.to(self.texture).reshape(-1, 3).unbind(-1)
        across, down = 2 * torch.atan2(torch.hypot(x, y), z) / torch.pi - 1, torch.atan2(y, x) / torch.pi
        places = torch.stack([across, down], dim=-1)[None, :, None]
        with torch.autocast(directions.device.type, enabled=False):
            texels = grid_sample(self.texture, places, padding_mode="reflection", align_corners=False)
        colors = self.color_activation(texels[0, :, :, 0].T).view_as(directions)
        return self.cfg.augment(colors, generator)


@register("solid-color-background")
class SolidColor(Background):
    """One colour in every direction."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AugmentedConfig):
        color: tuple[float, float, float] = number((1.0, 1.0, 1.0), 0, 1)
        """RGB."""
        learned: bool = False
        """Train the colour, starting from ``color``."""

    cfg: Config

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        color = torch.tensor(cfg.color)
        if cfg.learned:
            self.env_color = nn.Parameter(color)
        else:
            self.register_buffer("env_color", color)

    def forward(
        self, directions: Float[Tensor, "F H W 3"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "F H W 3"]:
        return self.cfg.augment(self.env_color.expand_as(directions), generator)
