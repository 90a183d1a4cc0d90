"""Measure time and memory of a video step's render as one size at a time changes.

    python benchmarks/scaling.py --out outputs/scaling.json     # the paper's field and video, on a GPU
    python benchmarks/scaling.py --axes chunk --chunks 100000 1000000
    python benchmarks/scaling.py --out outputs/scaling.json --plot docs/images/scaling.png   # draws it
    python benchmarks/scaling.py --toy --device cpu             # seconds; what the test runs

The scene is a soft ball, as at the start of training. "Peak" is the most memory that torch held at once
beyond that of the scene itself (CUDA only), and "kept" what it holds between the two passes, while a video
model would run. On the axis ``chunk``, the renderer keeps the graph of all samples (``all``) or that of one
chunk (``train_max_nums``), and ``subset`` is the original's random choice of samples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from timing import head, row, two_passes, where
from torch import Tensor

from fourdfy.config import parse_config
from fourdfy.ops.cameras import cast_rays, orbit_cameras
from fourdfy.registry import find
from fourdfy.scenes.backgrounds import NeuralEnvironmentMap
from fourdfy.scenes.nerf.base import Parts, Renderer
from fourdfy.scenes.nerf.implicit_volume import ImplicitVolume
from fourdfy.scenes.nerf.materials import NoMaterial
from fourdfy.types import RayBundle, StepContext

PANEL, TIME, MEMORY = 220, "#1f5fa8", "#c0562c"
"""Pixels per side of a panel of the plot, and the colours of its lines."""


@dataclass(frozen=True)
class Case:
    """What is rendered."""

    frames: int = 16
    height: int = 160
    width: int = 288
    samples_per_ray: int = 512
    levels: int = 16
    log2_size: int = 19
    chunk: int | None = None
    gradient: str = "exact"


def axes(base: Case, chunks: Sequence[int]) -> dict[str, list[tuple[str, float, Case]]]:
    """Axis -> (label, size, case), small to large."""
    sides = [(round(base.height * scale), round(base.width * scale)) for scale in (0.5, 0.71, 1, 1.41)]
    tables = range(base.log2_size - 4, base.log2_size + 3, 2)
    subset = replace(base, chunk=chunks[0], gradient="subset")
    return {
        "rays": [(f"{h} x {w}", h * w, replace(base, height=h, width=w)) for h, w in sides],
        "frames": [(str(n), n, replace(base, frames=n)) for n in _around(base.frames)],
        "samples per ray": [
            (str(n), n, replace(base, samples_per_ray=n)) for n in _around(base.samples_per_ray)
        ],
        "levels": [(str(n), n, replace(base, levels=n)) for n in _around(base.levels)[:3]],
        "table": [(f"2^{n}", 2**n, replace(base, log2_size=n)) for n in tables],
        "chunk": [
            ("all", 0, base),
            *((f"{n:,}", n, replace(base, chunk=n)) for n in chunks),
            (f"subset {chunks[0]:,}", chunks[0], subset),
        ],
    }


def _around(value: int) -> list[int]:
    return [value // 4, value // 2, value, value * 2]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    base = Case(args.frames, args.height, args.width, args.samples_per_ray, args.levels, args.log2_size)
    if args.plot is None:
        measured = {"where": where(args.device), "axes": {}}
        print(f"{measured['where']}; {asdict(base)}; median of {args.repeats}\n")
        print(head("axis", "value", "samples", "forward ms", "backward ms", "kept MiB", "peak MiB"))
        for axis, cases in axes(base, args.chunks).items():
            if axis in args.axes:
                measured["axes"][axis] = [
                    {"label": label, "size": size, **measure_row(axis, label, case, args)}
                    for label, size, case in cases
                ]
                if args.out:  # after each axis: a run may be ended before its last
                    args.out.write_text(json.dumps(measured, indent=1), encoding="utf-8")
    else:
        plot(json.loads(args.out.read_text(encoding="utf-8")), args.plot)


def measure_row(axis: str, label: str, case: Case, args: argparse.Namespace) -> dict[str, float]:
    """The measurements of one case, which are printed too; empty if there is too little memory."""
    try:
        found = measure(case, args)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        print(row([axis, label, "out of memory", *["-"] * 4]), flush=True)
        return {}
    cells = [f"{found[key]:.0f}" for key in ("forward_ms", "backward_ms", "kept_mib", "peak_mib")]
    print(row([axis, label, f"{found['samples']:,}", *cells]), flush=True)
    return found


def measure(case: Case, args: argparse.Namespace) -> dict[str, float]:
    scene, rays = build_scene(case, args), video(case, args)
    cls = find("nerf-volume-renderer", Renderer)
    settings = {
        "num_samples_per_ray": case.samples_per_ray,
        "train_max_nums": case.chunk,
        "gradient": case.gradient,
    }
    renderer = parse_config(cls.Config, settings).build(scene).to(args.device)
    generator = torch.Generator(args.device).manual_seed(0)
    for step in range(0, 64, 16):
        renderer.update_occupancy(StepContext(step, generator), dynamic=True)
    parameters = [*scene.geometry.parameters(), *scene.background.parameters()]
    counts: list[int] = []

    def forward() -> Tensor:
        render = renderer(rays, StepContext(0, generator.manual_seed(1)), "video")
        counts.append(len(render.samples))
        return render.comp_rgb.square().sum()

    def backward(loss: Tensor) -> None:
        torch.autograd.grad(loss, parameters, allow_unused=True)

    passes = two_passes(forward, backward, args.device, args.repeats, args.warm_up)
    return {
        "samples": counts[-1],
        "forward_ms": median(passes.forward),
        "backward_ms": median(passes.backward),
        "kept_mib": passes.kept / 2**20,
        "peak_mib": passes.peak / 2**20,
    }


def build_scene(case: Case, args: argparse.Namespace) -> Parts:
    """The paper's field at the start of training, a soft ball."""
    grid = {"n_levels": case.levels, "log2_hashmap_size": case.log2_size}
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


