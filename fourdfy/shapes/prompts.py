"""All prompts of the world, solids and creatures: one list, one code and one renderer for both.

F frames. A code is (0, ``world.encode_prompts``) for a solid and (1, ``creature_prompts.encode_creatures``)
for a creature.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourdfy.shapes import creature_prompts, grammar, world
from fourdfy.shapes.creature_prompts import CreaturePrompt, all_creature_prompts, parse_creature
from fourdfy.shapes.creatures import CREATURES
from fourdfy.shapes.gestures import GESTURES
from fourdfy.shapes.grammar import MOTIONS, SHAPES, ShapePrompt, all_prompts
from fourdfy.types import Cameras

Prompt = ShapePrompt | CreaturePrompt

THINGS = (*SHAPES, *CREATURES)
MOVES = tuple(dict.fromkeys((*MOTIONS, *GESTURES)))


@lru_cache
def every_prompt() -> tuple[Prompt, ...]:
    """The solids' prompts, then the creatures'."""
    return (*all_prompts(), *all_creature_prompts())


def parse(text: str) -> Prompt:
    """The prompt that ``text`` means; case and spacing do not matter.

    Raises:
        ValueError: a word is of neither grammar; names it, the nearest right one and both grammars.
    """
    as_creature = _means_a_creature(text.lower())
    try:
        return parse_creature(text) if as_creature else grammar.parse_prompt(text)
    except ValueError as error:
        known, other = grammar.GRAMMAR, creature_prompts.GRAMMAR
        if as_creature:
            known, other = other, known
        raise ValueError(str(error).replace(known, f"{known}, and {other}")) from error


def _means_a_creature(text: str) -> bool:
    """Whether it names a creature or, without naming a shape, a gesture or something like a creature."""
    named = set(text.split())
    if named & set(CREATURES) or named & set(SHAPES):
        return bool(named & set(CREATURES))
    gesture = text.endswith(tuple(set(GESTURES) - set(MOTIONS)))
    return gesture or any(difflib.get_close_matches(word, CREATURES) for word in named)


def check_text(text: str) -> None:
    """``grammar.check_text`` for the other models, which know both kinds of prompt and finer time words."""
    prompt, *_ = text.split(", ")
    if text:
        parse(prompt)
    grammar.check_words(text, grammar.MOMENTS)


def is_held_out(prompt: Prompt) -> bool:
    """Whether the models never see this combination in training."""
    if isinstance(prompt, ShapePrompt):
        return grammar.is_held_out(prompt)
    return creature_prompts.is_held_out(prompt)


def words(prompt: Prompt) -> tuple[str | None, str, str]:
    """Its colour (None: a creature's own), its one of THINGS, its one of MOVES."""
    if isinstance(prompt, ShapePrompt):
        return prompt.colour, prompt.shape, prompt.motion
    return prompt.colour, prompt.creature, prompt.gesture


def encode(prompts: Sequence[Prompt]) -> Int[Tensor, "F 4"]:
    """The codes of prompts, for ``render_codes``."""
    codes = torch.empty(len(prompts), 4, dtype=torch.long)
    for row, prompt in zip(codes, prompts, strict=True):
        if isinstance(prompt, ShapePrompt):
            row[0], row[1:] = 0, world.encode_prompts([prompt])[0]
        else:
            row[0], row[1:] = 1, creature_prompts.encode_creatures([prompt])[0]
    return codes


def render_codes(
    codes: Int[Tensor, "F 4"],
    cameras: Cameras,
    background: Float[Tensor, "F 3"] | Float[Tensor, "3"],
    *,
    supersample: int = 2,
) -> tuple[Float[Tensor, "F H W 3"], Float[Tensor, "F H W 1"]]:
    """``world.render_codes`` for both kinds; keep the codes on the CPU."""
    background = background.to(cameras.c2w).expand(len(cameras), 3)
    solid = codes[:, 0] == 0
    if solid.all():
        return world.render_codes(codes[:, 1:], cameras, background, supersample=supersample)
    size = (len(cameras), cameras.height, cameras.width)
    rgb, opacity = cameras.c2w.new_empty(*size, 3), cameras.c2w.new_empty(*size, 1)
    for render, chosen in ((world.render_codes, solid), (creature_prompts.render_creatures, ~solid)):
        if chosen.any():
            here = chosen.nonzero()[:, 0].to(rgb.device)
            drawn = render(codes[chosen, 1:], cameras[here], background[here], supersample=supersample)
            rgb[here], opacity[here] = drawn[0], drawn[1]
    return rgb, opacity
