"""Make the README's picture: frames of a finished shapes trial above the ground truth of the same views.

python benchmarks/demo_picture.py outputs/shapes_stage_3/a_red_cube_bouncing docs/images/demo.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch

from fourdfy.files.images import save_image, side_by_side, to_pixels
from fourdfy.launching.experiment import load_experiment
from fourdfy.shapes.grammar import parse_prompt
from fourdfy.shapes.world import BACKGROUNDS, render

COLUMNS = 8


def main(trial: Path, picture: Path) -> None:
    experiment = load_experiment([trial / "configs" / "parsed.yaml"])
    cameras = experiment.build_data().test_cameras(dynamic=True)["test"]
    picked = torch.linspace(0, len(cameras) // 2 - 1, COLUMNS).long()
    prompt = parse_prompt(experiment.cfg.system.prompt_processor.prompt)
    truth, _ = render([prompt] * COLUMNS, cameras[picked], torch.tensor(BACKGROUNDS[0]))
    (folder,) = trial.glob("save/it*-test")
    ours = [imageio.imread(folder / f"{int(index)}.png") for index in picked]
    save_image(picture, np.concatenate([side_by_side(ours), side_by_side([*to_pixels(truth)])]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
