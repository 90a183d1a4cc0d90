"""Settings of different components that must agree, compared before anything is built."""

from __future__ import annotations

import logging
from typing import Any

from fourdfy.config import ConfigError
from fourdfy.systems.supervision import SupervisionPlan, SupervisionStep

logger = logging.getLogger(__name__)

GROUP_KEYS = {"multi_view": "multi_view.n_view", "video": "single_view.num_frames"}
"""The key of the data that sets ``Cameras.group_size``, by step; the frames of other steps are single."""


def check_agreement(cfg: Any, plan: SupervisionPlan) -> None:
    """Refuse a parsed ``ExperimentConfig`` whose parts contradict each other.

    Raises:
        ConfigError: names both keys and what to type.
    """
    _check_motion(cfg)
    cfg.system.scene_cfg.check_scene(dynamic=plan.dynamic)
    _check_scheduler(cfg)
    for step in plan.steps:
        for key in (step.guidance_cfg, step.prompt_cfg):
            if getattr(cfg.system, key) is None:
                raise ConfigError(
                    f"system.{key}: missing, and {step.name} steps have probability {step.probability:g}; "
                    f"set it and its type key, or the probability to 0"
                )
        _check_frames_and_texts(cfg, step)


def _check_scheduler(cfg: Any) -> None:
    if cfg.system.scheduler is not None:
        try:
            cfg.system.scheduler.check(cfg.trainer.max_steps)
        except ValueError as error:
            raise ConfigError(f"system.scheduler: {error}") from error


def _check_frames_and_texts(cfg: Any, step: SupervisionStep) -> None:
    prompts, guidance = getattr(cfg.system, step.prompt_cfg), getattr(cfg.system, step.guidance_cfg)
    size, source = 1, f"the number of {step.name} images that belong together"
    if key := GROUP_KEYS.get(step.name):
        section, _, name = key.partition(".")
        size, source = getattr(getattr(cfg.data, section), name), f"data.{key}"
    try:
        guidance.check_group_size(size, source)
        guidance.check_text_encoder(prompts.pretrained_model_name_or_path)
    except ConfigError:  # of a model's file
        raise
    except ValueError as error:
        raise ConfigError(f"system.{step.guidance_cfg}.{error}") from error
    if cfg.data.single_view.static and len(prompts.moments) > 1:
        logger.warning(
            "system.%s.moments: a static scene has the first alone, %r", step.prompt_cfg, prompts.moments[0]
        )
    if prompts.use_perp_neg and not getattr(guidance, "view_dependent_prompting", True):
        raise ConfigError(
            f"system.{step.prompt_cfg}.use_perp_neg=true weighs the texts of views; set "
            f"system.{step.guidance_cfg}.view_dependent_prompting=true, or it to false"
        )


def _check_motion(cfg: Any) -> None:
    view = cfg.data.single_view
    if view.simultan and view.prob_single_view_video is None:
        raise ConfigError(
            "data.single_view.simultan=true needs the share of its video steps; set "
            "data.single_view.prob_single_view_video=0.5, or simultan to false"
        )
    if not view.simultan and view.prob_single_view_video:
        logger.warning(
            "data.single_view.prob_single_view_video=%s: no effect, data.single_view.simultan is false",
            view.prob_single_view_video,
        )
    if view.static and cfg.system.freeze_static_modules:
        raise ConfigError(
            "system.freeze_static_modules=true leaves nothing to train where data.single_view.static=true; "
            "set one of the two to false"
        )
