"""Training and loading from Python: ``fourdfy.train`` and ``fourdfy.load``.

Nothing here handles signals, configures logging or writes to the terminal; that is the command line's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fourdfy.callbacks.base import Callback, Run
from fourdfy.config_files import PROMPT, ConfigError, literal_override
from fourdfy.devices import by_torchrun, on_device, select_device, select_devices
from fourdfy.files.atomic import losses_noted, remove_leftovers
from fourdfy.launching.closing import ground_truth_of
from fourdfy.launching.experiment import (
    Experiment,
    ExperimentConfig,
    TrainerConfig,
    load_experiment,
    trial_arguments,
)
from fourdfy.launching.plan import check_run
from fourdfy.launching.ranks import as_ranks
from fourdfy.launching.recipe import Stage, load_recipe
from fourdfy.launching.reports import Reports, make_up_for_report
from fourdfy.launching.trial import owned, prepare_trial
from fourdfy.ops.ranks import largest, of_first_rank, ranks
from fourdfy.systems.base import System
from fourdfy.systems.checkpoint import read_checkpoint, scene_hash, step_of, tensor_bytes
from fourdfy.systems.learning_rates import continued
from fourdfy.types import Cameras, RenderOutput

if TYPE_CHECKING:
    from fourdfy.launching.lightning import Trainer
    from fourdfy.viewing.viewer import Viewer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A trained scene, ready to be rendered."""

    folder: Path
    config: ExperimentConfig
    system: System
    """At the checkpoint's step, on its device."""

    def render(self, cameras: Cameras) -> RenderOutput:
        """Render frames for evaluation; see ``System.render``."""
        with on_device(str(self.system.device)):
            return self.system.render(cameras)


def train(
    config: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    prompt: str | None = None,
    device: str | None = None,
    callbacks: Sequence[Callback] = (),
    test: bool = True,
) -> Trial:
    """Train an experiment, or all stages of a recipe; finished stages are not trained again.

    Args:
        config: the name or file of a config, or several, merged left to right.
        overrides: ``key=value``, as on the command line.
        prompt: the prompt, taken literally.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None is the first GPU, else the CPU. Several, as in ``0,1``,
            compute each step together: the script is started again for each, up to the end of this call.
        callbacks: called in every stage, in addition to those of ``trainer.callbacks``.
        test: also render the test views of every stage.

    Returns:
        The last stage, or the one in which a callback stopped the run.

    Raises:
        ConfigError: the input does not work; says what would.
        FloatingPointError: training diverged.
    """
    _check_callbacks(callbacks)
    configs = [config] if isinstance(config, str | Path) else list(config)
    given = [*([] if prompt is None else [literal_override(PROMPT, prompt)]), *overrides]
    devices = select_devices(device, "device=")
    stages = load_recipe(configs, given)
    check_run([stage.experiment for stage in stages], devices[0], len(devices))
    named = [word for file in configs for word in ("--config", str(file))]
    command = ["fourdfy", *named, "--train", *given]
    with losses_noted():
        last, _ = train_stages(stages, devices=devices, command=command, callbacks=callbacks, test=test)
    return load(last.experiment.trial_dir, devices[0])


def load(trial: str | Path, device: str | None = None) -> Trial:
    """The scene of a trial folder's last checkpoint.

    Args:
        device: as for ``train``.

    Raises:
        ConfigError: it is not a trial folder, or has no checkpoint.
    """
    device = select_device(device, "device=")
    file, resume = trial_arguments(Path(trial), "trial=")
    experiment = load_experiment([file], resume)
    with on_device(device):
        system = experiment.load_system(device, experiment.last_checkpoint)
    return Trial(experiment.trial_dir, experiment.cfg, system)


def _check_callbacks(given: Sequence[object]) -> None:
    if wrong := [each for each in given if not isinstance(each, Callback)]:
        raise ConfigError(f"callbacks: expected instances of Callback, e.g. [MyCallback()], got {wrong[0]!r}")


