"""What the back ends compiled by numba share: the compiler's options, and threads.

Threads are plain ones, as many as torch uses: the kernels release the GIL, numba's own threads need a long
compilation each, and an OpenMP pool beside torch's would fight it for the cores.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

logger = logging.getLogger(__name__)


def compiled(function: Callable, *, fuse: bool = True) -> Callable:
    """``njit``; the machine code is cached on disk if numba finds a writable folder.

    Args:
        fuse: whether a product and a sum may be rounded once together.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"} if fuse else False}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError as error:  # raised at the definition
        logger.debug("%s is compiled anew in every process (%s)", function.__name__, error)
        return njit(function, **options)


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory, without its graph."""
    return tensor.detach().numpy()


def shares(start: int, stop: int, multiple: int) -> list[tuple[int, int]]:
    """The range in one piece per thread; all but the last have a ``multiple`` as length."""
    share = -(-(stop - start) // torch.get_num_threads())
    share = max(1, -(-share // multiple)) * multiple
    return [(first, min(first + share, stop)) for first in range(start, stop, share)]


def in_parallel(work: Callable[..., None], parts: Sequence[tuple[int, ...]]) -> None:
    """Call ``work(*part)`` for all parts; of k threads each takes every k-th, the first ones this thread."""
    n_threads = max(1, min(torch.get_num_threads(), len(parts)))

    def work_through(first: int) -> None:
        for part in parts[first::n_threads]:
            work(*part)

    others = [_pool(os.getpid(), n_threads - 1).submit(work_through, k) for k in range(1, n_threads)]
    work_through(0)
    for other in others:
        other.result()


@cache
def _pool(pid: int, n_threads: int) -> ThreadPoolExecutor:
    """``pid`` is part of the key because threads do not survive a fork."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix="fourdfy")
