"""Stable Diffusion XL and 3.5 as priors: tiny random weights, against their own pipelines."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from fourdfy.config import ConfigError, parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.priors.acceleration import _layers
from fourdfy.priors.frozen import load_noise_schedule, load_part
from fourdfy.priors.pooled import split_pooled
from fourdfy.prompts.base import PromptProcessor
from fourdfy.registry import find
from tests.guidance.networks import context, images, make
from tests.guidance.reference import CPU, cameras, embeddings
from tests.renders import images_of
from tests.tiny_models import save_stable_diffusion
from tests.tiny_transformers import save_sd3, save_sdxl

SAVE = {"sdxl": save_sdxl, "sd3": save_sd3}
VIEWS = cameras([90.0] * 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: save(root / name) for name, save in SAVE.items()}


def processor(name: str, folder, **config) -> PromptProcessor:
    cls = find(f"{name}-prompt-processor", PromptProcessor)
    given = {"prompt": "a panda", "pretrained_model_name_or_path": str(folder), "use_cache": False}
    return cls(parse_config(cls.Config, given | config))


def pipeline(name: str, folder):
    """The model's own pipeline, made of what is in its folder."""
    second, encoder = ("_2", CLIPTextModelWithProjection)
    tokenizers = [CLIPTokenizer.from_pretrained(folder / f"tokenizer{number}") for number in ("", second)]
    texts = encoder.from_pretrained(folder / "text_encoder_2").eval()
    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    if name == "sdxl":
        first = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
        unet = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
        return StableDiffusionXLPipeline(vae, first, texts, *tokenizers, unet, None)
    first = encoder.from_pretrained(folder / "text_encoder").eval()
    third = T5EncoderModel.from_pretrained(folder / "text_encoder_3").eval()
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer").requires_grad_(False)
    words = T5Tokenizer.from_pretrained(folder / "tokenizer_3")
    return StableDiffusion3Pipeline(
        transformer, None, vae, first, tokenizers[0], texts, tokenizers[1], third, words
    )


def encoded(name: str, pipe, prompt: str, negative: str | None = None):
    """(states, states of the negative prompt, vector, vector of the negative prompt) by the pipeline."""
    more = {} if name == "sdxl" else {"prompt_3": prompt}
    with torch.no_grad():
        return pipe.encode_prompt(prompt, prompt, **more, negative_prompt=negative)


def predicted(name: str, pipe, noisy, timestep, text):
    """As the pipeline calls its network, for a vector and states by ``encoded``."""
    states, pooled = (part.expand(len(noisy), *part.shape[1:]) for part in text)
    if name == "sd3":
        told = {"encoder_hidden_states": states, "pooled_projections": pooled}
        return pipe.transformer(hidden_states=noisy, timestep=timestep, **told, return_dict=False)[0]
    sizes = pipe._get_add_time_ids((32, 48), (0, 0), (32, 48), torch.float32, pooled.shape[-1])
    added = {"text_embeds": pooled, "time_ids": sizes.repeat(len(noisy), 1)}
    return pipe.unet(
        noisy, timestep, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False
    )[0]


