"""The interface of an exporter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fourdfy.bounds import number
from fourdfy.config import Component, ConfigError
from fourdfy.files.images import VALIDATION_FPS
from fourdfy.files.names import sanitize_tag
from fourdfy.scenes.base import Scene, VolumeScene
from fourdfy.types import Cameras, RenderOutput, StepContext


@dataclass(frozen=True, kw_only=True)
class TrainedScene:
    """A scene as a checkpoint holds it, and what its names and lengths come from."""

    scene: Scene
    prompt: str
    cameras: Mapping[str, Cameras]
    """The evaluation sequences by name (see the data module): ``test``, ``val_video``, ..."""
    dynamic: bool
    """Whether the scene moves."""
    step: int
    """The global step of the checkpoint."""
    device: torch.device

    @torch.no_grad()
    def render(self, cameras: Cameras) -> RenderOutput:
        """Render frames for evaluation."""
        return self.scene.render(cameras.to(self.device), StepContext(self.step))

    @property
    def volume(self) -> VolumeScene:
        """The scene, if it has a density.

        Raises:
            ConfigError: it has none.
        """
        if not isinstance(self.scene, VolumeScene):
            raise ConfigError(
                f"system.exporter_type: a {type(self.scene).__name__} has no density to make a mesh of; use "
                "system.exporter_type=video-exporter"
            )
        return self.scene

    @property
    def name(self) -> str:
        """The prompt as a valid file name."""
        return sanitize_tag(self.prompt)

    @property
    def clip_seconds(self) -> float:
        """How long the validation video of a moving scene lasts, which is one clip."""
        return len(self.cameras["val_video"]) / VALIDATION_FPS


class Exporter(Component, ABC):
    """Writes a scene into files that other programs can open."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        clip_seconds: float | None = number(None, 0.01, 3600)
        """Seconds that the scene's time takes from 0 to 1, in videos and animated meshes alike; null: as in
        the validation video."""

    def __init__(self, cfg: Component.Config) -> None:
        self.cfg = cfg

    @abstractmethod
    def export(self, trained: TrainedScene, folder: Path) -> list[Path]:
        """Write into ``folder`` (made if missing); returns the files, the most useful first.

        Raises:
            ConfigError: the scene has nothing to export with these settings; says which to change.
        """
