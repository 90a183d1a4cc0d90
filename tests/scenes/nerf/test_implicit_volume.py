"""The 4D field: density, blobs, normals, time, and which parameters move the scene."""

import math

import pytest
import torch
from field_cases import GRID, at, make_geometry, points
from torch.nn.functional import normalize

from fourdfy.config import ConfigError
from fourdfy.ops.field import field
from fourdfy.scenes.nerf import encodings
from fourdfy.scenes.nerf.implicit_volume import ImplicitVolume

X = points()
ANNEALED = {"min_anneal_step": 100, "max_anneal_step": 300, "start_val": 0.5, "end_val": 5.0}


def silent(**keys) -> ImplicitVolume:
    """A geometry whose network says nothing, so that the bias alone is seen."""
    geometry = make_geometry(**keys)
    torch.nn.init.zeros_(geometry.density_network.layers[-1].weight)
    return geometry


# Density


def test_density_is_the_sigmas_of_forward():
    geometry = make_geometry()
    out = geometry(X, at(0.3), step=0)
    assert torch.equal(geometry.density(X, at(0.3), step=0), out.sigmas)
    assert out.features.shape == (40, 3)
    assert out.normals is None


def test_density_is_activation_of_network_and_bias():
    geometry = make_geometry(density_activation="trunc_exp", density_bias="blob_magic3d")
    features = geometry.encoding(X / 2 + 0.5, at(0.3), step=0).features
    raw = geometry.density_network(features)[:, 0] + geometry.density_bias(X, step=0)
    torch.testing.assert_close(geometry.density(X, at(0.3), step=0), raw.exp())


def test_the_encoding_sees_the_cube_of_the_radius_as_the_unit_cube():
    small, large = make_geometry(density_bias=0.0), make_geometry(density_bias=0.0, radius=2.0)
    assert torch.equal(large.bbox, torch.tensor([[-2.0] * 3, [2.0] * 3]))
    assert large.radius == 2.0
    torch.testing.assert_close(large.density(2 * X, at(0.3), step=0), small.density(X, at(0.3), step=0))


def test_forward_evaluates_the_encoding_once(monkeypatch):
    geometry, calls = make_geometry(), []
    geometry.encoding.encoding.register_forward_hook(lambda *_: calls.append(1))
    geometry(X, at(0.3), step=0)
    assert len(calls) == 1


def test_no_feature_dims_means_no_features():
    geometry = make_geometry(n_feature_dims=0)
    assert geometry(X, at(0.0), step=0).features.shape == (40, 0)
    assert not hasattr(geometry, "feature_network")


