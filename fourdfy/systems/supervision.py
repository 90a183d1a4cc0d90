"""What supervises a step, computed once from the config: the only reader of its probabilities.

| step | probability | frames | trains: static scene / dynamic / dynamic, static part frozen |
| --- | --- | --- | --- |
| multi_view | pm | groups of n_view cameras, one time | static / static / dynamic |
| single_view | (1 - pm)(1 - pv) | batch_size cameras, one time | static / static / dynamic |
| video | (1 - pm) pv | one camera, num_frames times | - / both / dynamic |

A renderer of bounded memory reads train_max_nums in video steps, train_max_nums_static in the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fourdfy.config import ConfigError
from fourdfy.seeds import step_generator
from fourdfy.types import Budget


@dataclass(frozen=True)
class SupervisionStep:
    """One kind of training step."""

    name: str
    """multi_view, single_view, video; also the batch's ``step``."""
    probability: float
    trains: frozenset[str]
    """Which of "static", "dynamic" (halves of the scene) and "guidance" (a LoRA) learn from it."""
    sample_budget: Budget
    """Whose bound on the scene's memory holds."""
    guidance: str
    """The system's attribute and config key of the guidance, without its prefix's type key."""
    guidance_cfg: str
    """Config key of the guidance; its type is named by the key with ``_type`` put in."""
    prompt_cfg: str
    """Config key of the prompt processor."""


@dataclass(frozen=True)
class SupervisionPlan:
    """The step kinds of positive probability, in a fixed order."""

    steps: tuple[SupervisionStep, ...]
    dynamic: bool
    """Whether the scene moves in this stage; static scenes live at time 0."""

    def choose(self, seed: int, global_step: int) -> SupervisionStep:
        """The kind of step number ``global_step``: a pure function, equal on every rank."""
        draw = torch.rand((), generator=step_generator(seed, global_step, "kind")).item()
        for step in self.steps:
            draw -= step.probability
            if draw < 0:
                return step
        return self.steps[-1]

    def __getitem__(self, name: str) -> SupervisionStep:
        return next(step for step in self.steps if step.name == name)


def plan_supervision(
    *,
    prob_multi_view: float | None,
    prob_single_view_video: float | None,
    simultan: bool,
    static: bool,
    freeze_static_modules: bool,
) -> SupervisionPlan:
    """The plan of a stage.

    Args:
        prob_multi_view: pm; None means 0.
        prob_single_view_video: pv, read only if ``simultan``; None means 0.
        static: the scene does not move; video steps would have nothing to teach.
        freeze_static_modules: in dynamic stages, every step trains the moving part alone.

    Raises:
        ConfigError: a probability outside [0, 1], or video steps in a static stage.
    """
    pm = prob_multi_view or 0.0
    pv = (prob_single_view_video or 0.0) if simultan else 0.0
    for key, value in (("data.prob_multi_view", pm), ("data.single_view.prob_single_view_video", pv)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{key}={value}: a probability lies between 0 and 1")
    if static and (1 - pm) * pv > 0:
        raise ConfigError(
            "data.single_view.static=true leaves video steps nothing to teach; set "
            "data.single_view.simultan=false or data.single_view.static=false"
        )
    if static:
        still, moving = {"static", "guidance"}, set()
    elif freeze_static_modules:
        still = moving = {"dynamic", "guidance"}  # the LoRA keeps up with what it sees
    else:
        still, moving = {"static", "guidance"}, {"static", "dynamic", "guidance"}
    images, video = "image", "video"
    rows = (
        ("multi_view", pm, still, images, "guidance_multi_view", "guidance_multi_view", "_multi_view"),
        ("single_view", (1 - pm) * (1 - pv), still, images, "guidance_single_view", "guidance", ""),
        ("video", (1 - pm) * pv, moving, video, "guidance_video", "guidance_video", "_video"),
    )
    return SupervisionPlan(
        steps=tuple(
            SupervisionStep(
                name=name,
                probability=probability,
                trains=frozenset(trains),
                sample_budget=budget,
                guidance=attribute,
                guidance_cfg=key,
                prompt_cfg=f"prompt_processor{suffix}",
            )
            for name, probability, trains, budget, attribute, key, suffix in rows
            if probability > 0
        ),
        dynamic=not static,
    )
