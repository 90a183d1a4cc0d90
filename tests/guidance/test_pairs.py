"""Any prior with any distillation."""

import pytest
import torch

from fourdfy.config import ConfigError, parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.registry import find, names
from tests.guidance.networks import make, run

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


def test_a_motion_that_is_amplified_is_amplified_in_every_distillation(tiny):
    gradients = []
    for scale in (1.0, 0.0):
        guidance = make("zeroscope+reconstruction", tiny["zeroscope"], motion_amp_scale=scale, **SIZE)
        latents = torch.zeros(1, 4, 3, 8, 8)
        guidance.prior.encode = lambda *_, latents=latents: latents.requires_grad_()
        out = run(guidance)[1]
        gradients.append(torch.autograd.grad(out.losses["sds_video"], latents)[0])
    whole, still = gradients
    torch.testing.assert_close(still, whole.mean(dim=2, keepdim=True).expand_as(whole), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, still)


def test_the_guidances_with_names_of_their_own_are_pairs():
    assert [name for name in names(Guidance) if "+" not in name] == [
        "multiview-diffusion-guidance",
        "stable-diffusion-guidance",
        "stable-diffusion-vsd-guidance",
        "videocrafter-guidance",
        "zeroscope-guidance",
    ]
    named, typed = (find(n, Guidance) for n in ("videocrafter-guidance", "videocrafter+sds"))
    assert vars(named.Config()) == vars(typed.Config())
    assert find("videocrafter+sds", Guidance) is typed
    vsd = find("stable-diffusion-vsd-guidance", Guidance).Config()
    assert vsd.pretrained_model_name_or_path_lora == "stabilityai/stable-diffusion-2-1"
    assert find("stable-diffusion+vsd", Guidance).Config().pretrained_model_name_or_path_lora is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zerscope+sds", "no Prior is registered as 'zerscope'; did you mean 'zeroscope'"),
        ("zeroscope+vsdd", "no Distillation is registered as 'vsdd'; did you mean 'vsd'"),
        ("zeroscope", "'zeroscope' is a ZeroScope, not a Guidance"),
        ("vsd", "'vsd' is a VariationalScoreDistillation, not a Guidance"),
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
