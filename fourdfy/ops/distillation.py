"""Distillation losses: from a prior's prediction of x_0 to a loss on the rendered latents.

All losses here are functions of the rendered latents x and of a prior's prediction of x_0, guided by
the text. With a = sqrt(abar), s = sqrt(1 - abar), a difference of two noise predictions is a
difference of two x_0: ``eps_1 - eps_2 = (a / s) (x0_2 - x0_1)``. Score distillation compares the
prior with the rendering itself (whose noise is known), VSD with a network that knows the renderings.

B latents: images, or whole videos (their frames are the axis behind the channels). Losses are
averaged over B, and summed over everything else.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.ops.diffusion import NoiseScales, add_noise, noise_from_x0

Weighting = Literal["sds", "uniform", "fantasia3d", "flow"]


def score_loss(latents: Float[Tensor, "B C *S"], grad: Float[Tensor, "B C *S"]) -> Float[Tensor, ""]:
    """The loss whose gradient with respect to ``latents`` is ``grad / B``.

    SDS (Poole et al. 2022, eq. 3) and VSD (Wang et al. 2023) define an update of the latents, not
    a loss. AMP and ``backward`` want a scalar, so one is built around a fixed target.

    Args:
        latents: VAE latents after ``scaling_factor``; they carry the graph.
        grad: the weighted score difference, without a graph.

    Raises:
        ValueError: ``grad`` carries a graph, so the U-Net's Jacobian would leak into the update.
    """
    if grad.requires_grad:
        raise ValueError("grad carries a graph; compute the prior's prediction under torch.no_grad()")
    return reconstruction_loss(latents, latents.detach() - grad)


def reconstruction_loss(
    latents: Float[Tensor, "B C *S"], target: Float[Tensor, "B C *S"]
) -> Float[Tensor, ""]:
    """Half the squared distance to a fixed ``target``, per latent (Shi et al. 2023).

    Raises:
        ValueError: ``target`` carries a graph.
    """
    if target.requires_grad:
        raise ValueError("target carries a graph; compute the prior's prediction under torch.no_grad()")
    return 0.5 * (latents - target).square().sum() / len(latents)


def sds_gradient(
    latents: Float[Tensor, "B C *S"],
    x0: Float[Tensor, "B C *S"],
    scales: NoiseScales,
    weighting: str = "sds",
) -> Float[Tensor, "B C *S"]:
    """``w(t) (eps_prior - eps)``, the update of score distillation sampling, without a graph.

    Args:
        latents: what was rendered; a graph on it is ignored.
        x0: the prior's guided prediction for the noisy ``latents``.
        scales: the noise level at which ``x0`` was predicted.
        weighting: w, see ``x0_factor``.
    """
    return score_difference(x0, latents, scales, weighting)


def sjc_gradient(
    latents: Float[Tensor, "B C *S"],
    noise: Float[Tensor, "B C *S"],
    x0: Float[Tensor, "B C *S"],
    scales: NoiseScales,
    variance_reduction: bool = True,
) -> Float[Tensor, "B C *S"]:
    """The update of score Jacobian chaining (Wang et al. 2022), without a graph.

    Their z = x + sigma eps with sigma = s / a is our noisy latent over a, and their network sees
    z / sqrt(1 + sigma^2), which is our noisy latent itself. With ``variance_reduction`` the
    denoiser is compared with the rendering, else with its noisy version.
    """
    if variance_reduction:
        return score_difference(x0, latents, scales, "uniform")
    return noise_from_x0(x0, add_noise(latents, noise, scales), scales).detach()


def vsd_gradient(
    x0_prior: Float[Tensor, "B C *S"],
    x0_renderings: Float[Tensor, "B C *S"],
    scales: NoiseScales,
) -> Float[Tensor, "B C *S"]:
    """``(1 - abar) (eps_prior - eps_renderings)``, the update of variational score distillation.

    Args:
        x0_prior: the frozen prior's guided prediction.
        x0_renderings: that of the network which is trained on the renderings.
        scales: the noise level of both.
    """
    return score_difference(x0_prior, x0_renderings, scales, "sds")


def score_difference(
    x0: Float[Tensor, "B C *S"],
    x0_reference: Float[Tensor, "B C *S"],
    scales: NoiseScales,
    weighting: str,
) -> Float[Tensor, "B C *S"]:
    """``w(t) (eps - eps_reference)`` of two predictions for the same noisy latents, without a graph."""
    return (x0_factor(scales, weighting) * (x0_reference - x0)).detach()


def x0_factor(scales: NoiseScales, weighting: str) -> Float[Tensor, "B *ones"]:
    """w(t) a / s, the factor of a difference of x_0; finite for pure noise, a = 0.

    w(t) is ``sds`` s^2 (= 1 - abar), ``uniform`` 1, ``fantasia3d`` a s^2, ``flow`` 1 / a: a difference of
    noise predictions is then one of a rectified flow's velocities, ``(x0_2 - x0_1) / s`` (Yang et al.
    2025, RFDS).

    Raises:
        ValueError: an unknown ``weighting``.
    """
    alphas, sigmas = scales
    if weighting == "sds":
        return sigmas**2 * alphas / sigmas
    if weighting == "uniform":
        return alphas / sigmas
    if weighting == "fantasia3d":
        return alphas * sigmas**2 * alphas / sigmas
    if weighting == "flow":
        return 1 / sigmas
    raise ValueError(f"weighting_strategy={weighting!r}; expected one of {get_args(Weighting)}")


def amplify_motion(score: Float[Tensor, "B C F H W"], scale: float) -> Float[Tensor, "B C F H W"]:
    """A video's score with the differences between its F frames multiplied by ``scale``; their mean stays.

    As in 4D-fy's VideoCrafter prior, it acts on the whole score ``eps_prior - eps``; the idea is that of
    Align Your Gaussians (Ling et al. 2023).
    """
    if scale == 1:
        return score
    still = score.mean(dim=2, keepdim=True)
    return still + scale * (score - still)


def less_still_motion(
    x0: Float[Tensor, "B C F H W"], still: Float[Tensor, "B C F H W"], x0_still: Float[Tensor, "B C F H W"]
) -> Float[Tensor, "B C F H W"]:
    """The x_0 whose score is that of clips less the motion in the score of the same clips held still: motion
    score distillation, after Animus3D (2025).

    What the frames of ``still - x0_still`` have in common is kept: ``still`` follows the clips, so in the
    difference of the whole scores nothing would hold what all frames share.

    Args:
        x0: predicted for the noisy clips.
        x0_still: predicted for ``still`` with the same noise.
    """
    residual = still - x0_still
    return x0 + (residual - residual.mean(dim=2, keepdim=True))


def bounded(grad: Float[Tensor, "B C *S"], clip: float | int | None = None) -> Float[Tensor, "B C *S"]:
    """``grad`` with each entry clipped to ``[-clip, clip]``. Non-finite entries stay as they are: clipping an
    infinity would hide that the prior has failed."""
    return grad if clip is None else torch.where(grad.isfinite(), grad.clamp(-clip, clip), grad)


def rescale_guided_x0(
    guided: Float[Tensor, "B C *S"],
    text: Float[Tensor, "B C *S"],
    group_size: int,
    strength: float,
) -> Float[Tensor, "B C *S"]:
    """The guided x_0 with part of its excess contrast removed (Lin et al. 2023, section 3.4).

    Args:
        guided: the x_0 of classifier-free guidance, whose spread grows with the guidance scale.
        text: the x_0 of the text alone, whose spread is right.
        group_size: number of neighbours in the batch that share one spread, i.e. the views of an object.
        strength: 0 keeps ``guided``, 1 gives each group the spread of ``text``.

    Raises:
        ValueError: B is not a multiple of ``group_size``.
    """
    if strength == 0:
        return guided
    if len(guided) % group_size:
        raise ValueError(f"{len(guided)} images do not fill whole groups of {group_size} views")
    spread_guided, spread_text = (x.reshape(-1, group_size * x[0].numel()).std(1) for x in (guided, text))
    factor = (spread_text + 1e-8) / (spread_guided + 1e-8)
    factor = factor.repeat_interleave(group_size).reshape(-1, *[1] * (guided.ndim - 1))
    return strength * factor * guided + (1 - strength) * guided
