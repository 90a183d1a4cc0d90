"""The command line, from end to end."""

import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from fourdfy.files.atomic import WriteError
from fourdfy.launching import train
from fourdfy.launching.cli import main
from fourdfy.ops import backends
from fourdfy.systems.checkpoint import read_checkpoint
from tests.commands import CONFIGS, ROOT, TINY, launch, trial

EXPERIMENTS = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Stage 3 trained for four steps, of all three kinds."""
    root = tmp_path_factory.mktemp("outputs")
    assert launch("shapes_stage_3.yaml", "train", root, *KINDS, "trainer.max_steps=4", *VALIDATE) == 0
    return root


KINDS = ("seed=1", "data.prob_multi_view=0.6")
VALIDATE = ("trainer.val_check_interval=2",)


def test_help_answers_within_two_seconds_and_imports_no_torch():
    began = time.perf_counter()
    code = """
import runpy, sys
sys.argv = ["launch.py", "--help"]
try:
    runpy.run_path("launch.py", run_name="__main__")
except SystemExit:
    assert "torch" not in sys.modules
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--check" in out.stdout
    assert time.perf_counter() - began < 2


def test_checking_and_finding_a_typo_import_no_library_that_takes_seconds(tmp_path):
    """What is left is PyTorch itself. Nor do the field's modules import numba before they use it."""
    code = """
import sys
from fourdfy.launching.cli import main
shapes = ["--config", "configs/shapes.yaml", "--gpu", "cpu", f"exp_root_dir={sys.argv[1]}"]
assert main([*shapes, "--check"]) == 0
for mode in ("--check", "--train"):
    assert main([*shapes, mode, "sede=1"]) == 2
import fourdfy.ops.hash_grid, fourdfy.scenes.nerf.implicit_volume
slow = {"torch._dynamo", "lightning_fabric", "pytorch_lightning", "diffusers", "transformers", "peft"}
slow |= {"numba", "scipy"}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    line = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stage 3/3" in done.stdout and done.stderr.count("did you mean 'seed'") == 2
    assert not list(tmp_path.iterdir())


def test_importing_the_package_imports_no_model_library():
    code = "import fourdfy, sys; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_config_parses_and_shows_its_plan(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prompt = "system.prompt_processor.prompt=a panda dancing"
    assert main(["--config", str(path), "--check", "--gpu", "cpu", f"exp_root_dir={tmp_path}", prompt]) == 0
    shown = capsys.readouterr().out
    assert "multi_view" in shown
    assert "memory, roughly" in shown
    assert not list(tmp_path.iterdir())


def test_checking_loads_no_weights(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    for user in ("latent", "videocrafter"):
        monkeypatch.setattr(f"fourdfy.priors.{user}.load_part", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    assert launch("shapes.yaml", "check", tmp_path) == 0
    assert "stage 3/3" in capsys.readouterr().out


def test_a_trial_folder_holds_what_the_documentation_says(trained):
    folder = trial(trained, "shapes_stage_3")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {
        "ckpts/last.ckpt",
        "cmd.txt",
        "configs/parsed.yaml",
        "configs/raw.yaml",
        "code.zip",
        "csv_logs/version_0/metrics.csv",
        "save/it2-0.png",
        "save/it2-0_video.png",
        "save/it2-0_video.mp4",
        "save/it4-test.mp4",
        "save/it4-test/0.png",
        "save/it4-test_static.mp4",
        "save/it4-test-depth-jet.mp4",
        "save/it4-test-depth/0.png",
    } <= names
    assert list(folder.glob("tb_logs/version_0/events*"))


def test_a_run_says_little_unless_asked(tmp_path, caplog):
    backends._log_once.cache_clear()
    assert launch("shapes_stage_1.yaml", "train", tmp_path, "trainer.max_steps=1") == 0
    begun, ended = [record.getMessage() for record in caplog.records]
    assert begun == f"stage 1/1 shapes_stage_1: writing to {trial(tmp_path, 'shapes_stage_1')}"
    assert ended.startswith("done in")


def test_verbose_shows_the_gradients_and_the_back_end(tmp_path, caplog):
    backends._log_once.cache_clear()
    assert launch("shapes_stage_1.yaml", "train", tmp_path, "trainer.max_steps=1", "--verbose") == 0
    assert "gradients at the first multi_view step" in caplog.text and "back end for" in caplog.text


def test_losses_are_logged_by_step_kind(trained):
    header = (trial(trained, "shapes_stage_3") / "csv_logs/version_0/metrics.csv").read_text().split("\n")[0]
    logged = set(header.split(","))
    assert {f"loss/{name}" for name in ("multi_view/sds", "single_view/vsd", "video/sds_video")} <= logged
    assert "loss/single_view/lora" not in logged  # this stage has no optimizer group for the LoRA


def test_a_checkpoint_holds_what_is_trained_and_no_frozen_prior(trained):
    path = trial(trained, "shapes_stage_3") / "ckpts" / "last.ckpt"
    keys = read_checkpoint(path)["state_dict"].keys()
    prefixes = {key.split(".")[0] for key in keys}
    assert prefixes == {"geometry", "background", "renderer", "guidance_single_view"}
    guidance = [key for key in keys if key.startswith("guidance")]
    assert all(key.split(".")[1] in ("lora", "camera_embedding") for key in guidance)


def test_a_trial_is_tested_and_evaluated_from_its_own_config(trained, capsys):
    folder = trial(trained, "shapes_stage_3")
    resume = f"resume={folder}/ckpts/last.ckpt"
    for file in (folder / "save").glob("it4-*"):
        if file.is_file():
            file.unlink()
    config = folder / "configs" / "parsed.yaml"
    assert launch(config, "test", trained, "seed=1", resume) == 0
    assert (folder / "save" / "it4-test.mp4").exists()
    assert launch(config, "validate", trained, "seed=1", resume) == 0
    assert (folder / "save" / "it4-0.png").exists()
    assert launch(config, "evaluate", trained, "seed=1", resume) == 0
    assert "silhouette IoU" in capsys.readouterr().out
    assert (folder / "save" / "it4-evaluation.json").exists()
    report = (folder / "report.html").read_text()
    assert re.search(r"<th>psnr</th><td>highest</td>", report)


def test_resuming_equals_an_uninterrupted_run_bit_for_bit(trained, tmp_path):
    assert launch("shapes_stage_3.yaml", "train", tmp_path, *KINDS, *VALIDATE) == 0
    last = trial(tmp_path, "shapes_stage_3") / "ckpts" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 2
    assert launch("shapes_stage_3.yaml", "train", tmp_path, *KINDS, "trainer.max_steps=4", *VALIDATE) == 0
    resumed, whole = (
        read_checkpoint(trial(root, "shapes_stage_3") / "ckpts" / "last.ckpt") for root in (tmp_path, trained)
    )
    assert resumed["global_step"] == whole["global_step"] == 4
    with open(trial(tmp_path, "shapes_stage_3") / "csv_logs/version_0/metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2", "3"]  # it went on
    for key, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], value), key
    moments = [c["optimizer_states"][0]["state"] for c in (resumed, whole)]
    for index, state in moments[1].items():
        assert all(torch.equal(moments[0][index][key], value) for key, value in state.items())


def test_what_another_process_has_just_trained_is_not_trained_again(tmp_path, monkeypatch):
    given = ("shapes_stage_1.yaml", "train", tmp_path)
    own = train.owned

    def late(folder):  # another process comes between this one's look at the folder and its ownership
        monkeypatch.setattr(train, "owned", own)
        assert launch(*given) == 0
        return own(folder)

    monkeypatch.setattr(train, "owned", late)
    assert launch(*given) == 0
    assert len(json.loads((trial(tmp_path, "shapes_stage_1") / "sessions.json").read_text())) == 1


def test_weights_start_the_next_stage_at_step_0(trained, tmp_path):
    weights = trial(trained, "shapes_stage_3") / "ckpts" / "last.ckpt"
    given = [f"system.weights={weights}", "trainer.max_steps=1"]
    assert launch("shapes_stage_3.yaml", "train", tmp_path, *given) == 0
    after = read_checkpoint(trial(tmp_path, "shapes_stage_3") / "ckpts" / "last.ckpt")
    before = read_checkpoint(weights)
    assert after["global_step"] == 1
    # This stage leaves the static grid alone; a fresh one would differ, as the two runs' seeds do.
    static = "geometry.encoding.encoding.encoding.params"
    assert torch.equal(after["state_dict"][static], before["state_dict"][static])
    # One AdamW step moves an entry by its learning rate and 1 % of that as decay; four went further.
    moving = "geometry.encoding.encoding.encoding_time.params"
    config = OmegaConf.load(trial(tmp_path, "shapes_stage_3") / "configs" / "parsed.yaml")
    one_step = 1.01 * config.system.optimizer.params[moving.removesuffix(".params")].lr
    assert before["state_dict"][moving].abs().max() > 2 * one_step
    assert 0 < (after["state_dict"][moving] - before["state_dict"][moving]).abs().max() <= one_step


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "system.geometry.denisty_bias=3",
            "system.geometry.denisty_bias (in the command line): unknown key; did you mean 'density_bias'?",
        ),
        ("data.multi_view.batch_size=6", "n_view=4"),
        ("data.single_view.fovy_range=[15]", "data.single_view.fovy_range (in the command line): "),
        ("system.loss.lambda_sparsty=1", "there is no such loss"),
        (
            "system.guidance_type_multi_view=multivew-diffusion-guidance",
            "did you mean 'multiview-diffusion-guidance'",
        ),
        ("system.optimizer.params={geometry.wings: {lr: 1}}", "leads nowhere at 'wings'"),
        ("system.prompt_processor_multi_view.pretrained_model_name_or_path=no/such-model", "Tried:"),
        (
            f"system.prompt_processor_multi_view.prompt={'very ' * 99}",
            "system.prompt_processor_multi_view: a prompt has",
        ),
        ("system.prompt_processor_multi_view.use_perp_neg=true", "view_dependent_prompting=true"),
        (
            "system.guidance_multi_view.height=63",
            "system.guidance_multi_view.height=63: fourdfy/shapes-4view",
        ),
    ],
)
def test_a_mistake_ends_with_one_error_before_any_training(override, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert launch("shapes_stage_1.yaml", "train", tmp_path, override) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("override", ["system.weights=no.ckpt", "resume=no.ckpt"])
def test_a_checkpoint_that_is_not_there_leaves_no_folder(override, tmp_path, capsys):
    assert launch("shapes_stage_1.yaml", "train", tmp_path, override) == 2
    assert "no.ckpt: no such checkpoint" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for mode in ("--check", "--train"):
        line = ["--config", str(CONFIGS / "shapes.yaml"), mode, "--gpu", "7", f"exp_root_dir={tmp_path}"]
        assert main(line) == 2
        assert capsys.readouterr().err == "error: --gpu 7: no such GPU; PyTorch sees only --gpu 0\n"
    assert not list(tmp_path.iterdir())


def test_what_a_scheduler_leaves_in_the_environment_changes_nothing(tmp_path):
    """Nor does a checkpoint in the working directory that Lightning's own would pick up; nor no git."""
    names = "LOCAL_RANK RANK GROUP_RANK NODE_RANK SLURM_PROCID SLURM_LOCALID JSM_NAMESPACE_RANK LSB_JOBID"
    sizes = "WORLD_SIZE SLURM_NTASKS SLURM_NTASKS_PER_NODE JSM_NAMESPACE_SIZE"
    given = {
        **dict.fromkeys(names.split(), "1"),
        **dict.fromkeys(sizes.split(), "4"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "train",
        "TORCHELASTIC_RUN_ID": "x",
        "PATH": str(tmp_path),
    }
    (tmp_path / "hpc_ckpt_1.ckpt").write_text("of some other run")
    config, root = str(CONFIGS / "shapes_stage_1.yaml"), "exp_root_dir=here"
    line = [sys.executable, ROOT / "launch.py", "--config", config, "--train", "--gpu", "cpu", root, *TINY]
    subprocess.run([*line, "trainer.max_steps=1"], cwd=tmp_path, env={**os.environ, **given}, check=True)
    folder = trial(tmp_path / "here", "shapes_stage_1")
    assert read_checkpoint(folder)["global_step"] == 1
    assert "loss/multi_view/sds" in (folder / "csv_logs/version_0/metrics.csv").read_text()
    assert list(folder.glob("tb_logs/version_0/events*"))


def test_a_run_in_a_thread_needs_no_signals(tmp_path):
    statuses = []
    run = partial(launch, "shapes_stage_1.yaml", "train", tmp_path, "trainer.max_steps=1")
    thread = threading.Thread(target=lambda: statuses.append(run()))
    thread.start()
    thread.join()
    assert statuses == [0]


# ---------------------------------------------------------------------------------------------
# Trials: where results go


@pytest.fixture
def moved(trained, tmp_path, monkeypatch):
    """The trained trial in another place, with another working directory."""
    folder = tmp_path / "moved, größer" / "trial"
    shutil.copytree(trial(trained, "shapes_stage_3"), folder)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return folder


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("given", ["--trial DIR", "--trial DIR/configs/parsed.yaml", "--config", "resume"])
def test_results_of_a_trial_go_into_it_wherever_it_is(given, moved, trained):
    parsed, before = moved / "configs" / "parsed.yaml", files_of(trained)
    named = {
        "--trial DIR": ["--trial", str(moved)],
        "--trial DIR/configs/parsed.yaml": ["--trial", str(parsed)],
        "--config": ["--config", str(parsed)],
        "resume": ["--config", str(CONFIGS / "shapes_stage_3.yaml"), f"resume={moved}"],
    }[given]
    sizes = [setting for setting in TINY if setting.startswith(("data.", "system."))]
    assert main([*named, "--validate", "--gpu", "cpu", *(sizes if given == "resume" else [])]) == 0
    assert (moved / "save" / "it4-0.png").exists()
    assert not list(Path.cwd().iterdir())
    assert files_of(trained) == before


def test_a_moved_trial_goes_on_in_its_folder(moved):
    """And not from where it began, even if that was another checkpoint."""
    began = OmegaConf.load(moved / "configs" / "parsed.yaml")
    OmegaConf.save(began | {"resume": "/gone/last.ckpt"}, moved / "configs" / "parsed.yaml")
    assert main(["--trial", str(moved), "--train", "--gpu", "cpu", "trainer.max_steps=5"]) == 0
    assert read_checkpoint(moved)["global_step"] == 5
    assert not list(Path.cwd().iterdir())
    assert len((moved / "cmd.txt").read_text().splitlines()) == 2
    other = ["--config", str(moved / "configs" / "parsed.yaml"), "system.loss.lambda_sparsity=3"]
    assert main([*other, "--train", "--gpu", "cpu"]) == 2  # a run of its own; --trial would go on so


def test_a_trial_offers_no_other_prompt(moved, capsys):
    assert main(["--trial", str(moved), "--check", "--gpu", "cpu"]) == 0
    assert "prompt: 'a red cube bouncing'\n" in capsys.readouterr().out


@pytest.mark.parametrize("other", [["seed=9"], ["--prompt", "a blue ball spinning"]])
def test_a_trial_does_not_become_another_scene_as_it_goes_on(moved, other, capsys):
    recorded = (moved / "configs" / "parsed.yaml").read_text()
    assert main(["--trial", str(moved), "--train", "--gpu", "cpu", "trainer.max_steps=5", *other]) == 2
    assert "holds a run with other settings (s" in capsys.readouterr().err
    assert (moved / "configs" / "parsed.yaml").read_text() == recorded


@pytest.mark.parametrize(
    ("mode", "result"),
    [("test", "it4-test.mp4"), ("validate", "it4-0.png"), ("evaluate", "it4-evaluation.json")],
)
def test_results_of_a_trial_that_can_t_be_written_go_to_a_folder_of_ones_choice(mode, result, moved, capsys):
    shutil.rmtree(moved / "save")
    (moved / "save").write_text("a file where the folder should be")
    before = files_of(moved)
    line = ["--trial", str(moved), f"--{mode}", "--gpu", "cpu"]
    assert main(line) == 2
    reason = f"{moved / 'save'} is a file where a folder is needed; results can go elsewhere: --out DIR"
    assert capsys.readouterr().err.endswith(f"error: {moved / 'save'} can't be written: {reason}\n")
    assert main([*line, "--out", "mine"]) == 0
    assert (Path("mine") / result).exists()
    assert files_of(moved) == before


def test_where_a_run_writes_is_not_said_by_out(capsys):
    with pytest.raises(SystemExit) as refused:
        main(["--config", "shapes", "--train", "--out", "mine"])
    assert refused.value.code == 2
    assert "--out says where an evaluation writes; for a run: exp_root_dir=DIR" in capsys.readouterr().err


def test_a_folder_that_is_no_trial_names_those_below_it(trained, capsys):
    assert main(["--trial", str(trained), "--test", "--gpu", "cpu"]) == 2
    folder = trial(trained, "shapes_stage_3")
    assert f"{trained}: not a trial folder (it has no configs/parsed.yaml); there are {folder}" in (
        capsys.readouterr().err
    )
    assert main(["--trial", str(folder / "ckpts" / "last.ckpt"), "--test"]) == 2


def test_evaluating_what_was_never_trained_says_so(tmp_path, capsys):
    assert launch("shapes.yaml", "test", tmp_path) == 2
    last = trial(tmp_path, "shapes_stage_3") / "ckpts"
    assert f"stage 3/3 shapes_stage_3: no checkpoint in {last}; train it first, or name what was trained" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_evaluating_a_trial_that_was_killed_before_its_first_checkpoint_says_how_to_train_it(
    trained, tmp_path, capsys
):
    killed = tmp_path / "killed"
    shutil.copytree(trial(trained, "shapes_stage_3") / "configs", killed / "configs")
    assert main(["--trial", str(killed), "--export", "--gpu", "cpu"]) == 2
    said = capsys.readouterr().err
    assert f"train it first: python launch.py --trial {killed} --train\n" in said


# ---------------------------------------------------------------------------------------------
# Errors of the system


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert launch("shapes_stage_1.yaml", "train", tmp_path / "file") == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"error: {tmp_path / 'file'}")
    assert said[-1].endswith("Not a directory; move away what is there")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/last.ckpt"), "/x/last.ckpt: No space left"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            "/x: Permission denied; check its permissions",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: Read-only file system; write elsewhere"),
        (
            WriteError(Path("/x"), OSError(errno.EFBIG, "File too large")),
            "/x can't be written: File too large; ",
        ),
    ],
)
def test_errors_of_the_disk_name_the_path_and_what_to_do(error, said, capsys, monkeypatch):
    def fail(*args, **keywords):
        raise error

    monkeypatch.setattr("fourdfy.launching.run.run", fail)
    assert main(["--config", "x.yaml", "--train"]) == 1
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file", "x"), KeyError("x")])
def test_an_error_of_ours_keeps_its_traceback(error, monkeypatch):
    def fail(*args, **keywords):
        raise error

    monkeypatch.setattr("fourdfy.launching.run.run", fail)
    with pytest.raises(type(error)):
        main(["--config", "x.yaml", "--train"])


