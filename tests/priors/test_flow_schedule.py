"""The noise levels of rectified flows, against diffusers' samplers, and the files that describe them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

from fourdfy.config import ConfigError
from fourdfy.ops.diffusion import add_noise
from fourdfy.priors.base import FlowSchedule
from fourdfy.priors.frozen import load_noise_schedule

CPU = torch.device("cpu")
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_levels_are_those_of_the_samplers(shift, tmp_path):
    unipc = UniPCMultistepScheduler(**UNIPC, flow_shift=shift)
    unipc.set_timesteps(10)
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for sampler, shares in (
        (unipc, np.linspace(1, 1 / 1000, 11)[:-1]),
        (euler, np.linspace(1, 1 / 1000, 1000)),
    ):
        sampler.save_pretrained(tmp_path / "scheduler")
        schedule = load_noise_schedule(tmp_path, CPU)
        assert (schedule.prediction, schedule.shift) == ("flow_prediction", shift)
        timesteps = torch.tensor([float(schedule.span(share, share)[0]) for share in shares])
        sigmas = sampler.sigmas[: len(shares)]
        torch.testing.assert_close(schedule.scales(timesteps, 1).sigmas, sigmas.float(), rtol=1e-5, atol=0)


def test_the_noise_of_wan_is_that_of_its_reference():
    """Ten steps of its UniPC sampler with a shift of 3."""
    schedule = FlowSchedule(shift=3.0, device=CPU)
    shares = np.linspace(1, 1 / 1000, 11)[:-1]
    levels = [schedule.span(share, share)[0] / 1000 for share in shares]
    wanted = [1, 0.964, 0.923, 0.875, 0.818, 0.750, 0.667, 0.563, 0.430, 0.252]
    assert levels == pytest.approx(wanted, abs=1.5e-3)


def ltx_scheduler(**changes) -> FlowMatchEulerDiscreteScheduler:
    """That of LTX-Video 0.9.0."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        **{"shift_terminal": 0.1} | changes,
    )


@pytest.mark.parametrize(("tokens", "shift"), [(540, 2.17), (1170, 2.72), (4290, 8.33)])
def test_the_shift_of_ltx_is_that_of_its_tokens(tokens, shift, tmp_path):
    sampler = ltx_scheduler(shift_terminal=None)
    sampler.save_pretrained(tmp_path / "scheduler")
    config = sampler.config
    exponent = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    shares = np.linspace(1, 1 / 50, 50)
    sampler.set_timesteps(sigmas=shares, mu=exponent)
    schedule = load_noise_schedule(tmp_path, CPU).for_tokens(tokens)
    assert schedule.shift == pytest.approx(shift, abs=5e-3)
    sigmas = torch.tensor([schedule.span(share, share)[0] / 1000 for share in shares], dtype=torch.float32)
    torch.testing.assert_close(sigmas, sampler.sigmas[:-1], rtol=1e-5, atol=0)
    assert schedule.for_tokens(1) is schedule


def test_ltx_is_never_given_less_noise_than_its_samplers_use(tmp_path):
    sampler, steps = ltx_scheduler(), 100_000
    sampler.save_pretrained(tmp_path / "scheduler")
    shares = np.linspace(1, 1 / steps, steps)
    sampler.set_timesteps(sigmas=shares, mu=0.95)
    schedule = load_noise_schedule(tmp_path, CPU).for_tokens(1024)
    given = [schedule.span(share, share)[0] / 1000 for share in shares[::1000]]
    # Samplers stretch their steps so that the last one is at 0.1, here those of infinitely many steps.
    torch.testing.assert_close(torch.tensor(given), sampler.sigmas[:-1:1000].double(), rtol=0, atol=1e-4)
    drawn = schedule.draw(0, 1, 5000, generator())
    assert 100 < drawn.min() < 105 and 995 < drawn.max() <= 1000


def test_a_shift_by_tokens_is_not_used_before_they_are_counted(tmp_path):
    ltx_scheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(AssertionError, match="for_tokens"):
        load_noise_schedule(tmp_path, CPU).span(0, 1)


def test_the_network_is_told_thousands_of_the_noise():
    schedule = FlowSchedule(shift=3.0, device=CPU)
    timesteps = torch.tensor([250.0, 1000.0])
    latents, noise = (torch.randn(2, 4, 2, 3, 3, generator=generator(seed)) for seed in (1, 2))
    noisy = add_noise(latents, noise, schedule.scales(timesteps, latents.ndim))
    torch.testing.assert_close(noisy[0], 0.75 * latents[0] + 0.25 * noise[0])
    torch.testing.assert_close(noisy[1], noise[1])


def test_levels_are_drawn_continuously_between_the_bounds_and_never_without_noise(monkeypatch):
    schedule = FlowSchedule(shift=3.0, device=CPU)
    drawn = schedule.draw(0.02, 0.5, 2000, generator())
    least, most = schedule.span(0.02, 0.5)
    assert (least, most) == pytest.approx((1000 * 0.06 / 1.04, 750.0))
    assert least < drawn.min() < least + 5 and most - 5 < drawn.max() <= most
    assert len(drawn.unique()) > 1990
    shares = drawn / 1000 / (3 - 2 * drawn / 1000)  # before the shift
    assert torch.histc(shares, 8, 0.02, 0.5).sub(250).abs().max() < 60, "uniform"
    assert torch.equal(drawn, schedule.draw(0.02, 0.5, 2000, generator()))
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.zeros(count))  # the least that it gives
    assert (schedule.draw(0, 1, 3, generator()) > 0).all()


@pytest.mark.parametrize(
    ("sampler", "changes", "said"),
    [
        ("unipc", {"flow_shift": None}, "flow_shift is missing"),
        ("unipc", {"prediction_type": None}, "prediction_type is missing"),
        ("unipc", {"prediction_type": "epsilon"}, "prediction_type='epsilon', expected 'flow_prediction'"),
        ("unipc", {"use_flow_sigmas": False}, "prediction_type='flow_prediction'"),
        ("unipc", {"flow_shift": 0}, "flow_shift=0, expected more than 0"),
        ("unipc", {"shift": 3.0}, "unknown keys that might change the noise levels: shift"),
        ("unipc", {"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ("euler", {"use_dynamic_shifting": True, "base_shift": None}, "base_shift is missing"),
        ("euler", {"use_dynamic_shifting": 2}, "use_dynamic_shifting=2"),
        ("euler", {"use_dynamic_shifting": True, "time_shift_type": "linear"}, "time_shift_type='linear'"),
        ("euler", {"use_dynamic_shifting": True, "base_image_seq_len": 4096}, "is not less than"),
        ("euler", {"shift_terminal": 1.0}, "shift_terminal=1.0"),
        ("euler", {"invert_sigmas": True}, "invert_sigmas=True"),
        ("euler", {"shift": None}, "shift is missing"),
        ("euler", {"shift": "3"}, "shift='3'"),
    ],
)
def test_a_flow_that_is_not_understood_is_refused(sampler, changes, said, tmp_path):
    samplers = {
        "unipc": UniPCMultistepScheduler(**UNIPC, flow_shift=3.0),
        "euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    samplers[sampler].save_pretrained(tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ConfigError) as error:
        load_noise_schedule(tmp_path, CPU)
    assert str(file) in str(error.value) and said in str(error.value)
