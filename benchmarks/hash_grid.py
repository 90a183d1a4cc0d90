"""Time the hash grid: forward, and backward with respect to parameters and positions.

    python benchmarks/hash_grid.py                 # this machine's CPU, torch's number of threads
    python benchmarks/hash_grid.py --device cuda --points 1048576 --levels 16
    python benchmarks/hash_grid.py --toy           # seconds; what the test runs

It warms up, repeats, and prints the median in ms and its spread (10th to 90th percentile) as Markdown.
"Look-ups" are corners read by the forward pass, per second and CPU thread or GPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from timing import head, row, spread_of, times_ms, where

from fourdfy.ops.hash_grid import OPERATION, hash_grid
from fourdfy.ops.hash_grid.spec import HashGridSpec


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    print(
        f"{where(args.device)}; {torch.get_num_threads()} threads; {args.points} points, "
        f"{args.levels} levels, 2 features; median of {args.repeats}\n"
    )
    print(
        head("D", "T", "back end", "forward ms", "look-ups M/s", "backward, params", "backward, params + x")
    )
    for n_dims in (3, 4):
        for log2_size in args.log2_sizes:
            spec = HashGridSpec(
                n_input_dims=n_dims,
                n_levels=args.levels,
                log2_hashmap_size=log2_size,
                base_resolution=args.base_resolution,
                per_level_scale=args.per_level_scale,
            )
            for backend in args.backends:
                print(_row(spec, backend, args), flush=True)


def _row(spec: HashGridSpec, backend: str, args: argparse.Namespace) -> str:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(args.points, spec.n_input_dims, generator=generator).to(args.device)
    params = torch.randn(spec.n_params, generator=generator).to(args.device).requires_grad_()
    moving = x.clone().requires_grad_()
    grad = torch.randn(args.points, spec.n_output_dims, generator=generator).to(args.device)

    counts = args.repeats, args.warm_up
    with torch.no_grad():
        forward = times_ms(lambda: hash_grid(x, params, spec, backend), *counts)
    out = hash_grid(x, params, spec, backend)
    params_only = times_ms(lambda: torch.autograd.grad(out, params, grad, retain_graph=True), *counts)
    out = hash_grid(moving, params, spec, backend)
    both = times_ms(lambda: torch.autograd.grad(out, (params, moving), grad, retain_graph=True), *counts)

    corners = args.points * spec.n_levels * 2**spec.n_input_dims
    n_workers = torch.get_num_threads() if args.device == "cpu" else 1
    rate = corners / statistics.median(forward) / 1e3 / n_workers
    cells = [spec.n_input_dims, f"2^{spec.log2_hashmap_size}", backend, spread_of(forward), f"{rate:.0f}"]
    return row([*cells, spread_of(params_only), spread_of(both)])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--points", type=int, default=131072)
    parser.add_argument("--levels", type=int, default=8)
    parser.add_argument("--base-resolution", type=int, default=16)
    parser.add_argument("--per-level-scale", type=float, default=1.447269237440378)
    parser.add_argument("--log2-sizes", type=int, nargs="+", default=[15, 19])
    parser.add_argument(
        "--backends", nargs="+", choices=OPERATION.modules, help="default: the device's own, and torch"
    )
    parser.add_argument("--device", default="cpu", choices=OPERATION.fastest)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to see that it runs")
    args = parser.parse_args(argv)
    args.backends = args.backends or [OPERATION.fastest[args.device], "torch"]
    if args.toy:
        args.points, args.levels, args.log2_sizes, args.repeats, args.warm_up = 64, 2, [8], 2, 1
    return args


if __name__ == "__main__":
    main()
