"""Recipes: several stages in one command, each from the previous one's ``last.ckpt``.

A recipe file lists ``stages`` (experiment files beside it). Every other key in it, and every override,
applies to all of them; what stands under ``stage_2``, in the file or as ``stage_2.key=value``, applies to
the second alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourdfy.config_files import ConfigError, find_config, literal_override, named_config, plain, read_layers
from fourdfy.config_layers import load_config
from fourdfy.files.atomic import warn_once
from fourdfy.files.evaluations import TEST, VALIDATION, is_evaluated
from fourdfy.launching.experiment import (
    PARSED,
    Experiment,
    ExperimentConfig,
    TrainerConfig,
    is_cut_short,
    load_experiment,
)
from fourdfy.launching.trial import set_aside
from fourdfy.priors.frozen import MEMORY_OPTIONS
from fourdfy.systems.checkpoint import (
    checkpoint_file,
    has_checkpoint,
    read_checkpoint,
    scene_hash,
    step_of,
)

logger = logging.getLogger(__name__)

MEMORY_KEYS = (
    ".train_max_nums",
    ".train_max_nums_static",
    ".eval_chunk_size",
    ".eval_batch_size",
    ".low_ram_vae",
    *(f".{name}" for name in MEMORY_OPTIONS),
)
"""Endings of the keys that bound memory; with exact gradients they change nothing else."""
BESIDE_THE_RUN = ("system.loggers", "system.exporter", "system.compile")
"""Beginnings of the keys of what is made of a scene, and of how fast it is made."""

SETTINGS = ("seed", "data_type", "data", "system_type", "system", "steps")
TRAINER_SETTINGS = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
)
"""The keys, and those of ``trainer``, whose change makes another run; a run's length, for one, doesn't."""


def makes_another_run(key: str) -> bool:
    """Whether a change of this one of the ``settings`` does; what bounds memory, for one, does not."""
    return not (key.startswith(BESIDE_THE_RUN) or key.endswith(MEMORY_KEYS))


@dataclass(frozen=True)
class Stage:
    """One experiment of a run; a single experiment is a run of one stage."""

    experiment: Experiment
    files: tuple[Path, ...]
    """The config files that it was made from."""
    number: int
    count: int
    earlier: Stage | None = None
    """The stage that it grows from."""

    @property
    def position(self) -> str:
        return f"stage {self.number}/{self.count}"

    @property
    def label(self) -> str:
        return f"{self.position} {self.experiment.cfg.name}"

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint to continue from: ``resume=``, or the trial's own last one.

        Raises:
            ConfigError: the trial holds another run, which this one would overwrite.
        """
        trial, last = self.experiment.trial_dir, self.experiment.last_checkpoint
        if not self.experiment.cfg.resume:
            if not has_checkpoint(last):
                return None
            self._check_same_settings()
            return last
        given = checkpoint_file(self.experiment.cfg.resume)
        if given.resolve().is_relative_to(trial.resolve()):
            # Rates, weights and lengths may change; a change of these would make it another scene.
            self._check_same_settings(lambda key: key == "seed" or key.endswith(".prompt"))
        elif has_checkpoint(last):
            raise ConfigError(
                f"resume={given}: {trial} holds another run already; continue that one (without resume=), "
                "or give this one its own folder: tag=NAME"
            )
        return given

    @property
    def is_trained(self) -> bool:
        """Trained to its last step."""
        return self._step >= self.experiment.cfg.trainer.max_steps

    @property
    def is_finished(self) -> bool:
        """Trained, and its test views rendered."""
        return self.is_trained and is_evaluated(self.experiment.trial_dir, TEST.format(self._step))

    @property
    def lacks_validation(self) -> bool:
        """Whether it was killed between its last checkpoint and the end of the validation at that step."""
        every, step = self.experiment.cfg.trainer.steps_between_validations, self._step
        is_due = step > 0 and every > 0 and step % every == 0
        return is_due and not is_evaluated(self.experiment.trial_dir, VALIDATION.format(step))

    @property
    def _step(self) -> int:
        """Of the checkpoint to continue from; 0 if there is none."""
        checkpoint = self.resume_from
        return step_of(checkpoint) if checkpoint else 0

    def follow_weights(self, *, begun: bool = True) -> None:
        """Do as ``checkpoint.weights_changed`` says, if they have since the stage grew from them.

        Args:
            begun: it is this stage's turn; before that, it can only be refused.

        Raises:
            ConfigError: it is refused.
        """
        choice = self.experiment.cfg.checkpoint.weights_changed
        if not (begun or choice == "refuse") or not (change := self._change_of_weights()):
            return
        if choice == "refuse":
            raise ConfigError(
                f"{self.label}: {change}; to train it anew, with its old folder renamed: "
                "checkpoint.weights_changed=redo; to leave it as it is: checkpoint.weights_changed=keep"
            )
        if choice == "redo":
            outcome = f"it is trained anew; the old one is in {set_aside(self.experiment.trial_dir)}"
        else:
            outcome = "it stays as it is"
        logger.warning("%s: %s; %s", self.label, change, outcome)

    def _change_of_weights(self) -> str | None:
        """Says that ``system.weights`` holds another scene than the stage grew from, or soon will."""
        weights, resume_from = self.experiment.cfg.system.weights, self.resume_from
        if not weights or self.experiment.cfg.resume or resume_from is None:
            return None
        before, now = read_checkpoint(resume_from).get("grew_from"), scene_hash(weights)
        trains = self.earlier is not None and not self.earlier.is_trained
        # If it trains and is another already, it may still end as it did: a damaged one is trained again.
        if before is None or (now in (before, None)) != trains:
            return None
        return f"it grew from {weights}, which {'will change' if trains else 'has changed since'}"

    def _check_same_settings(
        self,
        counts: Callable[[str], bool] = makes_another_run,
    ) -> None:
        """Refuse to continue a trial with other settings; only its length, and what bounds its memory, may
        change.

        Args:
            counts: whether a change of this key makes it another run.
        """
        parsed = self.experiment.trial_dir / PARSED
        if is_cut_short(parsed):
            warn_once(
                f"{parsed} is missing or damaged: whether the trial began with other settings can't be known"
            )
            return
        began = load_config([parsed], schema=ExperimentConfig).values
        if changed := [key for key in changed_settings(began, self.experiment.record()) if counts(key)]:
            raise ConfigError(
                f"{self.experiment.trial_dir} holds a run with other settings ({', '.join(changed[:4])}); "
                "give this one a name of its own (tag=...), or delete that folder"
            )


