"""One stage of training: its whole config, parsed, and the folder it writes to."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fourdfy.bounds import number
from fourdfy.callbacks.base import Callback
from fourdfy.config import (
    config_error,
    file_path,
    named,
    named_slots,
    parse_config,
    slot,
)
from fourdfy.config_files import COMMAND_LINE, PROMPT, ConfigError, literal_override, read_layers
from fourdfy.config_layers import LoadedConfig, load_config
from fourdfy.data.base import DataModule
from fourdfy.evaluation.protocol import EvaluationConfig
from fourdfy.files.names import sanitize_tag
from fourdfy.original.keys import without_effect_dropped
from fourdfy.priors.hub import knows_text
from fourdfy.systems.agreement import check_agreement
from fourdfy.systems.base import System
from fourdfy.systems.checkpoint import LAST, has_checkpoint, read_checkpoint
from fourdfy.systems.supervision import StepConfig, SupervisionPlan
from fourdfy.viewing.settings import ViewerConfig

logger = logging.getLogger(__name__)

EVERY_N_TRAIN_STEPS = 1000
"""Between checkpoints, unless the config says otherwise."""

PARSED = Path("configs", "parsed.yaml")
"""Path of the complete config inside a trial folder."""

PLACE = ("exp_root_dir", "name", "tag", "use_timestamp", "timestamp")
"""The keys that determine where a trial folder is."""

FOLLOWING = ("exp_dir", "trial_name", "trial_dir")
"""What the original writes into its ``parsed.yaml`` beside ``PLACE``; not read."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """``trainer``: how Lightning's Trainer runs the stage."""

    max_steps: int = number(10000, 1)
    """Training ends after this global step."""
    log_every_n_steps: int = number(50, 1)
    """Training steps between two points of a curve, which are means over them. They double after 10,000
    points, and again each time the run is twice as long, so that the files stay small."""
    num_sanity_val_steps: int = number(0, 0)
    """Validation batches to render before training."""
    val_check_interval: int | float = number(1000, 0)
    """Training steps between validations: 0 for none, or a fraction of ``max_steps`` such as 0.25."""
    limit_val_batches: int | None = number(None, 0)
    """How many batches a validation renders; null for all."""
    check_val_every_n_epoch: int | None = None
    """Refused, because there is only one epoch."""
    precision: Literal[32, "32-true", "16-mixed", "bf16-mixed", 16, "bf16"] = 32
    """Lightning's precision; ``16`` and ``bf16`` are older names of the mixed ones."""
    accumulate_grad_batches: int = number(1, 1, 100_000)
    """Batches of one kind whose gradients are averaged for a step."""
    gradient_clip_val: float | None = number(None, 0)
    """Bound on the gradients, applied as ``gradient_clip_algorithm`` says; null: none."""
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    """``norm`` (also null) bounds the norm of all gradients together, ``value`` bounds each element."""
    memory_budget_gb: float | None = number(None, above=0)
    """GPU memory in GiB that PyTorch may reserve in training; null: what is free when the models are loaded.
    Exact gradients are computed in as many passes, and the VAE is given as many frames at once, as leave a
    tenth of it. So a run that is resumed on another card continues within rounding."""
    test_when_stopped: bool = False
    """Render the test views also when a signal ends training early, as threestudio does after Ctrl-C."""
    max_skipped_steps: int = number(0, 0)
    """So many steps with a loss, gradient or parameter that is not finite are left out, each with a warning;
    one more ends the run. Steps whose gradients overflow under ``16-mixed`` don't count."""
    detect_anomaly: bool = False
    """Name the operation whose gradient is the first NaN; slow."""
    deterministic: bool = False
    """Refuse operations without a deterministic implementation (CUDA only; the CPU always is). The hash
    grid then runs on its plain reference, which is much slower."""
    rank_timeout_minutes: float = number(30, above=0, high=10_000)
    """With several GPUs: a process that waits longer for the others ends the run. They wait for validation
    and test views too, which the first one renders."""
    devices: Any = 1
    """Must be 1: ``--gpu`` chooses the devices."""
    num_nodes: int = 1
    """Must be 1: torchrun starts a run on several machines."""
    callbacks: dict[str, Any] = named_slots(Callback, by="type")
    """Callbacks under names of your choice; each entry's ``type`` is the registered name of its class."""

    def __post_init__(self) -> None:
        for key in ("devices", "num_nodes"):
            if (given := getattr(self, key)) not in (1, "1"):
                raise ValueError(f"{key}={given!r}: --gpu 0,1 or torchrun says where it runs; remove the key")
        if self.gradient_clip_algorithm and self.gradient_clip_val is None:
            raise ValueError(
                f"gradient_clip_algorithm={self.gradient_clip_algorithm}: nothing is clipped; set "
                "gradient_clip_val too"
            )
        if self.check_val_every_n_epoch not in (None, 1):
            raise ValueError(
                f"check_val_every_n_epoch={self.check_val_every_n_epoch}: training is one epoch; set "
                "val_check_interval, in steps"
            )
        if self.val_check_interval > 1 and self.val_check_interval % 1:
            raise ValueError(
                f"val_check_interval={self.val_check_interval}: expected whole steps, or a fraction up to 1.0"
            )

    @property
    def steps_between_validations(self) -> int:
        """0 for none."""
        every = self.val_check_interval
        fraction = isinstance(every, float) and 0 < every <= 1
        return max(1, round(every * self.max_steps)) if fraction else int(every)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """``checkpoint``: ``ckpts/last.ckpt``, also written at the end and when a signal ends the run early."""

    every_n_train_steps: int = number(EVERY_N_TRAIN_STEPS, 1)
    """Training steps between two saves."""
    save_top_k: int = number(0, -1)
    """Keep every k-th save too, as ``ckpts/step_{step}.ckpt``; -1: all, 0: none."""
    weights_changed: Literal["refuse", "redo", "keep"] = "refuse"
    """If ``system.weights`` no longer holds the scene that the trial in this folder grew from: ``refuse`` to
    continue it, ``redo`` it from the new one (the old folder is kept under another name), or ``keep`` it."""

    def interval(self, max_steps: int) -> int:
        """Steps between saves. The original's files save once, at the end; that would cost a whole run."""
        if self.every_n_train_steps < max_steps or max_steps <= EVERY_N_TRAIN_STEPS:
            return self.every_n_train_steps
        logger.warning(
            "checkpoint.every_n_train_steps=%d is the whole run; saving every %d steps",
            self.every_n_train_steps,
            EVERY_N_TRAIN_STEPS,
        )
        return EVERY_N_TRAIN_STEPS


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything a stage is made from."""

    name: str = "default"
    """Name of the experiment: a folder in ``exp_root_dir`` that holds its trials."""
    tag: str = ""
    """Name of the trial: a folder inside ``name``; in the experiment files, the prompt without spaces."""
    description: str = ""
    """A note for yourself; it has no effect."""
    seed: int = number(0, 0)
    """Together with the step, it determines every random draw."""
    exp_root_dir: str = file_path("outputs")
    """The folder of all experiments."""
    use_timestamp: bool = True
    """Append the time of the start to the tag, so that each start has its own folder."""
    timestamp: str = ""
    """Part of the trial folder's name; set by the run itself."""
    resume: str | None = file_path()
    """A checkpoint of this same experiment, or its trial folder. Training continues from it, and evaluation
    uses its weights. The default is the last checkpoint of the trial folder, if there is one."""
    exp_dir: str = ""
    """Written by the original; it has no effect."""
    trial_name: str = ""
    """Written by the original; it has no effect."""
    trial_dir: str = ""
    """Written by the original into its ``parsed.yaml``; distinguishes that file from our own."""
    plugins: list[str] = field(default_factory=list)
    """Modules that register components, imported first; files and the command line add theirs."""
    plugin_path: list[str] = file_path([])
    """Folders to look for plugins in, before those of the config files and the current one. A trial's
    ``parsed.yaml`` lists those in which its plugins were found."""
    data_type: str = "single-multiview-combined-camera-datamodule"
    data: Any = slot(DataModule, "data_type")
    system_type: str = "fourdfy-system"
    system: Any = slot(System, "system_type")
    steps: dict[str, Any] = named(StepConfig)
    """Further kinds of training step by name; see ``StepConfig``. null switches one off."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    viewer: ViewerConfig = field(default_factory=ViewerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(frozen=True)
class Experiment:
    """A parsed config, its plan, and the mapping it came from (for ``configs/parsed.yaml``)."""

    cfg: ExperimentConfig
    values: Mapping[str, Any]
    plan: SupervisionPlan
    trial_dir: Path
    is_placed: bool
    """Whether the command line determines the trial folder."""
    prompt_source: str
    """The config file that names the prompt, or ``COMMAND_LINE``."""

    @property
    def last_checkpoint(self) -> Path:
        return self.trial_dir / LAST

    def record(self) -> dict[str, Any]:
        """The values for ``configs/parsed.yaml``: the run's own paths mean the same in every working
        directory; those of models and lists stay as they were typed.

        ``resume`` comes last, so that a file that was cut short lacks it.
        """

        def absolute(path: str | None) -> str | None:
            return path and os.path.abspath(path).replace("$", "$$")

        cfg, system = self.cfg, self.values.get("system", {})
        values = {**self.values, "exp_root_dir": absolute(cfg.exp_root_dir)}
        if system.get("weights"):
            values["system"] = {**system, "weights": absolute(cfg.system.weights)}
        values.pop("resume", None)
        return {**values, "resume": absolute(cfg.resume)}

    @property
    def judged(self) -> dict[str, Any]:
        """What an evaluation says of the scene besides its numbers."""
        system = self.cfg.system
        return {
            "prompt": system.prompt,
            "learned": self.learned,
            "dynamic": self.plan.dynamic,
            "seed": self.cfg.seed,
        }

    @property
    def learned(self) -> bool:
        """Whether the models have learned the prompt from a world whose ground truth is known."""
        prompts: Any = getattr(self.cfg.system, "prompt_processor", None)
        prompt = self.cfg.system.prompt
        try:
            return prompts is not None and knows_text(prompts.pretrained_model_name_or_path, prompt)
        except ValueError:  # a prompt that its models haven't learned
            return False

    def starting_from(self, weights: str | None) -> Experiment:
        """The same with other ``system.weights``."""
        system = replace(self.cfg.system, weights=weights)
        return replace(self, cfg=replace(self.cfg, system=system))

    def build_system(self) -> System:
        return self.cfg.system.build(plan=self.plan, seed=self.cfg.seed)

    def load_system(self, device: str, checkpoint: Path) -> System:
        """The system with the scene of a checkpoint, at the checkpoint's step."""
        content = read_checkpoint(checkpoint)
        system = self.build_system()
        system.load_checkpoint(content)
        return system.to(device).eval()

    def build_data(self) -> DataModule:
        return self.cfg.data.build(
            seed=self.cfg.seed,
            choose_kind=lambda step: self.plan.choose(self.cfg.seed, step).name,
            samplers={kind.name: kind.cameras for kind in self.plan.kinds},
        )


