"""The viewer beside a training: it shows the scene, does what is asked for, and changes nothing."""

import logging
import os
import random
import signal

import pytest
import torch

import fourdfy
from fourdfy.callbacks.signals import FinishStep
from fourdfy.config import ConfigError
from fourdfy.launching.cli import main
from fourdfy.signals import StopSignals
from fourdfy.systems.checkpoint import read_checkpoint
from fourdfy.viewing import pace
from fourdfy.viewing import viewer as module
from fourdfy.viewing.settings import ViewerConfig
from fourdfy.viewing.viewer import Viewer, find_page, show_scene
from fourdfy.viewing.views import VIEWS
from tests.commands import TINY, launch, trial
from tests.viewing.fake_page import FakePage
from tests.viewing.scenes import ball, run_of_a_ball, steps

STEPS = 4
GIF = ("system.exporter_type=video-exporter", "system.exporter.formats=[gif]")
ALL_KINDS = ("data.prob_multi_view=0.4", "data.single_view.prob_single_view_video=0.5", "seed=1")


@pytest.fixture(autouse=True)
def always_due(monkeypatch):
    monkeypatch.setattr(module, "PANEL_SECONDS", 0.0)


def train(root, page=None, *, config="shapes_stage_1", steps=1, budget=1.0, overrides=(), callbacks=()):
    """Train with a viewer on the page that ``page(cfg, scenery)`` makes; gives the trial."""
    viewers = [Viewer(ViewerConfig(budget=budget, size=24), nothing, open_page=page)] if page else []
    given = [*TINY, f"exp_root_dir={root}", f"trainer.max_steps={steps}", *overrides]
    return fourdfy.train(config, given, device="cpu", callbacks=[*callbacks, *viewers], test=False)


def nothing(run):
    """Exports nothing."""
    return []


def keeping(pages, kind):
    """What opens a page of this kind and appends it."""

    def open_page(*given):
        pages.append(kind(*given))
        return pages[-1]

    return open_page


class Demanding(FakePage):
    """Wants to see every prior, saves, exports, and pauses for a while."""

    def __init__(self, *given):
        super().__init__(*given)
        self.asked = 0
        self.on_eyes = self.ask

    def ask(self):
        self.asked += 1
        random.random(), torch.rand(1)
        if self.asked == 1:
            for kind in self.scenery.kinds:
                self.controls.ask("look", kind)
        if self.asked == 2:
            self.controls.ask("save")
            self.controls.paused = True
        if self.asked == 12:  # a pause asks twice for each image, so it has shown all five views by now
            self.controls.paused = False


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same training without and with a demanding viewer, and its page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PANEL_SECONDS", 0.0)
        pages, root = [], tmp_path_factory.mktemp("viewer")
        moving = {"config": "shapes_stage_3", "steps": STEPS, "overrides": ALL_KINDS}
        alone = train(root / "alone", **moving)
        watched = train(root / "watched", keeping(pages, Demanding), **moving)
    return alone, watched, pages[0]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_training_is_the_same_bit_for_bit_with_and_without_it(both):
    alone, watched, page = both
    ours, theirs = (read_checkpoint(this.folder) for this in (alone, watched))
    assert len(page.images) >= STEPS
    for key in ("state_dict", "optimizer_states", "global_step", "running_means"):
        assert same(ours[key], theirs[key]), key


def test_it_shows_every_view_to_every_client_and_the_panels(both):
    page = both[2]
    assert {client for client, _, _ in page.images} == {0, 1}
    assert {view for _, view, _ in page.images} == set(VIEWS)
    assert all(max(image.shape[:2]) == 24 for _, _, image in page.images)
    status, losses, groups = page.told[-1]
    assert f"step **{STEPS}** of {STEPS}" in status and "steps/s" in status
    assert "| loss |" in losses and "sds_video" in losses
    trained = [row for row in groups.splitlines() if "encoding_time" in row]
    assert trained and "-" not in trained[0].split("|")[3:]
    assert page.closed


def test_each_prior_shows_its_frames_what_is_noisy_and_what_it_takes_for_clean(both):
    page = both[2]
    assert page.scenery.kinds == ("multi_view", "single_view", "video")
    assert page.looks, "no kind of step came"
    for images in page.looks.values():
        assert [*images] == ["frames", "noisy", "x0"]
        assert len({row.shape[0] for row in images.values()}) <= 2
        assert images["noisy"].shape == images["x0"].shape and (images["noisy"] != images["x0"]).any()


