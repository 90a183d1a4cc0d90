"""Train the small models of the shapes world.

    python -m tools.shapes_training all --out DIR --minutes 9.3
    python -m tools.shapes_training image --out DIR --minutes 4      # again to continue
    python -m tools.shapes_training samples --out DIR                # grids and measured quality
    python -m tools.shapes_training export --out DIR --assets FOLDER # genuine model folders

Parts: text, vae, then image, multi_view and video, which need these two; and wan, which needs wan_text and
wan_vae. ``--minutes`` bounds the wall clock of a call.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from tools.shapes_training import store
from tools.shapes_training.export import export
from tools.shapes_training.models import CLASSES, DENOISERS
from tools.shapes_training.quality import measure
from tools.shapes_training.trainee import Options
from tools.shapes_training.training import set_up, train, train_all


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = _parser().parse_args(arguments)
    options = Options(**{field.name: getattr(given, field.name) for field in fields(Options)})
    sampling = {
        "num_prompts": given.num_prompts,
        "steps": given.sample_steps,
        "guidance_scale": given.guidance,
    }
    set_up()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.part == "samples":
        for part in given.models:
            measure(part, given.out, device=given.device, seed=given.seed, **sampling)
    elif given.part in CLASSES:
        train(options)
    elif given.part == "all":
        train_all(options, sampling)
    if given.part in ("all", "export"):
        export(given.out, given.assets)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.shapes_training", description=__doc__.split("\n")[0]
    )
    parser.add_argument("part", choices=(*CLASSES, "all", "samples", "export"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=5.0, help="wall clock of this call")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=device)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--pool", type=int, help="scenes kept on the device")
    parser.add_argument("--lr", type=float)
    parser.add_argument(
        "--phase",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("FROM", "TO"),
        help="of a fall of the learning rate over several calls, this call's part",
    )
    parser.add_argument("--models", nargs="+", choices=DENOISERS, default=DENOISERS, help="for samples")
    parser.add_argument("--num-prompts", type=int, default=96, help="for samples")
    parser.add_argument("--sample-steps", type=int, default=30, help="for samples")
    parser.add_argument("--guidance", type=float, default=5.0, help="for samples")
    parser.add_argument("--assets", type=Path, default=store.ASSETS, help="for export: where the folders go")
    return parser


if __name__ == "__main__":
    main()
