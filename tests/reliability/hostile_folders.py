"""Model folders: whole JSON files and single keys replaced, code that a file names, pickles for weights."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from fourdfy.priors.base import Prior
from fourdfy.prompts.base import PromptProcessor
from fourdfy.registry import find
from fourdfy.systems.fourdfy import _errors_of
from tests import tiny_models
from tests.reliability.fuzzing import PLANTED, Case

CPU = torch.device("cpu")
FAMILIES: dict[str, tuple[Callable[[Path], Path], int]] = {
    "stable-diffusion": (tiny_models.save_stable_diffusion, 1),
    "mvdream": (tiny_models.save_multi_view, 4),
    "zeroscope": (tiny_models.save_zeroscope, 2),
    "videocrafter": (tiny_models.save_videocrafter2, 2),
}
"""Prior -> what writes its model, and how many frames it takes together."""
VALUES = (
    10**9, 10**30, 1e308, float("nan"), 0, -1, 0.5, None, True, "x", "x" * 100_000, [], {}, [10**9] * 3,
    [[[[]]]], [0] * 100_000, {"a": {"b": None}}, "../../../etc/passwd", "os.system", "\ud800\x1b[31m",
)  # fmt: skip
CONTENTS = (
    "[1]", "null", "3", '"x"', "", "{}", '{"a"', "\xff\0", '{"a":' + "1" * 5000 + "}", "[" * 100_000,
    '{"a":' * 100_000, '{"a":' + "[" * 900 + "]" * 900 + "}", '{"a":' + "[" * 40 + "]" * 40 + "}", "NaN",
)  # fmt: skip


def draw(random: Random, place: Path) -> Case:
    family = random.choice(list(FAMILIES))
    whole, folder = place / "whole" / family, place / family
    if not whole.exists():
        FAMILIES[family][0](whole)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder, copy_function=os.link)
    change = random.choice([*[_one_key] * 8, *[_whole_file] * 3, _named_code, _pickle, _bytes])
    file = random.choice([file for file in sorted(folder.rglob("*.*")) if file.suffix in (".json", ".txt")])
    name = f"{family}/{file.relative_to(folder)}: {change(random, file, place / PLANTED)}"
    if file.parent.name in ("tokenizer", "text_encoder"):
        return Case(name, lambda: _read_prompt(folder))
    return Case(name, lambda: _use_prior(family, folder))


def _replace(file: Path, content: bytes) -> None:
    """The files are links to those of the whole model."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def _one_key(random: Random, file: Path, planted: Path) -> str:
    if file.suffix != ".json":
        return _bytes(random, file, planted)
    values = json.loads(file.read_text())
    key, value = random.choice(list(values)), random.choice(VALUES)
    if random.random() < 0.1:
        del values[key]
    else:
        values[key] = value
    _replace(file, json.dumps(values).encode())
    return f"{key}={str(value)[:40]}"


def _whole_file(random: Random, file: Path, planted: Path) -> str:
    content = random.choice(CONTENTS)
    _replace(file, content.encode("latin1"))
    return content[:40]


def _named_code(random: Random, file: Path, planted: Path) -> str:
    """Custom code as transformers and diffusers would take it from a hub's folder."""
    for place in (file.parent, file.parents[1]):
        (place / "evil.py").write_text(f"open({str(planted)!r}, 'w')\nclass Evil: pass\n")
    values = json.loads(file.read_text()) if file.suffix == ".json" else {}
    keys = random.choice(
        [
            {"auto_map": dict.fromkeys(("AutoModel", "AutoTokenizer", "AutoConfig"), "evil.Evil")},
            {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "trust_remote_code": True},
            {"_class_name": ["evil", "Evil"], "custom_pipeline": "evil"},
            {"architectures": ["evil.Evil"], "model_type": "evil", "tokenizer_class": "evil.Evil"},
            {"quantization_config": {"quant_method": "evil.Evil"}, "_module": "evil"},
        ]
    )
    _replace(file, json.dumps(values | keys).encode())
    return f"{keys}"


def _pickle(random: Random, file: Path, planted: Path) -> str:
    """A pickle that calls something, in place of a network's weights, under every name that may be read."""
    for weights in file.parent.glob("*.safetensors"):
        weights.unlink()
    for stem in ("pytorch_model", "diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            torch.save({"w": _Call(planted)}, file.parent / f"{stem}{variant}.bin")
            (file.parent / f"{stem}{variant}.pt").write_bytes(pickle.dumps(_Call(planted)))
    return "pickles"


class _Call:
    def __init__(self, planted: Path) -> None:
        self.planted = planted

    def __reduce__(self):
        return open, (str(self.planted), "w")


def _bytes(random: Random, file: Path, planted: Path) -> str:
    content = bytearray(file.read_bytes())
    for _ in range(random.randint(1, 5)):
        content[random.randrange(len(content))] = random.randrange(256)
    _replace(file, bytes(content[: random.choice([None, len(content) // 2])]))
    return "bytes"


def _use_prior(family: str, folder: Path) -> None:
    """What ``--check`` reads, what training loads, and one prediction."""
    count, sizes = FAMILIES[family][1], dict.fromkeys(("height", "width"))
    cfg = find(family, Prior).Config(pretrained_model_name_or_path=str(folder), **sizes)
    cfg.check_models()
    with _errors_of("guidance"):
        cfg.check_text_encoder(str(folder))
        prior = cfg.build(device=CPU)
    generator = torch.Generator().manual_seed(0)
    latents = prior.encode(torch.rand(count, 32, 32, 3, generator=generator), count, generator)
    inputs = [latents, torch.full((len(latents),), 10), torch.zeros(len(latents), 77, tiny_models.TEXT_WIDTH)]
    prior.denoise(*inputs, *([torch.zeros(len(latents), 16)] if family == "mvdream" else []))


def _read_prompt(folder: Path) -> None:
    kind = find("stable-diffusion-prompt-processor", PromptProcessor)
    prompts = kind.Config(prompt="a cube", pretrained_model_name_or_path=str(folder), use_cache=False).build()
    with _errors_of("prompt_processor"):
        prompts.check_texts()
        prompts.embeddings(CPU)
