"""What a system is to the launcher."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from fourdfy.config import Component
from fourdfy.types import Cameras, RenderOutput


class System(Component, pl.LightningModule):
    """A scene that learns."""

    loaded_step: int
    """The global step of the checkpoint whose weights are held; 0 for a fresh system."""

    @abstractmethod
    def render(self, cameras: Cameras) -> RenderOutput:
        """Frames as they are evaluated."""

    @abstractmethod
    def export(self, folder: Path, cameras: Mapping[str, Cameras]) -> list[Path]:
        """Write what ``system.exporter`` says into ``folder``; ``cameras`` are the data module's
        evaluation sequences. Gives the files."""

    @abstractmethod
    def load_weights(self) -> None:
        """Take what fits by name from ``system.weights``, if that is set; training starts at step 0."""

    @abstractmethod
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what this system has from a checkpoint's state."""
