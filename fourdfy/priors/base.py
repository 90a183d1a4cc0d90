"""The interface of a prior: frames to latents, noise levels, and its prediction of x_0.

N rendered frames of H x W pixels, B latents of them (images, or clips of several frames) with C channels
and the axes S behind these; L tokens, E text channels, K numbers of a camera.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from fourdfy.config import Component
from fourdfy.ops.diffusion import (
    GuidanceMode,
    NoiseScales,
    classifier_free_guidance,
    lead_away,
    noise_scales,
    projected_guidance,
    sample_timesteps,
    shifted,
    timestep_range,
    x0_from_prediction,
    zero_star_guidance,
)
from fourdfy.ops.ranks import spread
from fourdfy.types import Cameras, Conditions

Network = Any
"""An ``nn.Module`` of another library, of which no type says what else it has (``config``, ``encode``)."""


class NoiseSchedule(ABC):
    """The noise levels that a network was trained at, and what it predicts at them.

    The network receives a level as its ``timesteps``: whole numbers for a DDPM, floats for a flow.
    """

    prediction: str
    """One of ``fourdfy.ops.diffusion.Prediction``."""

    @abstractmethod
    def span(self, low: float | int, high: float | int) -> tuple[float, float]:
        """The timesteps at two shares, 0..1, of all noise."""

    @abstractmethod
    def draw(
        self, low: float | int, high: float | int, count: int, generator: torch.Generator
    ) -> Real[Tensor, "{count}"]:
        """``count`` timesteps, uniform between two shares of all noise, on the network's device."""

    @abstractmethod
    def scales(self, timesteps: Real[Tensor, "B"], ndim: int) -> NoiseScales:
        """The scales of noisy latents of ``ndim`` axes."""

    def for_tokens(self, count: int) -> NoiseSchedule:
        """The levels of latents that the network takes as ``count`` tokens."""
        return self


@dataclass(frozen=True, kw_only=True)
class DDPMSchedule(NoiseSchedule):
    alphas_cumprod: Float[Tensor, "T"]
    prediction: str

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def span(self, low: float | int, high: float | int) -> tuple[int, int]:
        return timestep_range(low, high, len(self))

    def draw(
        self, low: float | int, high: float | int, count: int, generator: torch.Generator
    ) -> Real[Tensor, "{count}"]:
        return sample_timesteps(*self.span(low, high), count, generator, self.alphas_cumprod.device)

    def scales(self, timesteps: Real[Tensor, "B"], ndim: int) -> NoiseScales:
        return noise_scales(self.alphas_cumprod, timesteps, ndim)


@dataclass(frozen=True, kw_only=True)
class FlowSchedule(NoiseSchedule):
    """A rectified flow: its noise is any number. Shares of noise are those before ``shift``."""

    shift: float = 1.0
    by_tokens: tuple[tuple[int, float], tuple[int, float]] | None = None
    """Two numbers of tokens, with the logarithms of their shifts, on a line with those of all others; null:
    ``shift`` is that of all."""
    least: float = 0.0
    """The noise of a share of 0, below which the network is never used."""
    num_train_timesteps: int = 1000
    """What the network is told for pure noise."""
    device: torch.device
    prediction: str = "flow_prediction"

    def span(self, low: float | int, high: float | int) -> tuple[float, float]:
        least, most = (self.timestep(share) for share in (low, high))
        return least, most

    def draw(
        self, low: float | int, high: float | int, count: int, generator: torch.Generator
    ) -> Float[Tensor, "{count}"]:
        drawn = torch.rand(count, generator=generator, device=generator.device)
        # Without the lower end, which may be 0: losses divide by the noise.
        share = high - (high - low) * drawn.to(self.device)
        return self.timestep(share)

    def scales(self, timesteps: Real[Tensor, "B"], ndim: int) -> NoiseScales:
        sigmas = (timesteps / self.num_train_timesteps).reshape(-1, *[1] * (ndim - 1))
        return NoiseScales(1 - sigmas, sigmas)

    def timestep(self, share: Any) -> Any:
        """What the network is told for a share, or shares, of all noise."""
        assert self.by_tokens is None, "for_tokens was not called"
        return self.num_train_timesteps * (self.least + (1 - self.least) * shifted(share, self.shift))

    def for_tokens(self, count: int) -> FlowSchedule:
        if self.by_tokens is None:
            return self
        (few, least), (many, most) = self.by_tokens
        shift = math.exp(least + (most - least) * (count - few) / (many - few))
        return replace(self, shift=shift, by_tokens=None)


