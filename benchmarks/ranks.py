"""Measure the steps of an experiment on one GPU and on several, with models of the real size.

    python benchmarks/ranks.py fourdfy_stage_3 --gpu 0,1 --out outputs/ranks      # about eight minutes
    python benchmarks/ranks.py fourdfy_stage_3 --gpu cpu,cpu --toy --out outputs/ranks --parts steps

The same processes measure both: first one of them alone, twice, while the others wait, then all together.
Cameras, draws and the scene (``ball`` of ``train_step.py``) are the same each time. The table has ms of a
step, how much faster several GPUs are, and the difference of their gradients from those of one, beside that
of one GPU from itself. Steps are also timed part by part, with synchronisation; "ranks" is the time of sums
over all ranks, with the wait for the slowest one in it.

Networks are replayed as CUDA graphs but not compiled, which takes minutes for all their shapes; ``--compile``
compiles them too. Everything is printed as soon as it is known; each part has its own time limit, and the
others go on without one that failed. The last parts train a scene of the shapes world by ``launch.py --gpu``,
and kill a process of such a run, to see how long the others take to end.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import MODELS, make_models, make_tiny_models, parse_with_models
from profiling import PARTS, PartTimes
from stopwatch import Batches, Block, Timer
from timing import head, row, where
from torch import Tensor
from torch.utils.data import DataLoader
from train_step import STATES, models_of, settings

from fourdfy.callbacks.base import Run
from fourdfy.devices import local_rank, select_devices
from fourdfy.launching.experiment import Experiment, load_experiment
from fourdfy.launching.lightning import Trainer
from fourdfy.launching.ranks import as_ranks
from fourdfy.ops.ranks import ALONE, of_first_rank, ranks, together
from fourdfy.priors import acceleration
from fourdfy.systems.base import System

ROOT = Path(__file__).parents[1]
PHASES = ("one GPU", "one GPU again", "all GPUs")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.worker:
        work(args)
        return
    devices = args.gpu.split(",")
    options = [args.config, "--worker", "--gpu", args.gpu]
    options += ["--out", str(args.out), "--models", str(args.models), "--minutes", str(args.minutes)]
    options += ["--steps", str(args.steps), "--warm-up", str(args.warm_up)]
    options += ["--toy"] * args.toy + ["--compile"] * args.compile + args.overrides
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    measured = [*torchrun, str(len(devices)), __file__, *options]
    for name, part in {
        "steps": lambda: run_for(measured, args.minutes),
        "launch.py": lambda: run_for(training(args, "together", steps=30), 3),
        "a rank dies": lambda: end_of_a_rank(args),
    }.items():
        if name not in args.parts:
            continue
        print(f"\n== {name}", flush=True)
        began = time.perf_counter()
        try:
            part()
        except Exception:
            traceback.print_exc(file=sys.stdout)
        print(f"== {name}: {time.perf_counter() - began:.0f} s", flush=True)


def run_for(command: Sequence[str], minutes: float) -> None:
    """Run a program, whose output is shown as it comes, and end it with all that it started after a while."""
    print(shlex.join(command), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        print(f"exit status {process.wait(60 * minutes)}", flush=True)
    except subprocess.TimeoutExpired:
        print(f"not done after {minutes} minutes: ended", flush=True)
    finally:
        end_session(process)


def end_session(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()  # torchrun's processes are no others' to end
        with suppress(subprocess.TimeoutExpired):
            process.wait(40)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def training(args: argparse.Namespace, name: str, steps: int) -> list[str]:
    """A run of the shapes world on all devices."""
    given = ["--train", "--gpu", args.gpu, "--prompt", "a red cube", f"exp_root_dir={args.out / 'trials'}"]
    size = ["data.single_view.n_test_views=2", f"trainer.max_steps={steps}", "trainer.val_check_interval=0"]
    size += ["use_timestamp=true", f"tag={name}"]
    return [sys.executable, "launch.py", "--config", "configs/shapes_stage_1.yaml", *given, *size]


def end_of_a_rank(args: argparse.Namespace) -> None:
    """Kill the second process of a run while it trains, and wait for the end of the first."""
    file = args.out / "dies.log"
    with open(file, "wb") as log:
        command = training(args, "dies", steps=100_000)
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 150
        while b"writing to" not in file.read_bytes() and time.monotonic() < until:
            time.sleep(1)
        time.sleep(15)
        second = min(children(run.pid))
        os.kill(second, signal.SIGKILL)
        began = time.perf_counter()
        status = run.wait(120)
        print(f"the run ended {time.perf_counter() - began:.1f} s after its second process, status {status}")
    finally:
        end_session(run)
        print(file.read_text(encoding="utf-8", errors="replace")[-2000:], flush=True)


def children(parent: int) -> list[int]:
    """Processes that ``parent`` has started."""
    stats = (file.read_text(encoding="utf-8").rpartition(")") for file in Path("/proc").glob("[0-9]*/stat"))
    return [int(pid.split()[0]) for pid, _, rest in stats if int(rest.split()[1]) == parent]


# -- one of the processes that measure ----------------------------------------------------------


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all phases on this rank; the first one prints and writes them down."""
    if not args.compile:
        acceleration.LARGE = 1 << 62
    if local_rank() == 0:
        needed_models(args)  # the others wait
        torch.cuda.empty_cache()
    with as_ranks(select_devices(args.gpu if args.gpu.startswith("cpu") else None), args.minutes) as device:
        return measure(args, device)


