"""Perp-Neg's texts: mixed between views, with the front and the side as negatives."""

from __future__ import annotations

import math

import pytest
import torch

from fourdfy.config import parse_config
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.prompts.base import PromptProcessor
from fourdfy.prompts.views import for_views
from fourdfy.registry import find
from fourdfy.types import PerpNegDecays, TextEmbeddings
from tests.tiny_models import save_clip_text

DECAYS = PerpNegDecays(
    fs=(4.0, 0.5, -2.426), sf=(3.0, 0.6, -1.6), fsb=(1.0, 0.5, 0.967), sb=(1.0, 0.7, -0.49)
)
"""All different, so that none can stand for another."""


def embeddings(moments: int = 1) -> TextEmbeddings:
    generator = torch.Generator().manual_seed(0)
    return TextEmbeddings(
        text=torch.randn(moments, 5, 3, generator=generator),
        text_directions=torch.randn(moments, 4, 5, 3, generator=generator),
        uncond=torch.randn(5, 3, generator=generator),
        front_threshold=30.0,
        back_threshold=30.0,
        overhead_threshold=60.0,
        perp_neg=DECAYS,
    )


def texts_at(azimuth: float, given: TextEmbeddings, elevation: float = 0.0, time: float = 0.0):
    views = orbit_cameras(
        torch.tensor([elevation]),
        torch.tensor([azimuth]),
        distance=3.0,
        fovy_deg=40.0,
        times=torch.tensor([time]),
        height=1,
        width=1,
    )
    return for_views(given, views, view_dependent=True)


def decay(name: str, r: float) -> float:
    a, b, c = getattr(DECAYS, name)
    return a * math.exp(-b * r) + c


@pytest.mark.parametrize("azimuth", [0.0, 20.0, -65.0, 89.0, 91.0, 130.0, -170.0, 180.0, 295.0, 380.0])
def test_texts_and_weights_follow_the_azimuth(azimuth):
    given = embeddings()
    side, front, back, _ = given.text_directions[0]
    turned = abs((azimuth + 180) % 360 - 180)
    texts = texts_at(azimuth, given)
    if turned < 90:
        r = 1 - turned / 90
        wanted, weights = r * front + (1 - r) * side, (-decay("fs", r), -decay("sf", 1 - r))
    else:
        r = 2 - turned / 90
        wanted, weights = r * side + (1 - r) * back, (-decay("fsb", r), -decay("sb", r))
    torch.testing.assert_close(texts.text[0], wanted)
    assert [weight.item() for weight in texts.weights] == pytest.approx(weights, abs=1e-5)
    assert torch.equal(texts.negatives[0][0], front) and torch.equal(texts.negatives[1][0], side)
    assert torch.equal(texts.uncond[0], given.uncond)


def test_from_above_nothing_is_mixed_and_nothing_is_negative():
    given = embeddings()
    texts = texts_at(40.0, given, elevation=60.1)
    assert torch.equal(texts.text[0], given.text_directions[0, 3])
    assert [weight.item() for weight in texts.weights] == [0, 0]
    assert texts_at(40.0, given, elevation=60.0).weights[0].item() < 0


def test_each_moment_mixes_its_own_views():
    given = embeddings(moments=3)
    texts = texts_at(45.0, given, time=0.5)
    side, front = given.text_directions[1, :2]
    torch.testing.assert_close(texts.text[0], (front + side) / 2)
    assert torch.equal(texts.negatives[0][0], front) and torch.equal(texts.negatives[1][0], side)


def test_a_text_that_says_nothing_of_the_view_has_no_negatives():
    given = embeddings()
    views = orbit_cameras(
        torch.zeros(2),
        torch.zeros(2),
        distance=3.0,
        fovy_deg=40.0,
        times=torch.zeros(2),
        height=1,
        width=1,
    )
    assert for_views(given, views, view_dependent=False).negatives == ()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_clip_text(folder)
    return folder


def processor(**config) -> PromptProcessor:
    cls = find("stable-diffusion-prompt-processor", PromptProcessor)
    return cls(parse_config(cls.Config, {"prompt": "a fox", "use_cache": False} | config))


def test_the_config_gives_the_decays(model):
    given = processor(pretrained_model_name_or_path=str(model)).embeddings("cpu")
    assert given.perp_neg is None
    config = {"use_perp_neg": True, "pretrained_model_name_or_path": str(model)}
    given = processor(**config).embeddings("cpu").perp_neg
    assert given._asdict() == {
        "fs": (4.0, 0.5, -2.426),
        "sf": (4.0, 0.5, -2.426),
        "fsb": (1.0, 0.5, 0.967),
        "sb": (1.0, 0.5, -0.606),
    }
    assert processor(perp_neg_f_sb=[2, 1, 0], **config).embeddings("cpu").perp_neg.sb == (2, 1, 0)


def test_the_default_weights_let_a_view_alone_with_its_own_text(model):
    """At the front, the front is no negative, at the side, the side is none; nothing jumps between."""
    config = {"use_perp_neg": True, "pretrained_model_name_or_path": str(model)}
    given = processor(**config).embeddings("cpu")
    at = {
        azimuth: [w.item() for w in texts_at(azimuth, given).weights] for azimuth in (0.0, 89.9, 90.0, 180.0)
    }
    assert at[0.0] == pytest.approx((0, -1.574), abs=1e-3)
    assert at[90.0] == pytest.approx((-1.574, 0), abs=1e-3)
    assert at[89.9] == pytest.approx(at[90.0], abs=1e-2)
    assert at[180.0] == pytest.approx((-1.967, -0.394), abs=1e-3)
