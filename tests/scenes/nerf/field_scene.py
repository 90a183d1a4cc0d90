"""A scene of the project's own fields: a deformation, shading that draws, an augmented background."""

import torch

from fourdfy.config import parse_config
from fourdfy.scenes.backgrounds import NeuralEnvironmentMap
from fourdfy.scenes.nerf.base import Parts
from fourdfy.scenes.nerf.implicit_volume import ImplicitVolume
from fourdfy.scenes.nerf.materials import DiffuseWithPointLight

NETWORK = {"otype": "VanillaMLP", "n_neurons": 8, "n_hidden_layers": 1}
GEOMETRY = {
    "pos_encoding_config": {
        "otype": "HashGridSpatialTimeDeform",
        "n_levels": 3,
        "log2_hashmap_size": 8,
        "base_resolution": 4,
        "backend": "torch",
        "time_encoding_config": {
            "otype": "Grid",
            "n_levels": 2,
            "log2_hashmap_size": 7,
            "base_resolution": 3,
            "backend": "torch",
        },
        "time_network_config": NETWORK,
    },
    "mlp_network_config": NETWORK,
    "density_bias": 1.0,
}


def field_scene():
    """In double precision, so that sums in another order agree to many digits; all parameters visible."""
    geometry, material, background = (
        cls(parse_config(cls.Config, given))
        for cls, given in (
            (ImplicitVolume, GEOMETRY),
            (DiffuseWithPointLight, {"ambient_only_steps": 0, "soft_shading": True}),
            (NeuralEnvironmentMap, {"random_aug": True}),
        )
    )
    generator = torch.Generator().manual_seed(3)
    for module in (geometry, background):
        for parameter in module.double().parameters():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    geometry.encoding.encoding.encoding.requires_grad_(True)
    return Parts(geometry=geometry, material=material, background=background)
