"""Passes change memory and nothing else; a subset of samples carries its own gradients and no others."""

import gc
from dataclasses import replace

import pytest
import torch
from analytic_scene import EVALUATION, Paint, frames, generator, make_scene, refresh_occupancy, training
from field_scene import field_scene
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from fourdfy.config import ConfigError, parse_config
from fourdfy.ops.regularizers import REGULARIZERS
from fourdfy.scenes.nerf.renderer import MaskedVolumeRenderer, NeRFVolumeRenderer
from fourdfy.scenes.nerf.subset import Quotas, draw_subset
from fourdfy.types import RenderOutput, Samples

EVERYTHING = 10**9


def images(render: RenderOutput):
    return {name: value for name, value in render.tensors().items() if name != "samples"}


def gradients(scene, loss):
    modules = (scene.geometry, scene.material, scene.background)
    parameters = {name: p for module in modules for name, p in module.named_parameters()}
    for parameter in parameters.values():
        parameter.grad = None
    loss.backward()
    return {name: p.grad for name, p in parameters.items()}


def assert_equal(actual, expected, tolerance):
    """Entry by entry, relative to the largest number of each tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
        else:
            bound = tolerance * float(value.detach().abs().max()) if value.numel() else 0
            torch.testing.assert_close(actual[name], value, rtol=0, atol=bound, msg=name)


def full_loss(render):
    """All that a step may ask of a render: every image at random weights, and every regulariser."""
    draws = generator(3)
    values = [images(render)[name] for name in ("comp_rgb", "depth", "z_variance", "comp_normal", "weights")]
    weighed = [(v * torch.rand(v.shape, generator=draws, dtype=v.dtype)).sum() for v in values]
    return sum(weighed) + sum(regularizer(render) for regularizer in REGULARIZERS.values())


# -- exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("budget", [1, 37, 500, EVERYTHING])
def test_passes_change_neither_images_nor_gradients(budget, seed):
    renders, grads = [], []
    for kind, settings in ((NeRFVolumeRenderer, {}), (MaskedVolumeRenderer, {"train_max_nums": budget})):
        scene = field_scene()
        renderer = kind(kind.Config(num_samples_per_ray=32, grid_resolution=8, **settings), scene)
        refresh_occupancy(renderer)
        rays = frames(count=2, size=5, dtype=torch.float64)
        renders.append(renderer(rays, training(seed), "video"))
        grads.append(gradients(scene, full_loss(renders[-1])))
    assert len(renders[0].samples) > 700
    assert torch.equal(renders[0].samples.ray_indices, renders[1].samples.ray_indices)
    assert_equal(images(renders[1]), images(renders[0]), 1e-12)
    # seed 0 draws a plain colour for the background, seed 1 the network's colours
    reached = {name for name, grad in grads[0].items() if grad is not None and grad.abs().sum() > 0}
    assert {"density_network.layers.0.weight", "encoding.encoding.time_network.layers.2.weight"} <= reached
    assert ("network.layers.0.weight" in reached) == (seed == 1)
    assert_equal(grads[1], grads[0], 1e-11)


@pytest.mark.parametrize("budget", [40, 333])
def test_single_precision_is_exact_to_its_rounding(budget):
    renders, grads = [], []
    for kind, settings in ((NeRFVolumeRenderer, {}), (MaskedVolumeRenderer, {"train_max_nums": budget})):
        parts = make_scene(kind=kind, random_material=True, extras=True, **settings)
        renders.append(parts.renderer(frames(), training(), "video"))
        grads.append(gradients(parts.scene, renders[-1].comp_rgb.square().sum()))
    assert_equal(images(renders[1]), images(renders[0]), 1e-6)
    assert_equal(grads[1], grads[0], 1e-5)


def test_gradients_reach_the_cameras_too():
    grads = []
    for kind, settings in ((NeRFVolumeRenderer, {}), (MaskedVolumeRenderer, {"train_max_nums": 40})):
        parts = make_scene(kind=kind, **settings)
        shift = torch.zeros(3, requires_grad=True)
        rays = frames()
        rays = replace(rays, origins=rays.origins + shift)
        image = parts.renderer(rays, training(), "video").comp_rgb
        grads.append(torch.autograd.grad((image * image.detach()).sum(), shift)[0])
    assert grads[0].abs().min() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


class HalfPaint(Paint):
    """Colours by a layer that autocast runs in half precision."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.layer.weight)

    def forward(self, field, points, context):
        features = self.layer(field.features)
        assert features.dtype == torch.bfloat16, "autocast is off"
        return super().forward(replace(field, features=features.float()), points, context)


