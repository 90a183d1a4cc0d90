"""Prompts for Wan, against its own pipeline."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import WanPipeline
from transformers import T5Tokenizer, UMT5EncoderModel

from fourdfy.config import parse_config
from fourdfy.priors import hub
from fourdfy.prompts import base
from fourdfy.prompts.base import PromptProcessor
from fourdfy.registry import find
from tests.tiny_models import TEXT_WIDTH, save_wan

NAME = "wan-prompt-processor"


def make(folder, **config) -> PromptProcessor:
    cls = find(NAME, PromptProcessor)
    given = {"prompt": "a panda dancing", "pretrained_model_name_or_path": str(folder)}
    return cls(parse_config(cls.Config, given | config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_wan(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURDFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text_embeddings"


def test_embeddings_are_those_of_the_pipeline_with_zeros_behind_the_text(folder):
    processor = make(folder, prompt="a  panda &amp;amp; a fox\ndancing ")
    pipeline = WanPipeline(
        tokenizer=T5Tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval(),
        vae=None,
        scheduler=None,
    )
    with torch.no_grad():
        wanted, uncond = pipeline.encode_prompt(
            processor.cfg.prompt, processor.cfg.negative_prompt, max_sequence_length=512
        )
    given = processor.embeddings("cpu")
    assert given.text.shape == (1, 512, TEXT_WIDTH)
    assert given.text_directions.shape == (1, 4, 512, TEXT_WIDTH)
    # The pipeline masks the padding, where here there is none: sums of other lengths.
    torch.testing.assert_close(given.text, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.uncond, uncond[0], rtol=1e-4, atol=1e-5)
    tokens = len(pipeline.tokenizer("a panda & a fox dancing").input_ids)
    assert given.text[0, :tokens].any(dim=-1).all() and not given.text[0, tokens:].any()


def test_the_negative_prompt_names_stillness_and_limbs_unless_another_is_given(folder):
    own = make(folder).cfg.negative_prompt
    assert all(words in own for words in ("static", "still picture", "three legs", "misshapen limbs"))
    assert make(folder, negative_prompt="").cfg.negative_prompt == ""


def test_texts_are_cached_by_model_text_and_length_and_the_encoder_is_freed(folder, cache, monkeypatch):
    loaded, freed = [], []
    inner = find(NAME, PromptProcessor).load_encoder
    free = base._free_memory
    monkeypatch.setattr(
        find(NAME, PromptProcessor),
        "load_encoder",
        lambda self, *args: loaded.append(args) or inner(self, *args),
    )
    monkeypatch.setattr(base, "_free_memory", lambda: freed.append(True) or free())
    first = make(folder).embeddings("cpu")
    again = make(folder).embeddings("cpu")
    assert len(loaded) == len(freed) == 1
    assert torch.equal(first.text_directions, again.text_directions)
    assert len(list(cache.iterdir())) == 6, "the prompt, four views, the negative prompt"
    monkeypatch.setattr(find(NAME, PromptProcessor), "max_tokens", 300)
    assert make(folder).embeddings("cpu").text.shape == (1, 300, TEXT_WIDTH)
    assert len(loaded) == 2


def test_a_text_that_would_be_cut_is_refused_before_the_encoder_is_loaded(folder):
    long = make(folder, prompt="panda dancing " * 200)
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens, the text encoder reads 512; shorten it"):
        long.check_texts()
    with pytest.raises(ValueError, match="the text encoder reads 512"):
        long.embeddings("cpu")


def test_files_that_leave_the_input_embeddings_to_be_tied_load(folder, tmp_path):
    """As the published ones do; some versions of transformers draw the embeddings at random then."""
    copy = shutil.copytree(folder, tmp_path / "model")
    file = copy / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    assert torch.equal(make(copy).embeddings("cpu").text, make(folder).embeddings("cpu").text)


def test_a_clip_text_model_in_its_place_is_named(tmp_path):
    from tests.tiny_models import save_clip_text

    save_clip_text(tmp_path)
    with pytest.raises(ValueError, match="holds a CLIPTokenizer, expected a T5Tokenizer"):
        make(tmp_path).embeddings("cpu")


def test_the_hub_says_how_much_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_in_hub_cache", lambda *_: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    name = make(tmp_path).cfg.component.Config.pretrained_model_name_or_path
    assert hub.locate_model(name, ("vae",)) == f"{name} (28.9 GB to be fetched)"
