"""The modes of ``launch.py``: what ``fourdfy.train`` and ``fourdfy.load`` do, with signals, a progress line
and closing lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fourdfy.callbacks.base import Run
from fourdfy.callbacks.signals import FinishStep
from fourdfy.config_files import COMMAND_LINE, PROMPT, ConfigError
from fourdfy.devices import keep_freed_memory, on_device, select_device, select_devices
from fourdfy.files.atomic import WriteError, check_writable, losses_noted, remove_leftovers
from fourdfy.launching.experiment import PARSED, Experiment, as_trained, trial_of
from fourdfy.launching.plan import check_run, fetch_models, print_plan, prompt_line
from fourdfy.launching.recipe import Stage, load_recipe
from fourdfy.launching.reports import write_report
from fourdfy.launching.train import configured, import_trainer, train_stages
from fourdfy.launching.trial import command_for
from fourdfy.signals import StopSignals
from fourdfy.systems.base import System
from fourdfy.systems.checkpoint import checkpoint_file, has_checkpoint, step_of

logger = logging.getLogger(__name__)


def run(
    mode: str,
    config: Sequence[Path],
    overrides: Sequence[str],
    *,
    gpu: str | None,
    command: Sequence[str],
    stop: StopSignals,
    out: Path | None = None,
    first: int | None = None,
) -> None:
    """One mode of the command line, for a single experiment or a recipe of several.

    Args:
        gpu: see ``select_device``.
        command: the command line, for the trial folder.
        stop: the signals that end the run.
        out: where results of an evaluation go instead.
        first: train only so many stages of a recipe.

    Raises:
        ConfigError: the user's input does not work; says what would.
        Stopped: a signal ended the run early; ``stop.advice`` says how to continue.
    """
    try:
        stages = load_recipe(config, overrides)
    except ConfigError as error:
        if mode != "fetch" or f"{PROMPT}: missing" not in str(error):
            raise
        stages = load_recipe(config, [f"{PROMPT}=any", *overrides])  # the models hardly depend on it
    experiments = [stage.experiment for stage in stages]
    if mode == "fetch":
        return fetch_models(experiments)
    devices = select_devices(gpu) if mode in ("train", "check") else [select_device(gpu)]
    device = devices[0]
    if mode == "check":
        return print_plan(experiments, len(devices))
    if device == "cpu" and gpu is None:
        logger.info("no GPU found: running on the CPU")
    if device == "cpu":
        keep_freed_memory()
    if mode == "train":
        if first and first > len(stages):
            raise ConfigError(f"--stages {first}: {config[0]} has {len(stages)}")
        return train(stages[:first], devices, command, stop)
    with on_device(device):
        if mode == "view":
            view(stages[-1], device, stop)
        else:
            evaluate(mode, stages[-1], device=device, out=out)


def train(stages: Sequence[Stage], devices: Sequence[str], command: Sequence[str], stop: StopSignals) -> None:
    """``--train``: train every stage from where it stands, and render its test views."""
    from fourdfy.callbacks.progress import ProgressLine
    from fourdfy.launching.closing import log_closing

    began, first = time.monotonic(), stages[0].experiment
    if first.prompt_source != COMMAND_LINE:
        logger.info("%s", prompt_line(first))
    check_run([stage.experiment for stage in stages], devices[0], len(devices))

    def advice() -> str:
        if len(stages) > 1 or not (first.trial_dir / PARSED).exists():
            return "the same command continues"
        return f"continue with: {command_for(first.trial_dir)} --train"

    stop.advice = advice
    with losses_noted() as missing:
        callbacks = [FinishStep(stop), ProgressLine()]
        last, stopped = train_stages(stages, devices=devices, command=command, callbacks=callbacks)
        stop.check()
        if stopped:
            logger.info("%s: a callback stopped it; %s", last.label, advice())
            return
        with on_device(devices[0]):
            log_closing(stages, time.monotonic() - began, devices[0], missing)


def evaluate(mode: str, stage: Stage, *, device: str, out: Path | None = None) -> None:
    """``--validate``, ``--test``, ``--export`` or ``--evaluate`` of the checkpoint that ``resume`` names,
    or of the last. Results go into ``out``, else into that checkpoint's trial, unless the command line says
    where.

    Raises:
        ConfigError: there is no such checkpoint, or results can't be written.
    """
    experiment, system = load(stage, device)
    written = folder = out or experiment.trial_dir / "save"
    try:
        check_writable(folder)
        remove_leftovers(folder)
        trained = as_trained(experiment) if out is None else experiment
        if mode == "evaluate":
            if trained.cfg.system.prompt != experiment.cfg.system.prompt:
                raise ConfigError(
                    f"the scene was trained for {trained.cfg.system.prompt!r}, and its folder holds the "
                    "scores for that; to judge it by another prompt, say where they go: --out DIR"
                )
            from fourdfy.evaluation.judge import evaluate as judged
            from fourdfy.evaluation.judge import print_numbers, write_numbers

            camera = experiment.build_data().test_cameras(experiment.plan.dynamic)["test"]
            found = judged(system, camera, experiment.cfg.evaluation, **experiment.judged)
            written = write_numbers(found, folder)
            print_numbers(found)
        elif mode == "export":
            export(system, experiment, folder)
        else:
            render_views(mode, system, experiment, folder, device)
        last = experiment.last_checkpoint
        is_last = not has_checkpoint(last) or step_of(last) == system.step
        if out is None and mode != "export" and is_last:
            write_report(trained, system)
    except WriteError as error:
        raise ConfigError(f"{error}; results can go elsewhere: --out DIR") from error
    logger.info("written to %s", written)


def load(stage: Stage, device: str) -> tuple[Experiment, System]:
    """The scene of the checkpoint that ``resume`` names, or of the last, and the experiment in its trial.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    experiment = stage.experiment
    checkpoint = experiment.last_checkpoint
    if experiment.cfg.resume:
        checkpoint = checkpoint_file(experiment.cfg.resume)
        if not experiment.is_placed:
            experiment = replace(experiment, trial_dir=trial_of(checkpoint) or experiment.trial_dir)
    elif not has_checkpoint(checkpoint):
        trial = experiment.trial_dir
        is_begun = (trial / PARSED).exists()
        advice = f": {command_for(trial)} --train" if is_begun else ", or name what was trained: --trial DIR"
        raise ConfigError(f"{stage.label}: no checkpoint in {checkpoint.parent}; train it first{advice}")
    return experiment, experiment.load_system(device, checkpoint)


