"""Noise schedules and parametrisations, against the recorded schedule and the analytic prior."""

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
    lead_away,
    noise_from_x0,
    noise_scales,
    prediction_target,
    projected_guidance,
    sample_noise,
    sample_timesteps,
    timestep_range,
    x0_from_prediction,
    zero_star_guidance,
)
from fourdfy.schedules import schedule_value
from tests.priors.analytic import GaussianMixturePrior

REFERENCE = np.load(Path(__file__).parents[1] / "data" / "sds_reference.npz")
ABAR = torch.from_numpy(REFERENCE["schedule/alphas_cumprod"]).double()
KINDS = Prediction.__args__
CPU = torch.device("cpu")


def two_modes() -> GaussianMixturePrior:
    return GaussianMixturePrior(
        means=torch.tensor([[2.0, 1.0, 0.0], [-1.0, 0.5, 3.0]], dtype=torch.float64),
        weights=torch.tensor([0.3, 0.7], dtype=torch.float64),
        std=0.2,
    )


def noisy_points(count: int = 5):
    scales = noise_scales(ABAR, torch.tensor([0, 20, 437, 900, 999])[:count], ndim=2)
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(count, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, noise, add_noise(x, noise, scales), scales


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_target_of_every_kind_means_the_clean_latents(kind):
    x, noise, noisy, scales = noisy_points()
    target = prediction_target(x, noise, scales, kind)
    torch.testing.assert_close(x0_from_prediction(target, noisy, scales, kind), x, rtol=0, atol=1e-10)


def test_all_parametrisations_of_a_prior_mean_the_same_x0():
    prior = two_modes()
    _, _, noisy, scales = noisy_points()
    x0 = prior.x0(noisy, scales)
    for kind in KINDS:
        prediction = prior.predict(noisy, scales, kind)
        again = x0_from_prediction(prediction, noisy, scales, kind)
        torch.testing.assert_close(again, x0, rtol=0, atol=1e-10)


def test_a_flow_schedule_is_read_like_any_other():
    prior = two_modes()
    sigmas = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)
    scales = NoiseScales(1 - sigmas, sigmas)
    x, noise = noisy_points(3)[:2]
    noisy = add_noise(x, noise, scales)
    torch.testing.assert_close(noisy, x + (noise - x) * scales.sigmas)
    flow = prior.predict(noisy, scales, "flow_prediction")
    torch.testing.assert_close(noisy - scales.sigmas * flow, prior.x0(noisy, scales))


def test_the_analytic_denoiser_is_the_gradient_of_the_density():
    """Tweedie: s * score = (a x0 - x_t) / s."""
    prior = two_modes()
    _, _, noisy, scales = noisy_points()
    noisy.requires_grad_()
    (score,) = torch.autograd.grad(prior.log_density(noisy, scales).sum(), noisy)
    torch.testing.assert_close(-scales.sigmas * score, prior.predict(noisy, scales, "epsilon"))


def test_the_analytic_density_integrates_to_one():
    prior = GaussianMixturePrior(
        means=torch.tensor([[-1.0], [2.0]]), weights=torch.tensor([1.0, 3.0]), std=0.3
    )
    grid = torch.linspace(-8, 8, 4001)[:, None]
    scales = noise_scales(ABAR.float(), torch.full((len(grid),), 300), ndim=2)
    mass = torch.trapezoid(prior.log_density(grid, scales).exp(), grid[:, 0])
    assert mass.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_commutes_with_the_parametrisation(kind):
    prior = two_modes()
    _, _, noisy, scales = noisy_points()
    text, uncond = (known.x0(noisy, scales) for known in (prior.given([0]), prior))
    predictions = [known.predict(noisy, scales, kind) for known in (prior.given([0]), prior)]
    guided = x0_from_prediction(classifier_free_guidance(*predictions, 7.5), noisy, scales, kind)
    torch.testing.assert_close(guided, uncond + 7.5 * (text - uncond))


def test_guidance_of_scale_one_is_the_text_and_of_zero_is_not():
    text, uncond = torch.tensor([[3.0]]), torch.tensor([[1.0]])
    assert classifier_free_guidance(text, uncond, 1.0) == text
    assert classifier_free_guidance(text, uncond, 0.0) == uncond


def test_the_timestep_range_of_stage_1_is_the_recorded_one():
    for step, low, high in REFERENCE["mvdream_step_range_stage1/table"]:
        shares = (schedule_value([0, 0.98, end, 8000], int(step)) for end in (0.02, 0.5))
        assert timestep_range(*shares, 1000) == (low, high)


def test_all_noise_is_the_last_timestep():
    assert timestep_range(0, 1, 1000) == (0, 999)


def test_timesteps_reach_both_ends_and_repeat_with_the_generator():
    draw = lambda: sample_timesteps(3, 6, 200, torch.Generator().manual_seed(1), CPU)  # noqa: E731
    assert set(draw().tolist()) == {3, 4, 5, 6}
    assert torch.equal(draw(), draw())


def test_noise_comes_from_the_generator_alone():
    noise = [sample_noise((2, 3), torch.Generator().manual_seed(1), CPU) for _ in range(2)]
    assert torch.equal(*noise)
    assert noise[0].shape == (2, 3)