def video(case: Case, args: argparse.Namespace) -> RayBundle:
    """The rays of one camera, as near as in training, at evenly spread times."""
    cameras = orbit_cameras(
        torch.full((case.frames,), 15.0),
        torch.full((case.frames,), 30.0),
        distance=2.5,
        fovy_deg=args.fovy,
        times=torch.linspace(0, 1, case.frames),
        height=case.height,
        width=case.width,
    )
    return cast_rays(cameras.to(args.device))


def plot(measured: dict[str, Any], picture: Path) -> None:
    """Draw time and peak memory along each axis but ``chunk``; all scales are linear and begin at 0."""
    shown = {
        name: [case for case in cases if "samples" in case]
        for name, cases in measured["axes"].items()
        if name != "chunk"
    }
    image = Image.new("RGB", (PANEL * len(shown), PANEL + 40), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for index, (name, cases) in enumerate(shown.items()):
        left, right, top, bottom = PANEL * index + 44, PANEL * (index + 1) - 44, 30, PANEL - 30
        draw.rectangle((left, top, right, bottom), outline="lightgrey")
        draw.text(((left + right) / 2, 14), name, "black", font, "mm")
        places = [left + (right - left) * case["size"] / cases[-1]["size"] for case in cases]
        labelled = left
        for x, case in zip(places, cases, strict=True):
            if x - labelled > 24:
                draw.text((x, bottom + 12), case["label"].split(" ")[0], "black", font, "mm")
                labelled = x
        ms = [case["forward_ms"] + case["backward_ms"] for case in cases]
        gib = [case["peak_mib"] / 1024 for case in cases]
        for values, colour, edge, anchor in ((ms, TIME, left - 4, "rm"), (gib, MEMORY, right + 4, "lm")):
            most = max(values) or 1
            draw.text((edge, top), f"{most:.0f}" if most > 99 else f"{most:.2g}", colour, font, anchor)
            points = [(x, bottom - (bottom - top) * v / most) for x, v in zip(places, values, strict=True)]
            draw.line(points, colour, 2)
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
    middle = image.width / 2
    draw.text((middle - 10, PANEL + 20), "forward and backward, ms (left)", TIME, font, "rm")
    draw.text((middle + 10, PANEL + 20), "peak memory, GiB (right)", MEMORY, font, "lm")
    picture.parent.mkdir(parents=True, exist_ok=True)
    image.save(picture, optimize=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    base = Case()
    names = list(axes(base, [1]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--axes", nargs="+", default=names, choices=names)
    parser.add_argument("--chunks", type=int, nargs="+", default=[100_000, 500_000, 2_000_000])
    for name, value in asdict(base).items():
        if isinstance(value, int):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--fovy", type=float, default=40.0)
    parser.add_argument("--std", type=float, default=0.5, help="of the density's ball: its radius, about")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the measurements as JSON")
    parser.add_argument("--plot", type=Path, help="draw the measurements in --out instead")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to see that it runs")
    args = parser.parse_args(argv)
    if args.plot and not args.out:
        parser.error("--plot: expected --out FILE.json, the measurements to draw")
    if args.toy:
        args.frames, args.height, args.width, args.levels, args.log2_size = 4, 6, 8, 4, 8
        args.samples_per_ray, args.chunks, args.repeats, args.warm_up = 32, [50], 1, 0
    return args


if __name__ == "__main__":
    main()
