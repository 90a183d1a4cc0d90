"""The hash grid: tiny-cuda-nn's numbers, right gradients, and back ends that agree."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fourdfy.ops import backends as backends_module
from fourdfy.ops.backends import Operation, is_installed
from fourdfy.ops.hash_grid import OPERATION, hash_grid
from fourdfy.ops.hash_grid.spec import HashGridSpec

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
REFERENCE = np.load(DATA / "hashgrid_reference.npz")
CASES = json.loads(str(REFERENCE["readme"]))["cases"]
GRIDS = json.loads((DATA / "geometry_state.json").read_text())["hash_grid"]["grids"]
SPEC_KEYS = list(HashGridSpec.__dataclass_fields__)

backends = pytest.mark.parametrize("backend", ["torch", "numba"])
cases = pytest.mark.parametrize("case", CASES)


def spec_of(numbers: dict) -> HashGridSpec:
    return HashGridSpec(**{key: numbers[key] for key in SPEC_KEYS})


def load_case(case: str) -> tuple[torch.Tensor, torch.Tensor, HashGridSpec]:
    numbers = CASES[case]
    generator = np.random.default_rng(numbers["params_seed"])
    params = generator.standard_normal(numbers["params_length"]).astype(np.float32)
    assert np.array_equal(params[:8], REFERENCE[f"{case}/params_first8"])
    assert np.array_equal(params[-8:], REFERENCE[f"{case}/params_last8"])
    return torch.from_numpy(REFERENCE[f"{case}/points"]), torch.from_numpy(params), spec_of(numbers)


def random_case(n_points: int, spec: HashGridSpec, dtype=torch.float32):
    """Points of which some lie outside the unit cube, and unit-normal parameters."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n_points, spec.n_input_dims, generator=generator, dtype=dtype) * 1.6 - 0.3
    return x, torch.randn(spec.n_params, generator=generator, dtype=dtype)


def gradients(x, params, spec, backend):
    x, params = x.clone().requires_grad_(), params.clone().requires_grad_()
    features = hash_grid(x, params, spec, backend)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((features * weights).sum(), (x, params))


# Layout


@pytest.mark.parametrize("name", GRIDS)
def test_level_tables_are_those_of_the_paper_sized_grids(name):
    grid = GRIDS[name]
    spec = spec_of(grid)
    for level, expected in zip(spec.levels, grid["levels"], strict=True):
        for key in ("scale", "resolution", "offset", "entries", "hashed"):
            assert getattr(level, key) == expected[key], (expected["level"], key)
    assert spec.n_params == grid["params_length"]
    assert spec.n_output_dims == grid["n_output_dims"]


