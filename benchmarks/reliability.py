"""Plant faults in small runs on the CPU, and count what comes of them (docs/reliability.md).

    nice python benchmarks/reliability.py --out outputs/reliability            # all; 20 minutes of one core
    python benchmarks/reliability.py --out outputs/reliability --only kills=20 --only races=100 --seed 1

Writes ``reliability.json`` and ``reliability.md``. The exit status is 1 if anything was lost or told wrongly.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from faults.encoders import encoders
from faults.files import flipped_bits, full_disks, harmed_files, small_files
from faults.kills import POLITE, kills, other_modes, starts
from faults.races import races
from faults.runs import Undisturbed, undisturbed
from faults.sweeps import RAY, sweeps
from faults.table import Row, markdown

FAULTS: dict[str, tuple[Callable[[int, int, Path, Undisturbed], Iterator[Row]], int]] = {
    "kills": (kills, 480),
    "starts": (starts, 24),
    "modes": (other_modes, 24),
    "files": (harmed_files, 24),
    "bits": (flipped_bits, 400),
    "disks": (full_disks, 16),
    "limits": (small_files, 8),
    "encoders": (encoders, 10),
    "races": (races, 100),
    "sweeps": (sweeps, 10),
    "ray": (partial(sweeps, runner=RAY), 10),
}
"""Kinds of fault -> the function that plants them, and how many."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--config", default="shapes", help="an experiment or recipe of the shapes world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", action="append", default=[], metavar="KIND=COUNT", help=f"one of {', '.join(FAULTS)}"
    )
    args = parser.parse_args(argv)
    counts = {name: int(count) for name, count in (word.split("=") for word in args.only)}
    out: Path = args.out.absolute()
    (out / "undisturbed").mkdir(parents=True)
    for name in POLITE:  # shells have processes in the background ignore some, and so would all runs
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    torch.set_num_threads(1)  # a process with threads could not be forked
    reference = undisturbed(out / "undisturbed", args.config)
    rows: list[Row] = []
    for name, (plant, count) in FAULTS.items():
        if counts and name not in counts:
            continue
        folder, began = out / name, time.monotonic()
        folder.mkdir()
        once_more = f"python benchmarks/reliability.py --out DIR --only {name}={counts.get(name, count)}"
        for row in plant(counts.get(name, count), args.seed, folder, reference):
            if not any(row is other for other in rows):
                row.command = once_more
                rows.append(row)
            found = [vars(row) | {"times": row.times, "seed": args.seed} for row in rows]
            (out / "reliability.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
            (out / "reliability.md").write_text(markdown(rows) + "\n", encoding="utf-8")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    for row in rows:
        for entry in row.wrong:
            print(f"{row.fault}: {entry}")
    print(markdown(rows))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
