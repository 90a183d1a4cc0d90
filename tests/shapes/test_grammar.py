"""The prompts of the shapes world."""

import pytest
import yaml

from fourdfy.shapes.grammar import (
    COLOURS,
    MOTIONS,
    QUARTERS,
    SHAPES,
    SIXTEENTHS,
    all_prompts,
    check_text,
    is_held_out,
    parse_prompt,
)
from tests.commands import CONFIGS


def test_every_prompt_is_parsed_from_its_own_text():
    assert [parse_prompt(prompt.text) for prompt in all_prompts()] == list(all_prompts())


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
    known = [prompt for prompt in all_prompts() if not is_held_out(prompt)]
    assert len(all_prompts()) - len(known) == 30
    assert {(p.colour, p.shape) for p in known} == {(c, s) for c in COLOURS for s in SHAPES}
    assert {(p.colour, p.motion) for p in known} == {(c, m) for c in COLOURS for m in MOTIONS}
    assert {(p.shape, p.motion) for p in known} == {(s, m) for s in SHAPES for m in MOTIONS}


def test_the_flow_transformer_says_that_it_knows_no_creatures():
    check_text("a red cube spinning, in the last quarter, front view")
    with pytest.raises(ValueError, match="'panda' is no solid, and the flow transformer knows no creatures"):
        check_text("a panda dancing")
    with pytest.raises(ValueError, match="did you mean 'in the first quarter'"):
        check_text("a red cube spinning, in the first sixteenth")


def test_the_recipes_name_every_part_of_the_clip_in_order():
    for name, prompts, parts, count in (
        ("shapes_stage_3", "prompt_processor", SIXTEENTHS, 16),
        ("shapes_stage_3_wan", "prompt_processor_video", QUARTERS, 4),
    ):
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        assert tuple(config["system"][prompts]["moments"]) == parts and len(parts) == count
