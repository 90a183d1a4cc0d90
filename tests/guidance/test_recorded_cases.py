"""Every recorded case goes through its guidance: what the network is asked, and what comes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fourdfy.guidance.vsd as vsd_module
from fourdfy.config import parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.priors.base import Denoiser
from fourdfy.registry import find
from fourdfy.types import Conditions
from tests.guidance.networks import context
from tests.guidance.reference import (
    ARRAYS,
    CPU,
    assert_matches,
    cameras,
    case,
    distil,
    embeddings,
    filled,
    recorded,
    schedule,
    span,
    texts,
)
from tests.renders import images_of

ZEROSCOPE = {
    "sds": {},
    "uniform": {"weighting_strategy": "uniform"},
    "fantasia3d": {"weighting_strategy": "fantasia3d"},
    "sds_clip0.5": {"grad_clip": 0.5},
    "sjc": {"use_sjc": True},
}


def check(losses, grad, loss_name: str, known, unet) -> None:
    (loss,) = losses.values()
    assert list(losses) == [loss_name]
    loss.backward()
    assert_matches(loss, known.loss)
    assert_matches(known.latents.grad, known.dloss_dlatents)
    assert_matches(grad.norm(), known.grad_norm)
    assert_matches(unet.noisy, known.model_input)


@pytest.mark.parametrize("name", ZEROSCOPE)
def test_zeroscope(name):
    known = case(f"zeroscope_{name}")
    config = ZEROSCOPE[name] | {"guidance_scale": known.guidance_scale.item()}
    guidance, unet = recorded("zeroscope-guidance", known.noise_pred, **config)
    losses, grad = distil(guidance, known.latents, known.t, known.noise, texts(1))
    check(losses, grad, "sds_video", known, unet)
    assert torch.equal(unet.timesteps, known.model_t)
    assert torch.equal(unet.texts, torch.cat([filled(1, 1.0), filled(1, 0.0)])), "text half first"


@pytest.mark.parametrize("guidance_name", ["videocrafter-guidance", "zeroscope-guidance"])
@pytest.mark.parametrize("name", ["amp30", "amp1"])
def test_videocrafter(name, guidance_name):
    known = case(f"videocrafter_{name}")
    guidance, unet = recorded(
        guidance_name,
        known.noise_pred,
        guidance_scale=known.guidance_scale.item(),
        motion_amp_scale=known.motion_amp_scale.item(),
    )
    losses, grad = distil(guidance, known.latents, known.t, known.noise, texts(1))
    check(losses, grad, "sds_video", known, unet)
    assert torch.equal(unet.texts, torch.cat([filled(1, 1.0), filled(1, 0.0)])), "text half first"


def test_videocrafter_step_range_closes_in():
    guidance, _ = recorded(
        "videocrafter-guidance",
        torch.zeros(1),
        min_step_percent=[0, 0.02, 0.02, 5000],
        max_step_percent=[0, 0.98, 0.5, 5000],
    )
    assert [span(guidance, step) for step in (0, 2500, 5000, 9000)] == [
        (20, 980),
        (20, 740),
        (20, 500),
        (20, 500),
    ]


def test_several_videos_are_distilled_each_by_its_own_noise_level():
    """Upstream's weight broadcast along the wrong axis here."""
    one, other = case("zeroscope_sds"), case("zeroscope_uniform")
    both = [torch.cat(pair) for pair in zip(
        (one.latents.detach(), torch.tensor([437]), one.noise),
        (other.latents.detach(), torch.tensor([20]), other.noise), strict=True,
    )]  # fmt: skip
    (text_1, uncond_1), (text_2, uncond_2) = one.noise_pred.chunk(2), other.noise_pred.chunk(2)
    guidance, _ = recorded("zeroscope-guidance", torch.cat([text_1, text_2, uncond_1, uncond_2]))
    latents = both[0].requires_grad_()
    losses, _ = distil(guidance, *both, texts(2))
    (gradient,) = torch.autograd.grad(losses["sds_video"], latents)
    assert_matches(2 * gradient[:1], one.dloss_dlatents)


def test_stable_diffusion():
    known = case("stable_diffusion_sds")
    guidance, _ = recorded(
        "stable-diffusion-guidance", known.noise_pred, guidance_scale=known.guidance_scale.item()
    )
    losses, _ = distil(guidance, known.latents, known.t, known.noise, texts(2))
    losses["sds"].backward()
    assert_matches(2 * known.latents.grad, known.grad)


def recorded_multi_view(known, **config):
    return recorded(
        "multiview-diffusion-guidance", known.noise_pred, guidance_scale=known.guidance_scale.item(), **config
    )


