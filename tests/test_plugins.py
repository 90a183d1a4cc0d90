"""The README's plugin, as it is printed there, from a folder of its own through the real command line."""

import re
import shlex
import subprocess
import sys

from fourdfy.launching.cli import main
from tests.commands import ROOT, TINY, trial

SECTION = (
    (ROOT / "README.md")
    .read_text(encoding="utf-8")
    .partition("## Plug in a guidance")[2]
    .partition("\n## ")[0]
)
VIDEO_STEPS = ("data.prob_multi_view=0", "data.single_view.prob_single_view_video=1")


def test_the_readme_s_plugin_trains_as_printed_and_its_trial_needs_nothing_more(tmp_path, monkeypatch, capfd):
    code, command = (re.search(rf"```{kind}\n(.*?)```", SECTION, re.DOTALL)[1] for kind in ("python", "bash"))
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    (folder / "my_guidance.py").write_text(code, encoding="utf-8")
    python, *words = shlex.split(command.replace("\\\n", "").replace("<this clone>", str(ROOT)))
    assert python == "python"
    small = [word for word in TINY if "prompt" not in word]
    words += ["--gpu", "cpu", f"exp_root_dir={tmp_path}/out", *small, *VIDEO_STEPS]
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.chdir(elsewhere)
    made = trial(tmp_path / "out", "shapes_stage_3")
    parsed = ["--config", str(made / "configs" / "parsed.yaml"), "--gpu", "cpu"]
    assert main([*parsed, "--check"]) == 0
    assert "my-guidance" in capfd.readouterr().out
    assert main([*parsed, "--test", f"resume={made / 'ckpts' / 'last.ckpt'}"]) == 0
    assert sys.modules["my_guidance"].__file__ == str(folder / "my_guidance.py")