def load_experiment(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), stage: int | None = None
) -> Experiment:
    """The experiment of some config files and ``key=value`` overrides; see ``load_config``.

    Raises:
        ConfigError: naming the key, its file, what was expected and what to write.
    """
    return parse_experiment(load_config(paths, overrides, stage, schema=ExperimentConfig))


def parse_experiment(loaded: LoadedConfig) -> Experiment:
    """Parse everything, down into every component's own config, before anything is built.

    Raises:
        ConfigError: naming the key, its file, what was expected and what to write.
    """
    values = dict(loaded.values)
    for key in FOLLOWING:
        if loaded.sources.get(key) == COMMAND_LINE:
            raise config_error("", key, loaded.sources, "follows from exp_root_dir, name and tag; set these")
    if values.get("use_timestamp", True) and not values.get("timestamp"):
        # With microseconds, so that runs which a script starts together have separate folders.
        values["timestamp"] = datetime.now().strftime("@%Y%m%d-%H%M%S-%f")
    given_by = {loaded.sources[key] for key in PLACE if key in loaded.sources}
    trial = trial_of(Path(*given_by)) if len(given_by) == 1 and "trial_dir" not in values else None
    if trial and loaded.sources.get("resume") in given_by and has_checkpoint(trial / LAST):
        values["resume"] = None  # where the trial started; by now it has its own checkpoint
    cfg = parse_config(
        ExperimentConfig, without_effect_dropped(ExperimentConfig, values), sources=loaded.sources
    )
    plan = cfg.system.plan(cfg.data, cfg.steps)
    check_agreement(cfg, plan)
    return Experiment(
        cfg,
        values,
        plan,
        trial or new_trial(cfg),
        is_placed=COMMAND_LINE in given_by,
        prompt_source=loaded.sources.get(PROMPT, COMMAND_LINE),
    )


