"""Run twelve prompts with all priors and with each left out, and print the tables of docs/benchmarks.md.

    python benchmarks/shapes.py --out outputs/benchmark --per-gpu 12       # all 48 runs side by side
    python benchmarks/shapes.py --out outputs/benchmark --drop none --prompts 2 trainer.max_steps=2

Each run is a process (``python -m fourdfy.evaluation.shapes``) on one of the GPUs, or on the CPU. A run whose
JSON file exists is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from gpus import environment, spread

PROMPTS = (
    "a red cube bouncing",
    "a blue ball spinning",
    "a green cone pulsing",
    "a yellow cylinder sliding",
    "a purple diamond spinning",
    "an orange ball bouncing",
    "a green cube spinning",
    "a blue cone sliding",
    "a red ball pulsing",
    "a purple cylinder bouncing",
    "a yellow cube standing still",
    "an orange diamond standing still",
)
DROPS = ("none", "multi_view", "video", "single_view")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-gpu", type=int, default=1, help="runs at a time on each GPU (or on the CPU)")
    parser.add_argument("--drop", action="append", choices=DROPS)
    parser.add_argument("--config", default="configs/shapes.yaml", help="the recipe")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="the first so many")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    jobs = [(prompt, drop) for drop in args.drop or DROPS for prompt in PROMPTS[: args.prompts]]
    rows = spread(jobs, lambda job, place: run(*job, place, args), args.per_gpu)
    rows = [row for row in rows if row]
    (args.out / "all.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(table(rows))


def run(prompt: str, drop: str, place: str, args: argparse.Namespace) -> dict | None:
    """Return the row of one run, or None if it failed; the log then says why."""
    name = f"{prompt} {drop}".replace(" ", "_")
    out: Path = args.out
    result, log = out / f"{name}.json", out / f"{name}.log"
    out.mkdir(parents=True, exist_ok=True)
    if not result.exists():
        command = [sys.executable, "-m", "fourdfy.evaluation.shapes", "--prompt", prompt]
        command += ["--gpu", "cpu" if place == "cpu" else "0"]  # the one that the environment leaves
        command += ["--config", args.config, "--json", str(result)]
        command += [f"exp_root_dir={out / 'trials'}", *args.overrides]
        command += ["--drop", drop] if drop != "none" else []
        with open(log, "w", encoding="utf-8") as file:
            subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment(place), check=False
            )
    return json.loads(result.read_text(encoding="utf-8"))[0] if result.exists() else None


def table(rows: list[dict]) -> str:
    """Return Markdown with a line for each run, then the means of each ablation."""
    lines = ["| prompt | left out | IoU | PSNR | colour | motion | fronts | s |", "|" + " --- |" * 8]
    for row in rows:
        motion = "still" if row["motion_corr"] is None else f"{row['motion_corr']:.2f}"
        lines.append(
            f"| {row['prompt']}{' *' if row['held_out'] else ''} | {row['drop'] or '-'} | {row['iou']:.2f} "
            f"| {row['psnr']:.1f} | {'right' if row['colour_ok'] else 'wrong'} | {motion} | {row['fronts']} "
            f"| {row['seconds']:.0f} |"
        )
    lines += ["", "| left out | IoU | PSNR | colour right | motion right | one front |", "|" + " --- |" * 6]
    for drop in dict.fromkeys(row["drop"] for row in rows):
        some = [row for row in rows if row["drop"] == drop]
        moving = [row for row in some if row["motion_corr"] is not None]
        lines.append(
            f"| {drop or '-'} | {mean(r['iou'] for r in some):.3f} | {mean(r['psnr'] for r in some):.1f} "
            f"| {sum(r['colour_ok'] for r in some)}/{len(some)} "
            f"| {sum(r['motion_right'] for r in moving)}/{len(moving)} "
            f"| {sum(r['fronts'] == 1 for r in some)}/{len(some)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
