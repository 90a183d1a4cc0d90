"""Each metric of a scene's views, where the truth is known."""

import math
from dataclasses import replace

import pytest
import torch

from fourdfy.evaluation import consistency, motion
from fourdfy.evaluation.likeness import separate_runs
from fourdfy.evaluation.optical_flow import optical_flow
from tests.evaluation.scenes_to_judge import ball, faces, views


def stripes(azimuth, times):
    return 0.5 + 0.4 * (6 * azimuth).sin()


def test_a_still_has_no_motion_and_no_flicker_and_closes():
    seen = views(ball(stripes), dynamic=True)
    assert motion.flow(seen) < 1e-3 and motion.flicker(seen) < 1e-4 and motion.loop_closure(seen) == 0


def test_an_orbit_passes_the_clip_and_the_views_around_do_not():
    seen = views(ball(lambda azimuth, times: times), dynamic=True)
    torch.testing.assert_close(seen.orbit.rgb[:, 24, 24, 0], torch.arange(24) / 24)
    assert not seen.around.rgb[:, 24, 24].any() and len(seen.clips) == 4
    assert torch.equal(seen.orbit.cameras.azimuth_deg, torch.arange(24) * 15.0)


def test_depth_is_that_of_what_is_seen_and_haze_is_no_object():
    solid = ball()

    def thinned(share):
        def render(cameras):
            out = solid(cameras)
            return replace(out, opacity=share * out.opacity, depth=share * out.depth)

        return views(render, protocol={"views": 4}).around

    whole, thin, haze = map(thinned, (1.0, 0.8, 0.4))
    torch.testing.assert_close(thin.depth, whole.depth)
    assert torch.equal(thin.inside, whole.inside) and not haze.inside.any()


def test_motion_is_not_defined_for_a_static_scene():
    seen = views(ball())
    assert motion.flow(seen) is motion.flicker(seen) is motion.loop_closure(seen) is None
    assert seen.orbit is seen.around


@pytest.mark.parametrize("size", [64, 200])  # the larger one is computed at a smaller size
@pytest.mark.parametrize(("right", "down"), [(3.0, 0.0), (-2.0, 1.0)])
def test_flow_is_the_known_translation(right, down, size):
    scale = size / 64
    rows, columns = torch.meshgrid(*[torch.arange(size) / scale] * 2, indexing="ij")

    def frame(k):
        y, x = rows - 32 - k * down, columns - 32 - k * right
        return 0.5 + 0.4 * (-(x.square() + 2 * y.square()) / 120).exp() * (0.4 * x).cos()

    rgb = torch.stack([frame(k) for k in range(3)])[..., None].expand(3, size, size, 3)
    flows = optical_flow(rgb)
    inside = (rows - 32).abs().le(8) & (columns - 32).abs().le(8)
    wanted = torch.tensor([right, down]) * scale
    torch.testing.assert_close(flows[:, inside].mean(dim=1), wanted.expand(2, 2), atol=0.15 * scale, rtol=0)
    assert float(motion.warping_error(rgb, flows)[:, inside].mean()) < 0.02
    assert float(motion.warping_error(rgb, 0 * flows)[:, inside].mean()) > 0.05


def test_flow_is_the_way_over_the_whole_clip():
    """A ball that rises by a quarter of the image's height over the clip, seen from all sides."""
    height = 2 * 3.0 * math.tan(math.radians(20))  # of the image, at the ball
    rising = views(ball(stripes, moved=lambda times: height * (times * 6 / 5 - 0.5) / 4), dynamic=True)
    assert motion.flow(rising) == pytest.approx(0.25, abs=0.05)
    assert motion.flicker(rising) < 0.06


def test_flicker_is_the_change_that_no_motion_explains():
    """Every second frame is darker by 0.2."""
    blinking = ball(lambda azimuth, times: 0.7 - 0.2 * (times * 6 % 2))
    assert motion.flicker(views(blinking, dynamic=True)) == pytest.approx(0.2, abs=0.03)


def test_a_loop_closes_and_what_only_goes_one_way_does_not():
    loop = ball(lambda azimuth, times: 0.5 + 0.4 * (times * 2 * math.pi).cos())
    one_way = ball(lambda azimuth, times: 0.1 + 0.8 * times)
    assert motion.loop_closure(views(loop, dynamic=True)) == 0
    closure = motion.loop_closure(views(one_way, dynamic=True))
    assert closure == pytest.approx(0.8 * 5 / 6 - 0.8 / 6, abs=0.01)


def test_points_of_a_view_fall_into_their_own_pixels():
    seen = views(ball(), protocol={"elevation": 25.0, "views": 4}).around
    pixels, is_in_image = consistency.projected(consistency.lifted(seen, 3), seen.cameras[3:4])
    rows, columns = seen.inside[3].nonzero(as_tuple=True)
    assert is_in_image.all() and torch.equal(pixels, torch.stack([columns, rows]))


def test_views_of_a_solid_agree_and_a_wrong_depth_is_noticed():
    assert consistency.view_consistency(views(ball())) > 0.99
    half_wrong = views(ball(closer=0.4))
    assert consistency.view_consistency(half_wrong) < 0.9
    # Into the wrong views all is hidden by what is too close; out of them all lies before the ball.
    assert consistency.confirmed_share(half_wrong.around, 5, 6) is None
    assert consistency.confirmed_share(half_wrong.around, 17, 18) == 0
    assert consistency.view_consistency(views(ball(moved=lambda times: 100 + times))) is None


def test_a_view_that_looks_through_the_object_contradicts_the_others():
    solid = ball()

    def holed(cameras):
        out = solid(cameras)
        shown = (cameras.c2w[:, 1, 3].abs() < 1.5)[:, None, None, None]
        return type(out)(comp_rgb=out.comp_rgb, opacity=out.opacity * shown, depth=out.depth * shown)

    assert consistency.view_consistency(views(holed)) < 0.95


@pytest.mark.parametrize(
    ("at", "least", "most"),
    [((0,), 0, 0.05), ((0, 180), 0.95, 1), ((0, 120), 0.15, 0.6), ((0, 120, 240), 0.95, 1)],
)
def test_planted_faces_are_sides_that_repeat(at, least, most):
    assert least <= consistency.repeated_sides(views(ball(faces(*at)))) <= most


def test_what_looks_the_same_from_everywhere_has_no_sides():
    assert consistency.repeated_sides(views(ball())) is None


@pytest.mark.parametrize(
    ("marked", "count"),
    [("....", 0), ("xxxx", 1), ("xx....", 1), ("x....x", 1), ("xx..xx..", 2), ("xx.xx...", 1), ("x.x.x.", 1),
     ("..x..x..x", 3)],
)  # fmt: skip
def test_runs_on_a_circle_count_when_they_lie_apart(marked, count):
    assert separate_runs(torch.tensor([mark == "x" for mark in marked]), apart=2) == count
