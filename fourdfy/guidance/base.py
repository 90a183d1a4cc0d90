"""The interface of a guidance: rendered frames in, losses out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import nn

from fourdfy.config import Component
from fourdfy.priors.base import Prior
from fourdfy.types import Cameras, GuidanceOutput, RenderOutput, StepContext, TextEmbeddings


class Guidance(Component, nn.Module, ABC):
    """Supervises a kind of step, usually by a prior and a distillation of it (``guidance.pairs``).

    Its parameters (a LoRA) can be trained and are saved; those of a prior are not among them.
    """

    Config = Prior.Config
    """What the launcher needs to know of both: models, memory, frames, text encoder."""
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
            text: None if the step has no prompt.
            context: has a generator, from which all randomness comes.
        """
