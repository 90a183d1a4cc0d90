"""The 4D-fy system: a scene, its renderer, and what supervises them (Bahmani et al. 2024)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fourdfy import registry
from fourdfy.bounds import scheduled
from fourdfy.config import ConfigError, slot
from fourdfy.data.base import DataModule
from fourdfy.exporters.base import Exporter, TrainedScene
from fourdfy.files.atomic import warn_once
from fourdfy.guidance.base import Guidance
from fourdfy.ops.finite import not_finite
from fourdfy.ops.ranks import largest, ranks
from fourdfy.ops.regularizers import REGULARIZERS
from fourdfy.original.checkpoints import own_names
from fourdfy.prompts.base import PromptProcessor
from fourdfy.prompts.library import resolve_prompt
from fourdfy.registry import register
from fourdfy.scenes.base import Scene
from fourdfy.scenes.nerf.scene import NeRFScene
from fourdfy.schedules import Schedule, schedule_max
from fourdfy.seeds import seeded, step_generator, step_seed
from fourdfy.systems.base import StepOutput, System
from fourdfy.systems.checkpoint import read_checkpoint
from fourdfy.systems.learning_rates import SchedulerConfig
from fourdfy.systems.optim import GradientAudit, OptimizerConfig, build_optimizer, frozen
from fourdfy.systems.supervision import Half, StepKind, SupervisionPlan
from fourdfy.types import Cameras, RenderOutput, StepBatch, StepContext, TextEmbeddings

logger = logging.getLogger(__name__)

PRIORS_SHARE = 0.75
"""Of the GPU memory that models and parameters leave, what a prior's activations may take at most."""


