"""The models of today on a GPU: a step that is replayed gives what it gives as it is."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch

from fourdfy.config import parse_config
from fourdfy.guidance.base import Guidance
from fourdfy.prompts.base import PromptProcessor
from fourdfy.registry import find
from tests.guidance.networks import context, images
from tests.guidance.reference import cameras
from tests.renders import images_of
from tests.tiny_models import save_wan
from tests.tiny_transformers import save_cogvideox, save_ltx, save_sd3, save_sdxl

SAVE = {
    "wan": save_wan,
    "cogvideox": save_cogvideox,
    "cogvideox 5b": partial(save_cogvideox, rotary=True),
    "ltx": save_ltx,
    "sdxl": save_sdxl,
    "sd3": save_sd3,
}
DEVICE = torch.device("cuda")
STEPS = 4
"""The network's call is recorded in the third one."""


def gradients(kind: str, folder, replayed: bool) -> list[torch.Tensor]:
    """The frames' gradients in some steps."""
    name, _, _ = kind.partition(" ")
    cls, texts = find(f"{name}-guidance", Guidance), find(f"{name}-prompt-processor", PromptProcessor)
    given = {"pretrained_model_name_or_path": str(folder)}
    config = given | {"height": 64, "width": 64, "half_precision_weights": False}
    guidance = cls(parse_config(cls.Config, config), device=DEVICE)
    text = texts(parse_config(texts.Config, given | {"prompt": "a panda"})).embeddings(DEVICE)
    if replayed:
        guidance.accelerate(compile_small=False)
    frames = 9 if guidance.prior.is_video else 2
    group = frames if guidance.prior.is_video else 1
    views, found = cameras([0.0] * frames, group_size=group).to(DEVICE), []
    for step in range(STEPS):
        rgb = images(frames).detach().to(DEVICE).requires_grad_()
        out = guidance(images_of(rgb), text, views, context(step, seed=step))
        found += torch.autograd.grad(sum(out.losses.values()), rgb)
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", SAVE)
def test_a_replayed_step_gives_what_it_gives_as_it_is(kind, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FOURDFY_CACHE", str(tmp_path / "cache"))
    folder = SAVE[kind](tmp_path / "model")
    plain = gradients(kind, folder, replayed=False)
    with caplog.at_level(logging.WARNING, "fourdfy"):
        replayed = gradients(kind, folder, replayed=True)
    assert not caplog.records, "what can't be recorded would be said"
    for given, wanted in zip(replayed, plain, strict=True):
        # TF32 products, and sums in another order.
        torch.testing.assert_close(given, wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item())