def test_the_backward_pass_shades_in_the_precision_of_the_forward_pass():
    grads = []
    for budget in (50, EVERYTHING):
        parts = make_scene(kind=MaskedVolumeRenderer, train_max_nums=budget)
        object.__setattr__(parts.scene, "material", HalfPaint())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            render = parts.renderer(frames(), training(), "video")
        grads.append(gradients(parts.scene, render.comp_rgb.square().sum()))
    assert grads[0]["layer.weight"].any()
    assert_equal(grads[0], grads[1], 2**-7)  # sums of bfloat16 numbers, 8 bits each, in another order


def test_passes_remember_what_was_frozen_in_the_forward_pass():
    parts = make_scene(kind=MaskedVolumeRenderer, train_max_nums=100)
    geometry = parts.scene.geometry
    geometry.orbit.requires_grad_(False)
    image = parts.renderer(frames(), training(), "video").comp_rgb
    geometry.orbit.requires_grad_(True)
    image.sum().backward(retain_graph=True)
    image.sum().backward()
    assert geometry.orbit.grad is None and geometry.peak.grad is not None
    assert geometry.orbit.requires_grad


def test_a_step_names_its_budget():
    parts = make_scene(kind=MaskedVolumeRenderer, train_max_nums=60, train_max_nums_static=300)
    for name, budget in (("video", 60), ("image", 300)):
        parts.scene.geometry.largest_trained_call = 0
        render = parts.renderer(frames(), training(), name)
        assert parts.scene.geometry.largest_trained_call == 0, "the forward pass builds no graph"
        render.comp_rgb.sum().backward()
        assert len(render.samples) > 300
        assert 0.8 * budget < parts.scene.geometry.largest_trained_call <= budget


def test_few_samples_are_shaded_once():
    parts = make_scene(kind=MaskedVolumeRenderer, train_max_nums=EVERYTHING)
    render = parts.renderer(frames(), training(), "video")
    render.comp_rgb.sum().backward()
    assert parts.scene.geometry.trained == len(render.samples)


def retained_bytes(kind, **settings):
    """Samples of a render in training, and the bytes of all tensors that live on for its backward pass."""
    parts = make_scene(kind=kind, **settings)
    rays, before = frames(), live_storages()
    with saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):  # seen by Python
        render = parts.renderer(rays, training(), "video")
    gc.collect()
    after = live_storages()
    return len(render.samples), sum(size for at, size in after.items() if at not in before)


def live_storages():
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_memory_grows_with_the_pass_and_not_with_the_image():
    """At shorter steps along the same rays; what is kept for each ray is the same."""

    def bytes_per_sample(kind, **settings):
        few, many = (retained_bytes(kind, peak=3.0, num_samples_per_ray=n, **settings) for n in (48, 128))
        assert many[0] > 1.5 * few[0]
        return (many[1] - few[1]) / (many[0] - few[0])

    # ray index 8, start and end 4 each, weight 4; with normals: normal and direction 12 each
    assert bytes_per_sample(MaskedVolumeRenderer, train_max_nums=50) == pytest.approx(20, abs=1)
    shaded = {"train_max_nums": 50, "return_comp_normal": True}
    assert bytes_per_sample(MaskedVolumeRenderer, **shaded) == pytest.approx(44, abs=1)
    assert bytes_per_sample(NeRFVolumeRenderer) > 100, "else the measurement misses the graph"


def test_marching_is_bounded_too(monkeypatch):
    monkeypatch.setattr("fourdfy.scenes.nerf.renderer.MAX_SAMPLES", 300)
    parts = make_scene(kind=MaskedVolumeRenderer, train_max_nums=100)
    parts.scene.geometry.largest_call = 0
    cut = parts.renderer(frames(), training(), "video")
    assert 100 < parts.scene.geometry.largest_call <= 300
    whole = make_scene().renderer(frames(), training(), "video")
    assert_equal(images(cut), images(whole), 1e-6)


