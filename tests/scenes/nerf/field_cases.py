"""Small fields for the tests of this folder."""

from typing import Any

import torch

from fourdfy.config import parse_config
from fourdfy.registry import find
from fourdfy.scenes.nerf.encodings import Encoding
from fourdfy.scenes.nerf.implicit_volume import ImplicitVolume

GRID = {"n_levels": 3, "log2_hashmap_size": 8, "base_resolution": 4}
TIME_GRID = {"otype": "Grid", "n_levels": 2, "log2_hashmap_size": 7, "base_resolution": 3}
NETWORK = {"otype": "VanillaMLP", "n_neurons": 8, "n_hidden_layers": 1}


def encoding_config(otype: str, **keys: Any) -> dict[str, Any]:
    config = {"otype": otype, **GRID, **keys}
    if otype == "HashGridSpatialTimeDeform":
        config = {"time_encoding_config": TIME_GRID, "time_network_config": NETWORK, **config}
    if otype == "ProgressiveBandHashGrid":
        config = {"start_level": 1, "start_step": 10, "update_steps": 5, **config}
    return config


def make_encoding(otype: str, **keys: Any) -> Encoding:
    """An encoding whose tables are filled with unit-normal numbers, so that everything is visible."""
    config = encoding_config(otype, **keys)
    del config["otype"]
    cls = find(otype, Encoding)
    return fill(cls(parse_config(cls.Config, config), 3))


def make_geometry(
    otype: str = "HashGridSpatialTime", encoding: dict | None = None, **keys: Any
) -> ImplicitVolume:
    given = {
        "pos_encoding_config": encoding_config(otype, **(encoding or {})),
        "mlp_network_config": NETWORK,
        **keys,
    }
    return fill(ImplicitVolume(parse_config(ImplicitVolume.Config, given, "system.geometry")))


def make(cls: type, **keys: Any) -> Any:
    torch.manual_seed(0)
    return cls(parse_config(cls.Config, keys))


def fill(module: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 1.0 if name.endswith("params") else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def points(n: int = 40, seed: int = 0) -> torch.Tensor:
    """In the cube of radius 1."""
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9


def at(time: float, n: int = 40) -> torch.Tensor:
    return torch.full((n, 1), time)