@pytest.mark.parametrize("name", SAVE)
def test_the_gradient_is_that_of_the_pipeline_s_arithmetic(name, folders):
    """Noise, or a flow, guided from the unconditional prediction, through the VAE's own encode."""
    level = {"min_step_percent": 0.4, "max_step_percent": 0.4, "view_dependent_prompting": False}
    weight = {"weighting_strategy": "flow" if name == "sd3" else "sds", "guidance_scale": 5.0}
    guidance = make(f"{name}-guidance", folders[name], height=32, width=48, **level, **weight)
    text = processor(name, folders[name]).embeddings("cpu")
    rgb = images(2, 24)
    out = guidance(images_of(rgb), text, VIEWS, context())
    (given,) = torch.autograd.grad(out.losses["sds"], rgb)

    pipe = pipeline(name, folders[name])
    again = rgb.detach().requires_grad_()
    frames = torch.nn.functional.interpolate(
        again.movedim(-1, 1), (32, 48), mode="bilinear", align_corners=False
    )
    source = context().random
    posterior = pipe.vae.encode(2 * frames - 1).latent_dist
    shift = pipe.vae.config.shift_factor or 0
    drawn = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=source)
    latents = (drawn - shift) * pipe.vae.config.scaling_factor
    if name == "sd3":  # the levels
        torch.rand(2, generator=source)
    else:
        torch.randint(0, 1, (2,), generator=source)
    noise = torch.randn(latents.shape, generator=source)
    if name == "sd3":
        sigma = 3 * 0.4 / (1 + 2 * 0.4)  # shifted by 3
        noisy, timestep = (1 - sigma) * latents.detach() + sigma * noise, torch.full((2,), 1000 * sigma)
        target, factor = noise - latents.detach(), 1.0
    else:
        abar = float(load_noise_schedule(folders[name], CPU).alphas_cumprod[400])
        noisy, timestep = abar**0.5 * latents.detach() + (1 - abar) ** 0.5 * noise, torch.full((2,), 400)
        target, factor = noise, 1 - abar
    states, away, vector, vector_away = encoded(name, pipe, "a panda")
    with torch.no_grad():
        with_text, without = (
            predicted(name, pipe, noisy, timestep, text) for text in ((states, vector), (away, vector_away))
        )
    guided = without + 6 * (with_text - without)
    (wanted,) = torch.autograd.grad(latents, again, factor * (guided - target) / 2)
    # Both are float32; the two branches are one batch here.
    torch.testing.assert_close(given, wanted, rtol=2e-3, atol=2e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("name", SAVE)
@pytest.mark.parametrize("negative", ["", "ugly"])
def test_embeddings_are_those_of_the_pipeline(name, negative, folders):
    pipe = pipeline(name, folders[name])
    states, away, vector, vector_away = encoded(name, pipe, "a panda", negative or None)
    given = processor(name, folders[name], negative_prompt=negative).embeddings("cpu")
    sizes = states.shape[-1], vector.shape[-1], ""
    for ours, wanted in ((given.text, (states, vector)), (given.uncond[None], (away, vector_away))):
        for part, other in zip(split_pooled(ours, *sizes), wanted, strict=True):
            torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5)
    assert given.uncond.any() or (name == "sdxl" and not negative), "an empty text is zeros in SDXL alone"


@pytest.mark.parametrize("name", SAVE)
def test_a_lora_learns_for_variational_score_distillation(name, folders):
    guidance = make(f"{name}+vsd", folders[name], height=32, width=32)
    text = processor(name, folders[name]).embeddings("cpu")
    rgb = images(2, 24)
    for _ in range(2):  # the first step of an adapter moves B alone
        out = guidance(images_of(rgb), text, VIEWS, context())
        sum(out.losses.values()).backward()
        with torch.no_grad():
            for parameter in guidance.parameters():
                parameter -= 0.1 * parameter.grad.sign()
    assert rgb.grad.isfinite().all() and (rgb.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    learned = {name: bool(parameter.grad.any()) for name, parameter in guidance.named_parameters()}
    assert all(learned.values()), [name for name, moved in learned.items() if not moved]


def test_all_blocks_of_the_transformer_can_be_compiled(folders):
    network = make("sd3-guidance", folders["sd3"], height=32, width=32).prior.denoiser.network
    assert list(_layers(network)) == list(network.transformer_blocks)


def test_the_vae_of_sdxl_stays_in_float32(folders):
    prior = make("sdxl-guidance", folders["sdxl"], height=32, width=32).prior
    assert prior.load_network(folders["sdxl"], "vae", torch.float16).dtype == torch.float32
    assert prior.load_network(folders["sdxl"], "unet", torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "file", "known"),
    [
        (
            "sdxl",
            {
                "_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
                "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear",
                "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0,
                "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
                "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
            },
            "epsilon",
        ),
        (
            "sd3",
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
            "flow_prediction",
        ),
    ],
)  # fmt: skip
def test_the_published_scheduler_files_are_understood(name, file, known, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(file))
    schedule = load_noise_schedule(tmp_path, CPU)
    assert schedule.prediction == known
    if name == "sd3":
        assert schedule.shift == 3.0


