"""The trial folder: one owner, a copy of what it was made from, and where it is."""

import os
import signal
import threading
import time
import zipfile

import pytest
from omegaconf import OmegaConf

from fourdfy.config import ConfigError
from fourdfy.launching import trial
from fourdfy.launching.recipe import load_recipe
from fourdfy.launching.trial import owned, prepare_trial
from tests.commands import CONFIGS

CONFIG = CONFIGS / "shapes_stage_1.yaml"
PROMPT = "system.prompt_processor.prompt=a red cube bouncing"


def test_a_second_owner_is_refused_with_folder_and_process(tmp_path):
    folder = tmp_path / "trial"
    with owned(folder):
        with pytest.raises(ConfigError) as refused, owned(folder):
            pass
        assert f"{folder}: in use by process {os.getpid()} on " in str(refused.value)
        assert "tag=NAME" in str(refused.value)
        (folder / "result").touch()
    with owned(folder):
        pass


def test_the_lock_of_a_process_that_was_killed_counts_for_nothing(tmp_path):
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        with owned(tmp_path / "trial"):
            os.write(write, b"!")
            signal.pause()
    os.read(read, 1)
    with pytest.raises(ConfigError, match=f"in use by process {child} "), owned(tmp_path / "trial"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with owned(tmp_path / "trial"):
        assert str(os.getpid()) in (tmp_path / "trial" / ".owner").read_text()


def test_a_folder_that_nothing_came_into_goes_again(tmp_path):
    with owned(tmp_path / "a" / "b" / "trial"):
        assert (tmp_path / "a" / "b" / "trial").is_dir()
    assert not list(tmp_path.iterdir())


def test_two_never_own_a_folder_that_an_owner_with_nothing_to_keep_removes_meanwhile(tmp_path):
    folder, owns, end = tmp_path / "trial", threading.Event(), threading.Event()

    def wait_and_own():
        with owned(folder):
            owns.set()
            end.wait(10)

    waiting = threading.Thread(target=wait_and_own)
    with owned(folder):
        waiting.start()
        time.sleep(0.05)
        assert not owns.is_set()
    assert owns.wait(10)
    with pytest.raises(ConfigError, match="in use by"), owned(folder):
        pass
    end.set()
    waiting.join()


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*args, **keywords):
        raise OSError(trial.NO_LOCKS[0], "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    with owned(tmp_path / "trial"):
        assert "has no locks" in caplog.text


@pytest.fixture
def experiment(tmp_path):
    return experiment_of([CONFIG], [PROMPT, f"exp_root_dir={tmp_path}"])


def test_the_code_is_one_archive_of_sources(experiment):
    prepare_trial(experiment, [CONFIG], ["launch.py"])
    archive = experiment.trial_dir / "code.zip"
    names = zipfile.ZipFile(archive).namelist()
    assert {"fourdfy/launching/cli.py", "fourdfy/systems/fourdfy.py", "configs/base/shapes.yaml"} <= set(
        names
    )
    assert {name.rpartition(".")[2] for name in names} == {"py", "yaml"}
    assert archive.stat().st_size < 600_000


def test_a_copy_of_the_code_that_fails_costs_a_warning(experiment, monkeypatch, caplog):
    def fail(*args):
        raise PermissionError("no")

    monkeypatch.setattr(trial, "_snapshot_code", fail)
    prepare_trial(experiment, [CONFIG], ["launch.py"])
    assert "the copy of the code could not be written; the run continues (" in caplog.text
    assert (experiment.trial_dir / "cmd.txt").exists()


def test_a_trial_that_goes_on_keeps_the_config_it_was_typed_in(experiment):
    prepare_trial(experiment, [CONFIG], ["launch.py"])
    prepare_trial(experiment, [experiment.trial_dir / "configs" / "parsed.yaml"], ["launch.py"])
    assert CONFIG.read_text() in (experiment.trial_dir / "configs" / "raw.yaml").read_text()


# ---------------------------------------------------------------------------------------------
# Where it is


@pytest.fixture
def parsed(tmp_path):
    """The config of a trial that was made in another place."""
    (stage,) = load_recipe([CONFIG], [PROMPT, "exp_root_dir=/elsewhere"])
    file = tmp_path / "moved" / "configs" / "parsed.yaml"
    file.parent.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(stage.experiment.record()), file)
    return file


def experiment_of(*given):
    (stage,) = load_recipe(*given)
    return stage.experiment


def test_a_trial_is_where_its_config_is(parsed, monkeypatch):
    assert experiment_of([parsed], []).trial_dir == parsed.parents[1]
    monkeypatch.chdir(parsed.parent)
    assert experiment_of([parsed.relative_to(parsed.parent)], []).trial_dir == parsed.parents[1]


@pytest.mark.parametrize(
    ("override", "folder"),
    [("tag=other", "/elsewhere/shapes_stage_1/other@"), ("exp_root_dir=/new", "/new/")],
)
def test_the_command_line_can_say_where_another_one_is(override, folder, parsed):
    experiment = experiment_of([parsed], [override])
    assert str(experiment.trial_dir).startswith(folder)
    assert experiment.is_placed


@pytest.mark.parametrize("key", ["name", "tag", "timestamp"])
@pytest.mark.parametrize("value", ["/../../../etc", "../..", "a/b", "@..\0", "x" * 999])
def test_no_key_leads_out_of_the_folder_of_experiments(tmp_path, key, value):
    experiment = experiment_of([CONFIG], [PROMPT, f"exp_root_dir={tmp_path}", f"{key}={value}"])
    folder = experiment.trial_dir
    assert folder.resolve() == folder and folder.parents[1] == tmp_path
    assert len(folder.name.encode()) < 255


def test_a_config_of_another_name_is_no_trial(parsed):
    file = parsed.rename(parsed.with_name("mine.yaml"))
    assert experiment_of([file], []).trial_dir.is_relative_to("/elsewhere")


def test_two_runs_of_the_same_second_have_two_folders():
    first, second = (experiment_of([CONFIG], [PROMPT, f"seed={seed}"]) for seed in (1, 2))
    assert first.trial_dir != second.trial_dir


def test_what_a_trial_records_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["exp_root_dir=here", "system.weights=a/x.ckpt", "resume=b/y.ckpt"]
    experiment = experiment_of([CONFIG], [PROMPT, *given])
    assert experiment.trial_dir.is_relative_to(tmp_path / "here")
    recorded = experiment.record()
    assert recorded["exp_root_dir"] == str(tmp_path / "here")
    assert recorded["system"]["weights"] == str(tmp_path / "a" / "x.ckpt")
    assert recorded["resume"] == str(tmp_path / "b" / "y.ckpt")


def test_a_run_is_never_written_over_another(parsed):
    """``resume`` of one run into the folder of another."""
    (parsed.parents[1] / "ckpts").mkdir()
    (parsed.parents[1] / "ckpts" / "last.ckpt").touch()
    (stage,) = load_recipe([parsed], ["resume=/other/last.ckpt"])
    with pytest.raises(ConfigError, match="holds another run already"):
        _ = stage.resume_from
    (stage,) = load_recipe([parsed], ["seed=5"])
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(seed\)"):
        _ = stage.resume_from
    (stage,) = load_recipe([parsed], [f"resume={parsed.parents[1]}"])
    assert stage.resume_from == parsed.parents[1] / "ckpts" / "last.ckpt"
