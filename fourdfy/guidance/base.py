"""What a guidance is to the rest of the system: rendered frames in, losses out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import nn

from fourdfy.config import Component
from fourdfy.priors.base import Prior
from fourdfy.types import Cameras, GuidanceOutput, RenderOutput, StepContext, TextEmbeddings


class Guidance(Component, nn.Module, ABC):
    """What supervises a kind of step: mostly a prior and a distillation of it (``guidance.pairs``).

    Its parameters (a LoRA) can be trained and are saved; a prior is not among them.
    """

    Config = Prior.Config
    """The launcher asks of either: its models, its memory, its frames, its text encoder."""
    losses: ClassVar[tuple[str, ...]] = ()
    """Names of the losses that it may give: ``system.loss.lambda_sds`` weighs ``sds``."""

    cfg: Prior.Config

    def __init__(self, cfg: Prior.Config, *, device: torch.device) -> None:
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
