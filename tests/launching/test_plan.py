"""What ``--check`` says of a run, against the peaks of docs/benchmarks.md."""

import json
import shutil
from pathlib import Path

import pytest

from fourdfy.config import ConfigError
from fourdfy.launching import plan
from fourdfy.launching.cli import main
from fourdfy.launching.experiment import Experiment, TrainerConfig, load_experiment
from fourdfy.launching.plan import memory_line
from fourdfy.launching.recipe import load_recipe
from fourdfy.prompts import base
from fourdfy.shapes.creature_prompts import GRAMMAR as CREATURES
from fourdfy.shapes.grammar import GRAMMAR
from tests.commands import CONFIGS, launch
from tests.tiny_models import save_zeroscope

PEAK_GIB = {
    "stage_3": 24.0,
    "stage_3_low_vram": 15.6,
    "stage_3_low_vram_vc": 16.1,
    "stage_3_low_vram_vc_deformation": 45.1,
    "stage_3_vc": 18.8,
    "stage_3_vc_deformation": 45.1,
}
"""The most that a few steps with all samples at once took on an H100, with ``system.compile=false``."""

STORED_GIB = {"MVDream": 1.8, "stabilityai": 1.8, "cerspense": 2.8, "VideoCrafter": 2.8}
"""U-Net and VAE in 16 bits, by the first part of a model's name."""


def load(name: str, *overrides: str) -> Experiment:
    prompt = "system.prompt_processor.prompt=a panda dancing"
    return load_experiment([CONFIGS / f"fourdfy_{name}.yaml"], [prompt, *overrides])


@pytest.mark.parametrize("name", PEAK_GIB)
def test_the_memory_is_about_what_was_measured(name, monkeypatch):
    monkeypatch.setattr(plan, "stored_bytes", lambda model, parts: STORED_GIB[model.split("/")[0]] * 2**30)
    this = load(name)
    _, estimate = (size / 2**30 for size in plan._memory_estimate(this, this.build_system()))
    assert PEAK_GIB[name] / 1.5 < estimate < PEAK_GIB[name] * 1.33


def test_frames_in_the_vae_at_once_are_counted():
    config = load("stage_3_low_vram_vc").cfg.system.guidance_video
    one, all_16 = (
        load("stage_3_low_vram_vc", f"system.guidance_video.low_ram_vae={frames}").cfg.system.guidance_video
        for frames in (1, 16)
    )
    assert config.activation_bytes(16, 80, 128) == all_16.activation_bytes(16, 80, 128)
    assert all_16.activation_bytes(16, 80, 128) == 16 * one.activation_bytes(16, 80, 128)


def test_a_vae_in_float32_takes_twice_as_much():
    half, full = (
        load("stage_3", f"system.guidance_video.half_precision_weights={given}").cfg.system.guidance_video
        for given in ("true", "false")
    )
    assert full.activation_bytes(2, 80, 128) == 2 * half.activation_bytes(2, 80, 128) > 0


def test_every_stretch_of_resolutions_is_shown(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan.print_plan([load("stage_1")])
    shown = capsys.readouterr().out
    assert "8 frames of 64 x 64, then 4 frames of 256 x 256" in shown


@pytest.mark.parametrize("key", ["resume", "system.weights"])
def test_a_file_that_is_not_there_is_an_error_of_its_key(key, tmp_path, capsys):
    file = tmp_path / "last.ckpt"
    assert launch("shapes_stage_1.yaml", "check", tmp_path, f"{key}={file}") == 2
    assert f"error: {key}={file}: no such checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["check", "train"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage_3.system.optimizer.params.backgroun.lr=0.1", "leads nowhere at 'backgroun'; did you mean"),
        ("resume=last.ckpt", "resume: a recipe continues by itself"),
        ("system.weights=last.ckpt", "for one of them: stage_1.system.weights=last.ckpt"),
        ("name=one", "name=one: stages 1 and 2 would share the folder"),
        (
            "stage_3.system.optimizer.params.geometry.encoding.encoding.encoding_time=null",
            "shapes_stage_3: system.optimizer.params: no group holds anything that this stage trains",
        ),
    ],
)
def test_a_mistake_of_the_last_stage_is_found_before_the_first(mode, override, message, tmp_path, capsys):
    assert launch("shapes.yaml", mode, tmp_path, override) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_that_an_earlier_stage_will_write_are_no_error(tmp_path):
    stages = load_recipe([CONFIGS / "shapes.yaml"], [f"exp_root_dir={tmp_path}"])
    experiments = [stage.experiment for stage in stages]
    plan.check_files(experiments)
    with pytest.raises(ConfigError, match=r"system\.weights="):
        plan.check_files(experiments[1:])


def test_a_prompt_is_measured_with_the_tokenizer_that_is_here(tmp_path, capsys, caplog):
    long = f"system.prompt_processor_multi_view.prompt={'very ' * 99}"
    assert launch("shapes_stage_1.yaml", "check", tmp_path, long) == 2
    assert "error: system.prompt_processor_multi_view: a prompt has" in capsys.readouterr().err


def test_a_prompt_outside_the_grammar_is_warned_of(tmp_path, caplog):
    base._warn_once.cache_clear()
    prompt = "system.prompt_processor.prompt=a crimson cube bouncing"
    assert launch("shapes.yaml", "check", tmp_path, prompt) == 0
    assert [r.getMessage() for r in caplog.records if "crimson" in r.getMessage()] == [
        f"the models were not trained on such a prompt: 'crimson' is no colour of the shapes world; "
        f"did you mean 'green'? It knows {GRAMMAR}, and {CREATURES}"
    ]


