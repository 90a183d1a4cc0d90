"""``--check``: what a run would do, with which models, in how much memory; ``--fetch``: download them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fourdfy.config import ConfigError
from fourdfy.config_files import COMMAND_LINE
from fourdfy.devices import memory_of
from fourdfy.evaluation.judge import with_fetch
from fourdfy.launching.experiment import Experiment, TrainerConfig, trial_of
from fourdfy.priors.hub import locate_model, resolve_model, stored_bytes
from fourdfy.priors.model_folder import TEXT_ENCODERS, TOKENIZERS, ModelNotFound
from fourdfy.systems.base import System
from fourdfy.systems.checkpoint import has_checkpoint
from fourdfy.systems.optim import NOTHING_LEARNS, parameters_of
from fourdfy.systems.supervision import StepKind
from fourdfy.terminal import printable

logger = logging.getLogger(__name__)

OCCUPIED = 0.25
"""Share of the samples that survive pruning in a fresh scene, for cameras with a narrow field of view."""
SAMPLE_BYTES, DEFORMED_BYTES = 173, 1110
"""Activations of the field per sample with a graph, without and with a deformation, measured on an H100."""

PIXEL_BYTES = 64
"""What a rendered pixel takes at least: its ray, and its colour, opacity and depth with their gradients."""


def print_plan(experiments: Sequence[Experiment], ranks: int = 1) -> None:
    """Describe each stage: its kinds of step, their priors and where these come from, and the memory.

    Args:
        ranks: how many processes compute a step.

    Raises:
        ConfigError: the run could not start, or not use its models; see ``check_files``, ``check_priors``,
            ``check_groups``.
    """
    check_files(experiments)
    lines = []
    for experiment in experiments:  # before anything is printed: all are fine
        check_priors(experiment)
        lines.append([*stage_lines(experiment, check_groups(experiment), ranks)])
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for number, (experiment, stage) in enumerate(zip(experiments, lines, strict=True), 1):
        title = printable(f"stage {number}/{len(experiments)}: {experiment.cfg.name}")
        console.print(Text(title, style="bold"))
        for line in stage:
            console.print(f"  {printable(line)}")


def check_run(experiments: Sequence[Experiment], device: str, ranks: int = 1) -> None:
    """Refuse a training of the stages that could not begin, or later not use its models, which are fetched.

    Args:
        ranks: how many processes compute a step, each on a device like this one.

    Raises:
        ConfigError: see ``check_files``, ``find_models``, ``check_priors``, ``check_groups`` and
            ``check_memory``.
    """
    # The last stage is checked too: a missing file should not show hours later.
    check_files(experiments)
    find_models(experiments)
    for experiment in experiments:
        check_priors(experiment)
        check_memory(experiment, check_groups(experiment), device, ranks)


def stage_lines(experiment: Experiment, system: System, ranks: int = 1) -> Iterator[str]:
    """What a stage does, with which models, in how much memory; ``system`` is its own, at any step."""
    cfg = experiment.cfg
    yield f"{cfg.trainer.max_steps} steps"
    yield prompt_line(experiment)
    yield f"folder: {experiment.trial_dir}"
    for kind in experiment.plan.kinds:
        frames = ", then ".join(
            f"{count} frame{'s'[: count > 1]} of {height} x {width}"
            for count, height, width in kind.cameras.sizes()
        )
        trains = " + ".join(sorted(kind.trains))
        yield f"{kind.name:<12} probability {kind.probability:<5.3g} {frames}, trains {trains}"
        yield f"{'':<12} {kind.guidance_type}"
    models = (needed_models([experiment]) | judging_models([experiment])).items()
    for name, parts in models:
        yield f"model: {locate_model(name, parts)}, for its {', '.join(parts)}"
    here = all(stored_bytes(name, parts) is not None for name, parts in models)
    rest = "" if here else ", plus that of the models that are not on this disk"
    where = f" on each of {ranks} devices" if ranks > 1 else ""
    estimate = _memory_estimate(experiment, system, ranks)
    yield f"memory{where}, roughly: {memory_line(*estimate, cfg.trainer, rest)}"


def memory_needed(experiment: Experiment) -> str:
    """Roughly, as a line; without the models that are not on this disk.

    Raises:
        ConfigError: see ``check_groups``.
    """
    return memory_line(*_memory_estimate(experiment, check_groups(experiment)), experiment.cfg.trainer)


def memory_line(least: float, at_once: float, cfg: TrainerConfig, rest: str = "") -> str:
    """The bytes of a training with the fewest samples at once, and with all of them, as a user needs them;
    ``rest`` is what they lack."""
    budget = math.inf if cfg.memory_budget_gb is None else cfg.memory_budget_gb * 2**30
    line = f"{min(at_once, max(least, budget)) / 2**30:.1f} GiB{rest}"
    if budget == math.inf and at_once - least > 2**30:
        line += f"; a GPU with less, from {least / 2**30:.1f} GiB on, takes several passes"
    return line


def prompt_line(experiment: Experiment) -> str:
    """The prompt, with advice how to change it if a config file that is not a trial's has set it."""
    line, source = f"prompt: {experiment.cfg.system.prompt!r}", experiment.prompt_source
    is_fixed = source == COMMAND_LINE or trial_of(Path(source))
    return line if is_fixed else f"{line}, from {source}; to change it: --prompt TEXT"


