"""The viewer: shows a scene on a page, between the steps of its training or by itself.

Everything that touches the scene or a GPU happens on the thread that trains; the page's own threads only
note what its widgets say.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourdfy.callbacks.base import Callback, Run
from fourdfy.config import ConfigError
from fourdfy.seeds import generator_states, set_generator_states
from fourdfy.systems.base import System
from fourdfy.systems.checkpoint import LAST
from fourdfy.types import StepBatch
from fourdfy.viewing.controls import Page, Scenery
from fourdfy.viewing.look import Look
from fourdfy.viewing.pace import SAVED_SECONDS, Budget, Refinement
from fourdfy.viewing.progress import Progress
from fourdfy.viewing.settings import ViewerConfig
from fourdfy.viewing.views import Eye, Truth, picture

logger = logging.getLogger(__name__)

PANEL_SECONDS = 1.0
"""Between two updates of the panels."""
TICK_SECONDS = 0.02
"""Between two looks at the widgets while nothing is trained."""
SLIDER_SECONDS = 0.2
"""Between two moves of the time slider while the clip plays."""
ALONE_SECONDS = 30.0
"""After which a paused run goes on if no page is connected."""


class Viewer(Callback):
    """Shows a scene while it is trained, within a share of the time; training is the same without it.

    Args:
        export: writes the scene's files into the trial, and names them.
        truth: the ground truth of the prompt, if there is one.
        longest_pause: seconds after which a paused run goes on.
        open_page: makes the page.

    Raises:
        ConfigError: the package for the page is missing.
    """

    def __init__(
        self,
        cfg: ViewerConfig,
        export: Callable[[Run], Sequence[Path]],
        *,
        truth: Truth | None = None,
        longest_pause: float = math.inf,
        open_page: Callable[[ViewerConfig, Scenery], Page] | None = None,
    ) -> None:
        self.settings, self.export, self.truth, self.longest_pause = cfg, export, truth, longest_pause
        self.open_page = open_page or find_page()
        self.page: Page | None = None
        """None before the training, after it, and once something has failed."""

    # -- hooks of a training --------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        with self._guarded():
            self.open(run)

    def after_step(self, run: Run, batch: StepBatch, *args: Any) -> None:
        if self.page is None:
            return
        with self._guarded():
            self._show_looks(run, batch.kind)
            if self._are_panels_due():
                with self.budget.spending():
                    self.progress.look(run, batch.kind)
                    self.page.tell(self.progress, run, self.budget.taken)
            self.fulfil(run)
            self.serve(run, self.budget.room)
            if self.page.controls.paused:
                self._wait(run)

    def after_frames(self, run: Run, *args: Any, done: int, total: int) -> None:
        if self.page is not None:  # a validation takes long
            with self._guarded():
                self.serve(run, self.budget.room)

    def end(self, run: Run, error: BaseException | None) -> None:
        with self._guarded():
            self.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever fails inside costs a warning and the viewer, and nothing else."""
        try:
            yield
        except Exception as error:
            page, self.page = self.page, None
            logger.warning("the viewer is off from here on: %s", _brief(error))
            with suppress(Exception):
                self._forget_looks()
                if page is not None:
                    page.close()

    # -- showing --------------------------------------------------------------------------------

    def open(self, run: Run) -> None:
        is_training, dynamic = run.optimizer is not None, not run.data.cfg.static
        first = next(iter(run.data.val_cameras(dynamic).values()))
        scenery = Scenery(
            label=run.label,
            prompt=run.system.cfg.prompt,
            step=run.step,
            dynamic=dynamic,
            has_truth=self.truth is not None,
            eye=Eye(_nested(first.c2w[0]), float(first.fovy_deg[0]), first.width / first.height),
            kinds=tuple(run.system.guidances()) if is_training else (),
        )
        self.dynamic, self.budget, self.progress = dynamic, Budget(self.settings.budget), Progress(run)
        self._refinements: dict[int, Refinement] = {}
        self._looks: dict[str, Look] = {}
        self._told_at = self._moved_at = -math.inf
        self.page = self.open_page(self.settings, scenery)

    def close(self) -> None:
        page, self.page = self.page, None
        if page is not None:
            self._forget_looks()
            page.close()

    def serve(self, run: Run, room: float, most: float = SAVED_SECONDS) -> None:
        """Show every client what its camera sees now.

        Args:
            room: seconds that images may take.
            most: seconds that one of them may take, at rest.
        """
        page = self.page
        assert page is not None, "open comes first"
        eyes, controls = page.eyes(), page.controls
        moment = controls.playback.now() if self.dynamic else 0.0
        known = self._refinements
        self._refinements = {client: known.get(client) or Refinement(self.settings.size) for client in eyes}
        # Who has waited longest comes first.
        for client, refinement in sorted(self._refinements.items(), key=lambda item: item[1].shown_at):
            seen, began = (eyes[client], moment, controls.view, controls.beside_truth), time.perf_counter()
            size = refinement.next_size(seen, run.step, began, room, most)
            if size is None:
                continue
            with self.budget.spending(), untouched(run.system):
                truth = self._truth_on(run.system.device) if controls.beside_truth else None
                image = picture(controls.view, run.system.render, eyes[client], moment, size, truth)
                page.show(client, image)
            seconds = time.perf_counter() - began
            refinement.shown(run.step, size, seconds, began + seconds)
            room -= seconds
        if controls.playback.is_playing and time.perf_counter() - self._moved_at > SLIDER_SECONDS:
            self._moved_at = time.perf_counter()
            page.show_time(moment)

    def _truth_on(self, device: torch.device) -> Truth | None:
        truth = self.truth
        return None if truth is None else lambda cameras: truth(cameras.to(device))

    def _are_panels_due(self) -> bool:
        now = time.perf_counter()
        if now - self._told_at < PANEL_SECONDS or self.budget.room < 0:
            return False
        self._told_at = now
        return True

    # -- what is asked for ----------------------------------------------------------------------

    def fulfil(self, run: Run) -> None:
        """Do what was asked for, unless the run is to stop: save, export, look at a prior.

        A failure is told to those who look on.
        """
        assert self.page is not None, "open comes first"
        requests = self.page.controls.requests
        while requests and not (run.stopping or run.is_asked_to_stop()):
            self._fulfil(run, requests[0])
            requests.popleft()  # only now, so that a click meanwhile asks for nothing new

    def _fulfil(self, run: Run, request: tuple[str, ...]) -> None:
        what, *kinds = request
        try:
            with untouched(run.system):
                if what == "save":
                    run.save(run.folder / LAST)
                    self._tell(f"step {run.step} saved: {LAST}")
                elif what == "export":
                    self._tell(f"step {run.step}: exporting ...")
                    names = [str(file.relative_to(run.folder)) for file in self.export(run)]
                    self._tell(f"step {run.step} exported: {', '.join(names)}")
                elif kinds[0] not in self._looks:
                    self._looks[kinds[0]] = Look(run.system.guidances()[kinds[0]])
        except Exception as error:
            self._tell_failure(what, error)

    def _show_looks(self, run: Run, kind: str) -> None:
        look = self._looks.get(kind)
        if look is None or not look.is_done:
            return
        self._looks.pop(kind).close()
        assert self.page is not None
        try:
            with untouched(run.system):
                self.page.show_look(kind, look.images())
        except Exception as error:
            self._tell_failure(f"look at {kind}", error)

    def _forget_looks(self) -> None:
        for look in self._looks.values():
            look.close()
        self._looks.clear()

    def _tell_failure(self, what: str, error: Exception) -> None:
        self._tell(f"{what} failed: {_brief(error)}", logging.WARNING)

    def _tell(self, text: str, level: int = logging.INFO) -> None:
        logger.log(level, "viewer: %s", text)
        if self.page is not None:
            self.page.notify(text)

    def _wait(self, run: Run) -> None:
        """Until the run is resumed in the page, asked to stop, or left alone."""
        page = self.page
        assert page is not None
        began = seen = time.perf_counter()
        logger.info("step %d: paused in the viewer", run.step)
        page.tell(self.progress, run, self.budget.taken)
        with self.budget.waiting():
            while page.controls.paused:
                self.fulfil(run)
                self.serve(run, math.inf, math.inf)
                now = time.perf_counter()
                seen = now if page.eyes() else seen
                if run.is_asked_to_stop():
                    run.stop()
                if run.stopping or now - seen > ALONE_SECONDS or now - began > self.longest_pause:
                    page.controls.paused = False
                time.sleep(TICK_SECONDS)
        page.show_paused()
        self.progress.waited(time.perf_counter() - began)
        logger.info("step %d: resumed", run.step)


def show_scene(viewer: Viewer, run: Run) -> None:
    """Show a finished scene until the run is asked to stop."""
    viewer.open(run)
    try:
        while not run.is_asked_to_stop():
            viewer.fulfil(run)
            viewer.serve(run, math.inf, math.inf)
            time.sleep(TICK_SECONDS)
    finally:
        viewer.close()


def find_page() -> Callable[[ViewerConfig, Scenery], Page]:
    """What opens the page, on which nothing of ours depends otherwise."""
    try:
        from fourdfy.viewing.page import open_page
    except ImportError as error:
        raise ConfigError(
            f"the viewer needs the package viser ({error}): pip install 'viser>=1.1' (the extra 'viewer')"
        ) from error
    return open_page


@contextmanager
def untouched(system: System) -> Iterator[None]:
    """Whatever is drawn inside, and in which mode: afterwards the generators and modules are as before."""
    states = generator_states(system.device)
    training = [module for module in system.modules() if module.training]
    system.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        set_generator_states(states, system.device)


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _nested(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
