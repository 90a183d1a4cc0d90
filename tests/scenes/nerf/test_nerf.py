"""The volume renderer on a scene in closed form."""

import math
from dataclasses import fields, replace

import pytest
import torch
from analytic_scene import EVALUATION, Paint, frames, generator, make_scene, training
from torch import Tensor

from fourdfy.config import ConfigError, parse_config
from fourdfy.ops.backends import REFERENCE, Operation
from fourdfy.ops.compositing.reference import alphas_from_density
from fourdfy.scenes.nerf.passes import FlatRays
from fourdfy.scenes.nerf.renderer import MaskedVolumeRenderer, NeRFVolumeRenderer

PIXELS = ("comp_rgb", "comp_rgb_fg", "opacity", "depth", "z_variance")


def one_frame(rays, i):
    return type(rays)(**{f.name: getattr(rays, f.name)[i : i + 1] for f in fields(rays)})


def gradients(parts, image):
    for parameter in (*parts.scene.geometry.parameters(), *parts.scene.background.parameters()):
        parameter.grad = None
    weights = torch.rand(image.shape, generator=generator(3))
    (image * weights).sum().backward()
    return {
        "geometry": [p.grad.clone() for p in parts.scene.geometry.parameters()],
        "background": [p.grad.clone() for p in parts.scene.background.parameters()],
    }


def test_the_state_has_the_names_of_the_original():
    renderer = make_scene(refresh=False, grid_resolution=32).renderer
    state = {f"renderer.{name}": list(value.shape) for name, value in renderer.state_dict().items()}
    assert state == {
        "renderer.bbox": [2, 3],
        "renderer.estimator.resolution": [3],
        "renderer.estimator.aabbs": [1, 6],
        "renderer.estimator.occs": [32768],
        "renderer.estimator.binaries": [1, 32, 32, 32],
    }
    assert renderer.estimator.resolution.dtype == torch.int32
    assert renderer.estimator.binaries.dtype == torch.bool


def test_frames_at_once_equal_frames_one_by_one():
    parts, rays = make_scene(extras=True, return_comp_normal=True), frames()
    together = parts.renderer(rays, EVALUATION)
    assert together.opacity.max() > 0.9 and together.opacity.min() < 0.1
    for i in range(3):
        alone = parts.renderer(one_frame(rays, i), EVALUATION)
        for name in (*PIXELS, "comp_normal", "deformation"):
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone, name)[0], msg=name)


def test_each_frame_shows_its_own_time():
    parts, rays = make_scene(), frames()
    first = replace(rays, times=rays.times[:1].expand(3))
    moving, still = parts.renderer(rays, EVALUATION), parts.renderer(first, EVALUATION)
    assert torch.equal(moving.comp_rgb[0], still.comp_rgb[0])
    assert (moving.comp_rgb[2] - still.comp_rgb[2]).abs().max() > 0.1


def test_every_back_end_renders_what_the_reference_renders(monkeypatch):
    parts, results = make_scene(extras=True, return_comp_normal=True, peak=400.0), []
    for pick in (Operation.pick, lambda operation, example: REFERENCE):
        monkeypatch.setattr(Operation, "pick", pick)
        render = parts.renderer(frames(), training())
        image = torch.cat([getattr(render, name) for name in (*PIXELS, "comp_normal", "deformation")], dim=-1)
        gradient = torch.stack(gradients(parts, image)["geometry"][:2])
        results.append([render.samples.ray_indices, render.samples.t_starts, render.weights, image, gradient])
    for fast, reference in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, rtol=1e-4, atol=1e-6)


def test_an_empty_scene_renders_the_background():
    parts = make_scene(refresh=False)  # no cell is occupied before the first refresh
    render = parts.renderer(frames(), training())
    assert len(render.samples) == 0
    assert torch.equal(render.comp_rgb, parts.scene.background(frames().directions))
    for name in ("opacity", "depth", "z_variance", "comp_rgb_fg"):
        assert not getattr(render, name).any()
    grads = gradients(parts, render.comp_rgb)
    assert all(grad.abs().sum() > 0 for grad in grads["background"])
    assert all(not grad.any() for grad in grads["geometry"]), "connected, but without influence"


def test_gradients_reach_field_and_background():
    parts = make_scene()
    grads = gradients(parts, parts.renderer(frames(), training()).comp_rgb)
    assert all(grad.abs().sum() > 0 for group in grads.values() for grad in group)