def check_files(experiments: Sequence[Experiment]) -> None:
    """Refuse a run whose files are missing, except those that its earlier stages will write.

    Raises:
        ConfigError: names the key and the file.
    """
    if len(experiments) > 1 and all(experiment.cfg.resume for experiment in experiments):
        raise ConfigError("resume: a recipe continues by itself; for one of its stages: stage_2.resume=...")
    written: set[Path] = set()
    for experiment in experiments:
        cfg = experiment.cfg
        for key, file in (("resume", cfg.resume), ("system.weights", cfg.system.weights)):
            if file and Path(file) not in written and not has_checkpoint(file):
                raise ConfigError(f"{key}={file}: no such checkpoint")
        written.add(experiment.last_checkpoint)


def check_priors(experiment: Experiment) -> None:
    """Refuse prompts that are too long and models of the wrong kind, as far as the models are on this disk.

    Loads no weights. Warns of prompts that a model has not learned.

    Raises:
        ConfigError: names the key, or the model's file.
    """
    for kind in experiment.plan.kinds:
        if kind.prompts is not None:
            try:
                kind.prompts.build().check_texts()
            except ValueError as error:
                raise ConfigError(f"{kind.prompts_key}: {error}") from error
        try:
            kind.guidance.check_models()
        except ConfigError:  # of a model's file
            raise
        except ValueError as error:
            raise ConfigError(f"{kind.guidance_key}.{error}") from error


def check_groups(experiment: Experiment) -> System:
    """Refuse learning rates of parts that the scene doesn't have; those of priors are checked on loading.
    Returns the untrained scene.

    Raises:
        ConfigError: names the part, and those that exist; or none of the scene's parts would learn.
    """
    plan, params = experiment.plan, experiment.cfg.system.optimizer.params
    system, priors = experiment.build_system(), {kind.module for kind in plan.kinds}
    named = parameters_of(system, params, plan.absent | system.cfg.absent_parts | priors)
    of_priors = {path for path, options in params.items() if options is not None} - named.keys()
    untrained = {id(parameter) for parameter in system.untrained()}
    learning = chain.from_iterable(named.values() if params else [system.parameters()])
    if not of_priors and all(id(parameter) in untrained for parameter in learning):
        raise ConfigError(f"{experiment.cfg.name}: {NOTHING_LEARNS}")
    return system


def check_memory(experiment: Experiment, system: System, device: str, ranks: int = 1) -> None:
    """Refuse sizes that can't fit into a device, however few samples are computed at once.

    Raises:
        ConfigError: names the stage, and what it needs.
    """
    pixels = [math.prod(size) for kind in experiment.plan.kinds for size in kind.cameras.sizes()]
    least = _memory_estimate(experiment, system, ranks)[0] + PIXEL_BYTES * max(pixels, default=0)
    if least > (there := memory_of(device)):
        largest = max(experiment.plan.kinds, key=lambda kind: _stored([kind], ranks))
        advice = (
            f"; or spread a prior over several GPUs: --gpu 0,1 {largest.guidance_key}.shard_over_ranks=true"
            if _stored([largest], ranks) > there / 2
            else ""
        )
        raise ConfigError(
            f"{experiment.cfg.name}: a step needs {least / 2**30:,.0f} GiB at least, and {device} has "
            f"{there / 2**30:,.0f}; lower the scene's sizes, or those of the images (height, width, "
            f"num_frames, batch_size){advice}"
        )


