"""The files of a training run: weights, measurements, and the state to continue from.

OUT/PART.safetensors holds the averaged weights in half precision, OUT/PART.json the record,
OUT/PART.state.pt everything that training needs to continue, OUT/PART.pool.pt the scenes that it draws from.
All appear when they are whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fourdfy.shapes
from fourdfy.files.atomic import whole_file
from tools.shapes_training.models import (
    CLASSES,
    DENOISERS,
    FOLDERS,
    MEASURED,
    TEXTS,
    VAES,
    build,
    needs,
    prepare,
)

ASSETS = Path(fourdfy.shapes.__file__).parent / "assets"


def weights_path(out: Path, part: str) -> Path:
    """The file of a part's averaged weights."""
    return out / f"{part}.safetensors"


def save_weights(out: Path, part: str, weights: dict[str, Tensor]) -> None:
    """Store ``weights`` in half precision."""
    half = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in weights.items()}
    with whole_file(weights_path(out, part)) as path:
        save_file(half, path, metadata={"format": "pt"})


def read_record(out: Path, part: str) -> dict[str, Any]:
    """The record of a part; empty before its first training."""
    path = out / f"{part}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def update_record(out: Path, part: str, **entries: Any) -> None:
    """Add to what is recorded of a part."""
    text = json.dumps(read_record(out, part) | entries, indent=1) + "\n"
    with whole_file(out / f"{part}.json") as path:
        path.write_text(text, encoding="utf-8")


def shipped_record(part: str) -> dict[str, Any]:
    """The record of a part at the time of its export to the shipped assets."""
    folder = shipped_folder(part) if part in TEXTS else shipped_folder(part).parent
    path = folder / "training.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return record if part in TEXTS else record.get(part, {})


def save_state(out: Path, part: str, state: dict[str, Any], kind: str = "state") -> None:
    """Store tensors and plain values: a training state, or the ``pool`` of scenes that a part learns from."""
    with whole_file(out / f"{part}.{kind}.pt") as path:
        torch.save(state, path)


def load_state(out: Path, part: str, kind: str = "state") -> dict[str, Any] | None:
    """What ``save_state`` stored, on the CPU, or None before the first call."""
    path = out / f"{part}.{kind}.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def load_part(out: Path, part: str, device: torch.device | str = "cpu") -> nn.Module:
    """A trained part, frozen, in float32: from ``out``, else from the shipped assets.

    Raises:
        FileNotFoundError: neither holds it; names the command that trains it.
    """
    train = f"python -m tools.shapes_training {part} --out {out} --minutes"
    path, folder = weights_path(out, part), shipped_folder(part)
    if path.exists():
        model = build(part)
        model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        if part in VAES:
            record = read_record(out, part)
            if "psnr" not in record:
                raise ValueError(
                    f"the training of the VAE in {out} was cut short, its latents' scale is not measured; "
                    f"type: {train} 1"
                )
            model.register_to_config(**{key: record[key] for key in MEASURED[part]})
    elif folder.is_dir():
        model = CLASSES[part].from_pretrained(folder).float()
        prepare(part, model)
    else:
        raise FileNotFoundError(f"no trained {part} model in {out} or {folder}; type: {train} 5")
    return model.to(device).eval().requires_grad_(False)


def shipped_folder(part: str) -> Path:
    """The folder of a part in the package: of what models share, that in the first of them."""
    owner = next(denoiser for denoiser in DENOISERS if part in (denoiser, *needs(denoiser)))
    return ASSETS / FOLDERS[owner] / subfolder(part)


def subfolder(part: str) -> str:
    """Where a part lies in a model folder."""
    if part in TEXTS or part in VAES:
        return "text_encoder" if part in TEXTS else "vae"
    return "transformer" if part == "wan" else "unet"
