"""Which processor a run uses."""

from __future__ import annotations

import logging
import os
import re

from fourdfy.config import ConfigError

logger = logging.getLogger(__name__)


def use_device(gpu: str | None) -> str:
    """What ``select_device`` gives, made the current device of CUDA; says so if there is no GPU."""
    import torch

    device = select_device(gpu)
    if device != "cpu":
        torch.cuda.set_device(device)
    elif gpu is None:
        logger.info("no GPU found: running on the CPU")
    return device


def select_device(gpu: str | None) -> str:
    """``cpu`` or ``cuda:N`` for a value of ``--gpu``; without one the first GPU, or the CPU if there is none.

    N counts the GPUs that CUDA_VISIBLE_DEVICES leaves visible, as everywhere in CUDA; where that is a single
    number, N may be that number too, as in the original.

    Raises:
        ConfigError: there is no such GPU, or the value names none or several.
    """
    match = re.fullmatch(r"cpu|cuda|(?:cuda:)?(\d+)", "cuda" if gpu is None else gpu)
    if not match and re.fullmatch(r"\d+(,\d+)+", str(gpu)):
        raise ConfigError(f"--gpu {gpu}: several GPUs are not supported yet; give one, e.g. --gpu 0")
    if not match:
        raise ConfigError(f"--gpu {gpu}: expected cpu, cuda, cuda:N, or N, the number of a GPU")
    if gpu == "cpu":
        return "cpu"
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = 0 if match[1] == visible else int(match[1] or 0)
    count = torch.cuda.device_count()
    if index < count:
        return f"cuda:{index}"
    if gpu is None:
        return "cpu"
    of = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
    if count == 0:
        raise ConfigError(
            f"--gpu {gpu}: PyTorch {torch.__version__} sees no GPU{of}; without --gpu the run is on the CPU"
        )
    known = "only --gpu 0" if count == 1 else f"--gpu 0 to --gpu {count - 1}"
    raise ConfigError(f"--gpu {gpu}: no such GPU; PyTorch sees {known}{of}")
