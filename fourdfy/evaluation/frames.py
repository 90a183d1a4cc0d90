"""What an evaluation sees of a scene: frames from fixed cameras over the light background, on the CPU.

F frames of a call, T moments, A azimuths, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fourdfy.evaluation import marks
from fourdfy.shapes import world
from fourdfy.types import Cameras

Render = Callable[[Cameras], tuple[Tensor, Tensor]]
"""F cameras -> rgb [F, H, W, 3] over ``BACKGROUND`` and opacity [F, H, W, 1], both 0..1."""

BACKGROUND = world.BACKGROUNDS[0]
ELEVATION_DEG = 15.0
FRAMES_PER_CALL = 24


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Frames of equal size, rendered over ``BACKGROUND``."""

    rgb: Float[Tensor, "F H W 3"]
    opacity: Float[Tensor, "F H W 1"]

    @cached_property
    def inside(self) -> Bool[Tensor, "F H W"]:
        """The silhouettes."""
        return self.opacity[..., 0] > 0.5

    @cached_property
    def colours(self) -> Float[Tensor, "F H W 3"]:
        """The object's colours without the background."""
        return marks.foreground_colour(self.rgb, self.opacity, torch.tensor(BACKGROUND))

    @cached_property
    def body_colour(self) -> Float[Tensor, "3"]:
        """``marks.body_colour`` of all frames."""
        return marks.body_colour(self.colours, self.inside)

    @cached_property
    def greyness(self) -> Float[Tensor, "F H W"]:
        """``marks.greyness`` inside the silhouettes, 0 outside."""
        return marks.greyness(self.colours, self.body_colour) * self.inside

    @cached_property
    def mark(self) -> Bool[Tensor, "F H W 2"]:
        """``marks.painted``."""
        return marks.painted(self.colours, self.inside, self.body_colour)

    @cached_property
    def smooth(self) -> Frames:
        """Each pixel the mean of 3 x 3, so that noise does not look like a mark."""
        images = torch.cat([self.rgb, self.opacity], dim=-1).movedim(-1, 1)
        images = avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False).movedim(1, -1)
        return Frames(rgb=images[..., :3], opacity=images[..., 3:])


def look(
    render: Render, times: Sequence[float], azimuths_deg: Sequence[float], device: str | torch.device
) -> Frames:
    """Every azimuth at every moment, times slowest."""
    return look_from(render, orbit(times, azimuths_deg, device))


def orbit(times: Sequence[float], azimuths_deg: Sequence[float], device: str | torch.device) -> Cameras:
    """The cameras of ``look``."""
    all_times = torch.tensor(times, device=device).repeat_interleave(len(azimuths_deg))
    azimuth_deg = torch.tensor(azimuths_deg, device=device).repeat(len(times))
    return world.orbit(torch.full_like(azimuth_deg, ELEVATION_DEG), azimuth_deg, all_times)


def drift(frames: Frames, moments: int) -> float:
    """Largest over the moments: mean colour change since the first, where the object is or was."""
    inside, rgb = (values.unflatten(0, (moments, -1)) for values in (frames.inside, frames.rgb))
    either = inside | inside[:1]
    change = (rgb - rgb[:1]).abs().mean(dim=-1) * either
    return float((change.flatten(1).sum(dim=1) / either.flatten(1).sum(dim=1).clamp_min(1)).max())


def look_from(render: Render, cameras: Cameras) -> Frames:
    """Render so many frames at a time; values that are not finite become 0.

    Raises:
        ValueError: ``render`` returns other shapes.
    """
    images = []
    for first in range(0, len(cameras), FRAMES_PER_CALL):
        some = cameras[first : first + FRAMES_PER_CALL]
        rgb, opacity = render(some)
        size = (len(some), some.height, some.width)
        if rgb.shape != (*size, 3) or opacity.shape != (*size, 1):
            raise ValueError(
                f"the renderer gave rgb {tuple(rgb.shape)} and opacity {tuple(opacity.shape)}; "
                f"wanted are {(*size, 3)} and {(*size, 1)}"
            )
        images.append([_usable(rgb), _usable(opacity)])
    rgb, opacity = (torch.cat(parts) for parts in zip(*images, strict=True))
    return Frames(rgb=rgb, opacity=opacity)


def _usable(values: Tensor) -> Tensor:
    return values.float().nan_to_num(0, 0, 0).clamp(0, 1).cpu()
