"""A scene of another kind: soft spheres in uniform motion, rendered in closed form, without samples."""

from dataclasses import dataclass

import torch
from torch import nn

from fourdfy.bounds import number
from fourdfy.ops.cameras import cast_rays
from fourdfy.registry import register
from fourdfy.scenes.base import Scene
from fourdfy.types import RenderOutput

BACKGROUND = 0.8


@register("soft-spheres")
class SoftSpheres(Scene):
    """K Gaussians of density, in a grey world; where they overlap, their colours mix by optical depth."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Scene.Config):
        count: int = number(8, 1, 10_000)
        """Spheres at the start."""
        split_at: int | None = number(None, 0)
        """The step after whose gradients every sphere becomes two; null: never."""

        @property
        def renders(self):
            return frozenset({"comp_rgb_fg"})

    def __init__(self, cfg):
        super().__init__(cfg)
        self.centers = nn.Parameter(0.3 * torch.randn(cfg.count, 3))
        self.velocities = nn.Parameter(torch.zeros(cfg.count, 3))
        self.colors = nn.Parameter(torch.randn(cfg.count, 3))
        self.sizes = nn.Parameter(torch.full((cfg.count,), 0.2))

    def render(self, cameras, context, budget="image"):
        """The optical depth of a Gaussian along a line is a function of their distance."""
        rays = cast_rays(cameras)
        centers = self.centers + rays.times[:, None, None] * self.velocities  # F K 3
        to_center = centers[:, None, None] - rays.origins[..., None, :]  # F H W K 3
        along = (to_center * rays.directions[..., None, :]).sum(-1)
        apart = to_center.square().sum(-1) - along.square()
        depths = 4 * torch.exp(-0.5 * apart / self.sizes.square())
        total = depths.sum(-1, keepdim=True)
        opacity, shares = 1 - torch.exp(-total), depths / (total + 1e-9)
        foreground = opacity * (shares @ self.colors.sigmoid())
        return RenderOutput(
            comp_rgb=foreground + BACKGROUND * (1 - opacity),
            comp_rgb_fg=foreground,
            opacity=opacity,
            depth=opacity * (shares * along).sum(-1, keepdim=True),
        )

    def halves(self):
        return {"static": [self.centers, self.colors, self.sizes], "dynamic": [self.velocities]}

    def after_backward(self, context, optimizer):
        """Split: the two halves of a sphere lie beside each other. The optimizer begins anew with them."""
        if context.step != self.cfg.split_at:
            return
        noise = torch.randn(self.centers.shape, generator=context.generator, device=context.generator.device)
        for parameter in self.parameters():
            offset = 0.05 * noise if parameter is self.centers else torch.zeros_like(parameter)
            parameter.data = torch.cat([parameter.data + offset, parameter.data - offset])
            parameter.grad = None
            optimizer.state.pop(parameter, None)

    def fit_state(self, state):
        """As many spheres as there are in ``state``."""
        for name, parameter in self.named_parameters():
            if name in state and state[name].shape[1:] == parameter.shape[1:]:
                parameter.data = torch.empty_like(state[name], device=parameter.device)
