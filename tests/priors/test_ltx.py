"""LTX-Video as a prior: tiny random weights in the genuine layout, against its own pipeline's arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

from fourdfy.config import ConfigError, parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.priors.acceleration import _layers
from fourdfy.priors.causal_vae import ltx_moments
from fourdfy.priors.frozen import check_part
from fourdfy.prompts.views import for_views
from fourdfy.registry import find
from tests.guidance.networks import context, images, learn_from_all, make
from tests.guidance.reference import cameras, embeddings
from tests.renders import images_of
from tests.tiny_transformers import LTX_CHANNELS, LTX_ENCODERS, save_ltx

FRAMES = 9
VIEWS = cameras([90.0] * FRAMES + [0.0] * FRAMES, group_size=FRAMES)
"""Two clips: from the side, and from the front."""
TOKENS = 2 * 1 * 2
KEY = "data.single_view.num_frames"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {version: save_ltx(root / version, version=version) for version in LTX_ENCODERS}


@pytest.fixture(scope="module")
def text():
    """Texts of 5 and 9 tokens, and zeros behind them."""
    found = embeddings(tokens=128)
    for tensor, length in ((found.text, 5), (found.text_directions, 9), (found.uncond, 5)):
        tensor[..., length:, :] = 0
    return found


def small(name: str, folder, **config):
    return make(name, folder, height=32, width=64, **config)


def config(**given):
    return parse_config(find("ltx-guidance", Guidance).Config, given)


@pytest.mark.parametrize(("version", "low_ram_vae", "fps"), [("0.9.0", 0, 25.0), ("0.9.5", 8, 8.0)])
def test_the_gradient_is_that_of_flow_distillation_by_hand(folders, text, version, low_ram_vae, fps):
    """(v - (eps - x)) / 2 clips, with what the pipeline tells the network and does to latents."""
    folder, level = folders[version], {"min_step_percent": 0.4, "max_step_percent": 0.4}
    settings = {"guidance_scale": 2.0, "weighting_strategy": "flow", "fps": fps, "low_ram_vae": low_ram_vae}
    guidance = small("ltx-guidance", folder, **settings, **level)
    rgb = images(2 * FRAMES, 24)
    out = guidance(images_of(rgb), text, VIEWS, context())
    (given,) = torch.autograd.grad(out.losses["sds_video"], rgb)

    vae = AutoencoderKLLTXVideo.from_pretrained(folder / "vae").requires_grad_(False)
    transformer = LTXVideoTransformer3DModel.from_pretrained(folder / "transformer").requires_grad_(False)
    again = rgb.detach().requires_grad_()
    frames = torch.nn.functional.interpolate(
        again.movedim(-1, 1), (32, 64), mode="bilinear", align_corners=False
    )
    clips = torch.stack([2 * clip.movedim(0, 1) - 1 for clip in frames.split(FRAMES)])
    assert vae.latents_mean.any(), "they are among the weights"
    latents = LTXPipeline._normalize_latents(
        vae.encode(clips).latent_dist.mode(), vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )
    assert latents.shape == (2, LTX_CHANNELS, 2, 1, 2)
    shift = math.exp(calculate_shift(TOKENS, 1024, 4096, 0.95, 2.05)) if version == "0.9.0" else 1.0
    least = 0.1 if version == "0.9.0" else 0.0
    sigma = least + (1 - least) * shift * 0.4 / (1 + (shift - 1) * 0.4)
    assert out.metrics["min_step"] == pytest.approx(1000 * sigma)
    source = context().random
    torch.rand(2, generator=source)  # the levels
    noise = torch.randn(latents.shape, generator=source)
    noisy = LTXPipeline._pack_latents((1 - sigma) * latents.detach() + sigma * noise)
    texts = for_views(text, VIEWS[::FRAMES], view_dependent=True)

    def velocity(states, length):
        mask = torch.zeros(2, 128, dtype=torch.bool)
        mask[:, :length] = True
        tokens = transformer(
            noisy,
            encoder_hidden_states=states,
            timestep=torch.full((2,), 1000 * sigma),
            encoder_attention_mask=mask,
            num_frames=2,
            height=1,
            width=2,
            rope_interpolation_scale=(8 / fps, 32, 32),
            return_dict=False,
        )[0]
        return LTXPipeline._unpack_latents(tokens, 2, 1, 2)

    with torch.no_grad():
        conditional, uncond = velocity(texts.text, 9), velocity(texts.uncond, 5)
    guided = uncond + 3 * (conditional - uncond)
    (wanted,) = torch.autograd.grad(latents, again, (guided - (noise - latents.detach())) / 2)
    # Both are float32; the two branches are one batch here.
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("distillation", ["reconstruction", "vsd"])
def test_the_other_distillations_reach_every_frame(folders, text, distillation):
    guidance = small(f"ltx+{distillation}", folders["0.9.0"])
    # With seed 0 cameras are dropped.
    learn_from_all(guidance, images(2 * FRAMES, 24), text, VIEWS, seeds=(1, 2))
    assert distillation == "reconstruction" or len(list(guidance.lora.parameters())) == 2 * 2 * 8


def test_the_lora_learns_at_the_noise_levels_of_its_latents_size(folders, text, monkeypatch):
    guidance = small("ltx+vsd", folders["0.9.0"])
    told, inner = [], guidance.predict_renderings
    monkeypatch.setattr(guidance, "predict_renderings", lambda *args: told.append(args[1]) or inner(*args))
    for seed in range(20):
        latents = torch.randn(2, LTX_CHANNELS, 2, 1, 2)
        texts = for_views(text, VIEWS[::FRAMES], view_dependent=False)
        guidance.start_learning(latents, texts, VIEWS[::FRAMES].c2w.flatten(1), context(seed=seed).random)()
    assert 100 < torch.cat(told).min() < 300


@pytest.mark.parametrize("version", LTX_ENCODERS)
def test_checkpoints_change_neither_latents_nor_gradients_and_keep_less(folders, version):
    vae = AutoencoderKLLTXVideo.from_pretrained(folders[version] / "vae").requires_grad_(False).double()
    clips = torch.randn(1, 3, FRAMES, 64, 64, dtype=torch.float64).requires_grad_()

    def encoded(at_once: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            moments = ltx_moments(vae, clips, at_once)
        return moments.detach(), torch.autograd.grad(moments.square().sum(), clips)[0], sum(kept)

    (whole, wanted, most), (parts, given, least) = map(encoded, (0, 8))
    assert torch.equal(whole, parts) and torch.equal(wanted, given)
    assert least < 0.6 * most


def test_the_frame_rate_is_a_condition(folders, text):
    """The lower it is, the further apart in seconds the model takes two frames to be."""
    noisy = torch.randn(1, LTX_CHANNELS, 2, 1, 2, generator=torch.Generator().manual_seed(0))
    found = []
    for fps in (25.0, 12.5):
        prior = small("ltx-guidance", folders["0.9.0"], fps=fps).prior
        found.append(prior.predict(prior.denoiser.network, noisy, torch.tensor([500.0]), text.text))
    first, second = found
    assert (first - second).abs().max() > 1e-3 * first.abs().max()


def test_padding_is_masked_wherever_its_zeros_are(folders, text):
    """What stands behind a text has no influence; a text of the same tokens without the mask has."""
    prior = small("ltx-guidance", folders["0.9.0"]).prior
    noisy = torch.randn(1, LTX_CHANNELS, 2, 1, 2, generator=torch.Generator().manual_seed(0))
    shorter = text.text[:, :5]
    masked, cut, seen = (
        prior.predict(prior.denoiser.network, noisy, torch.tensor([500.0]), states)
        for states in (text.text, shorter, text.text + 1e-30)
    )
    torch.testing.assert_close(masked, cut, rtol=1e-4, atol=1e-5)
    assert (seen - cut).abs().max() > 1e-3 * cut.abs().max()


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"half_precision_weights=true is float16.*set it to bf16"):
        config(half_precision_weights=True)


@pytest.mark.parametrize(("size", "nearest"), [(16, 17), (12, 9), (17, None), (25, None), (8, 9)])
def test_numbers_of_frames_are_1_and_multiples_of_8(size, nearest):
    if nearest is None:
        config().check_group_size(size, KEY)
        return
    with pytest.raises(ValueError, match=rf"^num_frames is {KEY}={size}: .* use {nearest}$"):
        config().check_group_size(size, KEY)
    with pytest.raises(ValueError, match=rf"use {nearest}$"):
        ltx_moments(torch.nn.Module(), torch.zeros(1, 3, size, 32, 32))


def test_sizes_are_multiples_of_32_before_anything_is_loaded():
    with pytest.raises(
        ValueError, match=r"^height=328, width=570: .* of 32 pixels; set height=320, width=576$"
    ):
        config(height=328, width=570).check_models()


@pytest.mark.parametrize(
    "name", ["Lightricks/LTX-Video-0.9.7-distilled", "Lightricks/LTX-Video-0.9.8-13B-distilled"]
)
def test_distilled_versions_are_refused(name):
    with pytest.raises(ValueError, match="'distil' in its name says that it was distilled"):
        config(pretrained_model_name_or_path=name).check_models()


@pytest.mark.parametrize("version", LTX_ENCODERS)
def test_both_versions_pass_the_check(folders, version):
    given = config(pretrained_model_name_or_path=str(folders[version]))
    given.check_models()
    given.check_text_encoder(str(folders[version]))
    for part, name in given.networks.items():
        check_part(folders[version], part, name)


def test_all_blocks_can_be_compiled(folders):
    network = small("ltx-guidance", folders["0.9.0"]).prior.denoiser.network
    assert list(_layers(network)) == list(network.transformer_blocks)


def test_a_gpu_that_is_too_small_keeps_one_block_at_a_time(folders):
    prior = small("ltx-guidance", folders["0.9.0"]).prior
    assert [prior.halve_chunks(17) for _ in range(2)] == [{"low_ram_vae": 8}, {}]


def test_the_advice_for_gradients_of_a_subset_is_not_refused_next():
    with pytest.raises(ValueError, match="set gradient=exact"):
        config(gradient="subset")


def test_the_memory_is_that_of_the_version_of_the_vae(folders):
    gigabytes = [
        config(pretrained_model_name_or_path=str(folders[version]), **more).activation_bytes(17, 0, 0) / 2**30
        for version, more in (("0.9.0", {}), ("0.9.5", {}), ("0.9.0", {"low_ram_vae": 8}))
    ]
    assert gigabytes == pytest.approx([2.83, 5.54, 0.94], abs=0.01)
