"""What ``launch.py`` does in each of its modes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fourdfy.config_files import COMMAND_LINE, ConfigError
from fourdfy.launching.devices import select_device, use_device
from fourdfy.launching.experiment import Experiment, trial_of
from fourdfy.launching.plan import (
    check_files,
    check_groups,
    check_priors,
    fetch_models,
    find_models,
    print_plan,
    prompt_line,
)
from fourdfy.launching.recipe import Stage, load_recipe
from fourdfy.launching.signals import Stopped, StopSignals
from fourdfy.launching.trial import command_for, owned, prepare_trial, results_folder
from fourdfy.systems.base import System
from fourdfy.systems.checkpoint import checkpoint_file

logger = logging.getLogger(__name__)


def run(
    mode: str, config: Sequence[Path], overrides: Sequence[str], *, gpu: str | None, command: Sequence[str]
) -> None:
    """One mode of the command line, for a single experiment or a recipe of several.

    Args:
        gpu: see ``select_device``.
        command: the command line, for the trial folder.

    Raises:
        ConfigError: what the user gave does not work; says what would.
        Stopped: a signal ended the run early; what to type to go on was logged.
    """
    if mode == "fetch":  # whatever the prompt, the models are the same; so none need be given
        overrides = ["system.prompt_processor.prompt=any", *overrides]
    stages = load_recipe(config, overrides)
    experiments = [stage.experiment for stage in stages]
    if mode in ("check", "train") and len(stages) > 1 and all(e.cfg.resume for e in experiments):
        raise ConfigError("resume: a recipe goes on by itself; for one of its stages: stage_2.resume=...")
    if mode == "check":
        select_device(gpu)
        print_plan(experiments)
    elif mode == "fetch":
        fetch_models(experiments)
    elif mode == "train":
        from fourdfy.launching.closing import log_closing

        began, device = time.monotonic(), use_device(gpu)
        if experiments[0].prompt_source != COMMAND_LINE:
            logger.info("%s", prompt_line(experiments[0]))
        # Of the last stage too: hours later is no time to miss something.
        check_files(experiments)
        find_models(experiments)
        for experiment in experiments:
            check_priors(experiment)
            check_groups(experiment)
        for stage in stages:
            train_stage(stage, device=device, command=command)
        log_closing(stages, time.monotonic() - began, device)
    else:
        evaluate(mode, stages[-1], device=use_device(gpu))


def train_stage(stage: Stage, *, device: str, command: Sequence[str], test: bool = True) -> None:
    """Train a stage from where it stands, then render its test views; nothing if it is finished."""
    experiment, trial = stage.experiment, stage.experiment.trial_dir
    if stage.is_finished or (stage.is_trained and not test):
        logger.info("%s: finished already, in %s", stage.label, trial)
        return
    # Lightning takes seconds to import: not before there is something to run.
    from fourdfy.callbacks.curves import Curves
    from fourdfy.callbacks.last_checkpoint import LastCheckpoint
    from fourdfy.callbacks.progress import ProgressLine
    from fourdfy.launching.trainer import build_trainer
    from fourdfy.systems.lightning import LightningData, LightningSystem

    checkpoint = experiment.cfg.checkpoint
    curves = Curves(experiment)  # first: a checkpoint holds what it has not logged
    with owned(trial), StopSignals("the same command goes on") as stop:
        resume_from = stage.resume_from
        system = experiment.build_system().to(device)
        system.prepare(torch.device(device), resumed=resume_from is not None)
        module, data = LightningSystem(system), LightningData(experiment.build_data())
        _ = module.optimization  # with this all is built: only what can start leaves a folder
        prepare_trial(experiment, stage.files, command)
        if stage.count == 1:
            stop.advice = f"go on with: {command_for(trial)} --train"
        logger.info("%s: writing to %s", stage.label, trial)
        interval = checkpoint.interval(experiment.cfg.trainer.max_steps)
        last = LastCheckpoint(experiment.last_checkpoint, interval, stop, checkpoint.save_top_k)
        trainer = build_trainer(experiment, device, [curves, last, ProgressLine(stage.position)])
        trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
        if stop.received is not None:
            raise Stopped(128 + stop.received)
        if test:
            trainer.test(module, data, verbose=False, weights_only=True)
            stage.mark_finished()


def evaluate(mode: str, stage: Stage, *, device: str) -> None:
    """``--validate``, ``--test``, ``--export`` or ``--evaluate`` of the checkpoint that ``resume`` names,
    or of the last. Results go into that checkpoint's trial, unless the command line says where.
    """
    experiment = stage.experiment
    checkpoint = experiment.last_checkpoint
    if experiment.cfg.resume:
        checkpoint = checkpoint_file(experiment.cfg.resume)
        if not experiment.is_placed:
            experiment = replace(experiment, trial_dir=trial_of(checkpoint) or experiment.trial_dir)
    elif not checkpoint.exists():
        raise ConfigError(
            f"{stage.label}: no checkpoint in {checkpoint.parent}; train it first, or name what was trained: "
            "--trial DIR"
        )
    with StopSignals("the same command starts again"):
        system = experiment.load_system(device, checkpoint)
        results_folder(experiment.trial_dir)
        if mode == "evaluate":
            from fourdfy.evaluation.report import print_report
            from fourdfy.evaluation.scenes import evaluate_system

            prompt = experiment.cfg.system.prompt_processor.prompt
            print_report(evaluate_system(system, prompt, experiment.trial_dir))
            logger.info("written to %s", experiment.trial_dir / "save")
        elif mode == "export":
            export(system, experiment)
        else:
            render_views(mode, system, experiment, device)


def render_views(mode: str, system: System, experiment: Experiment, device: str) -> None:
    """``--validate`` or ``--test``: images and videos into ``save``."""
    from fourdfy.callbacks.progress import ProgressLine
    from fourdfy.launching.trainer import build_trainer
    from fourdfy.systems.lightning import LightningData, LightningSystem

    trainer = build_trainer(experiment, device, [ProgressLine(mode)])
    trainer.limit_val_batches = 1.0  # asked for, also where training has no validations
    loop = trainer.test if mode == "test" else trainer.validate
    loop(LightningSystem(system), LightningData(experiment.build_data()), verbose=False, weights_only=True)
    logger.info("written to %s", experiment.trial_dir / "save")


def export(system: System, experiment: Experiment) -> None:
    """``save/it{step}-export/``: what ``system.exporter`` makes of the scene."""
    data, dynamic = experiment.build_data(), experiment.plan.dynamic
    cameras = data.val_cameras(dynamic) | data.test_cameras(dynamic)
    folder = experiment.trial_dir / "save" / f"it{system.step}-export"
    try:
        files = system.export(folder, cameras)
    except OSError as error:
        raise ConfigError(f"{folder}: the export can't be written: {error}") from error
    for path in files:
        logger.info("%s  %s", path, _size(path))


def _size(path: Path) -> str:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.2f} MB"
