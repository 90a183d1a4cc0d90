"""What a user hands on of trials: ``share.html`` of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import fourdfy
from fourdfy.files.atomic import write_whole
from fourdfy.files.images import VALIDATION_FPS, to_pixels
from fourdfy.launching.experiment import Experiment
from fourdfy.launching.recipe import settings
from fourdfy.pages.clips import MAX_FRAMES, spread
from fourdfy.pages.share import share_page
from fourdfy.systems.base import System
from fourdfy.types import Cameras


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
    clip = cameras["val_video" if dynamic else "test"]
    shown = (system.render(clip[i : i + 1]).comp_rgb for i in spread(len(clip), MAX_FRAMES))
    models = [path for path in exported if path.suffix == ".glb"]
    page = share_page(
        cfg.system.prompt or cfg.name,
        f"{cfg.name}, step {system.step}, seed {cfg.seed}, made with fourdfy {fourdfy.__version__}",
        settings(experiment.values),
        model=models[0].read_bytes() if models else None,
        frames=np.concatenate([to_pixels(frame) for frame in shown]),
        seconds=len(clip) / VALIDATION_FPS,
    )
    write_whole(folder / "share.html", page)
    return folder / "share.html"
