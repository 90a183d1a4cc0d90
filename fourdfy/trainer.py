"""Lightning's Trainer as every mode uses it; imported only by what trains or evaluates."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from fourdfy.callbacks.renders import SaveRenders
from fourdfy.experiment import Experiment
from fourdfy.systems.lightning import SafeCheckpointIO

logger = logging.getLogger(__name__)


def build_trainer(experiment: Experiment, device: str, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    """The Trainer of an experiment, with ``callbacks`` beside the one that saves what is rendered."""
    cfg, trial = experiment.cfg.trainer, experiment.trial_dir
    if not logger.isEnabledFor(logging.DEBUG):
        for name in ("pytorch_lightning", "lightning_fabric"):  # they set INFO when they are imported
            logging.getLogger(name).setLevel(logging.ERROR)
    return pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_steps=cfg.max_steps,
        min_epochs=0,
        log_every_n_steps=cfg.log_every_n_steps,
        num_sanity_val_steps=cfg.num_sanity_val_steps,
        val_check_interval=cfg.val_check_interval or None,
        limit_val_batches=None if cfg.val_check_interval else 0,
        precision=cfg.precision,  # type: ignore[arg-type]
        gradient_clip_val=cfg.gradient_clip_val,
        deterministic=cfg.deterministic,
        inference_mode=False,
        logger=[TensorBoardLogger(trial, name="tb_logs"), CSVLogger(trial, name="csv_logs")],
        callbacks=[*callbacks, SaveRenders(trial / "save")],
        plugins=[SafeCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
