"""The prompts of the shapes world."""

import pytest

from fourdfy.shapes.grammar import (
    COLOURS,
    MOTIONS,
    SHAPES,
    ShapePrompt,
    all_prompts,
    full_text,
    held_out_prompts,
    is_held_out,
    parse_prompt,
    training_prompts,
)


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
