"""Attention over frames, of several pixels at once."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet3DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor

from fourdfy.priors.video import PackedAttention, pack_attention_in_time


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return Attention(query_dim=16, heads=2, dim_head=8).requires_grad_(False)


def tokens(pixels, frames, dtype=torch.float32):
    drawn = 3 * torch.randn(pixels, frames, 16, generator=torch.Generator().manual_seed(pixels))
    return drawn.to(dtype).requires_grad_()


@pytest.mark.parametrize("pixels", [1, 7, 12, 64, 131])
@pytest.mark.parametrize("frames", [2, 16, 100, 130])
def test_packing_changes_neither_values_nor_gradients(attention, pixels, frames):
    found = []
    for kernel in (AttnProcessor2_0(), PackedAttention(AttnProcessor2_0())):
        attention.set_processor(kernel)
        x = tokens(pixels, frames)
        mixed = attention(x)
        found.append((mixed, *torch.autograd.grad(mixed.square().sum(), x)))
    for plain, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pixels", "frames", "together"), [(64, 16, 8), (12, 16, 6), (7, 16, 7), (11, 16, 1)]
)
def test_as_many_pixels_as_divide_their_number_fill_a_tile(attention, pixels, frames, together):
    seen = []

    def kernel(attn, hidden_states, attention_mask=None):
        seen.append(hidden_states.shape)
        return hidden_states

    PackedAttention(kernel)(attention, tokens(pixels, frames))
    assert seen == [(pixels // together, together * frames, 16)]


def test_only_attention_over_frames_by_the_usual_kernel_is_packed():
    unet = UNet3DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    other = SlicedAttnProcessor(1)
    unet.mid_block.temp_attentions[0].transformer_blocks[0].attn1.set_processor(other)
    pack_attention_in_time(unet)
    for name, kernel in unet.attn_processors.items():
        in_time = "temp_attentions" in name or "transformer_in" in name
        assert isinstance(kernel, PackedAttention) == (in_time and kernel is not other), name