def test_evaluation_is_deterministic_and_builds_no_graph():
    parts, rays = make_scene(), frames()
    first, second = parts.renderer(rays, EVALUATION), parts.renderer(rays, EVALUATION)
    for name in PIXELS:
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert not first.comp_rgb.requires_grad


def test_training_repeats_with_the_generator_and_differs_without():
    parts, rays = make_scene(), frames()
    render = lambda seed: parts.renderer(rays, training(seed)).comp_rgb  # noqa: E731
    assert torch.equal(render(0), render(0))
    assert not torch.equal(render(0), render(1))
    fixed = make_scene(randomized=False, alpha_thre=0.0, eval_alpha_thre=0.0)
    trained = fixed.renderer(rays, training(5))
    assert torch.equal(trained.comp_rgb, fixed.renderer(rays, EVALUATION).comp_rgb)


def test_evaluation_in_small_pieces_gives_the_same_images(monkeypatch):
    parts, rays = make_scene(extras=True, return_comp_normal=True), frames()
    whole = parts.renderer(rays, EVALUATION)
    monkeypatch.setattr("fourdfy.scenes.nerf.renderer.MAX_SAMPLES", 500)
    pieces = make_scene(extras=True, return_comp_normal=True, eval_chunk_size=100)
    pieces.scene.geometry.largest_call = 0
    in_pieces = pieces.renderer(rays, EVALUATION)
    assert pieces.scene.geometry.largest_call <= 100
    for name in (*PIXELS, "comp_normal", "deformation", "weights", "normals", "t_dirs"):
        torch.testing.assert_close(getattr(whole, name), getattr(in_pieces, name), msg=name)
    assert torch.equal(whole.samples.ray_indices, in_pieces.samples.ray_indices)


def test_pruning_changes_little_and_keeps_few_samples():
    rays = frames()
    pruned = make_scene(eval_alpha_thre=0.01).renderer(rays, EVALUATION)
    dense = make_scene(grid_prune=False).renderer(rays, EVALUATION)
    assert len(pruned.samples) < 0.15 * len(dense.samples)
    # What is dropped: alphas below 0.01, a ray crosses a few steps of them, and light below 1e-4.
    assert (pruned.comp_rgb - dense.comp_rgb).abs().max() < 0.05


def test_evaluation_has_its_own_number_of_samples_and_drops_what_is_as_thin():
    plain, finer = make_scene(), make_scene(eval_samples_per_ray=192)
    assert torch.equal(
        finer.renderer(frames(), training()).comp_rgb, plain.renderer(frames(), training()).comp_rgb
    )
    few, many = (parts.renderer(frames(), EVALUATION) for parts in (plain, finer))
    long, short = ((render.samples.t_ends - render.samples.t_starts).mean().item() for render in (few, many))
    assert long == pytest.approx(4 * short, rel=1e-4)
    assert len(many.samples) == pytest.approx(4 * len(few.samples), rel=0.1)
    thin = thinnest(finer, trained=False)
    assert 0.1 <= 1 - (1 - thin) ** 4 < 0.13, "alphas of a step that is a quarter as long"
    exact = make_scene(eval_samples_per_ray=1024).renderer(frames(), EVALUATION).comp_rgb
    errors = [(render.comp_rgb - exact).abs().mean() for render in (few, many)]
    assert errors[1] < errors[0] / 3


def thinnest(parts, *, trained):
    """The smallest alpha of the samples of a render."""
    render = parts.renderer(frames(), training() if trained else EVALUATION)
    samples = render.samples
    positions, times = FlatRays.of(frames()).midpoints(samples)
    sigmas = parts.scene.geometry.density(positions, times, step=0)
    return alphas_from_density(sigmas, samples.t_starts, samples.t_ends).min().item()


@pytest.mark.parametrize("kind", [NeRFVolumeRenderer, MaskedVolumeRenderer])
def test_training_and_evaluation_prune_below_their_own_thresholds(kind):
    parts = make_scene(kind=kind, alpha_thre=1e-3, eval_alpha_thre=0.05)
    assert 1e-3 <= thinnest(parts, trained=True) < 3e-3
    assert 0.05 <= thinnest(parts, trained=False) < 0.08
    everything = make_scene(kind=kind, prune_alpha_threshold=False)
    assert thinnest(everything, trained=True) < 1e-3 and thinnest(everything, trained=False) < 1e-3


