"""Make pictures of the docs: a row of eight views for each trial, and below those of a prompt the truth.

Scenes that move are seen by one camera at eight moments, others at time 0 from eight sides.

    python benchmarks/strips.py docs/images/troubleshooting_motion.png "as shipped=TRIAL" "A=TRIAL" ...
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from fourdfy.evaluation.scenes import Render, ground_truth, scene_renderer
from fourdfy.files.images import to_pixels
from fourdfy.launching.experiment import load_experiment
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.shapes.prompts import parse

SIZE, COLUMNS = 96, 8
FOVY_DEG = 32.0
"""Narrower than in training, so that less of the picture is background."""


@torch.no_grad()
def main(picture: Path, trials: dict[str, Path]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = [(name, load_experiment([trial / "configs" / "parsed.yaml"])) for name, trial in trials.items()]
    rows: list[tuple[str, Image.Image]] = []
    for prompt, some in groupby(runs, lambda run: run[1].cfg.system.prompt):
        for name, experiment in some:
            moves = experiment.plan.dynamic
            system = experiment.load_system(device, experiment.last_checkpoint)
            rows.append((name, row(scene_renderer(system), moves, device)))
        rows.append(("truth", row(ground_truth(parse(prompt)), moves, "cpu")))
    font = ImageFont.load_default(size=15)
    margin = 20 + round(max(font.getlength(name) for name, _ in rows))
    whole = Image.new("RGB", (margin + COLUMNS * SIZE, len(rows) * SIZE), "white")
    draw = ImageDraw.Draw(whole)
    for index, (name, image) in enumerate(rows):
        whole.paste(image, (margin, index * SIZE))
        draw.text((margin - 10, (index + 0.5) * SIZE), name, fill="black", font=font, anchor="rm")
    whole.save(picture, optimize=True)


def row(render: Render, moves: bool, device: str) -> Image.Image:
    """The same camera at all moments, or all cameras at time 0."""
    spread, still = torch.arange(COLUMNS) / COLUMNS, torch.zeros(COLUMNS)
    cameras = orbit_cameras(
        torch.full((COLUMNS,), 15.0),
        still if moves else 360 * spread,
        distance=3.0,
        fovy_deg=FOVY_DEG,
        times=spread if moves else still,
        height=SIZE,
        width=SIZE,
    )
    return Image.fromarray(to_pixels(torch.cat(list(render(cameras.to(device))[0].cpu()), dim=1)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), {name: Path(trial) for name, trial in (w.split("=", 1) for w in sys.argv[2:])})
