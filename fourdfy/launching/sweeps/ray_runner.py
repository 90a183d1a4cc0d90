"""Tasks on a Ray cluster: one that runs already, or one started here for the purpose."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fourdfy.bounds import number
from fourdfy.config import ConfigError
from fourdfy.launching.sweeps.runners import Runner, Task
from fourdfy.registry import register

ANSWER_SECONDS = 10.0
"""For a cluster to answer."""


@register("ray")
class RayRunner(Runner):
    """Tasks of Ray, which queues them until their GPUs are free. All machines see the same files.

    Raises:
        ConfigError: Ray is not installed, no cluster answers, or none of its machines is large enough.
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
            self._connect()
        gpus = 0.0 if gpu == "cpu" else cfg.num_gpus
        options = ray.remote(num_gpus=gpus, num_cpus=cfg.num_cpus, max_retries=0)
        self._run = options(_run)
        self._needed = {name: each for name, each in (("GPU", gpus), ("CPU", cfg.num_cpus)) if each}
        if self.capacity < 1:
            without = ", or train without a GPU: --gpu cpu" if gpus else ""
            raise ConfigError(
                f"runner: no machine of the Ray cluster has {gpus:g} GPUs and {cfg.num_cpus:g} processors; "
                f"ask for fewer with num_gpus and num_cpus{without}"
            )

    def _connect(self) -> None:
        address = self.cfg.address or "local"
        try:
            _check_answers(address)
            self._ray.init(
                address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"runner.address={address}: no Ray cluster answers; type: ray start --head, or leave "
                "address out for one on this machine alone"
            ) from error

    @property
    def capacity(self) -> int:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return sum(  # a task is on one of them
            int(min((there.get(name, 0) / each for name, each in self._needed.items()), default=1))
            for there in nodes
        )

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


def _check_answers(address: str) -> None:
    """Raise ``ConnectionError`` if it names a machine that does not; Ray itself tries for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        except OSError as error:
            raise ConnectionError(str(error)) from error


def _run(task: Task) -> int:
    return task.run()
