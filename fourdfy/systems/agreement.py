"""Settings of different components that must agree, compared before anything is built."""

from __future__ import annotations

import logging
from typing import Any

from fourdfy.config import ConfigError
from fourdfy.prompts.base import PromptProcessor
from fourdfy.registry import find
from fourdfy.systems.supervision import StepKind, SupervisionPlan

logger = logging.getLogger(__name__)


def check_agreement(cfg: Any, plan: SupervisionPlan) -> None:
    """Refuse a parsed ``ExperimentConfig`` with parts that contradict each other.

    Raises:
        ConfigError: names both keys and what to type.
    """
    cfg.data.check()
    cfg.system.check(cfg.data, plan)
    _check_scheduler(cfg)
    for kind in plan.kinds:
        _check_frames_and_texts(kind, static=cfg.data.static)
    _check_still_texts(plan)


def _check_scheduler(cfg: Any) -> None:
    if cfg.system.scheduler is not None:
        try:
            cfg.system.scheduler.check(cfg.trainer.max_steps)
        except ValueError as error:
            raise ConfigError(f"system.scheduler: {error}") from error


def _check_frames_and_texts(kind: StepKind, *, static: bool) -> None:
    prompts, guidance, cameras = kind.prompts, kind.guidance, kind.cameras
    if prompts is not None:
        _check_processor(kind)
    try:
        source = cameras.group_key or f"the number of {kind.name} images that belong together"
        guidance.check_group_size(cameras.group_size, source)
        if prompts is not None:
            guidance.check_text_encoder(prompts.pretrained_model_name_or_path)
    except ConfigError:  # of a model's file
        raise
    except ValueError as error:
        raise ConfigError(f"{kind.guidance_key}.{error}") from error
    if prompts is None:
        return
    if static and len(prompts.moments) > 1:
        logger.warning(
            "%s.moments: a static scene has the first alone, %r", kind.prompts_key, prompts.moments[0]
        )
    if prompts.use_perp_neg and not guidance.view_dependent_prompting:
        raise ConfigError(
            f"{kind.prompts_key}.use_perp_neg=true weighs the texts of views; set "
            f"{kind.guidance_key}.view_dependent_prompting=true, or it to false"
        )


def _check_still_texts(plan: SupervisionPlan) -> None:
    """Warn of texts for clips held still that are missing, or that nothing reads."""
    clips = [kind.prompts_key for kind in plan.kinds if kind.guidance.is_video and kind.prompts is not None]
    for kind in plan.kinds:
        if kind.prompts is None:
            continue
        key, guidance = f"{kind.prompts_key}.prompt_still", kind.guidance_key
        if kind.guidance.still_source and kind.prompts.prompt_still is None:
            logger.warning(
                "%s.still_source=true without %s: the clip held still gets the prompt itself; set the latter "
                "to the prompt without its motion",
                guidance,
                key,
            )
        elif kind.prompts.prompt_still is None or kind.guidance.still_source:
            continue
        elif clips and not kind.guidance.is_video:
            logger.warning("%s: no effect on images; clips have their own, %s.prompt_still", key, clips[0])
        else:
            logger.warning("%s: no effect, %s.still_source is false", key, guidance)


def _check_processor(kind: StepKind) -> None:
    """Refuse texts of another model's kind, which may have as many channels, or not be on this disk yet."""
    names = kind.guidance.text_processors
    if names and not isinstance(kind.prompts, tuple(find(name, PromptProcessor).Config for name in names)):
        raise ConfigError(
            f"{kind.prompts_key}: its texts are not those that {kind.guidance_type} was trained with; "
            f"set {kind.prompts_type_key}={names[0]}"
        )
