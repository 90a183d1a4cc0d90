"""The interface of a guidance: rendered frames in, losses out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar

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
    other_names: ClassVar = ("PRIOR+DISTILLATION",)
    """What names a guidance besides the names that are registered, for messages."""
    losses: ClassVar[tuple[str, ...]] = ()
    """Names of the losses that it may give: ``system.loss.lambda_sds`` weighs ``sds``."""
    own_losses: ClassVar[tuple[str, ...]] = ()
    """Those of them that teach only the guidance's own parameters, not the scene."""

    cfg: Prior.Config

    def __init__(self, cfg: Prior.Config, *, device: torch.device) -> None:
        super().__init__()
        self.cfg = cfg
        self.device = device

    def accelerate(self, compile_small: bool) -> None:
        """Called once, before training on a GPU: whatever is called with the same shapes in each step may be
        compiled and recorded (``system.compile``).

        Args:
            compile_small: compile also what is too small to earn it back.
        """

    def halve_chunks(self, frames: int) -> dict[str, int]:
        """See ``Prior.halve_chunks``."""
        return {}

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

    def check_output(self, output: Any, weighted: Collection[str]) -> None:
        """Refuse what ``forward`` gives if a plugin is wrong in a way that training would not show.

        Args:
            weighted: the losses that have a weight, be it 0.

        Raises:
            ValueError: a loss that nobody weighs, or that is not a scalar; not a ``GuidanceOutput``.
        """
        name = f"{type(self).__name__}.forward"
        if not isinstance(output, GuidanceOutput):
            raise ValueError(f"{name} gives a {type(output).__name__}, expected a GuidanceOutput")
        for loss, value in output.losses.items():
            if loss not in self.losses and loss not in weighted:
                raise ValueError(
                    f"{name} gives the loss {loss!r}, which has no weight; "
                    f"name it in the class's losses and set system.loss.lambda_{loss}"
                )
            if value.ndim:
                raise ValueError(f"{name} gives the loss {loss!r} of shape {list(value.shape)}, expected []")
