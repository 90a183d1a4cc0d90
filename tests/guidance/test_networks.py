"""Guidances on tiny genuine networks, from a folder to a gradient on the pixels."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from fourdfy.config import ConfigError
from fourdfy.priors import latent, mvdream
from fourdfy.priors.frozen import MemoryOptions, encode_images
from tests.guidance.networks import ALL, TEXT, context, generator, images, make, make_any, make_vsd, run
from tests.guidance.reference import CPU, cameras
from tests.renders import images_of


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


@pytest.mark.parametrize("kind", ["sds", "vsd", "multi_view", "two_videos", "videocrafter"])
def test_networks_in_half_precision_still_give_float32_losses(tiny, kind, monkeypatch):
    monkeypatch.setattr(MemoryOptions, "dtype", lambda *_: torch.bfloat16)
    guidance = make_any(tiny, kind)
    assert guidance.prior.denoiser.network.conv_in.weight.dtype == torch.bfloat16
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


@pytest.mark.parametrize("kind", ["sds", "multi_view", "videocrafter"])
def test_frozen_networks_are_invisible_and_untouched(tiny, kind):
    guidance = make_any(tiny, kind)
    _, out = run(guidance)
    sum(out.losses.values()).backward()
    assert not list(guidance.parameters()) and not guidance.state_dict()
    for network in (guidance.prior.denoiser.network, guidance.prior.vae):
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
    assert make("stable-diffusion-guidance", tiny["sd"]).prior.image_size == (32, 32)
    assert make("multiview-diffusion-guidance", tiny["multi_view"], image_size=16).prior.image_size == (
        16,
        16,
    )
    assert make("zeroscope-guidance", tiny["zeroscope"]).prior.image_size == (320, 576)
    guidance = make("stable-diffusion-guidance", tiny["sd"], height=16, width=24)
    rgb = images(2)
    latents = guidance.prior.encode(rgb, 1, generator())
    assert latents.shape == (2, 4, 4, 6)
    resized = F.interpolate(rgb.movedim(-1, 1), (16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(latents, encode_images(guidance.prior.vae, resized, generator()))
    with pytest.raises(ValueError, match="multiples of 4 pixels"):
        make("stable-diffusion-guidance", tiny["sd"], height=18)


def test_latents_are_scaled_samples_of_the_posterior(tiny):
    vae = make("stable-diffusion-guidance", tiny["sd"]).prior.vae
    pictures = images(2, 32).movedim(-1, 1)
    latents = encode_images(vae, pictures, generator())
    posterior = vae.encode(pictures * 2 - 1).latent_dist
    noise = torch.randn(2, 4, 8, 8, generator=generator())
    torch.testing.assert_close(latents, 0.18215 * (posterior.mean + posterior.std * noise))


def test_decoded_images_are_those_of_the_vae_in_0_to_1(tiny):
    prior, latents = make("stable-diffusion-guidance", tiny["sd"]).prior, torch.randn(3, 4, 8, 8)
    for shift in (None, 0.3):  # as Stable Diffusion 3 has
        prior.vae.register_to_config(shift_factor=shift)
        wanted = prior.vae.decode(latents / 0.18215 + (shift or 0)).sample[:2].detach()
        given = prior.decode(latents, 2).detach()
        torch.testing.assert_close(given, (wanted / 2 + 0.5).clamp(0, 1).movedim(1, -1))


@pytest.mark.parametrize(
    ("kind", "group_size", "message"),
    [
        ("two_videos", 4, "num_frames=2 disagrees with the group_size of the step's cameras=4"),
        ("video", 1, "one frame cannot move"),
        ("multi_view", 2, "n_view=4 disagrees with the group_size of the step's cameras=2"),
    ],
)
def test_frames_that_belong_together_otherwise_are_refused(tiny, kind, group_size, message):
    """As a sampler of a plugin may draw them; the package's are compared when the config is parsed."""
    views = cameras([0.0, 90.0, 180.0, 270.0], group_size=group_size)
    with pytest.raises(ValueError, match=message):
        make_any(tiny, kind)(images_of(images(4)), TEXT, views, context())


def test_the_views_of_a_group_see_each_other_and_no_other_group(tiny):
    guidance = make_any(tiny, "multi_view", n_view=2)
    g = generator()
    shapes = ((4, 4, 8, 8), (4, 77, 16), (4, 16))
    noisy, *told = (torch.randn(s, generator=g) for s in shapes)
    changed = noisy.clone()
    changed[0] += 1
    network = guidance.prior.denoiser.network
    with torch.no_grad():
        before, after = (
            guidance.prior.predict(network, x, torch.full((4,), 500), *told) for x in (noisy, changed)
        )
    moved = (after - before).abs().amax(dim=(1, 2, 3))
    assert (moved[:2] > 1e-3).all() and (moved[2:] < 1e-5).all()


