"""Prompts: every plane of Unicode, lone surrogates, control characters, megabytes, things like code."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from functools import partial
from pathlib import Path
from random import Random

from fourdfy.config import ConfigError
from fourdfy.config_files import literal_override, read_layers, save_yaml
from fourdfy.launching.experiment import load_experiment
from fourdfy.launching.plan import print_plan
from fourdfy.terminal import PrintableFormatter, printable_lines
from tests.commands import CONFIGS
from tests.reliability.fuzzing import Case

ODD = (
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J", "\r\n", "\0", "\x7f", "\u202e", "\u2028",
    "\ufeff", "\ud800", "\udfff\ud800", "a\u0300" * 50, "\U0001f468\u200d\U0001f469",
    "../../../etc/passwd", "/etc/passwd", "~root", "$HOME", "${oc.env:HOME}", "\\${x}", "%s%n",
    "'; touch x; '", "$(touch x)", "`touch x`", "..", ".", "con", "a" * 300, "lib:", "lib:panda",
    "lib:" + "x_" * 500, "<|endoftext|>", "null", "[bold]x[/bold]", "{a: 1}", "#", "---", "a: b",
)  # fmt: skip


def draw(random: Random, place: Path) -> Case:
    pieces = [random.choice(ODD), _unicode(random), "a red cube", " "]
    prompt = "".join(random.choices(pieces, k=random.randint(1, 6)))
    if random.random() < 0.1:
        prompt = (prompt or "x") * (random.choice([10**5, 10**6, 10**7]) // max(1, len(prompt)))
    return Case(ascii(prompt[:80]), partial(_plan, prompt, place))


def _unicode(random: Random) -> str:
    plane = random.randrange(17)
    return "".join(chr(plane * 0x10000 + random.randrange(0x10000)) for _ in range(random.randint(1, 20)))


def _plan(prompt: str, place: Path) -> None:
    """``--check``, and what a trial's folder and config make of the prompt; all shown is printable."""
    shown, logged = io.StringIO(), logging.StreamHandler(io.StringIO())
    logged.setFormatter(PrintableFormatter())
    logging.getLogger("fourdfy").addHandler(logged)
    try:
        words = [literal_override("system.prompt_processor.prompt", prompt), f"exp_root_dir={place / 'out'}"]
        experiment = load_experiment([CONFIGS / "shapes_stage_1.yaml"], words)
        with contextlib.redirect_stdout(shown):
            print_plan([experiment])
    except ConfigError as error:
        shown.write(printable_lines(str(error)))
        _check_shown(shown.getvalue() + logged.stream.getvalue())
        raise
    finally:
        logging.getLogger("fourdfy").removeHandler(logged)
    _check_shown(shown.getvalue() + logged.stream.getvalue())
    assert experiment.trial_dir.resolve().is_relative_to((place / "out").resolve())
    assert len(os.fsencode(experiment.trial_dir.name)) < 200
    save_yaml(experiment.record(), place / "parsed.yaml")
    (layer,) = read_layers(place / "parsed.yaml")
    assert layer["system"]["prompt_processor"]["prompt"].value is not None


def _check_shown(text: str) -> None:
    raw = {character for character in text if not character.isprintable()} - {"\n"}
    assert not raw, f"raw characters were shown: {raw!r}"
    assert len(text) < 100_000, f"{len(text)} characters were shown"
