"""Prompts for LTX-Video, against its own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import LTXPipeline
from transformers import T5EncoderModel, T5Tokenizer

from fourdfy.config import parse_config
from fourdfy.prompts.base import PromptProcessor
from fourdfy.registry import find
from tests.tiny_models import TEXT_WIDTH
from tests.tiny_transformers import save_ltx


@pytest.fixture
def processor(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURDFY_CACHE", str(tmp_path / "cache"))
    cls = find("ltx-prompt-processor", PromptProcessor)
    given = {
        "prompt": "a panda dancing",
        "pretrained_model_name_or_path": str(save_ltx(tmp_path / "ltx")),
    }
    return cls(parse_config(cls.Config, given))


def test_embeddings_are_those_of_the_pipeline_and_zeros_where_its_mask_is(processor):
    folder = processor.cfg.pretrained_model_name_or_path
    pipeline = LTXPipeline(
        tokenizer=T5Tokenizer.from_pretrained(f"{folder}/tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(f"{folder}/text_encoder").eval(),
        transformer=None,
        vae=None,
        scheduler=None,
    )
    with torch.no_grad():
        wanted, mask, uncond, uncond_mask = pipeline.encode_prompt(
            "a panda dancing", processor.cfg.negative_prompt
        )
    given = processor.embeddings("cpu")
    assert given.text.shape == (1, 128, TEXT_WIDTH) and 0 < mask.sum() < 128
    for ours, theirs, seen in ((given.text, wanted, mask), (given.uncond[None], uncond, uncond_mask)):
        torch.testing.assert_close(ours, theirs * seen[..., None], rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.any(dim=-1), seen)
    # T5 sees the padding: without it, the text's own states are others.
    ids = pipeline.tokenizer("a panda dancing", return_tensors="pt").input_ids
    alone = pipeline.text_encoder(ids).last_hidden_state.detach()
    assert (alone - given.text[:, : ids.shape[1]]).abs().max() > 1e-3


def test_the_negative_prompt_is_the_authors_own(processor):
    assert processor.cfg.negative_prompt == "worst quality, inconsistent motion, blurry, jittery, distorted"


def test_a_text_that_would_be_cut_is_refused(processor):
    with pytest.raises(ValueError, match="the text encoder reads 128; shorten it"):
        processor.check_length(["panda dancing " * 60], Path(processor.cfg.pretrained_model_name_or_path))
