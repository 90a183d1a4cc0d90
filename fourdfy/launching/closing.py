"""The last lines of a run: where the video is, how good the scene is, and what to type next."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fourdfy.files.atomic import by_product, whole_file
from fourdfy.launching.experiment import Experiment
from fourdfy.launching.recipe import Stage
from fourdfy.launching.reports import write_report
from fourdfy.launching.trial import command_for
from fourdfy.systems.checkpoint import step_of

if TYPE_CHECKING:
    from fourdfy.evaluation.scenes import Render

logger = logging.getLogger(__name__)


def log_closing(stages: Sequence[Stage], seconds: float, device: str, missing: Collection[str]) -> None:
    """Log one record after the last stage of ``stages`` has rendered its test views.

    A recipe's last video is copied to ``exp_root_dir/<tag>/result.mp4``, beside its stages.

    Args:
        missing: by-products that could not be written.
    """
    trial = stages[-1].experiment.trial_dir
    video = _video(trial)
    if video and len(stages) > 1 and video.is_file():
        video = _copy(video, trial.parents[1] / trial.name / "result.mp4")
    rows = [("video", str(video or "none could be written; --test renders it again"))]
    scores = None
    with by_product("scores"):
        scores = _scores(stages[-1], device)
    if scores:
        rows.append(("scores", scores))
    if missing:
        rows.append(("missing", f"{', '.join(missing)}; the warnings say why"))
    launch = command_for(trial)
    rows += [
        ("next", f"{launch} --export"),
        ("", f"{launch} {'--evaluate' if scores else '--export system.exporter_type=video-exporter'}"),
    ]
    lines = "\n".join(f"  {name:<8}{text}" for name, text in rows)
    logger.info("done in %d min %d s\n%s", *divmod(round(seconds), 60), lines)


def _video(trial: Path) -> Path | None:
    """The test video of the last step that has one, or the folder of its frames; None if there is neither."""
    found = [(re.fullmatch(r"it(\d+)-test(\.mp4)?", p.name), p) for p in (trial / "save").glob("it*-test*")]
    views = [(int(match[1]), bool(match[2]), path) for match, path in found if match]
    return max(views)[-1] if views else None


def _copy(video: Path, target: Path) -> Path:
    with by_product(target.name):
        with whole_file(target) as half_written:
            shutil.copyfile(video, half_written)
        return target
    return video


def _scores(stage: Stage, device: str) -> str | None:
    """One line that compares a moving scene with the ground truth; None if there is no ground truth."""
    experiment = stage.experiment
    if not (experiment.learned and experiment.plan.dynamic):
        return None
    from fourdfy.evaluation.report import brief, read_report
    from fourdfy.evaluation.scenes import evaluate_system

    checkpoint, save = experiment.last_checkpoint, experiment.trial_dir / "save"
    file = save / f"it{step_of(checkpoint)}-evaluation.json"
    # If it is of this scene, it may say more.
    if file.is_file() and file.stat().st_mtime >= checkpoint.stat().st_mtime:
        return brief(read_report(file))
    system = experiment.load_system(device, checkpoint)
    found = evaluate_system(system, experiment.cfg.system.prompt, save)
    write_report(experiment, system)  # again, with the scores
    return brief(found)


def ground_truth_of(experiment: Experiment) -> Render | None:
    """The true scene of the prompt as a renderer; None if nobody knows it."""
    if not experiment.learned:
        return None
    from fourdfy.evaluation.scenes import ground_truth
    from fourdfy.shapes.prompts import parse

    return ground_truth(parse(experiment.cfg.system.prompt))
