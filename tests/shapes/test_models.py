"""What ships: how good it was measured to be, and the recipe with the flow model."""

import json

import pytest
import torch

from fourdfy.launching.experiment import load_experiment
from fourdfy.ops.diffusion import add_noise
from fourdfy.priors.hub import resolve_model
from fourdfy.priors.wan import Wan
from fourdfy.prompts.wan import WanPromptProcessor
from fourdfy.seeds import step_generator
from fourdfy.shapes.grammar import MOTIONS, ShapePrompt, is_held_out
from fourdfy.shapes.world import BACKGROUNDS, orbit, render
from fourdfy.types import StepContext
from tests.commands import CONFIGS, TINY

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("folder", "part"),
    [
        ("shapes-image", "image"),
        ("shapes-4view", "multi_view"),
        ("shapes-video", "video"),
        ("shapes-wan", "wan"),
    ],
)
def test_nineteen_of_twenty_samples_are_right(folder, part):
    file = resolve_model(f"fourdfy/{folder}") / "training.json"
    quality = json.loads(file.read_text())[part]["quality"]
    assert quality["num_prompts"] >= 96 and quality["num_held_out"] >= 30
    assert quality["shares"]["all"]["right"] >= 0.95
    if folder != "shapes-wan":
        assert quality["shares"]["creatures"]["right"] >= 0.9


@pytest.fixture(scope="module")
def flow():
    """The flow prior, and what makes embeddings for it."""
    name = "fourdfy/shapes-wan"
    settings = {"height": 64, "width": 64, "half_precision_weights": False, "low_ram_vae": 0}
    prior = Wan(Wan.Config(pretrained_model_name_or_path=name, **settings), device=CPU)
    return prior, object.__new__(WanPromptProcessor).load_encoder(resolve_model(name), CPU)


@pytest.mark.parametrize("motion", ["bouncing", "spinning"])
def test_the_flow_prior_tells_a_motion_from_the_others(flow, motion):
    """A clip's noise is best predicted with its own text, in a combination that was never trained on."""
    prior, encode_texts = flow
    prompts = [ShapePrompt("blue", "ball" if motion == "spinning" else "cube", each) for each in MOTIONS]
    own = prompts[MOTIONS.index(motion)]
    assert is_held_out(own)
    times = (torch.arange(17) + 0.5) / 17
    rgb, _ = render(
        [own] * 17, orbit(torch.full((17,), 15.0), torch.zeros(17), times), torch.tensor(BACKGROUNDS[0])
    )
    generator = torch.Generator().manual_seed(0)
    latents = prior.encode(rgb, 17, generator)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.full((len(prompts),), prior.denoiser.schedule.span(0.5, 0.5)[0])
    noisy = add_noise(latents, noise, prior.denoiser.schedule.scales(timesteps[:1], latents.ndim))
    texts = encode_texts([f"{prompt.text}, front view" for prompt in prompts])
    predicted = prior.predict(prior.denoiser.network, noisy.expand(5, -1, -1, -1, -1), timesteps, texts)
    errors = (predicted - (noise - latents)).square().mean(dim=(1, 2, 3, 4))
    assert errors.argmin() == MOTIONS.index(motion)
    assert errors.min() < 0.5 * errors.median()


def test_a_step_of_the_flow_prior_moves_the_scene():
    videos_only = ["data.prob_multi_view=0", "data.single_view.prob_single_view_video=1"]
    this = load_experiment([CONFIGS / "shapes_stage_3_wan.yaml"], [*TINY, *videos_only])
    system = this.build_system()
    system.prepare(CPU, resumed=False)
    system.scene.before_step(StepContext(0, step_generator(0, 0, "occupancy")), dynamic=True)
    out = system.training_step(this.build_data().batch(0))
    out.loss.backward()
    moving = system.scene.halves()["dynamic"]
    assert out.loss.isfinite() and all(parameter.grad.any() for parameter in moving)
