"""The processes (ranks) of a training on several devices, which Lightning's launcher or torchrun starts."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch

from fourdfy.devices import LAUNCHED, by_torchrun, local_rank, on_device
from fourdfy.ops.ranks import RankError, Ranks, together

logger = logging.getLogger(__name__)

OBSERVER = "lightning_fabric.strategies.launchers.subprocess_script"
"""The logger of Lightning's thread that looks after the processes, and ends them all when one has failed."""

LAST_WORDS_SECONDS = 3.0
"""For which the first rank waits, once it has lost another one, for that one to say why."""


@contextmanager
def as_ranks(devices: Sequence[str], timeout_minutes: float) -> Iterator[str]:
    """The device of this process, one of those that compute a training together; all are left at the end.

    Unless torchrun did, the first process starts the others, with its own command line. They end here; what
    follows is the first one's.

    Args:
        devices: one for each process on this machine.
        timeout_minutes: for which ranks wait for each other.

    Raises:
        RankError: a rank has not found the others, or has lost them.
    """
    if len(devices) == 1 and not by_torchrun():
        with on_device(devices[0]):
            yield devices[0]
        return
    device, before = devices[local_rank()], dict(os.environ)
    us, processes = _ranks(len(devices)), _launch(devices)
    with on_device(device):
        try:
            _join(us, device, timeout_minutes)
            with together(us):
                yield device
        except FloatingPointError:
            if us.rank > 0:  # all ranks judge alike, and the first one says it
                raise SystemExit(0) from None
            raise
        except BaseException as error:
            _end(processes, LAST_WORDS_SECONDS if isinstance(error, RankError) else 0.0)
            raise
        finally:
            processes.clear()  # of the thread that looks after them
            if torch.distributed.is_initialized():
                with suppress(RuntimeError):
                    torch.distributed.destroy_process_group()
            os.environ.clear()
            os.environ.update(before)
    if us.rank > 0:
        raise SystemExit(0)


def _ranks(count: int) -> Ranks:
    """This process, and all of them; ``count`` on this machine."""
    if by_torchrun():
        return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return Ranks(local_rank(), count)


def _launch(devices: Sequence[str]) -> list[Any]:
    """The other processes, if nobody has started them: the list of the thread that looks after them."""
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

    class Environment(LightningEnvironment):
        creates_processes_externally = LAUNCHED in os.environ

        def local_rank(self) -> int:
            return local_rank()

        def node_rank(self) -> int:
            return 0

    logging.getLogger(OBSERVER).setLevel(logging.INFO)
    environment = TorchElasticEnvironment() if by_torchrun() else Environment()
    nodes = int(os.environ["WORLD_SIZE"]) // len(devices) if by_torchrun() else 1
    launcher = _SubprocessScriptLauncher(environment, len(devices), nodes)
    if LAUNCHED in os.environ:
        _end_with(int(os.environ[LAUNCHED]))
    elif not by_torchrun():
        logger.info("a step is computed on %s together", ", ".join(devices))
        for name in ("MASTER_ADDR", "MASTER_PORT"):  # of somebody else
            os.environ.pop(name, None)
        os.environ |= {LAUNCHED: str(os.getpid()), "LOCAL_RANK": "0"}  # they end with this process
    launcher.launch(lambda: None)
    return launcher.procs


def _join(us: Ranks, device: str, timeout_minutes: float) -> None:
    """Join the others; host and GPU have their own way of communication."""
    try:
        torch.distributed.init_process_group(
            "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
            rank=us.rank,
            world_size=us.count,
            timeout=timedelta(minutes=timeout_minutes),
        )
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise RankError(
            f"rank {us.rank}: can't join the other ranks: {reason}; if they are slow to start, raise "
            f"trainer.rank_timeout_minutes={timeout_minutes:g}"
        ) from error


def _end(processes: list[Any], patience: float) -> None:
    """End and forget processes; at once, or the thread that looks after them would end this one with them."""
    until = time.monotonic() + patience
    others, processes[:] = [*processes], []
    for process in others:
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
        process.wait()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, even if it waits for a GPU that waits for the parent's.

    Not on Windows, where a process is never told that its parent is gone.
    """
    if os.name == "nt":
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(LAST_WORDS_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
