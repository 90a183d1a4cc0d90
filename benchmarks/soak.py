"""Train for many steps, and see whether memory, the time of a step and the size of the logs stay the same.

    python benchmarks/soak.py --toy --steps 20000 --out outputs/soak   # tiny models on a CPU, half an hour
    python benchmarks/soak.py shapes --steps 667 --out outputs/soak    # 667 steps of each stage, on a GPU
    python benchmarks/soak.py --toy --steps 40 --out outputs/soak      # seconds; what the test runs

A row is a part of a stage. The first quarter of a stage is its warm-up; memory must stay within 2 % of what
it is then. Tiny models see the same object in every step, so the CPU time of a step must stay within 10 %.
The exit status is 1 if they don't.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import train_step
from models import make_tiny_models, model_paths, models_folder
from timing import head, row, where

import fourdfy
from fourdfy.callbacks.base import Callback, Run

SMALL = (
    "data.single_view.eval_width=16",
    "data.single_view.eval_height=16",
    "system.geometry.pos_encoding_config.log2_hashmap_size=8",
    "system.renderer.num_samples_per_ray=32",
)
ROWS = 20
"""Of a stage, at most."""
MEMORY, TIME = 0.02, 0.1
"""How much more they may become, as a share."""


@dataclass(frozen=True)
class Row:
    """Some consecutive steps of a stage."""

    step: int
    """The last of them."""
    wall_ms: float
    """Of a step."""
    cpu_ms: float
    """Of a step, on all cores."""
    mib: Mapping[str, float]
    """At the end: the process's memory, and what torch holds of the GPU's."""
    logs_kib: float
    """At the end."""


@dataclass
class Watch(Callback):
    """Measures a run."""

    learns: bool
    """Or the learning rates are 0, so that every step sees the same object."""
    stages: dict[str, list[Row]] = field(default_factory=dict)

    def begin(self, run: Run) -> None:
        self._keep(run)
        self.rows = self.stages.setdefault(run.label, [])
        self.every = max(1, run.max_steps // ROWS)
        self._start(run)

    def after_step(self, run: Run, *args: Any) -> None:
        self._keep(run)
        if run.step % self.every:
            return
        steps, wall, cpu = run.step - self.first, time.perf_counter(), time.process_time()
        logs = sum(file.stat().st_size for logs in run.folder.glob("*_logs") for file in logs.rglob("*.*"))
        self.rows.append(
            Row(
                run.step,
                1000 * (wall - self.wall) / steps,
                1000 * (cpu - self.cpu) / steps,
                memory_mib(),
                logs / 2**10,
            )
        )
        self._start(run)

    def _keep(self, run: Run) -> None:
        for group in () if self.learns else run.optimizer.param_groups:
            group["lr"] = 0.0

    def _start(self, run: Run) -> None:
        self.first, self.wall, self.cpu = run.step, time.perf_counter(), time.process_time()


def memory_mib() -> dict[str, float]:
    """MiB of this process, and of a GPU that torch has allocated now and reserved."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    found = {"RSS": pages * os.sysconf("SC_PAGE_SIZE") / 2**20}
    if torch.cuda.is_available():
        found["GPU allocated"] = torch.cuda.memory_allocated() / 2**20
        found["GPU reserved"] = torch.cuda.memory_reserved() / 2**20
    return found


def growth(rows: Sequence[Row]) -> dict[str, float]:
    """By how large a share memory and CPU time are more at the end of a stage than after its warm-up.

    Memory is compared by its largest values and time by its mean, of the second quarter and the last.
    """
    quarter = len(rows) // 4
    after, last = rows[quarter : 2 * quarter], rows[-quarter:]
    memory = {
        name: max(r.mib[name] for r in last) / max(r.mib[name] for r in after) - 1 for name in rows[0].mib
    }
    return memory | {"CPU time": fmean(r.cpu_ms for r in last) / fmean(r.cpu_ms for r in after) - 1}


def report(watch: Watch) -> tuple[str, bool]:
    """A table in Markdown with what grew, and whether all of it is within its limits."""
    names = [*memory_mib()]
    lines = [head("stage", "step", "wall ms", "CPU ms", *(f"{name} MiB" for name in names), "logs KiB")]
    for label, rows in watch.stages.items():
        for r in rows:
            mib = (f"{r.mib[name]:.0f}" for name in names)
            lines.append(
                row([label, r.step, f"{r.wall_ms:.1f}", f"{r.cpu_ms:.1f}", *mib, f"{r.logs_kib:.0f}"])
            )
    limits = dict.fromkeys(names, MEMORY) | ({} if watch.learns else {"CPU time": TIME})
    fine = True
    for label, rows in watch.stages.items():
        grown = growth(rows)
        fine &= all(grown[name] <= limit for name, limit in limits.items())
        lines.append(f"\n{label}: " + ", ".join(f"{name} {share:+.1%}" for name, share in grown.items()))
    return "\n".join(lines), fine


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("given", nargs="*", metavar="CONFIG or key=value", help="default: fourdfy_stage_3")
    parser.add_argument("--steps", type=int, required=True, help="of each stage")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trials")
    parser.add_argument("--toy", action="store_true", help="tiny models and images")
    args = parser.parse_intermixed_args(argv)
    overrides = [word for word in args.given if "=" in word]
    config = next((word for word in args.given if "=" not in word), "fourdfy_stage_3")
    given = [f"trainer.max_steps={args.steps}", f"exp_root_dir={args.out}", "trainer.val_check_interval=0.1"]
    if args.toy:
        models = models_folder(toy=True)
        make_tiny_models(models)
        given += [*model_paths(models, config), *train_step.TOY, *train_step.TOY_VIDEO]
        given += [*SMALL]
    watch = Watch(learns=not args.toy)
    prompt = "a red cube bouncing"
    fourdfy.train(config, [*given, *overrides], prompt=prompt, callbacks=[watch], test=False)
    table, fine = report(watch)
    print(f"{where('cuda' if torch.cuda.is_available() else 'cpu')}\n\n{table}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
