"""The flow-matching prior of docs/plugins/flow_prior.py, with every distillation."""

import pytest
import torch

from fourdfy.config import parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.launching.experiment import load_experiment
from fourdfy.registry import find, import_plugins
from tests.commands import CONFIGS, ROOT, TINY
from tests.guidance.networks import context, images
from tests.guidance.reference import CPU, cameras, embeddings
from tests.renders import images_of

import_plugins(["flow_prior"], [ROOT / "docs" / "plugins"])
STRIDE, PATCH = 2, 4
TEXT = embeddings()
VIEWS = cameras([90.0] * 4 + [0.0] * 4, group_size=4)
"""Two clips: from the side, and from the front."""


def make(distillation: str, **config):
    cls = find(f"one-colour+{distillation}", Guidance)
    return cls(
        parse_config(cls.Config, {"min_step_percent": 0.4, "max_step_percent": 0.4} | config), device=CPU
    )


def run(guidance):
    rgb = images(8)
    return rgb, guidance(images_of(rgb), TEXT, VIEWS, context())


def modes(text=TEXT.text_directions[0, [0, 1]]):
    """The colour that each clip's text means."""
    return text.mean(dim=(1, 2)).reshape(2, 1, 1, 1, 1)


def gradient_of_images(gradient):
    """Of the pooling, transposed."""
    for axis, size in ((2, STRIDE), (3, PATCH), (4, PATCH)):
        gradient = gradient.repeat_interleave(size, dim=axis) / size
    return gradient.movedim(2, 1).flatten(0, 1).movedim(1, -1)


@pytest.mark.parametrize("scale", [0.0, 1.5])
@pytest.mark.parametrize("gain", [1.0, -2.0])
def test_sds_pulls_clips_to_the_colour_of_the_text(scale, gain):
    """w(t) a / s (z - x0) of a flow: (1 - t) t (z - m), averaged over two clips."""
    guidance = make("sds", guidance_scale=scale, gain=gain)
    rgb, out = run(guidance)
    assert out.metrics["min_step"] == out.metrics["max_step"] == 0.4
    latents = guidance.prior.encode(rgb, 4, None)
    assert latents.shape == (2, 3, 2, 6, 6), "fewer latents than frames"
    uncond = TEXT.uncond.mean()
    wanted = 0.6 * 0.4 * (latents - uncond - (scale + 1) * (modes() - uncond)) / 2
    (given,) = torch.autograd.grad(out.losses["sds_video"], rgb)
    torch.testing.assert_close(given, gain * gradient_of_images(wanted.detach()), rtol=1e-4, atol=1e-7)


def test_reconstruction_pulls_clips_all_the_way():
    guidance = make("reconstruction", guidance_scale=3.0, recon_std_rescale=0.0)
    rgb, out = run(guidance)
    uncond = TEXT.uncond.mean()
    target = uncond + 3 * (modes() - uncond)
    wanted = (guidance.prior.encode(rgb, 4, None) - target) / 2
    (given,) = torch.autograd.grad(out.losses["sds_video"], rgb)
    torch.testing.assert_close(given, gradient_of_images(wanted.detach()), rtol=1e-4, atol=1e-7)


def test_vsd_compares_with_an_adapter_that_is_told_the_camera_of_each_clip():
    guidance = make("vsd", guidance_scale=1.0)
    rgb, out = run(guidance)
    # The adapter begins as the network itself, which is asked without words for the view.
    step = 0.6 * 0.4 * (modes(TEXT.text.expand(2, -1, -1)) - modes()).expand(2, 3, 2, 6, 6) / 2
    (given,) = torch.autograd.grad(out.losses["vsd"], rgb)
    torch.testing.assert_close(given, gradient_of_images(step), rtol=1e-4, atol=1e-6)
    for _ in range(2):  # A and the cameras learn once B is not zero
        run(guidance)[1].losses["lora"].backward()
        with torch.no_grad():
            guidance.lora.rest.lora_B.weight.sub_(guidance.lora.rest.lora_B.weight.grad)
    assert all(parameter.grad.any() for parameter in guidance.parameters())
    asked = (torch.zeros(2, 3, 2, 6, 6), torch.full((2,), 0.5), torch.zeros(2, 1, 1))
    here, there = (
        guidance.predict_renderings(*asked, camera) for camera in (torch.zeros(2, 16), torch.ones(2, 16))
    )
    assert not torch.equal(here, there)
    assert torch.equal(
        guidance.prior.predict(guidance.prior.denoiser.network, *asked), torch.zeros(2, 3, 2, 6, 6)
    )


@pytest.mark.parametrize("distillation", ["sds", "reconstruction", "vsd"])
def test_a_recipe_trains_with_it(distillation):
    video = ["data.prob_multi_view=0", "data.single_view.prob_single_view_video=1"]
    given = [f"system.guidance_type_video=one-colour+{distillation}", "system.loss.lambda_vsd=1.0"]
    this = load_experiment([CONFIGS / "shapes_stage_3.yaml"], [*TINY, *video, *given])
    system = this.build_system()
    system.prepare(CPU, resumed=False)
    assert system.training_step(this.build_data().batch(0)).loss.isfinite()
