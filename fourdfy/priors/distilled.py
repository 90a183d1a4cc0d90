"""Models that were distilled, to a few steps or to a guidance of their own: no score can be had from them."""

from __future__ import annotations

import re
from pathlib import Path

from fourdfy.priors.hub import stored_description

NAMES = re.compile(
    r"(?i)distil|fast-?(wan|hunyuan|video)|lightning|lightx2v|causvid|self-?forcing|turbo|schnell|hyper-?sd"
    r"|animatelcm|(?<![a-z])(lcm|dmd2?|nocfg)(?![a-z])|(?<!\d)[1-8]-?steps?(?![a-z])"
)
"""What their names contain."""

KEYS = ("guidance_embeds", "time_cond_proj_dim")
"""Keys in the description of a network that is told the guidance scale."""


def check_not_distilled(name: str, part: str, key: str = "pretrained_model_name_or_path") -> None:
    """Refuse a model that its name, or the description of its denoiser ``part``, calls distilled.

    Args:
        key: what names the model, for the message.

    Raises:
        ValueError: says why.
    """
    description = stored_description(name, part)
    signs = [f"{key} in its {part}/config.json" for key in KEYS if description.get(key)]
    if told := NAMES.search(Path(name).name):
        signs.append(f"{told[0]!r} in its name")
    if signs:
        raise ValueError(
            f"{key}={name}: {signs[0]} says that it was distilled, to few steps or "
            f"to a guidance of its own, so it has no score to learn from; use the model that it was made from"
        )