def test_evaluation_prunes_specks_and_keeps_what_is_faint_everywhere():
    solid, faint = make_scene(), make_scene(peak=0.5)
    assert thinnest(solid, trained=False) >= 0.1
    # of about 0.5 * 0.072 in the grid a tenth
    assert 0.002 < thinnest(faint, trained=False) < 0.008


def test_a_ball_has_the_opacity_and_depth_of_the_integral():
    """A hard ball of constant density, seen through its centre: a chord of 0.6 from 2.3 to 2.9."""
    parts = make_scene(orbit=0.0, size=0.3, peak=2.0, sharpness=1e5, num_samples_per_ray=2000)
    rays = frames(1, size=1)
    rays = replace(rays, directions=-torch.nn.functional.normalize(rays.origins, dim=-1))
    render = parts.renderer(rays, EVALUATION)
    opacity = 1 - math.exp(-2 * 0.6)
    depth = opacity * (2.3 + 0.5) - 0.6 * math.exp(-2 * 0.6)  # the integral of 2 exp(-2 s) (2.3 + s)
    assert render.opacity[0, 0, 0].item() == pytest.approx(opacity, abs=2e-3)  # one step of 0.0017
    assert render.depth[0, 0, 0].item() == pytest.approx(depth, abs=6e-3)


def test_normals_point_out_of_the_ball():
    parts, rays = make_scene(return_comp_normal=True, orbit=0.0), frames(1, size=11)
    render = parts.renderer(rays, EVALUATION)
    middle = (0, 5, 6)
    normal = 2 * render.comp_normal[middle] - 1
    assert torch.nn.functional.cosine_similarity(normal, rays.origins[middle], dim=0) > 0.999
    assert render.normals.shape == render.t_dirs.shape == (len(render.samples), 3)
    assert make_scene().renderer(rays, EVALUATION).comp_normal is None


class Facing(Paint):
    """The direction that it is seen along, as a colour."""

    def forward(self, field, points, context):
        return (points.directions + 1) / 2


def test_materials_know_where_they_are_seen_from():
    parts, rays = make_scene(), frames()
    parts.renderer.parts = replace(parts.scene, material=Facing())
    render = parts.renderer(rays, EVALUATION)
    hit = render.opacity[..., 0] > 0.5
    seen = (render.comp_rgb_fg / render.opacity)[hit]
    torch.testing.assert_close(seen, (rays.directions[hit] + 1) / 2)


def test_double_precision_works():
    parts = make_scene()
    parts.scene.geometry.double()
    parts.scene.background.double()
    render = parts.renderer(frames(dtype=torch.float64), training())
    assert all(getattr(render, name).dtype == torch.float64 for name in PIXELS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"estimator": "proposal"}, "occgrid"),
        ({"return_normal_perturb": True}, "return_normal_perturb is not supported"),
        ({"num_samples_per_ray": 0}, "num_samples_per_ray: 0 is outside the range; expected 1 to 16384"),
        ({"grid_resolution": 300}, "grid_resolution: 300 is outside the range; expected 1 to 254"),
        ({"occ_grid_res": 300}, "grid_resolution: 300 is outside the range"),
        ({"occ_grid_res": 16, "grid_resolution": 16}, "occ_grid_res: is grid_resolution by another name"),
        ({"eval_alpha_thre": 1.5}, "eval_alpha_thre: 1.5 is outside the range; expected 0 to 1"),
        ({"radius": 0}, "radius: 0 is outside the range; expected more than 0"),
        ({"num_sample_per_ray": 5}, "did you mean 'num_samples_per_ray'"),
    ],
)
def test_wrong_settings_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(NeRFVolumeRenderer.Config, given, "system.renderer")


def test_the_grid_s_resolution_has_the_original_s_name_too():
    assert parse_config(NeRFVolumeRenderer.Config, {"occ_grid_res": 64}).grid_resolution == 64


def test_a_box_beyond_the_field_is_refused():
    with pytest.raises(ValueError, match=r"use renderer\.radius=1"):
        make_scene(radius=2.0)


def test_all_fields_move_as_one():
    render = make_scene().renderer(frames(), EVALUATION).to(torch.device("cpu"))
    assert isinstance(render.comp_rgb, Tensor) and len(render.samples) == len(render.weights)
