"""``--replay``: a training step whose numbers were not finite is repeated, to find the first of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fourdfy.devices import on_device, select_device
from fourdfy.launching.experiment import PARSED, load_experiment
from fourdfy.launching.train import import_trainer
from fourdfy.ops.finite import not_finite
from fourdfy.seeds import set_generator_states
from fourdfy.systems.broken_step import first_not_finite, read_step

logger = logging.getLogger(__name__)


def replay(file: Path, overrides: Sequence[str], *, gpu: str | None) -> str:
    """Repeat the step of a replay file and log what is not finite first; also returned, "" if nothing is.

    Args:
        overrides: changes of the config that the file holds, such as the path of a model.
        gpu: see ``select_device``.

    Raises:
        ConfigError: it is no replay file, or its config does not work here.
    """
    content = read_step(file)
    with TemporaryDirectory() as folder:
        parsed = Path(folder) / PARSED.name
        parsed.write_text(content["config"], encoding="utf-8")
        experiment = load_experiment([parsed], overrides)
    device = select_device(gpu)
    cfg, parts = experiment.cfg, content["parts"]
    step, kind = content["step"], parts[-1].kind
    losses = ", ".join(f"{name} {value:g}" for name, value in content["losses"].items())
    logger.info("global step %d, a %s step: its losses were %s", step, kind, losses)
    if broken := not_finite(content["state_dict"]):
        found = f"what the step is given, {', '.join(broken)}"
    else:
        import_trainer()
        from fourdfy.launching.lightning import build_loops, memory_budget

        if hasattr(cfg.system, "compile"):  # what is recorded shows nothing of its inside
            cfg = replace(cfg, system=replace(cfg.system, compile=False))
        precision = build_loops(cfg.trainer, Path(), device).precision_plugin
        with on_device(device):
            system = replace(experiment, cfg=cfg).build_system().to(device)
            system.prepare(torch.device(device), resumed=True)
            system.load_checkpoint({"state_dict": content["state_dict"], "global_step": step})
            system.configure_optimizer()
            if system.device.type == "cuda":
                with precision.forward_context():
                    system.bound_memory(memory_budget(system.device, cfg.trainer.memory_budget_gb))
            set_generator_states(content["generators"], system.device)
            parts = [part.to(system.device) for part in parts]
            found = first_not_finite(system, parts, precision.forward_context)
    if found:
        logger.info("the first that is not finite: %s", found)
    else:
        logger.info("everything is finite here%s", "" if device.startswith(content["device"]) else DRAWS)
    return found


DRAWS = "; the step was computed on another device, whose random draws are others: --gpu"
