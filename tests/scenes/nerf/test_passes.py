"""Rays cut into passes of a bounded number of samples."""

import pytest
import torch
from analytic_scene import frames

from fourdfy.scenes.nerf.passes import FlatRays, cut, split_rays
from fourdfy.types import Samples


def pack(counts):
    """Samples of rays that have so many each."""
    ray_indices = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    t_starts = torch.arange(len(ray_indices)).float()
    return Samples(ray_indices=ray_indices, t_starts=t_starts, t_ends=t_starts + 1)


@pytest.mark.parametrize("limit", [1, 7, 20, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_passes_are_all_rays_in_order_and_as_long_as_the_limit_allows(limit, seed):
    counts = torch.randint(0, 10, (50,), generator=torch.Generator().manual_seed(seed)).tolist()
    passes = split_rays(pack(counts), 50, limit)
    assert [ray for part in passes for ray in range(50)[part.rays]] == list(range(50))
    assert [n for part in passes for n in range(sum(counts))[part.samples]] == list(range(sum(counts)))
    for part, following in zip(passes, [*passes[1:], None], strict=True):
        taken = sum(counts[part.rays])
        assert taken == part.samples.stop - part.samples.start
        assert taken <= limit or part.rays.stop == part.rays.start + 1
        assert following is None or taken + counts[following.rays.start] > limit


def test_a_pass_counts_its_rays_from_0():
    samples = pack([2, 0, 3, 1])
    rays = FlatRays.of(frames(count=1, size=1))  # three pixels
    rays = FlatRays(**{name: torch.cat([value, value[:1]]) for name, value in vars(rays).items()})
    some_rays, some = cut(rays, samples, split_rays(samples, 4, 4)[1])
    assert torch.equal(some_rays.origins, rays.origins[2:]) and len(some_rays) == 2
    assert some.ray_indices.tolist() == [0, 0, 0, 1]
    assert some.t_starts.tolist() == [2, 3, 4, 5]


def test_rays_in_a_row_have_the_time_of_their_frame():
    rays = frames(count=2, size=3)
    flat = FlatRays.of(rays)
    assert torch.equal(flat.times[:, 0], rays.times.repeat_interleave(15))
    assert torch.equal(flat.light_positions[15], rays.light_positions[1])


def test_rays_without_samples_are_one_pass():
    assert [part.rays for part in split_rays(pack([0] * 9), 9, 1)] == [slice(0, 9)]
