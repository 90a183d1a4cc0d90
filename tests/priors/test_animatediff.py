"""AnimateDiff as a prior: tiny random weights in the genuine layout, against its pipeline's arithmetic."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel, UNetMotionModel

from fourdfy.config import ConfigError, parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.ops.ranks import Ranks, together
from fourdfy.priors import frozen, hub, latent
from fourdfy.priors.frozen import check_part
from fourdfy.priors.video import PackedAttention, pack_attention_in_time
from fourdfy.prompts.views import for_views
from fourdfy.registry import find
from tests.guidance.networks import TEXT, context, images, learn_from_all, make
from tests.guidance.reference import cameras
from tests.renders import images_of
from tests.tiny_models import save_animatediff, save_multi_view, save_videocrafter2, save_zeroscope

VIEWS = cameras([90.0] * 3 + [0.0] * 3, group_size=3)
"""Two clips: from the side, and from the front."""
KEY = "data.single_view.num_frames"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_animatediff(tmp_path_factory.mktemp("models") / "animatediff")


def small(name: str, folder, **config):
    given = {"motion_adapter": str(folder / "motion_adapter"), "height": 24, "width": 32}
    return make(name, folder, **given | config)


def config(**given):
    return parse_config(find("animatediff-guidance", Guidance).Config, given)


@pytest.mark.parametrize("low_ram_vae", [0, 2])
def test_the_gradient_is_that_of_the_pipeline_s_arithmetic(folder, low_ram_vae):
    """(1 - abar) (eps - noise) / 2 clips: linear betas, although the folder says otherwise; the text of each
    clip at each of its frames."""
    level = {"min_step_percent": 0.5, "max_step_percent": 0.5}
    guidance = small("animatediff-guidance", folder, guidance_scale=7.0, low_ram_vae=low_ram_vae, **level)
    rgb = images(6, 24)
    out = guidance(images_of(rgb), TEXT, VIEWS, context())
    (given,) = torch.autograd.grad(out.losses["sds_video"], rgb)

    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    unet = UNetMotionModel.from_unet2d(
        UNet2DConditionModel.from_pretrained(folder / "unet"),
        MotionAdapter.from_pretrained(folder / "motion_adapter"),
    ).eval()
    scheduler = DDIMScheduler.from_pretrained(
        folder / "scheduler", beta_schedule="linear", timestep_spacing="linspace"
    )
    again = rgb.detach().requires_grad_()
    frames = torch.nn.functional.interpolate(
        again.movedim(-1, 1), (24, 32), mode="bilinear", align_corners=False
    )
    posterior = vae.encode(2 * frames - 1).latent_dist
    source = context().random
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=source)
    latents = (latents * vae.config.scaling_factor).unflatten(0, (2, 3)).movedim(1, 2)
    assert latents.shape == (2, 4, 3, 6, 8)
    timesteps = torch.randint(500, 501, (2,), generator=source)
    noise = torch.randn(latents.shape, generator=source)
    noisy = scheduler.add_noise(latents.detach(), noise, timesteps)
    texts = for_views(TEXT, VIEWS[::3], view_dependent=True)
    with torch.no_grad():
        text, uncond = (
            unet(noisy, timesteps, encoder_hidden_states=states.repeat_interleave(3, 0)).sample
            for states in (texts.text, texts.uncond)
        )
    abar = scheduler.alphas_cumprod[500]
    assert abar.item() == pytest.approx(0.1608, abs=1e-4), "scaled_linear has 0.2763"
    wanted = (1 - abar) * (uncond + 8 * (text - uncond) - noise) / 2
    (wanted,) = torch.autograd.grad(latents, again, wanted)
    # Both are float32; x_0 lies between the two predictions of noise, and the branches are one batch here.
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("distillation", ["reconstruction", "vsd"])
def test_the_other_distillations_reach_every_frame(folder, distillation):
    guidance = small(f"animatediff+{distillation}", folder, low_ram_vae=2)
    learn_from_all(guidance, images(6, 24), TEXT, VIEWS, seeds=(1, 2))  # with seed 0 cameras are dropped
    if distillation == "vsd":
        names = [name for name, _ in guidance.lora.named_parameters()]
        assert any("motion_modules" in name for name in names)
        assert any(".attentions." in name for name in names)


def test_the_lora_may_sit_on_another_image_model_with_the_same_layers_in_time(folder, tmp_path):
    other = save_animatediff(tmp_path / "other", seed=1)
    guidance = small("animatediff+vsd", folder, pretrained_model_name_or_path_lora=str(other))
    own, second = guidance.prior.denoiser, guidance.renderings
    assert isinstance(second.network, UNetMotionModel) and second.network is not own.network
    assert torch.equal(own.schedule.alphas_cumprod, second.schedule.alphas_cumprod), "linear as well"


def test_versions_with_layers_in_the_middle_load_too(folder, tmp_path):
    with_middle = save_animatediff(tmp_path / "v2", in_the_middle=True)
    for place, wanted in ((with_middle, True), (folder, False)):
        network = small("animatediff-guidance", place).prior.denoiser.network
        names = [name for name, _ in network.named_parameters() if "motion_modules" in name]
        assert any(name.startswith("mid_block") for name in names) is wanted
        saved = MotionAdapter.from_pretrained(place / "motion_adapter")
        assert len(names) == len(list(saved.parameters()))


def test_attention_in_time_is_packed_and_nothing_else(folder):
    prior = small("animatediff-guidance", folder).prior
    network, told = prior.denoiser.network, (torch.tensor([500]), TEXT.text)
    noisy = torch.randn(1, 4, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    plain = prior.predict(network, noisy, *told)
    pack_attention_in_time(network)
    torch.testing.assert_close(prior.predict(network, noisy, *told), plain, rtol=1e-4, atol=1e-5)
    kernels = network.attn_processors
    assert all(isinstance(kernels[name], PackedAttention) == ("motion_modules" in name) for name in kernels)
    assert any("motion_modules" in name for name in kernels)


def test_an_adapter_knows_so_many_frames(folder, tmp_path):
    unknown = config()
    unknown.check_group_size(32, KEY)
    with pytest.raises(ValueError, match=f"^num_frames is {KEY}=33: .* knows 32 frames; use 32$"):
        unknown.check_group_size(33, KEY)
    copy = shutil.copytree(folder / "motion_adapter", tmp_path / "adapter")
    change(copy / "config.json", motion_max_seq_length=24)
    with pytest.raises(ValueError, match=r"knows 24 frames; use 24$"):
        config(motion_adapter=str(copy)).check_group_size(25, KEY)


def test_sizes_are_multiples_of_the_vae_s_factor_before_anything_is_loaded():
    with pytest.raises(
        ValueError, match=r"^height=321, width=570: .* of 8 pixels; set height=320, width=568$"
    ):
        config(height=321, width=570).check_models()


def test_adapters_for_other_models_are_refused(folder, tmp_path):
    given = {"pretrained_model_name_or_path": str(folder)}
    config(**given, motion_adapter=str(folder / "motion_adapter")).check_models()
    for name, key, value in (("xl", "block_out_channels", [16, 32, 64]), ("pia", "conv_in_channels", 9)):
        copy = shutil.copytree(folder / "motion_adapter", tmp_path / name)
        change(copy / "config.json", **{key: value})
        with pytest.raises(ValueError, match=r"^motion_adapter=.*made for another kind of model"):
            config(**given, motion_adapter=str(copy)).check_models()
    with pytest.raises(ConfigError, match="holds a AutoencoderKL, expected a MotionAdapter"):
        config(**given, motion_adapter=str(folder / "vae")).check_models()
    change(copy / "config.json", conv_in_channels=None, motion_max_seq_length=10**9)
    with pytest.raises(ConfigError, match="motion_max_seq_length=1000000000; expected"):
        check_part(copy, "motion_adapter", "MotionAdapter")


@pytest.mark.parametrize("name", ["wangfuyun/AnimateLCM", "ByteDance/AnimateDiff-Lightning"])
def test_distilled_adapters_are_refused_by_their_key(name):
    with pytest.raises(ValueError, match=f"^motion_adapter={name}: .* says that it was distilled"):
        config(motion_adapter=name).check_models()


def test_an_image_model_whose_weights_would_be_lost_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"class_embedding.* has no place beside layers in time"):
        small(
            "animatediff-guidance",
            save_multi_view(tmp_path / "mvdream"),
            motion_adapter=str(folder / "motion_adapter"),
        )


def test_an_adapter_is_fetched_from_the_folder_itself(tmp_path, monkeypatch):
    name = config().motion_adapter
    files = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"]
    wanted = hub.wanted_files([*files, "README.md", "unet/config.json"], ("motion_adapter",))
    assert wanted == files[:2]
    snapshot = tmp_path / f"models--{name.replace('/', '--')}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(hub.ModelNotFound, match=rf'hf download {name} --include "\*"'):
        hub.resolve_model(name, ("motion_adapter",))
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("abc")
    save_animatediff(tmp_path / "model")
    shutil.copytree(tmp_path / "model" / "motion_adapter", snapshot / "snapshots" / "abc")
    assert hub.resolve_model(name, ("motion_adapter",)) == snapshot / "snapshots" / "abc"
    assert hub.locate_model(name, ("motion_adapter",)) == f"{name} (in the hub cache)"


def change(file, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", ["zeroscope", "videocrafter", "animatediff"])
def test_every_video_prior_can_spread_its_weights(name, folder, tmp_path, monkeypatch):
    """The U-Net is read where there is room for it, and spread from there; the VAE is not spread."""
    save = {"zeroscope": save_zeroscope, "videocrafter": save_videocrafter2}.get(name)
    of = save(tmp_path / name) if save else folder
    config = {"motion_adapter": str(folder / "motion_adapter")} if name == "animatediff" else {}
    spread = []
    monkeypatch.setattr(latent, "sharded", lambda network, device: spread.append(network) or network)
    with together(Ranks(1, 2)):
        prior = make(f"{name}-guidance", of, shard_over_ranks=True, height=24, width=32, **config).prior
    assert spread == [prior.denoiser.network]


def test_that_attention_is_not_sliced_is_said(folder, caplog):
    caplog.set_level("INFO")
    frozen._say_once.cache_clear()
    small("animatediff-guidance", folder, enable_attention_slicing=True)
    assert "enable_attention_slicing: UNetMotionModel can't; its attention is whole" in caplog.text
    caplog.clear()
    make("stable-diffusion-guidance", folder, enable_attention_slicing=True)
    assert "enable_attention_slicing" not in caplog.text
