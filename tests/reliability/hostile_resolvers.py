"""``${...}`` in configs: secrets of the environment by every way, circles, references that multiply."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

from fourdfy.config_references import RESOLVERS
from fourdfy.launching.experiment import load_experiment
from tests.reliability.fuzzing import SECRET, Case

NAMES = ("SECRET_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")
KEYS = (
    "seed", "tag", "name", "description", "exp_root_dir", "resume", "data.single_view.width", "system.loss",
    "system.prompt_processor.prompt", "plugins", "plugin_path", "system.geometry", "trainer.max_steps",
)  # fmt: skip
WAYS = (
    "${oc.env:N}", "${oc.env:'N'}", "${ oc.env : N }", "${oc.env:N,x}", "${oc.decode:${oc.env:N}}", "$N/x",
    "${rmspace:${oc.env:N},_}", "${oc.create:{a:'${oc.env:N}'}}", "${basename:${oc.env:N}}", "~/$N", "${N}",
    "${oc.env:${oc.decode:N}}", "${oc.${oc.decode:env}:N}", "${add:a,${oc.env:N}}", "${mul:${oc.env:N},2}",
    "a ${oc.env:N} b", "${oc.select:'',${oc.env:N}}", "${oc.deprecated:tag}${oc.env:N}", "${oc.env:n}",
    "${idiv:${oc.env:N},0}", "${env:N}", "\\${oc.env:N}", "$$N", "${oc.env:,N}",
)  # fmt: skip
"""To the environment's variable N, some of which lead there."""
PIECES = (
    "${", "}", ":", ",", ".", "..", "[", "]", "'", "\\", "$", " ", "tag", "seed", "system", "0", "-1", "nan",
    "null", "${tag}", "${..seed}", "${system}", *(f"${{{name}:" for name in RESOLVERS),
    *(f"${{oc.{name}:" for name in ("decode", "create", "select", "deprecated", "dict.keys", "dict.values")),
)  # fmt: skip


def draw(random: Random, place: Path) -> Case:
    os.environ.update(dict.fromkeys(NAMES, SECRET))
    text = random.choice([_secret, _secret, _growing, _chain, _computed, _nonsense, _nonsense])(random)
    file, key = place / "config.yaml", random.choice(KEYS)
    prompt = ["system.prompt_processor.prompt=x"]
    if random.random() < 0.5 or "${" not in text:  # what a user types as a path may read any variable
        file.write_text("base: shapes_stage_1.yaml\n" + _nested(key, text))
        typed = [] if key.endswith("prompt") else prompt
    else:
        file.write_text("base: shapes_stage_1.yaml")
        typed = [*prompt, f"{key}={text}", f"description={text}"]
    return Case(f"{key}: {text}", lambda: load_experiment([file], typed).record())


def _nested(key: str, text: str) -> str:
    """YAML of a dotted key, the text quoted."""
    *outer, last = key.split(".")
    sections = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(outer))
    return f"{sections}{'  ' * len(outer)}{last}: '{text.replace(chr(39), chr(39) * 2)}'\n"


def _secret(random: Random) -> str:
    text = random.choice(WAYS).replace("N", random.choice(NAMES))
    for _ in range(random.choice([0, 0, 1, 2])):
        around = random.choice(["${oc.decode:'X'}", "${rmspace:X,_}", "x X", "${oc.create:[X]}"])
        text = around.replace("X", text)
    return text


def _growing(random: Random) -> str:
    """Arithmetic whose results grow."""
    text = random.choice(["x", "9" * 300, "[1,2]", "1e300", "${tag}", "${description}"])
    for _ in range(random.randint(1, 60)):
        if len(text) < 10_000:
            text = random.choice(["${mul:X,1000000000}", "${add:X,X}", "${rmspace:X,X}"]).replace("X", text)
    return text


def _chain(random: Random) -> str:
    """A text that multiplies, through the mapping that it is in."""
    return random.choice(["${system.geometry}", "${system}", "${data}", "${trainer}"]) * random.randint(
        2, 300
    )


def _computed(random: Random) -> str:
    names = ["${${oc.decode:tag}}", "${oc.select:description}", "${${tag}}"]
    return random.choice(names) * random.randint(1, 40)


def _nonsense(random: Random) -> str:
    return "".join(random.choices(PIECES, k=random.randint(1, 12)))
