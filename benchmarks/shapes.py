"""Run twelve prompts with all priors and with each left out, and print the tables of docs/benchmarks.md.

The first 24 prompts are of solids, the other 24 of creatures.

    python benchmarks/shapes.py --out outputs/benchmark --per-gpu 12       # all 48 runs side by side
    python benchmarks/shapes.py --out outputs/benchmark --drop none --prompts 2 trainer.max_steps=2
    python benchmarks/shapes.py --out outputs/further --drop none --skip 12 --seed 1
    python benchmarks/shapes.py --out outputs/creatures --drop none --skip 24 --prompts 24 --seed 0 --seed 1

Or run the third stage alone, in several variants, from the second stages of such runs:

    python benchmarks/shapes.py --after outputs/benchmark --variants benchmarks/variants.yaml --out outputs/v

Each run is a process (``python -m fourdfy.evaluation.shapes``) on one of the GPUs, or on the CPU. A run whose
JSON file exists is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import yaml

from fourdfy.files.names import sanitize_tag
from fourdfy.launching.sweeps.runners import LocalRunner, Task, run_all
from fourdfy.shapes.grammar import ShapePrompt
from fourdfy.shapes.prompts import parse

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
    # Twelve further ones, for settings that were chosen with the first.
    "a red cone bouncing",
    "a green ball sliding",
    "an orange diamond pulsing",
    "a purple ball bouncing",
    "a red cylinder spinning",
    "a blue cylinder sliding",
    "a green diamond spinning",
    "a yellow ball bouncing",
    "an orange cube pulsing",
    "a purple cone spinning",
    "a blue cube standing still",
    "a yellow cone standing still",
    # Twelve of creatures that were in training, and twelve that were held out.
    "a panda dancing",
    "a panda waving",
    "a dog walking",
    "a dog jumping",
    "a bird dancing",
    "a bird waving",
    "a fish dancing",
    "a fish jumping",
    "a robot walking",
    "a red robot waving",
    "a yellow panda spinning",
    "an orange bird standing still",
    "a panda walking",
    "a green panda dancing",
    "a red panda waving",
    "a dog dancing",
    "a red dog spinning",
    "a green dog jumping",
    "a bird jumping",
    "a red bird walking",
    "a red fish dancing",
    "a green fish spinning",
    "a blue robot waving",
    "a yellow robot dancing",
)
DROPS = ("none", "multi_view", "video", "single_view")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-gpu", type=int, default=1, help="runs at a time on each GPU (or on the CPU)")
    parser.add_argument("--drop", action="append", choices=DROPS)
    parser.add_argument("--variants", type=Path, metavar="YAML", help="overrides by name; needs --after")
    parser.add_argument("--after", type=Path, metavar="DIR", help="--out of the runs that these continue")
    parser.add_argument("--config", help="the recipe (configs/shapes.yaml), or the third stage")
    parser.add_argument("--prompts", type=int, default=12, help="so many")
    parser.add_argument("--skip", type=int, default=0, help="but not the first so many; 12: the further ones")
    parser.add_argument("--seed", type=int, action="append", help="may be repeated (0)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    if bool(args.variants) != bool(args.after):
        parser.error("--variants and --after go together: variants of the third stage follow on a second one")
    args.config = args.config or f"configs/shapes{'_stage_3' if args.after else ''}.yaml"
    ways = {drop: [] if drop == "none" else ["--drop", drop] for drop in args.drop or DROPS}
    if args.variants:
        ways = yaml.safe_load(args.variants.read_text(encoding="utf-8"))
    prompts, seeds = PROMPTS[args.skip :][: args.prompts], args.seed or [0]
    jobs = [(prompt, way, seed) for way in ways for seed in seeds for prompt in prompts]
    args.out.mkdir(parents=True, exist_ok=True)
    new = [job for job in jobs if not result(job, args.out).exists()]
    run_all([task(*job, ways[job[1]], args) for job in new], LocalRunner.Config(per_gpu=args.per_gpu).build())
    rows = [row_of(job, args.out) for job in jobs if result(job, args.out).exists()]  # the logs say why not
    (args.out / "all.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    heading = "variant" if args.variants else "left out"
    for tabulate, some in (
        (table, [row for row in rows if "faces" not in row]),
        (creatures_table, [row for row in rows if "faces" in row]),
    ):
        if some:
            print(tabulate(some, heading))


def result(job: tuple[str, str, int], out: Path) -> Path:
    prompt, way, seed = job
    return out / f"{prompt} {way}{f' seed {seed}' if seed else ''}.json".replace(" ", "_")


def row_of(job: tuple[str, str, int], out: Path) -> dict:
    """Return the row of a run that has its result."""
    return json.loads(result(job, out).read_text(encoding="utf-8"))[0] | {"way": job[1], "seed": job[2]}


def task(prompt: str, way: str, seed: int, options: list[str], args: argparse.Namespace) -> Task:
    """Return what runs one job.

    Args:
        options: what is special to this ``way``, for the command line.
    """
    written = result((prompt, way, seed), args.out)
    words = ["--prompt", prompt, "--config", args.config, "--json", str(written)]
    words += [f"exp_root_dir={trials(args.out, way, seed)}", f"seed={seed}"]
    if args.after:
        stage = trials(args.after, "none", seed) / "shapes_stage_2" / sanitize_tag(prompt)
        words += [f"system.weights={stage / 'ckpts' / 'last.ckpt'}"]
    moving = parse(prompt)
    key = "motion" if isinstance(moving, ShapePrompt) else "gesture"
    still = replace(moving, **{key: "standing still"}).text
    words += [*args.overrides, *(option.replace("{still}", still) for option in options)]
    log = written.with_suffix(".log")
    return Task(tuple(words), log, written.stem, ("-m", "fourdfy.evaluation.shapes"))


def trials(out: Path, way: str, seed: int) -> Path:
    """The folder of the trials of one way and seed; names of trials tell the priors that are left out."""
    folder = out / "trials"
    return folder if way in DROPS and not seed else folder / sanitize_tag(f"{way} {seed}")


def table(rows: list[dict], heading: str) -> str:
    """Return Markdown with a line for each run, then the means of each way."""
    columns = ("IoU", "PSNR", "colour", "motion", "gain", "untracked", "mark", "ghosts", "fronts", "s")
    lines = [f"| prompt | {heading} | {' | '.join(columns)} |", "|" + " --- |" * (2 + len(columns))]
    for row in rows:
        motion = "still" if row["motion_right"] is None else number(row["motion_corr"])
        lines.append(
            f"| {row['prompt']}{' *' if row['held_out'] else ''} | {label(row)} | {row['iou']:.2f} "
            f"| {row['psnr']:.1f} | {'right' if row['colour_ok'] else 'wrong'} | {motion} "
            f"| {number(row['motion_gain'])} | {number(row.get('untracked'), 0)} "
            f"| {number(row.get('mark_seen'), 0)} | {number(row.get('ghosts'), 0)} | {row['fronts']} "
            f"| {row['seconds']:.0f} |"
        )
    columns = (
        *("IoU", "PSNR", "colour right", "motion right", "correlation", "gain", "untracked"),
        *("mark", "ghosts", "one front", "saturation", "steps/s"),
    )
    lines += ["", f"| {heading} | {' | '.join(columns)} |", "|" + " --- |" * (1 + len(columns))]
    for way in dict.fromkeys(row["way"] for row in rows):
        some = [row for row in rows if row["way"] == way]
        moving = [row for row in some if row["motion_right"] is not None]
        lines.append(
            f"| {label(some[0])} | {mean(r['iou'] for r in some):.3f} | {mean(r['psnr'] for r in some):.1f} "
            f"| {sum(r['colour_ok'] for r in some)}/{len(some)} "
            f"| {sum(r['motion_right'] for r in moving)}/{len(moving)} "
            f"| {number(mean_of(moving, 'motion_corr'), 3)} | {number(mean_of(moving, 'motion_gain'))} "
            f"| {number(mean_of(moving, 'untracked'), 1)} | {number(mean_of(some, 'mark_seen'), 1)} "
            f"| {number(mean_of(some, 'ghosts'), 1)} "
            f"| {sum(r['fronts'] == 1 for r in some)}/{len(some)} "
            f"| {mean(r.get('saturation_error', math.nan) for r in some):+.3f} "
            f"| {mean(r.get('steps_per_second', math.nan) for r in some):.1f} |"
        )
    return "\n".join(lines)


def creatures_table(rows: list[dict], heading: str) -> str:
    """Return Markdown as ``table`` does, with the columns of creatures."""
    columns = ("IoU", "PSNR", "colours right", "part motion", "parts right", "faces", "s")
    lines = [f"| prompt | {heading} | {' | '.join(columns)} |", "|" + " --- |" * (2 + len(columns))]
    for row in rows:
        lines.append(
            f"| {row['prompt']}{' *' if row['held_out'] else ''} | {label(row)} | {row['iou']:.2f} "
            f"| {row['psnr']:.1f} | {row['colours_right']:.2f} | {number(row['motion_corr'])} "
            f"| {number(row['parts_right'])} | {row['faces']} | {row['seconds']:.0f} |"
        )
    columns = ("IoU", "PSNR", "colours right", "part motion", "at least 0.8", "one face", "steps/s")
    lines += ["", f"| {heading} | {' | '.join(columns)} |", "|" + " --- |" * (1 + len(columns))]
    for way in dict.fromkeys(row["way"] for row in rows):
        some = [row for row in rows if row["way"] == way]
        moving = [row["motion_corr"] for row in some if row["motion_corr"] is not None]
        lines.append(
            f"| {label(some[0])} | {mean(r['iou'] for r in some):.3f} | {mean(r['psnr'] for r in some):.1f} "
            f"| {mean(r['colours_right'] for r in some):.2f} | {number(mean_of(some, 'motion_corr'), 3)} "
            f"| {sum(corr >= 0.8 for corr in moving)}/{len(moving)} "
            f"| {sum(r['faces'] == 1 for r in some)}/{len(some)} "
            f"| {mean(r.get('steps_per_second', math.nan) for r in some):.1f} |"
        )
    return "\n".join(lines)


def mean_of(rows: list[dict], key: str) -> float | None:
    """Mean over the rows that have a number there; None if none has, as in rows of an earlier measure."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return mean(values) if values else None


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def label(row: dict) -> str:
    return "-" if row["way"] == "none" else row["way"]


if __name__ == "__main__":
    main()
