"""The views of a finished scene that it is judged by, rendered when they are first looked at.

F frames of a sequence, S = F - 1 steps between them, H x W pixels, N azimuths around the object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fourdfy.bounds import number
from fourdfy.config import Schema
from fourdfy.evaluation.optical_flow import optical_flow
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.ops.compositing import expected_depth
from fourdfy.types import Cameras, RenderOutput

CLIP_AZIMUTHS_DEG = (0.0, 90.0, 180.0, 270.0)
FRAMES_PER_CALL = 8
SEEN = 0.5
"""Opacity above which a pixel shows the object."""


@dataclass(frozen=True, kw_only=True)
class Protocol(Schema):
    """The cameras of a judgement; numbers of two protocols can't be compared."""

    elevation: float = number(15.0, -90, 90)
    """Degrees above the horizon, of every camera."""
    views: int = number(24, 4, 360)
    """Azimuths, evenly all around."""
    frames: int = number(16, 2, 1000)
    """Moments of a clip, evenly over the scene's time."""
    size: int = number(224, 8, 4096)
    """Pixels per side. CLIP and X-CLIP read 224."""


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Frames on the CPU, with their cameras."""

    cameras: Cameras
    rgb: Float[Tensor, "F H W 3"]
    """Over the scene's own background, 0..1."""
    depth: Float[Tensor, "F H W 1"]
    """Distance from the camera, scene units; 0 where nothing is."""
    inside: Bool[Tensor, "F H W"]
    """Where the object is."""


class Views:
    """What a metric may look at.

    Args:
        render: gives frames for cameras on ``device``.
        distance, fovy_deg: of all cameras.
        dynamic: whether the scene moves.
        networks: ``networks(part)`` is a loaded network; see ``evaluation.networks``.
    """

    def __init__(
        self,
        render: Callable[[Cameras], RenderOutput],
        protocol: Protocol,
        *,
        prompt: str,
        distance: float,
        fovy_deg: float,
        dynamic: bool,
        device: str | torch.device = "cpu",
        networks: Callable[[str], Any] | None = None,
        captions: list[str] | None = None,
    ) -> None:
        self._render, self.protocol, self.prompt, self.dynamic = render, protocol, prompt, dynamic
        self._distance, self._fovy_deg, self._device = distance, fovy_deg, device
        self.networks: Any = networks
        self.captions = captions or []
        self.azimuths_deg = torch.arange(protocol.views) * (360 / protocol.views)

    @cached_property
    def around(self) -> Sequence:
        """Once around the object at time 0."""
        return self.look(self.azimuths_deg, torch.zeros_like(self.azimuths_deg))

    @cached_property
    def orbit(self) -> Sequence:
        """Once around while the whole clip passes; ``around`` for a scene that stands still."""
        if not self.dynamic:
            return self.around
        return self.look(self.azimuths_deg, self.azimuths_deg / 360)

    @cached_property
    def clips(self) -> list[Sequence]:
        """The clip from each of ``CLIP_AZIMUTHS_DEG``; none of a scene that stands still."""
        times = torch.arange(self.protocol.frames) / self.protocol.frames
        azimuths = CLIP_AZIMUTHS_DEG if self.dynamic else ()
        return [self.look(torch.full_like(times, azimuth), times) for azimuth in azimuths]

    @cached_property
    def flows(self) -> list[Float[Tensor, "S H W 2"]]:
        """The optical flow of each clip."""
        return [optical_flow(clip.rgb) for clip in self.clips]

    def look(self, azimuths_deg: Float[Tensor, "F"], times: Float[Tensor, "F"]) -> Sequence:
        """Frames from azimuths at moments."""
        cameras = orbit_cameras(
            torch.full_like(azimuths_deg, self.protocol.elevation),
            azimuths_deg,
            distance=self._distance,
            fovy_deg=self._fovy_deg,
            times=times,
            height=self.protocol.size,
            width=self.protocol.size,
        )
        found = []
        for start in range(0, len(cameras), FRAMES_PER_CALL):
            out = self._render(cameras[start : start + FRAMES_PER_CALL].to(self._device))
            depth = expected_depth(out.opacity, out.depth)
            found.append([image.float().cpu() for image in (out.comp_rgb, depth, out.opacity[..., 0])])
        rgb, depth, opacity = (torch.cat(images) for images in zip(*found, strict=True))
        return Sequence(cameras=cameras, rgb=rgb.clamp(0, 1), depth=depth, inside=opacity > SEEN)