def test_the_field_stays_float32_inside_autocast():
    geometry = make_geometry()
    expected = geometry(X, at(0.3), step=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = geometry(X.bfloat16().float(), at(0.3), step=0)
        same = geometry(X, at(0.3), step=0)
    assert out.sigmas.dtype == out.features.dtype == torch.float32
    assert torch.equal(same.sigmas, expected.sigmas)
    assert torch.equal(same.features, expected.features)


def test_the_field_works_in_float64():
    geometry = make_geometry().double()
    out = geometry(X.double(), at(0.3).double(), step=0, want_normals=True)
    assert out.sigmas.dtype == out.normals.dtype == torch.float64


def test_an_empty_batch_of_points_is_no_special_case():
    out = make_geometry()(torch.zeros(0, 3), torch.zeros(0, 1), step=0, want_normals=True)
    assert out.sigmas.shape == (0,)
    assert out.normals.shape == (0, 3)


# The blob


@pytest.mark.parametrize(
    ("kind", "distance", "bias"),
    [
        ("blob_magic3d", 0.0, 10.0),
        ("blob_magic3d", 0.3, 4.0),
        ("blob_magic3d", math.sqrt(3), -24.641),
        ("blob_dreamfusion", 0.0, 10.0),
        ("blob_dreamfusion", 0.5, 10 * math.exp(-0.5)),
        (-1.5, 0.7, -1.5),
    ],
)
def test_the_bias_falls_with_the_distance(kind, distance, bias):
    position = torch.full((1, 3), distance / math.sqrt(3))
    geometry = silent(density_bias=kind, density_activation="none")
    assert geometry.density(position, at(0.0, 1), step=0).item() == pytest.approx(bias, abs=1e-3)


@pytest.mark.parametrize(
    ("step", "std"), [(0, 0.5), (100, 0.5), (200, 2.75), (300, 5.0), (301, 5.0), (10**6, 5.0), (150, 1.625)]
)
def test_the_blob_s_width_anneals_and_is_clamped_outside_its_window(step, std):
    geometry = silent(density_activation="none", anneal_density_blob_std_config=ANNEALED)
    assert geometry.blob_std(step) == pytest.approx(std)
    expected = 10 * (1 - torch.linalg.vector_norm(X, dim=-1) / std)
    torch.testing.assert_close(geometry.density(X, at(0.0), step=step), expected)


def test_a_blob_without_annealing_keeps_its_width():
    assert make_geometry(density_blob_std=0.2).blob_std(10**6) == 0.2


# Time and step are arguments


@pytest.mark.parametrize("otype", ["HashGridSpatialTime", "HashGridSpatialTimeDeform"])
def test_a_call_at_another_time_or_step_leaves_no_trace(otype):
    geometry = make_geometry(otype, anneal_density_blob_std_config=ANNEALED)
    before = geometry(X, at(0.1), step=0)
    geometry(X, at(0.8), step=250)
    geometry.density(X, at(0.9), step=10**5)
    after = geometry(X, at(0.1), step=0)
    assert torch.equal(before.sigmas, after.sigmas)
    assert torch.equal(before.features, after.features)


@pytest.mark.parametrize("otype", ["HashGridSpatialTime", "HashGridSpatialTimeDeform"])
def test_many_times_at_once_equal_one_by_one(otype):
    geometry = make_geometry(otype)
    times = torch.linspace(0, 1, 40)[:, None]
    together = geometry(X, times, step=0)
    for i in (0, 17, 39):
        alone = geometry(X[i : i + 1], times[i : i + 1], step=0)
        torch.testing.assert_close(alone.sigmas, together.sigmas[i : i + 1])
        torch.testing.assert_close(alone.features, together.features[i : i + 1])


def test_the_deformation_comes_out():
    assert make_geometry()(X, at(0.5), step=0).deformation is None
    moving = make_geometry("HashGridSpatialTimeDeform")(X, at(0.5), step=0)
    assert moving.deformation.shape == (40, 3)


# What moves the scene

TIME_GRID = "encoding.encoding.encoding_time.encoding.encoding.params"
TIME_NETWORK = [f"encoding.encoding.time_network.layers.{i}.weight" for i in (0, 2)]


@pytest.mark.parametrize(
    ("otype", "dynamic"),
    [
        ("HashGrid", []),
        ("HashGridSpatialTime", ["encoding.encoding.encoding_time.params"]),
        ("HashGridSpatialTimeDeform", [TIME_GRID, *TIME_NETWORK]),
    ],
)
def test_dynamic_parameters_are_those_of_the_time_grid_and_its_network(otype, dynamic):
    geometry = make_geometry(otype)
    names = {id(parameter): name for name, parameter in geometry.named_parameters()}
    assert [names[id(parameter)] for parameter in geometry.dynamic_parameters()] == dynamic


@pytest.mark.parametrize("otype", ["HashGridSpatialTime", "HashGridSpatialTimeDeform"])
@pytest.mark.parametrize("frozen", ["static", "dynamic"])
def test_frozen_parameters_get_no_gradient_and_the_others_do(otype, frozen):
    geometry = make_geometry(otype)
    dynamic = {id(parameter) for parameter in geometry.dynamic_parameters()}
    for parameter in geometry.parameters():
        parameter.requires_grad_((id(parameter) in dynamic) == (frozen == "static"))
    out = geometry(X, at(0.5), step=0)
    (out.sigmas.sum() + out.features.sum()).backward()
    for parameter in geometry.parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0
        else:
            assert parameter.grad is None


# Normals


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    # Of a central difference of length 2 eps across the ball's curvature 1 / r: (eps / r)^2 / 2 at most.
    [("finite_difference", 0.008), ("finite_difference_laplacian", 0.008), ("analytic", 1e-6)],
)
def test_normals_of_a_ball_point_outwards(kind, tolerance):
    geometry = silent(normal_type=kind, finite_difference_normal_eps=0.05, density_activation="none").double()
    outward = normalize(X, dim=-1).double()
    normals = geometry(0.4 * outward, at(0.0), step=0, want_normals=True).normals
    torch.testing.assert_close(normals, outward, atol=tolerance, rtol=0)


def test_differences_end_at_the_faces_of_the_cube():
    geometry = make_geometry(finite_difference_normal_eps=0.5)
    seen = []
    geometry.encoding.encoding.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    geometry(X, at(0.0), step=0, want_normals=True)
    shifted = 2 * seen[1].view(40, 6, 3) - 1
    steps = 0.5 * torch.cat([torch.eye(3), -torch.eye(3)])
    torch.testing.assert_close(shifted, (X[:, None] + steps).clamp(-1, 1))


@pytest.mark.parametrize("kind", ["finite_difference", "finite_difference_laplacian"])
def test_finite_differences_agree_with_autograd_inside_a_cell(kind):
    keys = {"density_bias": 0.0, "finite_difference_normal_eps": 1e-6, "mlp_network_config": {"n_neurons": 8}}
    near, exact = (make_geometry(normal_type=name, **keys).double() for name in (kind, "analytic"))
    x, times = X.double(), at(0.4).double()
    by_difference = near(x, times, step=0, want_normals=True).normals
    by_autograd = exact(x, times, step=0, want_normals=True).normals
    torch.testing.assert_close(by_difference, by_autograd, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["finite_difference", "finite_difference_laplacian", "analytic", "pred"])
