"""Wan as a prior: tiny random weights in the genuine layout, against the arithmetic of its own pipeline."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from fourdfy.config import ConfigError, parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.priors.acceleration import _layers
from fourdfy.priors.frozen import check_part, load_part
from fourdfy.prompts.views import for_views
from fourdfy.registry import find
from tests.guidance.networks import context, images, learn_from_all, make
from tests.guidance.reference import CPU, cameras, embeddings
from tests.renders import images_of
from tests.tiny_models import save_wan

TEXT = embeddings(tokens=512)
VIEWS = cameras([90.0] * 5 + [0.0] * 5, group_size=5)
"""Two clips: from the side, and from the front."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_wan(tmp_path_factory.mktemp("models") / "wan")


def small(name: str, folder, **config):
    return make(name, folder, height=32, width=48, **config)


@pytest.mark.parametrize("low_ram_vae", [0, 4])
def test_the_gradient_is_that_of_flow_distillation_by_hand(folder, low_ram_vae):
    """(v - (eps - x)) / 2 clips, v guided from the unconditional prediction, through the VAE's own encode."""
    level = {"min_step_percent": 0.4, "max_step_percent": 0.4}
    guidance = small(
        "wan-guidance",
        folder,
        guidance_scale=5.0,
        weighting_strategy="flow",
        low_ram_vae=low_ram_vae,
        **level,
    )
    rgb = images(10, 24)
    out = guidance(images_of(rgb), TEXT, VIEWS, context())
    (given,) = torch.autograd.grad(out.losses["sds_video"], rgb)

    vae = AutoencoderKLWan.from_pretrained(folder / "vae").requires_grad_(False)
    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer").requires_grad_(False)
    again = rgb.detach().requires_grad_()
    frames = torch.nn.functional.interpolate(
        again.movedim(-1, 1), (32, 48), mode="bilinear", align_corners=False
    )
    clips = torch.stack([2 * clip.movedim(0, 1) - 1 for clip in frames.split(5)])
    mean, std = (
        torch.tensor(numbers).view(1, 16, 1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents = (vae.encode(clips).latent_dist.mode() - mean) / std
    assert latents.shape == (2, 16, 2, 4, 6)
    sigma = 3 * 0.4 / (1 + 2 * 0.4)
    assert out.metrics["min_step"] == pytest.approx(1000 * sigma)
    source = context().random
    torch.rand(2, generator=source)  # the levels
    noise = torch.randn(latents.shape, generator=source)
    noisy = (1 - sigma) * latents.detach() + sigma * noise
    texts = for_views(TEXT, VIEWS[::5], view_dependent=True)
    timestep = torch.full((2,), 1000 * sigma)
    with torch.no_grad():
        text, uncond = (
            transformer(noisy, timestep, encoder_hidden_states=states, return_dict=False)[0]
            for states in (texts.text, texts.uncond)
        )
    velocity = uncond + 6 * (text - uncond)
    (wanted,) = torch.autograd.grad(latents, again, (velocity - (noise - latents.detach())) / 2)
    # Both are float32; the two branches are one batch here.
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("distillation", ["reconstruction", "vsd"])
def test_the_other_distillations_reach_every_frame(folder, distillation):
    guidance = small(f"wan+{distillation}", folder)
    learn_from_all(guidance, images(10, 24), TEXT, VIEWS, seeds=(0, 0))
    assert distillation == "reconstruction" or len(list(guidance.lora.parameters())) == 2 * 2 * 8


def test_in_16_bits_the_sensitive_layers_and_the_vae_stay_in_float32(folder):
    class_name = "WanTransformer3DModel"
    network = load_part(folder, "transformer", class_name, dtype=torch.bfloat16, device=CPU)
    block = network.blocks[0]
    assert block.attn1.to_q.weight.dtype == torch.bfloat16
    for tensor in (
        block.scale_shift_table,
        block.norm2.weight,
        network.scale_shift_table,
        network.condition_embedder.time_embedder.linear_1.weight,
    ):
        assert tensor.dtype == torch.float32
    prior = small("wan-guidance", folder).prior
    prior.dtype = torch.bfloat16
    assert prior.load_network(folder, "vae", prior.dtype).dtype == torch.float32
    prediction = prior.predict(
        network, torch.randn(1, 16, 2, 4, 4), torch.tensor([512.5]), torch.randn(1, 512, 16)
    )
    assert prediction.dtype == torch.float32 and prediction.isfinite().all()


def test_all_blocks_can_be_compiled(folder):
    network = small("wan-guidance", folder).prior.denoiser.network
    assert list(_layers(network)) == list(network.blocks)


def test_the_frame_that_is_looked_at_is_what_the_vae_made_of_it(folder):
    prior, seen = small("wan-guidance", folder).prior, []
    prior._images = lambda latents: seen.append(latents) or torch.zeros(1, 3, 1, 8, 8)
    latents = torch.randn(2, 16, 3, 2, 2)
    prior.decode(latents, 4)
    torch.testing.assert_close(prior.normalised(seen[0]), latents[:1, :, :1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"half_precision_weights": True}, "half_precision_weights=true is float16.*set it to bf16"),
        ({"gradient": "subset", "low_ram_vae": 4}, "set gradient=exact"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(find("wan-guidance", Guidance).Config, given)


@pytest.mark.parametrize(("size", "nearest"), [(16, 17), (15, 17), (81, None), (17, None), (1, None)])
def test_numbers_of_frames_are_1_and_multiples_of_4(size, nearest):
    config = parse_config(find("wan-guidance", Guidance).Config, {})
    if size > 1 and nearest is None:
        config.check_group_size(size, "data.single_view.num_frames")
        return
    message = f"use {nearest}$" if nearest else "one frame cannot move"
    with pytest.raises(ValueError, match=message):
        config.check_group_size(size, "data.single_view.num_frames")


def test_sizes_are_multiples_of_patches_of_latents(folder):
    config = parse_config(find("wan-guidance", Guidance).Config, {"height": 328, "width": 570})
    with pytest.raises(
        ValueError, match=r"^height=328, width=570: .* of 16 pixels; set height=320, width=576$"
    ):
        config.check_models()
    with pytest.raises(ValueError, match=r"of 16 pixels; set height=16, width=48$"):
        make("wan-guidance", folder, height=8, width=48)


def test_a_vae_of_larger_strides_needs_larger_multiples(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    file = copy / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scale_factor_spatial": 16}))
    config = parse_config(
        find("wan-guidance", Guidance).Config,
        {"pretrained_model_name_or_path": str(copy), "height": 320, "width": 592},
    )
    with pytest.raises(ValueError, match=r"multiples of 32 pixels; set height=320, width=576$"):
        config.check_models()


@pytest.mark.parametrize(
    ("part", "key"), [("transformer", "num_layers"), ("vae", "z_dim"), ("text_encoder", "d_model")]
)
def test_absurd_sizes_in_a_description_are_refused(folder, tmp_path, part, key):
    copy = shutil.copytree(folder, tmp_path / "model")
    classes = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}
    classes["text_encoder"] = "UMT5EncoderModel"
    check_part(copy, part, classes[part])
    file = copy / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: 10**9}))
    with pytest.raises(ConfigError, match=f"config.json: {key}=1000000000; expected"):
        check_part(copy, part, classes[part])


