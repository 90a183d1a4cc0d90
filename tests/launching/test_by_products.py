"""What a run can do without, what it can't, and what is made again after a kill."""

import logging
import shutil

import pytest

from fourdfy.callbacks.base import Callback
from fourdfy.callbacks.renders import SaveRenders
from fourdfy.config import ConfigError
from fourdfy.files.atomic import HOST, WriteError, losses_noted, write_whole
from fourdfy.launching.experiment import PARSED, trial_arguments
from fourdfy.launching.lightning import LightningSystem
from fourdfy.launching.recipe import load_recipe
from fourdfy.systems.checkpoint import read_checkpoint
from tests.commands import CONFIGS, TINY, launch, trial
from tests.runs import new_run

CONFIG = "shapes_stage_1.yaml"
VALIDATE = "trainer.val_check_interval=1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("outputs")
    assert launch(CONFIG, "train", root, VALIDATE) == 0
    return root


@pytest.fixture
def copy(trained, tmp_path):
    """The root of a trial's copy, which is as it was."""
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def rendered(monkeypatch):
    """The evaluations that are written meanwhile, by step."""
    written = []

    def noted(name, hook):
        def note(self, run):
            written.append((name, run.step))
            hook(self, run)

        return note

    for name in ("validation", "test"):
        hook = getattr(SaveRenders, f"after_{name}")
        monkeypatch.setattr(SaveRenders, f"after_{name}", noted(name, hook))
    return written


def pictures(root):
    save = trial(root, "shapes_stage_1") / "save"
    return {path.relative_to(save): path.read_bytes() for path in save.rglob("*") if path.is_file()}


def test_a_run_goes_on_without_all_that_it_can_do_without(tmp_path, caplog, rendered):
    folder, ways = trial(tmp_path, "shapes_stage_1"), ("save", "tb_logs", "csv_logs", "cmd.txt", "code.zip")
    folder.mkdir(parents=True)
    for name in ways:  # a folder where the file should be, and the other way round
        (folder / name).mkdir() if "." in name else (folder / name).touch()
    with caplog.at_level(logging.INFO):
        assert launch(CONFIG, "train", tmp_path, VALIDATE) == 0
    assert read_checkpoint(folder)["global_step"] == 2
    lost = (
        "cmd.txt",
        "the copy of the code",
        "curves",
        "validation images",
        "test images and videos (--test",
    )
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for what, said in zip(lost, warnings, strict=True):
        assert said.startswith(f"{what}") and "could not be written; the run continues (" in said
    closing = caplog.records[-1].getMessage()
    assert "none could be written; --test renders it again" in closing
    assert f"  missing {', '.join(lost)} renders them again); the warnings say why\n" in closing
    # The same command makes up for the pictures, and then has nothing to do.
    (folder / "save").unlink()
    for _ in range(2):
        assert launch(CONFIG, "train", tmp_path, VALIDATE) == 0
    assert rendered == [("validation", 1), ("validation", 2), ("test", 2), ("validation", 2), ("test", 2)]
    assert caplog.records[-2].getMessage().startswith("stage 1/1 shapes_stage_1: finished already")


class Snapshots(Callback):
    def after_test(self, run):
        write_whole(run.folder / "mine.txt", "")


def test_a_callback_of_one_s_own_may_fail_to_write_too(tmp_path, caplog):
    (tmp_path / "file").touch()
    mine, essential = Snapshots(), Snapshots()
    essential.is_essential = True
    with losses_noted():
        LightningSystem(new_run(folder=tmp_path / "file"), {"mine": mine}).tell("after_test")
    reason = f"{tmp_path / 'file'} is a file where a folder is needed"
    assert caplog.records[-1].getMessage().startswith("files of the callback 'mine' could not be written; ")
    with pytest.raises(WriteError, match=reason):
        LightningSystem(new_run(folder=tmp_path / "file"), {"mine": essential}).tell("after_test")


def test_a_run_does_not_begin_without_its_checkpoints(tmp_path, capsys, rendered):
    folder = trial(tmp_path, "shapes_stage_1")
    folder.mkdir(parents=True)
    (folder / "ckpts").write_text("a file where the folder should be")
    assert launch(CONFIG, "train", tmp_path, VALIDATE) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    reason = f"{folder / 'ckpts'} is a file where a folder is needed; move away what is there"
    assert said == f"error: {folder / 'ckpts'} can't be written: {reason}"
    assert not rendered and [path.name for path in folder.iterdir()] == ["ckpts", ".lock"]


def test_pictures_that_a_kill_has_torn_or_left_out_are_made_again(copy, trained, rendered):
    save = trial(copy, "shapes_stage_1") / "save"
    (save / "it2-0.png").unlink()
    (save / "it2-test.mp4").write_bytes(b"torn")
    (save / f".it2-0.{HOST}-999999999-00000000-0.tmp.png").touch()
    assert launch(CONFIG, "train", copy, VALIDATE) == 0
    assert rendered == [("validation", 2), ("test", 2)]
    assert pictures(copy) == pictures(trained)


@pytest.mark.parametrize("mode", ["train", "test"])
def test_what_a_killed_writer_left_goes_although_all_is_trained(copy, mode):
    left = trial(copy, "shapes_stage_1") / "save" / f".it2-test.{HOST}-999999999-00000000-0.tmp.mp4"
    left.touch()
    assert launch(CONFIG, mode, copy, VALIDATE) == 0
    assert not left.exists()


@pytest.mark.parametrize("end", [0, 100, -1, None])
def test_a_config_that_is_torn_or_gone_is_told_from_another_one(end, copy, caplog, capsys):
    folder = trial(copy, "shapes_stage_1")
    whole = (folder / PARSED).read_text()
    if end is None:
        (folder / PARSED).unlink()
    else:
        (folder / PARSED).write_text(whole[: whole.index("resume:") if end == -1 else end])
    (stage,) = load_recipe([CONFIGS / CONFIG], [*TINY, f"exp_root_dir={copy}"])
    assert stage.is_trained
    assert "is missing or damaged: whether the trial began with other settings can't" in caplog.text
    how = "missing" if end is None else "damaged"
    with pytest.raises(ConfigError, match=f"is {how}; it is written anew if you repeat the command in "):
        trial_arguments(folder)
