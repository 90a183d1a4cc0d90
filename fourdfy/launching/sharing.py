"""What a user hands on of trials: ``share.html`` of an export, and ``--compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import fourdfy
from fourdfy.config_files import PROMPT, ConfigError, plain, read_layers
from fourdfy.evaluation.registry import directions
from fourdfy.files.atomic import write_whole
from fourdfy.files.images import VALIDATION_FPS, to_pixels
from fourdfy.launching.experiment import Experiment, trial_arguments
from fourdfy.launching.recipe import settings
from fourdfy.pages.clips import MAX_FRAMES, spread
from fourdfy.pages.compare import compare_page
from fourdfy.pages.settings import flat
from fourdfy.pages.share import share_page
from fourdfy.systems.base import System
from fourdfy.types import Cameras


def export_scene(system: System, experiment: Experiment, folder: Path) -> list[Path]:
    """Write ``it{step}-export/`` into a folder with ``system.exporter``, and a page that shows it.

    Raises:
        ConfigError: the exporter can't export this scene.
        WriteError: it can't be written.
    """
    data, dynamic = experiment.build_data(), experiment.plan.dynamic
    cameras = data.val_cameras(dynamic) | data.test_cameras(dynamic)
    folder /= f"it{system.step}-export"
    files = system.export(folder, cameras)
    return [*files, write_share(system, experiment, cameras, files, folder)]


def write_share(
    system: System,
    experiment: Experiment,
    cameras: Mapping[str, Cameras],
    exported: Sequence[Path],
    folder: Path,
) -> Path:
    """``share.html`` in a folder, with the first GLB that was exported, and one clip from the front, or a
    turn around a scene that does not move.

    Raises:
        WriteError: it can't be written.
    """
    cfg, dynamic = experiment.cfg, experiment.plan.dynamic
    asked = getattr(getattr(cfg.system, "exporter", None), "clip_seconds", None)
    clip = cameras["val_video" if dynamic else "test"]
    shown = (system.render(clip[i : i + 1]).comp_rgb for i in spread(len(clip), MAX_FRAMES))
    models = [path for path in exported if path.suffix == ".glb"]
    page = share_page(
        cfg.system.prompt or cfg.name,
        f"{cfg.name}, step {system.step}, seed {cfg.seed}, made with fourdfy {fourdfy.__version__}",
        settings(experiment.values),
        model=models[0].read_bytes() if models else None,
        frames=np.concatenate([to_pixels(frame) for frame in shown]),
        seconds=(dynamic and asked) or len(clip) / VALIDATION_FPS,
    )
    write_whole(folder / "share.html", page)
    return folder / "share.html"


def compare(folders: Sequence[Path], out: Path | None) -> Path:
    """Write ``compare.html`` of some trials into ``out``, or into the current folder.

    Raises:
        ConfigError: one is not a trial folder, or is there twice.
        WriteError: it can't be written.
    """
    trials = {}
    for given in folders:
        file, _ = trial_arguments(given, "--compare ")
        values = plain(read_layers(file)[-1])  # complete, and no code of plugins is run
        trials[file.absolute().parents[1]] = settings(values)
    if len(trials) < len(folders):
        raise ConfigError("--compare: a trial is there twice")
    page = (out or Path()) / "compare.html"
    prompts = [str(flat(of).get(PROMPT, "")) for of in trials.values()]
    write_whole(page, compare_page(trials, prompts, directions()))
    return page
