"""Materials: colours from features, and shading."""

import pytest
import torch
from field_cases import make

from fourdfy.config import ConfigError
from fourdfy.ops.spherical_harmonics import spherical_harmonics
from fourdfy.scenes.nerf.base import ShadingPoints
from fourdfy.scenes.nerf.materials import DiffuseWithPointLight, NeuralRadiance, NoMaterial
from fourdfy.types import FieldOutput, StepContext

FEATURES = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.5, 0.0]])
POSITIONS = torch.zeros(2, 3)
NORMALS = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
DIRECTIONS = torch.tensor([[0.0, 0.6, -0.8], [1.0, 0.0, 0.0]])
LIGHT = torch.tensor([[0.0, 0.0, 3.0]]).expand(2, 3)
ALBEDO = FEATURES.sigmoid()
POINTS = ShadingPoints(positions=POSITIONS, directions=DIRECTIONS, light_positions=LIGHT)


def field(features=FEATURES, normals=NORMALS):
    return FieldOutput(sigmas=torch.ones(2), features=features, normals=normals)


def color(material, step: int = 5000, seed: int | None = None, normals=NORMALS, features=FEATURES):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return material(field(features, normals), POINTS, StepContext(step, generator))


def test_a_radiance_is_a_network_of_features_and_harmonics_of_the_direction():
    material = make(NeuralRadiance, input_feature_dims=3, color_activation="none")
    first, second, third = (material.network.layers[i].weight for i in (0, 2, 4))
    given = torch.cat([FEATURES, spherical_harmonics(DIRECTIONS, 3)], dim=-1)
    torch.testing.assert_close(color(material), ((given @ first.T).relu() @ second.T).relu() @ third.T)


def test_no_material_activates_the_features():
    assert torch.equal(color(make(NoMaterial), normals=None), ALBEDO)
    assert torch.equal(color(make(NoMaterial, color_activation="none"), normals=None), FEATURES)
    assert not NoMaterial.requires_normal


def test_no_material_holds_nothing():
    assert not make(NoMaterial).state_dict()


def test_no_material_may_have_a_network():
    network = {"otype": "VanillaMLP", "n_neurons": 8}
    material = make(NoMaterial, input_feature_dims=3, mlp_network_config=network)
    torch.testing.assert_close(color(material), material.network(FEATURES).sigmoid())


def test_shading_is_ambient_and_lambertian_light_on_the_albedo():
    material = make(
        DiffuseWithPointLight, ambient_light_color=[0.1, 0.2, 0.3], diffuse_light_color=[0.6, 0.5, 0.4]
    )
    lit, unlit = color(material)
    torch.testing.assert_close(lit, ALBEDO[0] * torch.tensor([0.7, 0.7, 0.7]))
    torch.testing.assert_close(unlit, ALBEDO[1] * torch.tensor([0.1, 0.2, 0.3]))
    assert DiffuseWithPointLight.requires_normal


@pytest.mark.parametrize("seed", [None, 0])
def test_there_is_no_shading_before_ambient_only_steps(seed):
    material = make(DiffuseWithPointLight, ambient_only_steps=100)
    assert torch.equal(color(material, step=99, seed=seed, normals=None), ALBEDO)
    assert not torch.equal(color(material, step=100), ALBEDO)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"diffuse_prob": 0.0}, ALBEDO),
        ({"diffuse_prob": 1.0, "textureless_prob": 0.0}, ALBEDO * torch.tensor([[1.0], [0.1]])),
        ({"diffuse_prob": 1.0, "textureless_prob": 1.0}, torch.tensor([[1.0], [0.1]]).expand(2, 3)),
    ],
)
def test_probabilities_choose_between_albedo_shaded_and_textureless(keys, expected):
    material = make(DiffuseWithPointLight, **keys)
    for seed in range(5):
        torch.testing.assert_close(color(material, seed=seed), expected)


def test_the_three_kinds_of_shading_come_with_their_probabilities():
    material = make(DiffuseWithPointLight)
    context = StepContext(5000, torch.Generator().manual_seed(0))
    draws = torch.stack([material(field(), POINTS, context)[1] for _ in range(2000)])
    expected = {"albedo": ALBEDO[1], "shaded": 0.1 * ALBEDO[1], "textureless": torch.full((3,), 0.1)}
    shares = {
        name: (draws - value).abs().amax(1).lt(1e-6).float().mean().item() for name, value in expected.items()
    }
    # three standard deviations of 2000 draws
    assert shares == pytest.approx({"albedo": 0.25, "shaded": 0.375, "textureless": 0.375}, abs=0.033)


def test_soft_shading_draws_the_share_of_the_diffuse_light():
    material = make(DiffuseWithPointLight, soft_shading=True, diffuse_prob=1.0, textureless_prob=1.0)
    lit, unlit = color(material, seed=0)
    torch.testing.assert_close(lit, torch.ones(3))  # ambient and diffuse shares add up to 1
    assert 0 < unlit[0] < 1
    assert not torch.equal(color(material, seed=1)[1], unlit)


def test_the_same_seed_gives_the_same_shading():
    material = make(DiffuseWithPointLight, soft_shading=True)
    assert torch.equal(color(material, seed=4), color(material, seed=4))


def test_shading_without_normals_is_an_error():
    with pytest.raises(ValueError, match=r"use geometry\.normal_type=finite_difference"):
        color(make(DiffuseWithPointLight), normals=None)


@pytest.mark.parametrize(
    ("cls", "keys", "message"),
    [
        (NoMaterial, {"n_output_dims": 4}, "n_output_dims: 4 is outside the range; expected 3"),
        (NeuralRadiance, {"input_feature_dims": 0}, "expected 1 to 256"),
        (DiffuseWithPointLight, {"ambient_light_color": [25, 25, 25]}, "25 is outside the range"),
        (NoMaterial, {"color_activation": "sigmoidal"}, "did you mean 'sigmoid'"),
        (NoMaterial, {"input_feature_dims": 4}, "set both or neither"),
        (NoMaterial, {"mlp_network_config": {"otype": "VanillaMLP"}}, "set both or neither"),
        (
            DiffuseWithPointLight,
            {"diffuse_prob": 1.5},
            "diffuse_prob: 1.5 is outside the range",
        ),
        (DiffuseWithPointLight, {"textureless_prob": -1}, "textureless_prob: -1 is outside"),
        (DiffuseWithPointLight, {"albedo_activation": "x"}, "no activation is called 'x'"),
    ],
)
def test_a_wrong_config_is_an_error_that_names_the_mend(cls, keys, message):
    with pytest.raises(ConfigError, match=message):
        make(cls, **keys)