def measure(args: argparse.Namespace, device: str) -> dict[str, Any]:
    us, began = ranks(), time.perf_counter()
    experiment = load(args)
    system = experiment.build_system().to(device)
    system.prepare(torch.device(device), resumed=False)
    state = {name: value.clone() for name, value in system.state_dict().items()}
    say(f"{us.count} ranks, {where(device)}; loaded in {time.perf_counter() - began:.0f} s")
    found: dict[str, Any] = {"where": where(device), "config": args.config, "ranks": us.count, "phases": {}}
    reference: dict[str, dict[str, Tensor]] = {}
    for phase in PHASES:
        alone = phase != PHASES[-1]
        if not alone or us.is_first:
            system.load_state_dict(state)
            system.audit.norms.clear()  # type: ignore[union-attr,operator]  # of first steps, on all ranks
            watch = Watch(experiment, args, phase, reference)
            with together(ALONE if alone else us):
                train(experiment, system, watch, device)
            found["phases"][phase] = watch.found
        of_first_rank(None)  # all wait here
    if us.is_first:
        print(report(found), flush=True)
        file = args.out / f"{args.config}-ranks.json"
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def load(args: argparse.Namespace) -> Experiment:
    files, given = [ROOT / "configs" / f"{args.config}.yaml"], settings(args.config, args)
    return load_experiment(files, [*given, *STATES["ball"], *args.overrides])


def needed_models(args: argparse.Namespace) -> None:
    experiment = load(args)
    needed = {Path(name).name for kind in experiment.plan.kinds for name in models_of(kind)}
    if args.toy:
        make_tiny_models(args.models)
    else:
        make_models(args.models, [name for name in MODELS if name in needed])


def train(experiment: Experiment, system: System, watch: Watch, device: str) -> None:
    data = experiment.build_data()
    data.train_dataloader = lambda start, parts=1: DataLoader(  # type: ignore
        Batches(experiment, watch, parts),  # type: ignore[arg-type]
        batch_size=None,
    )
    cfg = replace(experiment.cfg.trainer, max_steps=watch.total, val_check_interval=0)
    optimizer = system.configure_optimizer()
    run = Run(
        system=system,
        data=data,
        folder=experiment.trial_dir,
        label="ranks",
        max_steps=watch.total,
        optimizer=optimizer,
    )
    Trainer(cfg, run, {"watch": watch}, device=device).fit(None)


