"""What a terminal is shown, and streams that nobody reads."""

import logging
import sys

import pytest

from fourdfy.launching.cli import main
from fourdfy.terminal import PrintableFormatter, open_streams, printable_lines, say
from tests.commands import CONFIGS

CONFIG = str(CONFIGS / "shapes_stage_1.yaml")
EVIL = "a\x1b[31mb\r\x9b2J\u202ec\udcff"
HARMLESS = r"a\x1b[31mb\r\x9b2J\u202ec\udcff"


def test_control_characters_are_escaped_and_lines_stay_lines():
    assert printable_lines(f"grün 立方体\n{EVIL}") == f"grün 立方体\n{HARMLESS}"


def test_what_is_logged_and_said_is_escaped(capsys):
    record = logging.LogRecord("fourdfy", logging.INFO, "", 0, "%s\n", (EVIL,), None)
    assert PrintableFormatter().format(record) == f"{HARMLESS}\n"
    say(EVIL)
    assert capsys.readouterr().err == HARMLESS


@pytest.mark.parametrize(
    "words",
    [
        ["--config", CONFIG, "--check", f"se{EVIL}de=1"],
        ["--config", CONFIG, "--check", f"--{EVIL}"],
        ["--config", CONFIG, "--check", f"--out={EVIL}"],
        ["--config", f"{EVIL}.yaml", "--check"],
        ["--trial", EVIL, "--test"],
    ],
    ids=["a key", "an option", "a folder", "a config", "a trial"],
)
def test_no_mistake_reaches_the_terminal_raw(words, capfd):
    try:
        status = main(words)
    except SystemExit as error:
        status = error.code
    assert status == 2
    said = "".join(capfd.readouterr())
    assert "error: " in said and set(said) - {"\n"} == {c for c in said if c.isprintable()}


def test_the_plan_of_a_name_with_control_characters_is_harmless(tmp_path, capfd):
    given = [f"exp_root_dir={tmp_path}", f"name={EVIL}", f"tag={EVIL}", "--prompt", EVIL[:-1]]
    assert main(["--config", CONFIG, "--check", "--gpu", "cpu", *given]) == 0
    out, _ = capfd.readouterr()
    assert f"stage 1/1: {HARMLESS}\n" in out and f"prompt: {EVIL[:-1]!r}\n" in out
    assert all(c.isprintable() or c == "\n" for c in out)


@pytest.mark.parametrize("stderr", ["closed", "full"])
def test_a_terminal_that_is_gone_changes_no_exit_status(stderr, monkeypatch):
    gone = None if stderr == "closed" else open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", gone)
    assert main(["--config", CONFIG, "--check", "--gpu", "cpu", "sede=1"]) == 2
    open_streams()
    assert sys.stderr is not None