def test_a_creature_is_nothing_that_the_flow_prior_knows(tmp_path, caplog):
    base._warn_once.cache_clear()
    assert launch("shapes_wan.yaml", "check", tmp_path, "system.prompt_processor.prompt=a panda dancing") == 0
    (said,) = {r.getMessage() for r in caplog.records if "trained on such a prompt" in r.getMessage()}
    assert "'panda' is no solid, and the flow transformer knows no creatures, only 'a COLOUR" in said


@pytest.fixture(scope="module")
def zeroscope(tmp_path_factory) -> Path:
    return save_zeroscope(tmp_path_factory.mktemp("models") / "zeroscope")


def test_a_model_of_another_kind_is_found_before_its_weights_are_read(zeroscope, tmp_path, capsys):
    models = [
        f"system.{key}_multi_view.pretrained_model_name_or_path={zeroscope}"
        for key in ("guidance", "prompt_processor")
    ]
    assert launch("shapes_stage_1.yaml", "check", tmp_path, *models) == 2
    expected = f"{zeroscope / 'unet'} holds a UNet3DConditionModel, expected a UNet2DConditionModel"
    assert expected in capsys.readouterr().err


def test_a_scheduler_that_is_not_understood_is_found_too(zeroscope, tmp_path, capsys):
    file = shutil.copytree(zeroscope, tmp_path / "model") / "scheduler" / "scheduler_config.json"
    file.write_text('{"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0}')
    models = [
        f"system.{key}_video.pretrained_model_name_or_path={tmp_path / 'model'}"
        for key in ("guidance", "prompt_processor")
    ]
    assert launch("shapes_stage_3.yaml", "check", tmp_path, *models) == 2
    assert f"error: {file} describes a CogVideoXDDIMScheduler" in capsys.readouterr().err


def test_what_is_missing_of_a_model_is_shown(zeroscope, tmp_path, capsys):
    copy = shutil.copytree(zeroscope, tmp_path / "model")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    model = f"system.guidance_video.pretrained_model_name_or_path={copy}"
    assert launch("shapes_stage_3.yaml", "check", tmp_path, model) == 0
    assert "lacks unet (diffusion_pytorch_model.safetensors is missing)" in capsys.readouterr().out


def test_control_characters_of_a_users_names_do_not_reach_the_terminal(tmp_path, capsys):
    evil, file = "/\x1b[31m\x07\u202e[bold]", tmp_path / "evil.yaml"
    model = {"pretrained_model_name_or_path": evil}
    file.write_text(
        json.dumps(
            {
                "base": str(CONFIGS / "shapes_stage_1.yaml"),
                "name": evil,
                "system": {"guidance_multi_view": model, "prompt_processor_multi_view": {"prompt": evil}},
            }
        )
    )
    assert launch(file, "check", tmp_path) == 0
    shown = capsys.readouterr().out
    assert shown.count("\\x1b[31m\\x07\\u202e[bold]") >= 2
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


@pytest.mark.parametrize("mode", ["check", "train"])
def test_a_recipe_says_which_prompt_it_takes_unless_one_is_given(mode, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr("fourdfy.launching.run.train_stages", lambda *_args, **_kwargs: (None, False))
    monkeypatch.setattr("fourdfy.launching.closing.log_closing", lambda *_args: None)
    given = ["--config", str(CONFIGS / "shapes.yaml"), f"--{mode}", "--gpu", "cpu"]
    for prompt in ([], ["--prompt", "a blue ball spinning"]):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert main([*given, f"exp_root_dir={tmp_path}", *prompt]) == 0
        said = capsys.readouterr().out + caplog.text
        own = f"prompt: 'a panda dancing', from {CONFIGS / 'shapes.yaml'}; to change it: --prompt TEXT"
        assert (own in said) == (not prompt)
        assert ("--prompt TEXT" in said) == (not prompt)


def test_training_finds_what_a_check_finds(tmp_path, capsys):
    long = f"stage_3.system.prompt_processor_video.prompt={'very ' * 99}"
    assert launch("shapes.yaml", "train", tmp_path, long) == 2
    assert "error: system.prompt_processor_video: a prompt has" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "it began all the same"


GIB = 2**30


@pytest.mark.parametrize(
    ("least", "at_once", "budget", "line"),
    [
        (10 * GIB, 60 * GIB, None, "60.0 GiB; a GPU with less, from 10.0 GiB on, takes several passes"),
        (10 * GIB, 60 * GIB, 24.0, "24.0 GiB"),
        (10 * GIB, 60 * GIB, 4.0, "10.0 GiB"),
        (10 * GIB, 10.5 * GIB, None, "10.5 GiB"),
        (10 * GIB, 12 * GIB, 24.0, "12.0 GiB"),
    ],
)
def test_the_memory_is_bounded_by_the_budget_and_by_what_is_needed(least, at_once, budget, line):
    assert memory_line(float(least), float(at_once), TrainerConfig(memory_budget_gb=budget)) == line


def test_models_that_are_not_here_stand_beside_the_memory_that_they_add_to():
    line = memory_line(10.0 * GIB, 60.0 * GIB, TrainerConfig(), ", plus that of the models")
    assert line.startswith("60.0 GiB, plus that of the models; a GPU with less")
