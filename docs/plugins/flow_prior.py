"""A plugin: a prior for clips that flows straight from noise to one colour, the mean of its text.

It is what a modern video model is to this package (rectified flow, float levels, two frames to a latent,
a network without ``time_embedding``), with a network in closed form: the prior is a point, so
``x_t = (1 - t) m + t eps`` and the flow is ``eps - m = (x_t - m) / t``.
"""

from dataclasses import dataclass

from torch import nn

from fourdfy.priors.base import Denoiser, FlowSchedule, Prior
from fourdfy.registry import register

STRIDE, PATCH = 2, 4
"""Frames, and pixels along each side, of a latent."""


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.level = nn.Sequential(nn.Linear(1, 8), nn.SiLU())
        self.rest = nn.Linear(8, 1, bias=False)
        nn.init.zeros_(self.rest.weight)

    def forward(self, noisy, timesteps, text_embeddings):
        axes = (-1, *[1] * (noisy.ndim - 1))
        mode = text_embeddings.mean(dim=(1, 2)).reshape(axes)
        rest = self.rest(self.level(timesteps[:, None])).reshape(axes)
        return (noisy - mode) / timesteps.reshape(axes) + rest


@register("one-colour")
class OneColour(Prior):
    is_video = True
    lora_targets = ("rest",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Prior.Config):
        gain: float = 1.0

    def __init__(self, cfg, *, device):
        super().__init__(cfg, device=device)
        self.denoiser = Denoiser(
            Network().requires_grad_(False), FlowSchedule(num_train_timesteps=1, device=self.device)
        )

    def encode(self, rgb, group_size, generator):
        clips = self.cfg.gain * rgb.movedim(-1, 1).unflatten(0, (-1, group_size)).movedim(1, 2)
        return nn.functional.avg_pool3d(clips, (STRIDE, PATCH, PATCH))

    def predict(self, network, noisy, timesteps, text_embeddings, cameras=None):
        return network(noisy, timesteps, text_embeddings)

    def time_embedding(self, network):
        return network.level
