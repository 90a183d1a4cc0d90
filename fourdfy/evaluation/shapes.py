"""The command that trains a recipe on prompts of the shapes world and evaluates each scene:

python -m fourdfy.evaluation.shapes --prompt "a red cube spinning" --gpu 0 --json shapes.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import fourdfy
from fourdfy.callbacks.progress import ProgressLine
from fourdfy.callbacks.signals import FinishStep
from fourdfy.config import ConfigError
from fourdfy.config_files import CONFIGS
from fourdfy.devices import keep_freed_memory, on_device, select_device
from fourdfy.evaluation.report import Report, summary_tables, write_json
from fourdfy.evaluation.scenes import Render, evaluate_scene, scene_renderer
from fourdfy.shapes.prompts import Prompt, parse
from fourdfy.signals import StopSignals, stop_with_parent
from fourdfy.terminal import log_to_stderr

RECIPE = CONFIGS / "shapes.yaml"

DROP_OVERRIDES: dict[str, tuple[str, ...]] = {
    "multi_view": (
        "data.prob_multi_view=0",
        "stage_1.system.guidance.max_step_percent=0.98",
        'stage_1.system.prompt_processor.moments=["at the start"]',
        "stage_1.system.optimizer.params={guidance_single_view: {lr: 0.0001}}",
        "stage_2.system.guidance.guidance_scale=7.5",
        "stage_2.system.loss.lambda_vsd=1",
    ),
    "single_view": (
        "stage_2.data.prob_multi_view=1",
        "stage_2.system.optimizer.params={guidance_single_view: null}",
        "stage_3.data.single_view.prob_single_view_video=1",
    ),
    "video": ("stage_3.data.single_view.prob_single_view_video=0",),
}
"""The ``key=value`` overrides that switch off a prior of the recipe, and let another take its part."""


def train_prompt(
    prompt: Prompt,
    device: str,
    drop: str | None,
    overrides: Sequence[str],
    recipe: Path,
    stop: StopSignals,
) -> tuple[Render, dict[str, float]]:
    """Train a recipe of the shapes world on a prompt: the scene's renderer, and how long it took.

    That is ``seconds``, and the ``steps_per_second`` of the last stage.

    Args:
        device: "cuda" or "cpu".
        drop: the prior to leave out, a key of ``DROP_OVERRIDES``.
        overrides: further ``key=value``, after those of ``drop``.
    """
    began = time.perf_counter()
    tag = " ".join([prompt.text, *([f"without {drop}"] if drop else []), *recipe.stem.split("_")[1:]])
    given = [
        f"tag={tag}",
        f"system.prompt_processor.prompt={prompt.text}",
        *DROP_OVERRIDES.get(drop or "", ()),
    ]
    progress = ProgressLine()
    looking_on = [FinishStep(stop), progress]
    trial = fourdfy.train(recipe, [*given, *overrides], device=device, callbacks=looking_on, test=False)
    stop.check()
    pace = {"seconds": time.perf_counter() - began, "steps_per_second": progress.rate}
    return scene_renderer(trial.system), pace


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m fourdfy.evaluation.shapes``: train and evaluate prompts, one after the other."""
    parser = _parser()
    args = parser.parse_intermixed_args(argv)
    try:
        prompts = [parse(text) for text in args.prompt]
        results = Results(args.json, config=args.config.stem, drop=args.drop, overrides=args.overrides)
    except ValueError as error:
        parser.error(str(error))
    for override in args.overrides:
        if "=" not in override or override.startswith("="):
            parser.error(f"{override!r}: expected key=value, e.g. seed=1")

    log_to_stderr()
    rows = []
    try:
        device = select_device(args.gpu)
        if device == "cpu":
            keep_freed_memory()
        with StopSignals(lambda: "the same command continues") as stop, on_device(device):
            stop_with_parent()
            for prompt in prompts:
                render, pace = train_prompt(prompt, device, args.drop, args.overrides, args.config, stop)
                rows.append(results.add(evaluate_scene(prompt, render), pace))
    except ConfigError as error:
        parser.error(str(error))
    Console().print(*summary_tables(rows))
    return 0


class Results:
    """The results of a run, in a JSON file that is complete after every prompt.

    Rows of earlier commands stay in the file, so ablations can share one; the same prompt with
    the same recipe, drop and overrides replaces its own row.
    """

    def __init__(self, path: Path | None, *, config: str, drop: str | None, overrides: Sequence[str]) -> None:
        self._path = path
        self._settings = {"config": config, "drop": drop, "overrides": list(overrides)}
        self._rows: list[dict[str, Any]] = []
        if path is None or not path.exists():
            return
        try:
            self._rows = json.loads(path.read_text(encoding="utf-8"))
            for row in self._rows:
                self._key(row)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no results of this command; name another file") from error

    def add(self, report: Report, pace: dict[str, float]) -> dict[str, Any]:
        """Add the row of a prompt, write the file, and return the row."""
        row = asdict(report) | pace | self._settings
        self._rows = [other for other in self._rows if self._key(other) != self._key(row)] + [row]
        if self._path is not None:
            write_json(self._path, self._rows)
        return row

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["prompt"], row["config"], row["drop"], tuple(row["overrides"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fourdfy.evaluation.shapes",
        description="Train the shapes recipe on prompts and compare the scenes with the ground truth.",
    )
    parser.add_argument("--prompt", action="append", required=True, help='e.g. "a red cube spinning"')
    parser.add_argument(
        "--config", type=Path, default=RECIPE, metavar="YAML", help="the recipe (configs/shapes.yaml)"
    )
    parser.add_argument(
        "--gpu", metavar="ID", help="which GPU, or cpu (default: the first GPU, else the CPU)"
    )
    parser.add_argument("--drop", choices=sorted(DROP_OVERRIDES), help="leave one prior out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")
    return parser


if __name__ == "__main__":
    sys.exit(main())