class Denoiser(NamedTuple):
    """A frozen network, and what its predictions mean."""

    network: Network
    schedule: NoiseSchedule


class Prior(Component, ABC):
    """A frozen diffusion model of images or clips. It is no ``nn.Module``, so it is not saved, moved or
    counted with the module that holds it."""

    is_video: ClassVar[bool] = False
    """Whether a latent is a clip, and the score loss is called ``sds_video``."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the network's linear layers that an adapter sits on."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        # No fields: a pair's config is made of a distillation's and a prior's, and the former's would win.
        is_video: ClassVar[bool] = False
        """``Prior.is_video``."""
        is_flow: ClassVar[bool] = False
        """Whether it predicts a rectified flow: its least noise may be none, and losses divide by it."""
        decodes_all: ClassVar[bool] = False
        """Whether ``decode`` gives every frame of an image's or a clip's latents, if asked for so many."""
        reads_text = True
        """Whether a step needs a prompt processor."""
        view_dependent_prompting = True
        """Whether the text says which view is seen."""
        text_processors: ClassVar[tuple[str, ...]] = ()
        """Prompt processors, by their names, whose texts it was trained with; those made from them fit too.
        Empty: any."""
        still_source = False
        """Whether ``prompt_still`` of the prompt processor is read."""

        def models(self) -> list[tuple[str, tuple[str, ...]]]:
            """Every model that is needed, by its name or path, with the parts that are."""
            return []

        def activation_bytes(self, frames: int, height: int, width: int) -> int:
            """Approximate bytes that a step of so many frames keeps for the backward pass; 0 if unknown."""
            return 0

        def check_models(self) -> None:
            """Refuse models of the wrong kind, as far as they are on this disk, without loading weights.

            Raises:
                ConfigError: names the model's file.
                ValueError: starts with the key of this config that does not fit the model.
            """

        def check_group_size(self, size: int, key: str) -> None:
            """Refuse steps whose groups of frames differ in size from what the prior takes as one.

            Args:
                size: ``Cameras.group_size`` of the steps.
                key: what sets it, for the message.

            Raises:
                ValueError: starts with the key of this config that contradicts it.
            """

        def check_text_encoder(self, name: str) -> None:
            """Refuse the text model ``name`` if it does not fit, as far as both models are on this disk.

            Raises:
                ValueError: starts with the key of this config that contradicts it.
            """

        def __post_init__(self) -> None:
            pass

    cfg: Config
    denoiser: Denoiser
    view_dependent: bool = True
    """Whether it is conditioned on the text of each latent's view instead of the plain prompt."""
    joint_latents: int = 1
    """Neighbours in a batch that the network denoises together: with one noise level and one spread."""

    def __init__(self, cfg: Config, *, device: torch.device) -> None:
        self.cfg = cfg
        self.device = torch.device(device)

    @property
    def can_be_recorded(self) -> bool:
        """Whether ``predict`` is as ``ops.replay.Replay`` wants it: a function of its tensors and of weights
        that stay in place, which looks at no value."""
        return False

    @abstractmethod
    def encode(
        self, rgb: Float[Tensor, "N H W 3"], group_size: int, generator: torch.Generator
    ) -> Float[Tensor, "B C *S"]:
        """Latents of images in 0..1; gradients reach ``rgb``.

        Args:
            group_size: neighbours that belong together: the frames of a clip, the views of an object.
        """

    def decode(self, latents: Float[Tensor, "B C *S"], most: int) -> Float[Tensor, "N H W 3"]:
        """Images in 0..1 of up to ``most`` frames of ``latents``, to be looked at."""
        raise NotImplementedError(f"{type(self).__name__} decodes nothing")

    @abstractmethod
    def predict(
        self,
        network: nn.Module,
        noisy: Float[Tensor, "B C *S"],
        timesteps: Real[Tensor, "B"],
        text_embeddings: Float[Tensor, "B L E"],
        cameras: Float[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B C *S"]:
        """The raw prediction, in float32, of the prior's network or one like it; carries its graph."""

    def denoise(self, *inputs: Tensor) -> Float[Tensor, "B C *S"]:
        """``predict`` by the prior's own network, for use without gradients."""
        return self.predict(self.denoiser.network, *inputs)

    def accelerate(self, compile_small: bool) -> None:
        """Called once, before training on a GPU: whatever is called with the same shapes in each step may be
        compiled and recorded (``system.compile``).

        Args:
            compile_small: compile also what is too small to earn it back.
        """

    def halve_chunks(self, frames: int) -> dict[str, int]:
        """Compute half as much of ``frames`` at once from now on, as far as that changes no result beyond
        rounding; called when the GPU's memory was not enough.

        Returns:
            The settings that would have done the same, by their keys; none if nothing can be halved.
        """
        return {}

    def condition(self, texts: Conditions, cameras: Cameras) -> Conditions:
        """The conditioning of B latents: ``texts`` and more; ``cameras`` are those of their first frames."""
        return texts

    def levels(self, schedule: NoiseSchedule, latents: Float[Tensor, "B C *S"]) -> NoiseSchedule:
        """``schedule`` for latents of such a size."""
        return schedule

    def draw_timesteps(
        self,
        schedule: NoiseSchedule,
        low: float | int,
        high: float | int,
        count: int,
        generator: torch.Generator,
    ) -> Real[Tensor, "{count}"]:
        """Noise levels of ``count`` latents, between two shares of all noise."""
        timesteps = schedule.draw(low, high, count, generator)
        # A network that attends over latents has only seen equal levels.
        return timesteps if self.joint_latents == 1 else timesteps[:1].expand(count)

    @torch.no_grad()
    def x0(
        self,
        noisy: Float[Tensor, "B C *S"],
        timesteps: Real[Tensor, "B"],
        texts: Sequence[Float[Tensor, "B L E"]],
        cameras: Float[Tensor, "B K"] | None = None,
    ) -> list[Float[Tensor, "B C *S"]]:
        """The prior's x_0 with each of some texts, from one network call."""
        inputs = [noisy, timesteps] if cameras is None else [noisy, timesteps, cameras]
        noisy_all, timesteps_all, *cameras_all = (torch.cat([x] * len(texts)) for x in inputs)
        schedule = self.denoiser.schedule
        inputs = [noisy_all, timesteps_all, torch.cat([*texts]), *cameras_all]
        prediction = spread(self.denoise, *inputs, group=self.joint_latents)
        scales = schedule.scales(timesteps, noisy.ndim)
        return [
            x0_from_prediction(part, noisy, scales, schedule.prediction)
            for part in prediction.chunk(len(texts))
        ]

    def guided_x0(
        self,
        noisy: Float[Tensor, "B C *S"],
        timesteps: Real[Tensor, "B"],
        conditions: Conditions,
        scale: float,
        mode: GuidanceMode = "cfg",
        norm_bound: float = 0.0,
    ) -> tuple[Float[Tensor, "B C *S"], Float[Tensor, "B C *S"]]:
        """The prior's x_0 from one network call: (guided by ``scale``, predicted from the text alone).

        Args:
            scale: counted from the unconditional prediction: uncond + scale (text - uncond). At 1 nothing is
                predicted but the text's, unless there are negatives or another mode.
            norm_bound: see ``ops.diffusion.projected_guidance``.
        """
        if scale == 1 and mode == "cfg" and not conditions.negatives:
            (with_text,) = self.x0(noisy, timesteps, [conditions.text], conditions.cameras)
            return with_text, with_text
        texts = (conditions.text, conditions.uncond, *conditions.negatives)
        with_text, without, *with_negatives = self.x0(noisy, timesteps, texts, conditions.cameras)
        led = lead_away(with_text, without, with_negatives, conditions.weights)
        if mode == "apg":
            return projected_guidance(led, without, scale, norm_bound), with_text
        if mode == "cfg_zero":
            scales = self.denoiser.schedule.scales(timesteps, noisy.ndim)
            return zero_star_guidance(led, without, scale, noisy, scales), with_text
        return classifier_free_guidance(led, without, scale), with_text

    def adjust(self, score: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        """The weighted score, possibly changed, before it is clipped."""
        return score

    def load_denoiser(self, name: str) -> Denoiser:
        """The denoiser of the model ``name``, of the prior's kind; the prior's own where it is the same."""
        raise ValueError(
            f"pretrained_model_name_or_path_lora={name}: this prior loads no second model; set it to null"
        )

    def time_embedding(self, network: Network) -> nn.Module:
        """The layers of ``network`` whose output [B E] embeds the noise level."""
        return network.time_embedding
