"""``--check``: what a run would do, from which models, in how much memory. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from fourdfy.config import build
from fourdfy.diffusion.hub import locate_model, stored_bytes
from fourdfy.experiment import Experiment

SAMPLES_PER_RAY = 0.08
"""Share of a ray's steps that survive pruning, for a compact object (8 % of the grid)."""
BYTES_PER_SAMPLE = 1900
"""Activations of the reference field, forward and backward, per sample and 64 features of encoding."""


def print_plan(experiments: Sequence[Experiment]) -> None:
    """For each stage: its step kinds, their priors and where these come from, and the memory."""
    console = Console(soft_wrap=True, highlight=False)
    for number, experiment in enumerate(experiments, 1):
        cfg = experiment.cfg
        title = f"stage {number}/{len(experiments)}: {cfg.name}"
        console.print(f"[bold]{title}[/], {cfg.trainer.max_steps} steps")
        console.print(f"  prompt: {cfg.system.prompt_processor.prompt!r}", markup=False)
        console.print(f"  folder: {experiment.trial_dir}", markup=False)
        for step in experiment.plan.steps:
            guidance = getattr(cfg.system, step.guidance_cfg)
            model = locate_model(guidance.pretrained_model_name_or_path, ("unet", "vae", "scheduler"))
            frames, height, width = experiment_frames(experiment, step.name)
            console.print(
                f"  {step.name:<12} probability {step.probability:<5.3g} "
                f"{frames:>2} frames of {height} x {width}, trains {' + '.join(sorted(step.trains))}\n"
                f"  {'':<12} {getattr(cfg.system, _type_key(step.guidance_cfg))} from {model}",
                markup=False,
            )
        console.print(f"  memory, roughly: {_memory_estimate(experiment) / 2**30:.1f} GiB")


def experiment_frames(experiment: Experiment, step: str) -> tuple[int, int, int]:
    """(frames, height, width) of a step kind, at the largest of its resolutions."""
    data = experiment.cfg.data
    if step == "video":
        view = data.single_view
        return _largest(view.batch_size) * view.num_frames, view.height_vid, view.width_vid
    view = data.multi_view if step == "multi_view" else data.single_view
    return _largest(view.batch_size), _largest(view.height), _largest(view.width)


def _memory_estimate(experiment: Experiment) -> float:
    """Bytes: the scene with gradients and two moments, the priors as stored here, one step's samples."""
    cfg = experiment.cfg.system
    scene = sum(p.numel() for p in build(cfg.geometry).parameters()) * 16
    models = {
        path
        for step in experiment.plan.steps
        for key, path in vars(getattr(cfg, step.guidance_cfg)).items()
        if key.startswith("pretrained_model_name_or_path") and isinstance(path, str)
    }
    rays = max((frames * height * width for frames, height, width in _all_frames(experiment)), default=0)
    samples = rays * cfg.renderer.num_samples_per_ray * SAMPLES_PER_RAY
    stored = sum(stored_bytes(path, ("unet", "vae")) or 0 for path in models)
    return scene + stored + samples * BYTES_PER_SAMPLE


def _all_frames(experiment: Experiment) -> list[tuple[int, int, int]]:
    return [experiment_frames(experiment, step.name) for step in experiment.plan.steps]


def _largest(value: int | list[int]) -> int:
    return value if isinstance(value, int) else max(value)


def _type_key(guidance_cfg: str) -> str:
    return guidance_cfg.replace("guidance", "guidance_type", 1)
