"""Encodings: which grids add up to what, what moves, and what time and step do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from field_cases import GRID, at, make_encoding, points
from scipy.special import sph_harm_y

from fourdfy.config import ConfigError, parse_config
from fourdfy.ops.hash_grid import hash_grid
from fourdfy.ops.hash_grid.spec import HashGridSpec
from fourdfy.ops.spherical_harmonics import _band, spherical_harmonics
from fourdfy.scenes.nerf.encodings import (
    CompositeEncoding,
    HashGrid,
    HashGridSpatialTime,
    HashGridSpatialTimeDeform,
    SphericalHarmonics,
)
from fourdfy.scenes.nerf.implicit_volume import ImplicitVolume

DATA = Path(__file__).parents[2] / "data"
HARMONICS = np.load(DATA / "hashgrid_reference.npz")
X = points() * 0.5 + 0.5


def encode(encoding, time: float, step: int = 0):
    return encoding(X, at(time), step=step)


def parse(otype: str, **keys):
    given = {"pos_encoding_config": {"otype": otype, **keys}}
    return parse_config(ImplicitVolume.Config, given, "geometry").pos_encoding_config


def test_the_additive_encoding_is_the_sum_of_a_space_and_a_space_time_grid():
    encoding = make_encoding("HashGridSpatialTime")
    space, space_time = HashGridSpec(n_input_dims=3, **GRID), HashGridSpec(n_input_dims=4, **GRID)
    expected = hash_grid(X, encoding.encoding.params, space) + hash_grid(
        torch.cat([X, at(0.3)], dim=1), encoding.encoding_time.params, space_time
    )
    assert torch.equal(encode(encoding, 0.3).features, expected)
    assert encode(encoding, 0.3).deformation is None


def test_the_additive_encoding_of_a_static_scene_reads_the_time_grid_at_time_0():
    moving, static = make_encoding("HashGridSpatialTime"), make_encoding("HashGridSpatialTime", static=True)
    assert torch.equal(encode(static, 0.0).features, encode(moving, 0.0).features)
    assert not torch.equal(encode(moving, 0.0).features, static.encoding(X))


@pytest.mark.parametrize(
    ("otype", "keys"),
    [
        ("HashGrid", {}),
        ("Grid", {}),
        ("ProgressiveBandHashGrid", {}),
        ("HashGridSpatialTime", {"static": True}),
        ("HashGridSpatialTimeDeform", {"static": True}),
    ],
)
def test_a_static_encoding_ignores_times(otype, keys):
    encoding = make_encoding(otype, **keys)
    assert torch.equal(encode(encoding, 0.0).features, encode(encoding, 0.7).features)
    assert encode(encoding, 0.7).deformation is None


@pytest.mark.parametrize("otype", ["HashGridSpatialTime", "HashGridSpatialTimeDeform"])
def test_a_moving_encoding_depends_on_each_point_s_own_time(otype):
    encoding = make_encoding(otype)
    times = torch.cat([at(0.2, 20), at(0.9, 20)])
    mixed = encoding(X, times, step=0).features
    assert torch.equal(mixed[:20], encode(encoding, 0.2).features[:20])
    assert torch.equal(mixed[20:], encode(encoding, 0.9).features[20:])
    assert not torch.allclose(encode(encoding, 0.2).features, encode(encoding, 0.9).features)


@pytest.mark.parametrize("otype", ["HashGridSpatialTime", "HashGridSpatialTimeDeform"])
def test_a_scale_of_time_spreads_its_cells(otype):
    plain, scaled = make_encoding(otype), make_encoding(otype, time_scale=0.25)
    assert torch.equal(encode(scaled, 0.8).features, encode(plain, 0.2).features)
    assert not torch.allclose(encode(scaled, 0.8).features, encode(plain, 0.8).features)


def test_the_deformation_displaces_the_point_at_which_the_space_grid_is_read():
    encoding = make_encoding("HashGridSpatialTimeDeform")
    out = encode(encoding, 0.4)
    assert out.deformation.shape == (40, 3)
    assert out.deformation.abs().min() > 0
    assert torch.equal(out.features, encoding.encoding(X + out.deformation))


def test_the_deformation_of_a_static_scene_is_not_evaluated():
    encoding = make_encoding("HashGridSpatialTimeDeform", static=True)
    encoding.encoding_time = None
    assert torch.equal(encode(encoding, 0.4).features, encoding.encoding(X))


def test_the_deformation_gets_a_gradient_through_the_displaced_position():
    encoding = make_encoding("HashGridSpatialTimeDeform")
    encode(encoding, 0.4).features.square().sum().backward()
    for parameter in encoding.dynamic_parameters():
        assert parameter.grad.abs().sum() > 0


def test_what_is_deformed_learns_in_static_stages_alone():
    for static in (True, False):
        encoding = make_encoding("HashGridSpatialTimeDeform", static=static)
        assert encoding.encoding.params.requires_grad == static
        assert all(parameter.requires_grad for parameter in encoding.dynamic_parameters())


def test_a_fresh_deformation_is_near_zero():
    encoding = HashGridSpatialTimeDeform(parse("HashGridSpatialTimeDeform", **GRID))
    assert 0 < encode(encoding, 0.4).deformation.abs().max() < 1e-3


@pytest.mark.parametrize(
    ("step", "open_levels"), [(0, 1), (14, 1), (15, 2), (19, 2), (20, 3), (10_000, 3), (0, 1)]
)
def test_the_progressive_encoding_opens_its_levels_by_the_step(step, open_levels):
    encoding = make_encoding("ProgressiveBandHashGrid")
    features = encode(encoding, 0.0, step).features
    assert torch.equal(features[:, : 2 * open_levels], encoding.encoding(X)[:, : 2 * open_levels])
    assert (features[:, 2 * open_levels :] == 0).all()
    assert encoding.finest_resolution(step) == pytest.approx(4 * 1.447269237440378 ** (open_levels - 1))


def test_the_time_grid_may_have_its_own_shape():
    time = {
        "otype": "Grid",
        "n_levels": 6,
        "n_features_per_level": 1,
        "log2_hashmap_size": 6,
        "base_resolution": 2,
    }
    encoding = HashGridSpatialTime(parse("HashGridSpatialTime", **GRID, time_encoding_config=time))
    assert encoding.encoding_time.spec.n_levels == 6
    assert encode(encoding, 0.5).features.shape == (40, 6)


def test_include_xyz_puts_the_point_before_the_features():
    cfg = parse("HashGrid", **GRID, include_xyz=True)
    encoding = CompositeEncoding(cfg, 3)
    features = encoding(X, at(0.0), step=0).features
    assert encoding.n_output_dims == features.shape[1] == 9
    assert torch.equal(features[:, :3], 2 * X - 1)
    assert torch.equal(features[:, 3:], encoding.encoding(X, at(0.0), step=0).features)


def test_grids_start_uniform_within_1e_4_and_equal_where_their_shapes_are():
    first, second = (HashGrid(parse("HashGrid", n_levels=4, log2_hashmap_size=12)) for _ in range(2))
    params = first.encoding.params.detach()
    assert torch.equal(params, second.encoding.params)
    assert params.abs().max() <= 1e-4
    assert params.std() == pytest.approx(2e-4 / 12**0.5, rel=0.02)
    assert params.mean().abs() < 3e-6


def test_spherical_harmonics_are_those_of_tiny_cuda_nn():
    directions = torch.from_numpy(HARMONICS["sh3/directions"]).double()
    expected = torch.from_numpy(HARMONICS["sh3/outputs"])
    torch.testing.assert_close(spherical_harmonics(directions, 3), expected, atol=1e-6, rtol=0)
    assert torch.equal(spherical_harmonics(directions, 2), spherical_harmonics(directions, 3)[:, :4])
    encoding = SphericalHarmonics(parse("SphericalHarmonics"))
    by_encoding = encoding((directions + 1) / 2, torch.zeros(16, 1), step=0).features
    torch.testing.assert_close(by_encoding, expected, atol=1e-6, rtol=0)


def test_spherical_harmonics_of_every_degree_are_those_of_scipy():
    directions = torch.nn.functional.normalize(
        torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double(), dim=-1
    )
    x, y, z = directions.unbind(-1)
    polar, azimuth = torch.acos(z).numpy(), torch.atan2(y, x).numpy()
    columns = []
    for degree in range(8):
        for order in range(-degree, degree + 1):
            value = sph_harm_y(degree, abs(order), polar, azimuth)
            columns.append(value.real if order == 0 else 2**0.5 * (value.imag if order < 0 else value.real))
    expected = torch.from_numpy(np.stack(columns, axis=-1))
    torch.testing.assert_close(spherical_harmonics(directions, 8), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.stack(_band(2, x, y, z), -1), expected[:, 4:9])


# Errors


@pytest.mark.parametrize(
    ("otype", "keys", "message"),
    [
        (
            "HashGridSpatialTime",
            {"time_encoding_config": {"otype": "Grid", "n_levels": 8}},
            r"geometry\.pos_encoding_config: the time grid gives 16 features and the space grid 32, but",
        ),
        (
            "HashGridSpatialTime",
            {"time_encoding_config": {"otype": "Grid", "include_xyz": True}},
            "leave it false",
        ),
        ("ProgressiveBandHashGrid", {"start_level": 1, "start_step": 0}, "update_steps: missing"),
        (
            "ProgressiveBandHashGrid",
            {"start_level": 17, "start_step": 0, "update_steps": 1},
            "start_level=17: expected 1 to n_levels=16",
        ),
        (
            "ProgressiveBandHashGrid",
            {"start_level": 1, "start_step": 0, "update_steps": 0},
            "update_steps: 0 is outside the range; expected at least 1",
        ),
        ("HashGrid", {"n_levels": 40}, "n_levels: 40 is outside the range; expected 1 to 32"),
        ("HashGrid", {"backend": "tcm"}, "'tcm': expected auto, torch, numba"),
        ("HashGrid", {"n_level": 4}, "did you mean 'n_levels'"),
        ("SphericalHarmonics", {"degree": 9}, "degree: 9 is outside the range; expected 1 to 8"),
        ("HashGridSpatialTimeDeform", {"time_encoding_config": {"otype": "Grid", "type": "Dense"}}, "Dense"),
        (
            "HashGridSpatialTimeDeform",
            {"time_network_config": {"n_neurons": 0}},
            "n_neurons: 0 is outside the range",
        ),
        (
            "HashGridSpatialTimeDeform",
            {"time_network_config": {"output_activation": "sigmoyd"}},
            "did you mean 'sigmoid'",
        ),
    ],
)
def test_a_wrong_config_is_an_error_that_names_the_mend(otype, keys, message):
    with pytest.raises(ConfigError, match=message):
        parse(otype, **keys)


def test_harmonics_of_a_degree_there_is_not_are_an_error():
    with pytest.raises(ValueError, match="degree 9: expected 1 to 8"):
        spherical_harmonics(torch.zeros(1, 3), 9)


def test_an_encoding_without_levels_has_no_resolution():
    with pytest.raises(ValueError, match="SphericalHarmonics has no resolution"):
        SphericalHarmonics(parse("SphericalHarmonics")).finest_resolution(0)
