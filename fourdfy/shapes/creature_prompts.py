"""The prompts of the creatures: "a panda dancing", "a red robot waving".

A creature in its own colours or in one of the world's six, and a gesture that it has limbs for. A fifth of
the combinations is never trained on. The texts go on as those of the solids do, with time and view words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourdfy.shapes.creatures import CREATURES
from fourdfy.shapes.gestures import GESTURES, allowed, bodies
from fourdfy.shapes.grammar import COLOURS, unknown_word, with_article, without_article
from fourdfy.shapes.tracing import joined_bodies, render_bodies
from fourdfy.shapes.world import COLOUR_RGB
from fourdfy.types import Cameras

GRAMMAR = (
    f"'a [COLOUR] CREATURE GESTURE' with COLOUR in {{{', '.join(COLOURS)}}} or none, "
    f"CREATURE in {{{', '.join(CREATURES)}}}, GESTURE in {{{', '.join(GESTURES)}}}"
)


@dataclass(frozen=True)
class CreaturePrompt:
    """One creature of the world; an unknown word, or a gesture without limbs for it, raises ValueError."""

    creature: str
    gesture: str
    colour: str | None = None
    """None: its own colours."""

    def __post_init__(self) -> None:
        for kind, word, known in (
            ("colour", self.colour or COLOURS[0], COLOURS),
            ("creature", self.creature, tuple(CREATURES)),
            ("gesture", self.gesture, GESTURES),
        ):
            if word not in known:
                raise ValueError(unknown_word(kind, word, known, GRAMMAR))
        if self.gesture not in allowed(self.creature):
            can = ", ".join(allowed(self.creature))
            raise ValueError(f"a {self.creature} has no limbs for {self.gesture!r}; it knows {can}")

    @property
    def text(self) -> str:
        """The prompt in words, without time or view."""
        return with_article(*([self.colour] if self.colour else []), self.creature, self.gesture)


def parse_creature(text: str) -> CreaturePrompt:
    """The prompt that ``text`` means; case and spacing do not matter.

    Raises:
        ValueError: a word is not of the grammar; names it and the nearest right one.
    """
    words = without_article(text)
    coloured = words[:1] and (words[0] in COLOURS or (words[1:2] and words[1] in CREATURES))
    colour = words.pop(0) if coloured else None
    if len(words) < 2:
        raise ValueError(f"prompt {text!r} is too short; the shapes world knows {GRAMMAR}")
    return CreaturePrompt(words[0], " ".join(words[1:]), colour)


@lru_cache
def all_creature_prompts() -> tuple[CreaturePrompt, ...]:
    """Every combination, creatures slowest, colours fastest, own colours first."""
    return tuple(
        CreaturePrompt(creature, gesture, colour)
        for creature in CREATURES
        for gesture in allowed(creature)
        for colour in (None, *COLOURS)
    )


def is_held_out(prompt: CreaturePrompt) -> bool:
    """Whether the models never see this combination in training (about a fifth).

    A Latin pattern, as for the solids: every word and every pair of words occurs in training.
    """
    colour = 0 if prompt.colour is None else 1 + COLOURS.index(prompt.colour)
    creature, gesture = [*CREATURES].index(prompt.creature), GESTURES.index(prompt.gesture)
    return (colour + 2 * creature + 3 * gesture) % 5 == 1


def encode_creatures(prompts: Sequence[CreaturePrompt]) -> Int[Tensor, "F 3"]:
    """Indices of creature, gesture and colour; colour 0 is its own."""
    names = list(CREATURES)
    codes = [
        [
            names.index(p.creature),
            GESTURES.index(p.gesture),
            0 if p.colour is None else 1 + COLOURS.index(p.colour),
        ]
        for p in prompts
    ]
    return torch.tensor(codes, dtype=torch.long).reshape(-1, 3)


def render_creatures(
    codes: Int[Tensor, "F 3"], cameras: Cameras, background: Float[Tensor, "F 3"], *, supersample: int = 2
) -> tuple[Float[Tensor, "F H W 3"], Float[Tensor, "F H W 1"], Int[Tensor, "F H W"]]:
    """What ``tracing.render_bodies`` makes of ``encode_creatures`` indices, one for each camera.

    Frames of the same creature are rendered together; keep the codes on the CPU.
    """
    size = (len(cameras), cameras.height, cameras.width)
    like = cameras.c2w
    images = (
        like.new_empty(*size, 3),
        like.new_empty(*size, 1),
        torch.empty(size, dtype=torch.long, device=like.device),
    )
    names, palette = list(CREATURES), torch.tensor([COLOUR_RGB[name] for name in COLOURS])
    times = cameras.times.cpu()  # poses are many small operations
    for creature in codes[:, 0].unique().tolist():
        own = torch.tensor([CREATURES[names[creature]].colour])
        frames, posed = [], []
        for gesture in codes[codes[:, 0] == creature, 1].unique().tolist():
            frames.append(((codes[:, 0] == creature) & (codes[:, 1] == gesture)).nonzero()[:, 0])
            colour = torch.cat([own, palette])[codes[frames[-1], 2]].to(times)
            posed.append(bodies(CREATURES[names[creature]], GESTURES[gesture], times[frames[-1]], colour))
        here, body = torch.cat(frames).to(like.device), joined_bodies(posed).to(like.device)
        drawn = render_bodies(body, cameras[here], background[here], supersample=supersample)
        for image, part in zip(images, drawn, strict=True):
            image[here] = part
    return images