# -- both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["exact", "subset"])
def test_an_empty_scene_renders_the_background(gradient):
    parts = make_scene(kind=MaskedVolumeRenderer, refresh=False, gradient=gradient)
    render = parts.renderer(frames(), training(), "video")
    assert len(render.samples) == 0
    assert torch.equal(render.comp_rgb, parts.scene.background(frames().directions))
    grads = gradients(parts.scene, render.comp_rgb.sum())
    assert grads["color"].abs().sum() > 0


@pytest.mark.parametrize("gradient", ["exact", "subset"])
def test_evaluation_knows_no_budget(gradient):
    settings = {"extras": True, "return_comp_normal": True}
    small = {"kind": MaskedVolumeRenderer, "gradient": gradient, "train_max_nums": 5}
    render = make_scene(**small, **settings).renderer(frames(), EVALUATION)
    assert not render.comp_rgb.requires_grad
    assert_equal(images(render), images(make_scene(**settings).renderer(frames(), EVALUATION)), 1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_max_nums": 0}, "train_max_nums: 0 is outside the range; expected at least 1"),
        ({"train_max_nums_static": -1}, "train_max_nums_static: -1 is outside"),
        ({"gradient": "sub"}, "gradient.*sub"),
        ({"num_samples_per_ray": 0}, "num_samples_per_ray: 0 is outside"),
    ],
)
def test_wrong_settings_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(MaskedVolumeRenderer.Config, given, "system.renderer")


# -- subset -------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 150])
def test_exactly_the_budget_carries_gradients(budget):
    parts = make_scene(kind=MaskedVolumeRenderer, gradient="subset", train_max_nums=budget)
    render = parts.renderer(frames(), training(), "video")
    assert len(render.samples) > 300
    assert parts.scene.geometry.trained == parts.scene.geometry.largest_trained_call == budget


def test_subset_images_are_the_exact_ones():
    settings = {"kind": MaskedVolumeRenderer, "extras": True, "return_comp_normal": True}
    exact, subset = (
        make_scene(**settings, gradient=gradient, train_max_nums=200).renderer(frames(), training(), "video")
        for gradient in ("exact", "subset")
    )
    assert_equal(images(subset), images(exact), 1e-6)


def test_gradients_of_a_subset_and_of_the_rest_are_the_whole(monkeypatch):
    """So each is right, and none is rescaled."""
    settings = {"kind": MaskedVolumeRenderer, "extras": True}
    drawn = []

    def draw(*args):
        drawn.append(draw_subset(*args) if not drawn else ~drawn[0])
        return drawn[-1]

    monkeypatch.setattr("fourdfy.scenes.nerf.renderer.draw_subset", draw)
    some, rest, whole = (
        make_scene(**settings, gradient=gradient, train_max_nums=200)
        for gradient in ("subset", "subset", "exact")
    )
    some, rest, whole = (
        gradients(p.scene, p.renderer(frames(), training(), "video").comp_rgb_fg.sum())
        for p in (some, rest, whole)
    )
    assert drawn[0].sum() == 200
    names = ("peak", "orbit")
    assert all(some[name].abs() > 0 for name in names)
    assert_equal({n: some[n] + rest[n] for n in names}, {n: whole[n] for n in names}, 1e-4)


def test_a_subset_repeats_with_the_generator():
    parts = make_scene(kind=MaskedVolumeRenderer, gradient="subset", train_max_nums=50)
    first, second, other = (
        gradients(parts.scene, parts.renderer(frames(), training(seed), "video").comp_rgb.sum())
        for seed in (0, 0, 1)
    )
    assert torch.equal(first["peak"], second["peak"]) and not torch.equal(first["peak"], other["peak"])


def test_each_sample_of_a_group_is_drawn_as_often():
    ray_indices = torch.arange(6).repeat_interleave(torch.tensor([5, 0, 7, 3, 2, 13]))
    samples = Samples(ray_indices=ray_indices, t_starts=torch.zeros(30), t_ends=torch.ones(30))
    quotas = Quotas(groups=torch.tensor([0, 1, 0, 1, 2, 1]), sizes=torch.tensor([4, 0, 9]))
    draws, counts = generator(), torch.zeros(30)
    for _ in range(900):
        drawn = draw_subset(samples, quotas, draws)
        groups = quotas.groups[ray_indices]
        assert [int(drawn[groups == group].sum()) for group in range(3)] == [4, 0, 2]
        counts += drawn
    # 12 samples of group 0 share 4 places: 300 of 900 each, four standard deviations of a binomial are 57
    assert (counts[groups == 0] - 300).abs().max() < 57
