"""Diffusion: noise schedules, noisy latents, and the three things a network may predict.

Noisy latents are ``x_t = a x_0 + s eps`` with the signal and noise scales (a, s) of the noise level:
(sqrt(abar), sqrt(1 - abar)) for a DDPM (Ho et al. 2020), (1 - s, s) for a rectified flow (Liu et
al. 2022). A network predicts eps, ``v = a eps - s x_0`` (Salimans & Ho 2022), x_0 itself or the flow
``eps - x_0``; each is an affine view of the same x_0, so guidance and losses need to know x_0 alone.

B latents (images or videos), C channels, S the axes behind them: (H, W), or (F, H, W) for a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
"""The names that scheduler files use for what a network predicts."""

GuidanceMode = Literal["cfg", "apg", "cfg_zero"]
"""How predictions with and without the text are combined: ``classifier_free_guidance``,
``projected_guidance``, ``zero_star_guidance``."""


class NoiseScales(NamedTuple):
    """Signal and noise scales, one of each for a latent, shaped to broadcast over it."""

    alphas: Float[Tensor, "B *ones"]
    sigmas: Float[Tensor, "B *ones"]


def noise_scales(alphas_cumprod: Float[Tensor, "T"], timesteps: Int[Tensor, "B"], ndim: int) -> NoiseScales:
    """A DDPM's scales at ``timesteps``, for latents of ``ndim`` axes."""
    abar = alphas_cumprod[timesteps].reshape(-1, *[1] * (ndim - 1))
    return NoiseScales(abar.sqrt(), (1 - abar).sqrt())


def shifted_alphas_cumprod(
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    beta_schedule: str,
    snr_shift_scale: float,
    rescale_betas_zero_snr: bool = False,
) -> Float[Tensor, "T"]:
    """abar of CogVideoX (Yang et al. 2024): a DDPM's with its signal-to-noise ratio divided by a number.

    With ``rescale_betas_zero_snr`` its square root is stretched until the last level has no signal at all,
    a = 0 (Lin et al. 2023, algorithm 1).

    Args:
        beta_schedule: "scaled_linear": betas are squares of numbers at equal distances.
    """
    assert beta_schedule == "scaled_linear"
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    alphas = (abar / (snr_shift_scale + (1 - snr_shift_scale) * abar)).sqrt()
    if rescale_betas_zero_snr:
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    return alphas.square().float()


def shifted(share: Float[Tensor, "..."] | float, shift: float) -> Any:
    """A rectified flow's noise scale at a share 0..1 of its noise levels: k u / (1 + (k - 1) u).

    Large images and long clips need more noise to lose what they show, and are learned with a larger
    ``shift`` k (Esser et al. 2024, eq. 23).
    """
    return shift * share / (1 + (shift - 1) * share)


def add_noise(
    latents: Float[Tensor, "B C *S"], noise: Float[Tensor, "B C *S"], scales: NoiseScales
) -> Float[Tensor, "B C *S"]:
    """x_t."""
    return scales.alphas * latents + scales.sigmas * noise


def x0_from_prediction(
    prediction: Float[Tensor, "B C *S"],
    noisy: Float[Tensor, "B C *S"],
    scales: NoiseScales,
    kind: str,
) -> Float[Tensor, "B C *S"]:
    """The clean latents that a network means by its prediction.

    Raises:
        ValueError: an unknown ``kind``.
    """
    alphas, sigmas = scales
    if kind == "epsilon":
        return (noisy - sigmas * prediction) / alphas
    if kind == "v_prediction":
        return (alphas * noisy - sigmas * prediction) / (alphas**2 + sigmas**2)
    if kind == "sample":
        return prediction
    if kind == "flow_prediction":
        return (noisy - sigmas * prediction) / (alphas + sigmas)
    raise ValueError(f"prediction_type {kind!r} is not known; expected one of {get_args(Prediction)}")


def noise_from_x0(
    x0: Float[Tensor, "B C *S"], noisy: Float[Tensor, "B C *S"], scales: NoiseScales
) -> Float[Tensor, "B C *S"]:
    """The noise that a prediction of x_0 takes ``noisy`` to hold: where its flow ends, in one step."""
    return (noisy - scales.alphas * x0) / scales.sigmas


def prediction_target(
    latents: Float[Tensor, "B C *S"],
    noise: Float[Tensor, "B C *S"],
    scales: NoiseScales,
    kind: str,
) -> Float[Tensor, "B C *S"]:
    """The training target of a network for ``latents`` under ``noise``.

    Raises:
        ValueError: an unknown ``kind``.
    """
    alphas, sigmas = scales
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return alphas * noise - sigmas * latents
    if kind == "sample":
        return latents
    if kind == "flow_prediction":
        return noise - latents
    raise ValueError(f"prediction_type {kind!r} is not known; expected one of {get_args(Prediction)}")


