"""Any prior with any distillation."""

import pytest
import torch

from fourdfy.config import ConfigError, parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.guidance.reconstruction import Reconstruction
from fourdfy.registry import find, names
from tests.guidance.networks import TEXT, context, images, make, run
from tests.guidance.reference import cameras, embeddings
from tests.renders import images_of
from tests.tiny_models import save_animatediff, save_wan
from tests.tiny_transformers import save_cogvideox, save_ltx

SIZE = {"height": None, "width": None}
PRIORS = {
    "stable-diffusion": ("sd", {}),
    "mvdream": ("multi_view", {}),
    "zeroscope": ("zeroscope", SIZE),
    "videocrafter": ("videocrafter", SIZE),
}


@pytest.mark.parametrize("distillation", ["sds", "reconstruction", "vsd"])
@pytest.mark.parametrize("prior", PRIORS)
def test_any_prior_is_distilled_in_any_way(tiny, prior, distillation):
    folder, config = PRIORS[prior]
    guidance = make(f"{prior}+{distillation}", tiny[folder], **config)
    rgb, out = run(guidance)
    video = "_video" if prior in ("zeroscope", "videocrafter") else ""
    assert tuple(out.losses) == guidance.losses
    assert guidance.losses == (("vsd", "lora") if distillation == "vsd" else (f"sds{video}",))
    out.losses[guidance.losses[0]].backward()
    assert rgb.grad.isfinite().all() and rgb.grad.abs().amax(dim=(1, 2, 3)).gt(0).all()
    assert all(parameter.grad is None for parameter in guidance.parameters())
    assert {name.partition(".")[0] for name in guidance.state_dict()} <= {"lora", "camera_embedding"}


@pytest.mark.parametrize(
    ("distillation", "mode"), [("sds", "apg"), ("reconstruction", "cfg_zero"), ("vsd", "apg")]
)
@pytest.mark.parametrize("prior", PRIORS)
def test_any_prior_takes_all_variants_together(tiny, prior, distillation, mode):
    folder, config = PRIORS[prior]
    video = find(f"{prior}+{distillation}", Guidance).prior_class.is_video
    variant = {"guidance_mode": mode, "correct_noise": True, "still_source": video}
    variant |= {"weighting_strategy": "flow"} if distillation == "sds" else {}
    guidance = make(f"{prior}+{distillation}", tiny[folder], **variant, **config)
    rgb, out = run(guidance)
    out.losses[guidance.losses[0]].backward()
    assert rgb.grad.isfinite().all() and rgb.grad.abs().amax(dim=(1, 2, 3)).gt(0).all()


MODERN = {
    "animatediff": (save_animatediff, 4, 77),
    "wan": (save_wan, 5, 512),
    "cogvideox": (save_cogvideox, 9, 226),
    "ltx": (save_ltx, 9, 128),
}
"""Video models of today: what makes one, frames of a clip, tokens of a text."""


@pytest.mark.parametrize("distillation", ["sds", "vsd"])
@pytest.mark.parametrize("prior", MODERN)
def test_video_models_of_today_take_all_variants_together(prior, distillation, tmp_path):
    save, frames, tokens = MODERN[prior]
    variant = {"guidance_mode": "apg", "correct_noise": True, "still_source": True, "height": 32, "width": 32}
    variant |= {"motion_adapter": str(tmp_path / "motion_adapter")} if prior == "animatediff" else {}
    guidance = make(f"{prior}+{distillation}", save(tmp_path), **variant)
    rgb, views = images(frames), cameras([0.0] * frames, group_size=frames)
    out = guidance(images_of(rgb), embeddings(tokens=tokens), views, context())
    sum(out.losses.values()).backward()
    assert rgb.grad.isfinite().all() and rgb.grad.abs().amax(dim=(1, 2, 3)).gt(0).all()
    assert all(parameter.grad.isfinite().all() for parameter in guidance.parameters())


