"""CogVideoX as a prior: tiny random weights in the genuine layout, against its own pipeline's arithmetic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from fourdfy.config import ConfigError, parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.priors.acceleration import _layers
from fourdfy.priors.cogvideox import rotary_embedding
from fourdfy.priors.frozen import load_noise_schedule
from fourdfy.prompts.views import for_views
from fourdfy.registry import find
from tests.guidance.networks import context, images, learn_from_all, make
from tests.guidance.reference import CPU, cameras, embeddings
from tests.renders import images_of
from tests.tiny_transformers import save_cogvideox

TEXT = embeddings(tokens=226)
VIEWS = cameras([90.0] * 5 + [0.0] * 5, group_size=5)
"""Two clips: from the side, and from the front."""
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module", params=[False, True], ids=["2b", "5b"])
def folder(request, tmp_path_factory):
    return save_cogvideox(tmp_path_factory.mktemp("models") / "cogvideox", rotary=request.param)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return save_cogvideox(tmp_path_factory.mktemp("models") / "2b")


def small(name: str, folder, **config):
    return make(name, folder, height=32, width=48, half_precision_weights="bf16", **config)


def changed(folder, to: Path, part: str, **changes) -> dict:
    """A config that names a copy of ``folder`` with other entries in a description."""
    copy = shutil.copytree(folder, to / "model")
    file = copy / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return {"pretrained_model_name_or_path": str(copy)}


@pytest.mark.parametrize(("low_ram_vae", "level"), [(0, 0.5), (4, 0.5), (8, 0.999)])
def test_the_gradient_is_that_of_the_pipeline_s_arithmetic(folder, low_ram_vae, level):
    """w (a / s) (x - x_0) / 2 clips, x_0 from the scheduler's own step; at 0.999 there is no signal."""
    levels = {"min_step_percent": level, "max_step_percent": level}
    guidance = small("cogvideox-guidance", folder, guidance_scale=5.0, low_ram_vae=low_ram_vae, **levels)
    rgb = images(10, 24)
    out = guidance(images_of(rgb), TEXT, VIEWS, context())
    (given,) = torch.autograd.grad(out.losses["sds_video"], rgb)

    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae").requires_grad_(False)
    transformer = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer").requires_grad_(False)
    scheduler = CogVideoXDDIMScheduler.from_pretrained(folder / "scheduler")
    pipeline = CogVideoXPipeline(None, None, vae, transformer, scheduler)
    again = rgb.detach().requires_grad_()
    frames = torch.nn.functional.interpolate(
        again.movedim(-1, 1), (32, 48), mode="bilinear", align_corners=False
    )
    clips = torch.stack([2 * clip.movedim(0, 1) - 1 for clip in frames.split(5)])
    latents = vae.encode(clips).latent_dist.mode() * pipeline.vae_scaling_factor_image
    assert latents.shape == (2, 16, 2, 4, 6)
    source = context().random
    timestep = torch.full((2,), int(1000 * level))
    torch.randint(0, 1, (2,), generator=source)  # the levels
    noise = torch.randn(latents.shape, generator=source)
    noisy = scheduler.add_noise(latents.detach(), noise, timestep).transpose(1, 2)  # frames before channels
    rotary = None
    if transformer.config.use_rotary_positional_embeddings:
        rotary = pipeline._prepare_rotary_positional_embeddings(32, 48, 2, CPU)
    texts = for_views(TEXT, VIEWS[::5], view_dependent=True)
    with torch.no_grad():
        text, uncond = (
            transformer(
                hidden_states=noisy,
                encoder_hidden_states=states,
                timestep=timestep,
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]
            for states in (texts.text, texts.uncond)
        )
    scheduler.set_timesteps(1000)
    step = scheduler.step(uncond + 6 * (text - uncond), int(timestep[0]), noisy)
    x0 = step.pred_original_sample.transpose(1, 2)
    abar = float(scheduler.alphas_cumprod[timestep[0]])
    score = (1 - abar) * (abar / (1 - abar)) ** 0.5 * (latents.detach() - x0)
    assert level == 0.5 or (abar == 0 and not score.any() and not given.any())
    (wanted,) = torch.autograd.grad(latents, again, score / 2)
    # Both are float32; the two branches are one batch here.
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("distillation", "variant"),
    [
        *(("sds", {"weighting_strategy": name}) for name in ("sds", "uniform", "fantasia3d", "flow")),
        ("sds", {"use_sjc": True, "var_red": False}),
        *(("sds", {"weighting_strategy": "flow", "guidance_mode": name}) for name in ("apg", "cfg_zero")),
        ("sds", {"weighting_strategy": "flow", "correct_noise": True}),
        ("reconstruction", {}),
        ("vsd", {}),
    ],
)
def test_every_distillation_is_finite_without_any_signal(distillation, variant, small_folder):
    levels = {"min_step_percent": 0.999, "max_step_percent": 0.999, "max_step_percent_annealed": 0.999}
    guidance = small(f"cogvideox+{distillation}", small_folder, **levels, **variant)
    rgb = images(5, 24)
    out = guidance(images_of(rgb), TEXT, cameras([0.0] * 5, group_size=5), context())
    sum(out.losses.values()).backward()
    assert out.metrics["max_step"] == 999
    assert rgb.grad.isfinite().all()
    # Their factor is a power of a = 0; the others compare x_0, or flows, which are known without a signal.
    vanishes = distillation == "vsd" or variant.get("weighting_strategy") in ("sds", "uniform", "fantasia3d")
    assert bool(rgb.grad.any()) != vanishes


