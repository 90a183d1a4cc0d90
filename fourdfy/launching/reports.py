"""Writing of ``report.html``, with the times and versions in it."""

from __future__ import annotations

import platform
import time
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from fourdfy.callbacks.base import Callback, Run
from fourdfy.devices import device_name, peak_memory
from fourdfy.evaluation.registry import directions
from fourdfy.files.atomic import by_product, write_whole
from fourdfy.launching.experiment import Experiment
from fourdfy.launching.plan import stage_lines
from fourdfy.launching.recipe import settings
from fourdfy.ops.ranks import ranks
from fourdfy.pages.report import Stage, report_page
from fourdfy.pages.trials import Session, add_session, sessions
from fourdfy.systems.base import System

REPORT = "report.html"
PACKAGES = ("fourdfy", "torch", "pytorch-lightning", "diffusers", "transformers", "numpy", "triton")


def write_report(experiment: Experiment, system: System) -> None:
    """Write it anew from what the trial's folder holds; that it can't be written costs a warning.

    Args:
        system: at its last step.
    """
    cfg = experiment.cfg
    with by_product(REPORT):
        views = experiment.build_data().val_cameras(experiment.plan.dynamic).get("val")
        stage = Stage(
            folder=experiment.trial_dir,
            prompt=cfg.system.prompt or cfg.name,
            label=cfg.name,
            steps=(system.step, cfg.trainer.max_steps),
            plan=[*stage_lines(experiment, system)],
            settings=settings(experiment.values),
            view_width=views.width if views else None,
            better=directions(),
        )
        write_whole(experiment.trial_dir / REPORT, report_page(stage))


def make_up_for_report(experiment: Experiment, device: str) -> None:
    """Write the report of a finished trial that lacks it, as after a kill, or from an earlier version."""
    if not (experiment.trial_dir / REPORT).exists():
        write_report(experiment, experiment.load_system(device, experiment.last_checkpoint))


class Reports(Callback):
    """Notes what this process does for a trial, and writes the report: when training ends, for whatever
    reason, and when the test views are rendered.

    Args:
        device: as ``select_device`` gives it.
    """

    def __init__(self, experiment: Experiment, device: str) -> None:
        self.experiment, self.device = experiment, device
        self._began: float | None = None
        self._session: Session | None = None

    def begin(self, run: Run) -> None:
        self._began, self._first, self._earlier = time.monotonic(), run.step, sessions(run.folder)

    def end(self, run: Run, error: BaseException | None) -> None:
        if self._began is None or self._session is not None:  # an error before training, or of the test views
            return
        self._ended = time.monotonic()
        self._session = Session(
            first=self._first,
            last=run.step,
            seconds=self._ended - self._began,
            memory_gib=peak_memory() / 2**30,
            device=(f"{count} x " if (count := ranks().count) > 1 else "") + device_name(self.device),
            versions=versions(),
        )
        self._write(run)

    def after_test(self, run: Run) -> None:
        if self._session is not None:
            self._session = replace(self._session, test_seconds=time.monotonic() - self._ended)
        self._write(run)

    def _write(self, run: Run) -> None:
        if self._session is not None:
            with by_product("the times of the run"):
                add_session(run.folder, self._earlier, self._session)
        write_report(self.experiment, run.system)


def versions() -> dict[str, str]:
    """Of Python and of the packages that computed, as far as they are installed."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
