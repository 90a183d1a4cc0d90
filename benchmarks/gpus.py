"""Run jobs side by side on the visible GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

Job, Result = TypeVar("Job"), TypeVar("Result")


def spread(jobs: Iterable[Job], run: Callable[[Job, str], Result], per_gpu: int = 1) -> list[Result]:
    """Return ``run(job, gpu)`` of every job, in order; a job takes a free GPU, or ``cpu`` without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    places = (visible.split(",") if visible else ["cpu"]) * per_gpu
    free: SimpleQueue[str] = SimpleQueue()
    for place in places:
        free.put(place)

    def in_turn(job: Job) -> Result:
        place = free.get()
        try:
            return run(job, place)
        finally:
            free.put(place)

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(in_turn, jobs))


def environment(place: str) -> dict[str, str]:
    """Return the environment of a process that sees one GPU, or none if ``place`` is ``cpu``."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": "" if place == "cpu" else place}
