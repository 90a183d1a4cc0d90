"""Curves: means for each kind of step, one curve across resumes, Weights & Biases."""

import csv
import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fourdfy.callbacks import base, curves
from fourdfy.callbacks.curves import Curves
from fourdfy.config import ConfigError
from fourdfy.files import atomic
from fourdfy.launching.experiment import load_experiment
from tests.commands import CONFIGS, TINY
from tests.runs import new_run


def experiment(root, *overrides):
    given = [*TINY, f"exp_root_dir={root}", "trainer.log_every_n_steps=4", *overrides]
    return load_experiment([CONFIGS / "shapes_stage_1.yaml"], given)


def curves_of(this):
    loggers = this.cfg.system.loggers
    return Curves(this.trial_dir, this.cfg.trainer.log_every_n_steps, loggers.wandb, this.values)


OPTIMIZER = SimpleNamespace(param_groups=[{"name": "geometry", "lr": 0.5}])


def run(this, steps, *, sums=None, crash=False, max_steps=100):
    """Train steps, all of kind "a" but every fifth, "b"; the loss is the step. Gives what a checkpoint would
    hold of the means."""
    callback, run = curves_of(this), new_run(steps[0], max_steps=max_steps, optimizer=OPTIMIZER)
    run.means.sums = dict(sums or {})
    callback.begin(run)
    for step in steps:
        run.means.add({f"loss/{'b' if step % 5 == 4 else 'a'}/sds": float(step)})
        run.system.step = step + 1
        callback.after_step(run, None, {})
    if not crash:
        callback.end(run, None)
        callback.close()
    return run.means.sums


def rows(this):
    with open(this.trial_dir / "csv_logs" / "version_0" / "metrics.csv") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def events(this):
    accumulator = EventAccumulator(str(this.trial_dir / "tb_logs" / "version_0"))
    accumulator.Reload()
    return accumulator


def points(this, name):
    return [(event.step, event.value) for event in events(this).Scalars(name)]


def test_a_point_is_the_mean_of_its_kind_of_step_and_rare_kinds_have_theirs(tmp_path):
    this = experiment(tmp_path)
    run(this, range(8))
    assert rows(this) == [
        {"step": 3, "loss/a/sds": 1.5, "lr/geometry": 0.5},
        {"step": 7, "loss/a/sds": 6.0, "loss/b/sds": 4.0, "lr/geometry": 0.5},
    ]
    assert points(this, "loss/b/sds") == [(7, 4.0)]


def test_the_last_step_completes_the_curve(tmp_path):
    this = experiment(tmp_path)
    run(this, range(6), max_steps=6)
    assert [row["step"] for row in rows(this)] == [3, 5]


def test_a_long_run_s_points_become_rarer_and_are_means_over_more_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "DENSE", 2)  # of four steps each
    this = experiment(tmp_path)
    sums = run(this, range(13))
    run(this, range(13, 40), sums=sums)  # resumed between two points
    assert [row["step"] for row in rows(this)] == [3, 7, 15, 31]
    assert rows(this)[2]["loss/b/sds"] == (9 + 14) / 2


def test_the_logs_of_the_paper_s_longest_run_are_a_quarter_of_its_steps():
    assert sum(step % curves.interval(step, 1) == 0 for step in range(1, 100_001)) == 26_250


@pytest.mark.parametrize("crash", [False, True])
def test_a_resumed_run_continues_the_curve_without_a_step_twice_or_lost(tmp_path, crash):
    whole, broken = experiment(tmp_path / "whole"), experiment(tmp_path / "broken")
    run(whole, range(16))
    sums = run(broken, range(6))
    if crash:  # four more steps, with a point, that no checkpoint has
        run(broken, range(6, 10), sums=sums, crash=True)
    run(broken, range(6, 16), sums=sums)
    assert rows(broken) == rows(whole)
    for name in ("loss/a/sds", "loss/b/sds", "lr/geometry"):
        assert points(broken, name) == points(whole, name)


@pytest.fixture
def arrived(monkeypatch):
    """Numbers are on their way until their step is put into this set."""
    steps = set()

    class Slow(base.Means):
        is_ready = property(lambda self: all(total in steps for total, _ in self._sums.values()))

    monkeypatch.setattr(base, "Means", Slow)
    return steps


def test_points_are_written_in_order_once_their_numbers_have_come(tmp_path, arrived):
    this = experiment(tmp_path, "trainer.log_every_n_steps=1")
    callback, run = curves_of(this), new_run(optimizer=OPTIMIZER)
    callback.begin(run)
    written = []
    for step, came in enumerate([(), (1,), (0,), ()]):
        run.means.add({"loss/a/sds": float(step)})
        arrived.update(map(float, came))
        run.system.step = step + 1
        callback.after_step(run, None, {})
        written.append([row["step"] for row in rows(this)])
    assert written == [[], [], [0, 1], [0, 1]]
    assert callback.state_dict() == {}  # as a checkpoint is written
    assert [row["step"] for row in rows(this)] == [0, 1, 2, 3]
    assert [step for step, _ in points(this, "loss/a/sds")] == [0, 1, 2, 3]


def test_points_that_are_on_their_way_at_the_end_are_written(tmp_path, arrived):
    this = experiment(tmp_path)
    run(this, range(8))
    assert [row["step"] for row in rows(this)] == [3, 7]


