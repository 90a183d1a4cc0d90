"""Recipes: three stages in one command, resumable."""

import logging
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import fourdfy
from fourdfy.config import ConfigError
from fourdfy.launching.lightning import LightningSystem
from fourdfy.launching.recipe import load_recipe, makes_another_run
from fourdfy.systems import checkpoint
from fourdfy.systems.checkpoint import read_checkpoint, scene_hash
from tests.commands import CONFIGS, TINY, launch, trial

STAGES = ("shapes_stage_1", "shapes_stage_2", "shapes_stage_3")


@pytest.fixture
def steps(monkeypatch):
    """(stage's first guidance, global step) of every training step that is computed."""
    computed = []
    original = LightningSystem.training_step

    def counted(self, batch, batch_idx):
        computed.append((Path(self.trainer.default_root_dir).parent.name, self.global_step))
        for action in counted.actions.get(len(computed), ()):
            action()
        return original(self, batch, batch_idx)

    counted.actions = {}
    computed_actions = counted.actions
    monkeypatch.setattr(LightningSystem, "training_step", counted)
    return computed, computed_actions


def crash():
    raise RuntimeError("power cut")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A recipe of the first two stages."""
    file = tmp_path_factory.mktemp("recipe") / "two.yaml"
    file.write_text(f"stages: [{CONFIGS / 'shapes_stage_1.yaml'}, {CONFIGS / 'shapes_stage_2.yaml'}]\n")
    return file


def test_a_recipe_runs_all_stages_each_from_the_one_before(tmp_path, steps, caplog):
    computed, _ = steps
    assert launch("shapes.yaml", "train", tmp_path) == 0
    assert computed == [(name, step) for name in STAGES for step in (0, 1)]
    for before, name in pairwise(STAGES):
        raw = (trial(tmp_path, name) / "configs" / "parsed.yaml").read_text()
        assert f"weights: {trial(tmp_path, before)}/ckpts/last.ckpt" in raw
    last = trial(tmp_path, STAGES[2])
    result = tmp_path / "tiny" / "result.mp4"
    assert result.read_bytes() == (last / "save/it2-test.mp4").read_bytes()
    for text in (
        f"video   {result}",
        "scores  IoU 0.",
        f"next    python launch.py --trial {last} --export",
    ):
        assert text in caplog.records[-1].getMessage()
    (scores,) = (line for line in caplog.records[-1].getMessage().splitlines() if "scores" in line)
    assert len(scores) < 80
    assert (last / "save/it2-evaluation.json").exists()


def test_a_stopped_recipe_goes_on_and_computes_nothing_twice(two, tmp_path, steps):
    computed, actions = steps
    given = ("trainer.max_steps=3", "checkpoint.every_n_train_steps=100")
    actions[4] = [lambda: os.kill(os.getpid(), signal.SIGTERM)]  # in stage 2, step 1 of 3
    with pytest.raises(SystemExit) as stopped:
        launch(two, "train", tmp_path, *given)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len(computed) == 4
    assert launch(two, "train", tmp_path, *given) == 0
    assert computed == [(name, step) for name in STAGES[:2] for step in range(3)]
    computed.clear()
    assert launch(two, "train", tmp_path, *given) == 0
    assert computed == []


def test_a_crash_costs_only_the_steps_since_the_last_checkpoint(two, tmp_path, steps):
    computed, actions = steps
    given = ("trainer.max_steps=4", "checkpoint.every_n_train_steps=2")
    actions[8] = [crash]  # in stage 2, before its fourth step (3); last.ckpt is of step 2
    with pytest.raises(RuntimeError, match="power cut"):
        launch(two, "train", tmp_path, *given)
    actions.clear()
    assert launch(two, "train", tmp_path, *given) == 0
    again = [step for step in computed if computed.count(step) > 1]
    assert set(again) == {("shapes_stage_2", 2), ("shapes_stage_2", 3)}


def test_a_folder_with_other_settings_is_not_mixed_with_this_run(begun, tmp_path, capsys):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    given = ("trainer.max_steps=1", "system.loss.lambda_sparsity=3")
    assert launch("shapes_stage_1.yaml", "train", tmp_path, *given) == 2
    message = capsys.readouterr().err
    assert "system.loss.lambda_sparsity" in message
    assert "tag=" in message
    assert last(tmp_path, STAGES[0])["global_step"] == 1


def test_an_override_can_be_for_one_stage(tmp_path):
    stages = load_recipe([CONFIGS / "shapes.yaml"], ["stage_2.trainer.max_steps=7", "seed=5"])
    assert [stage.experiment.cfg.trainer.max_steps == 7 for stage in stages] == [False, True, False]
    assert all(stage.experiment.cfg.seed == 5 for stage in stages)
    with pytest.raises(ConfigError, match=r"^stage_\d: .* has 3 stages$"):
        load_recipe([CONFIGS / "shapes.yaml"], ["stage_4.seed=1"])
    with pytest.raises(ConfigError, match="is not a recipe"):
        load_recipe([CONFIGS / "shapes_stage_1.yaml"], ["stage_1.seed=1"])


def test_a_checkpoint_is_read_to_see_where_it_stands_and_once_more_to_continue(again, tmp_path, monkeypatch):
    def counted(path):
        reads.append(path)
        return read_file(path)

    reads, read_file = [], checkpoint.read_torch_file
    monkeypatch.setattr(checkpoint, "read_torch_file", counted)
    trained(CONFIGS / "shapes_stage_1.yaml", tmp_path, "trainer.max_steps=2")
    assert len(reads) == 4  # also before it is replaced, and by fourdfy.train to return the scene


def test_resume_of_a_finished_stage_says_how_to_train_on(again, tmp_path, caplog):
    given = f"stage_1.resume={trial(tmp_path, STAGES[0])}/ckpts/last.ckpt"
    with caplog.at_level(logging.INFO, logger="fourdfy"):
        again(given)
    (first, second) = [text for text in caplog.messages if "finished already" in text]
    assert first.endswith(": step 1 is its last; to train on, set stage_1.trainer.max_steps to more than 1")
    assert second.endswith(f"in {trial(tmp_path, STAGES[1])}")


# ---------------------------------------------------------------------------------------------
# What a stage grew from


def trained(config, root, *given):
    """Without test views; one step per stage unless given otherwise."""
    given = (*TINY, "trainer.max_steps=1", *given)
    return fourdfy.train(config, [f"exp_root_dir={root}", *given], device="cpu", test=False)


@pytest.fixture(scope="module")
def begun(two, tmp_path_factory):
    """The folder in which they were trained for one step per stage."""
    root = tmp_path_factory.mktemp("outputs")
    trained(two, root)
    return root


@pytest.fixture
def again(two, begun, tmp_path):
    """Trains a copy of them again, with other settings."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    return lambda *given: trained(two, tmp_path, *given)


