"""Guidance configs: what is refused, and which models are asked for."""

from __future__ import annotations

import json

import pytest
import torch

from fourdfy.config import ConfigError, parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.priors.base import Prior
from fourdfy.registry import find
from tests.guidance.networks import make
from tests.guidance.reference import CPU


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("stable-diffusion-guidance", {"half_precision_weights": "fp8"}, "half_precision_weights='fp8'"),
        ("zeroscope-guidance", {"gradient": "none"}, "gradient"),
        ("zeroscope-guidance", {"gradient": "subset"}, "gradient=subset needs its size; set low_ram_vae=4"),
        ("videocrafter-guidance", {"use_hifa": True}, "set use_hifa=false"),
        ("stable-diffusion-guidance", {"min_step_percent": [1, 2]}, "min_step_percent: .*expected a number"),
        ("stable-diffusion-guidance", {"weighting_strategy": "sdss"}, "weighting_strategy"),
        ("multiview-diffusion-guidance", {"camera_condition_type": "full"}, "camera_condition_type"),
        (
            "multiview-diffusion-guidance",
            {"model_name": "sd-v1.5-4view"},
            "Diffusion 1.5.*set model_name=sd-v2.1",
        ),
        ("multiview-diffusion-guidance", {"n_view": 0}, "n_view: 0 is outside the range"),
        ("multiview-diffusion-guidance", {"recon_std_rescale": 2}, "recon_std_rescale: 2 is outside"),
        ("stable-diffusion-guidance", {"max_step_percent": 98}, "max_step_percent: 98 is outside"),
        ("stable-diffusion-guidance", {"max_step_percent": 1.0}, "max_step_percent: 1 is outside"),
        ("stable-diffusion-guidance", {"min_step_percent": 0.99}, "min_step_percent=0.99 is 0.99 at step 0"),
        (
            "stable-diffusion-guidance",
            {"min_step_percent": [0, 0.02, 0.6, 100], "max_step_percent": [50, 0.98, 0.5, 200]},
            r"is 0.6 at step 200, where the most is 0.5",
        ),
        (
            "stable-diffusion-guidance",
            {"min_step_percent": 0.6, "anneal_start_step": 7},
            "is 0.6 at step 8, where the most is 0.5",
        ),
        ("stable-diffusion-guidance", {"guidance_scale": -1}, "guidance_scale: -1 is outside"),
        ("stable-diffusion-vsd-guidance", {"lora_rank": 0}, "lora_rank: 0 is outside"),
        ("videocrafter-guidance", {"fps": 0}, "fps: 0 is outside"),
        ("zeroscope-guidance", {"height": 0}, "height: 0 is outside"),
        ("multiview-diffusion-guidance", {"backend": "ldm"}, "backend"),
        ("stable-diffusion-vsd-guidance", {"enable_sequential_cpu_offload": True}, "set it to false"),
        ("zeroscope-guidance", {"guidance_scal": 3}, "did you mean 'guidance_scale'"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_loaded(name, given, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(find(name, Guidance).Config, given)


@pytest.mark.parametrize(
    ("name", "given", "models"),
    [
        ("stable-diffusion-guidance", {}, {"a": {"unet", "vae", "scheduler"}}),
        ("zeroscope-guidance", {}, {"a": {"unet", "vae", "scheduler"}}),
        ("videocrafter-guidance", {}, {"a": {"unet", "vae", "scheduler", "fps_embedding"}}),
        ("multiview-diffusion-guidance", {}, {"a": {"unet", "vae", "scheduler"}}),
        ("multiview-diffusion-guidance", {"ckpt_path": "b.pt"}, {"b.pt": {"unet", "vae", "scheduler"}}),
        ("multiview-diffusion-guidance", {"backend": "mvdream"}, {"a": {"unet", "vae", "scheduler"}}),
        (
            "stable-diffusion-vsd-guidance",
            {"pretrained_model_name_or_path_lora": "b"},
            {"a": {"unet", "vae", "scheduler"}, "b": {"unet", "scheduler"}},
        ),
    ],
)
def test_a_config_says_which_models_it_needs(name, given, models):
    cfg = parse_config(find(name, Guidance).Config, {"pretrained_model_name_or_path": "a"} | given)
    assert {model: set(parts) for model, parts in cfg.models()} == models


def test_a_guidance_builds_from_the_name_in_a_config(tiny):
    cls = find("stable-diffusion-guidance", Guidance)
    cfg = parse_config(cls.Config, {"pretrained_model_name_or_path": str(tiny["sd"])})
    assert isinstance(cfg.build(device=CPU), cls)


def test_an_image_model_in_place_of_a_video_model_is_named(tiny):
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel, expected a UNet3D"):
        make("zeroscope-guidance", tiny["sd"])


def test_the_folders_are_those_of_the_hub(tiny):
    index = json.loads((tiny["sd"] / "model_index.json").read_text())
    assert set(index) - {"_class_name"} == {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}


def test_four_views_are_denoised_in_half_precision_except_by_the_authors_package():
    cls, gpu = find("mvdream", Prior), torch.device("cuda")
    assert parse_config(cls.Config, {}).dtype(gpu) == torch.float16
    assert parse_config(cls.Config, {"half_precision_weights": False}).dtype(gpu) == torch.float32
    assert parse_config(cls.Config, {"backend": "mvdream"}).dtype(gpu) == torch.float32
