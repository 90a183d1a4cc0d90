"""Prompts that have short names: ``lib:panda_dancing``."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

LIBRARY = Path(__file__).with_name("library.json")

MOST_CHARACTERS = 20_000
"""Of a prompt; the longest that an encoder reads has a tenth."""


def resolve_prompt(prompt: str) -> str:
    """The prompt itself, or the library's one prompt that has all words of ``lib:word_word``.

    Raises:
        ValueError: no library prompt has all words, or several have.
    """
    check_text(prompt)
    if not prompt.startswith("lib:"):
        return prompt
    words = prompt.removeprefix("lib:").lower().split("_")
    everything = [
        text for group in json.loads(LIBRARY.read_text(encoding="utf-8")).values() for text in group
    ]
    matches = [text for text in everything if all(word in text.lower() for word in words)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"prompt {prompt!r} fits several library prompts; add a word: {_listed(matches)}")
    near = [text for text in everything if any(word in text.lower() for word in words)]
    near = near or difflib.get_close_matches(" ".join(words), everything, n=3, cutoff=0)
    raise ValueError(
        f"prompt {prompt!r} fits no prompt of fourdfy's own library, which is not threestudio's; the nearest "
        f"are: {_listed(near)}"
    )


def check_text(text: str) -> None:
    """Refuse what is no text, or longer than any encoder reads: a tokenizer may take minutes for it.

    Raises:
        ValueError: says which of the two, and where.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a prompt has {len(text):,} characters; expected {MOST_CHARACTERS:,} at most")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = error.start + 1
        raise ValueError(f"character {where} of a prompt is half of a surrogate pair, or no UTF-8") from error


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(f"{text!r}" for text in texts[:8]) + ", ..." * (len(texts) > 8)
