"""Write trained parts as genuine model folders: Stable Diffusion, ZeroScope and Wan layouts, with cards.

The U-Nets' VAE, text encoder and tokenizer are small and lie in each of their three folders.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import diffusers

from tools.shapes_training import store
from tools.shapes_training.models import CLASSES, DENOISERS, FOLDERS, build_scheduler, latent_shape, needs
from tools.shapes_training.quality import NOISES
from tools.shapes_training.text import SOLIDS_ONLY, build_tokenizer, write_tokenizer

logger = logging.getLogger(__name__)

_TITLES = {
    "image": "Shapes world: text to image",
    "multi_view": "Shapes world: text and cameras to four views",
    "video": "Shapes world: text to video",
    "wan": "Shapes world: text to video, by a flow transformer",
}
_USES = {
    "image": "A Stable Diffusion layout (`UNet2DConditionModel`, velocity prediction). Prompts may end in "
    'time words ("at the start": t = 0; "in the first sixteenth", ...) and view words ("front view", ...).',
    "multi_view": "MVDream's layout: a `UNet2DConditionModel` whose class embedding takes the flattened "
    "camera and whose self-attention must be spread over the four views of a group with "
    "`fourdfy.priors.mvdream.enable_multi_view_attention`. Prompts may end in time words.",
    "video": "ZeroScope's layout (`UNet3DConditionModel`): 8 frames at t0 + k / 8, one camera. Prompts may "
    "end in view words.",
    "wan": "Wan 2.1's layout (`WanTransformer3DModel`, causal `AutoencoderKLWan`, `UMT5EncoderModel`): 17 "
    "frames at t0 + k / 17, one camera. Prompts may end in time words, which say in which quarter the clip "
    "begins (else t0 < 1 / 17), and view words; unconditional: the empty text.",
}
_CARD = """\
---
license: apache-2.0
---

# {title}

{use}

64 x 64 images, VAE latents {latents}; {prediction_type}.
Made for tests and demonstrations of fourdfy: it knows only {knows}.
A fifth of the prompts was held out from training.

## Training

Data: renderings of `fourdfy/shapes/`, drawn by `tools/shapes_training/data.py`; nothing else.
Command: `python -m tools.shapes_training all --out DIR --seed {seed}`, or part by part:

| part | parameters | steps | batch | seconds | device | seed | final losses |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
_CELLS = ("parameters", "steps", "batch", "seconds", "device", "seed")


def export(out: Path, assets: Path) -> list[Path]:
    """Write a folder under ``assets`` for every denoiser that ``out`` holds, in half precision.

    With none trained yet, only the text encoder and the tokenizer of ``shapes-image`` are written.
    """
    parts = [part for part in DENOISERS if store.weights_path(out, part).exists()]
    if not parts:
        folder = assets / FOLDERS["image"]
        _save_shared(out, "image", folder, with_vae=store.weights_path(out, "vae").exists())
        return [folder]
    return [_export_denoiser(out, part, assets / FOLDERS[part]) for part in parts]


def model_card(part: str, records: dict[str, dict[str, Any]]) -> str:
    """The README of a model folder, from what its training recorded."""
    head = _CARD.format(
        title=_TITLES[part],
        use=_USES[part],
        knows="the solids of\n`fourdfy/shapes/grammar.py`"
        if part in SOLIDS_ONLY
        else "the solids and creatures of\n`fourdfy/shapes/prompts.py`",
        latents=" x ".join(map(str, latent_shape(part))),
        prediction_type=build_scheduler(part).config.prediction_type,
        seed=records[part].get("seed", 0),
    )
    lines = []
    for name, entry in records.items():
        losses = ", ".join(f"{key} {value:.4g}" for key, value in entry.get("losses", {}).items())
        lines.append(f"| {name} | {' | '.join(str(entry.get(cell, '')) for cell in _CELLS)} | {losses} |")
    vae = records[needs(part)[1]]
    if "psnr" in vae:
        scale = f", scaling factor {vae['scaling_factor']:.4f}" if "scaling_factor" in vae else ""
        creatures = (
            f" on solids, {vae['psnr_creatures']:.1f} dB on creatures" if "psnr_creatures" in vae else ""
        )
        lines += ["", f"VAE: PSNR {vae['psnr']:.1f} dB{creatures}{scale}."]
    if "quality" in records[part]:
        lines += _samples(records[part]["quality"])
    return head + "\n".join(lines) + "\n"


