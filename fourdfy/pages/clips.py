"""Pictures and clips as part of a page. A clip is one picture that holds all of its frames, row by row, so
that any number of clips show the same moment, and a slider chooses it.

F frames of H x W pixels.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from fourdfy.pages.page import data_url, escaped

MAX_FRAMES = 48
MAX_PIXELS = 256


def clip(
    frames: UInt8[ndarray, "F H W 3"], label: str, *, css: str = "clip", pixels: int = MAX_PIXELS
) -> str:
    """The HTML of a clip, which ``player.js`` moves. ``pixels``: the most along its longer side."""
    from PIL import Image

    images = [_small(Image.fromarray(frame), pixels) for frame in frames]
    width, height = images[0].size
    columns = math.ceil(math.sqrt(len(images)))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return (
        f'<canvas class="{css}" width="{width}" height="{height}" data-frames="{len(images)}" '
        f'data-columns="{columns}" role="img" aria-label="{escaped(label)}">'
        f'<img alt="" src="{_webp(sheet)}"></canvas>'
    )


@lru_cache(maxsize=4096)  # a sweep's sheet is written each minute, by the process that starts the jobs
def clip_of(versions: tuple[tuple[Path, int], ...], label: str, css: str, pixels: int) -> str:
    """Image files of one size, each with the time of its last change, as a clip.

    Raises:
        OSError, ValueError, SyntaxError: one is missing or damaged.
    """
    from PIL import Image

    frames = []
    for file, _ in versions:
        with Image.open(file) as image:
            frames.append(np.asarray(image.convert("RGB")))
    return clip(np.stack(frames), label, css=css, pixels=pixels)


def picture(file: Path, label: str, *, width: int | None = None) -> str:
    """An image file as the HTML of a small picture; of a wide one, the first ``width`` columns.

    Raises:
        OSError, ValueError, SyntaxError: it is missing or damaged.
    """
    from PIL import Image

    with Image.open(file) as image:
        shown = image.convert("RGB").crop((0, 0, min(width or image.width, image.width), image.height))
    return f'<img alt="{escaped(label)}" src="{_webp(_small(shown, MAX_PIXELS))}">'


def spread(count: int, most: int) -> list[int]:
    """At most so many indices below ``count``, evenly spread from 0 on."""
    shown = min(count, most)
    return [index * count // shown for index in range(shown)]


def _small(image: Any, pixels: int) -> Any:
    image.thumbnail((pixels, pixels))
    return image


def _webp(image: Any) -> str:
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=85, method=4)
    return data_url(encoded.getvalue(), "image/webp")
