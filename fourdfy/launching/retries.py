"""What runs out of GPU memory is repeated with half as much at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from fourdfy.ops.ranks import ranks
from fourdfy.ops.replay import release_recordings
from fourdfy.systems.base import DoesNotFit

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
"""In errors of CUDA, of its libraries and of the CPU's allocator."""


def until_it_fits(work: Callable[[], Result], halve: Callable[[], Mapping[str, int]], where: str) -> Result:
    """``work()``, repeated for as long as it runs out of memory.

    Args:
        work: draws the same random numbers in each call, and changes nothing if it fails.
        halve: see ``System.halve_chunks``.
        where: the step, for messages.

    Raises:
        DoesNotFit: nothing can be halved any more, or there are several ranks.
    """
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = ". ".join(str(error).split(". ")[:3])
        # Here the error is gone, and with its traceback all tensors of the attempt.
        on_gpu = torch.cuda.is_initialized()
        if on_gpu:
            torch.cuda.synchronize()  # a recording may run beside what failed
        release_recordings()
        if on_gpu:
            torch.cuda.empty_cache()
        if not (halved := halve()):
            raise DoesNotFit(
                f"{where}: out of memory, and it computes as little at once as it can; use images of fewer "
                f"pixels or fewer frames, or close other programs that use the GPU ({reason})"
            )
        settings = " ".join(f"{key}={value}" for key, value in halved.items())
        if ranks().count > 1:  # the others wait for what this one has not sent
            raise DoesNotFit(f"{where}: out of memory, and no rank repeats a step alone; add {settings}")
        logger.warning("%s: out of memory; repeated with less at once; for good: %s", where, settings)


def make_room(optimizer: torch.optim.Optimizer) -> None:
    """Have PyTorch hold, unused, what a step of the optimizer may allocate: two tensors per parameter.

    They are its moments in the first step, and copies in each step without fused kernels. Where they don't
    fit, the step itself would fail with some parameters changed, and could not be repeated.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    _ = [torch.empty_like(parameter) for parameter in parameters for _ in range(2)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less memory would have avoided it."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)