class Watch(Timer):
    """Times each kind of step, then its parts, and compares its last gradients; keeps the scene as it is."""

    def __init__(
        self,
        experiment: Experiment,
        args: argparse.Namespace,
        phase: str,
        reference: dict[str, dict[str, Tensor]],
    ) -> None:
        super().__init__(experiment, args)
        self.phase, self.reference = phase, reference
        self.in_parts = min(8, args.steps)
        self.found: dict[str, dict[str, Any]] = {}

    def stretches(self, block: Block) -> list[tuple[int, int]]:
        """(first global step, number of steps): warmed up and timed, in parts."""
        return [*super().stretches(block), (block.start, self.in_parts)]

    def _go_on(self, run: Run, block: Block, found: dict[str, Any]) -> Iterator[None]:
        found["difference"] = self._difference(block, run.system)
        with PartTimes().watch(run.system) as parts, timed_sums(parts):
            for _ in range(self.in_parts):
                yield
                parts.end_step()
        found["parts_ms"] = {name: 1000 * s / self.in_parts for name, s in parts.seconds.items()}
        self.found[block.name] = found
        say(f"{self.phase}, {block.name}: {found['median']:.1f} ms, {found['peak_gib']:.1f} GiB at most")

    def _difference(self, block: Block, system: System) -> dict[str, float]:
        """Norm of the difference from the gradients of the first phase, relative to theirs, by part."""
        grads = {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}
        if self.phase == PHASES[0]:
            self.reference[block.name] = grads
        before, squares = self.reference.get(block.name, {}), defaultdict(lambda: [0.0, 0.0])
        for name, grad in before.items():
            there = grads.get(name, torch.zeros_like(grad))
            for part in ("all", "LoRA" if ".lora." in name or "camera_embedding" in name else "scene"):
                squares[part][0] += float((there - grad).double().square().sum())
                squares[part][1] += float(grad.double().square().sum())
        missing = grads.keys() ^ before.keys() if before else ()
        if missing:
            say(f"{self.phase}, {block.name}: gradients of other parameters: {sorted(missing)[:4]}")
        return {part: (over / max(under, 1e-300)) ** 0.5 for part, (over, under) in squares.items()}


@contextmanager
def timed_sums(parts: PartTimes) -> Iterator[None]:
    """Count the sums over ranks as a part of their own."""
    original: Callable[..., Any] = dist.all_reduce

    def timed(*args: Any, **keywords: Any) -> Any:
        parts._change(lambda: parts._stack.append("ranks"))
        try:
            return original(*args, **keywords)
        finally:
            parts._change(parts._stack.pop)

    dist.all_reduce = timed
    try:
        yield
    finally:
        dist.all_reduce = original


def report(found: dict[str, Any]) -> str:
    """Two tables in Markdown: times with differences of gradients, and parts of the mean step."""
    one, again, many = (found["phases"].get(phase, {}) for phase in PHASES)
    n = found["ranks"]
    columns = ("step", "1 GPU, ms", f"{n} GPUs, ms", "times faster", "peak GiB, 1", f"peak GiB, {n}")
    lines = [head(*columns, "gradients: 1 GPU again", f"{n} GPUs")]
    parts = [head("step", "GPUs", *PARTS, "ranks")]
    for name, alone in one.items():
        if name not in many:
            continue
        spread = many[name]
        cells = [name, *(f"{b['median']:.1f} ({b['min']:.1f} to {b['max']:.1f})" for b in (alone, spread))]
        cells += [f"{alone['median'] / spread['median']:.2f}"]
        cells += [f"{b['peak_gib']:.1f}" for b in (alone, spread)]
        cells += [shown(b.get(name, {}).get("difference", {})) for b in (again, many)]
        lines.append(row(cells))
        for count, block in ((1, alone), (n, spread)):
            times = (block["parts_ms"].get(part, 0.0) for part in (*PARTS, "ranks"))
            parts.append(row([name, count, *(f"{ms:.1f}" for ms in times)]))
    return "\n".join([found["where"], "", *lines, "", *parts])


def shown(difference: dict[str, float]) -> str:
    return ", ".join(f"{part} {value:.1e}" for part, value in difference.items()) or "-"


def say(text: str) -> None:
    """Print at once, on the first rank."""
    if ranks().is_first:
        print(text, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", help="the name of an experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu", default="0,1", help="the devices, as of launch.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results in JSON")
    parser.add_argument("--steps", type=int, default=16, help="that are timed, of each kind")
    parser.add_argument("--warm-up", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=6, help="after which the measurement is given up")
    parser.add_argument("--compile", action="store_true", help="compile large networks too")
    parts = ("steps", "launch.py", "a rank dies")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parse_with_models(parser, argv)
    if args.toy:
        args.steps, args.warm_up = 2, 1
    return args


if __name__ == "__main__":
    main()
