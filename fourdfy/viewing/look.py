"""What the prior of a kind of step sees: the frames, the noisy latents, and what it takes for clean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourdfy.files.images import Pixels, side_by_side, to_pixels
from fourdfy.guidance.base import Guidance
from fourdfy.guidance.distillation import Distillation, NoisyLatents

MOST_FRAMES = 4
"""Frames of a step that are shown."""


class Look:
    """Notes what the next call of a guidance sees, and changes nothing. It costs its decoding, once.

    Guidances that are no ``Distillation`` show their frames alone.
    """

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance
        self._frames: Tensor | None = None
        self._latents: dict[str, Tensor] = {}
        self._hook = guidance.register_forward_pre_hook(self._see)
        if isinstance(guidance, Distillation):
            guidance.observer = self._see_latents

    def _see(self, guidance: Any, given: tuple[Any, ...]) -> None:
        frames, _, cameras, _ = given
        # Of a clip, evenly; of views, the first ones.
        stride = max(1, cameras.group_size // MOST_FRAMES) if guidance.cfg.is_video else 1
        self._frames = frames.comp_rgb.detach()[: MOST_FRAMES * stride : stride].clone()
        self._latents = {}

    def _see_latents(self, x: NoisyLatents, x0: Tensor) -> None:
        if not self._latents:  # the clip itself comes before the one held still
            self._latents = {"noisy": x.noisy.clone(), "x0": x0.clone()}

    @property
    def is_done(self) -> bool:
        return self._frames is not None

    def close(self) -> None:
        """See nothing any more."""
        self._hook.remove()
        if isinstance(self.guidance, Distillation):
            self.guidance.observer = None

    @torch.no_grad()
    def images(self) -> dict[str, Pixels]:
        """``frames``, ``noisy`` and ``x0``, each a row of images of one height."""
        assert self._frames is not None, "is_done comes first"
        images = {"frames": self._frames}
        if isinstance(self.guidance, Distillation):
            prior = self.guidance.prior
            images |= {name: prior.decode(latents, MOST_FRAMES) for name, latents in self._latents.items()}
        return {name: side_by_side([*to_pixels(rows)]) for name, rows in images.items()}