@pytest.mark.parametrize("size", ["2b", "5b"])
@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_the_noise_levels_are_those_of_the_scheduler(size, scheduler_class, tmp_path):
    config = json.loads((DATA / f"cogvideox-{size}.scheduler.json").read_text())
    scheduler = scheduler_class.from_config(config)
    scheduler.save_pretrained(tmp_path / "scheduler")
    schedule = load_noise_schedule(tmp_path, CPU)
    assert schedule.prediction == "v_prediction"
    torch.testing.assert_close(
        schedule.alphas_cumprod, scheduler.alphas_cumprod.float(), rtol=1e-6, atol=1e-12
    )
    assert schedule.alphas_cumprod[-1] == 0, "no signal at all"
    if size == "2b":
        known = {0: 0.997454, 20: 0.943873, 500: 0.095328, 980: 2.443e-5, 998: 6.23e-8}
        found = {step: float(schedule.alphas_cumprod[step]) for step in known}
        assert found == pytest.approx(known, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"snr_shift_scale": None}, "snr_shift_scale is missing"),
        ({"snr_shift_scale": 0}, "snr_shift_scale=0, expected more than 0"),
        ({"prediction_type": "epsilon"}, "prediction_type='epsilon', expected 'v_prediction'"),
        ({"beta_schedule": "linear"}, "beta_schedule='linear', expected 'scaled_linear'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas=[0.1, 0.2], expected None"),
        ({"use_flow_sigmas": True, "flow_shift": 3.0}, "use_flow_sigmas=True, expected False"),
        ({"shift": 3.0}, "unknown keys that might change the noise levels: shift"),
    ],
)
def test_a_schedule_that_is_not_understood_is_refused(changes, said, tmp_path):
    config = json.loads((DATA / "cogvideox-2b.scheduler.json").read_text()) | changes
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ConfigError) as error:
        load_noise_schedule(tmp_path, CPU)
    assert str(file) in str(error.value) and said in str(error.value)