def test_an_unknown_kind_of_prediction_is_named():
    x, noise, noisy, scales = noisy_points()
    with pytest.raises(ValueError, match="'x0' is not known"):
        x0_from_prediction(x, noisy, scales, "x0")
    with pytest.raises(ValueError, match="'x0' is not known"):
        prediction_target(x, noise, scales, "x0")


def test_projected_guidance_is_that_of_diffusers():
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance

    text, uncond = random_predictions(2)
    text[0], uncond[0] = 3 * text[0], 5 * uncond[0]  # longer than the bound; the others stay below it
    for bound in (0.0, 25.0):
        wanted = normalized_guidance(
            text, uncond, 6.5, eta=0.0, norm_threshold=bound, use_original_formulation=True
        )
        given = projected_guidance(text, uncond, 7.5, bound)
        torch.testing.assert_close(given, wanted, rtol=0, atol=1e-10)


def test_projected_guidance_moves_across_the_text():
    text, uncond = random_predictions(2)
    moved = projected_guidance(text, uncond, 7.5) - text
    assert moved.flatten(1).norm(dim=1).min() > 1
    torch.testing.assert_close((moved * text).flatten(1).sum(1), torch.zeros(3).double(), rtol=0, atol=1e-9)


def test_zero_star_guidance_is_that_of_diffusers_on_the_flow():
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale

    generator = torch.Generator().manual_seed(1)
    flow, uncond_flow, noisy = torch.randn(3, 3, 4, 2, 5, generator=generator)
    sigmas = torch.tensor([0.02, 0.5, 1.0]).reshape(3, 1, 1, 1)
    scales = NoiseScales(1 - sigmas, sigmas)
    share = cfg_zero_star_scale(flow.flatten(1), uncond_flow.flatten(1)).reshape(3, 1, 1, 1)
    wanted = share * uncond_flow + 7.5 * (flow - share * uncond_flow)
    text, uncond = (noisy - sigmas * v for v in (flow, uncond_flow))
    given = zero_star_guidance(text, uncond, 7.5, noisy, scales)
    torch.testing.assert_close((noisy - given) / sigmas, wanted, rtol=1e-3, atol=1e-3)


def test_zero_star_guidance_of_flows_that_fit_is_guidance():
    flow, difference, noisy = random_predictions(3)
    scales = NoiseScales(*(torch.full((3, 1, 1, 1), value).double() for value in (0.6, 0.4)))
    along = (flow * difference).flatten(1).sum(1) / flow.square().flatten(1).sum(1)
    uncond_flow, text_flow = flow, flow + difference - along.reshape(3, 1, 1, 1) * flow
    text, uncond = (noisy - 0.4 * v for v in (text_flow, uncond_flow))
    given = zero_star_guidance(text, uncond, 7.5, noisy, scales)
    torch.testing.assert_close(given, classifier_free_guidance(text, uncond, 7.5))


def test_the_noise_of_an_exact_prediction_is_the_one_that_was_added():
    x, noise, noisy, scales = noisy_points()
    torch.testing.assert_close(noise_from_x0(x, noisy, scales), noise)


def random_predictions(count: int):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 4, 2, 5, generator=generator, dtype=torch.float64)


def test_leading_away_is_its_formula_for_each_latent():
    text, uncond, *negatives = random_predictions(4)
    weights = (torch.tensor([-1.5, 0.0, 2.0]).double(), torch.tensor([-0.3, -2.0, 0.0]).double())
    led = lead_away(text, uncond, negatives, weights)
    for b in range(3):
        direction = (text - uncond)[b].flatten()
        unit = direction / direction.norm()
        wanted = text[b].flatten()
        for negative, weight in zip(negatives, weights, strict=True):
            other = (negative - uncond)[b].flatten()
            wanted = wanted + weight[b] * (other - (other @ unit) * unit)
        torch.testing.assert_close(led[b].flatten(), wanted)


def test_leading_away_keeps_what_both_texts_mean():
    text, uncond, other = random_predictions(3)
    weight = torch.tensor([-1.0, -2.0, -3.0]).double()
    same = uncond + 0.7 * (text - uncond)
    torch.testing.assert_close(lead_away(text, uncond, [same], [weight]), text)
    led = lead_away(text, uncond, [other], [weight])
    assert (led - text).flatten(1).norm(dim=1).min() > 1
    along = ((led - text) * (text - uncond)).flatten(1).sum(1)
    torch.testing.assert_close(along, torch.zeros(3).double(), rtol=0, atol=1e-12)
    assert lead_away(text, uncond, [], []) is text
    assert torch.isfinite(lead_away(text, text, [other], [weight])).all()


@pytest.mark.parametrize("kind", KINDS)
def test_leading_away_may_be_done_in_any_parametrisation(kind):
    scales = noise_scales(ABAR, torch.tensor([20, 437, 900]), ndim=5)
    noisy, *predictions = random_predictions(4)[:, :, :, None]
    weight = torch.tensor([-1.0, -2.0, 0.5]).double()

    def led(text, uncond, negative):
        return lead_away(text, uncond, [negative], [weight])

    x0 = [x0_from_prediction(p, noisy, scales, kind) for p in predictions]
    torch.testing.assert_close(led(*x0), x0_from_prediction(led(*predictions), noisy, scales, kind))
