"""Measure every kind of training step of the experiments, the paper's and later ones, at models' real size.

    python benchmarks/train_step.py fourdfy_stage_3 --out outputs/steps      # about two minutes
    python benchmarks/train_step.py --out outputs/steps --steps 32           # all configs, on every GPU
    python benchmarks/train_step.py fourdfy_stage_2+sdxl --out outputs/sdxl  # with configs/overlays/sdxl.yaml
    python benchmarks/train_step.py fourdfy_stage_3 --toy --out outputs/toy  # seconds; what the test runs

Cameras and seeds are fixed, and learning rates are 0, so that every step sees the same object: ``blob`` is
the fresh scene of the config, ``ball`` a hard ball of the same radius, which stands for a trained scene.
Steps are numbered as late in training (occupancy known, full resolution), and also as before the milestone
of the resolution where the config has one. After a warm-up, the times of consecutive steps are read from CUDA
events, without any synchronisation; 16 steps include one refresh of the occupancy grid. Then 16 steps are
timed part by part, with synchronisation, and four are profiled; both give means. The mixture is weighted as
in the plan.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from models import MODELS, make_models, make_tiny_models, model_paths, parse_with_models
from profiling import PARTS
from stopwatch import MILESTONE, Batches, Block, Stopwatch
from timing import head, row, synchronize, where
from torch.utils.data import DataLoader

from fourdfy.callbacks.base import Run
from fourdfy.launching.experiment import Experiment, load_experiment
from fourdfy.launching.lightning import Trainer
from fourdfy.launching.sweeps.runners import LocalRunner, Task, run_all
from fourdfy.systems.base import System

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("fourdfy_stage_*.yaml"))
STATES = {"ball": ["system.geometry.density_blob_scale=1000"], "blob": []}
TOY = (
    "system.geometry.pos_encoding_config.n_levels=2",
    "data.single_view.width=16",
    "data.single_view.height=16",
    "data.multi_view.width=[8, 16]",
    "data.multi_view.height=[8, 16]",
    "system.guidance_multi_view.height=32",
    "system.guidance_multi_view.width=32",
)
TOY_VIDEO = (
    "data.single_view.num_frames=9",
    "data.single_view.width_vid=16",
    "data.single_view.height_vid=16",
    "system.guidance_video.height=32",
    "system.guidance_video.width=32",
)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(config, state) for config in args.configs for state in args.state]
    if len(jobs) == 1:
        measure(*jobs[0], args)
    else:
        if not args.toy:
            paths = (path for config in args.configs for path in model_paths(args.models, config))
            make_models(args.models, {Path(path).name for path in paths})
        run_all([measurement(*job, args) for job in jobs], LocalRunner.Config().build())
    results = []
    for config, state in jobs:
        if (file := args.out / f"{config}-{state}.json").exists():
            results.append(json.loads(file.read_text(encoding="utf-8")))
        else:
            print(f"{config}, {state} failed; see {args.out / f'{config}-{state}.log'}")
    print(f"{where(device())}\n\n{report(results)}")


def measurement(config: str, state: str, args: argparse.Namespace) -> Task:
    """Return what measures one config in its own process; its output is written beside the result."""
    options = ["--models", str(args.models), "--out", str(args.out), "--state", state]
    options += ["--steps", str(args.steps), "--warm-up", str(args.warm_up)]
    options += ["--toy"] * args.toy + ["--times-only"] * args.times_only
    options += ["--kinds", *args.kinds] if args.kinds else []
    files = [args.out / f"{config}-{state}.{suffix}" for suffix in ("json", "log")]
    for file in files:
        file.unlink(missing_ok=True)
    return Task((config, *options, *args.overrides), files[1], config, (__file__,))


def measure(config: str, state: str, args: argparse.Namespace) -> None:
    """Measure one config in this process, and write down each block as soon as it is measured."""
    began = time.perf_counter()
    name, *overlays = config.split("+")
    files = [f"{name}.yaml", *(f"overlays/{overlay}.yaml" for overlay in overlays)]
    experiment = load_experiment(
        [ROOT / "configs" / file for file in files],
        [*settings(config, args), *STATES[state], *args.overrides],
    )
    experiment = restricted(experiment, args.kinds)
    needed = {Path(name).name for kind in experiment.plan.kinds for name in models_of(kind)}
    if args.toy:
        make_tiny_models(args.models)
    else:
        make_models(args.models, [name for name in MODELS if name in needed])
    made = time.perf_counter()
    system = experiment.build_system().to(device())
    system.prepare(torch.device(device()), resumed=False)
    synchronize()
    result = {
        "config": config,
        "state": state,
        "where": where(device()),
        "max_steps": experiment.cfg.trainer.max_steps,
        "seconds": {"models": made - began, "load": time.perf_counter() - made},
        "blocks": {},
    }

    def write_down(block: Block, found: dict[str, Any]) -> None:
        result["blocks"][block.name] = found
        file = args.out / f"{config}-{state}.json"
        file.write_text(json.dumps(result, indent=1), encoding="utf-8")
        seconds = ", ".join(f"{name} {spent:.0f} s" for name, spent in found["seconds"].items())
        print(f"{config}, {state}, {block.name}: {found['mean']:.1f} ms ({seconds})", file=sys.stderr)

    print(f"{config}, {state}: {result['seconds']}", file=sys.stderr)
    train(experiment, system, Stopwatch(experiment, args, write_down))


def train(experiment: Experiment, system: System, stopwatch: Stopwatch) -> None:
    """Take the steps that the stopwatch wants."""
    data = experiment.build_data()
    data.train_dataloader = lambda start, parts=1: DataLoader(  # type: ignore
        Batches(experiment, stopwatch, parts), batch_size=None
    )
    cfg = replace(experiment.cfg.trainer, max_steps=stopwatch.total, val_check_interval=0)
    run = Run(
        system=system,
        data=data,
        folder=experiment.trial_dir,
        label=experiment.cfg.name,
        max_steps=stopwatch.total,
        optimizer=system.configure_optimizer(),
    )
    Trainer(cfg, run, {"stopwatch": stopwatch}, device=device()).fit(None)


def restricted(experiment: Experiment, kinds: Sequence[str]) -> Experiment:
    """The experiment with the priors of these kinds of step alone, or all if there are none."""
    plan = experiment.plan
    kept = tuple(kind for kind in plan.kinds if not kinds or kind.name in kinds)
    gone = {kind.module for kind in plan.kinds} - {kind.module for kind in kept}
    return replace(experiment, plan=replace(plan, kinds=kept, absent=plan.absent | gone))


def settings(config: str, args: argparse.Namespace) -> list[str]:
    toy = [*TOY, *(TOY_VIDEO if "stage_3" in config else ())] if args.toy else []
    toy += ["system.guidance.height=32", "system.guidance.width=32"] if args.toy and "+" in config else []
    # The blob's annealing would change the scene with the step.
    fixed = ["system.geometry.anneal_density_blob_std_config=null"] if "stage_3" in config else []
    return [
        "system.prompt_processor.prompt=a panda dancing",
        f"exp_root_dir={args.models / 'trials'}",
        *model_paths(args.models, config),
        *fixed,
        *toy,
    ]


def models_of(kind: Any) -> list[str]:
    names = [name for name, _ in kind.guidance.models()]
    return names if kind.prompts is None else [*names, kind.prompts.pretrained_model_name_or_path]


def device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def mixture(blocks: dict[str, dict[str, Any]]) -> tuple[float, float] | None:
    """The mean ms of a step before and after the milestone; None if a kind is missing."""
    if any(abs(sum(block["shares"][era] for block in blocks.values()) - 1) > 1e-6 for era in (0, 1)):
        return None
    early, late = (sum(block["shares"][era] * block["mean"] for block in blocks.values()) for era in (0, 1))
    return early, late


def hours(mixture_ms: tuple[float, float], steps: int) -> float:
    """The time of the config's ``steps``."""
    early, late = mixture_ms
    return (min(steps, MILESTONE) * early + max(steps - MILESTONE, 0) * late) / 3.6e6