@cases
def test_level_tables_are_those_of_the_reference(case):
    spec = spec_of(CASES[case])
    ends = [level.offset for level in spec.levels] + [spec.n_params // spec.n_features_per_level]
    assert np.array_equal(np.float32([level.scale for level in spec.levels]), REFERENCE[f"{case}/scales"])
    assert [level.resolution for level in spec.levels] == REFERENCE[f"{case}/resolutions"].tolist()
    assert [level.hashed for level in spec.levels] == REFERENCE[f"{case}/hashed"].tolist()
    assert ends == REFERENCE[f"{case}/offsets"].tolist()
    assert spec.n_params == CASES[case]["params_length"]


def test_a_level_too_fine_for_a_32_bit_index_is_hashed():
    fits, too_fine = (
        HashGridSpec(n_levels=1, log2_hashmap_size=28, base_resolution=n).levels[0] for n in (600, 1626)
    )
    assert not fits.hashed
    assert too_fine.hashed


# Values


@backends
@cases
@pytest.mark.parametrize("outputs", ["outputs", "upstream_cpu_outputs"])
def test_values_are_those_of_tiny_cuda_nn(case, backend, outputs):
    # 1e-5 for unit-normal parameters: a few last bits of float32 weights
    features = hash_grid(*load_case(case), backend)
    torch.testing.assert_close(features, torch.from_numpy(REFERENCE[f"{case}/{outputs}"]), atol=1e-5, rtol=0)


@backends
@pytest.mark.parametrize("case", ["d3_small", "d4_small"])
def test_position_derivatives_are_those_of_tiny_cuda_nn(case, backend):
    x, params, spec = load_case(case)
    # the sum over points of features keeps every point's own derivative: a point moves only its row
    summed = torch.autograd.functional.jacobian(
        lambda points: hash_grid(points, params, spec, backend).sum(dim=0), x
    ).permute(1, 0, 2)
    # derivatives reach 170; 2e-4 is a few last bits of that
    torch.testing.assert_close(summed, torch.from_numpy(REFERENCE[f"{case}/dy_dx"]), atol=2e-4, rtol=0)


@backends
def test_points_outside_the_cube_are_not_clamped(backend):
    _, params, spec = load_case("d3_small")
    inside = hash_grid(torch.tensor([[1.0, 1.0, 1.0]]), params, spec, backend)
    outside = hash_grid(torch.tensor([[1.3, 1.0, 1.0]]), params, spec, backend)
    assert not torch.allclose(inside, outside)


# Gradients


@pytest.mark.parametrize("n_dims", [3, 4])
def test_reference_gradient_is_right(n_dims):
    spec = HashGridSpec(n_input_dims=n_dims, n_levels=3, log2_hashmap_size=5, base_resolution=2)
    x, params = random_case(4, spec, torch.float64)
    inputs = x.requires_grad_(), params.requires_grad_()
    assert torch.autograd.gradcheck(partial(hash_grid, spec=spec, backend="torch"), inputs)


@backends
@cases
def test_parameter_gradient_is_the_transpose_of_the_forward(case, backend):
    x, params, spec = load_case(case)
    leaf = params.clone().requires_grad_()
    weights = torch.randn(len(x), spec.n_output_dims, generator=torch.Generator().manual_seed(0))
    expected = (hash_grid(x, params, spec, backend) * weights).sum()
    (gradient,) = torch.autograd.grad((hash_grid(x, leaf, spec, backend) * weights).sum(), leaf)
    # <A^T w, p> = <w, A p>; sums of 1e4 numbers of size 1 in float32
    torch.testing.assert_close(gradient @ params, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("n_points", [0, 1, 130, 2500])
@pytest.mark.parametrize(("n_dims", "n_features"), [(2, 4), (3, 1), (3, 2), (4, 2)])
def test_numba_agrees_with_torch(n_dims, n_features, n_points):
    spec = HashGridSpec(
        n_input_dims=n_dims,
        n_levels=4,
        n_features_per_level=n_features,
        log2_hashmap_size=9,
        base_resolution=5,
    )
    x, params = random_case(n_points, spec)
    torch.testing.assert_close(
        hash_grid(x, params, spec, "numba"), hash_grid(x, params, spec, "torch"), atol=1e-5, rtol=0
    )
    by_numba, by_torch = (gradients(x, params, spec, backend) for backend in ("numba", "torch"))
    torch.testing.assert_close(by_numba[0], by_torch[0], atol=1e-3, rtol=1e-5)
    # entries of the coarsest level sum some hundred numbers of size 1
    torch.testing.assert_close(by_numba[1], by_torch[1], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("where", [-2.0, 2.0, 3.0, 5.0, 40.0])
@pytest.mark.parametrize("n_dims", [1, 3, 4])
def test_numba_agrees_with_torch_far_outside_the_cube(n_dims, where):
    """There a dense index passes the level's end several times over. One point, as blocks wrap together."""
    spec = HashGridSpec(n_input_dims=n_dims, n_levels=1, log2_hashmap_size=12, base_resolution=4)
    x, params = torch.full((1, n_dims), where), random_case(0, spec)[1]
    by_numba, by_torch = (hash_grid(x, params, spec, backend) for backend in ("numba", "torch"))
    torch.testing.assert_close(by_numba, by_torch, atol=1e-5, rtol=0)


def test_numba_gives_the_same_bits_on_any_number_of_threads():
    spec = HashGridSpec(n_input_dims=4, n_levels=5, log2_hashmap_size=8, base_resolution=3)
    x, params = random_case(9000, spec)
    framed = frames([0.1, 0.6], 9000), random_case(0, SPACE_TIME)[1], SPACE_TIME, "numba"
    threads, results = torch.get_num_threads(), []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            results.append([hash_grid(x, params, spec, "numba"), *gradients(x, params, spec, "numba")])
            results[-1] += [hash_grid(*framed), *gradients(*framed)]
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


SPACE_TIME = HashGridSpec(
    n_input_dims=4, n_levels=3, log2_hashmap_size=10, base_resolution=3, per_level_scale=1.5
)
"""Two dense levels, which wrap around at the cube's far faces, and a hashed one."""


def frames(times, size=400):
    """``size`` points of each of some frames, with their times."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(len(times) * size, 3, generator=generator)
    points[:8] = torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)])  # the cube's corners
    return torch.cat([points, torch.tensor(times).repeat_interleave(size)[:, None]], dim=1)


@pytest.mark.parametrize("times", [[0.0], [1.0], [0.3, 0.3, 0.9, 0.0]])
def test_points_of_frames_are_interpolated_in_slices_of_the_grid(times):
    from fourdfy.ops.hash_grid.slices import find_runs

    x, params = frames(times), random_case(0, SPACE_TIME)[1]
    assert len(find_runs(x.numpy(), SPACE_TIME)) == len(set(times))
    by_numba, by_torch = (
        [hash_grid(x, params, SPACE_TIME, backend), *gradients(x, params, SPACE_TIME, backend)]
        for backend in ("numba", "torch")
    )
    # 1e-5 for unit-normal parameters; position gradients reach 20, entries sum some hundred numbers
    for ours, theirs, atol in zip(by_numba, by_torch, (1e-5, 1e-4, 1e-3), strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("place", [(5, 0, -0.1), (399, 2, 1.2), (5, 3, 0.7), (0, 3, float("nan"))])
def test_a_point_outside_the_cube_or_of_another_time_needs_the_whole_grid(place):
    from fourdfy.ops.hash_grid.slices import find_runs

    x, params = frames([0.25]), random_case(0, SPACE_TIME)[1]
    assert find_runs(frames([0.25]).numpy(), SPACE_TIME)
    row, axis, value = place
    x[row, axis] = value
    assert find_runs(x.numpy(), SPACE_TIME) is None
    ours, theirs = (hash_grid(x, params, SPACE_TIME, backend) for backend in ("numba", "torch"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, equal_nan=True)


def test_numba_accepts_strided_points_and_gradients():
    spec = HashGridSpec(n_levels=2, log2_hashmap_size=6, base_resolution=3)
    x, params = random_case(20, spec)
    strided = x.t().contiguous().t()
    params.requires_grad_()
    features = hash_grid(strided, params, spec, "numba")
    assert torch.equal(features, hash_grid(x, params, spec, "numba"))
    (summed,) = torch.autograd.grad(features.sum(), params)  # sum()'s gradient is an expanded scalar
    expected = torch.autograd.grad(hash_grid(x, params, spec, "torch").sum(), params)[0]
    torch.testing.assert_close(summed, expected)


def test_a_gradient_through_the_gradient_is_the_reference_one():
    """What training with analytic normals needs."""
    spec = HashGridSpec(n_levels=3, log2_hashmap_size=8, base_resolution=4)
    x, params = random_case(50, spec)
    results = []
    for backend in ("numba", "torch"):
        point, leaf = x.clone().requires_grad_(), params.clone().requires_grad_()
        energy = hash_grid(point, leaf, spec, backend).square().sum()
        (slope,) = torch.autograd.grad(energy, point, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), (point, leaf)))
    for by_numba, by_torch in zip(*results, strict=True):
        torch.testing.assert_close(by_numba, by_torch, rtol=1e-4, atol=1e-4 * by_torch.abs().max().item())


# Choice of the back end, and errors


def test_auto_takes_numba_for_float32_and_torch_for_float64():
    assert OPERATION.pick(torch.zeros(1, 3)) == "numba"
    assert OPERATION.pick(torch.zeros(1, 3, dtype=torch.float64)) == "torch"


def test_auto_takes_torch_without_numba(monkeypatch):
    monkeypatch.setattr(backends_module, "is_installed", lambda name: name != "numba")
    assert OPERATION.pick(torch.zeros(1, 3)) == "torch"


def test_a_missing_fast_back_end_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(backends_module, "find_spec", lambda name: None)
    is_installed.cache_clear()
    assert OPERATION.pick(torch.zeros(1, 3)) == "torch"
    is_installed.cache_clear()
    assert (
        "numba is not installed: the hash grid and other operations will be slow; pip install numba"
        in caplog.text
    )


def test_asking_for_a_back_end_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("fourdfy.ops.hash_grid.numba_cpu", "fourdfy.ops.cpu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    Operation.load.cache_clear()
    x, params, spec = load_case("d3_small")
    with pytest.raises(ValueError, match="pip install numba, or use backend=auto"):
        hash_grid(x, params, spec, "numba")


def test_an_unknown_back_end_is_an_error():
    x, params, spec = load_case("d3_small")
    with pytest.raises(ValueError, match="'cuda': expected auto, torch, numba, triton"):
        hash_grid(x, params, spec, "cuda")


def test_numba_refuses_float64():
    x, params, spec = load_case("d3_small")
    with pytest.raises(ValueError, match=r"computes float32 on the CPU, not torch\.float64 on cpu"):
        hash_grid(x.double(), params.double(), spec, "numba")


def test_shapes_and_dtypes_that_do_not_match_are_errors():
    x, params, spec = load_case("d3_small")
    with pytest.raises(ValueError, match=r"points of shape \(48, 2\): the grid expects \[N, 3\]"):
        hash_grid(x[:, :2], params, spec)
    with pytest.raises(ValueError, match=r"params of shape \(39199,\): the grid expects \[39200\]"):
        hash_grid(x, params[1:], spec)
    with pytest.raises(ValueError, match=r"points are torch\.float64 on cpu, params torch\.float32 on cpu"):
        hash_grid(x.double(), params, spec)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_input_dims", 8, "n_input_dims=8: expected 1 to 7"),
        ("n_levels", 0, "n_levels=0: expected 1 to 32"),
        ("n_features_per_level", 9, "n_features_per_level=9: expected 1 to 8"),
        ("log2_hashmap_size", 31, "log2_hashmap_size=31: expected 3 to 28"),
        ("per_level_scale", 0.5, "per_level_scale=0.5: expected 1 to 16"),
        ("per_level_scale", 16.0, "lower n_levels, base_resolution or per_level_scale"),
    ],
)
def test_a_spec_out_of_range_is_an_error(key, value, message):
    with pytest.raises(ValueError, match=message):
        HashGridSpec(**{key: value})
