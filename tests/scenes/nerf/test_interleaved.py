"""The original's low-memory renderer: its keys, its state, its shares of the budget."""

from dataclasses import replace

import pytest
import torch
from analytic_scene import EVALUATION, frames, make_scene, refresh_occupancy, training

from fourdfy.config import ConfigError, parse_config
from fourdfy.original.checkpoints import own_names
from fourdfy.registry import find
from fourdfy.scenes.nerf.base import Renderer
from fourdfy.scenes.nerf.renderer import MaskedVolumeRenderer, StableVolumeRenderer
from fourdfy.scenes.nerf.subset import interleaved


def make_interleaved(**base):
    """The scene, and the renderer as a config file gives it."""
    scene = make_scene(refresh=False).scene
    base = {"num_samples_per_ray": 48, "grid_resolution": 16, **base}
    cls = find("stable-nerf-volume-renderer", Renderer)
    cfg = parse_config(cls.Config, {"base_renderer_type": "mask-nerf-volume-renderer", "base_renderer": base})
    renderer = cfg.build(scene)
    refresh_occupancy(renderer)
    return scene, renderer


def test_the_state_is_that_of_the_original_by_shorter_names():
    _, renderer = make_interleaved(grid_resolution=32)
    state = {f"renderer.{name}": value for name, value in renderer.state_dict().items()}
    theirs = {
        name.replace("renderer.", "renderer.base_renderer."): value + 1 for name, value in state.items()
    }
    own = own_names(theirs, state)
    assert own.keys() == state.keys() and len(own) == 5
    assert all(torch.equal(own[name], state[name] + 1) for name in own)


def test_a_refresh_happens_once():
    _, renderer = make_interleaved()
    alone = make_scene(kind=MaskedVolumeRenderer).renderer
    assert torch.equal(renderer.estimator.occs, alone.estimator.occs)


@pytest.mark.parametrize("trained", [True, False])
def test_exact_gradients_are_its_bases(trained):
    scene, renderer = make_interleaved(train_max_nums=100)
    parts = make_scene(kind=MaskedVolumeRenderer, train_max_nums=100)
    render, alone = (
        one(frames(), training() if trained else EVALUATION, "video") for one in (renderer, parts.renderer)
    )
    assert torch.equal(render.comp_rgb, alone.comp_rgb)
    assert scene.geometry.largest_trained_call <= 100


def test_each_sub_image_of_a_frame_has_a_ninth_of_the_budget():
    quotas = interleaved(frames(count=2, size=4), 1000)
    assert quotas.sizes.tolist() == [1000 // 9] * 18
    rows = ["012012", "345345", "678678", "012012"]
    expected = [int(cell) + 9 * frame for frame in range(2) for row in rows for cell in row]
    assert quotas.groups.tolist() == expected


def test_cameras_of_one_time_share_its_budget():
    rays = frames(count=5, size=3)
    quotas = interleaved(replace(rays, times=torch.tensor([0.5, 0.5, 0.1, 0.5, 0.5])), 1000)
    assert quotas.sizes.tolist() == [1000 // 9] * 9 + [1000 // 36] * 9
    frame = quotas.groups.view(5, -1)
    assert torch.equal(frame[0], frame[1]) and torch.equal(frame[0], frame[4])
    assert frame[2].max() < 9 <= frame[0].min()


@pytest.mark.parametrize("size", [2, 10, 11])  # rows that three does not divide, and fewer than three
def test_exactly_the_shares_carry_gradients(size):
    scene, renderer = make_interleaved(gradient="subset", train_max_nums=180)
    rays = frames(size=size)
    render = renderer(rays, training(), "video")
    held = interleaved(rays, 180).groups[render.samples.ray_indices].bincount(minlength=27)
    assert scene.geometry.trained == held.clamp(max=20).sum()
    assert size == 2 or held.max() > 20
    render.comp_rgb.sum().backward()
    assert scene.geometry.peak.grad.abs() > 0


def test_other_steps_have_their_own_budget():
    scene, renderer = make_interleaved(gradient="subset", train_max_nums=90, train_max_nums_static=9)
    renderer(frames(), training(), "image")
    assert scene.geometry.trained == 27


def test_a_base_without_a_budget_is_refused():
    with pytest.raises(ConfigError, match=r"renderer\.base_renderer_type: .*not a MaskedVolumeRenderer"):
        parse_config(
            StableVolumeRenderer.Config,
            {"base_renderer_type": "nerf-volume-renderer", "base_renderer": {}},
            "system.renderer",
        )