def test_a_pause_ends_when_it_is_resumed_and_saving_writes_an_ordinary_checkpoint(both):
    page = both[2]
    assert "resumed" in page.notes
    assert any("saved: ckpts/last.ckpt" in note for note in page.notes)


def test_exporting_says_that_it_begins_and_names_the_files_inside_of_the_trial(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    files = [tmp_path / "save" / "it1-export" / name for name in ("model.glb", "share.html")]
    seen = []

    def export(run):
        seen.extend(viewer.page.notes)
        return files

    viewer, run = begun(tmp_path, export=export)
    viewer.page.controls.ask("export")
    steps(viewer, run, 1)
    assert seen == ["step 8: exporting ..."]
    assert viewer.page.notes[1:] == ["step 8 exported: save/it1-export/model.glb, save/it1-export/share.html"]
    assert caplog.messages == [f"viewer: {note}" for note in viewer.page.notes]


def test_a_click_on_what_waits_or_is_being_done_asks_for_nothing_new(tmp_path):
    exported = []

    def export(run):
        exported.append(run.step)
        if len(exported) == 1:
            viewer.page.controls.ask("export")
        return []

    viewer, run = begun(tmp_path, export=export)
    for click in ("export", "save", "export"):
        viewer.page.controls.ask(click)
    steps(viewer, run, 2)
    assert exported == [8]
    viewer.page.controls.ask("export")
    steps(viewer, run, 1)
    assert exported == [8, 10]


def test_nothing_else_is_begun_when_the_run_is_to_stop(tmp_path):
    viewer, run = begun(tmp_path, export=lambda run: [])
    run.is_asked_to_stop = lambda: len(viewer.page.notes) == 2
    viewer.page.controls.requests.extend([("export",), ("save",)])
    steps(viewer, run, 2)
    assert viewer.page.notes == ["step 8: exporting ...", "step 8 exported: "]
    run.is_asked_to_stop = lambda: False
    run.stop()
    steps(viewer, run, 1)
    assert len(viewer.page.notes) == 2


class Broken(FakePage):
    def show(self, client, image):
        raise OSError("the browser is gone")


def test_a_viewer_that_fails_is_off_with_one_warning_and_training_goes_on(tmp_path, caplog):
    pages = []
    made = train(tmp_path / "broken", keeping(pages, Broken), steps=2)
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING and "viewer" in r.message]
    assert warnings == ["the viewer is off from here on: OSError: the browser is gone"]
    assert pages[0].closed
    alone = train(tmp_path / "alone", steps=2)
    assert same(*(read_checkpoint(this.folder)["state_dict"] for this in (made, alone)))


def begun(folder, page=FakePage, *, static=False, budget=1.0, export=nothing, **given):
    """(a viewer beside a training of a ball that has begun, its run)."""
    run = run_of_a_ball(folder, static=static)
    viewer = Viewer(ViewerConfig(size=24, budget=budget), export, open_page=page, **given)
    viewer.begin(run)
    return viewer, run


def test_a_page_that_cannot_be_opened_costs_a_warning(tmp_path, caplog):
    def taken(cfg, scenery):
        raise OSError("viewer.port=8080:\ntaken")

    viewer, run = begun(tmp_path, taken)
    steps(viewer, run, 2)
    assert caplog.messages == ["the viewer is off from here on: OSError: viewer.port=8080: taken"]


def test_what_fails_on_demand_is_told_and_the_viewer_stays(tmp_path):
    viewer, run = begun(tmp_path, export=lambda run: run.nowhere)
    viewer.page.controls.requests.extend([("look", "nobody"), ("save",), ("export",)])
    run.save = lambda path: (path / "nowhere").read_bytes()
    steps(viewer, run, 3)
    look, save, _, export = viewer.page.notes
    assert look == "look failed: KeyError: 'nobody'"
    assert save.startswith("save failed: FileNotFoundError") and export.startswith("export failed: ")
    assert len(viewer.page.images) > 2


class Left(FakePage):
    """Paused, and then nobody looks on."""

    def __init__(self, *given):
        super().__init__(*given)
        self.controls.paused = True

    def eyes(self):
        self.on_eyes()
        return {}


def test_a_paused_run_goes_on_when_nobody_looks_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ALONE_SECONDS", 0.05)
    viewer, run = begun(tmp_path, Left)
    steps(viewer, run, 2)
    assert viewer.page.notes == ["resumed"] and not run.stopping


