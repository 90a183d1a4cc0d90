"""A model folder in diffusers layout, read without loading it.

Its parts (``unet``, ``vae``, ``scheduler``, ``tokenizer``, ``text_encoder``) are subfolders, each with a
description and, of networks, weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourdfy.config_files import ConfigError

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")

DESCRIPTIONS = {"scheduler": "scheduler_config.json", **dict.fromkeys(TOKENIZERS, "tokenizer_config.json")}
"""The file that describes a part; ``config.json`` for all others."""

PIECES = "spiece.model"
"""The vocabulary of a T5 tokenizer, where there is no ``tokenizer.json``."""

JUDGES = ("clip", "xclip")
"""Networks that place pictures and texts in one space; their folder holds the tokenizer too."""

ALONE = ("motion_adapter", *JUDGES)
"""Parts that have a model's folder for themselves, without a subfolder."""

MOST_NESTED = 20
"""Lists and mappings in each other, in a JSON file that is read."""

VARIANTS = ("", ".fp16")
"""What stands before the suffix in names of weight files; full precision comes first."""


class ModelNotFound(ConfigError, FileNotFoundError):
    """A model, or a part of it, is not on this disk and can't be fetched; the message says what was tried."""


def part_flaw(folder: Path, part: str) -> str:
    """Why a loader can't read ``part`` of a model folder; "" if everything that it opens is there."""
    place = part_folder(folder, part)
    if not place.is_dir():
        return "no such folder"
    files = [description_file(folder, part)]
    if part in TOKENIZERS and not any((place / name).is_file() for name in ("tokenizer.json", PIECES)):
        files += [place / "vocab.json", place / "merges.txt"]
    if part not in DESCRIPTIONS:
        files += weight_files(folder, part).paths
    return next((f"{file.name} {flaw}" for file in files if (flaw := file_flaw(file))), "")


def part_folder(folder: Path, part: str) -> Path:
    """The folder of a part's files."""
    return folder / inside(part)


def inside(part: str) -> str:
    """What stands before the names of a part's files, in a model's folder."""
    return "" if part in ALONE else f"{part}/"


def read_description(folder: Path, part: str) -> dict[str, Any]:
    """The mapping in the file that describes a part.

    Raises:
        ConfigError: it is not a JSON object.
    """
    return read_mapping(description_file(folder, part))


def description_file(folder: Path, part: str) -> Path:
    """The file that describes a part."""
    return part_folder(folder, part) / DESCRIPTIONS.get(part, "config.json")


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """A network's weights, under the names that diffusers and transformers look for."""

    paths: tuple[Path, ...]
    """Every file that is opened; for a sharded network, the index first."""
    variant: str | None
    """``fp16``, or None for full precision."""
    use_safetensors: bool

    @property
    def is_whole(self) -> bool:
        return not any(map(file_flaw, self.paths))


def weight_files(folder: Path, part: str) -> WeightFiles:
    """The weights that a loader of ``part`` is to take; see ``_weight_names`` for the order.

    If no set is complete, the one that has at least one file, or the usual one.
    """
    place, sets = part_folder(folder, part), []
    for variant, file, index in _weight_names(part):
        paths: tuple[Path, ...] = (place / file,)
        if (place / index).is_file():
            paths = (place / index, *_shards(place / index))
        sets.append(WeightFiles(paths=paths, variant=variant, use_safetensors=file.endswith(".safetensors")))
    begun = (files for files in sets if files.paths[0].exists())
    return next((files for files in sets if files.is_whole), next(begun, sets[0]))


def model_flaw(place: Path, parts: Sequence[str]) -> str:
    """Why a checkpoint file, or the ``parts`` of a folder, can't be read; "" if they can."""
    if place.is_file():
        return file_flaw(place)
    flaws = {part: flaw for part in parts if (flaw := part_flaw(place, part))}
    return "lacks " + ", ".join(f"{part} ({flaw})" for part, flaw in flaws.items()) if flaws else ""


def file_flaw(file: Path) -> str:
    """Why a file is not what its name says; "" if it may be."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    if not size:
        return "is empty"
    if size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer; git lfs pull fetches what it stands for"
    if ".index" in file.suffixes and not _shards(file):
        return "names no shards"
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "np"):
                pass
        except SafetensorError as error:
            return f"is cut short, or no safetensors file ({str(error)[:200]})"
    return ""


def _weight_names(part: str) -> Iterator[tuple[str | None, str, str]]:
    """(variant, file, index of shards) of every set of weights, in the order of preference."""
    stems = ("model.safetensors", "pytorch_model.bin")
    if part not in (*TEXT_ENCODERS, *JUDGES):  # transformers' names
        stems = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    for variant in VARIANTS:
        for name, _, suffix in (stem.partition(".") for stem in stems):
            index = f"{name}.{suffix}.index{variant}.json"
            yield variant.removeprefix(".") or None, f"{name}{variant}.{suffix}", index


def wanted_files(files: Sequence[str], parts: Sequence[str]) -> list[str]:
    """The parts' descriptions, and of their weights the set that ``_weight_names`` prefers."""
    wanted = [file for file in files if file == "model_index.json"]
    for part in parts:
        within = inside(part)
        names = [Path(file).name for file in files if file == within + Path(file).name]
        chosen = [f for f in names if len(Path(f).suffixes) == 1 and f.endswith((".json", ".txt", ".model"))]
        for variant, file, index in () if part in DESCRIPTIONS else _weight_names(part):
            shards = [
                f
                for f in names
                if re.fullmatch(rf"{file.partition('.')[0]}\b.*-\d+-of-\d+\b.*{Path(file).suffix}", f)
                and (".fp16" in f) == bool(variant)
            ]
            if weights := [index, *shards] if index in names else [file] if file in names else []:
                chosen += weights
                break
        wanted += [within + name for name in chosen]
    return wanted


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index names; none if it can't be read."""
    try:
        return tuple(index.with_name(name) for name in sorted({*read_mapping(index)["weight_map"].values()}))
    except (ConfigError, KeyError, AttributeError, TypeError):
        return ()


def read_mapping(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: it is none.
    """
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {shown(content)}")
    level: list[Any] = [content]
    for _ in range(MOST_NESTED):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    if level:
        raise ConfigError(f"{file}: nested more than {MOST_NESTED} deep, as no model's file is")
    return content


def shown(value: Any) -> str:
    """A value of a file as a message shows it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
