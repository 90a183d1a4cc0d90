"""The plan of what supervises a scene: one row for each kind of step, made once from the config.

Three rows come from the original's keys, the others from ``steps`` (``StepConfig``):

| kind | probability | frames | trains: static scene / dynamic / dynamic, static part frozen |
| --- | --- | --- | --- |
| multi_view | pm | groups of n_view cameras, one time | static / static / dynamic |
| single_view | (1 - pm)(1 - pv) | batch_size cameras, one time | static / static / dynamic |
| video | (1 - pm) pv | one camera, num_frames times | - / both / dynamic |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fourdfy.bounds import number, scheduled
from fourdfy.config import ConfigError, Schema, slot
from fourdfy.data.base import CameraSampler, DataModule
from fourdfy.guidance.base import Guidance
from fourdfy.priors.base import Prior
from fourdfy.prompts.base import PromptProcessor
from fourdfy.schedules import Schedule, schedule_value
from fourdfy.seeds import step_generator
from fourdfy.types import Budget

Half = Literal["static", "dynamic"]
"""The two halves of a scene's parameters: those of the static scene, and those that make it move."""

ORIGINAL_KINDS: dict[str, tuple[Budget, str, str]] = {
    "multi_view": ("image", "guidance_multi_view", "_multi_view"),
    "single_view": ("image", "guidance_single_view", ""),
    "video": ("video", "guidance_video", "_video"),
}
"""Kind -> the renderer's budget, the guidance's name in checkpoints, and what the keys ``guidance``,
``guidance_type`` and ``prompt_processor`` of ``system`` end in."""


@dataclass(frozen=True, kw_only=True)
class StepConfig(Schema):
    """``steps.NAME``: a kind of training step besides the original's three."""

    probability: float = number(0.0, 0, 1)
    """Share of all training steps. The original's kinds share the rest."""
    cameras_type: str | None = None
    cameras: Any = slot(CameraSampler, "cameras_type")
    """The sampler of the frames that are rendered in such a step."""
    cameras_of: str | None = None
    """Instead of ``cameras``: one of the original's kinds, such as ``video``, whose cameras are used."""
    prompt_processor_type: str | None = None
    prompt_processor: Any = slot(PromptProcessor, "prompt_processor_type")
    """Provides the text; null for a guidance that needs none."""
    guidance_type: str | None = None
    guidance: Any = slot(Guidance, "guidance_type")
    """The guidance that turns the frames into losses."""
    trains: list[Half] | None = None
    """Halves of the scene that the step trains; null: those of the image steps."""
    budget: Budget = "image"
    """Which bound of the renderer's memory applies: ``train_max_nums_static`` for image,
    ``train_max_nums`` for video."""
    loss: dict[str, Schedule] = scheduled({}, 0, 1e6)
    """``lambda_NAME``: weights that differ from ``system.loss`` in these steps."""


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """One kind of training step, a row of the plan."""

    name: str
    probability: float
    cameras: CameraSampler
    prompts: PromptProcessor.Config | None
    guidance: Prior.Config
    guidance_type: str
    """The name by which the config selects it."""
    trains: frozenset[Half]
    """Halves of the scene that it trains. It always trains the guidance's own parameters."""
    budget: Budget
    loss: Mapping[str, Schedule]
    """``lambda_NAME`` -> scheduled weight of the loss NAME."""
    module: str
    """The system's attribute that holds the guidance: its name in checkpoints and optimizer groups."""
    guidance_key: str
    prompts_key: str
    prompts_type_key: str
    """Keys of the guidance, of the prompts and of their type in the config, for messages."""

    def loss_weights(self, step: int) -> dict[str, float]:
        """Loss -> weight, of those whose weight is not 0 at the global ``step``."""
        values = {key: float(schedule_value(value, step)) for key, value in self.loss.items()}
        return {key.removeprefix("lambda_"): value for key, value in values.items() if value != 0}


@dataclass(frozen=True)
class SupervisionPlan:
    """The kinds of step of positive probability, in a fixed order."""

    kinds: tuple[StepKind, ...]
    dynamic: bool
    """Whether the scene moves in this stage; static scenes are rendered at time 0."""
    absent: frozenset[str] = frozenset()
    """Guidances that other stages have: optimizer groups may name them."""

    def choose(self, seed: int, step: int) -> StepKind:
        """The kind of the global ``step``: a pure function, equal on every rank."""
        draw = torch.rand((), generator=step_generator(seed, step, "kind")).item()
        for kind in self.kinds:
            draw -= kind.probability
            if draw < 0:
                return kind
        return self.kinds[-1]

    def __getitem__(self, name: str) -> StepKind:
        """The kind of this name.

        Raises:
            KeyError: the plan has no such kind; says which it has.
        """
        for kind in self.kinds:
            if kind.name == name:
                return kind
        raise KeyError(f"no kind of step {name!r}; the plan has {', '.join(k.name for k in self.kinds)}")


