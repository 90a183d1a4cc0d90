"""Batches of cameras: for training a pure function of (seed, step), for evaluation fixed sequences."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, IterableDataset

from fourdfy.bounds import number
from fourdfy.config import ConfigError
from fourdfy.data import trajectories
from fourdfy.data.base import CameraSampler, DataModule, EvalBatch
from fourdfy.data.sampling import MultiViews, SingleViews, Videos
from fourdfy.data.settings import MultiViewConfig, SingleViewConfig
from fourdfy.registry import register
from fourdfy.seeds import step_generator
from fourdfy.types import Cameras, StepBatch, StepContext

logger = logging.getLogger(__name__)

MOST_PIXELS, MOST_FRAMES = 2**28, 200_000
"""Bounds of evaluations: pixels rendered at once, and test frames."""


@register("single-multiview-combined-camera-datamodule")
class CombinedCameraDataModule(DataModule):
    """Single views, groups of views and videos, as the supervision plan requires."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DataModule.Config):
        single_view: SingleViewConfig = field(default_factory=SingleViewConfig)
        """Image and video steps, and evaluation."""
        multi_view: MultiViewConfig = field(default_factory=MultiViewConfig)
        """Multi-view steps."""
        prob_multi_view: float | None = number(None, 0, 1)
        """Share of multi-view steps; read by the supervision plan."""

        def __post_init__(self) -> None:
            for key in ("num_frames", "sample_rand_frames"):
                ours, clip = getattr(self.multi_view, key), getattr(self.single_view, key)
                if not self.single_view.static and ours is not None and ours != clip:
                    raise ValueError(
                        f"data.multi_view.{key}={ours} disagrees with data.single_view.{key}={clip}, and all "
                        f"steps see the moments of one clip; set data.multi_view.{key}=null"
                    )

        @property
        def static(self) -> bool:
            return self.single_view.static

        def probabilities(self) -> dict[str, float]:
            groups = self.prob_multi_view or 0.0
            videos = (self.single_view.prob_single_view_video or 0.0) if self.single_view.simultan else 0.0
            return {
                "multi_view": groups,
                "single_view": (1 - groups) * (1 - videos),
                "video": (1 - groups) * videos,
            }

        def samplers(self) -> dict[str, CameraSampler]:
            return {
                "multi_view": MultiViews(self.multi_view, self.single_view),
                "single_view": SingleViews(self.single_view),
                "video": Videos(self.single_view),
            }

        def check(self) -> None:
            for name, each in (("single_view", self.single_view), ("multi_view", self.multi_view)):
                sizes = (each.height, each.width, each.batch_size)
                if each.resolution_milestones and all(isinstance(size, int) for size in sizes):
                    logger.warning("data.%s.resolution_milestones: no effect, nothing changes there", name)
            view = self.single_view
            pixels = view.eval_batch_size * view.eval_height * view.eval_width
            if pixels > MOST_PIXELS:
                raise ConfigError(
                    f"data.single_view.eval_batch_size x eval_height x eval_width is {pixels:,} pixels at "
                    f"once; expected {MOST_PIXELS:,} at most"
                )
            clips = view.num_test_loop_static * (1 + view.num_test_loop_factor)
            if (frames := view.num_frames * view.num_frames_factor * clips) > MOST_FRAMES:
                raise ConfigError(
                    "data.single_view.num_frames x num_frames_factor x num_test_loop_static x "
                    f"(1 + num_test_loop_factor) is {frames:,} test frames; expected {MOST_FRAMES:,} at most"
                )
            if view.simultan and view.prob_single_view_video is None:
                raise ConfigError(
                    "data.single_view.simultan=true needs the share of its video steps; set "
                    "data.single_view.prob_single_view_video=0.5, or simultan to false"
                )
            if not view.simultan and view.prob_single_view_video:
                logger.warning(
                    "data.single_view.prob_single_view_video=%s: no effect, data.single_view.simultan is "
                    "false",
                    view.prob_single_view_video,
                )
            if view.static and self.probabilities()["video"] > 0:
                raise ConfigError(
                    "data.single_view.static=true leaves video steps nothing to train; set "
                    "data.single_view.simultan=false or data.single_view.static=false"
                )

    cfg: Config

    def __init__(
        self,
        cfg: Config,
        *,
        seed: int,
        choose_kind: Callable[[int], str],
        samplers: Mapping[str, CameraSampler],
    ) -> None:
        self.cfg, self.seed, self.choose_kind, self.samplers = cfg, seed, choose_kind, samplers

    def batch(self, step: int, part: int = 0) -> StepBatch:
        """The frames of a (part of a) global step, independent of all earlier ones."""
        kind = self.choose_kind(step)
        generator = step_generator(self.seed, step, "camera", part=part)
        cameras = self.samplers[kind].sample(StepContext(step, generator))
        return StepBatch(kind=kind, cameras=cameras, step=step, part=part)

    def val_cameras(self, dynamic: bool) -> dict[str, Cameras]:
        """``val``: stills at time 0; dynamic scenes also have ``val_video``, a clip from the front."""
        sequences = {"val": trajectories.stills(self.cfg.single_view)}
        if dynamic:
            sequences["val_video"] = trajectories.front_video(self.cfg.single_view)
        return sequences

    def test_cameras(self, dynamic: bool) -> dict[str, Cameras]:
        """``test``: once around, or the moving sequence, with its views at time 0 as ``test_static``."""
        if not dynamic:
            return {"test": trajectories.turntable(self.cfg.single_view)}
        moving = trajectories.moving_test(self.cfg.single_view)
        return {"test": moving, "test_static": at_rest(moving)}

    def train_dataloader(self, start_step: int, parts: int = 1) -> DataLoader:
        return DataLoader(_Steps(self, start_step, parts), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation(self.val_cameras(dynamic=not self.cfg.single_view.static))

    def test_dataloader(self) -> DataLoader:
        return self._evaluation(self.test_cameras(dynamic=not self.cfg.single_view.static))

    def _evaluation(self, sequences: dict[str, Cameras]) -> DataLoader:
        size = self.cfg.single_view.eval_batch_size
        batches = [batch for name, cameras in sequences.items() for batch in chunks(name, cameras, size)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # torch takes any sequence


def chunks(split: str, cameras: Cameras, size: int) -> Iterator[EvalBatch]:
    """The sequence in pieces of ``size`` frames."""
    for start in range(0, len(cameras), size):
        yield EvalBatch(split=split, cameras=cameras[start : start + size])


def at_rest(cameras: Cameras) -> Cameras:
    """The same views, all at time 0."""
    return Cameras(**{**vars(cameras), "times": torch.zeros_like(cameras.times)})


class _Steps(IterableDataset):
    """An endless stream of batches; each is computed from its step alone."""

    def __init__(self, data: CombinedCameraDataModule, start_step: int, parts: int) -> None:
        super().__init__()
        self.data, self.start_step, self.parts = data, start_step, parts

    def __iter__(self) -> Iterator[StepBatch]:
        for step in itertools.count(self.start_step):
            yield from (self.data.batch(step, part) for part in range(self.parts))