@pytest.mark.parametrize(
    ("kind", "follows"), [("sds", False), ("video", False), ("multi_view", True), ("videocrafter", True)]
)
def test_mixed_precision_reaches_the_priors_that_the_original_ran_in_it(tiny, kind, follows):
    guidance = make_any(tiny, kind)
    losses = []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            losses.append(sum(run(guidance)[1].losses.values()))
    assert torch.equal(*losses) != follows
    torch.testing.assert_close(*losses, rtol=0.2, atol=0)


def test_all_views_of_a_step_share_one_noise_level(tiny):
    guidance = make_any(tiny, "multi_view")
    seen = {}
    inner = guidance.prior.predict
    guidance.prior.predict = lambda network, x, t, *rest: seen.update(t=t) or inner(network, x, t, *rest)
    run(guidance, count=8)
    assert len(seen["t"]) == 16
    assert len(set(seen["t"].tolist())) == 1


def test_a_checkpoint_takes_the_place_of_the_multi_view_model(tiny):
    folder = str(tiny["multi_view"])
    by_path = make("multiview-diffusion-guidance", "no/such-model", ckpt_path=folder)
    by_name = make("multiview-diffusion-guidance", folder)
    assert torch.equal(run(by_path)[1].losses["sds"], run(by_name)[1].losses["sds"])


def test_the_authors_package_takes_the_place_of_our_multi_view_network(tiny, monkeypatch, tomesd):
    """Its loader is asked with the config's values, and what it gives is called as ours is."""
    ours = make_any(tiny, "multi_view", ckpt_path=str(tiny["multi_view"]))
    asked = {}

    def load(model_name, checkpoint, num_views, dtype, device):
        asked.update(name=model_name, checkpoint=checkpoint, views=num_views, dtype=dtype, device=device)
        return ours.prior.denoiser, ours.prior.vae

    monkeypatch.setattr(mvdream, "load_mvdream_package", load)
    theirs = make_any(tiny, "multi_view", backend="mvdream", ckpt_path="theirs.pt", n_view=2)
    assert asked == {
        "name": "sd-v2.1-base-4view",
        "checkpoint": "theirs.pt",
        "views": 2,
        "dtype": torch.float32,
        "device": CPU,
    }
    assert theirs.prior.denoiser is ours.prior.denoiser and theirs.prior.vae is ours.prior.vae
    make_any(tiny, "multi_view", backend="mvdream")
    assert asked["checkpoint"] == str(tiny["multi_view"]) and asked["views"] == 4
    for option in ("token_merging", "recon_pixels", "shard_over_ranks", "enable_attention_slicing"):
        with pytest.raises(ConfigError, match=f"{option}=true needs backend=diffusers"):
            make_any(tiny, "multi_view", backend="mvdream", recon_loss=True, **{option: True})
    with pytest.raises(ConfigError, match="pretrained_model_name_or_path_lora: backend=mvdream has no place"):
        make("mvdream+vsd", tiny["multi_view"], backend="mvdream")


# ---------------------------------------------------------------------------------------------
# Token merging


@pytest.fixture
def tomesd(monkeypatch) -> list:
    """A package of that name; the calls of its ``apply_patch``."""
    calls = []
    module = ModuleType("tomesd")
    module.__spec__ = ModuleSpec("tomesd", None)
    module.apply_patch = lambda unet, **params: calls.append((unet, params))
    monkeypatch.setitem(sys.modules, "tomesd", module)
    return calls


def test_tokens_are_merged_by_tomesd(tiny, tomesd):
    make_any(tiny, "sds")
    assert not tomesd
    guidance = make_any(tiny, "sds", token_merging=True)
    assert tomesd == [(guidance.prior.denoiser.network, {"use_rand": False})], (
        "no randomness but the generator's"
    )
    params = {"ratio": 0.3, "use_rand": True}
    make_any(tiny, "multi_view", token_merging=True, token_merging_params=params)
    assert tomesd[1][1] == params
    two = make_vsd(tiny, lora="sd_v", token_merging=True)
    assert [unet for unet, _ in tomesd[2:]] == [two.prior.denoiser.network, two.renderings.network]
    with pytest.raises(ConfigError, match="is for U-Nets of images; set token_merging=false"):
        make_any(tiny, "video", token_merging=True)


def test_token_merging_without_the_package_says_what_to_install(monkeypatch, tiny):
    monkeypatch.setattr(latent, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tomesd"):
        make_any(tiny, "sds", token_merging=True)
