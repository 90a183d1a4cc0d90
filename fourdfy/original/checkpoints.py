"""Tensors of the public 4D-fy code's checkpoints, under the names that they have here.

Grids, networks, background and occupancy grid have the same names. What differs is the renderer, which the
low-memory one holds a level deeper; VSD's adapter and camera embedding; and MVDream's frozen weights, which
the original saves twice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from fourdfy.config import ConfigError

FROZEN = ("guidance.", "guidance_multi_view.")
"""Prefixes of weights that are never trained; the first is the original's second name for a guidance."""

ADAPTER = re.compile(
    r"guidance_single_view\.lora_layers\.layers\.(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight"
)
OWN_ADAPTER = re.compile(r"guidance_single_view\.lora\.(.+)\.to_q\.lora_A\.weight")
BLOCKS = ("down_blocks", "up_blocks", "mid_block")
"""The order in which the original numbers the attentions of a U-Net."""


def own_names(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """``state`` with each tensor under the name that it has in ``own``; other names stay as they are.

    It also works for our own checkpoints, including those from before the two renderers became one.

    Raises:
        ConfigError: an adapter for more attentions than our U-Net has.
    """
    attentions = _numbered_attentions(own)
    return {
        _own_name(name, own, attentions): tensor
        for name, tensor in state.items()
        if not name.startswith(FROZEN)
    }


def _own_name(name: str, own: Collection[str], attentions: Sequence[str]) -> str:
    if match := ADAPTER.fullmatch(name):
        if not attentions:  # no adapter here to take it
            return name
        number, part, half = int(match[1]), match[2], match[3]
        if number >= len(attentions):
            raise ConfigError(
                f"{name}: the adapter of a U-Net with more than {len(attentions)} attentions; "
                "is system.guidance.pretrained_model_name_or_path_lora another model?"
            )
        layer = {"out": "to_out.0"}.get(part, f"to_{part}")
        matrix = {"down": "lora_A", "up": "lora_B"}[half]
        return f"guidance_single_view.lora.{attentions[number]}.{layer}.{matrix}.weight"
    candidates = (
        name,
        name.replace("renderer.base_renderer.", "renderer.", 1),
        name.replace("camera_embedding.module.", "camera_embedding.", 1),
    )
    return next((candidate for candidate in candidates if candidate in own), name)


def _numbered_attentions(own: Collection[str]) -> list[str]:
    """Paths of the attentions that our adapter sits on, as the original counts them."""
    matches = (OWN_ADAPTER.fullmatch(name) for name in own)
    return sorted((m[1] for m in matches if m), key=_place)


def _place(path: str) -> tuple[int, ...]:
    """Sort key: by block, then by the numbers in the path, so that 2 comes before 10."""
    return BLOCKS.index(path.split(".")[0]), *map(int, re.findall(r"\d+", path))