def test_the_text_encoder_of_another_model_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    file = copy / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"d_model": 32}))
    config = parse_config(
        find("wan-guidance", Guidance).Config, {"pretrained_model_name_or_path": str(folder)}
    )
    config.check_text_encoder(str(folder))
    with pytest.raises(ValueError, match=r"reads texts of 16 channels.*gives 32"):
        config.check_text_encoder(str(copy))


def test_an_image_model_in_its_place_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    file = copy / "vae" / "config.json"
    file.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    config = parse_config(find("wan-guidance", Guidance).Config, {"pretrained_model_name_or_path": str(copy)})
    with pytest.raises(ConfigError, match="vae holds a AutoencoderKL, expected a AutoencoderKLWan"):
        config.check_models()


def test_a_model_in_two_parts_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    config = parse_config(find("wan-guidance", Guidance).Config, {"pretrained_model_name_or_path": str(copy)})
    (copy / "model_index.json").write_text(json.dumps({"transformer_2": [None, None]}))
    config.check_models()
    (copy / "model_index.json").write_text(json.dumps({"transformer_2": ["diffusers", "Wan"]}))
    with pytest.raises(ValueError, match=r"its transformer_2 .* is not supported"):
        config.check_models()


def test_a_gpu_that_is_too_small_gets_fewer_frames_down_to_those_of_a_latent(folder):
    prior = small("wan-guidance", folder, low_ram_vae=0).prior
    assert [prior.halve_chunks(17) for _ in range(3)] == [{"low_ram_vae": 8}, {"low_ram_vae": 4}, {}]


def test_the_memory_is_that_of_a_chunk_and_the_caches():
    config = parse_config(find("wan-guidance", Guidance).Config, {})
    whole = parse_config(find("wan-guidance", Guidance).Config, {"low_ram_vae": 0})
    gigabytes = [part.activation_bytes(17, 1, 1) / 2**30 for part in (config, whole)]
    assert gigabytes == pytest.approx([12.9, 42.7], rel=0.02)
    six = replace(config, low_ram_vae=6)
    assert six.activation_bytes(17, 1, 1) == config.activation_bytes(17, 1, 1), "whole chunks"
    longer = config.activation_bytes(33, 1, 1) - config.activation_bytes(17, 1, 1)
    assert longer == pytest.approx(0.96 * 2**30 * 4, rel=0.02), "0.96 GiB of caches for each latent"
