"""The page of the viewer, by viser: widgets that write ``Controls``, and what is shown. Nothing is computed
here, and nothing but this file knows viser."""

from __future__ import annotations

import io
import ipaddress
import logging
import socket
from collections.abc import Mapping
from contextlib import closing, redirect_stdout, suppress
from typing import Any

import numpy as np
import viser
from viser.transforms import SO3

from fourdfy.callbacks.base import Run
from fourdfy.config import ConfigError
from fourdfy.files.images import Pixels
from fourdfy.viewing.controls import Controls, Scenery
from fourdfy.viewing.progress import Chart, Progress
from fourdfy.viewing.settings import ViewerConfig
from fourdfy.viewing.views import VIEWS, Eye

logger = logging.getLogger(__name__)

PORTS_TRIED = 100
COLOURS = ("#4c78d0", "#d9822b", "#3a9a5b", "#b04a8f", "#8a6d3b", "#5aa8b0")
"""Of the kinds of step in charts."""
TITLES = {"loss": "loss (weighted sum)", "gradient": "gradient norm at the latents"}
SHOWN_SECONDS = 10.0
"""How long a notification stays."""
SMALL = 128
"""Pixels up to which an image is sent without loss."""
FLIP = np.diag([1.0, -1.0, -1.0])
"""From viser's camera axes (right, down, forward) to ours (right, up, backward)."""


def open_page(cfg: ViewerConfig, scenery: Scenery) -> ViserPage:
    """Serve the page, and say where.

    Raises:
        ConfigError: the host's ports can't be bound.
    """
    page = ViserPage(cfg.host, free_port(cfg.host, cfg.port), scenery)
    logger.info("viewer: http://%s:%d", f"[{cfg.host}]" if ":" in cfg.host else cfg.host, page.port)
    if not is_loopback(cfg.host):
        logger.warning(
            "viewer.host=%s: everyone who can reach this address can pause the run, save and export; "
            "viewer.host=127.0.0.1 is for this machine alone",
            cfg.host,
        )
    return page


def free_port(host: str, first: int) -> int:
    """The first port from ``first`` on that can be bound; for 0, any.

    viser itself would wait for ever if there were none.
    """
    problem, family = "", socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(first, min(first + PORTS_TRIED, 65536)):
        try:
            with closing(socket.create_server((host, port), family=family)) as server:
                return server.getsockname()[1]
        except OSError as error:
            problem = (error.strerror or str(error)).partition(" (")[0]
    raise ConfigError(
        f"viewer.host={host}, viewer.port={first}: {problem}; use 127.0.0.1 or another address of this "
        "machine, and a port above 1023"
    )