@pytest.mark.parametrize("size", [(480, 720), (320, 576), (720, 480), (256, 256)])
def test_rotary_positions_are_those_of_the_pipeline(size):
    config = {"sample_height": 60, "sample_width": 90, "patch_size": 2, "attention_head_dim": 64}
    config = SimpleNamespace(**config, patch_size_t=None, use_rotary_positional_embeddings=True)
    pipeline = SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config))
    wanted = CogVideoXPipeline._prepare_rotary_positional_embeddings(pipeline, *size, 5, CPU)
    given = rotary_embedding(config, torch.empty(1, 5, 16, size[0] // 8, size[1] // 8))
    for ours, theirs in zip(given, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("distillation", ["reconstruction", "vsd"])
def test_the_other_distillations_reach_every_frame(folder, distillation):
    guidance = small(f"cogvideox+{distillation}", folder)
    learn_from_all(guidance, images(10, 24), TEXT, VIEWS, seeds=(0, 0))
    assert distillation == "reconstruction" or len(list(guidance.lora.parameters())) == 2 * 2 * 4


def test_all_blocks_can_be_compiled(small_folder):
    network = small("cogvideox-guidance", small_folder).prior.denoiser.network
    assert list(_layers(network)) == list(network.transformer_blocks)


@pytest.mark.parametrize(("size", "nearest"), [(16, 17), (14, 13), (49, None), (17, None)])
def test_numbers_of_frames_are_1_and_multiples_of_4(size, nearest):
    config = parse_config(find("cogvideox-guidance", Guidance).Config, {})
    if nearest is None:
        config.check_group_size(size, "data.single_view.num_frames")
        return
    with pytest.raises(
        ValueError, match=f"^num_frames is data.single_view.num_frames={size}.*use {nearest}$"
    ):
        config.check_group_size(size, "data.single_view.num_frames")


def test_sizes_are_multiples_of_patches_of_latents(small_folder):
    config = parse_config(find("cogvideox-guidance", Guidance).Config, {"height": 328, "width": 570})
    with pytest.raises(ValueError, match=r"^height=328, width=570: .* 16 pixels; set height=320, width=576$"):
        config.check_models()
    with pytest.raises(ValueError, match=r"of 16 pixels; set height=16, width=48$"):
        make("cogvideox-guidance", small_folder, height=8, width=48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size_t": 2}, "CogVideoX 1.5, .* is not supported; use zai-org/CogVideoX-2b or"),
        ({"in_channels": 32}, "this model continues an image; use zai-org/CogVideoX-2b or"),
        ({"use_rotary_positional_embeddings": True}, "too narrow for CogVideoX-5B; set it to bf16"),
    ],
)
def test_other_models_of_the_family_are_refused(small_folder, tmp_path, changes, message):
    given = changed(small_folder, tmp_path, "transformer", **changes)
    config = parse_config(find("cogvideox-guidance", Guidance).Config, given)
    with pytest.raises(ValueError, match=message):
        config.check_models()


@pytest.mark.parametrize(
    ("part", "key"),
    [("transformer", "max_text_seq_length"), ("transformer", "sample_frames"), ("vae", "latent_channels")],
)
def test_absurd_sizes_in_a_description_are_refused(small_folder, tmp_path, part, key):
    given = changed(small_folder, tmp_path, part, **{key: 10**9})
    config = parse_config(find("cogvideox-guidance", Guidance).Config, given)
    with pytest.raises(ConfigError, match=f"config.json: {key}=1000000000; expected"):
        config.check_models()


def test_the_text_encoder_of_another_model_is_refused(small_folder, tmp_path):
    other = changed(small_folder, tmp_path, "text_encoder", d_model=32)["pretrained_model_name_or_path"]
    given = {"pretrained_model_name_or_path": str(small_folder)}
    config = parse_config(find("cogvideox-guidance", Guidance).Config, given)
    config.check_text_encoder(str(small_folder))
    with pytest.raises(ValueError, match=r"reads texts of 16 channels.*gives 32"):
        config.check_text_encoder(other)


def test_a_gpu_that_is_too_small_gets_a_chunk_and_then_a_block_at_a_time(small_folder):
    prior = small("cogvideox-guidance", small_folder, low_ram_vae=0).prior
    assert [prior.halve_chunks(17) for _ in range(3)] == [{"low_ram_vae": 8}, {"low_ram_vae": 4}, {}]


def test_the_memory_is_that_of_a_chunk_or_of_a_block():
    config = find("cogvideox-guidance", Guidance).Config
    configs = (parse_config(config, {"low_ram_vae": at_once}) for at_once in (0, 12, 8, 4))
    gigabytes = [part.activation_bytes(17, 1, 1) / 1e9 for part in configs]
    # As measured (docs/priors.md); 12 is one whole chunk.
    assert gigabytes == pytest.approx([46, 32, 32, 16], rel=0.09)