def fetch_models(experiments: Sequence[Experiment]) -> None:
    """``--fetch``: download every model that the stages need, and say where each is.

    Raises:
        ConfigError: see ``find_models``.
    """
    for name, folder in find_models(experiments).items():
        logger.info("%s: in %s", name, folder)


def find_models(experiments: Sequence[Experiment]) -> dict[str, Path]:
    """The folder of every model that the stages need, fetched if necessary; all are tried.

    Raises:
        ModelNotFound: some can't be found; says what was tried for each.
    """
    found, failures, judging = {}, [], judging_models(experiments)
    for name, parts in (needed_models(experiments) | judging).items():
        try:
            found[name] = resolve_model(name, parts)
        except ModelNotFound as error:
            failures.append(with_fetch(error) if name in judging else str(error))
    if failures:
        raise ModelNotFound("\n".join(failures))
    return found


def judging_models(experiments: Sequence[Experiment]) -> dict[str, tuple[str, ...]]:
    """Model name -> its part, of those that judge the stages after training."""
    found: dict[str, tuple[str, ...]] = {}
    for each in experiments:
        if each.cfg.evaluation.after_training:
            found |= {
                name: (part,)
                for part, name in each.cfg.evaluation.models(each.cfg.system.prompt, each.learned).items()
            }
    return found


def needed_models(experiments: Sequence[Experiment]) -> dict[str, tuple[str, ...]]:
    """Model name -> the parts that the priors and prompts of the stages take from it."""
    return _models_of([kind for experiment in experiments for kind in experiment.plan.kinds])


def _models_of(kinds: Sequence[StepKind]) -> dict[str, tuple[str, ...]]:
    needed: dict[str, tuple[str, ...]] = {}
    for kind in kinds:
        for part in (kind.guidance, kind.prompts):
            for name, parts in part.models() if part else ():
                needed[name] = tuple(dict.fromkeys((*needed.get(name, ()), *parts)))
    return needed


def _stored(kinds: Sequence[StepKind], ranks: int) -> float:
    """The bytes of the priors on each rank, as far as they are on this disk."""
    shared = {
        name
        for kind in kinds
        if getattr(kind.guidance, "shard_over_ranks", False)
        for name, _ in kind.guidance.models()
    }
    total = 0.0
    for name, parts in _models_of(kinds).items():
        networks = tuple(part for part in parts if part not in (*TOKENIZERS, *TEXT_ENCODERS))
        total += (stored_bytes(name, networks) or 0) / (ranks if name in shared else 1)
    return total


def _memory_estimate(experiment: Experiment, system: System, ranks: int = 1) -> tuple[float, float]:
    """Bytes, for each rank: the scene with gradients and two moments, the priors as stored here, the largest
    graph; first without samples, then with all of them.

    It is within a third of the largest measured value of a few random cameras.
    """
    cfg = experiment.cfg.system
    each = DEFORMED_BYTES if "deformation" in cfg.scene_cfg.renders else SAMPLE_BYTES
    scene = sum(p.numel() for p in system.parameters()) * 16
    stored = _stored(experiment.plan.kinds, ranks)
    priors, graphs = [0.0], []
    for kind in experiment.plan.kinds:
        for frames, height, width in kind.cameras.sizes():
            # The object fits the shorter side.
            rays = math.ceil(frames * min(height, width) ** 2 / ranks)
            samples = cfg.scene_cfg.samples_with_graph(rays, OCCUPIED, kind.budget)
            prior = kind.guidance.activation_bytes(math.ceil(frames / ranks), height, width)
            graphs.append(samples * each + prior)
            priors.append(float(prior))
    return scene + stored + max(priors), scene + stored + max(graphs)
