"""Lightning's Trainer as every mode uses it; imported only by what trains or evaluates."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment

from fourdfy.callbacks.curves import Curves
from fourdfy.callbacks.renders import SaveRenders
from fourdfy.launching.experiment import Experiment
from fourdfy.systems.lightning import SafeCheckpointIO

logger = logging.getLogger(__name__)


class OneProcess(LightningEnvironment):
    """A run of one process, whatever a scheduler or a launcher has left in the environment.

    Lightning would take rank and size of the run from it, and with the rank whether to log at all.
    """

    creates_processes_externally = False

    def __init__(self) -> None:
        super().__init__()
        self.set_global_rank(0)  # also for what asks rank_zero_only, which read the environment at import

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0

    def teardown(self) -> None:
        """Leave the environment as it is."""


def build_trainer(experiment: Experiment, device: str, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    """The Trainer of an experiment, with ``callbacks`` beside the one that saves what is rendered."""
    cfg, trial = experiment.cfg.trainer, experiment.trial_dir
    if not logger.isEnabledFor(logging.DEBUG):
        for name in ("pytorch_lightning", "lightning_fabric"):  # they set INFO when they are imported
            logging.getLogger(name).setLevel(logging.ERROR)
    if device == "cpu" and cfg.precision in (16, "16-mixed"):
        logger.warning("trainer.precision=%s: not on a CPU; bf16-mixed is used", cfg.precision)
    curves = next((callback for callback in callbacks if isinstance(callback, Curves)), None)
    return pl.Trainer(
        default_root_dir=trial,
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1 if device == "cpu" else [torch.device(device).index or 0],
        max_steps=cfg.max_steps,
        min_epochs=0,
        log_every_n_steps=cfg.log_every_n_steps,
        num_sanity_val_steps=cfg.num_sanity_val_steps,
        val_check_interval=cfg.steps_between_validations * cfg.accumulate_grad_batches or None,
        limit_val_batches=cfg.limit_val_batches if cfg.val_check_interval else 0,
        precision=cfg.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=cfg.accumulate_grad_batches,
        gradient_clip_val=cfg.gradient_clip_val,
        gradient_clip_algorithm=cfg.gradient_clip_algorithm,
        detect_anomaly=cfg.detect_anomaly,
        deterministic=cfg.deterministic,
        inference_mode=False,
        logger=False,
        callbacks=[*callbacks, SaveRenders(trial / "save", curves)],
        plugins=[SafeCheckpointIO(), OneProcess()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
