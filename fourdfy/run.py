"""What ``launch.py`` does in each of its modes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fourdfy.config import ConfigError
from fourdfy.experiment import Experiment
from fourdfy.plan import fetch_models, print_plan
from fourdfy.recipe import Stage, load_recipe
from fourdfy.systems.base import System
from fourdfy.systems.checkpoint import read_checkpoint
from fourdfy.trial import prepare_trial

logger = logging.getLogger(__name__)


class Stopped(SystemExit):
    """A signal ended the run after its step; ``last.ckpt`` is written."""


def run(
    mode: str, config: Sequence[Path], overrides: Sequence[str], *, device: str, command: Sequence[str]
) -> None:
    """One mode of the command line, for a single experiment or a recipe of several.

    Raises:
        ConfigError: what the user gave does not work; says what would.
        Stopped: a signal ended training early; the same command goes on from there.
    """
    if mode == "fetch":  # whatever the prompt, the models are the same; so none need be given
        overrides = ["system.prompt_processor.prompt=any", *overrides]
    stages = load_recipe(config, overrides)
    if mode == "check":
        print_plan([stage.experiment for stage in stages])
    elif mode == "fetch":
        fetch_models([stage.experiment for stage in stages])
    elif mode == "train":
        from fourdfy.closing import log_closing

        began = time.monotonic()
        for stage in stages:
            train_stage(stage, device=device, command=command)
        log_closing(stages, time.monotonic() - began, device)
    else:
        evaluate(mode, stages[-1].experiment, device=device)


def train_stage(stage: Stage, *, device: str, command: Sequence[str], test: bool = True) -> None:
    """Train a stage from where it stands, then render its test views; nothing if it is finished."""
    experiment = stage.experiment
    if stage.is_finished or (stage.is_trained and not test):
        logger.info("%s: finished already, in %s", stage.label, experiment.trial_dir)
        return
    # Lightning takes seconds to import: not before there is something to run.
    from fourdfy.callbacks.curves import Curves
    from fourdfy.callbacks.last_checkpoint import LastCheckpoint
    from fourdfy.callbacks.progress import ProgressLine
    from fourdfy.systems.lightning import LightningData, LightningSystem
    from fourdfy.trainer import build_trainer

    curves = Curves(experiment)  # first: a checkpoint holds what it has not logged
    prepare_trial(experiment, stage.files, command)
    logger.info("%s: writing to %s", stage.label, experiment.trial_dir)
    checkpoint = experiment.cfg.checkpoint
    interval = checkpoint.interval(experiment.cfg.trainer.max_steps)
    last = LastCheckpoint(experiment.last_checkpoint, interval, checkpoint.save_top_k)
    trainer = build_trainer(experiment, device, [curves, last, ProgressLine(stage.position)])
    system = experiment.build_system()
    system.prepare(torch.device(device), resumed=stage.resume_from is not None)
    module, data = LightningSystem(system), LightningData(experiment.build_data())
    trainer.fit(module, data, ckpt_path=stage.resume_from, weights_only=True)
    if last.signal is not None:
        logger.info("stopped at step %d; the same command goes on from there", trainer.global_step)
        raise Stopped(128 + last.signal)
    if test:
        trainer.test(module, data, verbose=False, weights_only=True)
        stage.mark_finished()


def evaluate(mode: str, experiment: Experiment, *, device: str) -> None:
    """``--validate``, ``--test``, ``--export`` or ``--evaluate`` of the checkpoint that ``resume`` names."""
    system = load_system(experiment, device, experiment.cfg.resume)
    if mode == "evaluate":
        from fourdfy.evaluation.report import print_report
        from fourdfy.evaluation.shapes import evaluate_system

        prompt = experiment.cfg.system.prompt_processor.prompt
        print_report(evaluate_system(system, prompt, experiment.trial_dir))
        logger.info("written to %s", experiment.trial_dir / "save")
        return
    if mode == "export":
        export(system, experiment)
        return
    from fourdfy.callbacks.progress import ProgressLine
    from fourdfy.systems.lightning import LightningData, LightningSystem
    from fourdfy.trainer import build_trainer

    trainer = build_trainer(experiment, device, [ProgressLine(mode)])
    loop = trainer.test if mode == "test" else trainer.validate
    loop(LightningSystem(system), LightningData(experiment.build_data()), verbose=False, weights_only=True)
    logger.info("written to %s", experiment.trial_dir / "save")


def export(system: System, experiment: Experiment) -> None:
    """``save/it{step}-export/``: what ``system.exporter`` makes of the scene."""
    data, dynamic = experiment.build_data(), experiment.plan.dynamic
    cameras = data.val_cameras(dynamic) | data.test_cameras(dynamic)
    folder = experiment.trial_dir / "save" / f"it{system.step}-export"
    for path in system.export(folder, cameras):
        logger.info("%s  %s", path, _size(path))


def load_system(experiment: Experiment, device: str, path: str | Path | None) -> System:
    """The system with the scene of a checkpoint, at the checkpoint's step."""
    if not path:
        raise ConfigError("resume: missing; give resume=<trial>/ckpts/last.ckpt")
    checkpoint = read_checkpoint(path)
    system = experiment.build_system()
    system.load_checkpoint(checkpoint)
    return system.to(device).eval()


def _size(path: Path) -> str:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.2f} MB"
