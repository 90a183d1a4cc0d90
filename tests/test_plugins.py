"""The README's plugins, as printed, from a folder of their own through the real command line."""

import re
import shlex
import subprocess
import sys
import zipfile

import pytest
import torch
import yaml

import fourdfy
from fourdfy import registry
from fourdfy.launching.cli import main
from fourdfy.systems.checkpoint import read_checkpoint
from tests.commands import ROOT, TINY, trial

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = tuple(word for word in TINY if "prompt" not in word)
VIDEO_STEPS = ("data.prob_multi_view=0", "data.single_view.prob_single_view_video=1")


def printed(title, name, folder):
    """The command line of a section of the README, whose plugin is then in ``folder``, and its code."""
    section = README.partition(f"## {title}")[2].partition("\n## ")[0]
    code, command = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("python", "bash"))
    folder.mkdir()
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    python, *words = shlex.split(command.replace("\\\n", "").replace("<this clone>", str(ROOT)))
    assert python == "python"
    return words, code


def train(words, folder, root, *given):
    line = [sys.executable, *words, "--gpu", "cpu", f"exp_root_dir={root}", *SMALL, *given]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return trial(root, "shapes_stage_3")


def test_the_readme_s_guidance_trains_as_printed_and_its_trial_needs_no_more(tmp_path, monkeypatch, capfd):
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    elsewhere.mkdir()
    words, code = printed("Plug in a guidance", "my_guidance", folder)
    made = train(words, folder, tmp_path / "out", *VIDEO_STEPS)
    assert zipfile.ZipFile(made / "code.zip").read("plugins/my_guidance.py").decode() == code

    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.chdir(elsewhere)
    parsed = ["--config", str(made / "configs" / "parsed.yaml"), "--gpu", "cpu"]
    assert main([*parsed, "--check"]) == 0
    assert "my-guidance" in capfd.readouterr().out
    assert main([*parsed, "--test", f"resume={made / 'ckpts' / 'last.ckpt'}"]) == 0
    assert sys.modules["my_guidance"].__file__ == str(folder / "my_guidance.py")
    for mode in ("--test", "--export"):
        assert main(["--trial", str(made), mode, "--gpu", "cpu", "system.exporter_type=video-exporter"]) == 0


def test_the_readme_s_callback_looks_on_as_printed_and_a_resumed_run_continues_it(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    words, _ = printed("Plug in a callback", "my_callback", folder)
    words = [word.replace("every=200", "every=1") for word in words]
    halves = train(words, folder, tmp_path / "halves")
    recorded = yaml.safe_load((halves / "configs" / "parsed.yaml").read_text(encoding="utf-8"))
    assert recorded["trainer"]["callbacks"] == {"pictures": {"type": "snapshots", "every": 1}}

    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    assert main(["--trial", str(halves), "--train", "--gpu", "cpu", "trainer.max_steps=4"]) == 0
    given = ["--gpu", "cpu", f"exp_root_dir={tmp_path / 'whole'}", *SMALL, "trainer.max_steps=4"]
    assert main([*words[1:], *given]) == 0
    whole = trial(tmp_path / "whole", "shapes_stage_3")
    resumed, straight = (read_checkpoint(made) for made in (halves, whole))
    assert (
        resumed["callback_states"]
        == straight["callback_states"]
        == {"trainer.callbacks.pictures": {"taken": 4}}
    )
    for made in (halves, whole):
        assert {path.name for path in (made / "snapshots").iterdir()} == {f"{n}.png" for n in range(4)}
    for key, value in straight["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], value), key
    # As an instance, without a config that knows it.
    snapshots = sys.modules["my_callback"].Snapshots
    given = [*TINY, f"exp_root_dir={tmp_path / 'python'}"]
    made = fourdfy.train("shapes_stage_1", given, device="cpu", callbacks=[snapshots(), snapshots()])
    states = read_checkpoint(made.folder)["callback_states"]
    assert states == {"Snapshots": {"taken": 0}, "Snapshots 2": {"taken": 0}}


def test_a_kind_without_any_class_says_where_they_come_from():
    class Gadget:
        pass

    with pytest.raises(ValueError, match="expected one of the Gadgets of the modules in plugins"):
        registry.find("test-gadget", Gadget)