@pytest.mark.parametrize("name", ["t300", "t980", "t20_norescale", "one_group"])
def test_multi_view(name):
    known = case(f"mvdream_recon_{name}")
    guidance, unet = recorded_multi_view(
        known, recon_std_rescale=known.recon_std_rescale.item(), n_view=known.n_view.item()
    )
    count = len(known.latents)
    views = replace(cameras([0.0] * count), c2w=known.c2w)
    losses, grad = distil(guidance, known.latents, known.t.expand(count), known.noise, texts(count), views)
    check(losses, grad, "sds", known, unet)
    assert torch.equal(unet.timesteps, known.model_t)
    assert_matches(unet.class_labels, known.camera)


def test_multi_view_without_reconstruction_is_plain_score_distillation():
    known = case("mvdream_recon_t300")
    guidance, _ = recorded_multi_view(known, recon_loss=False)
    losses, _ = distil(guidance, known.latents, known.t.expand(8), known.noise, texts(8))
    losses["sds"].backward()
    text, uncond = known.noise_pred.chunk(2)
    abar = schedule().alphas_cumprod[300]
    wanted = (1 - abar) * (uncond + 50 * (text - uncond) - known.noise)
    assert_matches(8 * known.latents.grad, wanted)


def test_multi_view_step_range_is_the_recorded_one():
    guidance, _ = recorded_multi_view(
        case("mvdream_recon_t300"),
        min_step_percent=[0, 0.98, 0.02, 8000],
        max_step_percent=[0, 0.98, 0.5, 8000],
    )
    for step, low, high in ARRAYS["mvdream_step_range_stage1/table"]:
        assert span(guidance, int(step)) == (low, high)


# ---------------------------------------------------------------------------------------------
# VSD


@pytest.fixture(scope="module")
def vsd(tiny):
    """A VSD guidance on tiny networks, which the tests replace by recorded predictions."""

    cls = find("stable-diffusion-vsd-guidance", Guidance)

    class RecordedVSD(cls):
        def __init__(self, cfg, *, device):
            super().__init__(cfg, device=device)
            self.prior.predict = self.predict_prior

        def predict_prior(self, network, noisy, timesteps, text_embeddings, cameras=None):
            self.asked_prior = (noisy, timesteps, text_embeddings, cameras)
            return self.prior_prediction

        def predict_renderings(self, noisy, timesteps, text_embeddings, camera, told=None):
            assert told is None
            self.asked_lora = (noisy, timesteps, text_embeddings, camera)
            return self.lora_prediction[: len(noisy)]

    def build(**config):
        config = {"pretrained_model_name_or_path": str(tiny["sd"])} | config
        config = {"pretrained_model_name_or_path_lora": str(tiny["sd"])} | config
        return RecordedVSD(parse_config(cls.Config, config), device=CPU)

    return build


def with_lora_kind(guidance, name: str):
    network, _ = guidance.prior.denoiser
    guidance.prior.denoiser = Denoiser(network, schedule())
    guidance.renderings = Denoiser(network, schedule("v_prediction" if "_v_" in name else "epsilon"))
    return guidance


@pytest.mark.parametrize("name", ["vsd_v_lora", "vsd_eps_lora"])
def test_vsd_gradient(vsd, monkeypatch, name):
    known = case(name)
    guidance = with_lora_kind(vsd(guidance_scale_lora=known.guidance_scale_lora.item()), name)
    guidance.prior_prediction, guidance.lora_prediction = known.noise_pred_base, known.pred_lora
    view_text = Conditions(filled(2, 1.0), filled(2, 0.0))
    plain_text = Conditions(filled(2, 2.0), filled(2, 0.0))
    monkeypatch.setattr(vsd_module, "for_views", lambda *_, view_dependent: plain_text)
    views = replace(cameras([0.0, 0.0]), c2w=known.c2w)
    guidance.requires_grad_(False)
    losses, grad = distil(guidance, known.latents, known.t, known.noise, view_text, views)
    assert list(losses) == ["vsd"], "nothing of the LoRA learns"
    assert_matches(grad, known.grad)
    noisy, timesteps, seen, labels = guidance.asked_prior
    assert_matches(noisy, known.model_input)
    assert torch.equal(timesteps, torch.cat([known.t, known.t]))
    assert torch.equal(seen, torch.cat(view_text[:2]))
    assert labels is None, "the prior takes no cameras"
    noisy, _, seen, labels = guidance.asked_lora
    assert torch.equal(labels, known.class_labels_seen[:2])
    assert torch.equal(seen, plain_text.text)


def test_vsd_guides_the_lora_away_from_no_camera(vsd):
    known = case("vsd_v_lora")
    guidance = with_lora_kind(vsd(guidance_scale_lora=3.0), "vsd_v_lora")
    guidance.lora_prediction = known.pred_lora
    plain_text = Conditions(filled(2, 2.0), filled(2, 0.0))
    noisy = known.model_input[:2]
    x0 = guidance.predict_x0_of_renderings(noisy, known.t, plain_text, known.c2w.flatten(1))
    assert torch.equal(guidance.asked_lora[3], known.class_labels_seen), "zeros for the uncond half"
    assert torch.equal(guidance.asked_lora[2], torch.cat(plain_text[:2]))
    abar = schedule().alphas_cumprod[known.t].reshape(-1, 1, 1, 1)
    text, uncond = (abar.sqrt() * noisy - (1 - abar).sqrt() * v for v in known.pred_lora.chunk(2))
    assert_matches(x0, uncond + 3 * (text - uncond))