def report(results: list[dict[str, Any]]) -> str:
    """Two tables in Markdown: times and memory, and the parts of the mean step."""
    columns = ("config", "state", "step", "mean ms", "median (min to max)", "peak, reserved GiB")
    times = [head(*columns, "M samples", "kernels' ms, number", "launches", "waits")]
    parts = [head("config", "state", "step", *PARTS)]
    for result in results:
        place = [result["config"].removeprefix("fourdfy_"), result["state"]]
        for name, block in result["blocks"].items():
            times.append(row([*place, name, *cells(block)]))
            if "parts_ms" in block:
                parts.append(row([*place, name, *(f"{block['parts_ms'][part]:.1f}" for part in PARTS)]))
        if mixture_ms := mixture(result["blocks"]):
            steps = result["max_steps"]
            duration = f"{steps:,} steps in {hours(mixture_ms, steps):.2f} h"
            times.append(row([*place, "mixture", f"{mixture_ms[1]:.1f}", duration, *["-"] * 5]))
    return "\n".join([*times, *(["", *parts] if len(parts) > 1 else [])])


def cells(block: dict[str, Any]) -> list[str]:
    samples = block["samples"]
    return [
        f"{block['mean']:.1f}",
        f"{block['median']:.1f} ({block['min']:.1f} to {block['max']:.1f})",
        f"{block['peak_gib']:.1f}, {block['reserved_gib']:.1f}",
        "-" if samples is None else f"{samples / 1e6:.2f}",
        f"{block['kernels_ms']:.1f}, {block['kernels']:.0f}" if "kernels" in block else "-",
        f"{block['launches']:.0f}" if "launches" in block else "-",
        f"{sum(block['waits'].values()):.0f}" if "waits" in block else "-",
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "given", nargs="*", metavar="CONFIG or key=value", help="default: all configs of stages"
    )
    parser.add_argument("--state", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--steps", type=int, default=16, help="that are timed, of each kind")
    parser.add_argument("--warm-up", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results in JSON")
    parser.add_argument("--kinds", nargs="+", default=[], help="of step; only their priors are loaded")
    parser.add_argument("--times-only", action="store_true", help="no parts and no profile")
    args = parse_with_models(parser, argv)
    args.overrides = [word for word in args.given if "=" in word]
    args.configs = [word for word in args.given if "=" not in word] or CONFIGS
    if unknown := {config.partition("+")[0] for config in args.configs} - set(CONFIGS):
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(CONFIGS)}")
    if args.toy:
        args.steps, args.warm_up = 2, 1
    return args


if __name__ == "__main__":
    main()
