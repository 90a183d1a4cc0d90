"""Prompt texts, directions, the library, and the cache of embeddings."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from fourdfy.config import ConfigError, parse_config
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.prompts import base
from fourdfy.prompts.base import PromptProcessor
from fourdfy.prompts.library import resolve_prompt
from fourdfy.prompts.views import DIRECTIONS, for_views
from fourdfy.registry import find
from tests.tiny_models import MAX_TOKENS, TEXT_WIDTH, save_clip_text

NAMES = (
    "stable-diffusion-prompt-processor",
    "zeroscope-prompt-processor",
    "videocrafter-prompt-processor",
)


def make(name: str = NAMES[0], **config) -> PromptProcessor:
    cls = find(name, PromptProcessor)
    return cls(parse_config(cls.Config, {"prompt": "a red cube spinning"} | config))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    save_clip_text(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURDFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text_embeddings"


@pytest.fixture
def loads(monkeypatch) -> list:
    """The folders whose text encoder was loaded."""
    seen = []
    cls = find(NAMES[0], PromptProcessor)
    inner = cls.load_encoder
    monkeypatch.setattr(cls, "load_encoder", lambda self, *args: seen.append(args[0]) or inner(self, *args))
    return seen


def cameras(elevation, azimuth, times=None):
    return orbit_cameras(
        elevation,
        azimuth,
        distance=3.0,
        fovy_deg=40.0,
        times=torch.zeros_like(azimuth) if times is None else times,
        height=1,
        width=1,
    )


def test_each_view_has_its_words_behind_the_moments():
    processor = make(moments=["at the start"])
    assert processor.direction_texts(*processor.prompts) == [
        "a red cube spinning, at the start, side view",
        "a red cube spinning, at the start, front view",
        "a red cube spinning, at the start, back view",
        "a red cube spinning, at the start, overhead view",
    ]


def test_the_view_may_stand_in_front():
    assert make(view_dependent_prompt_front=True).direction_texts("a red cube spinning") == [
        "side view of a red cube spinning",
        "front view of a red cube spinning",
        "backside view of a red cube spinning",
        "overhead view of a red cube spinning",
    ]


@pytest.mark.parametrize("index", range(4))
def test_a_view_may_have_a_text_of_its_own(index, model):
    view = DIRECTIONS[index]
    processor = make(pretrained_model_name_or_path=str(model), moments=["at the start", "at the end"])
    changed = make(
        pretrained_model_name_or_path=str(model),
        moments=["at the start", "at the end"],
        **{f"prompt_{view}": "the tail of a fox"},
    )
    for prompt in processor.prompts:
        texts = processor.direction_texts(prompt)
        texts[index] = "the tail of a fox"
        assert changed.direction_texts(prompt) == texts
    given, plain = changed.embeddings("cpu"), processor.embeddings("cpu")
    own = processor.load_encoder(model, torch.device("cpu"))(["the tail of a fox"]).detach()
    torch.testing.assert_close(given.text_directions[:, index], own.expand(2, -1, -1))
    others = [i for i in range(4) if i != index]
    assert torch.equal(given.text_directions[:, others], plain.text_directions[:, others])
    assert torch.equal(given.text, plain.text)


def test_a_library_prompt_is_found_by_its_words():
    assert make(prompt="lib:panda_dancing").prompts == ["a panda dancing"]
    assert make(prompt="lib:panda", moments=["at the start"]).prompts == ["a panda dancing, at the start"]


def test_an_ambiguous_or_unknown_library_prompt_lists_the_candidates():
    with pytest.raises(ValueError, match="several") as error:
        resolve_prompt("lib:a_playing")
    assert "a fox playing a wooden flute" in str(error.value)
    assert "a drummer playing a small drum" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="library, which is not threestudio's; the nearest") as error:
        make(prompt="lib:panda_sleeping")
    assert "a panda dancing" in str(error.value)
    with pytest.raises(ValueError, match="the nearest") as error:
        resolve_prompt("lib:pandas_dancng")  # no word of it is in the library
    assert "a panda dancing" in str(error.value)
    assert "a drummer playing a small drum" not in str(error.value)


def test_a_prompt_must_be_given():
    with pytest.raises(ConfigError, match="prompt: missing"):
        parse_config(find(NAMES[0], PromptProcessor).Config, {})


def test_the_prompt_without_its_motion_has_views_and_moments_too(model, loads):
    config = {"pretrained_model_name_or_path": str(model), "moments": ["early", "late"]}
    still = make(prompt_still="a red cube standing still", prompt_front="a red front", **config)
    given, alone = still.embeddings("cpu"), make(prompt="a red cube standing still", **config)
    wanted = alone.embeddings("cpu")
    assert len(loads) == 1, "encoded with the others"
    assert torch.equal(given.still.text, wanted.text)
    assert torch.equal(given.still.text_directions, wanted.text_directions), (
        "no text of the prompt's own views"
    )
    assert torch.equal(given.still.uncond, given.uncond)
    assert given.to("meta").still.text.is_meta
    assert wanted.still is None
    with pytest.raises(ConfigError, match="fits no prompt"):
        make(prompt_still="lib:qqqq")


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_which_model_it_needs(name):
    (needed,) = make(name, pretrained_model_name_or_path="a").cfg.models()
    assert needed == ("a", ("tokenizer", "text_encoder"))


def test_default_thresholds_are_the_original_ones():
    cfg = make().cfg
    assert (cfg.front_threshold, cfg.back_threshold, cfg.overhead_threshold) == (45, 45, 60)


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_the_encoders_last_states_of_every_text(name, model):
    processor = make(name, pretrained_model_name_or_path=str(model), negative_prompt="ugly")
    given = processor.embeddings("cpu")
    encode = processor.load_encoder(model, torch.device("cpu"))
    (prompt,) = processor.prompts
    wanted = encode([prompt, "ugly", *processor.direction_texts(prompt)]).detach()
    assert wanted.shape == (6, MAX_TOKENS, TEXT_WIDTH)
    torch.testing.assert_close(given.text[0], wanted[0])
    torch.testing.assert_close(given.uncond, wanted[1])
    torch.testing.assert_close(given.text_directions[0], wanted[2:])
    assert not any(tensor.requires_grad for tensor in (given.text, given.text_directions))


def test_views_choose_their_texts_by_strict_thresholds(model):
    processor = make(pretrained_model_name_or_path=str(model), front_threshold=30.0, back_threshold=20.0)
    given = processor.embeddings("cpu")
    azimuth = torch.tensor([0.0, 29.9, 30.0, 160.0, 160.1, -180.0, 330.1, 90.0, 0.0])
    elevation = torch.tensor([0.0] * 7 + [60.1] * 2)
    views = cameras(elevation, azimuth)
    text, uncond, *_ = for_views(given, views, view_dependent=True)
    expected = [1, 1, 0, 0, 2, 2, 1, 3, 3]
    assert torch.equal(text, given.text_directions[0, expected])
    assert all(torch.equal(embedding, given.uncond) for embedding in uncond)
    plain = for_views(given, views, view_dependent=False)
    assert all(torch.equal(embedding, given.text[0]) for embedding in plain.text)


def test_moments_are_equal_parts_of_the_scenes_time(model):
    quarters = [f"in the {nth} quarter" for nth in ("first", "second", "third", "last")]
    given = make(pretrained_model_name_or_path=str(model), moments=quarters).embeddings("cpu")
    times = torch.tensor([0.0, 0.24, 0.25, 0.5, 0.99, 1.0])
    views = cameras(torch.zeros(6), torch.zeros(6), times)
    index = [0, 0, 1, 2, 3, 3]
    assert torch.equal(for_views(given, views, view_dependent=False).text, given.text[index])
    assert torch.equal(for_views(given, views, view_dependent=True).text, given.text_directions[index, 1])
    assert not torch.equal(given.text[0], given.text[1])


@pytest.mark.parametrize(
    ("between", "before", "after", "share"),
    [
        ("linear", [0, 0, 0, 1, 3, 3], [0, 1, 1, 2, 3, 3], [0.5, 0, 0.5, 0.4, 0, 0.5]),
        ("loop", [3, 0, 0, 1, 3, 3], [0, 1, 1, 2, 0, 0], [0.5, 0, 0.5, 0.4, 0, 0.5]),
    ],
)
def test_between_two_moments_their_embeddings_are_mixed(model, between, before, after, share):
    quarters = [f"in the {nth} quarter" for nth in ("first", "second", "third", "last")]
    processor = make(pretrained_model_name_or_path=str(model), moments=quarters, moments_between=between)
    given = processor.embeddings("cpu")
    times = torch.tensor([0.0, 0.125, 0.25, 0.475, 0.875, 1.0])
    views = cameras(torch.zeros(6), torch.zeros(6), times)
    weight = torch.tensor(share)[:, None, None]
    for dependent, texts in ((False, given.text), (True, given.text_directions[:, 1])):
        mixed = (1 - weight) * texts[before] + weight * texts[after]
        torch.testing.assert_close(for_views(given, views, view_dependent=dependent).text, mixed)


@pytest.mark.parametrize("moments", [[], ["at the start"]])
def test_fewer_than_two_moments_have_nothing_between_them(moments):
    with pytest.raises(
        ValueError, match=r"^moments_between=loop: moments has \d entries, .* set moments_between=step"
    ):
        make(moments=moments, moments_between="loop")


def test_a_cache_hit_does_not_load_the_encoder(model, loads):
    first = make(pretrained_model_name_or_path=str(model)).embeddings("cpu")
    again = make(pretrained_model_name_or_path=str(model)).embeddings("cpu")
    assert len(loads) == 1
    assert torch.equal(first.text_directions, again.text_directions)
    make(pretrained_model_name_or_path=str(model), use_cache=False).embeddings("cpu")
    assert len(loads) == 2


def test_another_prompt_shares_what_it_can(model, loads):
    make(pretrained_model_name_or_path=str(model)).embeddings("cpu")
    given = make(pretrained_model_name_or_path=str(model), prompt="a blue ball").embeddings("cpu")
    fresh = make(pretrained_model_name_or_path=str(model), prompt="a blue ball", use_cache=False)
    torch.testing.assert_close(given.text, fresh.embeddings("cpu").text)
    torch.testing.assert_close(given.uncond, fresh.embeddings("cpu").uncond)


def test_a_retrained_model_in_the_same_folder_is_not_taken_for_the_old_one(model, loads, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    old = make(pretrained_model_name_or_path=str(folder)).embeddings("cpu")
    torch.manual_seed(1)
    save_clip_text(folder)
    os.utime(folder / "text_encoder" / "model.safetensors", (1, 1))
    new = make(pretrained_model_name_or_path=str(folder)).embeddings("cpu")
    assert len(loads) == 2
    assert not torch.equal(old.text, new.text)


@pytest.mark.parametrize("content", [b"", b"not a tensor", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_corrupt_entry_is_computed_again(model, loads, cache, content):
    first = make(pretrained_model_name_or_path=str(model)).embeddings("cpu")
    for file in cache.iterdir():
        file.write_bytes(content)
    again = make(pretrained_model_name_or_path=str(model)).embeddings("cpu")
    assert torch.equal(first.text, again.text)
    make(pretrained_model_name_or_path=str(model)).embeddings("cpu")
    assert len(loads) == 2, "the corrupt entries were replaced"


def test_an_entry_of_another_text_is_not_taken(model, loads, cache):
    first = make(pretrained_model_name_or_path=str(model)).embeddings("cpu")
    entries = sorted(cache.iterdir())
    for file, other in zip(entries, entries[1:] + entries[:1], strict=True):
        (file.with_suffix(".moved")).write_bytes(other.read_bytes())
    for file in entries:
        file.with_suffix(".moved").replace(file)
    again = make(pretrained_model_name_or_path=str(model)).embeddings("cpu")
    assert torch.equal(first.text_directions, again.text_directions)


def test_nothing_unfinished_stays_in_the_cache(model, cache):
    make(pretrained_model_name_or_path=str(model)).embeddings("cpu")
    assert {file.suffix for file in cache.iterdir()} == {".safetensors"}


def test_without_a_writable_cache_it_still_works(model, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOURDFY_CACHE", str(tmp_path / "file"))
    assert make(pretrained_model_name_or_path=str(model)).embeddings("cpu").text.any()


def test_the_default_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FOURDFY_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert base.cache_folder() == tmp_path / ".cache" / "fourdfy" / "text_embeddings"


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_is_too_long_shows_where_it_would_be_cut(name, model):
    long = "a panda dancing and " * 25 + "a blue whale"
    with pytest.raises(ValueError, match=rf"the text encoder reads {MAX_TOKENS}") as error:
        make(name, pretrained_model_name_or_path=str(model), prompt=long).embeddings("cpu")
    kept, cut = str(error.value).split(">>>")
    assert "a panda dancing and" in kept
    assert "blue whale" in cut and "blue whale" not in kept


def test_a_prompt_that_is_too_long_is_refused_before_any_weights_are_read(model, loads):
    long = "a panda dancing and " * 25
    with pytest.raises(ValueError, match=rf"the text encoder reads {MAX_TOKENS}"):
        make(pretrained_model_name_or_path=str(model), prompt=long).check_texts()
    make(pretrained_model_name_or_path=str(model)).check_texts()
    make(pretrained_model_name_or_path="nobody/is-here", prompt=long).check_texts()
    assert not loads


@pytest.mark.parametrize("length", ["long", 0, None])
def test_a_model_that_does_not_say_how_much_it_reads_is_refused(model, tmp_path, length):
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": length}))
    with pytest.raises(ConfigError, match="max_position_embeddings="):
        make(pretrained_model_name_or_path=str(folder)).check_texts()


SHAPES = "fourdfy/shapes-image"


@pytest.mark.parametrize(
    ("config", "word", "near"),
    [
        ({"prompt": "a crimson cube bouncing"}, "'crimson' is no colour", "orange"),
        ({"prompt": "a red cubes bouncing"}, "'cubes' is no shape", "cube"),
        ({"prompt": "a red cube bounce"}, "'bounce' is no motion", "bouncing"),
        ({"moments": ["at the beginning"]}, "'at the beginning' is no moment or view", "at the start"),
        ({"prompt_front": "a red cub spinning, front view"}, "'cub' is no shape", "cube"),
        ({"prompt": "a cube"}, "'a cube' is too short", "COLOUR"),
    ],
)
def test_a_text_that_a_shapes_model_has_not_learned_is_warned_of_once(caplog, config, word, near):
    base._warn_once.cache_clear()
    for model in (SHAPES, "fourdfy/shapes-4view"):
        make(pretrained_model_name_or_path=model, **config).check_texts()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert word in warnings[0] and near in warnings[0]


def test_a_prompt_of_the_grammar_and_other_models_prompts_cause_no_warning(caplog, model):
    base._warn_once.cache_clear()
    make(pretrained_model_name_or_path=SHAPES, moments=["at the start"]).check_texts()
    make(pretrained_model_name_or_path=str(model), prompt="a crimson cube bouncing").check_texts()
    assert not caplog.records


def test_training_warns_too(caplog):
    base._warn_once.cache_clear()
    make(pretrained_model_name_or_path=SHAPES, prompt="a crimson cube bouncing").embeddings("cpu")
    assert "'crimson' is no colour" in caplog.text


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match=r"the prompt is empty; .* --prompt TEXT"):
        make(pretrained_model_name_or_path=SHAPES, prompt=" ")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a \ud800 cube", "character 3 of a prompt is half of a surrogate pair"),
        ("x" * 100_000, "100,000 characters; expected 20,000 at most"),
    ],
)
def test_a_prompt_that_is_no_text_or_endless_is_refused_before_it_is_tokenized(prompt, said):
    with pytest.raises(ValueError, match=said):
        resolve_prompt(prompt)
