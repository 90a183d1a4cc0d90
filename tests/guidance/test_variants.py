"""Options of every distillation: combined halves, corrected noise, and the difference to stillness."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from fourdfy.config import ConfigError, parse_config
from fourdfy.guidance import distillation
from fourdfy.guidance.base import Guidance
from fourdfy.ops.diffusion import (
    GuidanceMode,
    Prediction,
    add_noise,
    lead_away,
    noise_from_x0,
    prediction_target,
    projected_guidance,
    sample_noise,
    zero_star_guidance,
)
from fourdfy.priors.base import DDPMSchedule, Denoiser, FlowSchedule, Prior
from fourdfy.registry import find, register
from fourdfy.types import Conditions, TextEmbeddings
from tests.guidance.networks import ALL, context, images, make, make_any, run
from tests.guidance.reference import CPU, cameras, embeddings, filled
from tests.renders import images_of

FRAMES = 4
STD = 0.3
LEVELS = torch.tensor([0.8, 0.5, 0.2, 0.05]).double()
MODES = GuidanceMode.__args__


@register("moving-grey")
class MovingGrey(Prior):
    """Clips that get brighter by the mean of their text in each frame, give or take ``STD``: a Gaussian,
    whose denoiser is exact in every parametrisation. Without text: any grey, give or take 1."""

    is_video = True
    view_dependent = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Prior.Config):
        decodes_all = True

    def __init__(self, cfg, *, device):
        super().__init__(cfg, device=device)
        self.denoiser = Denoiser(nn.Identity(), DDPMSchedule(alphas_cumprod=LEVELS, prediction="epsilon"))
        self.calls = []

    def encode(self, rgb, group_size, generator):
        return rgb.movedim(-1, 1).unflatten(0, (-1, group_size)).movedim(1, 2)

    def decode(self, latents, most):
        return latents.movedim(2, 1).flatten(0, 1).movedim(1, -1)[:most]

    def predict(self, network, noisy, timesteps, text_embeddings, cameras=None):
        self.calls.append(noisy)
        slope = text_embeddings.mean((1, 2)).reshape(-1, 1, 1, 1, 1).double()
        mean, std = slope * torch.arange(FRAMES).reshape(-1, 1, 1), torch.where(slope == 0, 1.0, STD)
        scales = self.denoiser.schedule.scales(timesteps, noisy.ndim)
        gain = scales.alphas * std**2 / ((scales.alphas * std) ** 2 + scales.sigmas**2)
        x0 = mean + gain * (noisy - scales.alphas * mean)
        prediction = self.denoiser.schedule.prediction
        return prediction_target(x0, noise_from_x0(x0, noisy, scales), scales, prediction)


def text(slope: float, still: TextEmbeddings | None = None) -> TextEmbeddings:
    given = filled(1, slope)
    return replace(
        embeddings(),
        text=given,
        text_directions=given[:, None],
        uncond=torch.zeros_like(given[0]),
        still=still,
    )


def analytic(distillation: str, kind: str = "epsilon", **config) -> Guidance:
    cls = find(f"moving-grey+{distillation}", Guidance)
    guidance = cls(parse_config(cls.Config, config), device=CPU)
    schedule = DDPMSchedule(alphas_cumprod=LEVELS, prediction=kind)
    guidance.prior.denoiser = guidance.prior.denoiser._replace(schedule=schedule)
    return guidance


def frames(moving: bool = True) -> torch.Tensor:
    """Two clips of four frames."""
    rgb = images(2 * FRAMES, 3).detach().double()
    return rgb if moving else rgb[::FRAMES].repeat_interleave(FRAMES, 0)


def gradient(guidance: Guidance, rgb: torch.Tensor, texts: TextEmbeddings, step: int = 0) -> torch.Tensor:
    rgb = rgb.clone().requires_grad_()
    out = guidance(images_of(rgb), texts, cameras([0.0] * len(rgb), group_size=FRAMES), context(step))
    return torch.autograd.grad(out.losses["sds_video"], rgb)[0]


def drawn(guidance: Guidance):
    """(timesteps, noise) of a step of two clips."""
    schedule, source = guidance.prior.denoiser.schedule, context().random
    timesteps = guidance.prior.draw_timesteps(schedule, 0.02, 0.98, 2, source)
    return timesteps, sample_noise((2, 3, FRAMES, 3, 3), source, CPU)


@pytest.mark.parametrize("kind", Prediction.__args__)
@pytest.mark.parametrize(
    "options",
    [
        *({"guidance_mode": mode} for mode in MODES),
        {"guidance_mode": "apg", "apg_norm_bound": 0.5},
        {"correct_noise": True},
        {"still_source": True},
        {"still_source": True, "still_guidance_scale": 5.0},
        {"weighting_strategy": "flow"},
    ],
)
def test_what_the_network_predicts_changes_nothing(kind, options):
    """Nor is any option without effect."""
    texts = text(0.4, text(0.1))
    plain, given, other = (
        gradient(analytic("sds", of, **config), frames(), texts)
        for of, config in (("epsilon", {}), ("epsilon", options), (kind, options))
    )
    torch.testing.assert_close(other, given, rtol=0, atol=1e-10 * given.abs().max().item())
    assert torch.equal(plain, given) == (options == {"guidance_mode": "cfg"})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("distillation", "scale"), [("sds", 6.0), ("reconstruction", 7.0)])
def test_the_halves_are_combined_as_the_config_says(distillation, scale, mode):
    bound = {"apg_norm_bound": 2.0} if mode == "apg" else {}
    config = {"guidance_mode": mode, "guidance_scale": scale, **bound}
    config |= {"recon_std_rescale": 0.0} if distillation == "reconstruction" else {}
    guidance = analytic(distillation, **config)
    given = gradient(guidance, frames(), text(0.4))
    timesteps, noise = drawn(guidance)
    x, scales = (
        guidance.prior.encode(frames(), FRAMES, None),
        guidance.prior.denoiser.schedule.scales(timesteps, 5),
    )
    noisy = add_noise(x, noise, scales)
    with_text, uncond = guidance.prior.x0(noisy, timesteps, [filled(2, 0.4), filled(2, 0.0)])
    x0 = {
        "cfg": uncond + 7 * (with_text - uncond),
        "apg": projected_guidance(with_text, uncond, 7.0, 2.0),
        "cfg_zero": zero_star_guidance(with_text, uncond, 7.0, noisy, scales),
    }[mode]
    factor = scales.alphas * scales.sigmas if distillation == "sds" else 1
    wanted = (factor * (x - x0) / 2).movedim(2, 1).flatten(0, 1).movedim(1, -1)
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-6)  # draws are float32


@pytest.mark.parametrize("kind", ["sds", "vsd", "multi_view"])
def test_a_guidance_scale_may_be_a_schedule(tiny, kind):
    learned = []
    for scale in ([0, 6.0, 2.0, 20], 4):  # at step 10; a whole number counts as any other
        torch.manual_seed(0)  # the LoRA
        rgb, out = run(make_any(tiny, kind, guidance_scale=scale))
        sum(loss for name, loss in out.losses.items() if name != "lora").backward()
        learned.append(rgb.grad)
    assert torch.equal(*learned)


def test_at_a_scale_of_1_the_text_alone_is_asked():
    guidances = [
        analytic("reconstruction", guidance_scale=scale, recon_std_rescale=0) for scale in (1.0, 1.0 + 1e-9)
    ]
    learned = [gradient(guidance, frames(), text(0.4)) for guidance in guidances]
    torch.testing.assert_close(*learned)
    assert [len(noisy) for guidance in guidances for noisy in guidance.prior.calls] == [2, 4]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_negative_texts_lead_away_in_every_mode_and_at_a_scale_of_1_too(mode, scale):
    prior, weight = analytic("sds").prior, torch.full((2,), -1.5).double()
    timesteps = torch.tensor([1, 2])
    noisy, scales = prior.encode(frames(), FRAMES, None), prior.denoiser.schedule.scales(timesteps, 5)
    texts = [filled(2, slope) for slope in (0.4, 0.0, -0.2)]
    conditions = Conditions(*texts[:2], (texts[2],), (weight,))
    guided, text_alone = prior.guided_x0(noisy, timesteps, conditions, scale, mode)
    x0, uncond, negative = prior.x0(noisy, timesteps, texts)
    led = lead_away(x0, uncond, [negative], [weight])
    wanted = {
        "cfg": uncond + scale * (led - uncond),
        "apg": projected_guidance(led, uncond, scale),
        "cfg_zero": zero_star_guidance(led, uncond, scale, noisy, scales),
    }[mode]
    torch.testing.assert_close(guided, wanted)
    assert torch.equal(text_alone, x0) and (led - x0).abs().max() > 0.01


def test_pixels_that_are_their_own_latents_learn_the_same_from_either():
    pixels, latents = (
        gradient(analytic("reconstruction", recon_pixels=given, recon_std_rescale=0), frames(), text(0.4))
        for given in (True, False)
    )
    torch.testing.assert_close(pixels, latents)


@pytest.mark.parametrize("kind", ["multi_view", "zeroscope+reconstruction"])
def test_frames_are_compared_with_the_decoded_x0_and_no_encoder_is_between(tiny, kind):
    name, folder = ALL[kind][:2] if kind in ALL else (kind, "zeroscope")
    guidance = make(name, tiny[folder], recon_pixels=True, recon_std_rescale=0, height=16, width=16)
    seen = []
    guidance.observer = lambda x, x0: seen.append((x.latents, x0))
    rgb, out = run(guidance, count=8)  # two objects, or clips
    (loss,) = out.losses.values()
    loss.backward()
    ((latents, x0),) = seen
    assert not latents.requires_grad, "the encoder keeps nothing"
    decoded = torch.cat([guidance.prior.decode(part, 8) for part in x0.split(1)]).movedim(-1, 1)
    target = torch.nn.functional.interpolate(decoded, (24, 24), mode="bilinear").movedim(1, -1)
    torch.testing.assert_close(rgb.grad, (rgb.detach() - target) / len(x0), rtol=1e-4, atol=1e-5)


def test_a_flow_corrects_its_noise_by_one_step_to_pure_noise():
    """eps + (1 - sigma) (v + x - eps), v without guidance (Yang et al. 2025, RFDS-Rev)."""
    guidance = analytic("sds", correct_noise=True, weighting_strategy="flow")
    schedule = FlowSchedule(device=CPU)
    guidance.prior.denoiser = guidance.prior.denoiser._replace(schedule=schedule)
    given = gradient(guidance, frames(), text(0.4))
    first, second = guidance.prior.calls
    assert (len(first), len(second)) == (2, 4), "the text alone, then both halves"
    timesteps, noise = drawn(guidance)
    sigmas = (timesteps / 1000).reshape(2, 1, 1, 1, 1)
    x = guidance.prior.encode(frames(), FRAMES, None)
    velocity = guidance.prior.predict(None, (1 - sigmas) * x + sigmas * noise, timesteps, filled(2, 0.4))
    corrected = noise + (1 - sigmas) * (velocity + x - noise)
    torch.testing.assert_close(second[:2], (1 - sigmas) * x + sigmas * corrected, rtol=0, atol=1e-6)
    assert given.isfinite().all()


def test_the_noise_of_an_exact_straight_flow_stays():
    """A prior of one clip flows straight; what was drawn is the noise that it couples with that clip."""
    guidance = analytic("sds", correct_noise=True)
    guidance.prior.predict = lambda network, noisy, timesteps, *_: (
        seen.append(noisy)
        or noise_from_x0(clip.expand_as(noisy), noisy, guidance.prior.denoiser.schedule.scales(timesteps, 5))
    )
    seen, clip = [], guidance.prior.encode(frames()[:FRAMES], FRAMES, None)
    gradient(guidance, frames()[:FRAMES].repeat(2, 1, 1, 1), text(0.4))
    torch.testing.assert_close(seen[1][:2], seen[0])


@pytest.mark.parametrize("config", [{}, {"correct_noise": True}, {"weighting_strategy": "flow"}])
def test_without_guidance_the_pull_at_the_mode_is_none_on_average_over_noise(config):
    guidance = analytic("sds", guidance_scale=0.0, **config)
    mode = 0.5 * torch.arange(FRAMES).double().repeat(2).reshape(-1, 1, 1, 1).expand(-1, 3, 3, 3)
    pulls, draw = [], distillation.sample_noise
    for sign in (1, -1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distillation, "sample_noise", lambda *args, sign=sign: sign * draw(*args))
            pulls.append(gradient(guidance, mode, text(0.5)))
    assert pulls[0].abs().max() > 0.01
    torch.testing.assert_close(*pulls[:1], -pulls[1], rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------
# The difference to stillness


@pytest.mark.parametrize(
    ("distillation", "more"),
    [
        ("sds", {"guidance_scale": 6.0}),
        ("sds", {"guidance_scale": 6.0, "correct_noise": True, "guidance_mode": "apg"}),
        ("reconstruction", {"guidance_scale": 7.0, "recon_loss": False}),
        ("reconstruction", {"guidance_scale": 7.0, "recon_std_rescale": 0.0}),
    ],
)
def test_a_still_clip_with_the_same_text_and_scale_is_not_moved(distillation, more):
    guidance = analytic(distillation, still_source=True, still_guidance_scale=7.0, **more)

    def motion(rgb, texts):
        """What the gradient changes between frames."""
        return gradient(guidance, rgb, texts).unflatten(0, (2, FRAMES)).diff(dim=1)

    for texts in (text(0.4), text(0.4, text(0.4))):
        assert motion(frames(moving=False), texts).abs().max() < 1e-14
        assert motion(frames(), texts).abs().max() > 0.01, "what moves is not"
    slopes = motion(frames(moving=False), text(0.4, text(0.1))).mean((2, 3, 4))
    assert (slopes < 0).all(), "it gets brighter, as the verb says"


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_what_the_prior_says_of_the_still_clip_is_subtracted(scale):
    """w (eps(x_t; text) - eps), less what differs between frames of w (eps(still_t; text for it) - eps)."""
    guidance = analytic("sds", guidance_scale=6.0, still_source=True, still_guidance_scale=scale)
    given = gradient(guidance, frames(), text(0.4, text(0.1)))
    assert [len(noisy) for noisy in guidance.prior.calls] == [4, 2 if scale == 1 else 4]
    timesteps, noise = drawn(guidance)
    scales = guidance.prior.denoiser.schedule.scales(timesteps, 5)
    x = guidance.prior.encode(frames(), FRAMES, None)
    noisy, still = guidance.prior.calls[0][:2], guidance.prior.calls[1][:2]
    held = (still - scales.sigmas * noise) / scales.alphas
    torch.testing.assert_close(held, x[:, :, :1].expand_as(x), rtol=0, atol=1e-6)  # the first frame

    def noise_of(noisy, slope, scale):
        with_text, uncond = guidance.prior.x0(noisy, timesteps, [filled(2, slope), filled(2, 0.0)])
        return noise_from_x0(uncond + scale * (with_text - uncond), noisy, scales)

    moved = noise_of(still, 0.1, scale) - noise
    score = noise_of(noisy, 0.4, 7) - noise - (moved - moved.mean(2, keepdim=True))
    wanted = (scales.sigmas**2 * score / 2).movedim(2, 1).flatten(0, 1).movedim(1, -1)
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-6)


def test_the_vae_draws_the_same_for_the_clip_held_still(tiny):
    guidance = make("zeroscope-guidance", tiny["zeroscope"], height=None, width=None, still_source=True)
    encode, latents = guidance.prior.encode, []
    guidance.prior.encode = lambda *args: latents.append(encode(*args)) or latents[-1]
    still = images(1).detach().repeat(4, 1, 1, 1)
    guidance(images_of(still), embeddings(), cameras([0.0] * 4, group_size=4), context())
    assert torch.equal(*latents)
    assert not torch.equal(*latents[0][0, :, :2].unbind(1)), "there are draws"


def test_a_lora_may_see_and_learn_the_clip_held_still(tiny):
    """Before it has learned anything it is the prior, so the motion is that of score distillation."""
    config = {"height": None, "width": None, "view_dependent_prompting": False, "still_source": True}
    guidance = make("zeroscope+vsd", tiny["zeroscope"], guidance_scale=1.0, **config)
    without = make("zeroscope+sds", tiny["zeroscope"], guidance_scale=0.0, **config)  # one less
    for parameter in guidance.camera_embedding.parameters():
        parameter.data.zero_()
    start_learning, learned = guidance.start_learning, []
    guidance.start_learning = lambda latents, *more: learned.append(latents) or start_learning(latents, *more)

    def encoded(rgb, *_):
        """Every third pixel, and a fourth channel: linear, so that means over frames stay such."""
        return rgb[:, ::3, ::3, [0, 1, 2, 0]].movedim(-1, 0)[None]

    def pull(guidance, rgb):
        guidance.prior.encode = encoded
        out = guidance(images_of(rgb), embeddings(), cameras([0.0] * 4, group_size=4), context())
        return torch.autograd.grad(out.losses[guidance.losses[0]], rgb)[0]

    moving = images(4)
    still = moving.detach()[:1].repeat_interleave(4, 0).requires_grad_()
    wanted = pull(without, moving).diff(dim=0)
    close = {"rtol": 1e-3, "atol": 1e-3 * wanted.abs().max().item()}
    torch.testing.assert_close(pull(guidance, moving).diff(dim=0), wanted, **close)
    torch.testing.assert_close(pull(guidance, still), torch.zeros_like(still), **close)
    assert all(torch.equal(latents, encoded(still)) for latents in learned)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "zeroscope-guidance",
            {"apg_norm_bound": 1.0},
            "guidance_mode=cfg has no bound; set guidance_mode=apg",
        ),
        ("stable-diffusion-guidance", {"still_source": True}, "still_source=true needs a prior for clips"),
        (
            "multiview-diffusion-guidance",
            {"recon_pixels": True, "recon_loss": False},
            "recon_pixels=true needs recon_loss=true",
        ),
        ("wan+reconstruction", {"recon_pixels": True}, "this prior decodes no whole clips"),
        (
            "zeroscope+reconstruction",
            {"recon_pixels": True, "gradient": "subset", "low_ram_vae": 2},
            "recon_pixels=true learns from all frames; set gradient=exact",
        ),
        ("wan-guidance", {"still_guidance_scale": 2.0}, "nothing is held still; set still_source=true"),
        (
            "zeroscope+vsd",
            {"still_source": True, "still_guidance_scale": 2.0},
            "the LoRA sees the clip held still; set guidance_scale_lora",
        ),
        (
            "wan-guidance",
            {"min_step_percent": [0, 0.9, 0.2, 100], "max_step_percent": [0, 0.98, 0.25, 100, "sqrt"]},
            r"is 0\.\d+ at step \d, where the most is 0\.8\d",
        ),
        *(
            (f"{prior}-guidance", {"min_step_percent": 0, **most}, rf"the most noise is 0 at step {step}, ")
            for prior in ("wan", "ltx", "sd3")
            for most, step in (
                ({"max_step_percent": 0}, 0),
                ({"max_step_percent": [0, 0.98, 0.0, 100]}, 100),
                ({"max_step_percent_annealed": 0, "anneal_start_step": 7}, 8),
            )
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(name, given, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(find(name, Guidance).Config, given)
