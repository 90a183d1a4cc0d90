"""Solids and creatures are one world."""

import pytest
import torch

from fourdfy.shapes import creature_prompts, grammar, prompts, world
from fourdfy.shapes.creature_prompts import all_creature_prompts
from fourdfy.shapes.grammar import all_prompts
from fourdfy.shapes.world import BACKGROUNDS, orbit

GREY = torch.tensor(BACKGROUNDS[0])


def test_every_prompt_has_its_text_and_its_own_code():
    every = prompts.every_prompt()
    assert [prompts.parse(prompt.text) for prompt in every] == list(every)
    assert len(prompts.encode(every).unique(dim=0)) == len(every) == len({prompt.text for prompt in every})
    assert every[: len(all_prompts())] == all_prompts()
    held_out = (
        *map(grammar.is_held_out, all_prompts()),
        *map(creature_prompts.is_held_out, all_creature_prompts()),
    )
    assert tuple(map(prompts.is_held_out, every)) == held_out


@pytest.mark.parametrize(
    "text", ["a red cube spinning, in the last sixteenth, front view", "a panda dancing, side view", ""]
)
def test_texts_of_both_kinds_are_known(text):
    prompts.check_text(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a cat dancing", "'cat' is no creature"),
        ("a pandda spinning", "'pandda' is no creature"),
        ("a red zebra spinning", "'zebra' is no shape"),
        ("a red cube", "too short"),
    ],
)
def test_a_word_of_no_grammar_is_answered_with_both(text, said):
    with pytest.raises(ValueError, match=said) as error:
        prompts.parse(text)
    assert "CREATURE GESTURE" in str(error.value) and "SHAPE MOTION" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "a red cube dancing",
        "a panda pulsing",
        "a panda dancing, at noon",
        "a panda dancing, in the first quarter",
    ],
)
def test_motions_of_one_kind_are_not_the_others(text):
    with pytest.raises(ValueError, match="did you mean"):
        prompts.check_text(text)


def test_a_mixed_batch_is_rendered_as_each_kind_alone():
    some = [prompts.parse(text) for text in ("a red cube spinning", "a dog walking", "a blue ball bouncing")]
    azimuth, times = torch.tensor([0.0, 40.0, 80.0]), torch.tensor([0.1, 0.2, 0.3])
    cameras = orbit(torch.full((3,), 10.0), azimuth, times, 16)
    rgb, opacity = prompts.render_codes(prompts.encode(some), cameras, GREY)
    for k in (0, 2):
        solid, alpha = world.render([some[k]], cameras[k : k + 1], GREY)
        assert torch.equal(rgb[k], solid[0]) and torch.equal(opacity[k], alpha[0])
    dog = prompts.render_codes(prompts.encode(some[1:2]), cameras[1:2], GREY)[0]
    assert torch.allclose(rgb[1], dog[0], atol=1e-4) and 0.02 < opacity[1].mean() < 0.3
