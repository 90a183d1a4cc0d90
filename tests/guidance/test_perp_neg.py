"""Negative views in a guidance: one network call, each score by its perpendicular part."""

from __future__ import annotations

import pytest
import torch

from fourdfy.ops.diffusion import classifier_free_guidance, lead_away, x0_from_prediction
from fourdfy.prompts.views import for_views
from fourdfy.types import PerpNegDecays
from tests.guidance.networks import TEXT, context, generator, images, make_any
from tests.guidance.reference import cameras, embeddings
from tests.renders import images_of

DECAYS = PerpNegDecays(
    fs=(4.0, 0.5, -2.426), sf=(4.0, 0.5, -2.426), fsb=(1.0, 0.5, 0.967), sb=(1.0, 0.5, -0.606)
)
PERP_NEG = embeddings(perp_neg=DECAYS)


@pytest.mark.parametrize("kind", ["sds", "sds_of_v_prediction", "vsd", "two_videos", "multi_view"])
def test_negative_views_are_asked_for_in_the_same_call(tiny, kind):
    """The guided x_0 is the definition, from calls of the network for one text each."""
    guidance = make_any(tiny, kind, view_dependent_prompting=True)
    views = cameras([0.0, 60.0, 135.0, 180.0])
    texts = for_views(PERP_NEG, views, True)
    shape = (4, 4, 2, 8, 8) if kind == "two_videos" else (4, 4, 8, 8)
    noisy, timesteps = torch.randn(shape, generator=generator()), torch.full((4,), 400)
    texts = guidance.prior.condition(texts, views)
    assert (texts.cameras is not None) == (kind == "multi_view")
    guided, text_alone = guidance.prior.guided_x0(noisy, timesteps, texts, 3.0)

    network, schedule = guidance.prior.denoiser
    scales = schedule.scales(timesteps, noisy.ndim)

    @torch.no_grad()
    def alone(embeddings):
        prediction = guidance.prior.predict(network, noisy, timesteps, embeddings, texts.cameras)
        return x0_from_prediction(prediction, noisy, scales, schedule.prediction)

    text, uncond, *negatives = (alone(s) for s in (texts.text, texts.uncond, *texts.negatives))
    wanted = classifier_free_guidance(lead_away(text, uncond, negatives, texts.weights), uncond, 3.0)
    torch.testing.assert_close(guided, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(text_alone, text, rtol=1e-3, atol=1e-4)
    plain = classifier_free_guidance(text, uncond, 3.0)
    assert ((guided - plain).flatten(1).norm(dim=1) > 1e-2).all()


@pytest.mark.parametrize("kind", ["sds", "vsd", "two_videos"])
def test_perp_neg_changes_the_loss_of_a_guidance(tiny, kind):
    guidance = make_any(tiny, kind)
    rgb = images(4)
    views = cameras([0.0, 60.0, 135.0, 180.0], group_size=2 if kind == "two_videos" else 1)
    plain, negative = (guidance(images_of(rgb), text, views, context(10)).losses for text in (TEXT, PERP_NEG))
    name = next(iter(plain))
    assert torch.isfinite(negative[name]) and not torch.isclose(plain[name], negative[name])
