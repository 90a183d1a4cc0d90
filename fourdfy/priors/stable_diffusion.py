"""Stable Diffusion (Rombach et al. 2022) as a prior: each frame for itself."""

from __future__ import annotations

from fourdfy.priors.latent import LatentPrior
from fourdfy.registry import register


@register("stable-diffusion")
class StableDiffusion(LatentPrior):
    """Also every other image model in its layout; the config names the model."""