def test_normals_are_unit_vectors_with_and_without_gradients(kind):
    geometry = make_geometry(normal_type=kind)
    trained = geometry(X, at(0.2), step=0, want_normals=True).normals
    with torch.no_grad():
        shown = geometry(X, at(0.2), step=0, want_normals=True).normals
    torch.testing.assert_close(trained.norm(dim=-1), torch.ones(40))
    torch.testing.assert_close(shown, trained)
    assert trained.requires_grad
    assert not shown.requires_grad


@pytest.mark.parametrize("kind", ["finite_difference", "finite_difference_laplacian", "analytic"])
def test_normals_train_the_grids(kind):
    geometry = make_geometry(normal_type=kind)
    geometry(X, at(0.2), step=0, want_normals=True).normals[:, 0].sum().backward()
    assert geometry.encoding.encoding.encoding.params.grad.abs().sum() > 0
    assert geometry.encoding.encoding.encoding_time.params.grad.abs().sum() > 0


def test_predicted_normals_have_their_own_network():
    geometry = make_geometry(normal_type="pred")
    geometry(X, at(0.2), step=0, want_normals=True).normals[:, 0].sum().backward()
    assert geometry.normal_network.layers[0].weight.grad.abs().sum() > 0
    assert geometry.density_network.layers[0].weight.grad is None


def test_progressive_differences_step_by_one_cell_of_the_finest_open_level():
    geometry = make_geometry("ProgressiveBandHashGrid", finite_difference_normal_eps="progressive")
    assert geometry._eps(0) == pytest.approx(2 / 4)
    assert geometry._eps(15) == pytest.approx(2 / (4 * 1.447269237440378))


# Errors


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"density_bias": "blob"},
            r"system\.geometry: density_bias='blob': expected a number, blob_dreamfusion",
        ),
        ({"density_activation": "softplu"}, "did you mean 'softplus'"),
        ({"radius": 0}, "radius: 0 is outside the range; expected more than 0"),
        ({"density_blob_std": -1}, "density_blob_std: -1 is outside the range"),
        ({"n_input_dims": 4}, "n_input_dims: 4 is outside the range; expected 3"),
        ({"finite_difference_normal_eps": "progresive"}, "expected a number above 0 or 'progressive'"),
        ({"finite_difference_normal_eps": 0}, "finite_difference_normal_eps: 0 is outside"),
        ({"isosurface_threshold": "aut"}, "expected a number above 0 or 'auto'"),
        (
            {"mlp_network_config": {"n_hidden_layers": 10**9}},
            "n_hidden_layers: 1000000000 is outside the range",
        ),
        ({"normal_type": "normal"}, r"system\.geometry\.normal_type"),
        (
            {"anneal_density_blob_std_config": {**ANNEALED, "max_anneal_step": 100}},
            "min_anneal_step=100 must be below max_anneal_step=100",
        ),
        ({"anneal_density_blob_std_config": {"start_val": 0.5}}, "anneal_density_blob_std_config.*missing"),
        ({"density_blob": 1.0}, "did you mean"),
    ],
)
def test_a_wrong_config_is_an_error_that_names_the_mend(keys, message):
    with pytest.raises(ConfigError, match=message):
        make_geometry(**keys)


def test_wanting_normals_of_a_geometry_without_is_an_error():
    with pytest.raises(ValueError, match=r"use geometry\.normal_type=finite_difference"):
        make_geometry(normal_type=None)(X, at(0.0), step=0, want_normals=True)


# In one operation


@pytest.fixture
def one_operation(monkeypatch):
    """As on a GPU: what ``ops.field`` fits goes through it; returns what did."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return field(*arguments)

    monkeypatch.setattr(encodings, "serves", lambda x, *_: not x.requires_grad)
    monkeypatch.setattr(encodings, "field", counted)
    return calls


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("normal_type", ["finite_difference", "pred", "analytic"])
def test_the_field_in_one_operation_is_that_of_its_parts(normal_type, static, one_operation, monkeypatch):
    encoding = {"static": static, "time_scale": 0.5}
    geometry = make_geometry(encoding=encoding, normal_type=normal_type).double()
    positions, times = X.double(), at(0.3).double()
    results = []
    for _ in range(2):
        out = geometry(positions, times, step=0, want_normals=True)
        values = out.sigmas, out.features, out.normals
        total = sum((value * torch.linspace(1, 2, value.numel()).view_as(value)).sum() for value in values)
        results.append([*values, *torch.autograd.grad(total, list(geometry.parameters()))])
        monkeypatch.setattr(encodings, "serves", lambda *_: False)
    assert len(one_operation) == (2 if normal_type == "finite_difference" else 1)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "keys",
    [
        {"encoding": {"include_xyz": True}},
        {"encoding": {"backend": "torch"}},
        {"encoding": {"time_encoding_config": {"otype": "Grid", **GRID, "base_resolution": 3}}},
        {"mlp_network_config": {"n_hidden_layers": 2}},
        {"mlp_network_config": {"bias": True}},
    ],
    ids=str,
)
def test_another_field_is_evaluated_in_parts(keys, one_operation):
    make_geometry(**keys)(X, at(0.3), step=0)
    assert not one_operation