def load_recipe(names: Sequence[str | Path], overrides: Sequence[str]) -> list[Stage]:
    """The stages of a recipe, all parsed; one for an experiment file. ``find_config`` finds the ``names``."""
    paths = [find_config(name) for name in names]
    for_stage: dict[int, list[str]] = {}
    shared = []
    for override in overrides:
        if match := re.match(r"stage_(\d+)\.(.+=.*)", override, re.DOTALL):
            for_stage.setdefault(int(match[1]), []).append(match[2])
        else:
            shared.append(override)
    files, in_files = _stage_files(paths)
    if not files:
        if for_stage:
            raise ConfigError(f"stage_{min(for_stage)}: {paths[0]} is not a recipe; write the key without it")
        return [Stage(load_experiment(paths, shared), tuple(paths), 1, 1)]
    if unknown := {number for number in (*for_stage, *in_files) if not 1 <= number <= len(files)}:
        raise ConfigError(f"stage_{max(unknown)}: {paths[0]} has {len(files)} stages")
    given = [word for word in shared if word.startswith("system.weights=")]
    if given and len(files) > 1:
        raise ConfigError(
            "system.weights: each stage of a recipe starts from the one before; for one of them: "
            f"stage_1.{given[0]}"
        )
    stages: list[Stage] = []
    for number, file in enumerate(files, 1):
        previous = [str(stage.experiment.last_checkpoint) for stage in stages[-1:]]
        weights = [literal_override("system.weights", path.replace("$", "$$")) for path in previous]
        own = for_stage.get(number, [])
        experiment = load_experiment([file, *paths], [*weights, *shared, *own], stage=number)
        grows = experiment.cfg.system.weights in previous
        for other in stages:
            if other.experiment.trial_dir == experiment.trial_dir:
                raise ConfigError(
                    f"name={experiment.cfg.name}: stages {other.number} and {number} would share the folder "
                    f"{experiment.trial_dir}; to name the run, set tag=... or exp_root_dir=..."
                )
        stages.append(Stage(experiment, (file, *paths), number, len(files), stages[-1] if grows else None))
    return stages


def _stage_files(paths: Sequence[Path]) -> tuple[list[Path], list[int]]:
    """The files that a recipe lists in ``stages`` (none: no recipe), and each N of its ``stage_N``."""
    files: list[Path] = []
    numbers: list[int] = []
    for path in paths:
        for layer in read_layers(path):
            matches = (re.fullmatch(r"stage_(\d+)", key) for key in layer)
            numbers += [int(match[1]) for match in matches if match]
            names = plain(layer.get("stages"))
            if names is None:
                continue
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
                raise ConfigError(f"stages (in {layer.source}): expected a list of files, got {names!r}")
            files = [named_config(name, Path(layer.source), "stages") for name in names]
    return files, numbers


def changed_settings(began: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The dotted keys of ``settings`` that differ between two configs."""
    before = settings(began)
    return [key for part, value in settings(now).items() for key in _differences(before[part], value, part)]


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """``SETTINGS`` and ``TRAINER_SETTINGS``, with the defaults of those that are not given."""
    trainer = values.get("trainer", {})
    return {
        "trainer": {key: trainer.get(key, getattr(TrainerConfig, key)) for key in TRAINER_SETTINGS},
        **{key: values.get(key, getattr(ExperimentConfig, key, None)) for key in SETTINGS},
    }


def _differences(a: object, b: object, path: str) -> list[str]:
    if path == "system.weights" and a and b:  # trials may be moved, together with the one they started from
        a, b = (Path(str(weights)).parts[-4:] for weights in (a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b}, key=str)
        return [d for key in keys for d in _differences(a.get(key), b.get(key), f"{path}.{key}")]
    return [] if a == b else [path]