def classifier_free_guidance(
    text: Float[Tensor, "B C *S"], uncond: Float[Tensor, "B C *S"], scale: float
) -> Float[Tensor, "B C *S"]:
    """Guided prediction (Ho & Salimans 2022), ``scale`` counted from the unconditional one.

    It commutes with every affine map, so it may be given eps, v, flows or x_0 alike.
    """
    return uncond + scale * (text - uncond)


def projected_guidance(
    text: Float[Tensor, "B C *S"],
    uncond: Float[Tensor, "B C *S"],
    scale: float,
    norm_bound: float = 0.0,
) -> Float[Tensor, "B C *S"]:
    """APG (Sadat et al. 2024): guidance of x_0 without what only raises contrast and saturation.

    Its momentum over the steps of a sampler is left out: steps of training see other latents and levels.

    Args:
        norm_bound: bound on the norm of each latent's ``text - uncond``; 0 is none.
    """
    difference = text - uncond
    if norm_bound:
        norm = _dot(difference, difference).sqrt().clamp_min(1e-12)
        difference = _per_latent((norm_bound / norm).clamp(max=1), text) * difference
    along = _per_latent(_share_along(difference, text), text) * text
    return text + (scale - 1) * (difference - along)


def zero_star_guidance(
    text: Float[Tensor, "B C *S"],
    uncond: Float[Tensor, "B C *S"],
    scale: float,
    noisy: Float[Tensor, "B C *S"],
    scales: NoiseScales,
) -> Float[Tensor, "B C *S"]:
    """CFG-Zero* (Fan et al. 2025): guidance of flows ``eps - x_0`` with the unconditional one scaled to be as
    near as it can to that of the text; from x_0 to x_0.

    Every noise schedule is that of a flow, whose latents are ours over ``a + s``. That the method's sampler
    leaves out its first steps has no meaning here.
    """
    flow, uncond_flow = (noise_from_x0(x0, noisy, scales) - x0 for x0 in (text, uncond))
    nearest = _per_latent(_share_along(flow, uncond_flow), text) * uncond_flow
    guided = classifier_free_guidance(flow, nearest, scale)
    return x0_from_prediction(guided, noisy, scales, "flow_prediction")


def lead_away(
    text: Float[Tensor, "B C *S"],
    uncond: Float[Tensor, "B C *S"],
    negatives: Sequence[Float[Tensor, "B C *S"]],
    weights: Sequence[Float[Tensor, "B"]],
) -> Float[Tensor, "B C *S"]:
    """Perp-Neg: the text's prediction, moved by the perpendicular part of the negative texts' predictions.

    Each negative's difference from ``uncond`` enters times its weight (negative: away), less its
    component along the text's own difference (Armandpour et al. 2023), so that what both texts have
    in common stays. Like guidance it commutes with affine maps; without negatives it is ``text``.
    """
    direction = text - uncond
    for negative, weight in zip(negatives, weights, strict=True):
        along = _share_along(negative - uncond, direction)
        perpendicular = negative - uncond - _per_latent(along, text) * direction
        text = text + _per_latent(weight, text) * perpendicular
    return text


def timestep_range(low: float | int, high: float | int, num_train_timesteps: int) -> tuple[int, int]:
    """The first and last timestep, both included, between two shares 0 <= low <= high <= 1 of all."""
    # Truncated, not rounded: 0.92 of 1000 may be 919, and the published runs drew from that range.
    first, last = (min(int(num_train_timesteps * share), num_train_timesteps - 1) for share in (low, high))
    return first, last


def sample_timesteps(
    low: int, high: int, count: int, generator: torch.Generator, device: torch.device
) -> Int[Tensor, "{count}"]:
    """``count`` timesteps, uniform over ``low`` .. ``high``, both included."""
    drawn = torch.randint(low, high + 1, (count,), generator=generator, device=generator.device)
    return drawn.to(device)


def sample_noise(
    shape: Sequence[int],
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "..."]:
    """Standard normal numbers, drawn on the generator's device."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=dtype).to(device)


def _share_along(x: Float[Tensor, "B C *S"], direction: Float[Tensor, "B C *S"]) -> Float[Tensor, "B"]:
    """How much of ``direction`` is in each latent of ``x``: a least squares fit."""
    return _dot(x, direction) / _dot(direction, direction).clamp_min(1e-12)


def _per_latent(values: Float[Tensor, "B"], latents: Float[Tensor, "B C *S"]) -> Float[Tensor, "B *ones"]:
    return values.reshape(-1, *[1] * (latents.ndim - 1))


def _dot(a: Float[Tensor, "B C *S"], b: Float[Tensor, "B C *S"]) -> Float[Tensor, "B"]:
    return (a * b).flatten(1).sum(1)
