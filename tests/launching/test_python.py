"""``fourdfy.train`` and ``fourdfy.load``: from Python, in any thread, with no trace outside the trial."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import fourdfy
from fourdfy.callbacks.base import Callback
from fourdfy.config import ConfigError
from fourdfy.launching.recipe import load_recipe
from fourdfy.launching.train import _check_callbacks
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.systems.checkpoint import read_checkpoint
from tests.commands import ROOT, TINY, launch, trial

README = (ROOT / "README.md").read_text(encoding="utf-8")

IN_A_THREAD = """
import logging, os, signal, sys, threading, warnings
import fourdfy
from tests.commands import TINY

def state():
    numbers = [n for n in signal.valid_signals() if n not in (signal.SIGKILL, signal.SIGSTOP)]
    loggers = [logging.getLogger(name) for name in ("", "fourdfy", "pytorch_lightning", "lightning_fabric")]
    return (
        [signal.getsignal(n) for n in numbers],
        [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers],
        os.getcwd(), sys.path[:],
    )

def run():
    made.append(fourdfy.train("shapes_stage_3", [*TINY, "exp_root_dir=here"], device="cpu"))

made, before = [], state()
assert "torch" not in sys.modules
for place in ("a thread", "the main thread"):
    if place == "a thread":
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    assert len(made) and state() == before, place
assert made[0].system.step == 2
os._exit(0 if made[0].folder == made[1].folder else 3)
"""


def train(root, *overrides, config="shapes_stage_1", callbacks=()):
    given = [*TINY, f"exp_root_dir={root}", *overrides]
    return fourdfy.train(config, given, device="cpu", callbacks=callbacks)


def front(size=8):
    zero = torch.zeros(1)
    return orbit_cameras(zero, zero, distance=3.8, fovy_deg=40.0, times=zero, height=size, width=size)


class Watch(Callback):
    """Notes what it is told; stops a run after some steps."""

    def __init__(self, stop_at=None):
        self.told, self.stop_at, self.kinds = [], stop_at, []

    def begin(self, run):
        self.told.append(("begin", run.label, run.step))

    def after_step(self, run, batch, losses):
        self.told.append(("step", run.step))
        self.kinds.append((batch.step, *losses))
        if run.step == self.stop_at:
            run.stop()

    def after_validation(self, run):
        self.told.append(("validation", run.step))

    def after_test(self, run):
        self.told.append(("test", run.step))

    def end(self, run, error):
        self.told.append(("end", run.step, type(error)))


def test_training_writes_to_its_trial_alone_and_leaves_the_process_as_it_was(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", IN_A_THREAD]
    paths = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_training_gives_what_the_command_line_makes(tmp_path):
    made = train(tmp_path / "python")
    assert launch("shapes_stage_1.yaml", "train", tmp_path / "typed") == 0
    typed = trial(tmp_path / "typed", "shapes_stage_1")
    ours, theirs = (read_checkpoint(folder)["state_dict"] for folder in (made.folder, typed))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert (made.folder / "cmd.txt").read_text().startswith("fourdfy --config shapes_stage_1 --train ")
    assert (made.folder / "save" / "it2-test.mp4").exists()


def test_what_is_loaded_renders_as_what_was_trained(tmp_path):
    made = train(tmp_path, config="shapes_stage_3")
    loaded = fourdfy.load(made.folder, device="cpu")
    assert loaded.folder == made.folder and loaded.config.name == "shapes_stage_3"
    assert loaded.system.step == made.system.step == 2
    frames = [this.render(front()).comp_rgb for this in (made, loaded)]
    assert torch.equal(*frames) and frames[0].shape == (1, 8, 8, 3)
    assert not loaded.system.training


def test_a_recipe_is_trained_to_its_last_stage_and_callbacks_see_all(tmp_path):
    watch = Watch()
    made = train(
        tmp_path, "trainer.val_check_interval=1", "trainer.max_steps=1", config="shapes", callbacks=[watch]
    )
    assert made.config.name == "shapes_stage_3"
    told = [("step", 1), ("validation", 1), ("end", 1, type(None)), ("test", 1)]
    assert watch.told == [x for n in (1, 2, 3) for x in (("begin", f"stage {n}/3", 0), *told)]
    assert watch.kinds[0][0] == 0 and "sds" in watch.kinds[0]


def test_a_callback_can_stop_a_run_which_then_goes_on(tmp_path):
    watch = Watch(stop_at=1)
    stopped = train(tmp_path, config="shapes", callbacks=[watch])
    assert (stopped.config.name, stopped.system.step) == ("shapes_stage_1", 1)
    assert read_checkpoint(stopped.folder)["global_step"] == 1
    again = Watch()
    assert train(tmp_path, config="shapes", callbacks=[again]).config.name == "shapes_stage_3"
    assert again.told[:2] == [("begin", "stage 1/3", 1), ("step", 2)]


def test_a_command_line_whose_run_a_callback_stopped_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fourdfy.callbacks.progress.ProgressLine", lambda: Watch(stop_at=1))
    with caplog.at_level("INFO"):
        assert launch("shapes.yaml", "train", tmp_path) == 0
    said = "stage 1/3 shapes_stage_1: a callback stopped it; the same command continues"
    assert caplog.records[-1].getMessage() == said


def test_accumulated_parts_are_one_step_to_a_callback(tmp_path):
    watch = Watch()
    train(tmp_path, "trainer.accumulate_grad_batches=3", callbacks=[watch])
    assert [told for told in watch.told if told[0] == "step"] == [("step", 1), ("step", 2)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_raises_what_interrupted_it_and_ignores_no_signal(tmp_path, error):
    class Interrupt(Watch):
        def after_step(self, run, batch, losses):
            raise error

    before, watch = signal.getsignal(signal.SIGINT), Interrupt()
    with pytest.raises(error) as raised:
        train(tmp_path, callbacks=[watch])
    if error is RuntimeError:
        assert (
            "after_step of the callback" in raised.value.__notes__[0]
            and "Interrupt" in raised.value.__notes__[0]
        )
    assert signal.getsignal(signal.SIGINT) is before
    assert watch.told[-1][:2] == ("end", 1) and issubclass(watch.told[-1][2], BaseException)
    assert not (trial(tmp_path, "shapes_stage_1") / "ckpts" / "last.ckpt").exists()


def test_a_program_s_own_handler_of_sigterm_stays_in_place_meanwhile(tmp_path):
    class Ask(Callback):
        def __init__(self):
            pass

        def after_step(self, run, batch, losses):
            seen.append(signal.getsignal(signal.SIGTERM))

        def after_test(self, run):
            seen.append(signal.getsignal(signal.SIGTERM))

    def mine(*_):
        pass

    seen, before = [], signal.signal(signal.SIGTERM, mine)
    try:
        train(tmp_path, callbacks=[Ask()])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [mine] * 3


def test_mistakes_are_config_errors_by_the_arguments_names(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^callbacks: expected instances of Callback, .*got <class"):
        _check_callbacks([Callback])  # by itself, as the tests check types before it does
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        train(tmp_path, "sed=1")
    with pytest.raises(ConfigError, match=r"^trial=.*: not a trial folder"):
        fourdfy.load(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"^device=7: no such GPU; PyTorch sees only device=0$"):
        fourdfy.load(tmp_path, device="7")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        fourdfy.trian  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_several_configs_and_a_literal_prompt(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 5\n")
    prompt = "a red cube bouncing"
    small = [word for word in TINY if "prompt" not in word]
    configs = ["shapes_stage_1", tmp_path / "mine.yaml"]
    made = fourdfy.train(configs, [*small, f"exp_root_dir={tmp_path}"], prompt=prompt, device="cpu")
    assert made.config.seed == 5 and made.config.system.prompt_processor.prompt == prompt


def test_the_readme_s_program_runs_as_printed(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(import fourdfy\n.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    real = load_recipe
    small = [word for word in TINY if "prompt" not in word]
    monkeypatch.setattr(
        "fourdfy.launching.train.load_recipe", lambda paths, given: real(paths, [*given, *small])
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["frames"].comp_rgb.shape == (24, 128, 128, 3)