def train_stages(
    stages: Sequence[Stage],
    *,
    devices: Sequence[str],
    command: Sequence[str],
    callbacks: Sequence[Callback],
    test: bool = True,
) -> tuple[Stage, bool]:
    """Train the stages one after the other; returns the last that started, and whether a callback stopped it.

    Args:
        devices: several compute each step together; see ``launching.ranks``.
        command: the command line, for the trial folders.
    """
    minutes = stages[0].experiment.cfg.trainer.rank_timeout_minutes
    if len(devices) > 1 or by_torchrun():
        import_trainer()
    with as_ranks(devices, minutes) as device:
        if ranks().is_first:
            for stage in stages:
                stage.follow_weights(begun=False)  # before anything is trained
        for stage in stages:
            with _claimed(stage, device, test) if ranks().is_first else nullcontext() as found:
                start = of_first_rank(found)
                if start is not None and not _train_stage(stage, start, device, command, callbacks, test):
                    return stage, True
    return stage, False


@dataclass(frozen=True)
class Start:
    """From where a stage is trained, as the first rank finds it."""

    resume_from: Path | None
    weights: str | None
    """``system.weights``; a timestamp in it is the first rank's."""
    validates: bool
    """Whether a validation is to be made up for."""


@contextmanager
def _claimed(stage: Stage, device: str, test: bool) -> Iterator[Start | None]:
    """Own a stage's folder, and only then see how far it is, for another process may have just trained it;
    None if it is finished, whose folder may be read-only."""
    stage.follow_weights()
    remove_leftovers(stage.experiment.trial_dir)
    if not _is_over(stage, test):
        with owned(stage.experiment.trial_dir):
            if not _is_over(stage, test):
                yield Start(stage.resume_from, stage.experiment.cfg.system.weights, stage.lacks_validation)
                return
    logger.info("%s: %s", stage.label, _finished(stage))
    make_up_for_report(stage.experiment, device)
    yield None


def _is_over(stage: Stage, test: bool) -> bool:
    return stage.is_finished or (stage.is_trained and not test)


def _finished(stage: Stage) -> str:
    """That a stage is finished, and how a given ``resume=`` could go on."""
    line, cfg = f"finished already, in {stage.experiment.trial_dir}", stage.experiment.cfg
    if not cfg.resume:
        return line
    prefix = f"stage_{stage.number}." if stage.count > 1 else ""
    step = step_of(cfg.resume)
    return f"{line}: step {step} is its last; to train on, set {prefix}trainer.max_steps to more than {step}"


