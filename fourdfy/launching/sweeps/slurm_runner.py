"""Tasks in SLURM's queue, submitted as job arrays by submitit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fourdfy.bounds import number
from fourdfy.config import ConfigError
from fourdfy.launching.sweeps.runners import Runner, Task
from fourdfy.registry import register

REQUEUES = 10_000
"""After which submitit gives a job up that runs out of time; its own limit is three."""


@register("slurm")
class SlurmRunner(Runner):
    """Jobs of SLURM. One that is preempted or runs out of time saves, is queued again and continues.

    Raises:
        ConfigError: submitit is not installed or refuses a parameter, or there is no SLURM.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Runner.Config):
        at_once: int = number(100, 1)
        """Jobs in the queue at a time."""
        minutes: int = number(24 * 60, 1)
        """Time limit of a job; it is queued again if that does not suffice."""
        folder: str = "outputs/slurm"
        """Of SLURM's own logs and scripts, which all machines see."""
        parameters: dict[str, Any] = field(default_factory=dict)
        """More of submitit's: ``slurm_partition``, ``slurm_account``, ``cpus_per_task``, ``mem_gb``."""
        cluster: str | None = None
        """``local`` or ``debug`` run jobs here, to try it; null: SLURM."""

    cfg: Config

    def __init__(self, cfg: Config, gpu: str | None = None) -> None:
        super().__init__(cfg, gpu)
        try:
            import submitit
        except ImportError as error:
            raise ConfigError("runner.type=slurm: submitit is missing; type: pip install submitit") from error
        self._submitit = submitit
        try:
            self._executor = submitit.AutoExecutor(
                folder=cfg.folder, cluster=cfg.cluster or "slurm", slurm_max_num_timeout=REQUEUES
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"runner.type=slurm: {error}; start the sweep on a login node, or try it here: cluster: local"
            ) from error
        own = {"name": "fourdfy", "timeout_min": cfg.minutes, "gpus_per_node": 0 if gpu == "cpu" else 1}
        try:
            self._executor.update_parameters(**own | cfg.parameters)
        except (NameError, AssertionError, TypeError, ValueError) as error:
            raise ConfigError(
                f"runner.parameters: {str(error).splitlines()[0]}; expected such as "
                "{slurm_partition: gpu, cpus_per_task: 8, mem_gb: 32}"
            ) from error

    @property
    def capacity(self) -> int:
        return self.cfg.at_once

    def start(self, tasks: Sequence[Task]) -> Sequence[Any]:
        return self._executor.map_array(Requeued(), tasks) if tasks else []

    def poll(self, handle: Any) -> int | None:
        if not handle.done():
            return None
        try:
            return handle.result()
        except Exception:  # whatever became of it: killed, cancelled, out of memory
            return 1

    def stop(self, handle: Any) -> None:
        handle.cancel()


class Requeued:
    """Runs a task; submitit queues it again when SLURM takes the machine away."""

    def __call__(self, task: Task) -> int:
        return task.run()

    def checkpoint(self, task: Task) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, task)
