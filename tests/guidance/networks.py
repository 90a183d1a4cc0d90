"""Guidances on tiny genuine networks."""

from __future__ import annotations

import torch

from fourdfy.config import parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.guidance.vsd import VariationalScoreDistillation
from fourdfy.registry import find
from fourdfy.types import StepContext
from tests.guidance.reference import CPU, cameras, embeddings
from tests.renders import images_of

TEXT = embeddings()


def make(name: str, folder, **config) -> Guidance:
    cls = find(name, Guidance)
    config = {"pretrained_model_name_or_path": str(folder)} | config
    return cls(parse_config(cls.Config, config), device=CPU)


def make_vsd(tiny, lora="sd", **config) -> VariationalScoreDistillation:
    return make(
        "stable-diffusion-vsd-guidance",
        tiny["sd"],
        pretrained_model_name_or_path_lora=str(tiny[lora]),
        **config,
    )


def images(count: int, size: int = 24) -> torch.Tensor:
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def context(step: int = 0, seed: int = 0) -> StepContext:
    return StepContext(step, generator(seed))


def run(guidance: Guidance, count: int = 4, seed: int = 0):
    """(images, output) for groups of four views, or clips of ``num_frames``."""
    rgb = images(count)
    azimuths = [360.0 * view / count for view in range(count)]
    group = getattr(guidance.cfg, "n_view", 0) or getattr(guidance.cfg, "num_frames", None) or 4
    views = cameras(azimuths, group_size=group)
    out = guidance(images_of(rgb), TEXT, views, context(10, seed))
    return rgb, out


def learn_from_all(guidance: Guidance, rgb: torch.Tensor, text, views, seeds) -> None:
    """Two steps, after which every frame and every parameter must have had a gradient."""
    for seed in seeds:  # the first step of an adapter moves B alone
        out = guidance(images_of(rgb), text, views, context(seed=seed))
        sum(out.losses.values()).backward()
        with torch.no_grad():
            for parameter in guidance.parameters():
                parameter -= 0.1 * parameter.grad.sign()
    assert (rgb.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(parameter.grad.any() for parameter in guidance.parameters())


ALL = {
    "sds": ("stable-diffusion-guidance", "sd", {}),
    "sds_of_v_prediction": ("stable-diffusion-guidance", "sd_v", {}),
    "sjc": ("stable-diffusion-guidance", "sd", {"use_sjc": True, "var_red": False}),
    "vsd": ("stable-diffusion-vsd-guidance", "sd", {}),
    "multi_view": ("multiview-diffusion-guidance", "multi_view", {}),
    "multi_view_sds": ("multiview-diffusion-guidance", "multi_view", {"recon_loss": False}),
    "video": ("zeroscope-guidance", "zeroscope", {"height": None, "width": None}),
    "videocrafter": (
        "videocrafter-guidance",
        "videocrafter",
        {"height": None, "width": None, "motion_amp_scale": 30.0, "low_ram_vae": 2},
    ),
    "two_videos": ("zeroscope-guidance", "zeroscope", {"height": 16, "width": 32, "num_frames": 2}),
    "slicing": ("stable-diffusion-guidance", "sd", {"enable_attention_slicing": True}),
    "multi_view_slicing": (
        "multiview-diffusion-guidance",
        "multi_view",
        {"enable_attention_slicing": True, "enable_memory_efficient_attention": True},
    ),
    "channels_last": (
        "zeroscope-guidance",
        "zeroscope",
        {"height": None, "width": None, "enable_channels_last_format": True},
    ),
}


def make_any(tiny, kind: str, **more) -> Guidance:
    name, folder, config = ALL[kind]
    if name == "stable-diffusion-vsd-guidance":
        config = config | {"pretrained_model_name_or_path_lora": str(tiny["sd_v"])}
    return make(name, tiny[folder], **config | more)
