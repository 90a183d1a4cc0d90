"""What flows between the parts: cameras, rays, samples, fields, images, texts, batches.

F frames of a step, H x W pixels, R = F*H*W rays, N samples over all rays (packed, sorted by ray),
M moments and D view directions of a prompt, L tokens, C channels. All are frozen; ``.to(...)`` gives a copy.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class TensorRecord:
    """A frozen dataclass of tensors that moves as one."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """A copy with ``Tensor.to(*args, **kwargs)`` applied to every tensor, records included."""
        movable = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return replace(  # type: ignore[type-var]
            self,
            **{
                name: value.to(*args, **kwargs)
                for name, value in movable.items()
                if isinstance(value, Tensor | TensorRecord)
            },
        )


@dataclass(frozen=True, kw_only=True)
class Cameras(TensorRecord):
    """F frames to render: each a pinhole camera and a moment. World: right-handed, z up."""

    c2w: Float[Tensor, "F 4 4"]
    """Camera to world; columns right, up, backward, position."""
    fovy_deg: Float[Tensor, "F"]
    """Vertical angle of view."""
    elevation_deg: Float[Tensor, "F"]
    azimuth_deg: Float[Tensor, "F"]
    """0 looks at the object's front from +x, 90 from +y."""
    distances: Float[Tensor, "F"]
    """From the camera to the origin, scene units."""
    times: Float[Tensor, "F"]
    """Scene time of the frame, 0..1; static scenes pass zeros."""
    light_positions: Float[Tensor, "F 3"]
    """Point light, for materials that shade."""
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.c2w)

    def __getitem__(self, index: slice | Tensor) -> Cameras:
        """Some of the frames, by slice or by indices."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[index] for k, v in picked.items() if isinstance(v, Tensor)})


@dataclass(frozen=True, kw_only=True)
class RayBundle(TensorRecord):
    """One ray for each pixel of F frames."""

    origins: Float[Tensor, "F H W 3"]
    directions: Float[Tensor, "F H W 3"]
    """Unit length, so distances along a ray are in scene units."""
    times: Float[Tensor, "F"]
    light_positions: Float[Tensor, "F 3"]


@dataclass(frozen=True, kw_only=True)
class Samples(TensorRecord):
    """Intervals along rays, packed over all rays and sorted by ray."""

    ray_indices: Int[Tensor, "N"]
    t_starts: Float[Tensor, "N"]
    t_ends: Float[Tensor, "N"]

    def __len__(self) -> int:
        return len(self.ray_indices)


@dataclass(frozen=True, kw_only=True)
class FieldOutput(TensorRecord):
    """What a geometry says of N points at their times."""

    sigmas: Float[Tensor, "N"]
    """Volume density per scene unit, after the activation."""
    features: Float[Tensor, "N C"]
    """Input of the material, before its activation."""
    normals: Float[Tensor, "N 3"] | None = None
    """Unit outward normals; None unless asked for."""
    deformation: Float[Tensor, "N 3"] | None = None
    """Displacement of the point in unit-cube coordinates; None without a deformation field."""


@dataclass(frozen=True, kw_only=True)
class RenderOutput(TensorRecord):
    """Images of F frames, and the samples they were composited from."""

    comp_rgb: Float[Tensor, "F H W 3"]
    """Foreground over background, 0..1."""
    comp_rgb_fg: Float[Tensor, "F H W 3"]
    """Foreground, premultiplied by opacity."""
    comp_rgb_bg: Float[Tensor, "F H W 3"]
    opacity: Float[Tensor, "F H W 1"]
    depth: Float[Tensor, "F H W 1"]
    """Sum of w t, not divided by opacity; scene units."""
    z_variance: Float[Tensor, "F H W 1"]
    samples: Samples
    weights: Float[Tensor, "N"]
    comp_normal: Float[Tensor, "F H W 3"] | None = None
    deformation: Float[Tensor, "F H W 3"] | None = None
    normals: Float[Tensor, "N 3"] | None = None
    """Per-sample normals, for the orientation loss."""
    t_dirs: Float[Tensor, "N 3"] | None = None
    """Per-sample ray directions, beside ``normals``."""


@dataclass(frozen=True, kw_only=True)
class TextEmbeddings(TensorRecord):
    """A prompt's text states for each moment: plain, and one per view (side, front, back, overhead)."""

    text: Float[Tensor, "M L C"]
    text_directions: Float[Tensor, "M D L C"]
    uncond: Float[Tensor, "L C"]
    front_threshold: float
    back_threshold: float
    overhead_threshold: float
    """Degrees; see ``direction_indices``."""

    def direction_indices(
        self, elevation_deg: Float[Tensor, "B"], azimuth_deg: Float[Tensor, "B"]
    ) -> Int[Tensor, "B"]:
        """0 side, 1 front, 2 back, 3 overhead; a later match overrides, inequalities are strict."""
        azimuth = (azimuth_deg + 180) % 360 - 180
        index = torch.zeros_like(azimuth, dtype=torch.long)
        index = torch.where(azimuth.abs() < self.front_threshold, 1, index)
        index = torch.where(azimuth.abs() > 180 - self.back_threshold, 2, index)
        return torch.where(elevation_deg > self.overhead_threshold, 3, index)

    def for_views(
        self, cameras: Cameras, view_dependent: bool
    ) -> tuple[Float[Tensor, "B L C"], Float[Tensor, "B L C"]]:
        """(text, uncond) states for the views and times of B cameras.

        The M moments are equal parts of the scene's time 0..1.
        """
        moment = (cameras.times * len(self.text)).long().clamp(max=len(self.text) - 1)
        text = self.text[moment]
        if view_dependent:
            index = self.direction_indices(cameras.elevation_deg, cameras.azimuth_deg)
            text = self.text_directions[moment, index]
        return text, self.uncond.expand_as(text)


@dataclass(frozen=True, kw_only=True)
class GuidanceOutput:
    """What a guidance says of a batch of images."""

    losses: dict[str, Float[Tensor, ""]]
    """By name: ``sds`` is weighted by ``system.loss.lambda_sds``."""
    metrics: dict[str, Float[Tensor, ""] | float]
    """Logged, not optimised."""


@dataclass(frozen=True, kw_only=True)
class StepBatch(TensorRecord):
    """One training step's frames."""

    step: str
    """Name of the supervision step: multi_view, single_view, video, or a plugin's own."""
    cameras: Cameras
    global_step: int
    """The step this batch was drawn for; batches are a pure function of (seed, step)."""
