"""What an exporter is to the rest of the system."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fourdfy.bounds import number
from fourdfy.config import Component
from fourdfy.renderers.base import Scene
from fourdfy.types import Cameras, RenderOutput


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The trained scene that is exported."""

    scene: Scene
    render: Callable[[Cameras], RenderOutput]
    """Frames as they are evaluated."""
    name: str
    """The prompt, made fit for names (``saving.sanitize_tag``)."""
    cameras: Mapping[str, Cameras]
    """The evaluation sequences by name (see the data module): ``test``, ``val_video``, ..."""
    dynamic: bool
    """Whether the scene moves."""
    step: int
    """The global step of the checkpoint."""
    device: torch.device


class Exporter(Component, ABC):
    """A scene to files that other programs open."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        fps: float | None = number(None, 1, 240)
        """Frames of a clip (``num_frames * num_frames_factor`` of the data) in a second. One clip lasts as
        long in a video as in the animated GLB. null: what a camera file says, else 15."""

    def __init__(self, cfg: Component.Config) -> None:
        self.cfg = cfg

    @abstractmethod
    def export(self, subject: Subject, folder: Path) -> list[Path]:
        """Write into ``folder`` (made if missing); gives the files, the most useful first.

        Raises:
            ConfigError: the scene has nothing to export with these settings; says which to change.
        """
