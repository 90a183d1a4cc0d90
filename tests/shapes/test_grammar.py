"""The prompts of the shapes world."""

import pytest

from fourdfy.shapes.data import NUM_TEXTS, table_texts, text_row
from fourdfy.shapes.grammar import (
    COLOURS,
    MOMENTS,
    MOTIONS,
    SHAPES,
    VIEWS,
    ShapePrompt,
    all_prompts,
    full_text,
    grammar_words,
    held_out_prompts,
    is_held_out,
    parse_prompt,
    training_prompts,
)
from fourdfy.shapes.models import NUM_TOKENS, build_tokenizer, write_tokenizer


def test_every_prompt_is_parsed_from_its_own_text():
    assert [parse_prompt(prompt.text) for prompt in all_prompts()] == list(all_prompts())


def test_full_text_has_time_before_view():
    text = full_text(ShapePrompt("orange", "cube", "spinning"), "at the start", "front view")
    assert text == "an orange cube spinning, at the start, front view"


@pytest.mark.parametrize(
    ("text", "wrong", "right"),
    [
        ("a rad cube spinning", "'rad'", "'red'"),
        ("a red cubes spinning", "'cubes'", "'cube'"),
        ("a red cube standing", "'standing'", "'standing still'"),
        ("a red", "'a red'", "COLOUR"),
    ],
)
def test_an_unknown_word_is_named_with_the_nearest_right_one(text, wrong, right):
    with pytest.raises(ValueError, match="shapes world") as error:
        parse_prompt(text)
    assert wrong in str(error.value)
    assert right in str(error.value)


def test_a_fifth_is_held_out_and_every_pair_occurs_in_training():
    assert 30 <= len(held_out_prompts()) <= 36
    assert not any(is_held_out(prompt) for prompt in training_prompts())
    known = training_prompts()
    assert {(p.colour, p.shape) for p in known} == {(c, s) for c in COLOURS for s in SHAPES}
    assert {(p.colour, p.motion) for p in known} == {(c, m) for c in COLOURS for m in MOTIONS}
    assert {(p.shape, p.motion) for p in known} == {(s, m) for s in SHAPES for m in MOTIONS}


def test_a_row_of_the_text_table_is_the_text_of_its_indices():
    import torch

    texts = list(table_texts())
    assert len(texts) == NUM_TEXTS
    row = text_row(torch.tensor(37), torch.tensor(1 + 2), torch.tensor(1 + 3))
    assert texts[int(row)] == full_text(all_prompts()[37], MOMENTS[2], VIEWS[3])


def test_each_word_is_one_token_and_files_mean_the_same_tokenizer(tmp_path):
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, subfolder="tokenizer", local_files_only=True)
    assert all(len(tokenizer(word).input_ids) == 3 for word in grammar_words())
    text = "an orange diamond standing still, in the last quarter, overhead view"
    padded = tokenizer(text, padding="max_length", truncation=True).input_ids
    assert len(padded) == NUM_TOKENS
    assert padded == build_tokenizer()(text, padding="max_length", truncation=True).input_ids
    assert tokenizer.decode(tokenizer("a zebra über 7!").input_ids, skip_special_tokens=True).startswith(
        "a z"
    )
