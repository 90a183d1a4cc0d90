"""Models without a score are refused."""

from __future__ import annotations

import json

import pytest

from fourdfy.config import parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.priors.hub import MODELS
from fourdfy.registry import find
from tests.tiny_models import save_stable_diffusion


def check(name: str, guidance: str = "wan-guidance") -> None:
    parse_config(find(guidance, Guidance).Config, {"pretrained_model_name_or_path": name}).check_models()


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("FastVideo/FastWan2.1-T2V-1.3B-Diffusers", "'FastWan' in its name"),
        ("lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill", "'Distil' in its name"),
        ("lightx2v/Wan2.1-Lightning", "'Lightning' in its name"),
        ("somebody/wan-1.3b-4step", "'4step' in its name"),
        ("somebody/wan-DMD2", "'DMD2' in its name"),
        ("stabilityai/sd-turbo", "'turbo' in its name"),
        ("somebody/kandinsky-nocfg-5s", "'nocfg' in its name"),
    ],
)
def test_names_tell(name, sign):
    with pytest.raises(
        ValueError, match=f"^pretrained_model_name_or_path={name}: {sign} says.*was made from$"
    ):
        check(name)


@pytest.mark.parametrize(
    "name", [*MODELS, "somebody/balcm", "turbo/wan", "somebody/wan-14step", "somebody/admd"]
)
def test_other_names_do_not(name):
    check(name)


def test_a_network_that_is_told_the_guidance_scale_tells(tmp_path):
    folder = save_stable_diffusion(tmp_path / "sd")
    check(str(folder), "stable-diffusion-guidance")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"time_cond_proj_dim": 256}))
    with pytest.raises(ValueError, match=r"time_cond_proj_dim in its unet/config\.json says"):
        check(str(folder), "stable-diffusion-guidance")
