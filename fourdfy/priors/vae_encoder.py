"""The encoder of a frozen diffusers AutoencoderKL, with gradients for its input alone.

The same function as ``vae.encode``. Frozen weights need no gradient, so convolutions keep nothing for the
backward pass, norms keep their input, and biases and residual sums join the norm behind them. With pixels in
channels-last order and the norms in Triton, that takes less than half of the time and of the memory.

B images of H x W pixels, C channels, D others, T = H*W tokens, L latent channels,
K = 2*L parameters of the posterior, h x w latents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.ops.attention import attention
from fourdfy.ops.group_norm import OPERATION, add, add_norm, bias_norm
from fourdfy.priors.base import Network

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 0.3}
"""Bounds of the difference from ``vae.encode`` relative to its size: a few times that of rounding.
Convolutions in float32 are TF32 products."""

_encoders: WeakKeyDictionary[nn.Module, dict[Any, VAEEncoder | None]] = WeakKeyDictionary()


def posterior(
    vae: Network, images: Float[Tensor, "B 3 H W"]
) -> tuple[Float[Tensor, "B L h w"], Float[Tensor, "B L h w"]]:
    """(mean, standard deviation) of the latents, in float32.

    ``VAEEncoder`` computes them on CUDA if Triton works there and the encoder is as it expects, and
    ``vae.encode`` otherwise.

    Args:
        vae: frozen, in evaluation mode.
        images: in -1..1; gradients reach them.
    """
    if encoder := _fast_encoder(vae, images):
        mean, log_variance = encoder(images).float().chunk(2, 1)
        return mean, (0.5 * log_variance.clamp(-30, 20)).exp()
    distribution = vae.encode(images.to(vae.dtype)).latent_dist
    return distribution.mean.float(), distribution.std.float()


class VAEEncoder:
    """``vae``'s encoder up to the parameters of the posterior.

    Everything is computed on mirrored images with mirrored kernels. diffusers pads downsampling convolutions
    at the right and the bottom only, which takes a copy of the image. Padding at the left and the top only
    does not: it is the usual padding of both sides, with even sizes and a stride of 2, which passes over the
    other half.
    """

    def __init__(self, vae: Network, dtype: torch.dtype) -> None:
        encoder = vae.encoder
        self.dtype = dtype
        self.conv_in, self.conv_out = _Conv(encoder.conv_in, dtype), _Conv(encoder.conv_out, dtype)
        self.levels = [
            (
                [_Block(block, dtype) for block in level.resnets],
                [_Conv(down.conv, dtype) for down in level.downsamplers or ()],
            )
            for level in encoder.down_blocks
        ]
        first, *others = (_Block(block, dtype) for block in encoder.mid_block.resnets)
        attentions = [_Attention(layers, dtype) for layers in encoder.mid_block.attentions if layers]
        self.middle: list[_Block | _Attention] = [first, *attentions, *others]
        self.norm_out = encoder.conv_norm_out
        self.quant_conv = vae.quant_conv and _Pointwise(vae.quant_conv, dtype)

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K h w"]:
        """Means and log variances; gradients reach ``images``, which are in -1..1."""
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(self.dtype, memory_format=torch.channels_last).flip(2, 3)
            pending = _Sum(self.conv_in(images), self.conv_in.bias)
            for blocks, downsamplers in self.levels:
                for block in blocks:
                    pending = block(pending)
                for conv in downsamplers:
                    padding = tuple(1 - size % 2 for size in pending.x.shape[-2:])
                    pending = _Sum(conv(add(*pending), 2, padding), conv.bias)
            for part in self.middle:
                pending = part(pending)
            normed, _ = add_norm(*pending, self.norm_out)
            moments = self.conv_out(normed) + self.conv_out.bias[:, None, None]
            return (self.quant_conv(moments) if self.quant_conv else moments).flip(2, 3)


class _Sum(NamedTuple):
    """What a convolution leaves to the norm behind it to add up."""

    x: Float[Tensor, "B C H W"]
    bias: Float[Tensor, "C"]
    residual: Float[Tensor, "B C H W"] | None = None


class _Block:
    """A residual block."""

    def __init__(self, block: Network, dtype: torch.dtype) -> None:
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.conv1, self.conv2 = _Conv(block.conv1, dtype), _Conv(block.conv2, dtype)
        self.shortcut = block.conv_shortcut and _Pointwise(block.conv_shortcut, dtype)

    def __call__(self, pending: _Sum) -> _Sum:
        normed, total = add_norm(*pending, self.norm1)
        normed = bias_norm(self.conv1(normed), self.conv1.bias, self.norm2)
        return _Sum(self.conv2(normed), self.conv2.bias, self.shortcut(total) if self.shortcut else total)


class _Conv:
    """A convolution 3 x 3 without its bias, on mirrored images."""

    def __init__(self, conv: Network, dtype: torch.dtype) -> None:
        self.weight = conv.weight.detach().to(dtype).flip(2, 3).contiguous(memory_format=torch.channels_last)
        self.bias = conv.bias.detach().to(dtype)

    def __call__(self, x: Tensor, stride: int = 1, padding: tuple[int, ...] = (1, 1)) -> Tensor:
        return _FrozenConv.apply(x, self.weight, stride, padding)


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.weight, ctx.stride, ctx.padding = weight, stride, padding
        # The columns and rows that the stride does not reach.
        ctx.rest = [(size + 2 * pad - 3) % stride for size, pad in zip(x.shape[-2:], padding, strict=True)]
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        # Not torch.nn.grad.conv2d_input: it takes channels-first memory for granted, and converts.
        return F.conv_transpose2d(grad, ctx.weight, None, ctx.stride, ctx.padding, ctx.rest), None, None, None


class _Pointwise:
    """A linear layer over the channels, or a convolution 1 x 1."""

    def __init__(self, layer: Network, dtype: torch.dtype) -> None:
        self.weight, self.bias = layer.weight.detach().flatten(1).to(dtype), layer.bias.detach().to(dtype)

    def __call__(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        return F.linear(x.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)


class _Attention:
    """Self-attention of one head over all pixels."""

    def __init__(self, layers: Network, dtype: torch.dtype) -> None:
        assert layers.heads == 1, "attention of several heads"
        self.norm = layers.group_norm
        self.to_q, self.to_k, self.to_v, self.to_out = (
            _Pointwise(layer, dtype) for layer in (layers.to_q, layers.to_k, layers.to_v, layers.to_out[0])
        )

    def __call__(self, pending: _Sum) -> _Sum:
        normed, total = add_norm(*pending, self.norm, silu=False)
        q, k, v = (layer(normed).movedim(1, -1).flatten(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        mixed = F.linear(attention(q, k, v), self.to_out.weight)
        return _Sum(mixed.unflatten(1, total.shape[-2:]).movedim(-1, 1), self.to_out.bias, total)


def _fast_encoder(vae: Network, images: Tensor) -> VAEEncoder | None:
    """``vae``'s, made and checked at its first use; None where ``vae.encode`` is to be used."""
    device = images.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else vae.dtype
    if OPERATION.select("auto", images, dtype) is OPERATION.load("torch"):
        return None
    known, kind = _encoders.setdefault(vae, {}), (dtype, images.device)
    if kind not in known:
        known[kind] = _checked_encoder(vae, *kind)
    return known[kind]