def _train_stage(
    stage: Stage, start: Start, device: str, command: Sequence[str], callbacks: Sequence[Callback], test: bool
) -> bool:
    """Train a stage from where it stands, then render its test views; False if it was stopped.

    Of several ranks, the first one alone writes files and renders views.
    """
    # Lightning and TensorBoard take seconds to import, so this waits until there is something to run.
    from fourdfy.callbacks.curves import Curves
    from fourdfy.callbacks.last_checkpoint import LastCheckpoint
    from fourdfy.callbacks.renders import SaveRenders
    from fourdfy.callbacks.scene_watch import SceneWatch

    Trainer = import_trainer()
    experiment, folder = stage.experiment, stage.experiment.trial_dir
    cfg, checkpoints = experiment.cfg.trainer, experiment.cfg.checkpoint
    curves = Curves(folder, cfg.log_every_n_steps, experiment.cfg.system.loggers.wandb, experiment.values)
    looking_on = {
        "curves": curves,  # first: a checkpoint holds what they have not logged
        **configured(cfg),
        **named(callbacks),
        **({"viewer": viewer_of(experiment)} if experiment.cfg.viewer.enable and ranks().is_first else {}),
        **judging(experiment),  # before the test views are complete, which says that a stage is done
        "renders": SaveRenders(folder / "save", curves, trained=True),
        "watch": SceneWatch(curves),
        # It saves the states of all before it.
        "last": LastCheckpoint(
            experiment.last_checkpoint, checkpoints.interval(cfg.max_steps), checkpoints.save_top_k
        ),
        "report": Reports(experiment, device),  # of what the others have written
    }
    if not ranks().is_first:
        looking_on = {name: callback for name, callback in looking_on.items() if callback.on_all_ranks}
    with closing(curves):
        resume_from, weights = start.resume_from, start.weights
        grew_from = scene_hash(weights) if weights and resume_from is None else None
        system = experiment.starting_from(weights).build_system().to(device)
        system.prepare(torch.device(device), resumed=resume_from is not None)
        optimizer = system.configure_optimizer()
        run = Run(
            system=system,
            data=experiment.build_data(),
            folder=folder,
            label=stage.position,
            max_steps=cfg.max_steps,
            optimizer=optimizer,
            scheduler=system.configure_scheduler(optimizer),
            grew_from=grew_from,
        )
        trainer = Trainer(cfg, run, looking_on, device=device)
        checkpoint = None if resume_from is None else read_checkpoint(resume_from)
        if checkpoint is not None:
            system.load_checkpoint(checkpoint)
            continued(checkpoint["optimizer_states"][0], checkpoint.get("optimizer"), optimizer)
        if ranks().is_first:
            # Everything is built and fits by now: only a run that can start leaves a folder, or changes one.
            moments = 2 * tensor_bytes([group["params"] for group in optimizer.param_groups])
            prepare_trial(experiment, stage.files, command, tensor_bytes(system.state_dict()) + moments)
            logger.info("%s: writing to %s", stage.label, folder)
        if start.validates:
            trainer.validate()
        trainer.fit(resume_from, checkpoint)
        if ranks().is_first and test and (cfg.test_when_stopped or not run.stopping):
            trainer.test()
    return not any(largest([run.stopping]))


def viewer_of(experiment: Experiment) -> Viewer:
    """What shows the experiment's scene on a page.

    Raises:
        ConfigError: the package for the page is missing.
    """
    from fourdfy.launching.sharing import export_scene
    from fourdfy.viewing.viewer import Viewer

    others_wait = 60 * experiment.cfg.trainer.rank_timeout_minutes if ranks().count > 1 else math.inf
    return Viewer(
        experiment.cfg.viewer,
        lambda run: export_scene(run.system, experiment, run.folder / "save"),
        truth=ground_truth_of(experiment),
        longest_pause=others_wait / 2,
    )


def judging(experiment: Experiment) -> dict[str, Callback]:
    """What judges the scene after training, if that is asked for."""
    if not experiment.cfg.evaluation.after_training:
        return {}
    from fourdfy.evaluation.judge import Evaluate

    save = experiment.trial_dir / "save"
    return {"evaluation": Evaluate(experiment.cfg.evaluation, save, **experiment.judged)}


def configured(cfg: TrainerConfig) -> dict[str, Callback]:
    """The callbacks of ``trainer.callbacks``, by their keys."""
    return {f"trainer.callbacks.{name}": entry.build() for name, entry in cfg.callbacks.items()}


def named(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Callbacks by the names of their states: the class name, with a number from the second on."""
    names: dict[str, Callback] = {}
    for callback in callbacks:
        kind = type(callback).__name__
        count = sum(type(other) is type(callback) for other in names.values())
        names[f"{kind} {count + 1}" if count else kind] = callback
    return names


def import_trainer() -> type[Trainer]:
    """The class that runs the loops; the log levels and handlers that Lightning sets on import are undone."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    from fourdfy.launching.lightning import Trainer

    for this, (level, propagate, handlers) in zip(loggers, before, strict=True):
        this.setLevel(level)
        this.propagate, this.handlers[:] = propagate, handlers
    return Trainer