def is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class ViserPage:
    """See ``controls.Page``."""

    def __init__(self, host: str, port: int, scenery: Scenery) -> None:
        self.controls = Controls()
        with redirect_stdout(io.StringIO()):  # it says where it is by itself
            self.server = viser.ViserServer(host=host, port=port, label="fourdfy", verbose=False)
        # A client could ask for it: a tunnel through viser's own servers, open to everybody.
        self.server.request_share_url = lambda verbose=True: None
        self.port = self.server.get_port()
        gui = self.server.gui
        gui.main_panel.dock_right()
        gui.configure_theme(show_logo=False, show_share_button=False, control_width="large")
        self._place_camera(scenery.eye)
        with gui.add_folder(scenery.label):
            if scenery.prompt:
                gui.add_text("Prompt", scenery.prompt, disabled=True)
            self._status = gui.add_markdown(f"at step **{scenery.step}**")
            self._add_actions(is_training=bool(scenery.kinds))
        tabs = gui.add_tab_group()
        with tabs.add_tab("View"):
            self._add_view(scenery)
        if scenery.kinds:
            with tabs.add_tab("Training"):
                self._charts = {name: _add_chart(gui, name) for name in TITLES}
                self._losses, self._groups = gui.add_markdown(""), gui.add_markdown("")
            with tabs.add_tab("Priors"):
                self._add_looks(scenery.kinds)

    def _place_camera(self, eye: Eye) -> None:
        camera = self.server.initial_camera
        camera.position = np.array([row[3] for row in eye.c2w[:3]])
        camera.look_at = np.zeros(3)
        camera.fov = np.deg2rad(eye.fovy_deg)

    # -- widgets --------------------------------------------------------------------------------

    def _add_actions(self, *, is_training: bool) -> None:
        gui, controls = self.server.gui, self.controls
        if is_training:
            pause = gui.add_button("Pause", icon=viser.Icon.PLAYER_PAUSE)
            save = gui.add_button("Save a checkpoint", icon=viser.Icon.DEVICE_FLOPPY)

            @pause.on_click
            def _(event: Any) -> None:
                controls.paused = not controls.paused
                self.show_paused()

            save.on_click(lambda event: controls.ask("save"))
            self._pause = pause
        export = gui.add_button("Export", icon=viser.Icon.PACKAGE_EXPORT)
        export.on_click(lambda event: controls.ask("export"))

    def _add_view(self, scenery: Scenery) -> None:
        gui, controls = self.server.gui, self.controls
        views = [view for view in VIEWS if scenery.dynamic or view != "motion"]
        view = gui.add_dropdown("View", views)
        view.on_update(lambda event: setattr(controls, "view", view.value))
        if scenery.has_truth:
            truth = gui.add_checkbox("Ground truth beside it", False)
            truth.on_update(lambda event: setattr(controls, "beside_truth", truth.value))
        if not scenery.dynamic:
            return
        playback = controls.playback
        self._time = gui.add_slider("Time", 0.0, 1.0, 0.005, 0.0)
        play = gui.add_checkbox("Play", False)
        speed = gui.add_slider("Speed", 0.1, 4.0, 0.1, 1.0)
        ping_pong = gui.add_checkbox("Ping-pong", False, hint="back and forth instead of in a loop")

        @self._time.on_update
        def _(event: Any) -> None:
            if event.client is not None:  # else the clip plays
                playback.seek(self._time.value)

        play.on_update(lambda event: setattr(playback, "is_playing", play.value))
        speed.on_update(lambda event: setattr(playback, "speed", speed.value))
        ping_pong.on_update(lambda event: setattr(playback, "ping_pong", ping_pong.value))

    def _add_looks(self, kinds: tuple[str, ...]) -> None:
        gui = self.server.gui
        self._looks: dict[str, tuple[Any, list[Any]]] = {}
        gui.add_markdown("The prior decodes what it sees in the next step of a kind, once for each click.")
        for kind in kinds:
            button = gui.add_button(f"Look at {kind}", icon=viser.Icon.EYE)
            button.on_click(lambda event, kind=kind: self.controls.ask("look", kind))
            self._looks[kind] = gui.add_folder(kind, visible=False), []

    # -- what is shown --------------------------------------------------------------------------

    def eyes(self) -> Mapping[int, Eye]:
        return {client: _eye(handle.camera) for client, handle in self.server.get_clients().items()}

    def show(self, client: int, image: Pixels) -> None:
        handle = self.server.get_clients().get(client)
        if handle is not None:
            # JPEG halves the resolution of colours, which shows where one pixel covers many of the screen.
            kind = "png" if max(image.shape) <= SMALL else "jpeg"
            handle.scene.set_background_image(image, format=kind, jpeg_quality=90)

    def show_time(self, moment: float) -> None:
        self._time.value = moment

    def show_paused(self) -> None:
        paused = self.controls.paused
        self._pause.label = "Resume" if paused else "Pause"
        self._pause.icon = viser.Icon.PLAYER_PLAY if paused else viser.Icon.PLAYER_PAUSE

    def tell(self, progress: Progress, run: Run, taken: float) -> None:
        paused = "**Paused.** " if self.controls.paused else ""
        with self.server.atomic():
            self._status.content = paused + progress.status(run, taken)
            self._losses.content, self._groups.content = progress.losses(), progress.groups(run)
            for name, chart in progress.charts.items():
                _fill(self._charts[name], chart)

    def show_look(self, kind: str, images: Mapping[str, Pixels]) -> None:
        folder, shown = self._looks[kind]
        while shown:
            shown.pop().remove()
        folder.visible = True
        with folder:
            for name, row in images.items():
                shown.append(self.server.gui.add_image(row, label=name, format="png"))

    def notify(self, text: str) -> None:
        for client in self.server.get_clients().values():
            client.add_notification("fourdfy", text, auto_close_seconds=SHOWN_SECONDS)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.server.stop()


def _eye(camera: Any) -> Eye:
    c2w = np.eye(4)
    c2w[:3, :3], c2w[:3, 3] = SO3(np.asarray(camera.wxyz)).as_matrix() @ FLIP, camera.position
    nested = tuple(tuple(row) for row in c2w.tolist())
    return Eye(nested, float(np.rad2deg(camera.fov)), float(camera.aspect))


def _add_chart(gui: Any, name: str) -> Any:
    empty = (np.zeros(1), np.full(1, np.nan))
    return gui.add_uplot(empty, ({}, {}), title=TITLES[name], aspect=2.0, scales={"x": {"time": False}})


def _fill(handle: Any, chart: Chart) -> None:
    """Draw the curves; kinds of step may have been added since the last time."""
    kinds = [*chart.curves]
    if not kinds:
        return
    lines = [
        {"label": kind, "stroke": COLOURS[number % len(COLOURS)], "width": 2}
        for number, kind in enumerate(kinds)
    ]
    handle.series = ({"label": "step"}, *lines)
    handle.data = tuple(np.array(points, dtype=float) for points in (chart.steps, *chart.curves.values()))
