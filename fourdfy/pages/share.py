"""``share.html``: an exported scene to turn and to play, with its clip, prompt and settings."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping
from typing import Any

from jaxtyping import UInt8
from numpy import ndarray

from fourdfy.pages.clips import clip
from fourdfy.pages.page import BAR, escaped, page, section
from fourdfy.pages.settings import settings_text, without_folders

MODEL_HELP = "Drag to turn it, scroll or pinch to come nearer, double click to begin again."


def share_page(
    prompt: str,
    facts: str,
    settings: Mapping[str, Any],
    *,
    model: bytes | None,
    frames: UInt8[ndarray, "F H W 3"],
    seconds: float,
) -> str:
    """The page.

    Args:
        facts: one line below the prompt.
        settings: of the experiment; paths in them are reduced to their last names.
        model: a GLB of ours; None for none.
        frames: the clip, which shows the same moments as the model.
        seconds: how long both last.
    """
    shown = (
        f"<figure>{clip(frames, f'{prompt}, a clip')}<figcaption>The scene itself, as volume rendering shows "
        "it.</figcaption></figure>"
    )
    if model:
        shown = (
            f'<figure><canvas id="model" role="img" aria-label="{escaped(prompt)}, a mesh"></canvas>'
            f"<figcaption>The mesh. {MODEL_HELP}</figcaption></figure>{shown}"
        )
    return page(
        prompt,
        f'<h1>{escaped(prompt)}</h1><p class="soft">{escaped(facts)}</p>'
        f'{BAR}<div class="beside">{shown}</div>'
        + section("Settings", settings_text(without_folders(settings))),
        scripts=["player.js", "viewer.js"] if model else ["player.js"],
        data={"seconds": seconds, "model": base64.b64encode(gzip.compress(model or b"", mtime=0)).decode()},
    )
