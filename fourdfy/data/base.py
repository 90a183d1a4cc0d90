"""The interface of a data module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch.utils.data import DataLoader

from fourdfy.config import Component
from fourdfy.types import Cameras, StepContext, TensorRecord


@dataclass(frozen=True, kw_only=True)
class EvalBatch(TensorRecord):
    """Some consecutive frames of an evaluation sequence."""

    split: str
    """``val`` (stills), ``val_video``, ``test`` or ``test_static``."""
    cameras: Cameras


class CameraSampler(Component, ABC):
    """Draws the frames of one kind of training step."""

    group_key: ClassVar[str | None] = None
    """The key of the config that sets ``group_size``; None where frames are single."""

    def __init__(self, cfg: Component.Config) -> None:
        self.cfg = cfg

    @property
    def group_size(self) -> int:
        """``Cameras.group_size`` of its frames."""
        return 1

    @abstractmethod
    def sample(self, context: StepContext) -> Cameras:
        """The frames of a step, on the CPU; a pure function of the step and the generator."""

    @abstractmethod
    def sizes(self) -> list[tuple[int, int, int]]:
        """(frames, height, width) of a step, one entry for each stretch of training that differs."""


class DataModule(Component, ABC):
    """Provides the frames of every training step and of the evaluations.

    It is built with the experiment's seed, ``choose_kind`` (global step -> name of its kind, purely) and
    the ``samplers`` of these kinds by name.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        @property
        def static(self) -> bool:
            """Whether the scene does not move; every time is then 0."""
            return True

        def probabilities(self) -> dict[str, float]:
            """Shares of the steps of the module's own kinds, by name; together 1."""
            return {}

        def samplers(self) -> dict[str, CameraSampler]:
            """The samplers of the module's own kinds of step, by name."""
            return {}

        def check(self) -> None:
            """Refuse settings that contradict each other, or warn of those without effect.

            Raises:
                ConfigError: names both keys and what to type.
            """

    cfg: Config

    @abstractmethod
    def train_dataloader(self, start_step: int, parts: int = 1) -> DataLoader:
        """Batches of consecutive global steps, from ``start_step``; ``parts`` of them for each step."""

    @abstractmethod
    def val_dataloader(self) -> DataLoader:
        """The batches of ``val_cameras``."""

    @abstractmethod
    def test_dataloader(self) -> DataLoader:
        """The batches of ``test_cameras``."""

    @abstractmethod
    def val_cameras(self, dynamic: bool) -> dict[str, Cameras]:
        """Validation sequences by name; ``dynamic`` says whether the scene moves."""

    @abstractmethod
    def test_cameras(self, dynamic: bool) -> dict[str, Cameras]:
        """Test sequences by name."""
