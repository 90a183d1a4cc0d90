"""Make the README's animated picture: the test views of finished shapes trials above the ground truth.

python benchmarks/demo_picture.py docs/images/demo.webp outputs/shapes_stage_3/*
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fourdfy.evaluation.scenes import ground_truth
from fourdfy.files.images import to_pixels
from fourdfy.launching.experiment import load_experiment
from fourdfy.shapes.prompts import parse

SIZE, COLUMNS = 192, 4
SECONDS = 4.0


def main(picture: Path, trials: list[Path]) -> None:
    pairs = [pair(trial) for trial in trials]
    columns = min(COLUMNS, len(pairs))
    pairs += [np.full_like(pairs[0], 255)] * (-len(pairs) % columns)
    rows = [np.concatenate(pairs[k : k + columns], axis=2) for k in range(0, len(pairs), columns)]
    first, *others = map(Image.fromarray, np.concatenate(rows, axis=1))
    milliseconds = round(1000 * SECONDS / (1 + len(others)))
    first.save(
        picture, save_all=True, append_images=others, duration=milliseconds, loop=0, quality=75, method=6
    )


def pair(trial: Path) -> np.ndarray:
    """All frames of a trial, [frames, 2 SIZE, SIZE, 3]: the scene above the truth."""
    experiment = load_experiment([trial / "configs" / "parsed.yaml"])
    cameras = experiment.build_data().test_cameras(dynamic=True)["test"]
    truth, _ = ground_truth(parse(experiment.cfg.system.prompt))(cameras)
    (folder,) = trial.glob("save/it*-test")
    ours = [Image.open(folder / f"{index}.png").convert("RGB") for index in range(len(cameras))]
    both = zip(ours, map(Image.fromarray, to_pixels(truth)), strict=True)
    return np.stack(
        [np.concatenate([np.asarray(image.resize((SIZE, SIZE))) for image in two]) for two in both]
    )


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
