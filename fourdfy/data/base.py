"""What a data module is to the rest of the system."""

from __future__ import annotations

from abc import abstractmethod

from torch.utils.data import DataLoader

from fourdfy.config import Component
from fourdfy.types import Cameras


class DataModule(Component):
    """Gives the frames of every training step and of the evaluations."""

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
        """Validation sequences by name; ``dynamic``: of a scene that moves."""

    @abstractmethod
    def test_cameras(self, dynamic: bool) -> dict[str, Cameras]:
        """Test sequences by name."""
