"""``share.html`` in a browser: it moves, loads nothing, and runs nothing of what a user typed."""

import base64
import gzip
import io
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fourdfy.exporters.mesh_exporter import MeshExporter
from fourdfy.launching.experiment import load_experiment
from fourdfy.launching.sharing import write_share
from fourdfy.pages.page import page
from fourdfy.pages.share import share_page
from fourdfy.shapes.world import orbit
from fourdfy.systems.base import System
from fourdfy.types import RenderOutput
from tests.browser import Browser, wait_for
from tests.commands import CONFIGS, TINY
from tests.exporters.scenes import GREY, RED, make_trained
from tests.pages.elements import EVIL, Found
from tests.screenshots import CONTROL, framed, needs_browser, screenshot

FRAMES = np.linspace(0, 255, 4).astype(np.uint8).repeat(64 * 3).reshape(4, 8, 8, 3)


def exported(tmp_path, kind):
    options = {"animation_frames": 3, "animation_resolution": 24, "texture_size": 64, "lit": kind == "turns"}
    trained = make_trained(deforms=kind == "morphs", dynamic=kind != "turns")
    return MeshExporter(MeshExporter.Config(**options)).export(trained, tmp_path)[0].read_bytes()


def shared(path, *, prompt="a ball", model=None, settings=None):
    text = share_page(prompt, "step 7", settings or {"seed": 0}, model=model, frames=FRAMES, seconds=2.0)
    path.write_text(text)
    return path


@needs_browser
def test_model_and_clip_move_in_step_without_any_request(tmp_path):
    moments = []
    for kind in ("morphs", "switches", "turns"):  # the last one stands still, and the camera turns around it
        shared(tmp_path / f"{kind}.html", model=exported(tmp_path, kind))
        moments += [f"{kind}.html#t={moment}" for moment in (0.0, 0.4, 0.8)]
    pixels, asked = screenshot(framed(tmp_path, *moments), width=900, height=2400)
    assert asked == [CONTROL]
    for number, row in enumerate(np.split(pixels, 3)):
        for part in (slice(150, 380), slice(530, 760)):  # the model, the clip
            first, second, third = np.split(row[part], 3, axis=1)
            differences = [np.abs(a - b).max() for a, b in ((first, second), (second, third), (first, third))]
            assert min(differences) > 60
        for color in (GREY, RED) if number < 2 else ():  # of the ball, as they are; the last one is lit
            assert np.abs(row[150:380] - np.array(color) * 255).max(-1).min() < 8


@needs_browser
def test_a_page_runs_nothing_and_asks_for_nothing_even_if_a_text_is_not_escaped(tmp_path):
    (tmp_path / "page.html").write_text(page("title", f"<h1>still here</h1>{EVIL}", scripts=["player.js"]))
    pixels, asked = screenshot(framed(tmp_path, "page.html"), width=300, height=200)
    assert asked == [CONTROL] and pixels[:100].min() < 60, "the heading is dark"


def test_a_prompt_and_settings_are_texts_and_nothing_else(tmp_path):
    settings = {"system": {"prompt": EVIL, EVIL: [EVIL]}}
    found = Found(shared(tmp_path / "share.html", prompt=EVIL, settings=settings).read_text())
    assert found.under("h1") == found.under("title") == [EVIL]
    assert yaml.safe_load(*found.under("pre")) == settings
    assert found.is_inert()


def test_settings_tell_nothing_of_the_sender_s_disk(tmp_path):
    paths = {
        "weights": "/home/somebody/secret/last.ckpt",
        "folders": ["C:\\Users\\somebody\\model", "~/somebody/x/"],
    }
    text = shared(tmp_path / "share.html", settings={"system": paths, "rate": 0.5}).read_text()
    assert "somebody" not in text and "weights: last.ckpt" in text and "rate: 0.5" in text
    assert "  - model\n  - x\n" in text


def test_a_page_without_a_mesh_has_its_clip_alone_for_as_long_as_it_lasts(tmp_path):
    text = shared(tmp_path / "share.html").read_text()
    assert '"seconds": 2.0' in text and "webgl" not in text


class Shown(System):
    """Black frames; the times that were asked for."""

    step = 7

    def __init__(self):
        super().__init__()
        self.times = []

    def render(self, cameras):
        self.times += cameras.times.tolist()
        black = torch.zeros(len(cameras), 8, 8, 3)
        return RenderOutput(comp_rgb=black, opacity=black[..., :1], depth=black[..., :1])


def test_what_is_shared_is_the_first_model_and_some_of_the_moving_clip_evenly(tmp_path):
    system, times = Shown(), torch.arange(96) / 96
    (tmp_path / "a.glb").write_bytes(b"glTF of ours")
    files = [tmp_path / name for name in ("a.txt", "a.glb", "b.glb")]
    clip = orbit(torch.zeros(96), torch.zeros(96), times, 8)
    experiment = load_experiment([CONFIGS / "shapes_stage_3.yaml"], TINY)
    text = write_share(system, experiment, {"val_video": clip, "test": clip[:5]}, files, tmp_path).read_text()
    assert system.times == times[::2].tolist(), "of the clip"
    assert '"seconds": 6.0' in text
    slow = load_experiment([CONFIGS / "shapes_stage_3.yaml"], [*TINY, "system.exporter.clip_seconds=1.5"])
    text_of_slow = write_share(system, slow, {"val_video": clip}, files, tmp_path).read_text()
    assert '"seconds": 1.5' in text_of_slow
    model = base64.b64decode(re.search('"model": "([^"]+)"', text)[1])
    assert gzip.decompress(model) == b"glTF of ours"


def test_half_a_character_of_a_command_line_is_written_too(tmp_path):
    assert "a ball ?" in shared(tmp_path / "share.html", prompt="a ball \udcff").read_text()


@needs_browser
@pytest.mark.parametrize(
    ("before", "message"),
    [("", "can't be shown ("), ("delete window.DecompressionStream", "(DecompressionStream is not defined)")],
)
def test_that_a_model_can_not_be_shown_is_said(tmp_path, before, message):
    pytest.importorskip("websockets", reason="needs websockets, which come with viser")
    file = shared(tmp_path / "share.html", model=b"glTF, and nothing else")
    with Browser(tmp_path / "profile") as browser:
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        browser.open(file.as_uri())
        wait_for(lambda: message in browser.run("document.querySelector('figure').innerText"))
        assert browser.run("document.querySelectorAll('canvas').length") == 1, "the clip's"


@needs_browser
def test_the_model_is_turned_by_hand_and_a_double_click_turns_it_back(tmp_path):
    pytest.importorskip("websockets", reason="needs websockets, which come with viser")
    file = shared(tmp_path / "share.html", model=exported(tmp_path, "switches"))
    with Browser(tmp_path / "profile", width=800, height=700) as browser:

        def is_red(share):
            shown = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB")).astype(int)
            return (np.abs(shown[180:600, :400] - np.array(RED) * 255).max(-1) < 12).mean() > share

        browser.open(f"{file.as_uri()}#t=0.4")
        wait_for(lambda: is_red(0.001))
        assert not is_red(0.1), "the grey side is in front"
        browser.drag((100, 400), (300, 400))
        wait_for(lambda: is_red(0.1))
        browser.run("document.getElementById('model').dispatchEvent(new MouseEvent('dblclick'))")
        wait_for(lambda: not is_red(0.1))
        assert {address.partition(":")[0] for address in browser.requests} <= {"file", "data", "blob"}
