"""Batches of cameras: a pure function of (seed, step) to train, sequences to evaluate."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fourdfy.bounds import number
from fourdfy.data import trajectories
from fourdfy.data.base import DataModule
from fourdfy.data.sampling import (
    MultiViewConfig,
    SingleViewConfig,
    sample_multi_view,
    sample_single_view,
    sample_video,
)
from fourdfy.registry import register
from fourdfy.seeds import step_generator
from fourdfy.types import Cameras, StepBatch, TensorRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalBatch(TensorRecord):
    """Some consecutive frames of an evaluation sequence."""

    split: str
    """``val`` (stills), ``val_video``, ``test`` or ``test_static``."""
    indices: Int[Tensor, "F"]
    """Positions of the frames in the sequence."""
    total: int
    """Frames of the whole sequence."""
    cameras: Cameras


@register("single-multiview-combined-camera-datamodule")
class CombinedCameraDataModule(DataModule):
    """Single views, groups of views and videos, as the supervision plan asks for them."""

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

    cfg: Config

    def __init__(self, cfg: Config, *, seed: int, choose_step: Callable[[int], str]) -> None:
        """``choose_step`` names the kind of a global step, purely: multi_view, single_view or video."""
        self.cfg, self.seed, self.choose_step = cfg, seed, choose_step
        self.samplers = {
            "multi_view": lambda **at: sample_multi_view(cfg.multi_view, cfg.single_view, **at),
            "single_view": lambda **at: sample_single_view(cfg.single_view, **at),
            "video": lambda **at: sample_video(cfg.single_view, **at),
        }
        for name, view in (("single_view", cfg.single_view), ("multi_view", cfg.multi_view)):
            if view.resolution_milestones and all(
                isinstance(value, int) for value in (view.height, view.width, view.batch_size)
            ):
                logger.warning("data.%s.resolution_milestones: no effect, nothing changes there", name)

    def batch(self, step: int, part: int = 0) -> StepBatch:
        """The frames of a (part of a) global step, whatever came before it.

        Raises:
            ValueError: the plan names a step that there is no sampler for.
        """
        name = self.choose_step(step)
        if name not in self.samplers:
            raise ValueError(
                f"no cameras for a step named {name!r}; known: {', '.join(sorted(self.samplers))}. "
                f"A plugin adds its own to the data module's `samplers`"
            )
        cameras = self.samplers[name](
            step=step, generator=step_generator(self.seed, step, "camera", part=part)
        )
        return StepBatch(step=name, cameras=cameras, global_step=step, part=part)

    def val_cameras(self, dynamic: bool) -> dict[str, Cameras]:
        """``val``: stills at time 0; dynamic scenes also have ``val_video``, a clip from the front."""
        sequences = {"val": trajectories.stills(self.cfg.single_view)}
        if dynamic:
            sequences["val_video"] = trajectories.front_video(self.cfg.single_view)
        return sequences

    def test_cameras(self, dynamic: bool) -> dict[str, Cameras]:
        """``test``: once around, or the moving sequence and then (``test_static``) its views at time 0."""
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
        return DataLoader(batches, batch_size=None)


def chunks(split: str, cameras: Cameras, size: int) -> Iterator[EvalBatch]:
    """The sequence in pieces of ``size`` frames."""
    for indices in torch.arange(len(cameras)).split(size):
        some = cameras[int(indices[0]) : int(indices[-1]) + 1]
        yield EvalBatch(split=split, indices=indices, total=len(cameras), cameras=some)


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
