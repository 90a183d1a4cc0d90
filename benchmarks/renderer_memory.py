"""Measure time and memory of a video step's render, forward and backward, with each renderer.

    python benchmarks/renderer_memory.py                      # the paper's field and video, on a GPU
    python benchmarks/renderer_memory.py --std 1.0 --chunks 100000 1000000
    python benchmarks/renderer_memory.py --toy --device cpu   # seconds; what the test runs

``nerf`` keeps the graph of all samples, ``exact`` that of one chunk (``train_max_nums``), and ``subset`` is
the original's random choice of samples. "Peak" is the most memory that torch held at once beyond that of the
scene itself (CUDA only), and "kept" what it holds between the two passes, while a video model would run. It
warms up, repeats, and prints the median as a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence

import torch

from fourdfy.config import parse_config
from fourdfy.ops.cameras import cast_rays, orbit_cameras
from fourdfy.registry import find
from fourdfy.scenes.backgrounds import NeuralEnvironmentMap
from fourdfy.scenes.nerf.base import Parts, Renderer
from fourdfy.scenes.nerf.implicit_volume import ImplicitVolume
from fourdfy.scenes.nerf.materials import NoMaterial
from fourdfy.types import RayBundle, StepContext

NERF, STABLE = "nerf-volume-renderer", "stable-nerf-volume-renderer"


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    scene, rays = _scene(args), _video(args)
    settings = {"num_samples_per_ray": args.samples_per_ray}
    rows = [("nerf", "-", NERF, settings)]
    for gradient, chunks in (("exact", args.chunks), ("subset", args.chunks[:1])):
        for chunk in chunks:
            base = {**settings, "train_max_nums": chunk, "gradient": gradient}
            rows.append((gradient, f"{chunk:,}", STABLE, {"base_renderer": base}))
    print(
        f"{_device_name(args.device)}; torch {torch.__version__}, python {platform.python_version()}, "
        f"commit {_commit()}; {args.frames} frames of {args.height} x {args.width}, {args.levels} levels of "
        f"2^{args.log2_size}; median of {args.repeats}\n\n"
        "| renderer | chunk | samples | forward ms | backward ms | kept MiB | peak MiB |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, chunk, kind, keys in rows:
        cls = find(kind, Renderer)
        renderer = parse_config(cls.Config, keys).build(scene).to(args.device)
        print(f"| {name} | {chunk} | " + " | ".join(_measure(renderer, scene, rays, args)) + " |", flush=True)


def _measure(renderer: Renderer, scene: Parts, rays: RayBundle, args: argparse.Namespace) -> list[str]:
    """Return the number of samples, ms forward and backward, and MiB kept and at the peak."""
    generator = torch.Generator(args.device).manual_seed(0)
    for step in range(0, 64, 16):
        renderer.update_occupancy(StepContext(step, generator), dynamic=True)
    parameters = [*scene.geometry.parameters(), *scene.background.parameters()]
    forward, backward, cuda = [], [], args.device != "cpu"
    kept = peak = samples = 0
    try:
        for _ in range(args.warm_up + args.repeats):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = _now(cuda)
            render = renderer(rays, StepContext(0, generator.manual_seed(1)), "video")
            middle = _now(cuda)
            samples, loss = len(render.samples), render.comp_rgb.square().sum()
            if cuda:
                kept = torch.cuda.memory_allocated() - before
            del render
            torch.autograd.grad(loss, parameters, allow_unused=True)
            backward.append(_now(cuda) - middle)
            forward.append(middle - start)
            del loss
            if cuda:
                peak = torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return ["out of memory"] + ["-"] * 4
    times = [f"{1e3 * statistics.median(seconds[args.warm_up :]):.0f}" for seconds in (forward, backward)]
    return [f"{samples:,}", *times, *(f"{size / 2**20:.0f}" if cuda else "-" for size in (kept, peak))]


def _scene(args: argparse.Namespace) -> Parts:
    """Return the paper's field at the start of training, a soft ball."""
    grid = {"n_levels": args.levels, "log2_hashmap_size": args.log2_size, "backend": args.backend}
    geometry = {
        "density_blob_std": args.std,
        "pos_encoding_config": {"otype": "HashGridSpatialTime", **grid},
    }
    torch.manual_seed(0)
    parts = (
        (ImplicitVolume, geometry),
        (NoMaterial, {}),
        (NeuralEnvironmentMap, {"random_aug": True}),
    )
    return Parts(*(cls(parse_config(cls.Config, given)).to(args.device) for cls, given in parts))


def _video(args: argparse.Namespace) -> RayBundle:
    """Return the rays of one camera, as near as in training, at evenly spread times."""
    cameras = orbit_cameras(
        torch.full((args.frames,), 15.0),
        torch.full((args.frames,), 30.0),
        distance=2.5,
        fovy_deg=args.fovy,
        times=torch.linspace(0, 1, args.frames),
        height=args.height,
        width=args.width,
    )
    return cast_rays(cameras.to(args.device))


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else platform.processor() or platform.machine()


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--backend", default="auto", help="of the hash grid")
    parser.add_argument("--chunks", type=int, nargs="+", default=[100_000, 500_000, 2_000_000])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--height", type=int, default=160)
    parser.add_argument("--width", type=int, default=288)
    parser.add_argument("--fovy", type=float, default=40.0)
    parser.add_argument("--std", type=float, default=0.5, help="of the density's ball: its radius, about")
    parser.add_argument("--levels", type=int, default=16)
    parser.add_argument("--log2-size", type=int, default=19)
    parser.add_argument("--samples-per-ray", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to see that it runs")
    args = parser.parse_args(argv)
    if args.toy:
        args.frames, args.height, args.width, args.levels, args.log2_size = 2, 6, 8, 2, 8
        args.samples_per_ray, args.chunks, args.repeats, args.warm_up = 32, [50], 1, 0
    return args


if __name__ == "__main__":
    main()
