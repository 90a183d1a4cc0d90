"""Clips encoded in chunks: the function, the gradient and the memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from torch.profiler import ProfilerActivity, profile

from fourdfy.data.sampling import sample_video
from fourdfy.launching.experiment import load_experiment
from fourdfy.priors.causal_vae import STRIDE, cogvideox_moments, wan_moments
from tests.commands import CONFIGS

LAYOUTS = {
    "wan 2.1": {"base_dim": 4, "num_res_blocks": 1},
    "wan 2.2": {
        "base_dim": 4,
        "decoder_base_dim": 4,
        "num_res_blocks": 1,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    },
    "cogvideox": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2},
}


def make(layout: str, dtype: torch.dtype = torch.float64, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    vae_class = AutoencoderKLCogVideoX if layout == "cogvideox" else AutoencoderKLWan
    vae = vae_class(**LAYOUTS[layout] | more).requires_grad_(False).eval()
    return torch.nn.Module.to(vae, dtype)  # diffusers' own warns about every cast


def moments(vae: torch.nn.Module, *args) -> torch.Tensor:
    return (cogvideox_moments if isinstance(vae, AutoencoderKLCogVideoX) else wan_moments)(vae, *args)


def clips(frames: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, frames, 32, 32, generator=generator, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("at_once", [0, 1, 4, 8, 100])
@pytest.mark.parametrize(("layout", "frames"), [*((name, 13) for name in LAYOUTS), ("cogvideox", 17)])
def test_chunks_change_neither_values_nor_gradients(layout, frames, at_once):
    vae, whole, parts = make(layout), clips(frames), clips(frames)
    wanted = vae.encode(whole).latent_dist.parameters
    given = moments(vae, parts, at_once)
    assert torch.equal(given, wanted)
    weights = torch.randn_like(wanted)
    (given,), (wanted,) = (
        torch.autograd.grad(values, x, weights) for values, x in ((given, parts), (wanted, whole))
    )
    assert torch.equal(given, wanted)
    assert (given.abs().amax(dim=(0, 1, 3, 4)) > 0).all(), "every frame learns"


def saved_numbers(vae: torch.nn.Module, frames: int, at_once: int) -> int:
    """What the forward pass keeps for the backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        moments(vae, clips(frames, torch.float32), at_once)
    return sum(saved)


def peak_bytes(vae: torch.nn.Module, frames: int, at_once: int) -> int:
    """The most memory that both passes hold at a time."""
    x, held, most = clips(frames, torch.float32), 0, 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as passes:
        moments(vae, x, at_once).sum().backward()
    for event in passes.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("layout", "size", "measured", "share"),
    [
        ("wan 2.1", STRIDE, saved_numbers, 10),
        ("wan 2.1", STRIDE, peak_bytes, 3),
        ("cogvideox", 8, peak_bytes, 3),
    ],
)
def test_longer_clips_take_more_memory_for_the_caches_alone(layout, size, measured, share):
    vae = make(layout, torch.float32)
    all_at_once, chunked = (measured(vae, 33, at_once) - measured(vae, 17, at_once) for at_once in (0, size))
    assert 0 < chunked < all_at_once / share


def test_fewer_frames_than_a_chunk_of_cogvideox_take_less_memory():
    vae = make("cogvideox", torch.float32, layers_per_block=3)  # as the published ones
    chunk, less = (peak_bytes(vae, 17, at_once) for at_once in (8, 4))
    assert less < 0.7 * chunk


def test_clips_of_the_shipped_config_learn_evenly_though_frames_do_not():
    """A causal VAE gives the first frame most of the gradient; so each moment must come first at times."""
    vae, x = make("wan 2.1", torch.float32), clips(17, torch.float32)
    latents = moments(vae, x)
    (gradient,) = torch.autograd.grad(latents, x, torch.randn_like(latents))
    of_frame = gradient.abs().mean((0, 1, 3, 4))
    assert of_frame[0] > 2 * of_frame[1] and of_frame[0] > 20 * of_frame[-1]
    view = load_experiment(
        [CONFIGS / "fourdfy_stage_3_wan.yaml"], ["system.prompt_processor.prompt=a panda"]
    ).cfg.data.single_view
    generator, of_moment = torch.Generator().manual_seed(0), torch.zeros(17)
    for _ in range(2000):
        times = sample_video(replace(view, batch_size=1), step=0, generator=generator).times
        of_moment.index_add_(0, (17 * times).long(), of_frame)
    assert of_moment.max() < 1.5 * of_moment.min()


@pytest.mark.parametrize(("frames", "nearest"), [(16, 17), (15, 17), (14, 13), (2, 5), (80, 81)])
def test_frames_that_would_be_dropped_are_refused_with_the_nearest_number(frames, nearest):
    with pytest.raises(ValueError, match=rf"^frames={frames}: .* 1 \+ 4 k frames; use {nearest}$"):
        moments(make("wan 2.1"), clips(frames))


def test_colours_and_frames_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 5, 3, 32, 32\]; expected \[B, 3, F, H, W\]"):
        moments(make("wan 2.1"), clips(5).movedim(1, 2))