@pytest.mark.parametrize(("prior", "each"), [("stable-diffusion", 4), ("mvdream", 1)])
def test_the_adapter_of_any_prior_learns_from_several_noise_levels(tiny, prior, each, monkeypatch):
    """Views that attend to each other share theirs."""
    guidance = make(f"{prior}+vsd", tiny[PRIORS[prior][0]], lora_n_timestamp_samples=3)
    predict, levels = guidance.predict_renderings, []

    def noted(noisy, timesteps, *others):
        if torch.is_grad_enabled():
            levels.append(timesteps.unflatten(0, (3, 4)))
        return predict(noisy, timesteps, *others)

    monkeypatch.setattr(guidance, "predict_renderings", noted)
    run(guidance)[1].losses["lora"].backward()
    (drawn,) = levels
    assert [len(row.unique()) for row in drawn] == [each] * 3 and len(drawn.unique()) == 3 * each


@pytest.mark.parametrize("prior", PRIORS)
def test_the_adapter_of_any_prior_is_told_the_camera(tiny, prior):
    folder, config = PRIORS[prior]
    guidance = make(f"{prior}+vsd", tiny[folder], lora_cfg_training=False, **config)
    run(guidance)[1].losses["lora"].backward()
    assert all(parameter.grad.any() for parameter in guidance.camera_embedding.parameters())
    assert any(p.grad is not None and p.grad.any() for p in guidance.lora.parameters())
    assert not guidance.prior.time_embedding(guidance.renderings.network)._forward_hooks, (
        "none is left behind"
    )


def test_a_second_model_is_of_the_prior_s_kind(tiny):
    with pytest.raises(ConfigError, match="holds a UNet2DConditionModel, expected a UNet3D"):
        make("zeroscope+vsd", tiny["zeroscope"], pretrained_model_name_or_path_lora=str(tiny["sd"]), **SIZE)
    two = {"pretrained_model_name_or_path": "a", "pretrained_model_name_or_path_lora": "b"}
    cfg = parse_config(find("videocrafter+vsd", Guidance).Config, two)
    assert cfg.models()[1] == ("b", ("unet", "fps_embedding", "scheduler"))


DISTILLATIONS = [("sds", {}), ("reconstruction", {}), ("reconstruction", {"recon_loss": False}), ("vsd", {})]