def test_a_pause_has_an_end_where_others_wait(tmp_path):
    viewer, run = begun(tmp_path, longest_pause=0.05)
    viewer.page.controls.paused = True
    steps(viewer, run, 1)
    assert viewer.page.notes == ["resumed"] and not run.stopping


def test_a_signal_ends_a_paused_run_at_that_step_with_a_checkpoint(tmp_path):
    stop = StopSignals(lambda: "")

    class Interrupted(Left):
        def eyes(self):
            stop.received = 15
            return {0: self.scenery.eye}

    made = train(tmp_path, Interrupted, steps=3, callbacks=[FinishStep(stop)])
    assert made.system.step == 1


def test_a_static_scene_has_no_time(tmp_path):
    viewer, run = begun(tmp_path, static=True)
    steps(viewer, run, 10)
    assert not viewer.page.scenery.dynamic
    colours = {
        tuple(image[len(image) // 2, image.shape[1] // 2])
        for _, view, image in viewer.page.images
        if view == "rgb"
    }
    assert colours == {(255, 0, 0)}  # as at time 0


def test_the_command_line_opens_it_and_shows_a_trial_until_a_signal(tmp_path, monkeypatch, heard, capsys):
    class Visited(FakePage):
        def notify(self, text):
            super().notify(text)
            if "exported" in text:
                os.kill(os.getpid(), signal.SIGINT)

        def show(self, client, image):
            super().show(client, image)
            if not self.scenery.kinds and len(self.images) == 2:
                self.controls.requests.extend([("export",), ("save",)])

    pages = []
    monkeypatch.setattr(module, "find_page", lambda: keeping(pages, Visited))
    assert launch("shapes_stage_1.yaml", "train", tmp_path, "--view", "trainer.max_steps=1") == 0
    assert pages[0].scenery.has_truth and pages[0].cfg.enable and pages[0].images
    folder = trial(tmp_path, "shapes_stage_1")
    assert main(["--trial", str(folder), "--view", "--gpu", "cpu", "viewer.size=16", *GIF]) == 0
    _, exported = pages[1].notes  # what else was asked for is not begun
    assert exported.startswith("step 1 exported: save/it1-export/"), exported
    assert (folder / "save" / "it1-export" / "share.html").exists()
    assert pages[1].scenery.step == 1 and pages[1].scenery.kinds == () and pages[1].closed
    with pytest.raises(SystemExit):
        main(["--trial", str(folder), "--test", "--view"])
    assert "--view stands alone" in capsys.readouterr().err


def test_a_finished_scene_is_refined_at_rest_without_a_budget(tmp_path):
    class Still(FakePage):
        def eyes(self):
            return {0: self.scenery.eye}

    pages, looks, run = [], iter(range(200)), run_of_a_ball(tmp_path)
    run.optimizer, run.is_asked_to_stop = None, lambda: next(looks) > 60
    viewer = Viewer(ViewerConfig(size=128), nothing, open_page=keeping(pages, Still))
    show_scene(viewer, run)
    assert [max(image.shape[:2]) for _, _, image in pages[0].images] == [64, 128]
    assert pages[0].scenery.kinds == () and pages[0].closed


def test_rendering_and_requests_leave_generators_and_modes_as_they_were(tmp_path):
    viewer, run = begun(tmp_path)
    seen = []

    def render(cameras):
        seen.append((run.system.training, float(torch.rand(()))))
        return ball(cameras)

    run.system.render, run.system.part = render, torch.nn.Linear(1, 1).eval()
    run.save = lambda path: seen.append((run.system.training, float(torch.rand(()))))
    viewer.page.controls.ask("save")
    before = torch.get_rng_state()
    steps(viewer, run, 3)
    assert len(seen) > 3 and not any(training for training, _ in seen)
    assert torch.equal(torch.get_rng_state(), before)
    assert run.system.training and not run.system.part.training


def test_a_missing_package_is_named_with_what_to_type(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "viser", None)
    monkeypatch.delitem(sys.modules, "fourdfy.viewing.page", raising=False)
    with pytest.raises(ConfigError, match=r"^the viewer needs the package viser.*pip install"):
        find_page()


def test_nothing_is_rendered_beyond_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "SAVED_SECONDS", 0.0)
    viewer, run = begun(tmp_path, budget=1e-9)
    steps(viewer, run, 4)
    assert len(viewer.page.images) + len(viewer.page.told) == 1
