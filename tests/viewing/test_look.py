"""What is shown of a prior: decoded latents are the frames that were encoded."""

import numpy as np
import pytest
import torch

from fourdfy.files.images import side_by_side, to_pixels
from fourdfy.launching.experiment import load_experiment
from fourdfy.shapes import world
from fourdfy.shapes.grammar import parse_prompt
from fourdfy.types import Cameras, RenderOutput, StepContext
from fourdfy.viewing.look import MOST_FRAMES, Look
from tests.commands import CONFIGS

PROMPT = "a red cube bouncing"


@pytest.fixture(scope="module", params=["shapes_stage_3", "shapes_stage_3_wan"])
def plan(request):
    given = [f"system.prompt_processor.prompt={PROMPT}", "system.weights=null"]
    return load_experiment([CONFIGS / f"{request.param}.yaml"], given).plan


def frames_of(kind):
    """(true frames of a step of this kind, their cameras)."""
    count, *_ = kind.cameras.sizes()[0]
    times = torch.linspace(0, 0.9, count) if "video" in kind.name else torch.zeros(count)
    angles = torch.full((count,), 15.0), torch.linspace(0, 270, count) * ("view" in kind.name)
    cameras = world.orbit(*angles, times)
    cameras = Cameras(**{**vars(cameras), "group_size": kind.cameras.group_size})
    rgb, opacity = world.render([parse_prompt(PROMPT)] * count, cameras, torch.tensor(world.BACKGROUNDS[0]))
    return RenderOutput(comp_rgb=rgb, opacity=opacity, depth=opacity, group_size=cameras.group_size), cameras


def test_each_prior_decodes_what_it_encoded(plan):
    for kind in plan.kinds:
        prior = kind.guidance.build(device=torch.device("cpu")).prior
        frames, cameras = frames_of(kind)
        with torch.no_grad():
            latents = prior.encode(frames.comp_rgb, cameras.group_size, torch.Generator().manual_seed(0))
            decoded = prior.decode(latents, MOST_FRAMES)
        stride = 1 if not kind.guidance.is_video else max(1, len(cameras) // MOST_FRAMES)
        expected = frames.comp_rgb[::stride][: len(decoded)]
        assert 1 <= len(decoded) <= MOST_FRAMES and decoded.shape == expected.shape, kind.name
        assert (decoded - expected).abs().mean() < 0.03, kind.name


def test_the_clip_itself_is_shown_beside_its_guided_still():
    given = [f"system.prompt_processor.prompt={PROMPT}", "system.weights=null"]
    given += ["system.guidance_video.still_source=true", "system.guidance_video.still_guidance_scale=2"]
    plan = load_experiment([CONFIGS / "shapes_stage_3.yaml"], given).plan
    (kind,) = (kind for kind in plan.kinds if kind.guidance.is_video)
    guidance = kind.guidance.build(device=torch.device("cpu"))
    text = kind.prompts.build().embeddings(torch.device("cpu"))
    frames, cameras = frames_of(kind)
    seen = []
    look = Look(guidance)
    note = guidance.observer
    guidance.observer = lambda x, x0: (seen.append(x.noisy.clone()), note(x, x0))
    with torch.no_grad():
        guidance(frames, text, cameras, StepContext(0, torch.Generator().manual_seed(1)))
    assert len(seen) == 2 and not torch.equal(*seen)
    assert torch.equal(look._latents["noisy"], seen[0])


def test_a_look_changes_nothing_and_ends_when_it_is_closed(plan):
    kind = plan.kinds[-1]
    guidance = kind.guidance.build(device=torch.device("cpu"))
    text = kind.prompts.build().embeddings(torch.device("cpu"))
    frames, cameras = frames_of(kind)

    def losses():
        with torch.no_grad():
            context = StepContext(0, torch.Generator().manual_seed(1))
            return guidance(frames, text, cameras, context).losses

    before = losses()
    look = Look(guidance)
    assert not look.is_done
    assert losses() == before and look.is_done
    look.close()
    images = look.images()
    stride = max(1, len(cameras) // MOST_FRAMES)
    shown = frames.comp_rgb[::stride][:MOST_FRAMES]
    assert np.array_equal(images["frames"], side_by_side([*to_pixels(shown)]))
    assert images["x0"].shape == images["noisy"].shape and (images["x0"] != images["noisy"]).any()
    assert losses() == before and guidance.observer is None and not guidance._forward_pre_hooks
