"""``--evaluate``: the numbers of a finished scene, with all that they depend on.

``it{step}-evaluation.json`` holds them under the metrics' names, the comparison with the ground truth where
there is one, and under ``protocol`` the cameras, networks with their commits, seed and versions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fourdfy import __version__
from fourdfy.callbacks.base import Callback, Run
from fourdfy.config_files import find_config
from fourdfy.evaluation.networks import Judge, revision_of
from fourdfy.evaluation.protocol import EvaluationConfig
from fourdfy.evaluation.registry import METRICS, Metric
from fourdfy.evaluation.report import Report, print_report, write_json
from fourdfy.evaluation.scenes import evaluate_scene, scene_renderer
from fourdfy.evaluation.views import CLIP_AZIMUTHS_DEG, Views
from fourdfy.files.prompt_lists import read_prompts
from fourdfy.priors.hub import resolve_model
from fourdfy.priors.model_folder import ModelNotFound
from fourdfy.systems.base import System
from fourdfy.terminal import printable
from fourdfy.types import Cameras

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "scikit-image")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The numbers of a scene."""

    prompt: str | None
    truth: Report | None
    """Its comparison with the ground truth; None if there is none."""
    numbers: Mapping[str, float | None]
    """Metric -> value; None for what is not defined for such a scene."""
    protocol: Mapping[str, Any]
    """What they depend on."""


def evaluate(
    system: System,
    camera: Cameras,
    cfg: EvaluationConfig,
    *,
    prompt: str | None,
    learned: bool,
    dynamic: bool,
    seed: int,
) -> Judgement:
    """Judge a scene.

    Args:
        learned: whether there is a ground truth; see ``Experiment.learned``.
        camera: one of its test views, whose distance and field of view those of the protocol have.

    Raises:
        ModelNotFound: a network of the metrics was not found; nothing was computed. Says what to type.
        ConfigError: the list of captions can't be read, or a metric needs a prompt, and there is none.
    """
    metrics = cfg.chosen(prompt, learned)
    folders = find_networks(cfg, prompt, learned)
    needs_captions = any(entry.name == "clip_r_precision" for entry in metrics)
    file = find_config(cfg.captions)
    captions = read_prompts(file, "evaluation.captions") if needs_captions else []
    views = views_of(system, camera, cfg, prompt=prompt or "", dynamic=dynamic, captions=captions)
    render = scene_renderer(system)
    report = evaluate_scene(prompt, render, device=system.device) if prompt and learned else None
    numbers = measured(views, metrics)
    protocol = {
        "elevation_deg": cfg.elevation,
        "azimuths_deg": f"{cfg.views}, evenly from 0",
        "clip_azimuths_deg": CLIP_AZIMUTHS_DEG,
        "clip_frames": cfg.frames,
        "distance": float(camera.distances[0]),
        "fovy_deg": float(camera.fovy_deg[0]),
        "pixels": cfg.size,
        "networks": {
            part: {"model": getattr(cfg, part), "commit": revision_of(folder)}
            for part, folder in folders.items()
        },
        "captions": {"file": cfg.captions, "count": len(captions)},
        "step": system.step,
        "seed": seed,
        "versions": {"fourdfy": __version__} | {name: version(name) for name in PACKAGES},
    }
    return Judgement(prompt=prompt, truth=report, numbers=numbers, protocol=protocol)


def find_networks(cfg: EvaluationConfig, prompt: str | None, learned: bool) -> dict[str, Path]:
    """Part -> folder of every network that the metrics need, fetched if necessary.

    Raises:
        ModelNotFound: one can't be found; says what to type.
    """
    try:
        return {part: resolve_model(name, (part,)) for part, name in cfg.models(prompt, learned).items()}
    except ModelNotFound as error:
        others = ",".join(entry.name for entry in cfg.measurable().values() if not entry.needs)
        raise ModelNotFound(
            f"{with_fetch(error)}\nor do without it:  evaluation.metrics=[{others}]"
        ) from error


def with_fetch(error: ModelNotFound) -> str:
    """What to type, with the setting for which ``--fetch`` fetches these networks too."""
    return f"{error} evaluation.after_training=true" if str(error).endswith(" --fetch") else str(error)


def views_of(
    system: System, camera: Cameras, cfg: EvaluationConfig, *, prompt: str, dynamic: bool, **given: Any
) -> Views:
    """The views of a scene; see ``evaluate``.

    Args:
        given: more of ``Views``' arguments.
    """

    @cache
    def networks(part: str) -> Judge:
        return Judge(getattr(cfg, part), part, system.device)

    return Views(
        system.render,
        cfg,
        prompt=prompt,
        distance=float(camera.distances[0]),
        fovy_deg=float(camera.fovy_deg[0]),
        dynamic=dynamic,
        device=system.device,
        networks=networks,
        **given,
    )


def measured(views: Views, metrics: Iterable[Metric]) -> dict[str, float | None]:
    """Metric -> value; None for what is not defined for such a scene, or is not a finite number."""
    found = {}
    for entry in metrics:
        assert entry.measure
        logger.info("%s ...", entry.name)
        value = entry.measure(views)
        found[entry.name] = None if value is None or not math.isfinite(value) else value
    return found


def write_numbers(found: Judgement, folder: Path) -> Path:
    """As ``it{step}-evaluation.json``; gives the file."""
    file = folder / f"it{found.protocol['step']}-evaluation.json"
    truth = asdict(found.truth) if found.truth else {}
    content = {"prompt": found.prompt, **truth, **found.numbers, "protocol": found.protocol}
    write_json(file, content)
    return file


def print_numbers(found: Judgement) -> None:
    """On the terminal."""
    if found.truth:
        print_report(found.truth)
    table = Table("metric", "better", "value", title=None if found.truth else printable(found.prompt or ""))
    for name, value in found.numbers.items():
        table.add_row(name, METRICS[name].best, "-" if value is None else f"{value:.3f}")
    Console().print(table)


class Evaluate(Callback):
    """Writes the report of a scene when its test views have been rendered; see ``evaluate``."""

    def __init__(self, cfg: EvaluationConfig, folder: Path, **scene: Any) -> None:
        self.evaluation, self.folder, self.scene = cfg, folder, scene

    def after_test(self, run: Run) -> None:
        camera = run.data.test_cameras(self.scene["dynamic"])["test"]
        write_numbers(evaluate(run.system, camera, self.evaluation, **self.scene), self.folder)
