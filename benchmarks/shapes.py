"""Run twelve prompts with all priors and with each left out, and print the tables of docs/benchmarks.md.

The first 36 prompts are of solids, twelve of them held out, and the other 24 of creatures.

    python benchmarks/shapes.py --out outputs/benchmark --per-gpu 12       # all 48 runs, twelve at a time
    python benchmarks/shapes.py --out outputs/benchmark --drop none --prompts 2 trainer.max_steps=2
    python benchmarks/shapes.py --out outputs/further --drop none --skip 12 --seed 1
    python benchmarks/shapes.py --out outputs/creatures --drop none --skip 36 --prompts 24 --seed 0 --seed 1

Or run variants of the recipe, or of the third stage alone, from the second stages of such runs:

    python benchmarks/shapes.py --variants VARIANTS.yaml --out outputs/v --prompt "a dog walking"
    python benchmarks/shapes.py --after outputs/benchmark --variants benchmarks/variants.yaml --out outputs/v

Each run is a process (``python -m fourdfy.evaluation.shapes``) on one of the GPUs, or on the CPU. A run whose
JSON file exists is not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
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
    # Twelve more; spinning ones of which earlier recipes failed in every seed, and four that were held out.
    "an orange cone spinning",
    "a yellow ball spinning",
    "a purple cube spinning",
    "a red diamond bouncing",
    "a blue diamond pulsing",
    "a green ball bouncing",
    "an orange cylinder pulsing",
    "a purple ball sliding",
    "a red cube spinning",
    "a green cylinder spinning",
    "a yellow diamond sliding",
    "a purple cone pulsing",
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
    parser.add_argument("--variants", type=Path, metavar="YAML", help="overrides by name")
    parser.add_argument(
        "--after", type=Path, metavar="DIR", help="--out of the runs that these continue; needs --variants"
    )
    parser.add_argument("--config", help="the recipe (configs/shapes.yaml), or the third stage")
    parser.add_argument("--prompt", action="append", help="these instead of the list's; may be repeated")
    parser.add_argument("--prompts", type=int, default=12, help="so many")
    parser.add_argument("--skip", type=int, default=0, help="but not the first so many; 12: the further ones")
    parser.add_argument("--seed", type=int, action="append", help="may be repeated (0)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    if args.after and not args.variants:
        parser.error("--after needs --variants: those of the third stage that follow on a second one")
    args.config = args.config or f"configs/shapes{'_stage_3' if args.after else ''}.yaml"
    ways = {drop: [] if drop == "none" else ["--drop", drop] for drop in args.drop or DROPS}
    if args.variants:
        ways = yaml.safe_load(args.variants.read_text(encoding="utf-8"))
    prompts, seeds = args.prompt or PROMPTS[args.skip :][: args.prompts], args.seed or [0]
    jobs = [(prompt, way, seed) for way in ways for seed in seeds for prompt in prompts]
    args.out.mkdir(parents=True, exist_ok=True)
    new = [job for job in jobs if not result(job, args.out).exists()]
    run_all([task(*job, ways[job[1]], args) for job in new], LocalRunner.Config(per_gpu=args.per_gpu).build())
    rows = [row_of(job, args.out) for job in jobs if result(job, args.out).exists()]  # the logs say why not
    (args.out / "all.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    heading = "variant" if args.variants else "left out"
    for living in (False, True):
        if some := [row for row in rows if ("faces" in row) == living]:
            print(tables(some, heading))


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


def tables(rows: list[dict], heading: str) -> str:
    """Return Markdown with a line for each run, then the means of each way; of solids, or of creatures."""
    of_run, of_way = (creature, creatures) if "faces" in rows[0] else (solid, solids)
    ways = [[row for row in rows if row["way"] == way] for way in dict.fromkeys(row["way"] for row in rows)]
    runs = [
        {
            "prompt": row["prompt"] + (" *" if row["held_out"] else ""),
            heading: label(row),
            "IoU": number(row["iou"]),
            "PSNR": number(row["psnr"], 1),
            **of_run(row),
            "s": number(row["seconds"], 0),
        }
        for row in rows
    ]
    means = [
        {
            heading: label(way[0]),
            "IoU": average(way, "iou", 3),
            "PSNR": average(way, "psnr", 1),
            **of_way(way),
            "steps/s": average(way, "steps_per_second", 1),
        }
        for way in ways
    ]
    return f"{tabulate(runs)}\n\n{tabulate(means)}"


def tabulate(rows: list[dict[str, str]]) -> str:
    """Return a table in Markdown of rows of heading -> cell."""
    lines = [[*rows[0]], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def solid(row: dict) -> dict[str, str]:
    """Return the own columns of a run of a solid."""
    return {
        "colour": "right" if row["colour_ok"] else "wrong",
        "motion": "still" if row["motion_right"] is None else number(row["motion_corr"]),
        "gain": number(row["motion_gain"]),
        "untracked": number(row.get("untracked"), 0),
        "mark": number(row.get("mark_seen"), 0),
        "ghosts": number(row.get("ghosts"), 0),
        "fronts": str(row["fronts"]),
    }


def solids(rows: list[dict]) -> dict[str, str]:
    """Return those of the means of a way."""
    return {
        "colour right": share(row["colour_ok"] for row in rows),
        "motion right": share(row["motion_right"] for row in rows),
        "correlation": average(rows, "motion_corr", 3),
        "gain": average(rows, "motion_gain"),
        "untracked": average(rows, "untracked", 1),
        "mark": average(rows, "mark_seen", 1),
        "ghosts": average(rows, "ghosts", 1),
        "one front": share(row["fronts"] == 1 for row in rows),
        "saturation": average(rows, "saturation_error", 3, sign="+"),
    }


def creature(row: dict) -> dict[str, str]:
    """Return the own columns of a run of a creature."""
    return {
        "colours right": number(row["colours_right"]),
        "part motion": number(row["motion_corr"]),
        "parts right": number(row["parts_right"]),
        "faces": str(row["faces"]),
    }


def creatures(rows: list[dict]) -> dict[str, str]:
    """Return those of the means of a way."""
    moving = [row["motion_corr"] for row in rows if row["motion_corr"] is not None]
    return {
        "colours right": average(rows, "colours_right"),
        "part motion": average(rows, "motion_corr", 3),
        "at least 0.8": share(corr >= 0.8 for corr in moving),
        "one face": share(row["faces"] == 1 for row in rows),
    }


def average(rows: list[dict], key: str, digits: int = 2, sign: str = "") -> str:
    """Return the mean over the rows that have a number there, as those of an earlier measure have not."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return number(mean(values) if values else None, digits, sign)


def share(answers: Iterable[bool | None]) -> str:
    """Return how many are true of those that are not None."""
    known = [answer for answer in answers if answer is not None]
    return f"{sum(known)}/{len(known)}"


def number(value: float | None, digits: int = 2, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def label(row: dict) -> str:
    return "-" if row["way"] == "none" else row["way"]


if __name__ == "__main__":
    main()
