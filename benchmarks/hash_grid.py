"""Time the hash grid: forward, and backward with respect to parameters and positions.

    python benchmarks/hash_grid.py                 # this machine's CPU, torch's number of threads
    python benchmarks/hash_grid.py --device cuda --points 1048576 --levels 16
    python benchmarks/hash_grid.py --toy           # seconds; what the test runs

It warms up, repeats, and prints the median in ms and its spread (10th to 90th percentile) as Markdown.
"Look-ups" are corners read by the forward pass, per second and CPU thread or GPU.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence

import torch

from fourdfy.ops.hash_grid import OPERATION, hash_grid
from fourdfy.ops.hash_grid.spec import HashGridSpec


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    rows = [
        f"{_device_name(args.device)}; torch {torch.__version__}, python {platform.python_version()}, "
        f"commit {_commit()}; {torch.get_num_threads()} threads; {args.points} points, "
        f"{args.levels} levels, 2 features; median of {args.repeats}",
        "",
        "| D | T | back end | forward ms | look-ups M/s | backward, params | backward, params + x |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for n_dims in (3, 4):
        for log2_size in args.log2_sizes:
            spec = HashGridSpec(
                n_input_dims=n_dims,
                n_levels=args.levels,
                log2_hashmap_size=log2_size,
                base_resolution=args.base_resolution,
                per_level_scale=args.per_level_scale,
            )
            rows += [_row(spec, backend, args) for backend in args.backends]
    print("\n".join(rows))


def _row(spec: HashGridSpec, backend: str, args: argparse.Namespace) -> str:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(args.points, spec.n_input_dims, generator=generator).to(args.device)
    params = torch.randn(spec.n_params, generator=generator).to(args.device).requires_grad_()
    moving = x.clone().requires_grad_()
    grad = torch.randn(args.points, spec.n_output_dims, generator=generator).to(args.device)

    with torch.no_grad():
        forward = _times(lambda: hash_grid(x, params, spec, backend), args)
    out = hash_grid(x, params, spec, backend)
    params_only = _times(lambda: torch.autograd.grad(out, params, grad, retain_graph=True), args)
    out = hash_grid(moving, params, spec, backend)
    both = _times(lambda: torch.autograd.grad(out, (params, moving), grad, retain_graph=True), args)

    corners = args.points * spec.n_levels * 2**spec.n_input_dims
    n_workers = torch.get_num_threads() if args.device == "cpu" else 1
    rate = corners / statistics.median(forward) / 1e6 / n_workers
    cells = [spec.n_input_dims, f"2^{spec.log2_hashmap_size}", backend, _cell(forward), f"{rate:.0f}"]
    return "| " + " | ".join(map(str, [*cells, _cell(params_only), _cell(both)])) + " |"


def _times(run: Callable[[], object], args: argparse.Namespace) -> list[float]:
    seconds = []
    for repeat in range(args.warm_up + args.repeats):
        _synchronize(args.device)
        start = time.perf_counter()
        run()
        _synchronize(args.device)
        if repeat >= args.warm_up:
            seconds.append(time.perf_counter() - start)
    return seconds


def _cell(seconds: list[float]) -> str:
    ordered = sorted(1e3 * s for s in seconds)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return f"{statistics.median(ordered):.1f} ({low:.1f}-{high:.1f})"


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


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
