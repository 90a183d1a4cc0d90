"""The Dockerfile, as far as it can be tested without docker: what it copies, installs and runs as."""

import json
import re
import shutil
import subprocess
import sys

from tests.commands import ROOT

TEXT = re.sub(r"^#.*\n|\\\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
INSTRUCTIONS = [tuple(line.split(None, 1)) for line in TEXT.splitlines() if line]
COPIED = [word for name, rest in INSTRUCTIONS if name == "COPY" for word in rest.split()[:-1]]


def arguments(name):
    return [rest for found, rest in INSTRUCTIONS if found == name]


def test_docker_is_sent_what_is_copied_and_nothing_else():
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert rules[1] == "*"
    sent = {path.name for rule in rules if rule[0] == "!" for path in ROOT.glob(rule[1:])}
    assert sent == set(COPIED)


def test_what_is_copied_is_all_that_a_run_needs(tmp_path):
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (entry,) = map(json.loads, arguments("ENTRYPOINT"))
    command = [
        sys.executable,
        *entry[1:],
        "--config",
        "configs/shapes_stage_1.yaml",
        "--check",
        "--gpu",
        "cpu",
    ]
    done = subprocess.run(
        [*command, "--prompt", "a red ball spinning"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "stage 1/1" in done.stdout, done.stderr


def test_it_installs_as_the_readme_says():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = {re.sub(r" +#.*", "", line) for line in re.findall(r"^pip install .*", text, re.MULTILINE)}
    (torch,) = re.findall(r"\$\(grep .*?\)", TEXT)
    version = subprocess.run(["sh", "-c", f"echo {torch}"], cwd=ROOT, capture_output=True, text=True).stdout
    run = " && ".join(arguments("RUN")).replace("--no-cache-dir ", "").replace(f'"{torch}"', version.strip())
    assert {" ".join(command.split()) for command in re.findall(r"pip install [^&;]*", run)} == said


def test_it_does_not_run_as_root_and_can_write_where_it_must():
    names = [name for name, _ in INSTRUCTIONS]
    assert arguments("USER") == ["10001"] and names.index("USER") < names.index("ENTRYPOINT")
    (volumes,) = map(json.loads, arguments("VOLUME"))
    assert volumes == [f"{arguments('WORKDIR')[0]}/outputs", "/home/user/.cache"]
    assert (
        "--uid 10001 user" in (made := arguments("RUN")[-1]) and f"chown user: outputs {volumes[1]}" in made
    )
    # useradd makes a home that is closed to others (HOME_MODE), whom "docker run --user" may name.
    (home,) = (words.partition("=")[2] for words in " ".join(arguments("ENV")).split() if "HOME=" in words)
    assert f"chmod a+rx {home}" in made
