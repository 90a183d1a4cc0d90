"""Safetensors files: headers that lie about lengths, offsets, types and names; a model's and the cache's."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save

from fourdfy.priors.frozen import load_part
from fourdfy.prompts import base as prompts
from tests import tiny_models
from tests.reliability.fuzzing import Case

KEYS = ("encoder.conv_in.weight", "encoder.conv_in.bias", "decoder.conv_out.bias")


def draw(random: Random, place: Path) -> Case:
    whole, folder = place / "whole", place / "model"
    if not whole.exists():
        tiny_models.save_stable_diffusion(whole)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole / "vae", folder / "vae")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    if random.random() < 0.3:
        return _cached(random, place)
    name, content = _changed(random, weights.read_bytes(), KEYS)
    weights.write_bytes(content)

    def read() -> str:
        load_part(folder, "vae", "AutoencoderKL", dtype=torch.float32, device=torch.device("cpu"))
        return "loaded"

    return Case(f"model: {name}", read)


def _cached(random: Random, place: Path) -> Case:
    """An entry of the cache of text embeddings: it is computed anew, whatever it holds."""
    whole = save({prompts.KEY: torch.ones(3, 4)}, metadata=prompts._label("model", "text"))
    name, content = _changed(random, whole, (prompts.KEY, "__metadata__"))
    file = place / "entry.safetensors"
    file.write_bytes(content)

    def read() -> str:
        before, prompts._cache_file = prompts._cache_file, lambda *_: file
        try:
            return str(prompts.read_cached("model", "text"))
        finally:
            prompts._cache_file = before

    return Case(f"cache: {name}", read)


def _changed(random: Random, content: bytes, keys: tuple[str, ...]) -> tuple[str, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = random.choice(["length", "header", "cut", "flip", "entry", "entry", "entry"])
    if kind == "length":
        return kind, struct.pack("<Q", random.choice([0, 1, 2**31, 2**63, length + 1, length - 1])) + content[
            8:
        ]
    if kind == "cut":
        return kind, content[: random.randrange(len(content))]
    if kind == "flip":
        at = random.randrange(length + 8)
        return kind, content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]
    if kind == "header":
        text = random.choice(
            ["[]", "null", "{", "{}", "[" * 100_000, '{"a":' * 5000, '{"__metadata__": 3}', "\xff"]
        )
        return kind, _packed(text.encode("latin1"), data)
    values: list[Any] = [
        10**9,
        -1,
        0,
        None,
        [],
        {},
        "F32",
        [10**9],
        [10**9, 10**9],
        [0, 0],
        [5, 1],
        [0, 2**63],
        2**70,
    ]
    entry, what = (
        header.get(random.choice(keys), {}),
        random.choice(["shape", "data_offsets", "dtype", "new"]),
    )
    entry[what] = random.choice([*values, "F8_E4M3", "I64", "BOOL", "C64"])
    if random.random() < 0.2:
        header[random.choice(["../../evil", "\x1b[31m", "x" * 10_000])] = entry
    return f"{what}={entry[what]}", _packed(json.dumps(header).encode(), data)


def _packed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data
