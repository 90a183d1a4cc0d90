"""The prompts of the shapes world: "a red cube spinning" is a colour, a shape and a motion.

Text order of everything a model is trained on: prompt, time words, view words, as in
"a red cube spinning, at the start, front view". A fifth of the combinations is never trained on.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from fourdfy.shapes.creatures import CREATURES

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("ball", "cube", "cone", "cylinder", "diamond")
MOTIONS = ("standing still", "spinning", "bouncing", "sliding", "pulsing")

VIEWS = ("side view", "front view", "back view", "overhead view")
"""View words, in the order of ``prompts.views.DIRECTIONS``."""

START = "at the start"
"""Words for t = 0 exactly."""
_NTH = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth"
SIXTEENTHS = tuple(f"in the {nth} sixteenth" for nth in (*_NTH.split(), "fourteenth", "fifteenth", "last"))
"""SIXTEENTHS[k] are words for t in [k/16, (k+1)/16). With words for quarters, an image model's answer to a
spinning object had no mark, since a quarter of a turn smears it, and a mark once lost never came back."""
MOMENTS = (START, *SIXTEENTHS)
QUARTERS = ("in the first quarter", "in the second quarter", "in the third quarter", "in the last quarter")
"""QUARTERS[k] are words for t in [k/4, (k+1)/4)."""
FLOW_MOMENTS = (START, *QUARTERS)
"""The words of the flow transformer: where its clip begins."""

GRAMMAR = (
    f"'a COLOUR SHAPE MOTION' with COLOUR in {{{', '.join(COLOURS)}}}, "
    f"SHAPE in {{{', '.join(SHAPES)}}}, MOTION in {{{', '.join(MOTIONS)}}}"
)


@dataclass(frozen=True)
class ShapePrompt:
    """One object of the world; an unknown word raises ValueError."""

    colour: str
    shape: str
    motion: str

    def __post_init__(self) -> None:
        for kind, word, known in (
            ("colour", self.colour, COLOURS),
            ("shape", self.shape, SHAPES),
            ("motion", self.motion, MOTIONS),
        ):
            if word not in known:
                raise ValueError(unknown_word(kind, word, known))

    @property
    def text(self) -> str:
        """The prompt in words, without time or view."""
        return with_article(self.colour, self.shape, self.motion)


def parse_prompt(text: str) -> ShapePrompt:
    """The prompt that ``text`` means; case and spacing do not matter.

    Raises:
        ValueError: a word is not of the grammar; names it and the nearest right one.
    """
    words = without_article(text)
    if len(words) < 3:
        raise ValueError(f"prompt {text!r} is too short; the shapes world knows {GRAMMAR}")
    return ShapePrompt(words[0], words[1], " ".join(words[2:]))


def with_article(*words: str) -> str:
    """A prompt of these words."""
    return " ".join(("an" if words[0][0] in "aeiou" else "a", *words))


def without_article(text: str) -> list[str]:
    """The words of a prompt in lower case, without the article if it has one."""
    words = text.lower().split()
    return words[1:] if words[:1] in (["a"], ["an"]) else words


def check_text(text: str) -> None:
    """Refuse texts that the flow transformer does not know: other than the prompt of a solid with optional
    time words and view words, or the empty text.

    Raises:
        ValueError: names the word that is not of the grammar, and the nearest right one.
    """
    prompt, *_ = text.split(", ")
    if creature := next((word for word in prompt.lower().split() if word in CREATURES), None):
        raise ValueError(
            f"{creature!r} is no solid, and the flow transformer knows no creatures, only {GRAMMAR}"
        )
    if text:
        parse_prompt(prompt)
    check_words(text, FLOW_MOMENTS)


def check_words(text: str, moments: tuple[str, ...]) -> None:
    """Refuse words behind a prompt other than time words and view words.

    Raises:
        ValueError: names the word, and the nearest right one.
    """
    for word in text.split(", ")[1:]:
        if word not in (*moments, *VIEWS):
            raise ValueError(unknown_word("moment or view", word, (*moments, *VIEWS)))


@lru_cache
def all_prompts() -> tuple[ShapePrompt, ...]:
    """Every combination, colours slowest, motions fastest."""
    return tuple(ShapePrompt(*words) for words in product(COLOURS, SHAPES, MOTIONS))


def is_held_out(prompt: ShapePrompt) -> bool:
    """Whether the models never see this combination in training (30 of the 150).

    A Latin pattern: every colour, shape, motion and every pair of them occurs in training.
    """
    colour, shape, motion = (
        COLOURS.index(prompt.colour),
        SHAPES.index(prompt.shape),
        MOTIONS.index(prompt.motion),
    )
    return (colour + 2 * shape + 3 * motion) % 5 == 0


def unknown_word(kind: str, word: str, known: tuple[str, ...], grammar: str = GRAMMAR) -> str:
    """An error's text that names the nearest known word."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f"{word!r} is no {kind} of the shapes world; did you mean {nearest[0]!r}? It knows {grammar}"
