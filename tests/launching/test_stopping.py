"""A signal at any moment: stop soon, save, another status than 0, say how to go on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fourdfy.callbacks import renders
from fourdfy.evaluation import judge
from fourdfy.files import images
from fourdfy.files.evaluations import TEST, VALIDATION, is_evaluated
from fourdfy.launching import run as launch_run
from fourdfy.launching import train
from fourdfy.launching.cli import main
from fourdfy.launching.lightning import LightningSystem
from fourdfy.signals import Stopped
from fourdfy.systems.checkpoint import read_checkpoint
from fourdfy.systems.fourdfy import FourdfySystem
from tests.commands import CONFIGS, ROOT, TINY, launch
from tests.commands import trial as trial_of

CONFIG = "shapes_stage_1.yaml"
LONG = ("trainer.max_steps=4", "trainer.val_check_interval=2", "checkpoint.every_n_train_steps=100")


pytestmark = pytest.mark.usefixtures("heard")


@pytest.fixture
def at_call(monkeypatch):
    """Send this process a signal in the n-th call of a function; gives its calls."""

    def send(owner, name, number, nth=1):
        original, calls = getattr(owner, name), []

        def patched(*args, **keywords):
            calls.append(args)
            if len(calls) == nth:
                os.kill(os.getpid(), number)
            return original(*args, **keywords)

        monkeypatch.setattr(owner, name, patched)
        return calls

    return send


def last_step(root):
    return read_checkpoint(trial_of(root, "shapes_stage_1"))["global_step"]


@pytest.mark.parametrize(
    ("owner", "name", "nth", "number", "saved"),
    [
        (LightningSystem, "training_step", 2, signal.SIGTERM, 2),  # a validation is due
        (LightningSystem, "training_step", 3, signal.SIGHUP, 3),
        (LightningSystem, "validation_step", 1, signal.SIGUSR1, 2),
        (LightningSystem, "test_step", 3, signal.SIGXCPU, 4),
        (images, "save_test", 1, signal.SIGINT, 4),
        (renders, "record_evaluation", 3, signal.SIGTERM, 4),  # two validations come before it
    ],
)
def test_a_training_saves_and_the_rest_is_done_by_the_command_it_names(
    owner, name, nth, number, saved, at_call, tmp_path, caplog
):
    at_call(owner, name, number, nth)
    with pytest.raises(Stopped) as stopped:
        launch(CONFIG, "train", tmp_path, *LONG)
    folder = trial_of(tmp_path, "shapes_stage_1")
    assert stopped.value.code == 128 + number
    advice = f"continue with: python launch.py --trial {folder} --train"
    assert f"stopped by {signal.Signals(number).name}; {advice}" in caplog.text
    assert last_step(tmp_path) == saved
    assert not is_evaluated(folder, TEST.format(4))
    assert main(["--trial", str(folder), "--train", "--gpu", "cpu"]) == 0
    assert last_step(tmp_path) == 4 and is_evaluated(folder, TEST.format(4))
    assert is_evaluated(folder, VALIDATION.format(2))


@pytest.mark.parametrize(
    ("owner", "name", "rendered"), [(LightningSystem, "training_step", 0), (FourdfySystem, "render", 1)]
)
def test_a_stop_renders_no_validation_nor_the_rest_of_one(owner, name, rendered, at_call, tmp_path):
    nth = {"training_step": 2, "render": 1}[name]
    at_call(owner, name, signal.SIGTERM, nth)
    rendering = at_call(FourdfySystem, "render", 0, nth=-1)
    with pytest.raises(Stopped):
        launch(CONFIG, "train", tmp_path, *LONG, "data.single_view.n_val_views=3")
    assert len(rendering) == rendered
    assert last_step(tmp_path) == 2


def test_the_test_views_of_an_early_end_are_rendered_where_that_is_wished(at_call, tmp_path):
    at_call(LightningSystem, "training_step", signal.SIGINT)
    views = at_call(LightningSystem, "test_step", 0, nth=-1)
    with pytest.raises(Stopped):
        launch(CONFIG, "train", tmp_path, *LONG, "trainer.test_when_stopped=true")
    folder = trial_of(tmp_path, "shapes_stage_1")
    assert len(views) == 1
    assert [*(folder / "save").glob("it1-test*")] and not is_evaluated(folder, TEST.format(2))


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (launch_run, "load_recipe", signal.SIGTERM),
        (launch_run, "check_run", signal.SIGINT),
        (train, "prepare_trial", signal.SIGHUP),
    ],
)
def test_start_up_can_be_stopped(owner, name, number, at_call, tmp_path, caplog):
    at_call(owner, name, number)
    with pytest.raises(Stopped) as stopped:
        launch(CONFIG, "train", tmp_path)
    assert stopped.value.code == 128 + number
    assert f"stopped by {signal.Signals(number).name}; " in caplog.text
    assert "same command" in caplog.text


def test_a_stop_between_stages_starts_no_other(at_call, tmp_path):
    prepared = at_call(train, "prepare_trial", signal.SIGTERM, nth=2)
    with pytest.raises(Stopped):
        launch("shapes.yaml", "train", tmp_path)
    assert len(prepared) == 2
    assert last_step(tmp_path) == 2 and not trial_of(tmp_path, "shapes_stage_2").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    assert launch(CONFIG, "train", root) == 0
    return root


@pytest.mark.parametrize(
    ("mode", "owner", "name"),
    [
        ("test", LightningSystem, "test_step"),
        ("validate", LightningSystem, "validation_step"),
        ("export", FourdfySystem, "export"),
        ("evaluate", judge, "evaluate_scene"),
    ],
)
def test_the_other_modes_end_at_once(mode, owner, name, trained, at_call, caplog):
    calls = at_call(owner, name, signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        launch(CONFIG, mode, trained)
    assert (stopped.value.code, len(calls)) == (128 + signal.SIGTERM, 1)
    assert "stopped by SIGTERM; run the same command again" in caplog.text


@pytest.mark.parametrize(("seconds", "number"), [(0.2, signal.SIGINT), (1.0, signal.SIGTERM)])
def test_imports_can_be_stopped_without_a_traceback(seconds, number, tmp_path):
    line = [sys.executable, ROOT / "launch.py", "--config", CONFIGS / CONFIG, "--train", "--gpu", "cpu"]
    line += [f"exp_root_dir={tmp_path}", *TINY]
    status = -number
    while status == -number:  # on a busy machine Python itself had not begun
        process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        status, seconds = process.returncode, 2 * seconds
    assert status == 128 + number
    assert said == f"stopped by {number.name}; run the same command again\n"