def _samples(quality: dict[str, Any]) -> list[str]:
    names = list(quality["shares"]["all"])
    of = {"all": "solids", "held_out": "solids, held out", "creatures_held_out": "creatures, held out"}
    lines = [
        "",
        "## Samples",
        "",
        f"{quality['num_prompts']} prompts, {quality['num_held_out']} of them held out; DDIM, "
        f"{quality['steps']} steps, guidance {quality['guidance_scale']}. Shares of the samples whose",
        "nearest ground truth agrees with the prompt (`tools/shapes_training/quality.py`). Shape: of a",
        "creature, which one it is. Right: all.",
        "",
        f"| prompts | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
    ]
    for which, shares in quality["shares"].items():
        lines.append(f"| {of.get(which, which)} | {' | '.join(f'{shares[n]:.3f}' for n in names)} |")
    if one_step := quality.get("one_step"):
        noises = ", ".join(f"{share:g}" for share in NOISES)
        lines += ["", f"PSNR in dB of x_0 in one step from the noisy truth, at {noises} of all noise:", ""]
        lines += [
            f"- {of.get(which, which)}: {', '.join(map(str, psnr))}" for which, psnr in one_step.items()
        ]
    if "psnr" in quality:
        lines += ["", f"Mean PSNR against ground truth from the given cameras: {quality['psnr']} dB."]
    return [*lines, "", "![samples](samples.png)"]


def _export_denoiser(out: Path, part: str, folder: Path) -> Path:
    store.load_part(out, part).half().save_pretrained(folder / store.subfolder(part))
    _save_shared(out, part, folder, with_vae=True)
    build_scheduler(part).save_pretrained(folder / "scheduler")
    if (out / f"{part}.png").exists():
        shutil.copyfile(out / f"{part}.png", folder / "samples.png")
    records = {name: _record(out, name) for name in (*needs(part), part)}
    _write_json(folder / "model_index.json", _model_index(part), indent=2)
    _write_json(folder / "training.json", records)
    (folder / "README.md").write_text(model_card(part, records), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    logger.info("%s written to %s (%.1f MB)", part, folder, size / 1e6)
    return folder


def _save_shared(out: Path, part: str, folder: Path, *, with_vae: bool) -> None:
    text_part, vae_part = needs(part)
    if part == "wan":
        build_tokenizer(text_part).save_pretrained(folder / "tokenizer")
    else:
        write_tokenizer(folder / "tokenizer")
    store.load_part(out, text_part).half().save_pretrained(folder / "text_encoder")
    _write_json(folder / "text_encoder" / "training.json", _record(out, text_part))
    if with_vae:
        vae = store.load_part(out, vae_part).half()
        vae.register_to_config(_name_or_path="")  # else the folder it was read from would be written
        vae.save_pretrained(folder / "vae")


def _record(out: Path, part: str) -> dict[str, Any]:
    """For a part that was trained in an earlier run, the record beside the assets."""
    return store.read_record(out, part) or store.shipped_record(part)


def _model_index(part: str) -> dict[str, Any]:
    text_part, vae_part = needs(part)
    pipelines = {"video": "TextToVideoSDPipeline", "wan": "WanPipeline"}
    index: dict[str, Any] = {
        "_class_name": pipelines.get(part, "StableDiffusionPipeline"),
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(build_scheduler(part)).__name__],
        "text_encoder": ["transformers", CLASSES[text_part].__name__],
        "tokenizer": ["transformers", type(build_tokenizer(text_part)).__name__],
        store.subfolder(part): ["diffusers", CLASSES[part].__name__],
        "vae": ["diffusers", CLASSES[vae_part].__name__],
    }
    if part not in pipelines:
        index |= {part: [None, None] for part in ("feature_extractor", "safety_checker", "image_encoder")}
        index["requires_safety_checker"] = False
    return index


def _write_json(path: Path, values: dict[str, Any], indent: int = 1) -> None:
    path.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")
