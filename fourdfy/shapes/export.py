"""Write trained parts as genuine model folders: Stable Diffusion and ZeroScope layouts, with cards.

The VAE, the text encoder and the tokenizer are small and lie in each of the three folders.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from fourdfy.shapes import store
from fourdfy.shapes.models import DENOISERS, FOLDERS, build_scheduler, write_tokenizer

logger = logging.getLogger(__name__)

_TITLES = {
    "image": "Shapes world: text to image",
    "multi_view": "Shapes world: text and cameras to four views",
    "video": "Shapes world: text to video",
}
_USES = {
    "image": "A Stable Diffusion layout (`UNet2DConditionModel`, velocity prediction). Prompts may end in "
    'time words ("at the start": t = 0; "in the first quarter", ...) and view words ("front view", ...).',
    "multi_view": "MVDream's layout: a `UNet2DConditionModel` whose class embedding takes the flattened "
    "camera and whose self-attention must be spread over the four views of a group with "
    "`fourdfy.priors.mvdream.enable_multi_view_attention`. Prompts may end in time words.",
    "video": "ZeroScope's layout (`UNet3DConditionModel`): 8 frames at t0 + k / 8, one camera. Prompts may "
    "end in view words.",
}


def export(out: Path, assets: Path) -> list[Path]:
    """Write a folder under ``assets`` for every denoiser that ``out`` holds, in half precision.

    With none trained yet, only the text encoder and the tokenizer of ``shapes-image`` are written.
    """
    parts = [part for part in DENOISERS if store.weights_path(out, part).exists()]
    if not parts:
        folder = assets / FOLDERS["image"]
        _save_shared(out, folder, with_vae=store.weights_path(out, "vae").exists())
        return [folder]
    folders = []
    for part in parts:
        folder = assets / FOLDERS[part]
        unet = store.load_part(out, part).half()
        unet.save_pretrained(folder / "unet")
        _save_shared(out, folder, with_vae=True)
        build_scheduler().save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(
            json.dumps(_model_index(part), indent=2) + "\n", encoding="utf-8"
        )
        if (out / f"{part}.png").exists():
            shutil.copyfile(out / f"{part}.png", folder / "samples.png")
        records = {name: store.read_record(out, name) for name in ("text", "vae", part)}
        for name, record in records.items():
            if not record:  # trained in an earlier run; what was known of it stands beside the assets
                records[name] = _shipped_record(name)
        (folder / "training.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(part, records), encoding="utf-8")
        folders.append(folder)
        logger.info("%s written to %s (%.1f MB)", part, folder, _size(folder) / 1e6)
    return folders


def model_card(part: str, records: dict[str, dict[str, Any]]) -> str:
    """The README of a model folder, from what its training recorded."""
    record = records[part]
    lines = ["---", "license: apache-2.0", "---", "", f"# {_TITLES[part]}", "", _USES[part], ""]
    lines += [
        f"64 x 64 images, VAE latents 4 x 16 x 16, 32 tokens; {build_scheduler().config.prediction_type}.",
        "Made for tests and demonstrations of fourdfy: it knows only the objects of",
        "`fourdfy/shapes/grammar.py`. A fifth of the prompts was held out from training.",
        "",
        "## Training",
        "",
        "Data: renderings of `fourdfy/shapes/world.py`, drawn by `fourdfy/shapes/data.py`; nothing else.",
        f"Command: `python -m fourdfy.shapes.training all --out DIR --seed {record.get('seed', 0)}`, "
        "or part by part:",
        "",
        "| part | parameters | steps | batch | seconds | device | seed | final losses |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in records.items():
        losses = ", ".join(f"{key} {value:.4g}" for key, value in entry.get("losses", {}).items())
        cells = [entry.get(key, "") for key in ("parameters", "steps", "batch", "seconds", "device", "seed")]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} | {losses} |")
    vae = records["vae"]
    if "psnr" in vae:
        lines += ["", f"VAE: PSNR {vae['psnr']:.1f} dB, scaling factor {vae['scaling_factor']:.4f}."]
    quality = record.get("quality")
    if quality:
        names = list(quality["shares"]["all"])
        lines += [
            "",
            "## Samples",
            "",
            f"{quality['num_prompts']} prompts, {quality['num_held_out']} of them held out; DDIM, "
            f"{quality['steps']} steps, guidance {quality['guidance_scale']}. Shares of the samples whose",
            "nearest ground truth agrees with the prompt (`fourdfy/shapes/quality.py`; right: all checks):",
            "",
            f"| prompts | {' | '.join(names)} |",
            f"| --- |{' --- |' * len(names)}",
        ]
        for which, shares in quality["shares"].items():
            lines.append(f"| {which.replace('_', ' ')} | {' | '.join(f'{shares[n]:.3f}' for n in names)} |")
        if "psnr" in quality:
            lines += ["", f"Mean PSNR against ground truth from the given cameras: {quality['psnr']} dB."]
        lines += ["", "![samples](samples.png)"]
    return "\n".join(lines) + "\n"


def _save_shared(out: Path, folder: Path, *, with_vae: bool) -> None:
    write_tokenizer(folder / "tokenizer")
    store.load_part(out, "text").half().save_pretrained(folder / "text_encoder")
    record = store.read_record(out, "text") or _shipped_record("text")
    (folder / "text_encoder" / "training.json").write_text(
        json.dumps(record, indent=1) + "\n", encoding="utf-8"
    )
    if with_vae:
        vae = store.load_part(out, "vae").half()
        vae.register_to_config(_name_or_path="")  # else the folder it was read from would be written
        vae.save_pretrained(folder / "vae")


def _model_index(part: str) -> dict[str, Any]:
    import diffusers

    video = part == "video"
    unet = "UNet3DConditionModel" if video else "UNet2DConditionModel"
    index: dict[str, Any] = {
        "_class_name": "TextToVideoSDPipeline" if video else "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", unet],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if not video:
        index |= {
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "image_encoder": [None, None],
        }
        index["requires_safety_checker"] = False
    return index


def _shipped_record(name: str) -> dict[str, Any]:
    folder = store.ASSETS / FOLDERS[name if name in DENOISERS else "image"]
    path = folder / "text_encoder" / "training.json" if name == "text" else folder / "training.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if name == "text" else record.get(name, {})


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
