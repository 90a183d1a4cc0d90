"""Distillation losses against recorded cases, their definitions, and a prior in closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fourdfy.ops.diffusion import (
    NoiseScales,
    Prediction,
    add_noise,
    classifier_free_guidance,
    noise_scales,
    sample_noise,
    sample_timesteps,
    x0_from_prediction,
)
from fourdfy.ops.distillation import (
    Weighting,
    amplify_motion,
    bounded,
    reconstruction_loss,
    rescale_guided_x0,
    score_loss,
    sds_gradient,
    sjc_gradient,
    vsd_gradient,
    x0_factor,
)
from tests.priors.analytic import GaussianMixturePrior

REFERENCE = np.load(Path(__file__).parents[1] / "data" / "sds_reference.npz")
ABAR = torch.from_numpy(REFERENCE["schedule/alphas_cumprod"])
CPU = torch.device("cpu")


def arrays(case: str) -> dict[str, torch.Tensor]:
    """The case's arrays, the guidance halves split."""
    values = {
        key.split("/")[1]: torch.as_tensor(REFERENCE[key])
        for key in REFERENCE.files
        if key.startswith(case + "/")
    }
    values["latents"] = values["latents"].clone().requires_grad_()
    return values


def assert_matches(given: torch.Tensor, wanted: torch.Tensor) -> None:
    """1e-5 of the largest entry: both sides are float32."""
    scale = wanted.abs().max().item()
    torch.testing.assert_close(given.detach(), wanted, rtol=1e-5, atol=1e-5 * scale)


def guided_x0(values, scales, noisy, scale):
    text, uncond = (
        x0_from_prediction(half, noisy, scales, "epsilon") for half in values["noise_pred"].chunk(2)
    )
    return classifier_free_guidance(text, uncond, scale), text


def at_noise_level(values):
    scales = noise_scales(ABAR, values["t"], values["latents"].ndim)
    noisy = add_noise(values["latents"].detach(), values["noise"], scales)
    if "model_input" in values:
        for half in values["model_input"].chunk(2):
            assert_matches(noisy, half)
    return scales, noisy


@pytest.mark.parametrize("name", ["sds", "uniform", "fantasia3d", "sds_clip0.5", "sjc"])
def test_zeroscope_gradient_is_the_recorded_one(name):
    values = arrays(f"zeroscope_{name}")
    scales, noisy = at_noise_level(values)
    x0, _ = guided_x0(values, scales, noisy, values["guidance_scale"].item() + 1)
    x = values["latents"]
    if name == "sjc":
        grad = sjc_gradient(x, values["noise"], x0, scales)
    else:
        grad = sds_gradient(x, x0, scales, name.split("_")[0])
    grad = bounded(grad, values["grad_clip"].item() if "grad_clip" in values else None)
    loss = score_loss(x, grad)
    loss.backward()
    assert_matches(x.grad, values["dloss_dlatents"])
    assert_matches(loss, values["loss"])
    assert_matches(grad.norm(), values["grad_norm"])


@pytest.mark.parametrize("name", ["amp1", "amp30"])
def test_videocrafter_gradient_is_the_recorded_one(name):
    values = arrays(f"videocrafter_{name}")
    scales, noisy = at_noise_level(values)
    x0, _ = guided_x0(values, scales, noisy, values["guidance_scale"].item() + 1)
    score = sds_gradient(values["latents"], x0, scales)
    grad = bounded(amplify_motion(score, values["motion_amp_scale"].item()))
    loss = score_loss(values["latents"], grad)
    loss.backward()
    assert_matches(values["latents"].grad, values["dloss_dlatents"])
    assert_matches(loss, values["loss"])
    assert_matches(grad.norm(), values["grad_norm"])


