"""A prior without a network: a mixture of Gaussians, whose denoiser is known in closed form.

K components with means mu_k, weights w_k and one standard deviation tau. Seen through the noise
``x_t = a x_0 + s eps`` it is a mixture again, of N(a mu_k, a^2 tau^2 + s^2); so the best guess of x_0 and the
score are exact, in every parametrisation. Distillation mathematics is checked against it.

B points of any shape S, D = the product of S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.ops.diffusion import NoiseScales, prediction_target


@dataclass(frozen=True, kw_only=True)
class GaussianMixturePrior:
    """What a diffusion model would be that has learned the mixture perfectly."""

    means: Float[Tensor, "K *S"]
    weights: Float[Tensor, "K"]
    """Positive; need not sum to 1."""
    std: float
    """Of every component, in every direction; 0 is a mixture of points."""

    def given(self, components: Sequence[int]) -> GaussianMixturePrior:
        """The prior that a text leaves: these components alone."""
        index = torch.as_tensor(components, device=self.means.device)
        return GaussianMixturePrior(means=self.means[index], weights=self.weights[index], std=self.std)

    def log_density(self, noisy: Float[Tensor, "B *S"], scales: NoiseScales) -> Float[Tensor, "B"]:
        """log p(x_t), up to no constant."""
        variance = self._noisy_variance(scales)
        normaliser = 0.5 * noisy[0].numel() * torch.log(2 * torch.pi * variance)
        weights = self.weights / self.weights.sum()
        return torch.logsumexp(weights.log() + self._exponents(noisy, scales), dim=1) - normaliser

    def x0(self, noisy: Float[Tensor, "B *S"], scales: NoiseScales) -> Float[Tensor, "B *S"]:
        """The mean of x_0 given x_t: what a perfect denoiser predicts."""
        responsibility = torch.softmax(self.weights.log() + self._exponents(noisy, scales), dim=1)
        mean = (responsibility @ self.means.flatten(1)).reshape(noisy.shape)
        variance = self._noisy_variance(scales).reshape(-1, *[1] * (noisy.ndim - 1))
        gain = scales.alphas * self.std**2 / variance
        return mean + gain * (noisy - scales.alphas * mean)

    def predict(self, noisy: Float[Tensor, "B *S"], scales: NoiseScales, kind: str) -> Float[Tensor, "B *S"]:
        """What a perfect network of this ``kind`` predicts."""
        x0 = self.x0(noisy, scales)
        return prediction_target(x0, (noisy - scales.alphas * x0) / scales.sigmas, scales, kind)

    def _exponents(self, noisy: Float[Tensor, "B *S"], scales: NoiseScales) -> Float[Tensor, "B K"]:
        alphas = scales.alphas.reshape(-1, 1, 1)
        offsets = noisy.flatten(1)[:, None] - alphas * self.means.flatten(1)
        return -0.5 * offsets.square().sum(-1) / self._noisy_variance(scales)[:, None]

    def _noisy_variance(self, scales: NoiseScales) -> Float[Tensor, "B"]:
        return ((scales.alphas * self.std) ** 2 + scales.sigmas**2).flatten()
