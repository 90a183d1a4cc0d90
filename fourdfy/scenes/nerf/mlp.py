"""Small networks between an encoding and the renderer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.bounds import number
from fourdfy.config import Component
from fourdfy.ops.activations import get_activation
from fourdfy.ops.mlp import mlp
from fourdfy.registry import register


@register("VanillaMLP")
class VanillaMLP(Component, nn.Module):
    """Linear layers, ReLU between them.

    Runs in its parameters' dtype even inside autocast: half precision is too coarse for densities.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        n_neurons: int = number(64, 1, 4096)
        """Width of a hidden layer."""
        n_hidden_layers: int = number(1, 1, 32)
        """Hidden layers, each followed by the activation."""
        bias: bool = False
        """Give every layer a bias."""
        activation: Literal["ReLU"] = "ReLU"
        """Activation after each hidden layer."""
        output_activation: str | None = "none"
        """Activation, any name of ``ops.activations``."""

        def __post_init__(self) -> None:
            get_activation(self.output_activation)
            if (weights := self.n_neurons**2 * self.n_hidden_layers) > 2**26:
                raise ValueError(
                    f"n_neurons, n_hidden_layers: {weights:,} weights; expected {2**26:,} at most"
                )

    cfg: Config

    def __init__(self, cfg: Config, n_input_dims: int, n_output_dims: int) -> None:
        super().__init__()
        self.cfg = cfg
        widths = [n_input_dims, *[cfg.n_neurons] * cfg.n_hidden_layers]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out, bias=cfg.bias), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], n_output_dims, bias=cfg.bias))
        self.output_activation = get_activation(cfg.output_activation)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.dtype)
            return self.output_activation(mlp(x, *self.matrices) if self.is_plain else self.layers(x))

    @property
    def is_plain(self) -> bool:
        """Whether it is no more than two matrices and a ReLU between them, as ``ops.mlp``."""
        return self.cfg.n_hidden_layers == 1 and not self.cfg.bias

    @property
    def matrices(self) -> tuple[Float[Tensor, "H I"], Float[Tensor, "O H"]]:
        """Those of a plain network."""
        first, _, last = self.layers
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        return first.weight, last.weight


def stacked(networks: Sequence[VanillaMLP]) -> tuple[Float[Tensor, "H I"], Float[Tensor, "O H"]]:
    """The matrices of one network that computes what these plain ones do, side by side."""
    hidden, output = zip(*(network.matrices for network in networks), strict=True)
    return torch.cat(hidden), torch.block_diag(*output)


def stacked_sizes(networks: Sequence[VanillaMLP]) -> tuple[int, int, int]:
    """Inputs, hidden neurons and outputs of ``stacked``."""
    hidden, output = zip(*(network.matrices for network in networks), strict=True)
    return hidden[0].shape[1], sum(map(len, hidden)), sum(map(len, output))