@register("fourdfy-system")
class FourdfySystem(System):
    """One stage of hybrid score distillation.

    Args:
        cfg: the parsed ``system`` section.
        plan: what supervises the stage.
        seed: of the experiment; with the step it determines every random draw.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(System.Config, NeRFScene.Config):
        scene_type: str | None = None
        scene: Any = slot(Scene, "scene_type")
        """A scene of another kind, instead of the NeRF that ``geometry``, ``material``, ``background`` and
        ``renderer`` describe."""

        prompt_processor_type: str | None = None
        prompt_processor: Any = slot(PromptProcessor, "prompt_processor_type")
        prompt_processor_type_multi_view: str | None = None
        prompt_processor_multi_view: Any = slot(
            PromptProcessor, "prompt_processor_type_multi_view", shares="prompt_processor.prompt"
        )
        prompt_processor_type_video: str | None = None
        prompt_processor_video: Any = slot(
            PromptProcessor, "prompt_processor_type_video", shares="prompt_processor.prompt"
        )
        guidance_type: str | None = None
        guidance: Any = slot(Guidance, "guidance_type")
        guidance_type_multi_view: str | None = None
        guidance_multi_view: Any = slot(Guidance, "guidance_type_multi_view")
        guidance_type_video: str | None = None
        guidance_video: Any = slot(Guidance, "guidance_type_video")
        exporter_type: str = "mesh-exporter"
        exporter: Any = slot(Exporter, "exporter_type")

        compile: bool | str = "auto"
        """How frozen networks run on a GPU. auto: recorded as CUDA graphs, and large ones (over 100 million
        parameters) compiled by torch.compile, which takes a minute or two each, once; true: all are compiled,
        on a CPU too; false: neither."""
        loss: dict[str, Schedule] = scheduled({}, 0, 1e6)
        """``lambda_NAME`` is the scheduled weight of the loss NAME; 0 or absent switches it off."""
        optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
        scheduler: SchedulerConfig | None = None
        """How the learning rates change; null: they are constant."""
        freeze_static_modules: bool = False
        """In dynamic stages, train only the moving half of the scene."""
        weights_ignore_modules: list[str] | None = None
        """Prefixes of parameters that are not loaded from ``weights``."""

        def __post_init__(self) -> None:
            if self.compile not in (True, False, "auto"):
                raise ValueError(f"compile={self.compile!r}; expected auto, true or false")
            if self.scene is None:
                NeRFScene.Config.__post_init__(self)

        @property
        def prompt(self) -> str | None:
            """What the scene shows: the library's prompt where a short name of it is given."""
            return self.prompt_processor and resolve_prompt(self.prompt_processor.prompt)

        def check(self, data: DataModule.Config, plan: SupervisionPlan) -> None:
            if data.static and self.freeze_static_modules:
                raise ConfigError(
                    "system.freeze_static_modules=true leaves nothing to train where "
                    "data.single_view.static=true; set one of the two to false"
                )
            self.scene_cfg.check_scene(dynamic=not data.static)
            self._check_losses(self.loss, "system.loss", plan)
            for kind in plan.kinds:
                own = {key: value for key, value in kind.loss.items() if self.loss.get(key) != value}
                self._check_losses(own, f"steps.{kind.name}.loss", plan)
                losses = kind.guidance.component.losses
                weights = {name: kind.loss[key] for name in losses if (key := f"lambda_{name}") in kind.loss}
                if losses and not weights:
                    raise ConfigError(
                        f"{kind.guidance_key}: none of its losses has a weight; "
                        f"set system.loss.lambda_{losses[0]}"
                    )
                of_scene = weights.keys() - set(kind.guidance.component.own_losses)
                if losses and not any(schedule_max(weights[name]) for name in of_scene):
                    warn_once(
                        f"{kind.guidance_key}: its losses of the scene have weight 0, so its steps teach the "
                        f"scene nothing of it; set system.loss.lambda_{losses[0]}, or leave the guidance out"
                    )

        def _check_losses(self, loss: Mapping[str, Schedule], where: str, plan: SupervisionPlan) -> None:
            """Every weight has its loss: of a guidance, in this stage or another, or of what is rendered."""
            of_stage = {name for kind in plan.kinds for name in kind.guidance.component.losses}
            for key, value in loss.items():
                name = key.removeprefix("lambda_")
                if name == key:
                    raise ConfigError(f"{where}.{key}: unknown key; did you mean 'lambda_{key}'?")
                if schedule_max(value) == 0 or name in of_stage:
                    continue
                if (regularizer := REGULARIZERS.get(name)) is None:
                    known = [f"lambda_{name}" for name in (*_guidance_losses(), *REGULARIZERS)]
                    if key not in known:
                        raise ConfigError(
                            f"{where}.{key}={value}: there is no such loss; known: {', '.join(known)}"
                        )
                elif missing := [field for field in regularizer.needs if field not in self.scene_cfg.renders]:
                    advice = f", or use {regularizer.advice}" if regularizer.advice else ""
                    raise ConfigError(
                        f"{where}.{key}={value}: needs {missing[0]}, which this scene does not render; "
                        f"set it to 0{advice}"
                    )

        @property
        def scene_cfg(self) -> Scene.Config:
            """The config of the scene: ``scene`` if it is given, else the NeRF's own keys."""
            return self.scene or self

        @property
        def absent_parts(self) -> set[str]:
            """Parts that an optimizer group may name although this scene has none."""
            return set() if self.scene is None else {"geometry", "material", "background", "renderer"}

    cfg: Config

    def __init__(self, cfg: Config, *, plan: SupervisionPlan, seed: int) -> None:
        super().__init__()
        self.cfg, self.plan, self.seed = cfg, plan, seed
        with seeded(step_seed(seed, 0, "parameters")):
            self.scene: Scene = NeRFScene(cfg) if cfg.scene is None else cfg.scene.build()
        self.texts: dict[str, TextEmbeddings] = {}
        self.audit = GradientAudit(frozenset(kind.name for kind in plan.kinds))
        self.step = 0

    # -- set-up ---------------------------------------------------------------------------------

    def prepare(self, device: torch.device, *, resumed: bool) -> None:
        weights = {} if resumed else self.read_weights()
        self.load_weights(weights)  # before the models, so that a mismatch shows at once
        with seeded(step_seed(self.seed, 0, "guidance parameters")):
            for kind in self.plan.kinds:
                if kind.prompts is not None:
                    with _errors_of(kind.prompts_key):
                        self.texts[kind.name] = kind.prompts.build().embeddings(device)
                with _errors_of(kind.guidance_key):
                    guidance: Guidance = kind.guidance.build(device=device)
                    if kind.prompts is not None:
                        guidance.cfg.check_text_encoder(kind.prompts.pretrained_model_name_or_path)
                    if self.cfg.compile is True or (self.cfg.compile == "auto" and device.type == "cuda"):
                        guidance.accelerate(compile_small=self.cfg.compile is True)
                    setattr(self, kind.module, guidance)
        if weights:  # again, now that the LoRA exists and can load its own
            logger.info("system.weights: %d tensors from %s", self.load_weights(weights), self.cfg.weights)

    def bound_memory(self, budget: float) -> None:
        # A gradient, that of a pass which is added to it, and the optimizer's moments.
        later = 4 * sum(p.numel() * p.element_size() for p in self.parameters() if p.requires_grad)
        room = budget - torch.cuda.memory_allocated(self.device) - later
        priors = max(
            self._prior_bytes(kind, (math.ceil(frames / ranks().count), height, width), room)
            for kind in self.plan.kinds
            for frames, height, width in kind.cameras.sizes()
        )
        if room <= priors:
            logger.warning(
                "trainer.memory_budget_gb: the models and the scene alone take about %.1f GiB",
                (budget - room + priors) / 2**30,
            )
        self.scene.bound_memory(room - priors)

    def _prior_bytes(self, kind: StepKind, size: tuple[int, int, int], room: float) -> int:
        """Bytes of a prior's activations for frames of a ``size``, once they are a share of the room."""
        guidance: Guidance = getattr(self, kind.module)
        while (taken := guidance.cfg.activation_bytes(*size)) > PRIORS_SHARE * room:
            if not (halved := guidance.halve_chunks(size[0])):
                break
            fitting = " ".join(f"{kind.guidance_key}.{key}={value}" for key, value in halved.items())
            logger.info("trainer.memory_budget_gb: as if %s were set, which fits", fitting)
        return taken

    def halve_chunks(self, batch: StepBatch | None) -> dict[str, int]:
        kind = None if batch is None else self.plan[batch.kind]
        section = "system" if self.cfg.scene is None else "system.scene"
        parts = {section: self.scene.halve_chunks(None if kind is None else kind.budget)}
        if batch and kind:
            guidance: Guidance = getattr(self, kind.module)
            parts[kind.guidance_key] = guidance.halve_chunks(len(batch.cameras))
        return {f"{part}.{key}": value for part, halved in parts.items() for key, value in halved.items()}

    def configure_optimizer(self) -> torch.optim.Optimizer:
        optimizer = build_optimizer(
            self.cfg.optimizer,
            self,
            absent=self.plan.absent | self.cfg.absent_parts,
            untrained=self.untrained(),
        )
        # Only parameters in a group still require gradients; a group set to null is deliberate.
        for name in sorted({kind.module for kind in self.plan.kinds} - self.cfg.optimizer.params.keys()):
            adapter = list(getattr(self, name).parameters())
            if adapter and not any(p.requires_grad for p in adapter):
                logger.info("system.optimizer.params: no group holds the LoRA of %s; it stays as it is", name)
        return optimizer

    def untrained(self) -> Iterator[nn.Parameter]:
        return self.parameters_outside(frozenset[Half]().union(*(kind.trains for kind in self.plan.kinds)))

    def configure_scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        with _errors_of("system.scheduler"):
            return None if self.cfg.scheduler is None else self.cfg.scheduler.build(optimizer)

    def guidances(self) -> Mapping[str, Guidance]:
        return {kind.name: getattr(self, kind.module) for kind in self.plan.kinds}

    # -- training -------------------------------------------------------------------------------

    def before_step(self, batch: StepBatch) -> None:
        self.scene.before_step(self._context(batch, "occupancy"), dynamic=self.plan.dynamic)

    def training_step(self, batch: StepBatch) -> StepOutput:
        kind = self.plan[batch.kind]
        weights = kind.loss_weights(batch.step)
        with frozen(self.parameters_outside(kind.trains)):
            render = self.scene.render(batch.cameras, self._context(batch, "render"), kind.budget)
            render = replace(render, group_size=batch.cameras.group_size)
            guidance: Guidance = getattr(self, kind.module)
            text, context = self.texts.get(kind.name), self._context(batch, "guidance")
            out = guidance(render, text, batch.cameras, context)
            with _errors_of(kind.guidance_key):
                guidance.check_output(out, {key.removeprefix("lambda_") for key in kind.loss})
            losses = out.losses | {
                name: REGULARIZERS[name](render) for name in weights if name in REGULARIZERS
            }
        if self.audit.is_new(kind.name) and out.losses.keys() & weights:
            self.audit.watch(kind.name, render.comp_rgb)
        weighted = [weights[name] * value for name, value in losses.items() if name in weights]
        if not weighted:
            raise ConfigError(
                f"system.loss: no loss of the {kind.name} steps has a weight at step {batch.step}; "
                f"set one of {', '.join(f'lambda_{name}' for name in losses)}"
            )
        return StepOutput(
            loss=torch.stack(weighted).sum(),
            losses={name: value.detach() for name, value in losses.items()},
            loss_weights={name: weight for name, weight in weights.items() if name in losses},
            metrics={
                **out.metrics,
                **({} if render.samples is None else {"samples": float(len(render.samples))}),
                "opacity": render.opacity.detach().mean(),
            },
        )

    def after_backward(self, batch: StepBatch, optimizer: torch.optim.Optimizer) -> None:
        if self.audit.is_new(batch.kind):
            logger.debug("%s", self.audit.record(batch.kind, optimizer.param_groups))
            reaches = bool(self.audit.images.get(batch.kind) != 0)
            if not any(largest([reaches])):  # a rank may have no share of the images
                key = self.plan[batch.kind].guidance_key
                logger.warning(
                    "%s: no gradient of its losses reaches the images; is %s.grad_clip 0?", key, key
                )
        self.scene.after_backward(self._context(batch, "after backward"), optimizer)

    def parameters_outside(self, trains: frozenset[Half]) -> Iterator[nn.Parameter]:
        """The scene's parameters that are in none of the halves in ``trains``."""
        for half, parameters in self.scene.halves().items():
            if half not in trains:
                yield from parameters

    def _context(self, batch: StepBatch, stream: str) -> StepContext:
        generator = step_generator(self.seed, batch.step, stream, self.device, batch.part)
        return StepContext(batch.step, generator)

    # -- evaluation -----------------------------------------------------------------------------

    @torch.no_grad()
    def render(self, cameras: Cameras) -> RenderOutput:
        """Render frames for evaluation: without randomness, annealed as at ``step``."""
        return self.scene.render(cameras.to(self.device), StepContext(self.step))

    def export(self, folder: Path, cameras: Mapping[str, Cameras]) -> list[Path]:
        trained = TrainedScene(
            scene=self.scene,
            prompt=self.cfg.prompt or "scene",
            cameras=cameras,
            dynamic=self.plan.dynamic,
            step=self.step,
            device=self.device,
        )
        return self.cfg.exporter.build().export(trained, folder)

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self, *args: Any, **keywords: Any) -> dict[str, Any]:
        """Modules under the names of 4D-fy's checkpoints, with the scene beside the guidances."""
        state = super().state_dict(*args, **keywords)
        return {name.removeprefix("scene."): value for name, value in state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **keywords: Any) -> Any:
        inside = {name.removeprefix("scene."): name for name in super().state_dict()}
        state = {inside.get(name, name): value for name, value in state_dict.items()}
        return super().load_state_dict(state, *args, **keywords)

    def load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        own = self.state_dict()
        state = own_names(checkpoint["state_dict"], own)
        if missing := sorted(own.keys() - state.keys()):
            raise ConfigError(
                f"resume: the checkpoint lacks {', '.join(missing[:3])}{' ...' if missing[3:] else ''}; "
                "was it made with another geometry or renderer?"
            )
        given = {key: state[key] for key in own}
        own = self._fitted(given)
        _check_fit(given, own, "resume", "use the geometry that the checkpoint was made with")
        self.load_state_dict(given)
        self.step = checkpoint["global_step"]

    def read_weights(self) -> dict[str, Tensor]:
        """The tensors of ``system.weights`` without ``weights_ignore_modules``; empty if it is not set."""
        if not self.cfg.weights:
            return {}
        return {
            key: value
            for key, value in read_checkpoint(self.cfg.weights)["state_dict"].items()
            if not key.startswith(tuple(self.cfg.weights_ignore_modules or ()))
        }

    def load_weights(self, weights: Mapping[str, Tensor]) -> int:
        """Load what fits by name; returns the number of tensors loaded.

        Raises:
            ConfigError: a tensor has another shape, or none of the weights fits.
        """
        own = self.state_dict()
        fits = {key: value for key, value in own_names(weights, own).items() if key in own}
        if weights and not fits:
            raise ConfigError(f"system.weights={self.cfg.weights}: holds nothing that this system has")
        own = self._fitted(fits)
        hint = "use the geometry of the earlier stage, or system.weights_ignore_modules"
        _check_fit(fits, own, "system.weights", hint)
        self.load_state_dict(fits, strict=False)
        return len(fits)

    def _fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The system's own state, once the scene has taken the shapes of ``state`` as far as it can."""
        self.scene.fit_state(state)
        return self.state_dict()


def _check_fit(given: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str, hint: str) -> None:
    for key, value in given.items():
        if value.shape != own[key].shape:
            wanted = list(own[key].shape)
            raise ConfigError(
                f"{source}: {key} has shape {list(value.shape)}, this config expects {wanted}; {hint}"
            )
    if broken := not_finite(given):
        raise ConfigError(
            f"{source}: {broken[0]} holds numbers that are not finite; use an earlier checkpoint"
        )


def _guidance_losses() -> list[str]:
    """The losses of every guidance that is registered."""
    guidances = [registry.find(name, Guidance) for name in registry.names(Guidance)]
    return list(dict.fromkeys(loss for guidance in guidances for loss in guidance.losses))


@contextmanager
def _errors_of(key: str) -> Iterator[None]:
    """Turn an error of a prior while it loads into an error of the config's ``key``."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, ModuleNotFoundError) as error:
        raise ConfigError(f"{key}: {error}") from error
