"""The occupancy grid's parts, each against what its rule says."""

import torch

from fourdfy.ops.occupancy import (
    cells_to_refresh,
    decay_and_raise,
    occupied_cells,
    points_in_cells,
    stratified_times,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_all_cells_or_a_quarter_and_the_occupied_ones():
    occupied = torch.zeros(4, 4, 4, dtype=torch.bool)
    occupied[1, 2, 3] = occupied[0, 0, 1] = True
    assert torch.equal(cells_to_refresh(occupied, all_cells=True, generator=generator()), torch.arange(64))
    some = cells_to_refresh(occupied, all_cells=False, generator=generator())
    assert len(some) == 16 + 2 and some[16:].tolist() == [1, 27]
    many = cells_to_refresh(~occupied, all_cells=False, generator=generator())
    assert len(many) == 32 and not {1, 27} & set(many[16:].tolist())


def test_points_lie_in_their_cells():
    cells = torch.arange(27).repeat(20)
    points = points_in_cells(cells, resolution=3, radius=1.5, generator=generator())
    corner = (points + 1.5).floor().long()
    assert torch.equal(corner @ torch.tensor([9, 3, 1]), cells)


def test_times_fill_their_strata():
    times = stratified_times(1000, 4, generator=generator())
    assert torch.equal((times * 4).floor(), torch.arange(4.0).expand(1000, 4))
    assert (times.amax(0) - times.amin(0) > 0.24).all(), "drawn anew for each cell"


def test_a_cell_decays_once_and_takes_the_largest_value():
    occs = torch.tensor([1.0, 1.0, 1.0, 0.0])
    cells, values = torch.tensor([0, 0, 1, 3]), torch.tensor([0.2, 3.0, 0.5, 0.25])
    updated = decay_and_raise(occs, cells, values, decay=0.95)
    torch.testing.assert_close(updated, torch.tensor([3.0, 0.95, 1.0, 0.25]))


def test_threshold_is_the_smaller_of_the_given_one_and_the_mean():
    occs = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.004, 0.02])  # mean 0.003
    cells = occupied_cells(occs, resolution=2, threshold=0.01)
    assert cells.flatten().nonzero().flatten().tolist() == [6, 7]
    assert occupied_cells(10 * occs, resolution=2, threshold=0.05).flatten().tolist()[6:] == [True, True]
    assert occupied_cells(10 * occs, resolution=2, threshold=0.01).sum() == 2


def test_dilation_adds_the_neighbours():
    occs = torch.zeros(125)
    occs[62] = 1.0  # the centre of 5^3
    assert occupied_cells(occs, resolution=5, threshold=0.01, dilation=1).sum() == 27
    occs = torch.zeros(125)
    occs[0] = 1.0
    assert occupied_cells(occs, resolution=5, threshold=0.01, dilation=1).sum() == 8
