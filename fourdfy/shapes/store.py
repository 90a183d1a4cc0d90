"""Where a training run keeps its parts: weights, what was measured, and the state to go on from.

OUT/PART.safetensors holds the averaged weights in half precision, OUT/PART.json the record,
OUT/PART.state.pt everything that training needs to go on. All are written to a temporary name first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourdfy.shapes.models import (
    DENOISERS,
    FOLDERS,
    build_text_encoder,
    build_unet,
    build_vae,
    prepare_unet,
)

ASSETS = Path(__file__).parent / "assets"


def weights_path(out: Path, part: str) -> Path:
    """The file of a part's averaged weights."""
    return out / f"{part}.safetensors"


def save_weights(out: Path, part: str, weights: dict[str, Tensor]) -> None:
    """Store ``weights`` in half precision."""
    from safetensors.torch import save_file

    half = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in weights.items()}
    _replace(weights_path(out, part), lambda path: save_file(half, path, metadata={"format": "pt"}))


def read_record(out: Path, part: str) -> dict[str, Any]:
    """What was recorded of a part; empty before its first training."""
    path = out / f"{part}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def update_record(out: Path, part: str, **entries: Any) -> None:
    """Add to what is recorded of a part."""
    text = json.dumps(read_record(out, part) | entries, indent=1) + "\n"
    _replace(out / f"{part}.json", lambda path: Path(path).write_text(text, encoding="utf-8"))


def save_state(out: Path, part: str, state: dict[str, Any]) -> None:
    """Store a training state of tensors and plain values."""
    _replace(out / f"{part}.state.pt", lambda path: torch.save(state, path))


def load_state(out: Path, part: str) -> dict[str, Any] | None:
    """The training state, or None before the first piece."""
    path = out / f"{part}.state.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def build(part: str) -> nn.Module:
    """The untrained model of any part."""
    builders: dict[str, Callable[[], nn.Module]] = {"text": build_text_encoder, "vae": build_vae}
    if part in builders:
        return builders[part]()
    unet = build_unet(part)
    prepare_unet(part, unet)
    return unet


def load_part(out: Path, part: str, device: torch.device | str = "cpu") -> nn.Module:
    """A trained part, frozen, in float32: from ``out``, else from the shipped assets.

    Raises:
        FileNotFoundError: neither holds it; names the command that trains it.
    """
    if weights_path(out, part).exists():
        from safetensors.torch import load_file

        model = build(part)
        model.load_state_dict({k: v.float() for k, v in load_file(weights_path(out, part)).items()})
        if part == "vae":
            record = read_record(out, "vae")
            if "scaling_factor" not in record:
                raise ValueError(
                    f"the training of the VAE in {out} was cut short, its latents' scale is not measured; "
                    f"type: python -m fourdfy.shapes.training vae --out {out} --minutes 1"
                )
            model.register_to_config(scaling_factor=record["scaling_factor"])
    else:
        model = _load_shipped(part, out)
    return model.to(device).eval().requires_grad_(False)


def is_trained(out: Path, part: str) -> bool:
    """Whether ``out`` or the shipped assets hold a part."""
    return weights_path(out, part).exists() or _shipped_folder(part).is_dir()


def _shipped_folder(part: str) -> Path:
    subfolder = {"text": "text_encoder", "vae": "vae"}.get(part, "unet")
    return ASSETS / FOLDERS[part if part in DENOISERS else "image"] / subfolder


def _load_shipped(part: str, out: Path) -> nn.Module:
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNet3DConditionModel
    from transformers import CLIPTextModel

    folder = _shipped_folder(part)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no trained {part} model in {out} or {folder}; "
            f"type: python -m fourdfy.shapes.training {part} --out {out} --minutes 5"
        )
    classes = {"text": CLIPTextModel, "vae": AutoencoderKL, "video": UNet3DConditionModel}
    model = classes.get(part, UNet2DConditionModel).from_pretrained(folder).float()
    if part in DENOISERS:
        prepare_unet(part, model)
    return model


def _replace(path: Path, write: Callable[[str], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    write(str(temporary))
    os.replace(temporary, path)
