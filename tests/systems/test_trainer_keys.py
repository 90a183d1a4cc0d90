"""Training: accumulated steps, schedulers, kept checkpoints, and what may change on resuming."""

import os
import shutil

import pytest
import torch

from fourdfy.config import ConfigError
from fourdfy.launching.experiment import CheckpointConfig, TrainerConfig, load_experiment
from fourdfy.launching.lightning import build_loops
from fourdfy.systems.checkpoint import read_checkpoint
from tests.commands import CONFIGS, TINY, launch, trial

DECAY = "{name: ExponentialLR, interval: step, args: {gamma: 0.5}}"
GIVEN = (
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=2",
    "checkpoint.every_n_train_steps=2",
    "checkpoint.save_top_k=-1",
    f"system.scheduler={DECAY}",
)


def train(root, *overrides):
    return launch("shapes_stage_1.yaml", "train", root, *GIVEN, *overrides)


def checkpoint(root, name="last"):
    return read_checkpoint(trial(root, "shapes_stage_1") / "ckpts" / f"{name}.ckpt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four steps of two batches each, without a stop."""
    root = tmp_path_factory.mktemp("whole")
    assert train(root, "trainer.max_steps=4") == 0
    return root


def assert_equal(resumed, straight):
    assert resumed["global_step"] == straight["global_step"] == 4
    for key, value in straight["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], value), key


def test_accumulated_steps_under_a_scheduler_resume_bit_for_bit(whole, tmp_path):
    assert train(tmp_path) == 0
    assert train(tmp_path, "trainer.max_steps=4") == 0
    resumed, straight = checkpoint(tmp_path), checkpoint(whole)
    assert_equal(resumed, straight)
    rates = [[g["lr"] for g in c["optimizer_states"][0]["param_groups"]] for c in (resumed, straight)]
    assert rates[0] == rates[1] == [0.02 / 16, 0.005 / 16, 0.005 / 16]


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(whole, tmp_path, caplog):
    root = shutil.copytree(whole, tmp_path / "outputs")
    last = trial(root, "shapes_stage_1") / "ckpts" / "last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    assert train(root, "trainer.max_steps=4") == 0
    assert "using the one before, last.previous.ckpt" in caplog.text
    assert_equal(checkpoint(root), checkpoint(whole))


def test_every_save_is_kept_where_that_is_asked_for(whole):
    files = (trial(whole, "shapes_stage_1") / "ckpts").iterdir()
    assert {file.name for file in files} == {"last.ckpt", "last.previous.ckpt", "step_2.ckpt", "step_4.ckpt"}
    assert checkpoint(whole, "step_2")["global_step"] == 2


def test_resuming_takes_the_learning_rates_given_anew(whole, tmp_path):
    resume = f"resume={trial(whole, 'shapes_stage_1')}/ckpts/last.ckpt"
    given = ["system.scheduler=null", "system.optimizer.args.weight_decay=0", "trainer.max_steps=5"]
    rates = "system.optimizer.params={geometry.encoding: {lr: 0.0}, geometry.density_network: {lr: 0.25}}"
    assert train(tmp_path, resume, *given, rates) == 0
    before, after = checkpoint(whole), checkpoint(tmp_path)
    assert after["global_step"] == 5
    moved = {"encoding.encoding.encoding.params": (0, 0), "density_network.layers.0.weight": (0.05, 1)}
    for name, (least, most) in moved.items():
        old, new = (held["state_dict"][f"geometry.{name}"] for held in (before, after))
        assert least <= (new - old).abs().max() <= most


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "system.optimizer.name=Adam",
            "system.optimizer.name: the checkpoint's optimizer has the class AdamW",
        ),
        (
            "system.optimizer.params={geometry.feature_network: null}",
            "system.optimizer.params.geometry.feature_network: the checkpoint's optimizer has such a group",
        ),
        (
            "system.geometry.mlp_network_config.n_neurons=8",
            "resume: geometry.density_network.layers.0.weight has",
        ),
        (
            "system.geometry.mlp_network_config.n_hidden_layers=2",
            "resume: the checkpoint lacks geometry.density_network.layers.4.weight",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused_by_name(whole, tmp_path, capsys, override, message):
    resume = f"resume={trial(whole, 'shapes_stage_1')}/ckpts/last.ckpt"
    assert train(tmp_path, resume, override, "trainer.max_steps=5") == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("devices=2", "devices=2: --gpu 0,1 or torchrun says where it runs"),
        ("devices=[0,1]", "devices=.*: --gpu 0,1 or torchrun says where it runs"),
        ("num_nodes=2", "num_nodes=2: --gpu 0,1 or torchrun says where it runs"),
        ("check_val_every_n_epoch=5", "training is one epoch; set val_check_interval"),
        ("val_check_interval=2.5", "expected whole steps, or a fraction"),
        ("accumulate_grad_batches=0", "accumulate_grad_batches"),
        ("gradient_clip_algorithm=value", "nothing is clipped; set gradient_clip_val"),
        ("gradient_clip_algorithm=nrm", "gradient_clip_algorithm"),
    ],
)
def test_trainer_keys_that_cannot_work_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment([CONFIGS / "shapes_stage_1.yaml"], [*TINY, f"trainer.{override}"])


@pytest.mark.parametrize(("given", "steps"), [(0, 0), (30, 30), (30.0, 30), (1, 1), (1.0, 200), (0.25, 50)])
def test_validation_comes_after_steps_or_a_share_of_them(given, steps):
    assert TrainerConfig(max_steps=200, val_check_interval=given).steps_between_validations == steps


@pytest.mark.parametrize(
    ("every", "max_steps", "expected"), [(9000, 9000, 1000), (50, 240, 50), (100, 3, 100)]
)
def test_saving_once_at_the_end_of_a_long_run_is_warned_of_and_not_done(every, max_steps, expected, caplog):
    assert CheckpointConfig(every_n_train_steps=every).interval(max_steps) == expected
    assert ("is the whole run" in caplog.text) == (every != expected)


def test_trainer_keys_reach_the_trainer(tmp_path):
    keys = {"accumulate_grad_batches": 3, "limit_val_batches": 2, "gradient_clip_val": 0.5}
    given = [f"trainer.{key}={value}" for key, value in keys.items()]
    given += ["trainer.gradient_clip_algorithm=value", "trainer.detect_anomaly=true"]
    given += ["trainer.max_steps=40", "trainer.val_check_interval=0.25"]
    cfg = load_experiment([CONFIGS / "shapes_stage_1.yaml"], [*TINY, *given]).cfg.trainer
    trainer = build_loops(cfg, tmp_path, "cpu")
    assert {key: getattr(trainer, key) for key in keys} == keys
    assert trainer.gradient_clip_algorithm == "value" and trainer._detect_anomaly
    assert trainer.val_check_interval == 10 * 3  # Lightning counts batches


def test_half_precision_on_a_cpu_says_what_is_used(tmp_path, caplog):
    given = ["trainer.precision=16"]
    cfg = load_experiment([CONFIGS / "shapes_stage_1.yaml"], [*TINY, *given]).cfg.trainer
    trainer = build_loops(cfg, tmp_path, "cpu")
    assert trainer.precision == "bf16-mixed"
    assert "trainer.precision=16: not possible on a CPU; bf16-mixed is used" in caplog.text