def _checked_encoder(vae: Network, dtype: torch.dtype, device: torch.device) -> VAEEncoder | None:
    """None, and a warning, unless its values and gradients are those of ``vae.encode``."""
    try:
        encoder = VAEEncoder(vae, dtype)
        plain = _moments_and_gradient(lambda x: vae.encode(x.to(vae.dtype)).latent_dist.parameters, device)
        errors = [
            float((ours - theirs).norm() / theirs.norm())
            for ours, theirs in zip(_moments_and_gradient(encoder, device), plain, strict=True)
        ]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # anything that another layout, a compiler or a driver raises
        trouble = f"{type(error).__name__}: {error}"
    else:
        if all(error < TOLERANCE[dtype] for error in errors):
            return encoder
        trouble = f"relative differences of {', '.join(f'{error:.1e}' for error in errors)}"
    logger.warning(
        "%s: its encoder is not one that there is a fast version of (%s); the slow one is used",
        type(vae).__name__,
        trouble,
    )
    return None


def _moments_and_gradient(encode: Callable[[Tensor], Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    images = (torch.rand(1, 3, 64, 80, generator=draw) * 2 - 1).to(device).requires_grad_()
    with torch.enable_grad():
        moments = encode(images).float()
        weights = torch.randn(moments.shape, generator=draw).to(device)
        return moments.detach(), torch.autograd.grad(moments, images, weights)[0]