def test_a_prompt_cannot_escape_the_output_folder(tmp_path):
    from fourdfy.launching.experiment import load_experiment

    overrides = [f"exp_root_dir={tmp_path}", "system.prompt_processor.prompt=../../etc/passwd"]
    folder = load_experiment([CONFIGS / "shapes_stage_1.yaml"], overrides).trial_dir
    assert folder.resolve().is_relative_to(tmp_path / "shapes_stage_1")
    assert ".." not in folder.name[:2]


def test_fetching_names_where_each_model_is(tmp_path, caplog):
    with caplog.at_level("INFO", "fourdfy.launching.plan"):
        assert launch("shapes.yaml", "fetch", tmp_path) == 0
    for name in ("fourdfy/shapes-image", "fourdfy/shapes-4view", "fourdfy/shapes-video"):
        assert any(record.message.startswith(f"{name}: in ") for record in caplog.records)


def test_fetching_offline_tells_all_that_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = str(CONFIGS / "fourdfy_stage_3_vc.yaml")
    assert main(["--config", config, "--fetch", "--gpu", "cpu"]) == 2
    said = capsys.readouterr().err
    for name in ("MVDream/MVDream", "stabilityai/stable-diffusion-2-1-base", "VideoCrafter/VideoCrafter2"):
        assert f"the model '{name}' was not found" in said