@pytest.mark.parametrize(("distillation", "config"), DISTILLATIONS)
def test_a_motion_that_is_amplified_is_amplified_in_every_distillation(tiny, distillation, config):
    gradients = []
    for scale in (1.0, 0.0):
        torch.manual_seed(0)  # of VSD's own layers
        guidance = make(
            f"zeroscope+{distillation}", tiny["zeroscope"], motion_amp_scale=scale, **config, **SIZE
        )
        latents = torch.zeros(1, 4, 3, 8, 8)
        guidance.prior.encode = lambda *_, latents=latents: latents.requires_grad_()
        out = run(guidance)[1]
        gradients.append(torch.autograd.grad(out.losses[guidance.losses[0]], latents)[0])
    whole, still = gradients
    wanted = whole.mean(dim=2, keepdim=True).expand_as(whole)
    torch.testing.assert_close(still, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    assert not torch.allclose(whole, still)


@pytest.mark.parametrize(("distillation", "config"), DISTILLATIONS)
def test_gradients_are_clipped_and_noise_is_drawn_as_at_the_step(tiny, distillation, config):
    """The step is 10."""
    ramps = {"grad_clip": [0, 1.0, 1e-6, 10], "max_step_percent": [0, 0.98, 0.5, 10]}
    out = run(make(f"stable-diffusion+{distillation}", tiny["sd"], **ramps, **config))[1]
    assert 0 < out.metrics["grad_norm"] <= 1e-6 * (4 * 4 * 8 * 8) ** 0.5
    assert out.metrics["max_step"] == 500


def asked(guidance) -> list:
    """What the network is asked in a step: (timesteps, text embeddings) of each call."""
    calls, predict = [], guidance.prior.predict

    def record(network, noisy, timesteps, text_embeddings, cameras=None):
        calls.append((timesteps, text_embeddings))
        return predict(network, noisy, timesteps, text_embeddings, cameras)

    guidance.prior.predict = record
    run(guidance)
    return calls


def test_latents_that_are_denoised_together_have_one_noise_level_for_the_adapter_too(tiny):
    prior, renderings, lora = asked(make("mvdream+vsd", tiny["multi_view"]))
    assert all(len(set(timesteps.tolist())) == 1 for timesteps, _ in (prior, renderings, lora))
    *_, (alone, _) = asked(make("stable-diffusion+vsd", tiny["sd"]))
    assert len(set(alone.tolist())) == 4


def test_a_prior_that_is_told_the_camera_gets_no_words_for_it(tiny):
    given = {False: TEXT.text.expand(4, -1, -1), True: TEXT.text_directions[0, [1, 0, 2, 0]]}
    for view_dependent, texts in given.items():
        guidance = make("mvdream+sds", tiny["multi_view"], view_dependent_prompting=view_dependent)
        ((_, text_embeddings),) = asked(guidance)
        assert torch.equal(text_embeddings[:4], texts)
    ((_, text_embeddings),) = asked(make("mvdream+sds", tiny["multi_view"]))
    assert torch.equal(text_embeddings[:4], given[False])


def test_the_guidances_with_names_of_their_own_are_pairs():
    assert {
        "multiview-diffusion-guidance",
        "stable-diffusion-guidance",
        "stable-diffusion-vsd-guidance",
        "videocrafter-guidance",
        "zeroscope-guidance",
    } <= {*names(Guidance)}
    named, typed = (find(n, Guidance) for n in ("videocrafter-guidance", "videocrafter+sds"))
    assert vars(named.Config()) == vars(typed.Config())
    assert find("videocrafter+sds", Guidance) is typed
    assert issubclass(find("multiview-diffusion-guidance", Guidance), Reconstruction)
    vsd = find("stable-diffusion-vsd-guidance", Guidance).Config()
    assert vsd.pretrained_model_name_or_path_lora == "stabilityai/stable-diffusion-2-1"
    assert find("stable-diffusion+vsd", Guidance).Config().pretrained_model_name_or_path_lora is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zerscope+sds", "no Prior is registered as 'zerscope'; did you mean 'zeroscope'"),
        ("zeroscope+vsdd", "no Distillation is registered as 'vsdd'; did you mean 'vsd'"),
        ("zeroscope", "'zeroscope' is a ZeroScope, not a Guidance; did you mean 'zeroscope-guidance'"),
        ("vsd", "'vsd' is a VariationalScoreDistillation, not a Guidance; .*, PRIOR\\+DISTILLATION$"),
        ("zeroscope+", r"expected PRIOR\+DISTILLATION, such as zeroscope\+sds, got 'zeroscope\+'"),
        ("+sds", r"expected PRIOR\+DISTILLATION, .* got '\+sds'"),
        ("zeroscope+sds+vsd", r"expected PRIOR\+DISTILLATION, .* got 'zeroscope\+sds\+vsd'"),
        ("zeroscope+zeroscope-guidance", "'zeroscope-guidance' has its prior"),
        ("sds+zeroscope", "'sds' is a ScoreDistillation, not a Prior"),
    ],
)
def test_a_pair_that_is_none_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find(name, Guidance)


def test_the_keys_of_a_pair_are_those_of_both_and_no_others():
    cls = find("stable-diffusion+reconstruction", Guidance)
    cfg = parse_config(cls.Config, {"recon_std_rescale": 0.1, "token_merging_params": {"ratio": 0.5}})
    assert (cfg.recon_std_rescale, cfg.guidance_scale) == (0.1, 50.0)
    with pytest.raises(ConfigError, match="lora_rank: unknown key"):
        parse_config(cls.Config, {"lora_rank": 8})
