"""Measure the field of the paper: both grids, both networks and activations, forward and backward.

    python benchmarks/field.py                                        # 4.19 M points on the GPU
    python benchmarks/field.py --points 262144 1048576 --levels 8 16 --log2-sizes 15 19
    python benchmarks/field.py --toy --device cpu                     # seconds; what the test runs

``static`` is the field of stages 1 and 2, ``moving`` that of stage 3, ``deformed`` that of the deformation.
Points are ``random`` in the scene's cube, or consecutive samples along ``rays`` through its middle, 64 on
each. "Kept" is the memory held between the passes and "peak" the most at once, beyond points and parameters,
the parameters' gradient included. "Density" is a call without gradients, as for pruning. The floor counts
what can't be avoided: points, results and their gradients once, parameters read and their gradient written
once (3.0 TB/s), and the networks' products, forward and backward (790 TFLOP/s).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import torch
from timing import floor_ms, head, row, spread_of, times_ms, two_passes, where
from torch import Tensor

from fourdfy.config import parse_config
from fourdfy.ops.cameras import cast_rays, orbit_cameras
from fourdfy.scenes.nerf.implicit_volume import ImplicitVolume
from fourdfy.types import FieldOutput

FIELDS = {
    "static": {"otype": "HashGridSpatialTime", "static": True},
    "moving": {"otype": "HashGridSpatialTime"},
    "deformed": {
        "otype": "HashGridSpatialTimeDeform",
        "time_encoding_config": {
            "otype": "Grid",
            "n_levels": 8,
            "log2_hashmap_size": 19,
            "base_resolution": 4,
            "per_level_scale": 1.447269237440378,
        },
    },
}
SAMPLES_PER_RAY, STEP = 64, 2 * 3**0.5 / 512
FRAMES = 4


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    print(where(args.device) + f"; median of {args.repeats}\n")
    columns = ("field", "points", "levels", "table", "forward ms", "backward ms", "density ms")
    print(head(*columns, "kept, peak B/point", "floor ms", "distance"))
    sizes = itertools.product(args.fields, args.levels, args.log2_sizes, args.points, args.layouts)
    for name, levels, log2_size, count, layout in sizes:
        field = build(name, levels, log2_size, args.device)
        points = {"random": random_points, "rays": points_on_rays}[layout](count)
        cells = measure(field, [x.to(args.device) for x in points], args)
        print(row([name, f"{count:,} {layout}", levels, f"2^{log2_size}", *cells]), flush=True)


def build(name: str, levels: int, log2_size: int, device: str) -> ImplicitVolume:
    torch.manual_seed(0)
    encoding = {"n_levels": levels, "log2_hashmap_size": log2_size, **FIELDS[name]}
    cfg = parse_config(ImplicitVolume.Config, {"pos_encoding_config": encoding})
    return ImplicitVolume(cfg).to(device)


def random_points(count: int) -> tuple[Tensor, Tensor]:
    """(positions, times)."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, generator=generator) * 2 - 1, torch.rand(count, 1, generator=generator)


def points_on_rays(count: int) -> tuple[Tensor, Tensor]:
    """(positions, times), of rays that come one after the other in images at a few times."""
    side = max(1, round((count / SAMPLES_PER_RAY / FRAMES) ** 0.5))
    rays = cast_rays(
        orbit_cameras(
            torch.full((FRAMES,), 15.0),
            torch.linspace(0, 270, FRAMES),
            distance=2.5,
            fovy_deg=20.0,
            times=torch.linspace(0.1, 0.9, FRAMES),
            height=side,
            width=side,
        )
    )
    t = 2.5 + STEP * (torch.arange(SAMPLES_PER_RAY) - SAMPLES_PER_RAY / 2)
    positions = rays.origins[..., None, :] + rays.directions[..., None, :] * t[:, None]
    times = rays.times[:, None, None, None, None].expand(*positions.shape[:-1], 1)
    return positions.reshape(-1, 3), times.reshape(-1, 1).contiguous()


def measure(field: ImplicitVolume, points: list[Tensor], args: argparse.Namespace) -> list[str]:
    """Cells of ms and bytes per point."""
    count = len(points[0])
    parameters = [p for p in field.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(size, generator=generator).to(args.device) for size in ((count,), (count, 3))]

    def backward(out: FieldOutput) -> None:
        torch.autograd.grad((out.sigmas, out.features), parameters, upstream, allow_unused=True)

    counts = args.repeats, args.warm_up
    passes = two_passes(lambda: field(*points, step=0), backward, args.device, *counts)
    with torch.no_grad():
        density = times_ms(lambda: field.density(*points, step=0), *counts)
    floor = least_ms(parameters, count)
    return [
        *map(spread_of, (passes.forward, passes.backward, density)),
        "-" if args.device == "cpu" else f"{passes.kept / count:.0f}, {passes.peak / count:.0f}",
        f"{floor:.2f}",
        f"{passes.median / floor:.0f} x",
    ]


def least_ms(parameters: list[Tensor], count: int) -> float:
    """The floor of a forward and a backward pass."""
    products = sum(p.numel() for p in parameters if p.ndim == 2)
    per_point = 4 * (4 + 2 * 4)  # position and time; density and features, and their gradients
    tables = sum(2 * 4 * p.numel() for p in parameters)
    return floor_ms(operations=3 * 2 * products * count, n_bytes=per_point * count + tables)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--fields", nargs="+", default=list(FIELDS), choices=FIELDS)
    parser.add_argument("--layouts", nargs="+", default=["random", "rays"], choices=["random", "rays"])
    parser.add_argument("--points", type=int, nargs="+", default=[1 << 22])
    parser.add_argument("--levels", type=int, nargs="+", default=[16])
    parser.add_argument("--log2-sizes", type=int, nargs="+", default=[19])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to see that it runs")
    args = parser.parse_args(argv)
    if args.toy:
        args.points, args.levels, args.log2_sizes, args.repeats, args.warm_up = [1024], [2], [8], 1, 1
    return args


if __name__ == "__main__":
    main()
