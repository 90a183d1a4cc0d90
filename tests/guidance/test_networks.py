"""Guidances on tiny genuine networks, from a folder to a gradient on the pixels."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from fourdfy.config import ConfigError, build, parse_config
from fourdfy.diffusion.frozen import MemoryOptions, encode_images
from fourdfy.guidance.base import Guidance
from fourdfy.guidance.stable_diffusion_vsd import StableDiffusionVSDGuidance
from fourdfy.registry import find
from tests.guidance.reference import CPU, cameras, embeddings

TEXT = embeddings()


def make(name: str, folder, **config) -> Guidance:
    cls = find(name, Guidance)
    config = {"pretrained_model_name_or_path": str(folder)} | config
    return cls(parse_config(cls.Config, config), device=CPU)


def make_vsd(tiny, lora="sd", **config) -> StableDiffusionVSDGuidance:
    return make(
        "stable-diffusion-vsd-guidance",
        tiny["sd"],
        pretrained_model_name_or_path_lora=str(tiny[lora]),
        **config,
    )


def images(count: int, size: int = 24) -> torch.Tensor:
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(guidance: Guidance, count: int = 4, seed: int = 0):
    rgb = images(count)
    azimuths = [360.0 * view / count for view in range(count)]
    out = guidance(rgb, TEXT, cameras(azimuths), step=10, generator=generator(seed))
    return rgb, out


ALL = {
    "sds": ("stable-diffusion-guidance", "sd", {}),
    "sds_of_v_prediction": ("stable-diffusion-guidance", "sd_v", {}),
    "sjc": ("stable-diffusion-guidance", "sd", {"use_sjc": True, "var_red": False}),
    "vsd": ("stable-diffusion-vsd-guidance", "sd", {}),
    "multi_view": ("multiview-diffusion-guidance", "multi_view", {}),
    "multi_view_sds": ("multiview-diffusion-guidance", "multi_view", {"recon_loss": False}),
    "video": ("zeroscope-guidance", "zeroscope", {"height": None, "width": None}),
    "two_videos": ("zeroscope-guidance", "zeroscope", {"height": 16, "width": 32, "num_frames": 2}),
    "slicing": ("stable-diffusion-guidance", "sd", {"enable_attention_slicing": True}),
    "multi_view_slicing": (
        "multiview-diffusion-guidance",
        "multi_view",
        {"enable_attention_slicing": True, "enable_memory_efficient_attention": True},
    ),
    "channels_last": (
        "zeroscope-guidance",
        "zeroscope",
        {"height": None, "width": None, "enable_channels_last_format": True},
    ),
}


def make_any(tiny, kind: str, **more) -> Guidance:
    name, folder, config = ALL[kind]
    if name == "stable-diffusion-vsd-guidance":
        config = config | {"pretrained_model_name_or_path_lora": str(tiny["sd_v"])}
    return make(name, tiny[folder], **config, **more)


@pytest.mark.parametrize("kind", ALL)
def test_every_guidance_gives_finite_losses_and_a_gradient_for_every_image(tiny, kind):
    rgb, out = run(make_any(tiny, kind))
    assert out.losses
    sum(out.losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in out.losses.values())
    assert torch.isfinite(rgb.grad).all()
    assert (rgb.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert out.metrics["grad_norm"] > 0
    assert (out.metrics["min_step"], out.metrics["max_step"]) == (20, 980)


@pytest.mark.parametrize("kind", ["sds", "vsd", "multi_view", "two_videos"])
def test_networks_in_half_precision_still_give_float32_losses(tiny, kind, monkeypatch):
    monkeypatch.setattr(MemoryOptions, "dtype", lambda *_: torch.bfloat16)
    guidance = make_any(tiny, kind)
    assert guidance.models.unet.conv_in.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in guidance.parameters())
    rgb, out = run(guidance)
    sum(out.losses.values()).backward()
    assert rgb.grad.dtype == torch.float32 and torch.isfinite(rgb.grad).all() and rgb.grad.any()
    assert all(loss.dtype == torch.float32 for loss in out.losses.values())


@pytest.mark.parametrize("kind", ["sds", "vsd", "multi_view", "two_videos"])
def test_all_randomness_comes_from_the_generator(tiny, kind):
    guidance = make_any(tiny, kind)
    first, again, other = (run(guidance, seed=seed)[1].losses for seed in (0, 0, 1))
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("kind", ["sds", "multi_view", "video"])
def test_frozen_networks_are_invisible_and_untouched(tiny, kind):
    guidance = make_any(tiny, kind)
    _, out = run(guidance)
    sum(out.losses.values()).backward()
    assert not list(guidance.parameters()) and not guidance.state_dict()
    for network in (guidance.models.unet, guidance.models.vae):
        assert not network.training
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_slicing_changes_no_result(tiny):
    for plain, sliced in (
        ("sds", "slicing"),
        ("multi_view", "multi_view_slicing"),
        ("video", "channels_last"),
    ):
        losses = [next(iter(run(make_any(tiny, kind))[1].losses.values())) for kind in (plain, sliced)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_images_are_resized_to_the_size_of_the_model_or_of_the_config(tiny):
    assert make("stable-diffusion-guidance", tiny["sd"]).image_size == (32, 32)
    assert make("multiview-diffusion-guidance", tiny["multi_view"], image_size=16).image_size == (16, 16)
    assert make("zeroscope-guidance", tiny["zeroscope"]).image_size == (320, 576)
    guidance = make("stable-diffusion-guidance", tiny["sd"], height=16, width=24)
    rgb = images(2)
    latents = guidance.encode(rgb, generator())
    assert latents.shape == (2, 4, 4, 6)
    resized = F.interpolate(rgb.movedim(-1, 1), (16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(latents, encode_images(guidance.models.vae, resized, generator()))
    with pytest.raises(ValueError, match="multiples of 4 pixels"):
        make("stable-diffusion-guidance", tiny["sd"], height=18)


def test_latents_are_scaled_samples_of_the_posterior(tiny):
    vae = make("stable-diffusion-guidance", tiny["sd"]).models.vae
    pictures = images(2, 32).movedim(-1, 1)
    latents = encode_images(vae, pictures, generator())
    posterior = vae.encode(pictures * 2 - 1).latent_dist
    noise = torch.randn(2, 4, 8, 8, generator=generator())
    torch.testing.assert_close(latents, 0.18215 * (posterior.mean + posterior.std * noise))


@pytest.mark.parametrize("chunk", [1, 3])
def test_encoding_in_chunks_changes_neither_latents_nor_gradients(tiny, chunk):
    vae = make("stable-diffusion-guidance", tiny["sd"]).models.vae
    results = []
    for size in (0, chunk):
        pictures = images(4, 32)
        latents = encode_images(vae, pictures.movedim(-1, 1), generator(), size)
        results.append((latents, *torch.autograd.grad(latents.square().sum(), pictures)))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-6)


def test_a_video_is_conditioned_on_the_view_of_its_first_frame(tiny, monkeypatch):
    guidance = make_any(tiny, "two_videos")
    seen = {}

    def keep(latents, timesteps, noise, text, uncond, *, step):
        seen["text"] = text
        return guidance.output({}, latents, step)

    monkeypatch.setattr(guidance, "distill", keep)
    guidance(images(4), TEXT, cameras([0.0, 90.0, 180.0, 0.0]), step=0, generator=generator())
    assert torch.equal(seen["text"], TEXT.text_directions[0, [1, 2]]), "front, back"


def test_frames_of_a_video_stay_in_order(tiny):
    guidance = make_any(tiny, "two_videos")
    rgb = images(4)
    videos = guidance.encode_videos(rgb, 2, generator())
    frames = guidance.encode(rgb, generator())
    assert videos.shape == (2, 4, 2, 4, 8)
    for video in range(2):
        for frame in range(2):
            assert torch.equal(videos[video, :, frame], frames[2 * video + frame])


def test_broken_batches_name_the_key_that_mends_them(tiny):
    with pytest.raises(ValueError, match=r"data\.single_view\.num_frames=2"):
        run(make_any(tiny, "two_videos"), count=3)
    with pytest.raises(ValueError, match=r"data\.multi_view\.batch_size"):
        run(make_any(tiny, "multi_view"), count=6)


def test_all_views_of_a_step_share_one_noise_level(tiny, monkeypatch):
    guidance = make_any(tiny, "multi_view")
    seen = {}
    inner = guidance.run_unet
    monkeypatch.setattr(guidance, "run_unet", lambda x, t, *rest: seen.update(t=t) or inner(x, t, *rest))
    run(guidance, count=8)
    assert len(seen["t"]) == 16
    assert len(set(seen["t"].tolist())) == 1


# ---------------------------------------------------------------------------------------------
# VSD


def test_vsd_trains_the_adapter_and_the_camera_embedding_alone(tiny):
    guidance = make_vsd(tiny, lora="sd_v")
    names = dict(guidance.named_parameters())
    assert {name.split(".")[0] for name in names} == {"camera_embedding", "lora"}
    assert {"camera_embedding.linear_1.weight", "camera_embedding.linear_2.bias"} <= names.keys()
    assert "lora.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_B.weight" in names
    assert all(p.shape[0] == 4 for n, p in names.items() if n.endswith("lora_A.weight"))
    # Two attentions in each of 4 transformers; to_q, to_k, to_v, to_out; A and B.
    assert len([n for n in names if n.startswith("lora.")]) == 2 * 4 * 4 * 2
    _, out = run(guidance)
    out.losses["lora"].backward()
    moved = {n for n, p in names.items() if p.grad is not None and p.grad.any()}
    # A moves once B has: B starts at zero.
    assert {n for n in names if n.endswith("lora_B.weight") or n.startswith("camera")} <= moved
    networks = (guidance.models.unet, guidance.models.vae, guidance.models.unet_lora)
    frozen = [
        p for net in networks for n, p in net.named_parameters() if "lora_" not in n and "class_emb" not in n
    ]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_the_vsd_loss_moves_the_images_and_not_the_adapter(tiny):
    guidance = make_vsd(tiny)
    rgb, out = run(guidance)
    out.losses["vsd"].backward()
    assert rgb.grad.any()
    assert all(p.grad is None for p in guidance.parameters())
    rgb, out = run(guidance)
    out.losses["lora"].backward()
    assert rgb.grad is None


@pytest.fixture
def lora_inputs():
    g = generator()
    shapes = ((2, 4, 8, 8), (2, 77, 16), (2, 16))
    noisy, states, c2w = (torch.randn(s, generator=g) for s in shapes)
    return noisy, torch.tensor([100, 700]), states, c2w


def set_adapter(guidance) -> None:
    """An adapter that does something."""
    g = generator(5)
    for name, parameter in guidance.lora.named_parameters():
        if name.endswith("lora_B.weight"):
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=g)


def test_the_adapter_starts_as_the_identity(tiny, lora_inputs):
    noisy, timesteps, states, c2w = lora_inputs
    guidance = make_vsd(tiny)
    for parameter in guidance.camera_embedding.parameters():
        torch.nn.init.zeros_(parameter)
    with_adapter = guidance.run_lora_unet(noisy, timesteps, states, c2w)
    torch.testing.assert_close(with_adapter, guidance.run_unet(noisy, timesteps, states))


def test_one_shared_network_does_what_two_do(tiny, lora_inputs, tmp_path):
    """Adapter and cameras are on for the LoRA's calls, and leave no trace in the prior's."""
    copy = shutil.copytree(tiny["sd"], tmp_path / "copy")
    shared, twofold = make_vsd(tiny), make_vsd({"sd": tiny["sd"], "copy": copy}, lora="copy")
    assert shared.models.unet is shared.models.unet_lora
    assert twofold.models.unet is not twofold.models.unet_lora
    separate = make("stable-diffusion-guidance", tiny["sd"])
    set_adapter(shared)
    before = shared.run_lora_unet(*lora_inputs)
    prior = shared.run_unet(*lora_inputs[:3])
    torch.testing.assert_close(prior, separate.run_unet(*lora_inputs[:3]), rtol=0, atol=0)
    torch.testing.assert_close(shared.run_lora_unet(*lora_inputs), before, rtol=0, atol=0)
    assert (before - prior).abs().max() > 1e-3
    twofold.load_state_dict(shared.state_dict())
    torch.testing.assert_close(twofold.run_lora_unet(*lora_inputs), before, rtol=0, atol=0)


def test_the_adapter_adds_its_product_unscaled(tiny, lora_inputs):
    """W + B A, checked by a plain network with merged weights and the same cameras."""
    guidance = make_vsd(tiny)
    set_adapter(guidance)
    merged = make("stable-diffusion-guidance", tiny["sd"])
    unet = merged.models.unet
    adapter = dict(guidance.lora.named_parameters())
    for name in {name.rpartition(".lora_")[0] for name in adapter}:
        update = adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
        unet.get_submodule(name).weight.data += update.detach()
    unet.class_embedding = guidance.camera_embedding
    torch.testing.assert_close(
        guidance.run_lora_unet(*lora_inputs), merged.run_unet(*lora_inputs), rtol=1e-4, atol=1e-5
    )


def test_switching_the_adapter_leaves_freezing_to_the_system(tiny):
    guidance = make_vsd(tiny)
    for parameter in guidance.lora.parameters():
        parameter.requires_grad_(False)
    run(guidance)
    assert not any(p.requires_grad for p in guidance.lora.parameters())
    assert all(p.requires_grad for p in guidance.camera_embedding.parameters())


def test_a_lora_with_its_own_model_reads_its_prediction_type(tiny):
    guidance = make_vsd(tiny, lora="sd_v")
    assert guidance.models.unet is not guidance.models.unet_lora
    assert guidance.models.schedule.prediction == "epsilon"
    assert guidance.models.schedule_lora.prediction == "v_prediction"


# ---------------------------------------------------------------------------------------------
# Configs


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("stable-diffusion-guidance", {"half_precision_weights": "fp8"}, "half_precision_weights='fp8'"),
        ("stable-diffusion-guidance", {"token_merging": True}, "set token_merging=false"),
        ("stable-diffusion-guidance", {"min_step_percent": [1, 2]}, "min_step_percent=.*expected a number"),
        ("stable-diffusion-guidance", {"weighting_strategy": "sdss"}, "weighting_strategy"),
        ("multiview-diffusion-guidance", {"camera_condition_type": "full"}, "camera_condition_type"),
        ("multiview-diffusion-guidance", {"ckpt_path": "x.pt"}, "pretrained_model_name_or_path"),
        ("stable-diffusion-vsd-guidance", {"enable_sequential_cpu_offload": True}, "set it to false"),
        ("zeroscope-guidance", {"guidance_scal": 3}, "did you mean 'guidance_scale'"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_loaded(name, given, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(find(name, Guidance).Config, given)


def test_a_guidance_builds_from_the_name_in_a_config(tiny):
    cls = find("stable-diffusion-guidance", Guidance)
    cfg = parse_config(cls.Config, {"pretrained_model_name_or_path": str(tiny["sd"])})
    object.__setattr__(cfg, "_component", cls)
    assert isinstance(build(cfg, device=CPU), cls)


def test_an_image_model_in_place_of_a_video_model_is_named(tiny):
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel, this guidance needs a UNet3D"):
        make("zeroscope-guidance", tiny["sd"])


def test_the_folders_are_those_of_the_hub(tiny):
    index = json.loads((tiny["sd"] / "model_index.json").read_text())
    assert set(index) - {"_class_name"} == {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}
