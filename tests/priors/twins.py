"""Small twins of the original models: weights drawn as their outputs were recorded with.

``twin_state("mvdream", "unet")`` gives original keys; ``recorded("mvdream")`` the inputs and outputs, made
by the original code in float64.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"
HEAD_WIDTH = {"unet": 8, "text": 16}


def twin_state(name: str, part: str) -> dict[str, Tensor]:
    facts = json.loads((DATA / f"reduced_{name}.keys.json").read_text())
    rng = np.random.default_rng(facts["seeds"][part])
    state = {}
    for key, shape in sorted(facts["shapes"][part].items()):
        values = rng.standard_normal(shape)
        if len(shape) >= 2:
            values /= np.sqrt(np.prod(shape[1:]))
        else:
            values = 1 + 0.3 * values if key.endswith("weight") else 0.3 * values
        state[key] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return state


def recorded(name: str) -> dict[str, Tensor]:
    with np.load(DATA / f"reduced_{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def original_keys(name: str) -> dict[str, list[int]]:
    """Keys and shapes of the published checkpoint."""
    return json.loads((DATA / f"original_keys_{name}.json").read_text())
