"""The page itself, by viser, in a headless browser."""

import io
import logging
import math
import socket
from contextlib import redirect_stdout

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("viser")

from fourdfy.config import ConfigError
from fourdfy.viewing.page import free_port, is_loopback
from fourdfy.viewing.settings import ViewerConfig
from fourdfy.viewing.viewer import Viewer
from tests.browser import Browser, wait_for
from tests.screenshots import needs_browser
from tests.viewing.scenes import OneCamera, run_of_a_ball


def no_export(run):
    raise NotImplementedError


@pytest.fixture
def viewer(tmp_path):
    viewer = Viewer(ViewerConfig(port=0, size=128), no_export)
    viewer.open(run_of_a_ball(tmp_path))
    yield viewer
    viewer.close()


@needs_browser
def test_the_scene_is_seen_from_where_the_mouse_leads_and_the_buttons_work(viewer, tmp_path):
    run, page = run_of_a_ball(tmp_path), viewer.page

    def serve_until(condition):
        def is_so():
            viewer.serve(run, math.inf, math.inf)
            return condition()

        return wait_for(is_so)

    with Browser(tmp_path / "profile") as browser:

        def middle():
            image = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
            return np.asarray(image)[300:310, 440:450].mean((0, 1))

        browser.open(f"http://127.0.0.1:{page.port}")
        serve_until(lambda: page.eyes())
        serve_until(lambda: np.allclose(middle(), [255, 0, 0], atol=20))
        first = next(iter(page.eyes().values()))
        assert np.allclose(first.c2w, OneCamera().camera.c2w[0], atol=1e-3)
        assert first.fovy_deg == pytest.approx(40)

        browser.drag((440, 300), (300, 300))
        serve_until(lambda: next(iter(page.eyes().values())) != first)

        browser.click("Pause")
        wait_for(lambda: page.controls.paused)
        browser.click("Resume")
        wait_for(lambda: not page.controls.paused)
        for button, request in (("Save a checkpoint", "save"), ("Export", "export")):
            browser.click(button)
            wait_for(lambda: page.controls.requests)
            assert page.controls.requests.pop() == (request,)

        page.controls.playback.seek(1.0)
        serve_until(lambda: np.allclose(middle(), [0, 255, 0], atol=20))

        viewer.progress.look(run, "multi_view")
        page.tell(viewer.progress, run, 0.05)
        browser.click("Training")
        text = wait_for(lambda: "geometry" in (shown := browser.run("document.body.innerText")) and shown)
        assert "the viewer takes 5 % of the time" in text and "sds" in text
        browser.click("Priors")
        browser.click("Look at multi_view")
        wait_for(lambda: page.controls.requests)
        assert page.controls.requests.pop() == ("look", "multi_view")
        page.show_look("multi_view", {"x0": np.zeros((8, 32, 3), np.uint8)})
        wait_for(lambda: "x0" in browser.run("document.body.innerText"))
        page.notify("step 7 saved")
        wait_for(lambda: "step 7 saved" in browser.run("document.body.innerText"))
        outside = [
            url for url in browser.requests if not url.startswith(("data:", "blob:", "http://127.0.0.1"))
        ]
        assert outside == []

        scheme = "document.documentElement.dataset.mantineColorScheme"
        assert browser.run(scheme) == "light"
        browser.open(f"http://127.0.0.1:{page.port}/?darkMode")
        wait_for(lambda: browser.run(scheme) == "dark")
    wait_for(lambda: not page.eyes())


def test_it_says_where_it_is_and_prints_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    viewer = Viewer(ViewerConfig(port=0), no_export)
    with redirect_stdout(io.StringIO()) as printed:
        viewer.open(run_of_a_ball(tmp_path))
        port = viewer.page.port
        viewer.close()
    assert f"viewer: http://127.0.0.1:{port}" in caplog.messages and not printed.getvalue()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_another_host_is_warned_of(tmp_path, caplog):
    viewer = Viewer(ViewerConfig(host="0.0.0.0", port=0), no_export)
    viewer.open(run_of_a_ball(tmp_path))
    viewer.close()
    assert "viewer.host=0.0.0.0: everyone who can reach this address" in caplog.text


def test_no_visitor_can_open_a_tunnel(viewer, monkeypatch):
    from viser import _viser

    monkeypatch.setattr(_viser, "ViserTunnel", None)  # would be called
    assert viewer.page.server.request_share_url() is None


def test_a_taken_port_gives_way_to_the_next_and_an_impossible_host_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert port < free_port("127.0.0.1", port) < port + 100
    with pytest.raises(ConfigError, match=r"^viewer\.host=192\.0\.2\.1, viewer\.port=8080: .*; use"):
        free_port("192.0.2.1", 8080)


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("gpu1", False)],
)
def test_loopback_addresses_are_known(host, inside):
    assert is_loopback(host) == inside
