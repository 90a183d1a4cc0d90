"""What a data module is to the rest of the system."""

from __future__ import annotations

import pytorch_lightning as pl

from fourdfy.config import Component


class DataModule(Component, pl.LightningDataModule):
    """Gives the frames of every training step and of the evaluations."""