def test_motion_is_amplified_and_what_rests_is_kept():
    score = torch.randn(2, 4, 5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    amplified = amplify_motion(score, 7.0)
    torch.testing.assert_close(amplified.mean(2), score.mean(2))
    torch.testing.assert_close(amplified.diff(dim=2), 7 * score.diff(dim=2))
    assert torch.equal(amplify_motion(score, 1.0), score)
    torch.testing.assert_close(amplify_motion(score, 0.0), score.mean(2, keepdim=True).expand_as(score))


def test_stable_diffusion_gradient_is_the_recorded_one():
    values = arrays("stable_diffusion_sds")
    scales, noisy = at_noise_level(values)
    x0, _ = guided_x0(values, scales, noisy, values["guidance_scale"].item() + 1)
    assert_matches(sds_gradient(values["latents"], x0, scales), values["grad"])


@pytest.mark.parametrize("name", ["t300", "t980", "t20_norescale", "one_group"])
def test_mvdream_reconstruction_is_the_recorded_one(name):
    values = arrays(f"mvdream_recon_{name}")
    values["t"] = values["t"].expand(len(values["latents"]))
    scales, noisy = at_noise_level(values)
    guided, text = guided_x0(values, scales, noisy, values["guidance_scale"].item())
    n_view, strength = values["n_view"].item(), values["recon_std_rescale"].item()
    loss = reconstruction_loss(values["latents"], rescale_guided_x0(guided, text, n_view, strength))
    loss.backward()
    assert_matches(values["latents"].grad, values["dloss_dlatents"])
    assert_matches(loss, values["loss"])
    assert_matches(values["latents"].grad.norm(), values["grad_norm"])


@pytest.mark.parametrize("case", ["vsd_v_lora", "vsd_eps_lora"])
def test_vsd_gradient_is_the_recorded_one(case):
    values = arrays(case)
    scales, noisy = at_noise_level(values)
    base = [x0_from_prediction(half, noisy, scales, "epsilon") for half in values["noise_pred_base"].chunk(2)]
    kind = "v_prediction" if "_v_" in case else "epsilon"
    lora = [x0_from_prediction(half, noisy, scales, kind) for half in values["pred_lora"].chunk(2)]
    grad = vsd_gradient(
        classifier_free_guidance(*base, values["guidance_scale"].item()),
        classifier_free_guidance(*lora, values["guidance_scale_lora"].item()),
        scales,
    )
    loss = score_loss(values["latents"], grad)
    loss.backward()
    assert_matches(grad, values["grad"])
    assert_matches(values["latents"].grad, values["dloss_dlatents"])
    assert_matches(loss, values["loss"])


def random_case(batch=3, shape=(4, 2, 3, 3)):
    generator = torch.Generator().manual_seed(0)
    x, noise, epsilon = (
        torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    scales = noise_scales(ABAR.double(), torch.tensor([20, 400, 980]), x.ndim)
    return x, noise, epsilon, scales


@pytest.mark.parametrize("weighting", ["sds", "uniform", "fantasia3d", "flow"])
def test_sds_gradient_is_its_definition_for_any_number_of_videos(weighting):
    x, noise, epsilon, scales = random_case()
    noisy = add_noise(x, noise, scales)
    x0 = x0_from_prediction(epsilon, noisy, scales, "epsilon")
    abar = (scales.alphas**2).flatten()
    w = {
        "sds": 1 - abar,
        "uniform": torch.ones(3),
        "fantasia3d": abar.sqrt() * (1 - abar),
        "flow": 1 / abar.sqrt(),
    }[weighting]
    for video in range(3):
        definition = w[video] * (epsilon - noise)[video]
        torch.testing.assert_close(sds_gradient(x, x0, scales, weighting)[video], definition)


def test_sjc_without_variance_reduction_is_the_noise_prediction_itself():
    x, noise, epsilon, scales = random_case()
    noisy = add_noise(x, noise, scales)
    x0 = x0_from_prediction(epsilon, noisy, scales, "epsilon")
    torch.testing.assert_close(sjc_gradient(x, noise, x0, scales, variance_reduction=False), epsilon)
    torch.testing.assert_close(sjc_gradient(x, noise, x0, scales), epsilon - noise)


def test_the_loss_of_several_videos_is_the_mean_of_theirs():
    x, _, grad, _ = random_case()
    x.requires_grad_()
    score_loss(x, grad).backward()
    torch.testing.assert_close(x.grad, grad / 3)
    one_by_one = torch.stack([score_loss(x[i : i + 1], grad[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(score_loss(x, grad), one_by_one.mean())


def test_a_prediction_with_a_graph_is_refused():
    x, _, grad, _ = random_case()
    with pytest.raises(ValueError, match="no_grad"):
        score_loss(x, grad.requires_grad_())
    with pytest.raises(ValueError, match="no_grad"):
        reconstruction_loss(x, grad)


def test_gradients_are_clipped():
    assert bounded(torch.tensor([[2.0, -3.0, 0.25]]), 1.0).tolist() == [[1.0, -1.0, 0.25]]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_the_loss(value, clip):
    grad = bounded(torch.tensor([[value, -3.0, 0.25]]), clip)
    assert not score_loss(torch.zeros(1, 3), grad).isfinite()


def test_full_rescaling_gives_each_group_the_spread_of_the_text():
    generator = torch.Generator().manual_seed(0)
    guided, text = (torch.randn(8, 4, 2, 2, generator=generator) for _ in range(2))
    guided = guided * torch.linspace(1, 9, 8).reshape(-1, 1, 1, 1)
    rescaled = rescale_guided_x0(guided, text, group_size=4, strength=1.0)
    for group in (slice(0, 4), slice(4, 8)):
        torch.testing.assert_close(rescaled[group].std(), text[group].std())
    with pytest.raises(ValueError, match="groups of 3"):
        rescale_guided_x0(guided, text, group_size=3, strength=1.0)


def test_an_unknown_weighting_is_named():
    with pytest.raises(ValueError, match="weighting_strategy='sdss'"):
        x0_factor(random_case()[3], "sdss")


@pytest.mark.parametrize("weighting", Weighting.__args__)
def test_pure_noise_has_a_finite_gradient_in_every_weighting(weighting):
    x, noise, velocity, _ = random_case()
    scales = NoiseScales(*(torch.full((3, 1, 1, 1, 1), value).double() for value in (0, 1)))
    x0 = x0_from_prediction(velocity, add_noise(x, noise, scales), scales, "v_prediction")
    gradient = sds_gradient(x, x0, scales, weighting)
    assert gradient.isfinite().all()
    torch.testing.assert_close(sjc_gradient(x, noise, x0, scales, variance_reduction=False), noise)
    if weighting == "flow":
        torch.testing.assert_close(gradient, x + velocity)


# ---------------------------------------------------------------------------------------------
# Descent on an analytic prior

MODES = torch.tensor([[1.5, 1.0], [-1.5, 0.5], [0.0, -1.5]], dtype=torch.float64)
PRIOR = GaussianMixturePrior(means=MODES, weights=torch.ones(3, dtype=torch.float64), std=0.05)


def descend(loss_of, steps=250, lr=0.1, count=4):
    """Points that start around the origin, moved by a loss on (x, noise, noisy, scales)."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    for step in range(steps):
        high = int(980 - 780 * step / steps)
        timesteps = sample_timesteps(20, high, count, generator, CPU)
        scales = noise_scales(ABAR.double(), timesteps, x.ndim)
        noise = sample_noise(x.shape, generator, CPU, torch.float64)
        noisy = add_noise(x.detach(), noise, scales)
        (grad,) = torch.autograd.grad(loss_of(x, noise, noisy, scales), x)
        with torch.no_grad():
            x -= lr * count * grad
    return x.detach()


@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("kind", Prediction.__args__)
def test_sds_lands_on_the_mode_that_the_text_means(kind, wanted):
    def loss(x, noise, noisy, scales):
        predictions = (p.predict(noisy, scales, kind) for p in (PRIOR.given([wanted]), PRIOR))
        text, uncond = (x0_from_prediction(p, noisy, scales, kind) for p in predictions)
        return score_loss(x, sds_gradient(x, classifier_free_guidance(text, uncond, 2.0), scales))

    assert (descend(loss) - MODES[wanted]).norm(dim=1).max() < 0.2


def test_reconstruction_lands_on_the_mode_that_the_text_means():
    def loss(x, noise, noisy, scales):
        text, uncond = (p.x0(noisy, scales) for p in (PRIOR.given([1]), PRIOR))
        guided = classifier_free_guidance(text, uncond, 2.0)
        return reconstruction_loss(x, rescale_guided_x0(guided, text, 4, 0.5))

    assert (descend(loss, lr=0.05) - MODES[1]).norm(dim=1).max() < 0.2


def test_sjc_lands_on_the_mode_that_the_text_means():
    def loss(x, noise, noisy, scales):
        return score_loss(x, sjc_gradient(x, noise, PRIOR.given([2]).x0(noisy, scales), scales))

    assert (descend(loss, lr=0.02) - MODES[2]).norm(dim=1).max() < 0.2


def test_vsd_matches_the_distribution_and_not_just_its_mode():
    """With the renderings' own density as the second network, the points keep the prior's spread."""
    target = GaussianMixturePrior(means=MODES[:1], weights=torch.ones(1, dtype=torch.float64), std=0.4)

    def loss(x, noise, noisy, scales):
        points = x.detach()
        renderings = GaussianMixturePrior(
            means=points.mean(0, keepdim=True),
            weights=torch.ones(1, dtype=torch.float64),
            std=points.std(0).mean().item(),
        )
        return score_loss(x, vsd_gradient(target.x0(noisy, scales), renderings.x0(noisy, scales), scales))

    vsd = descend(loss, count=64)
    sds = descend(lambda x, _, noisy, s: score_loss(x, sds_gradient(x, target.x0(noisy, s), s)), count=64)
    assert (vsd.mean(0) - MODES[0]).norm() < 0.1
    assert vsd.std(0).mean() == pytest.approx(0.4, abs=0.1)
    assert sds.std(0).mean() < 0.2


@pytest.mark.parametrize(
    ("weighting", "most", "scale", "lands"),
    [
        (None, 0.98, 1, 1.0),
        (None, 0.98, 6, 2.26),
        (None, 0.98, 100, 2.95),
        (None, 0.5, 6, 1.35),
        ("flow", 0.98, 1, 1.0),
        ("flow", 0.98, 6, 1.73),
        ("flow", 0.98, 100, 2.0),
        ("flow", 0.5, 6, 1.27),
        ("flow", 0.5, 100, 1.34),
    ],
)
def test_high_noise_makes_guidance_overshoot(weighting, most, scale, lands):
    """A text that means N(1, 0.3^2) among N(0, 1): where descent ends. Without a weight: reconstruction."""
    sigmas = torch.linspace(0.02, most, 2000, dtype=torch.float64)[:, None]
    scales = NoiseScales(1 - sigmas, sigmas)

    def gaussian(mean, std):
        means, one = torch.tensor([[mean]]).double(), torch.ones(1).double()
        return GaussianMixturePrior(means=means, weights=one, std=std)

    def pull(value):
        """The mean gradient over levels; in that over noise, none is the mean of all, since all is linear."""
        x = torch.full_like(sigmas, value)
        noisy = add_noise(x, torch.zeros_like(x), scales)
        text, uncond = (g.x0(noisy, scales) for g in (gaussian(1.0, 0.3), gaussian(0.0, 1.0)))
        x0 = classifier_free_guidance(text, uncond, float(scale))
        return (x - x0 if weighting is None else sds_gradient(x, x0, scales, weighting)).mean()

    at_zero, at_one = pull(0.0), pull(1.0)
    assert at_zero / (at_zero - at_one) == pytest.approx(lands, abs=0.01)
