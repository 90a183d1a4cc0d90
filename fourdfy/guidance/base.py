"""What a guidance is to the rest of the system: images in, losses out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from fourdfy.config import Component
from fourdfy.types import Cameras, GuidanceOutput, RenderOutput, StepContext, TextEmbeddings


class Guidance(Component, nn.Module, ABC):
    """A frozen prior, and possibly a few trained parameters of its own (a LoRA).

    Frozen networks are kept out of the module tree: they are not saved, moved or counted.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        def models(self) -> list[tuple[str, tuple[str, ...]]]:
            """Every model that is needed, by its name or path, with the parts that are."""
            return []

        def activation_bytes(self, frames: int, height: int, width: int) -> int:
            """About what a step of so many rendered frames keeps for the backward pass; 0 where unknown."""
            return 0

        def check_group_size(self, size: int, key: str) -> None:
            """Refuse steps in which other numbers of frames belong together than the prior takes as one.

            Args:
                size: ``Cameras.group_size`` of the steps.
                key: what sets it, for the message.

            Raises:
                ValueError: begins with the key of this config that speaks against it.
            """

        def check_text_encoder(self, name: str) -> None:
            """Refuse the model ``name`` for texts, as far as both it and the prior's are on this disk.

            Raises:
                ValueError: begins with the key of this config that speaks against it.
            """

    cfg: Config

    def __init__(self, cfg: Config, *, device: torch.device) -> None:
        super().__init__()
        self.cfg = cfg
        self.device = device

    @abstractmethod
    def forward(
        self,
        frames: RenderOutput,
        text: TextEmbeddings | None,
        cameras: Cameras,
        context: StepContext,
    ) -> GuidanceOutput:
        """Losses of rendered frames, seen from as many ``cameras``.

        Args:
            text: None where the step has no prompt.
            context: with a generator, which all randomness comes from.
        """
