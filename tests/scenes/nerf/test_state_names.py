"""A checkpoint of 4D-fy fits: names and shapes of the geometry and the background, at full size."""

import json
from pathlib import Path

import pytest
import torch
from field_cases import make
from torch import nn

from fourdfy.scenes.backgrounds import NeuralEnvironmentMap
from fourdfy.scenes.nerf.implicit_volume import ImplicitVolume

STATE = json.loads((Path(__file__).parents[2] / "data" / "geometry_state.json").read_text())
TIME_GRID = {"otype": "Grid", "type": "Hash", "n_levels": 8, "base_resolution": 4}
TIME_NETWORK = {"otype": "VanillaMLP", "n_neurons": 64, "n_hidden_layers": 2}
ENCODINGS = {
    "HashGridSpatialTime": {},
    "HashGridSpatialTimeDeform": {"time_encoding_config": TIME_GRID, "time_network_config": TIME_NETWORK},
}


@pytest.mark.parametrize("variant", STATE["variants"])
def test_state_dict_is_that_of_a_4d_fy_checkpoint(variant):
    otype = variant.split()[0]
    scene = nn.Module()
    with torch.device("meta"):
        scene.background = make(NeuralEnvironmentMap)
    scene.geometry = make(ImplicitVolume, pos_encoding_config={"otype": otype, **ENCODINGS[otype]})
    ours = {name: list(tensor.shape) for name, tensor in scene.state_dict().items()}
    theirs = STATE["variants"][variant]
    assert ours == {name: shape for name, shape in theirs.items() if not name.startswith("renderer.")}


@pytest.mark.parametrize(
    "name",
    [
        "encoding",
        "encoding.encoding.encoding",
        "encoding.encoding.encoding_time",
        "density_network",
        "feature_network",
    ],
)
def test_the_optimizer_s_dotted_paths_lead_to_modules_with_parameters(name):
    keys = {"n_levels": 2, "log2_hashmap_size": 6}
    geometry = make(ImplicitVolume, pos_encoding_config={"otype": "HashGridSpatialTime", **keys})
    assert list(geometry.get_submodule(name).parameters())
