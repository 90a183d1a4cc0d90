"""What the viewer costs a training: the same steps without it, and with visitors who look or move.

    python benchmarks/viewer.py --steps 60               # minutes on a CPU; needs viser

The steps are the same, bit for bit. On a CPU, times are those of the process, all threads together, which
other programs disturb less than the wall clock; on a GPU, of the wall clock. The cases take turns
(``--rounds``), for a machine may drift. "of its own" is the share that the viewer itself counts, as its page
shows it.
The visitor's images are encoded and put into the page's queue, but no browser draws them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timing import head, now_ms, row, where

import fourdfy
from fourdfy.callbacks.base import Callback, Run
from fourdfy.files.images import Pixels
from fourdfy.viewing.page import ViserPage
from fourdfy.viewing.settings import ViewerConfig
from fourdfy.viewing.viewer import Viewer
from fourdfy.viewing.views import Eye

PROMPT = "a red cube bouncing"
CASES = {
    "without": None,
    "nobody looks on": 0.1,
    "one at rest": 0.1,
    "one who moves": 0.1,
    "one who moves, budget 0.5": 0.5,
}
"""Name -> budget."""


class Visited(ViserPage):
    """A page with a visitor in place of a browser."""

    images, moves, is_visited = 0, False, True

    def eyes(self) -> dict[int, Eye]:
        angle = 0.1 * (time.perf_counter() % 100) if self.moves else 0.0
        return {0: replace(self.eye, fovy_deg=40 + angle)} if self.is_visited else {}

    def show(self, client: int, image: Pixels) -> None:
        self.server.scene.set_background_image(image, format="jpeg", jpeg_quality=90)
        self.images += 1


class Times(Callback):
    """ms of each step, of all that happens in it."""

    def __init__(self) -> None:
        self.ms: list[float] = []

    def begin(self, run: Run) -> None:
        self._at = self._now()

    def after_step(self, run: Run, *args: Any) -> None:
        now = self._now()
        self.ms.append(now - self._at)
        self._at = now

    def _now(self) -> float:
        return now_ms() if torch.cuda.is_available() else 1000 * time.process_time()


@dataclass
class Cost:
    """Of a case, all rounds together."""

    ms: list[float] = field(default_factory=list)
    images: int = 0
    shares: list[float] = field(default_factory=list)


def measure(name: str, budget: float | None, args: argparse.Namespace, cost: Cost) -> None:
    pages: list[Visited] = []

    def open_page(cfg: ViewerConfig, scenery: Any) -> Visited:
        page = Visited(cfg.host, cfg.port, scenery)
        page.eye, page.moves, page.is_visited = scenery.eye, "moves" in name, "nobody" not in name
        pages.append(page)
        return page

    times = Times()
    cfg = ViewerConfig(port=0, budget=budget or 1.0)
    viewers = [] if budget is None else [Viewer(cfg, lambda run: [], open_page=open_page)]
    with tempfile.TemporaryDirectory() as folder:
        fourdfy.train(
            args.config,
            [
                f"exp_root_dir={folder}",
                f"trainer.max_steps={args.steps}",
                "trainer.val_check_interval=0",
                *args.overrides,
            ],
            prompt=PROMPT,
            callbacks=[*viewers, times],
            test=False,
        )
    cost.ms += times.ms[args.warm_up :]
    cost.images += sum(page.images for page in pages)
    cost.shares += [viewer.budget.taken for viewer in viewers]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What the viewer costs a training.")
    parser.add_argument("--config", default="shapes_stage_3")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=10, help="first steps that are not counted")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    print(f"{where('cuda' if torch.cuda.is_available() else 'cpu')}\n")
    costs = {name: Cost() for name in CASES}
    for _ in range(args.rounds):
        for name, budget in CASES.items():
            measure(name, budget, args, costs[name])
    print(head("viewer", "ms per step", "to without", "of its own", "images per 100 steps"))
    plain = statistics.mean(costs["without"].ms)
    for name, cost in costs.items():
        ms, images = statistics.mean(cost.ms), 100 * cost.images / (args.rounds * args.steps)
        share = f"{statistics.mean(cost.shares):.3f}" if cost.shares else ""
        print(row([name, f"{ms:.1f}", f"{ms / plain:.3f}", share, f"{images:.0f}"]), flush=True)


if __name__ == "__main__":
    main()
