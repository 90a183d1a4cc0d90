"""Prompts for CogVideoX, against its own pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXPipeline
from transformers import T5EncoderModel, T5Tokenizer

from fourdfy.config import parse_config
from fourdfy.priors import hub
from fourdfy.prompts.base import PromptProcessor
from fourdfy.registry import find
from tests.tiny_models import TEXT_WIDTH
from tests.tiny_transformers import save_cogvideox


def make(folder, **config) -> PromptProcessor:
    cls = find("cogvideox-prompt-processor", PromptProcessor)
    given = {"prompt": "a panda dancing", "pretrained_model_name_or_path": str(folder), "use_cache": False}
    return cls(parse_config(cls.Config, given | config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_cogvideox(tmp_path_factory.mktemp("models") / "cogvideox")


def test_embeddings_are_those_of_the_pipeline_with_all_their_padding(folder):
    """226 rows, of padding that the encoder has seen: no mask anywhere."""
    pipeline = CogVideoXPipeline(
        tokenizer=T5Tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder").eval(),
        vae=None,
        transformer=None,
        scheduler=None,
    )
    with torch.no_grad():
        wanted, uncond = pipeline.encode_prompt("a panda dancing", "ugly")
    given = make(folder, negative_prompt="ugly").embeddings("cpu")
    assert given.text.shape == (1, 226, TEXT_WIDTH)
    torch.testing.assert_close(given.text, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given.uncond, uncond[0], rtol=1e-5, atol=1e-6)
    assert given.text.any(dim=-1).all(), "padding has states of its own"


def test_a_text_that_would_be_cut_is_refused(folder):
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens, the text encoder reads 226; shorten it"):
        make(folder, prompt="panda dancing " * 120).check_texts()


def test_the_model_is_found_under_its_former_name_too(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(hub, "_in_hub_cache", lambda source, _: asked.append(source.repo))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = hub.locate_model("zai-org/CogVideoX-2b", ("vae",))
    assert found == "zai-org/CogVideoX-2b or THUDM/CogVideoX-2b (13.8 GB to be fetched)"
    assert asked == ["zai-org/CogVideoX-2b", "THUDM/CogVideoX-2b"]
