"""Numbers on their way from a GPU to the host, which goes on meanwhile."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class Reading:
    """A copy of ``values`` as they are at this point of the device's work; on a CPU it is there at once."""

    def __init__(self, values: Float[Tensor, "N"]) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values.detach()
        if values.is_cuda:
            on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = on_host.copy_(self._values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def is_ready(self) -> bool:
        """Whether ``numbers`` would not wait."""
        return self._event is None or self._event.query()

    def numbers(self) -> list[float]:
        """The values; waits for the device if they are not there yet."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
