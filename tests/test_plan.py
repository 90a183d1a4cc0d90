"""What ``--check`` says of a run, against the peaks of docs/benchmarks.md."""

from pathlib import Path

import pytest

from fourdfy import plan
from fourdfy.experiment import Experiment, load_experiment

CONFIGS = Path(__file__).parents[1] / "configs"

PEAK_GIB = {
    "stage_1": 27.4,
    "stage_1_low_vram": 11.6,
    "stage_1_low_vram_deformation": 11.6,
    "stage_2": 26.3,
    "stage_2_low_vram": 11.4,
    "stage_2_low_vram_deformation": 11.2,
    "stage_3": 48.1,
    "stage_3_low_vram": 11.1,
    "stage_3_low_vram_vc": 35.4,
    "stage_3_low_vram_vc_deformation": 12.6,
    "stage_3_vc": 16.3,
    "stage_3_vc_deformation": 35.3,
}
"""The most that a step took on an NVIDIA H200."""

STORED_GIB = {"MVDream": 1.8, "stabilityai": 1.8, "cerspense": 2.8, "VideoCrafter": 2.8}
"""U-Net and VAE in 16 bits, by the first part of a model's name."""


def load(name: str, *overrides: str) -> Experiment:
    prompt = "system.prompt_processor.prompt=a panda dancing"
    return load_experiment([CONFIGS / f"fourdfy_{name}.yaml"], [prompt, *overrides])


@pytest.mark.parametrize("name", PEAK_GIB)
def test_the_memory_is_about_what_was_measured(name, monkeypatch):
    monkeypatch.setattr(plan, "stored_bytes", lambda model, parts: STORED_GIB[model.split("/")[0]] * 2**30)
    estimate = plan._memory_estimate(load(name)) / 2**30
    assert PEAK_GIB[name] / 1.5 < estimate < PEAK_GIB[name] * 1.5


def test_frames_in_the_vae_at_once_are_counted():
    config = load("stage_3_low_vram_vc").cfg.system.guidance_video
    one, all_16 = (
        load("stage_3_low_vram_vc", f"system.guidance_video.low_ram_vae={frames}").cfg.system.guidance_video
        for frames in (1, 16)
    )
    assert config.activation_bytes(16, 80, 128) == all_16.activation_bytes(16, 80, 128)
    assert all_16.activation_bytes(16, 80, 128) == 16 * one.activation_bytes(16, 80, 128)


def test_every_stretch_of_resolutions_is_shown(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan.print_plan([load("stage_1")])
    shown = capsys.readouterr().out
    assert "8 frames of 64 x 64, then 4 frames of 256 x 256" in shown