def new_trial(cfg: ExperimentConfig) -> Path:
    """``exp_root_dir/name/tag@timestamp``; nothing in it can lead out of ``exp_root_dir``."""
    timestamp = cfg.timestamp if cfg.use_timestamp else ""
    trial = sanitize_tag(cfg.tag) + (timestamp and sanitize_tag(timestamp))
    return Path(cfg.exp_root_dir).absolute() / sanitize_tag(cfg.name) / trial


def trial_of(file: Path) -> Path | None:
    """The trial folder, wherever it was moved, whose ``configs/parsed.yaml`` or ``ckpts/*.ckpt`` this is."""
    trial = file.absolute().parent.parent
    is_part = file.absolute() == trial / PARSED or (file.parent.name, file.suffix) == ("ckpts", ".ckpt")
    return trial if is_part and (trial / PARSED).is_file() else None


def is_cut_short(parsed: Path) -> bool:
    """Whether a ``parsed.yaml`` is gone, or not as long as it was, as a broken copy or disk may leave it."""
    try:
        return "resume" not in read_layers(parsed)[-1]
    except ConfigError:
        return True


def as_trained(experiment: Experiment) -> Experiment:
    """The experiment without what this command line changed, if its trial says how it was trained."""
    parsed = experiment.trial_dir / PARSED
    if is_cut_short(parsed):
        return experiment
    return replace(load_experiment([parsed], []), trial_dir=experiment.trial_dir)


