"""The 4D-fy system: a scene, its renderer, and what supervises them (Bahmani et al. 2024)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourdfy.config import Component, ConfigError, build, ignored, slot
from fourdfy.data.datamodule import EvalBatch
from fourdfy.exporters.base import Exporter, Subject
from fourdfy.fields.base import Background, Geometry, Material
from fourdfy.guidance.base import Guidance
from fourdfy.ops.cameras import cast_rays
from fourdfy.ops.regularizers import REGULARIZERS
from fourdfy.prompts.base import PromptProcessor
from fourdfy.registry import register
from fourdfy.renderers.base import Renderer, Scene
from fourdfy.schedules import Schedule, check_schedule, schedule_max, schedule_value
from fourdfy.seeds import step_generator, step_seed
from fourdfy.systems.base import System
from fourdfy.systems.checkpoint import read_checkpoint
from fourdfy.systems.optim import GradientAudit, OptimizerConfig, build_optimizer, frozen
from fourdfy.systems.original import own_names
from fourdfy.systems.supervision import SupervisionPlan, SupervisionStep
from fourdfy.types import Cameras, RenderOutput, StepBatch, TextEmbeddings

logger = logging.getLogger(__name__)

GUIDANCES = {"guidance", "guidance_multi_view", "guidance_single_view", "guidance_video"}
"""What an optimizer group may name although the stage builds no such guidance, or never ("guidance")."""
GUIDANCE_LOSSES = ("sds", "vsd", "lora", "sds_video")


@register("fourdfy-system")
class FourdfySystem(System):
    """One stage of hybrid score distillation.

    Args:
        cfg: the parsed ``system`` section.
        plan: what supervises the stage.
        seed: of the experiment; with the step it determines every random draw.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        geometry_type: str = "implicit-volume"
        geometry: Any = slot(Geometry, "geometry_type")
        material_type: str = "no-material"
        material: Any = slot(Material, "material_type")
        background_type: str = "neural-environment-map-background"
        background: Any = slot(Background, "background_type")
        renderer_type: str = "nerf-volume-renderer"
        renderer: Any = slot(Renderer, "renderer_type")

        prompt_processor_type: str | None = None
        prompt_processor: Any = slot(PromptProcessor, "prompt_processor_type")
        prompt_processor_type_multi_view: str | None = None
        prompt_processor_multi_view: Any = slot(PromptProcessor, "prompt_processor_type_multi_view")
        prompt_processor_type_video: str | None = None
        prompt_processor_video: Any = slot(PromptProcessor, "prompt_processor_type_video")
        guidance_type: str | None = None
        guidance: Any = slot(Guidance, "guidance_type")
        guidance_type_multi_view: str | None = None
        guidance_multi_view: Any = slot(Guidance, "guidance_type_multi_view")
        guidance_type_video: str | None = None
        guidance_video: Any = slot(Guidance, "guidance_type_video")
        exporter_type: str = "mesh-exporter"
        exporter: Any = slot(Exporter, "exporter_type")

        loss: dict[str, Schedule] = field(default_factory=dict)
        """``lambda_NAME``: scheduled weight of the loss NAME; 0 or absent is off."""
        optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
        freeze_static_modules: bool = False
        """In dynamic stages, train the moving part of the scene alone."""
        weights: str | None = None
        """A checkpoint to start from: its scene, occupancy and LoRA, not its step or optimizer."""
        weights_ignore_modules: list[str] | None = None
        """Prefixes of parameters not to take from ``weights``."""

        stage: str | None = ignored("the losses' weights say what is on")
        prob_multi_view: float | None = ignored("data.prob_multi_view is read")
        prob_single_view_video: float | None = ignored("data.single_view.prob_single_view_video is read")
        simultan: bool | None = ignored("data.single_view.simultan is read")
        loggers: Any = ignored("the trial folder has TensorBoard and CSV logs")

        def __post_init__(self) -> None:
            known = (*GUIDANCE_LOSSES, *REGULARIZERS)
            for key, value in self.loss.items():
                check_schedule(value, f"loss.{key}")
                if key.removeprefix("lambda_") not in known and schedule_max(value) != 0:
                    choices = ", ".join(f"lambda_{name}" for name in known)
                    raise ValueError(f"loss.{key}={value}: there is no such loss; known: {choices}")

    cfg: Config

    def __init__(self, cfg: Config, *, plan: SupervisionPlan, seed: int) -> None:
        super().__init__()
        self.cfg, self.plan, self.seed = cfg, plan, seed
        torch.manual_seed(step_seed(seed, 0, "parameters"))
        self.geometry: Geometry = build(cfg.geometry)
        self.material: Material = build(cfg.material)
        self.background: Background = build(cfg.background)
        scene = Scene(self.geometry, self.material, self.background)
        self.renderer: Renderer = build(cfg.renderer, scene)
        self.texts: dict[str, TextEmbeddings] = {}
        self.audit = GradientAudit(frozenset(step.name for step in plan.steps))
        self.loaded_step = 0

    # -- set-up ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Build the guidances of the plan and embed their prompts; evaluation needs neither."""
        if stage != "fit":
            return
        device = self.trainer.strategy.root_device
        torch.manual_seed(step_seed(self.seed, 0, "guidance parameters"))
        for step in self.plan.steps:
            with _errors_of(f"system.{step.prompt_cfg}"):
                prompts: PromptProcessor = build(getattr(self.cfg, step.prompt_cfg))
                self.texts[step.name] = prompts.embeddings(device)
            with _errors_of(f"system.{step.guidance_cfg}"):
                guidance: Guidance = build(getattr(self.cfg, step.guidance_cfg), device=device)
                setattr(self, step.guidance, guidance)
        if self._guidance_weights:
            self._load_parameters(self._guidance_weights)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        built = {step.guidance for step in self.plan.steps}
        trains = frozenset[str]().union(*(step.trains for step in self.plan.steps))
        return build_optimizer(
            self.cfg.optimizer,
            self,
            absent=GUIDANCES - built,
            untrained=self.parameters_outside(trains),
        )

    # -- training -------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The global step; in evaluation that of the checkpoint."""
        return max(self.global_step, self.loaded_step)

    def on_train_batch_start(self, batch: StepBatch, batch_idx: int) -> None:
        self.renderer.update_occupancy(
            step=self.global_step, dynamic=self.plan.dynamic, generator=self._generator("occupancy")
        )

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        step = self.plan[batch.step]
        torch.manual_seed(step_seed(self.seed, self.global_step, "global"))  # for plugins that use it
        weights = self.active_losses(self.global_step)
        with frozen(self.parameters_outside(step.trains)):
            render = self.renderer(
                cast_rays(batch.cameras),
                step=self.global_step,
                generator=self._generator("render"),
                sample_budget=step.sample_budget,
            )
            guidance: Guidance = getattr(self, step.guidance)
            out = guidance(
                render.comp_rgb,
                self.texts[step.name],
                batch.cameras,
                step=self.global_step,
                generator=self._generator("guidance"),
            )
            losses = out.losses | {
                name: REGULARIZERS[name](render) for name in weights if name in REGULARIZERS
            }
        return self._weigh_and_log(step, losses, weights, out.metrics, render)

    def active_losses(self, global_step: int) -> dict[str, float]:
        """The weights that are not 0 at this step, by loss name."""
        weights = {
            key.removeprefix("lambda_"): schedule_value(value, global_step)
            for key, value in self.cfg.loss.items()
        }
        return {name: weight for name, weight in weights.items() if weight != 0}

    def parameters_outside(self, trains: frozenset[str]) -> Iterator[nn.Parameter]:
        """What must not learn from a step: the halves of the system that ``trains`` does not name."""
        if "dynamic" not in trains:
            yield from self.geometry.dynamic_parameters()
        if "static" not in trains:
            yield from self.geometry.static_parameters()
            yield from self.material.parameters()
            yield from self.background.parameters()
        if "guidance" not in trains:
            for step in self.plan.steps:
                yield from getattr(self, step.guidance).parameters()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.audit.is_new(self._last_kind):
            logger.info("%s", self.audit.record(self._last_kind, optimizer.param_groups))

    def _weigh_and_log(
        self,
        step: SupervisionStep,
        losses: Mapping[str, Tensor],
        weights: Mapping[str, float],
        metrics: Mapping[str, Tensor | float],
        render: RenderOutput,
    ) -> Tensor:
        self._last_kind = step.name
        weighted = [weights[name] * value for name, value in losses.items() if name in weights]
        if not weighted:
            raise ConfigError(
                f"system.loss: no loss of the {step.name} steps is on at step {self.global_step}; "
                f"set one of {', '.join(f'lambda_{name}' for name in losses)}"
            )
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            values = {f"loss/{step.name}/{name}": value.detach() for name, value in losses.items()}
            values |= {f"{step.name}/{name}": value for name, value in metrics.items()}
            values[f"{step.name}/samples"] = float(len(render.samples))
            values[f"{step.name}/opacity"] = render.opacity.detach().mean()
            self.log_dict(values, logger=False)  # for the progress line
            # Not through Lightning: its count of steps is one ahead after resuming from a validated step.
            for log in self.trainer.loggers:
                log.log_metrics({name: float(value) for name, value in values.items()}, self.global_step)
                log.save()
        return torch.stack(weighted).sum()

    def _generator(self, stream: str) -> torch.Generator:
        return step_generator(self.seed, self.global_step, stream, self.device)

    # -- evaluation -----------------------------------------------------------------------------

    @torch.no_grad()
    def render(self, cameras: Cameras) -> RenderOutput:
        """Frames as they are evaluated: nothing random, annealing as at the current step."""
        return self.renderer(cast_rays(cameras.to(self.device)), step=self.step)

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> RenderOutput:
        return self.render(batch.cameras)

    def test_step(self, batch: EvalBatch, batch_idx: int) -> RenderOutput:
        return self.render(batch.cameras)

    def export(self, folder: Path, cameras: Mapping[str, Cameras]) -> list[Path]:
        subject = Subject(
            scene=self.renderer.scene,
            render=self.render,
            cameras=cameras,
            dynamic=self.plan.dynamic,
            step=self.step,
            device=self.device,
        )
        return build(self.cfg.exporter).export(subject, folder)

    # -- checkpoints ----------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resuming: guidance weights wait for their guidance; evaluation does without them."""
        self.loaded_step = checkpoint["global_step"]
        own = set(self.state_dict())
        state = own_names(checkpoint["state_dict"], own)
        checkpoint["state_dict"] = {key: value for key, value in state.items() if key in own}
        if missing := sorted(own - set(state)):
            raise ConfigError(
                f"the checkpoint lacks {', '.join(missing[:3])}{' ...' if missing[3:] else ''}; "
                "was it made with another geometry or renderer?"
            )

    _guidance_weights: dict[str, Tensor] | None = None

    def load_weights(self) -> None:
        path, ignore = self.cfg.weights, self.cfg.weights_ignore_modules or []
        if not path:
            return
        state = {
            key: value
            for key, value in read_checkpoint(path)["state_dict"].items()
            if not any(key.startswith(prefix) for prefix in ignore)
        }
        self._guidance_weights = {k: v for k, v in state.items() if k.startswith("guidance_single_view.")}
        scene = {k: v for k, v in state.items() if not k.startswith("guidance")}
        taken = self._load_parameters(scene)
        if not taken:
            raise ConfigError(f"system.weights={path}: holds nothing that this system has")
        logger.info("system.weights: %d tensors from %s", taken, path)

    def _load_parameters(self, given: Mapping[str, Tensor]) -> int:
        own = self.state_dict()
        fits = {key: value for key, value in own_names(given, own).items() if key in own}
        for key, value in fits.items():
            if value.shape != own[key].shape:
                raise ConfigError(
                    f"system.weights: {key} has shape {list(value.shape)}, this config wants "
                    f"{list(own[key].shape)}; use the geometry of the earlier stage, or "
                    f"system.weights_ignore_modules"
                )
        self.load_state_dict(fits, strict=False)
        return len(fits)


@contextmanager
def _errors_of(key: str) -> Iterator[None]:
    """What a prior finds wrong with its settings when it loads, as an error of the config's ``key``."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, ModuleNotFoundError) as error:
        raise ConfigError(f"{key}: {error}") from error
