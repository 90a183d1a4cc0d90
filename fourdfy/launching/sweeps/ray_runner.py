"""Tasks on a Ray cluster: one that runs already, or one started here for the purpose."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fourdfy.bounds import number
from fourdfy.config import ConfigError
from fourdfy.launching.sweeps.runners import Runner, Task
from fourdfy.registry import register


@register("ray")
class RayRunner(Runner):
    """Tasks of Ray, which queues them until their GPUs are free. All machines see the same files.

    Raises:
        ConfigError: Ray is not installed.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Runner.Config):
        address: str | None = None
        """Of a cluster, or ``auto`` for the one that this machine belongs to; null starts one here."""
        num_gpus: float = number(1.0, 0)
        """GPUs of each task: half a one lets two tasks share it; 0 with ``--gpu cpu``."""
        num_cpus: float = number(1.0, 0)
        """Processors that Ray sets aside for each task."""

    cfg: Config

    def __init__(self, cfg: Config, gpu: str | None = None) -> None:
        super().__init__(cfg, gpu)
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                "runner.type=ray: Ray is not installed; type: pip install 'ray>=2.50'"
            ) from error
        self._ray = ray
        if not ray.is_initialized():
            ray.init(
                address=cfg.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
        gpus = 0.0 if gpu == "cpu" else cfg.num_gpus
        options = ray.remote(num_gpus=gpus, num_cpus=cfg.num_cpus, max_retries=0)
        self._run = options(_run)
        needed = [(name, each) for name, each in (("GPU", gpus), ("CPU", cfg.num_cpus)) if each]
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # a task is on one of them
        self._capacity = sum(
            int(min((there.get(name, 0) / each for name, each in needed), default=1)) for there in nodes
        )
        if self._capacity < 1:
            raise ConfigError(
                f"runner: no machine of the Ray cluster has {gpus:g} GPUs and {cfg.num_cpus:g} processors"
            )

    @property
    def capacity(self) -> int:
        return self._capacity

    def start(self, tasks: Sequence[Task]) -> Sequence[Any]:
        return [self._run.remote(task) for task in tasks]

    def poll(self, handle: Any) -> int | None:
        ready, _ = self._ray.wait([handle], timeout=0)
        if not ready:
            return None
        try:
            return self._ray.get(handle)
        except self._ray.exceptions.RayError:  # the worker or its machine has died, or it was cancelled
            return 1

    def stop(self, handle: Any) -> None:
        self._ray.cancel(handle)  # raises KeyboardInterrupt in the worker


def _run(task: Task) -> int:
    return task.run()
