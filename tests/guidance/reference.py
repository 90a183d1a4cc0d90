"""The recorded cases, and networks that answer with a recorded prediction."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from fourdfy.config import parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.guidance.distillation import Distillation, NoisyLatents
from fourdfy.priors.base import DDPMSchedule, Denoiser
from fourdfy.registry import find
from fourdfy.types import Cameras, Conditions, StepContext, TextEmbeddings

ARRAYS = np.load(Path(__file__).parents[1] / "data" / "sds_reference.npz")
CPU = torch.device("cpu")


def case(name: str) -> SimpleNamespace:
    """The arrays of a case; ``latents`` carry a graph."""
    prefix = f"{name}/"
    arrays = {
        key.removeprefix(prefix): torch.as_tensor(ARRAYS[key])
        for key in ARRAYS.files
        if key.startswith(prefix)
    }
    if "latents" in arrays:
        arrays["latents"] = arrays["latents"].clone().requires_grad_()
    return SimpleNamespace(**arrays)


def assert_matches(given: torch.Tensor, wanted: torch.Tensor) -> None:
    """1e-5 of the largest entry: both sides are float32."""
    scale = wanted.abs().max().item()
    torch.testing.assert_close(given.detach(), wanted, rtol=1e-5, atol=1e-5 * scale)


def schedule(prediction: str = "epsilon") -> DDPMSchedule:
    return DDPMSchedule(
        alphas_cumprod=torch.from_numpy(ARRAYS["schedule/alphas_cumprod"]), prediction=prediction
    )


class RecordedUNet(nn.Module):
    """Answers every call with one prediction, and keeps what it was asked."""

    config = FrozenDict(sample_size=8)

    def __init__(self, prediction: torch.Tensor) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, noisy, timestep, encoder_hidden_states, return_dict, class_labels=None):
        self.noisy, self.timesteps, self.texts = noisy, timestep, encoder_hidden_states
        self.class_labels = class_labels
        return (self.prediction,)


def recorded(name: str, prediction: torch.Tensor, **config: Any):
    """(guidance whose U-Net is a RecordedUNet, that U-Net)."""
    guidance_class = find(name, Guidance)
    unet = RecordedUNet(prediction)
    vae = nn.Module()
    vae.config = FrozenDict(block_out_channels=(1, 1, 1, 1))

    class RecordedPrior(guidance_class.prior_class):
        def load(self):
            return Denoiser(unet, schedule()), vae

    class Recorded(guidance_class):
        prior_class = RecordedPrior

    cfg = parse_config(guidance_class.Config, config | {"half_precision_weights": False})
    return Recorded(cfg, device=CPU), unet


def span(guidance: Distillation, step: int) -> tuple[float, float]:
    """The first and last timestep to draw at a step."""
    return guidance.prior.denoiser.schedule.span(*guidance.cfg.noise_range(step))


def distil(
    guidance: Distillation, latents, timesteps, noise, texts: Conditions, views: Cameras | None = None
):
    """(losses, gradient) at given noise levels and noise."""
    views = cameras([0.0] * len(latents)) if views is None else views
    scales = guidance.prior.denoiser.schedule.scales(timesteps, latents.ndim)
    step = NoisyLatents(
        latents=latents,
        timesteps=timesteps,
        noise=noise,
        scales=scales,
        conditions=guidance.prior.condition(texts, views),
        text=embeddings(),
        cameras=views,
        rgb=torch.empty(0, 1, 1, 3),
    )
    return guidance.distil(step, StepContext(0, torch.Generator().manual_seed(0)))


def filled(count: int, fill: float, tokens: int = 3, channels: int = 2) -> torch.Tensor:
    """Text embeddings of one number."""
    return torch.full((count, tokens, channels), fill)


def texts(count: int) -> Conditions:
    """Texts whose two halves are told apart: ones with the text, zeros without."""
    return Conditions(filled(count, 1.0), filled(count, 0.0))


def embeddings(channels: int = 16, tokens: int = 77, **more: Any) -> TextEmbeddings:
    """Random embeddings, different for every view."""
    generator = torch.Generator().manual_seed(0)
    text, uncond = torch.randn(2, tokens, channels, generator=generator)
    return TextEmbeddings(
        text=text[None],
        text_directions=torch.randn(1, 4, tokens, channels, generator=generator),
        uncond=uncond,
        front_threshold=30.0,
        back_threshold=30.0,
        overhead_threshold=60.0,
        **more,
    )


def cameras(azimuth_deg: list[float], size: int = 24, group_size: int = 1) -> Cameras:
    """Level cameras around the z axis at distance 2; only c2w's position turns."""
    azimuth = torch.tensor(azimuth_deg)
    count = len(azimuth)
    c2w = torch.eye(4).repeat(count, 1, 1)
    c2w[:, 0, 3], c2w[:, 1, 3] = 2 * torch.cos(azimuth.deg2rad()), 2 * torch.sin(azimuth.deg2rad())
    zeros = torch.zeros(count)
    return Cameras(
        c2w=c2w,
        fovy_deg=zeros + 40,
        elevation_deg=zeros,
        azimuth_deg=azimuth,
        distances=zeros + 2,
        times=zeros,
        light_positions=torch.zeros(count, 3),
        height=size,
        width=size,
        group_size=group_size,
    )
