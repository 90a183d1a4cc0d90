"""What a run says at its end, where there is no ground truth or no ffmpeg."""

import json
import os
from pathlib import Path

import pytest

from fourdfy.evaluation.report import brief, read_report
from fourdfy.files import atomic
from fourdfy.launching.closing import ground_truth_of, log_closing
from fourdfy.launching.recipe import load_recipe
from tests.commands import launch, trial


def closing(caplog, root, config, prompt, *views):
    """The record for a config whose last stage has rendered ``views``, and the trial of that stage."""
    given = [
        f"exp_root_dir={root}",
        "use_timestamp=false",
        "tag=mine",
        f"system.prompt_processor.prompt={prompt}",
    ]
    stages = load_recipe([Path(config)], given)
    trial = stages[-1].experiment.trial_dir
    for view in views:
        (trial / "save" / view).mkdir(parents=True)
    with caplog.at_level("INFO", "fourdfy.launching.closing"):
        caplog.clear()
        with atomic.losses_noted() as missing:
            log_closing(stages, 3672.4, "cpu", missing)
    return caplog.records[-1].getMessage(), trial


@pytest.mark.parametrize(
    ("config", "prompt"),
    [
        ("fourdfy_stage_3", "a panda dancing"),
        ("shapes", "a zebra dancing"),
        ("shapes_stage_1", "a red cube spinning"),
    ],
    ids=["real models", "no prompt of the world", "a stage without motion"],
)
def test_without_a_ground_truth_the_next_commands_export(config, prompt, tmp_path, caplog):
    said, trial = closing(caplog, tmp_path, config, prompt, "it2-test")
    assert said.splitlines() == [
        "done in 61 min 12 s",
        f"  video   {trial / 'save' / 'it2-test'}",
        f"  next    python launch.py --trial {trial} --export",
        f"          python launch.py --trial {trial} --export system.exporter_type=video-exporter",
    ]


@pytest.mark.parametrize(
    ("called", "start"),
    [
        ("launch.py", "python launch.py"),
        ("/a clone/launch.py", "python '/a clone/launch.py'"),
        ("/usr/bin/fourdfy", "fourdfy"),
    ],
)
def test_the_commands_can_be_pasted_whatever_the_folders_are_called(
    called, start, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr("sys.argv", [called])
    said, trial = closing(
        caplog, tmp_path / "mein Ordner", "shapes_stage_1", "a red cube spinning", "it2-test"
    )
    assert f"  {start} --trial '{trial}' --export" in said


def test_the_views_of_the_last_step_are_named_as_a_video_if_there_is_one(tmp_path, caplog):
    config, prompt = "fourdfy_stage_3", "a panda dancing"
    said, trial = closing(caplog, tmp_path, config, prompt, "it2-test", "it10-test", "it10-test_static")
    assert f"video   {trial / 'save' / 'it10-test'}\n" in said
    for name in ("it9-test.mp4", "it10-test.mp4"):
        (trial / "save" / name).touch()
    (trial / "save" / "it2-test").touch()
    assert f"video   {trial / 'save' / 'it10-test.mp4'}\n" in closing(caplog, tmp_path, config, prompt)[0]


def test_a_result_that_cannot_be_copied_is_found_where_it_was_made(tmp_path, caplog):
    (tmp_path / "mine").write_text("a file where the result's folder should be")
    stages_video = tmp_path / "shapes_stage_3" / "mine" / "save" / "it2-test.mp4"
    stages_video.parent.mkdir(parents=True)
    stages_video.write_bytes(b"video")
    said, _ = closing(caplog, tmp_path, "shapes", "a zebra dancing")
    assert f"video   {stages_video}" in said
    assert (
        "result.mp4 could not be written" in caplog.text
        and "  missing result.mp4; the warnings say why\n" in said
    )


def test_a_run_whose_pictures_could_not_be_written_ends_all_the_same(tmp_path, caplog):
    said, trial = closing(caplog, tmp_path, "shapes_stage_1", "a red cube spinning")
    assert "  video   none could be written; --test renders it again\n" in said
    assert f"--trial {trial} --export" in said


def test_a_scene_that_was_judged_is_not_compared_with_the_truth_once_more(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("fourdfy.evaluation.scenes.evaluate_scene", None)  # the judge has its own name for it
    given = ("trainer.max_steps=1", "evaluation.after_training=true", "evaluation.metrics=[flicker]")
    with caplog.at_level("INFO"):
        assert launch("shapes_stage_3.yaml", "train", tmp_path, *given) == 0
    file = trial(tmp_path, "shapes_stage_3") / "save" / "it1-evaluation.json"
    first = json.loads(file.read_text())
    assert "flicker" in first
    assert f"  scores  {brief(read_report(file))}\n" in caplog.records[-1].getMessage()

    # Nor by the same command again without the judge, which keeps what --evaluate wrote.
    assert launch("shapes_stage_3.yaml", "train", tmp_path, *given[:1]) == 0
    assert json.loads(file.read_text()) == first
    assert f"  scores  {brief(read_report(file))}\n" in caplog.records[-1].getMessage()


def test_scores_of_an_earlier_scene_are_not_told_of_this_one(tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert launch("shapes_stage_3.yaml", "train", tmp_path, "trainer.max_steps=1") == 0
        ran = trial(tmp_path, "shapes_stage_3")
        file = ran / "save" / "it1-evaluation.json"
        first = json.loads(file.read_text())
        file.write_text(json.dumps(first | {"iou": 0.123}))
        os.utime(file, (0, (ran / "ckpts" / "last.ckpt").stat().st_mtime - 60))
        assert launch("shapes_stage_3.yaml", "train", tmp_path, "trainer.max_steps=1") == 0
    assert json.loads(file.read_text()) == first


def test_scores_that_can_not_be_told_cost_a_warning(tmp_path, caplog, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("fourdfy.launching.closing._scores", fail)
    said, _ = closing(caplog, tmp_path, "shapes_stage_1", "a red cube spinning", "it2-test")
    assert said.startswith("done in 61 min 12 s")
    assert "scores could not be written; the run continues (OSError: disk full)" in caplog.text


@pytest.mark.parametrize(
    ("config", "prompt", "learned"),
    [
        ("fourdfy_stage_3", "a panda dancing", False),
        ("shapes_stage_3", "a panda dancing", True),
        ("shapes_stage_3", "lib:panda_dancing", True),
        ("shapes_stage_3", "a red cube spinning", True),
        ("shapes_stage_3", "a zebra dancing", False),
    ],
)
def test_a_scene_is_compared_with_the_truth_only_of_what_its_models_learned(
    config, prompt, learned, tmp_path
):
    """The paper's first prompt is of the shapes world too, and a short name stands for its prompt."""
    (stage,) = load_recipe([Path(config)], [f"system.prompt_processor.prompt={prompt}"])
    assert stage.experiment.judged["learned"] == learned
    assert stage.experiment.judged["prompt"] == prompt.replace("lib:panda_dancing", "a panda dancing")
    assert (ground_truth_of(stage.experiment) is not None) == learned
