"""How the three denoisers are called, and what they are told.

B scenes of F frames, L tokens of C channels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fourdfy.shapes import store
from fourdfy.shapes.data import table_texts
from fourdfy.shapes.models import build_tokenizer


def predict_velocity(
    part: str,
    unet: nn.Module,
    noisy: Float[Tensor, "B F 4 h w"],
    timesteps: Int[Tensor, "B"],
    text: Float[Tensor, "B L C"],
    cameras: Float[Tensor, "B F 16"] | None = None,
) -> Float[Tensor, "B F 4 h w"]:
    """The denoiser's output for whole scenes, whatever layout its class wants."""
    if part == "video":
        return unet(noisy.transpose(1, 2), timesteps, text).sample.transpose(1, 2)
    frames = noisy.shape[1]
    extra = {} if cameras is None else {"class_labels": cameras.flatten(0, 1)}
    flat = noisy.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    predicted = unet(
        flat, timesteps.repeat_interleave(frames), text.repeat_interleave(frames, dim=0), **extra
    ).sample
    return predicted.unflatten(0, noisy.shape[:2])


@torch.no_grad()
def text_table(out: Path, device: str) -> Float[Tensor, "NUM_TEXTS L C"]:
    """States of every text of the world, the empty prompt last."""
    tokenizer, encoder = build_tokenizer(), store.load_part(out, "text", device)
    tokens = tokenizer(list(table_texts()), padding="max_length", truncation=True, return_tensors="pt")
    return torch.cat([encoder(ids.to(device)).last_hidden_state for ids in tokens.input_ids.split(512)])