def last(root, name):
    return read_checkpoint(trial(root, name) / "ckpts" / "last.ckpt")


def test_a_longer_recipe_is_refused_before_it_trains_and_redone_if_that_is_asked_for(
    two, again, tmp_path, tmp_path_factory
):
    weights = trial(tmp_path, STAGES[0]) / "ckpts" / "last.ckpt"
    refusal = f"stage 2/2 {STAGES[1]}: it grew from {weights}, which will change; .*weights_changed=redo;"
    with pytest.raises(ConfigError, match=refusal):
        again("trainer.max_steps=2")
    assert last(tmp_path, STAGES[0])["global_step"] == 1
    again("trainer.max_steps=2", "checkpoint.weights_changed=redo")
    at_once = tmp_path_factory.mktemp("at_once")
    trained(two, at_once, "trainer.max_steps=2")
    redone, straight = (last(root, STAGES[1])["state_dict"] for root in (tmp_path, at_once))
    for key, value in straight.items():
        assert torch.equal(redone[key], value), key
    assert read_checkpoint(tmp_path / STAGES[1] / "tiny.old1")["global_step"] == 1
    again("trainer.max_steps=2")  # it grew from what is there now


def test_a_stage_that_was_trained_longer_by_itself_is_noticed(again, tmp_path, caplog):
    trained(CONFIGS / "shapes_stage_1.yaml", tmp_path, "trainer.max_steps=2")
    with pytest.raises(ConfigError, match=r"ckpts/last\.ckpt, which has changed since"):
        again()
    file = trial(tmp_path, STAGES[1]) / "ckpts" / "last.ckpt"
    before = file.read_bytes()
    again("checkpoint.weights_changed=keep")
    assert "has changed since; it stays as it is" in caplog.text
    assert file.read_bytes() == before


def test_a_first_stage_that_was_deleted_is_noticed_before_it_is_trained(again, tmp_path, steps):
    shutil.rmtree(trial(tmp_path, STAGES[0]))
    with pytest.raises(ConfigError, match=r"ckpts/last\.ckpt, which will change"):
        again()
    assert steps[0] == []


def test_a_damaged_first_stage_is_trained_again_and_the_second_continues(again, tmp_path, steps):
    """It ends as it did, bit for bit."""
    again("stage_1.trainer.max_steps=2", "checkpoint.weights_changed=redo")
    path = trial(tmp_path, STAGES[0]) / "ckpts" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-1])
    steps[0].clear()
    again("trainer.max_steps=2")
    assert steps[0] == [(STAGES[0], 1), (STAGES[1], 1)]
    assert last(tmp_path, STAGES[1])["grew_from"] == scene_hash(path)


def test_what_a_step_out_of_memory_advises_can_be_set_in_the_same_folder(again, steps):
    fewer = ("system.renderer.train_max_nums_static=2000", "system.guidance_multi_view.low_ram_vae=2")
    again(*fewer, "stage_2.trainer.max_steps=2")
    assert steps[0] == [(STAGES[1], 1)]


@pytest.mark.parametrize(
    "key",
    [
        "system.compile",
        "system.exporter.lit",
        "system.guidance_video.shard_over_ranks",
        "system.guidance.enable_attention_slicing",
        "data.single_view.eval_batch_size",
    ],
)
def test_what_changes_no_scene_makes_no_other_run(key):
    assert not makes_another_run(key)
    assert makes_another_run("system.guidance.half_precision_weights")


def test_what_changes_every_step_makes_another_run(again):
    for changed in ("precision=bf16-mixed", "gradient_clip_val=1", "accumulate_grad_batches=2"):
        with pytest.raises(ConfigError, match=rf"other settings \(trainer\.{changed.partition('=')[0]}\)"):
            again(f"trainer.{changed}")
    again("trainer.precision=32", "trainer.gradient_clip_val=null")  # the defaults