def trial_arguments(given: Path, given_as: str = "--trial ") -> tuple[Path, list[str]]:
    """What ``--trial`` stands for: the config and the overrides that continue a trial.

    Args:
        given: a trial folder, or its ``configs/parsed.yaml``.
        given_as: what stands before it, in messages.

    Raises:
        ConfigError: it isn't one, or its config is damaged; names the newest trials below it, or what to do.
    """
    file = given / PARSED if given.is_dir() else given
    trial = trial_of(file) if file.name == PARSED.name else None
    if trial is None and given.is_dir() and has_checkpoint(given / LAST):
        trial = given  # which has lost its config
    if trial is None:
        below = [*given.glob(f"*/{PARSED}"), *given.glob(f"*/*/{PARSED}")]
        below = sorted(below, key=lambda path: path.stat().st_mtime)[-3:]
        hint = "; there are " + ", ".join(str(path.parents[1]) for path in reversed(below)) if below else ""
        raise ConfigError(f"{given_as}{given}: not a trial folder (it has no {PARSED.as_posix()}){hint}")
    if not file.is_file() or is_cut_short(file):
        raise ConfigError(
            f"{file} is {'damaged' if file.is_file() else 'missing'}; it is written anew if you repeat the "
            f"command in {trial / 'cmd.txt'} with use_timestamp=false tag={shlex.quote(trial.name)}"
        )
    last = str(trial / LAST).replace("$", "$$")
    return file, [literal_override("resume", last)] if has_checkpoint(trial / LAST) else []