def test_the_published_descriptions_are_understood(folders, tmp_path):
    """Of the U-Net of SDXL, whose file has a null for nearly all that it does without."""
    nulls = (
        "class_embed_type", "cross_attention_norm", "encoder_hid_dim", "encoder_hid_dim_type",
        "mid_block_only_cross_attention", "num_attention_heads", "num_class_embeds", "time_cond_proj_dim",
        "time_embedding_act_fn", "time_embedding_dim", "timestep_post_act", "upcast_attention",
    )  # fmt: skip
    copy = shutil.copytree(folders["sdxl"] / "unet", tmp_path / "unet").parent
    file = copy / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict.fromkeys(nulls)))
    load_part(copy, "unet", "UNet2DConditionModel", dtype=torch.float32, device=CPU)


def test_a_shift_by_size_counts_patches_of_latents(folders, tmp_path):
    """Some files for Stable Diffusion 3 have one, of about 3 for 1024 x 1024 pixels."""
    copy = shutil.copytree(folders["sd3"], tmp_path / "model")
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dynamic_shifting": True}))
    prior = make("sd3-guidance", copy, height=32, width=32).prior
    levels = prior.levels(prior.denoiser.schedule, torch.empty(1, 16, 128, 128))
    assert levels.shift == pytest.approx(math.exp(1.15))


@pytest.mark.parametrize(("name", "multiple", "nearest"), [("sdxl", 8, 1000), ("sd3", 16, 1008)])
def test_sizes_are_checked_before_anything_is_loaded(name, multiple, nearest):
    config = parse_config(find(f"{name}-guidance", Guidance).Config, {"height": 1003})
    with pytest.raises(
        ValueError, match=rf"multiples of {multiple} pixels; set height={nearest}, width=1024"
    ):
        config.check_models()


def test_sizes_are_checked_by_patches_too_when_the_networks_are_loaded(folders):
    with pytest.raises(ValueError, match=r"height=36, width=32: .* multiples of 8 pixels; set height=32"):
        make("sd3-guidance", folders["sd3"], height=36, width=32)


def test_images_that_are_too_large_are_refused(folders):
    given = {"pretrained_model_name_or_path": str(folders["sd3"]), "height": 32, "width": 80}
    config = parse_config(find("sd3-guidance", Guidance).Config, given)
    with pytest.raises(ValueError, match=r"knows the places of 64 pixels .*; set both to 64 at most$"):
        config.check_models()


@pytest.mark.parametrize("name", SAVE)
def test_texts_of_other_encoders_are_refused(name, folders, tmp_path):
    guidance = make(f"{name}-guidance", folders[name], height=32, width=32)
    with pytest.raises(ValueError, match=f"reads texts of .* channels.*set it to {name}-prompt-processor"):
        guidance(images_of(images(2)), embeddings(tokens=77), VIEWS, context())
    guidance.cfg.check_text_encoder(str(folders[name]))
    if name == "sdxl":
        other = save_stable_diffusion(tmp_path / "sd")
        with pytest.raises(ValueError, match=r"reads texts of 32 channels.*gives 16"):
            guidance.cfg.check_text_encoder(str(other))


@pytest.mark.parametrize("name", SAVE)
def test_a_text_that_would_be_cut_is_refused(name, folders):
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens, the text encoder reads 77; shorten it"):
        processor(name, folders[name], prompt="panda dancing " * 60).check_texts()


def test_a_missing_encoder_is_named(tmp_path):
    folder = save_stable_diffusion(tmp_path / "sd")
    with pytest.raises(ConfigError, match=r"lacks tokenizer_2 .*text_encoder_2 "):
        processor("sdxl", folder).embeddings("cpu")