def test_pictures_and_clips_go_to_tensorboard_at_a_small_size(tmp_path):
    this = experiment(tmp_path)
    callback = curves_of(this)
    callback.begin(new_run())
    callback.images("val/0", np.zeros((1, 300, 400, 3), np.uint8), 7)
    callback.images("val/video", np.arange(4, dtype=np.uint8).repeat(48).reshape(4, 4, 4, 3), 7)
    callback.end(new_run(), None)
    callback.images("test/video", np.zeros((2, 4, 4, 3), np.uint8), 7)  # rendered after training
    callback.close()
    callback.images("late", np.zeros((1, 4, 4, 3), np.uint8), 7)
    assert events(this).Tags()["images"] == ["val/0", "val/video", "test/video"]
    (image,), (clip,) = events(this).Images("val/0"), events(this).Images("val/video")
    assert (image.step, image.height, image.width) == (7, 150, 200)
    assert image.encoded_image_string[:4] == b"\x89PNG" and clip.encoded_image_string[:3] == b"GIF"


def test_curves_that_can_not_be_written_cost_one_warning_and_not_the_run(tmp_path, caplog):
    """A file is where their folders should be."""
    this = experiment(tmp_path)
    this.trial_dir.mkdir(parents=True)
    for name in ("tb_logs", "csv_logs"):
        (this.trial_dir / name).write_text("no folder")
    with atomic.losses_noted() as missing:
        run(this, range(8))
    (warning,) = caplog.records
    reason = f"{this.trial_dir / 'tb_logs'} is a file where a folder is needed"
    assert warning.getMessage().startswith("curves could not be written; the run continues (")
    assert reason in warning.getMessage() and reason in missing["curves"]


def test_curves_that_are_removed_meanwhile_begin_anew_with_one_warning(tmp_path, caplog, monkeypatch):
    this, scalars = experiment(tmp_path), curves.TensorBoard.scalars

    def remove_first(writer, values, step):
        if step == 7:
            for name in ("tb_logs", "csv_logs"):
                shutil.rmtree(this.trial_dir / name)
        scalars(writer, values, step)

    monkeypatch.setattr(curves.TensorBoard, "scalars", remove_first)
    with atomic.losses_noted():
        run(this, range(12))
    (warning,) = caplog.records
    assert "was removed; it begins anew" in warning.getMessage()
    assert [row["step"] for row in rows(this)] == [7, 11]
    assert [step for step, _ in points(this, "loss/a/sds")] == [7, 11]


def test_a_row_that_a_full_disk_has_cut_is_left_out(tmp_path):
    whole, torn = experiment(tmp_path / "whole"), experiment(tmp_path / "torn")
    for this in (whole, torn):
        run(this, range(8))
    with open(torn.trial_dir / "csv_logs" / "version_0" / "metrics.csv", "a") as file:
        file.write("5.0,0.5,1")  # of step 11
    for this in (whole, torn):
        run(this, range(8, 16))
    assert rows(torn) == rows(whole)


class FakeRun:
    def __init__(self, **given):
        self.given, self.logged, self.finished = given, [], False

    def define_metric(self, *names, **options):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def test_weights_and_biases_gets_the_same_curves_in_one_run(tmp_path, monkeypatch):
    runs = []
    fake = ModuleType("wandb")
    fake.init = lambda **given: runs.append(FakeRun(**given)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    enable = "system.loggers.wandb.enable=true"
    run(experiment(tmp_path, enable), range(4))
    run(experiment(tmp_path, enable, "system.loggers.wandb.project=mine"), range(4, 8))
    assert [run.given["project"] for run in runs] == ["fourdfy", "mine"]
    assert runs[0].given["name"] == "shapes_stage_1/tiny"
    assert runs[0].given["id"] == runs[1].given["id"] and runs[1].given["resume"] == "allow"
    assert runs[0].logged == [{"global_step": 3, "loss/a/sds": 1.5, "lr/geometry": 0.5}]
    assert all(run.finished for run in runs)


def test_weights_and_biases_that_will_not_start_say_so_before_the_first_step(tmp_path, monkeypatch):
    fake = ModuleType("wandb")
    fake.init = lambda **given: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ConfigError, match=r"system\.loggers\.wandb: division.*WANDB_MODE=offline"):
        run(experiment(tmp_path, "system.loggers.wandb.enable=true"), range(1))


def test_weights_and_biases_must_be_installed_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"system\.loggers\.wandb\.enable=true: .* pip install wandb"):
        curves_of(experiment(tmp_path, "system.loggers.wandb.enable=true"))


def test_weights_and_biases_itself_takes_curves_images_and_clips_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    this = experiment(tmp_path, "system.loggers.wandb.enable=true")
    callback = curves_of(this)
    made = new_run(optimizer=OPTIMIZER)
    callback.begin(made)
    made.means.add({"loss/a/sds": 1.5})
    made.system.step = 4
    callback.after_step(made, None, {})
    callback.images("val/0", np.zeros((1, 8, 8, 3), np.uint8), 3)
    callback.images("val/video", np.arange(4, dtype=np.uint8).repeat(192).reshape(4, 8, 8, 3), 3)
    callback.end(made, None)
    callback.close()
    (record,) = this.trial_dir.glob("wandb/offline-run-*/*.wandb")
    assert b"loss/a/sds" in record.read_bytes()
    media = record.parent / "files" / "media"
    (image,), (clip,) = media.rglob("*.png"), media.rglob("*.gif")
    assert image.read_bytes()[:4] == b"\x89PNG" and clip.read_bytes()[:3] == b"GIF"