def plan_supervision(
    system: Any, data: DataModule.Config, steps: Mapping[str, StepConfig] | None = None
) -> SupervisionPlan:
    """The plan of a stage.

    Args:
        system: the parsed ``system`` section, with the original's keys.
        data: the parsed ``data`` section.
        steps: further kinds, by name.

    Raises:
        ConfigError: shares that exceed 1, or a kind that has a share and lacks what it needs.
    """
    further = {name: cfg for name, cfg in (steps or {}).items() if cfg is not None}
    if double := further.keys() & ORIGINAL_KINDS.keys():
        raise ConfigError(f"steps.{min(double)}: the original's keys describe this kind; choose another name")
    left = round(1.0 - sum(cfg.probability for cfg in further.values()), 9)  # 0.2 + 0.7 + 0.1 is below 1
    if left < 0:
        raise ConfigError(f"steps: the probabilities of {', '.join(further)} exceed 1 by {-left:g}")
    rows = [*_original_rows(system, data, left), *_further_rows(further, system, data)]
    kinds = tuple(_complete(row) for row in rows if row["probability"] > 0)
    present = {kind.module for kind in kinds}
    return SupervisionPlan(
        kinds=kinds,
        dynamic=not data.static,
        # The original has "guidance" too, a second name of the image prior.
        absent=frozenset({"guidance", *(row["module"] for row in rows)} - present),
    )


def _original_rows(system: Any, data: DataModule.Config, left: float) -> Iterator[dict[str, Any]]:
    """The kinds that ``data`` can draw, whose shares are parts of ``left``."""
    samplers, shares = data.samplers(), data.probabilities()
    for name, (budget, module, suffix) in ORIGINAL_KINDS.items():
        if name in samplers:
            yield _row(system, "system", suffix) | {
                "name": name,
                "probability": left * shares[name],
                "cameras": samplers[name],
                "trains": _trained(budget, system, data),
                "budget": budget,
                "loss": system.loss,
                "module": module,
            }


def _further_rows(
    further: Mapping[str, StepConfig], system: Any, data: DataModule.Config
) -> Iterator[dict[str, Any]]:
    for name, cfg in further.items():
        yield _row(cfg, f"steps.{name}") | {
            "name": name,
            "probability": cfg.probability,
            "cameras": _cameras(name, cfg, data.samplers()),
            "trains": _chosen(name, cfg, system, data),
            "budget": cfg.budget,
            "loss": {**system.loss, **cfg.loss},
            "module": f"guidance_{name}",
        }


def _chosen(name: str, cfg: StepConfig, system: Any, data: DataModule.Config) -> frozenset[Half]:
    """The halves that a further kind trains, maybe none; a recipe may name halves that do not learn yet."""
    of_images = _trained("image", system, data)
    learning = of_images | _trained("video", system, data)
    if cfg.probability > 0 and cfg.trains and not learning.intersection(cfg.trains):
        raise ConfigError(
            f"steps.{name}.trains={cfg.trains}: nothing of it learns in this stage; expected one of "
            f"{', '.join(sorted(learning))}, or the probability 0"
        )
    return of_images if cfg.trains is None else frozenset(cfg.trains)


def _trained(budget: Budget, system: Any, data: DataModule.Config) -> frozenset[Half]:
    """The halves of the scene that learn from the original's image steps, or from its video steps."""
    if data.static:
        return frozenset({"static"} if budget == "image" else ())
    if system.freeze_static_modules:
        return frozenset({"dynamic"})
    return frozenset({"static"} if budget == "image" else {"static", "dynamic"})


def _cameras(name: str, cfg: StepConfig, samplers: Mapping[str, CameraSampler]) -> CameraSampler | None:
    if cfg.cameras_of is None:
        return cfg.cameras and cfg.cameras.build()
    if cfg.cameras is not None:
        raise ConfigError(f"steps.{name}: cameras_of and cameras_type exclude each other; set one to null")
    if cfg.cameras_of not in samplers:
        known = ", ".join(samplers)
        raise ConfigError(f"steps.{name}.cameras_of={cfg.cameras_of}: no such kind; expected one of {known}")
    return samplers[cfg.cameras_of]


def _row(cfg: Any, where: str, suffix: str = "") -> dict[str, Any]:
    """A kind's guidance and text in a section of the config, from the keys with this ``suffix``."""
    return {
        "prompts": getattr(cfg, f"prompt_processor{suffix}"),
        "guidance": getattr(cfg, f"guidance{suffix}"),
        "guidance_type": getattr(cfg, f"guidance_type{suffix}"),
        "guidance_key": f"{where}.guidance{suffix}",
        "prompts_key": f"{where}.prompt_processor{suffix}",
        "prompts_type_key": f"{where}.prompt_processor_type{suffix}",
    }


def _complete(row: Mapping[str, Any]) -> StepKind:
    """The row as a kind of step.

    Raises:
        ConfigError: it lacks what a step of positive probability needs; names the key.
    """
    needed = {row["guidance_key"]: row["guidance"]}
    if row["guidance"] is None or row["guidance"].reads_text:
        needed[row["prompts_key"]] = row["prompts"]
    needed[f"steps.{row['name']}.cameras"] = row["cameras"]
    for key, part in needed.items():
        if part is None:
            raise ConfigError(
                f"{key}: missing, and {row['name']} steps have probability {row['probability']:g}; "
                f"set it and its type key, or the probability to 0"
            )
    return StepKind(**row)