@pytest.mark.parametrize("which", ["keep", "drop"])
@pytest.mark.parametrize("name", ["vsd_v_lora", "vsd_eps_lora"])
def test_lora_loss(vsd, monkeypatch, name, which):
    known = case(f"{name}_loraloss_{which}")
    guidance = with_lora_kind(vsd(), name)
    guidance.lora_prediction = known.pred_lora
    monkeypatch.setattr(vsd_module, "CAMERA_DROP", 1.0 if which == "drop" else 0.0)
    drawn_from = {}

    def draw(schedule, low, high, count, generator):
        drawn_from["range"] = (*schedule.span(low, high), count)
        return known.t

    guidance.prior.draw_timesteps = draw
    monkeypatch.setattr(vsd_module, "sample_noise", lambda *_: known.noise)
    c2w, plain = case(name).c2w.flatten(1), Conditions(filled(2, 2.0), filled(2, 0.0))
    loss = guidance.start_learning(known.latents.detach(), plain, c2w, torch.Generator())()
    assert_matches(loss, known.loss)
    assert drawn_from["range"] == (0, 999, 2), "all noise levels, whatever the prior's range"
    noisy, timesteps, seen, labels = guidance.asked_lora
    assert_matches(noisy, known.model_input)
    assert torch.equal(timesteps, known.t)
    assert torch.equal(labels, known.class_labels_seen)
    assert torch.equal(seen, filled(2, 2.0)) == bool(known.text_is_cond_half)


def test_a_tenth_of_the_batches_is_learned_without_cameras(vsd):
    guidance = vsd()
    guidance.lora_prediction = torch.zeros(1, 4, 4, 4)
    generator, dropped = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        guidance.start_learning(torch.zeros(1, 4, 4, 4), texts(1), torch.ones(1, 16), generator)()
        dropped += not guidance.asked_lora[3].any()
    assert 15 <= dropped <= 45


def test_vsd_noise_level_is_halved_after_the_annealing_step(vsd):
    guidance = vsd()
    assert span(guidance, 5000) == (20, 980)
    assert span(guidance, 5001) == (20, 500)


def test_vsd_tells_the_view_to_the_prior_in_words_and_to_the_lora_as_a_camera(vsd):
    guidance = vsd()
    guidance.prior_prediction = torch.zeros(4, 4, 8, 8)
    guidance.lora_prediction = torch.zeros(2, 4, 8, 8)
    text, views = embeddings(), cameras([0.0, 90.0])
    guidance(images_of(torch.rand(2, 32, 32, 3)), text, views, context())
    front_and_side = text.text_directions[0, [1, 0]]
    assert torch.equal(guidance.asked_prior[2], torch.cat([front_and_side, text.uncond.expand(2, -1, -1)]))
    assert torch.equal(guidance.asked_lora[2], text.text.expand(2, -1, -1))
    raw = views.c2w.flatten(1)
    assert guidance.asked_lora[3].eq(raw).all() or not guidance.asked_lora[3].any()


@pytest.mark.parametrize(("kind", "array"), [("extrinsics", "c2w"), ("mvp", "mvp")])
def test_vsd_tells_the_lora_the_original_s_matrices(vsd, kind, array):
    """Where the original's own cameras (``tests/data/cameras_reference.npz``) are drawn anew."""
    reference = np.load(Path(__file__).parents[1] / "data" / "cameras_reference.npz")
    known = {key: torch.from_numpy(reference[f"fixed_e30_d2.5_f60/{key}"]) for key in ("azimuth_deg", array)}
    azimuth = known["azimuth_deg"]
    views = orbit_cameras(
        torch.full_like(azimuth, 30.0),
        azimuth,
        distance=2.5,
        fovy_deg=60.0,
        times=torch.zeros_like(azimuth),
        height=5,
        width=8,
    )
    guidance = vsd(camera_condition_type=kind)
    guidance.prior_prediction = torch.zeros(2 * len(views), 4, 8, 8)
    guidance.lora_prediction = torch.zeros(len(views), 4, 8, 8)
    asked = []
    guidance.start_learning = lambda latents, texts, camera, generator: (
        asked.append(camera) or torch.zeros(()).clone
    )
    images = torch.rand(len(views), 32, 32, 3)
    guidance(images_of(images), embeddings(), views, context())
    torch.testing.assert_close(asked[0], known[array].flatten(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(guidance.asked_lora[3], asked[0])