def view(stage: Stage, device: str, stop: StopSignals) -> None:
    """``--view``: show a trained scene on a page until a signal comes, which is its ordinary end.

    Raises:
        ConfigError: there is no checkpoint, or the page can't be opened.
    """
    from fourdfy.launching.train import viewer_of
    from fourdfy.viewing.viewer import show_scene

    experiment, system = load(stage, device)
    run = Run(
        system=system,
        data=experiment.build_data(),
        folder=experiment.trial_dir,
        label=experiment.cfg.name,
        max_steps=system.step,
        is_asked_to_stop=lambda: stop.received is not None,
    )
    stop.deferred = True
    show_scene(viewer_of(experiment), run)
    stop.received = None


def render_views(mode: str, system: System, experiment: Experiment, folder: Path, device: str) -> None:
    """``--validate`` or ``--test``: write images and videos."""
    from fourdfy.callbacks.progress import ProgressLine
    from fourdfy.callbacks.renders import SaveRenders
    from fourdfy.callbacks.scene_watch import SceneWatch

    # It was asked for, even if training has no validations.
    cfg = replace(experiment.cfg.trainer, val_check_interval=1, limit_val_batches=None)
    looking_on = {
        "progress": ProgressLine(),
        "renders": SaveRenders(folder),
        "watch": SceneWatch(),
        **configured(cfg),
    }
    run = Run(
        system=system,
        data=experiment.build_data(),
        folder=experiment.trial_dir,
        label=mode,
        max_steps=cfg.max_steps,
    )
    trainer = import_trainer()(cfg, run, looking_on, device=device)
    trainer.test() if mode == "test" else trainer.validate()


def export(system: System, experiment: Experiment, folder: Path) -> None:
    """Write ``it{step}-export/``, and say what is in it."""
    from fourdfy.launching.sharing import export_scene

    for path in export_scene(system, experiment, folder):
        logger.info("%s  %s", path, _size(path))


def _size(path: Path) -> str:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.2f} MB"
