"""Faults of benchmarks/reliability.py; docs/reliability.md has the numbers of its long form."""

import importlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.commands import ROOT

CONFIG = "shapes_stage_1"  # one stage is quick; the long form has three
COUNTS = {"kills": 6, "bits": 40, "encoders": 1, "races": 5}


@pytest.fixture
def load(monkeypatch):
    """Import a part of the benchmark by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return lambda name: importlib.import_module(f"faults.{name}")


def test_no_run_is_lost(tmp_path):
    only = [word for name, count in COUNTS.items() for word in ("--only", f"{name}={count}")]
    command = [
        sys.executable,
        ROOT / "benchmarks" / "reliability.py",
        "--config",
        CONFIG,
        "--out",
        tmp_path / "out",
        *only,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "reliability.json").read_text())
    killed = [row["times"] for row in rows if row["fault"].startswith("killed in")]
    assert sum(killed) >= COUNTS["kills"]
    assert all(row["times"] and not row["wrong"] for row in rows if not row["fault"].startswith("killed in"))
    assert [row["times"] for row in rows if row["fault"].startswith("a bit")] == [40]
    assert "| ffmpeg missing" in (tmp_path / "out" / "reliability.md").read_text()


def test_steps_that_came_in_one_read_are_all_known_though_only_the_first_was_awaited(load, tmp_path):
    read, write = os.pipe()
    child = load("runs").Child(0, read, tmp_path / "log.txt")
    os.write(write, b"training\tstage_1\t1\ncheckpoint\ntraining\tstage_1\t2\n")
    assert next(child.phases()) == "training"
    assert child.steps == [("stage_1", 1), ("stage_1", 2)]
    os.close(write)
    os.close(read)


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("SIGTERM", 0, "stage 1/3: writing"),  # as if it had come to its end
        ("SIGTERM", -signal.SIGTERM, ""),
        ("SIGTERM", 143, "Traceback (most recent call last)\nstopped by SIGTERM; go on"),
        ("SIGTERM", 143, "no word of how to go on"),
        ("SIGINT", 143, "stopped by SIGTERM; go on"),
        ("SIGKILL", 1, "error: something else"),
    ],
)
def test_a_run_that_ends_otherwise_at_a_signal_is_noticed(name, status, said, load):
    assert load("kills").ending(said, name, status)[1]
    assert load("kills").ending(f"stopped by {name}; go on", "SIGTERM", 143)[1] == [] or name != "SIGTERM"


def test_every_kind_of_difference_between_two_results_is_noticed(load):
    good = {"a/last.ckpt": {"state_dict": {"w": torch.zeros(3)}, "step": 4, "list": [1, 2]}, "a.png": b"1"}
    assert not load("runs").differences(good, good)
    other_tensor = {**good, "a/last.ckpt": {**good["a/last.ckpt"], "state_dict": {"w": torch.ones(3)}}}
    other_list = {**good, "a/last.ckpt": {**good["a/last.ckpt"], "list": [1]}}
    for other in ({**good, "a.png": b"2"}, {"a.png": b"1"}, {**good, "b.png": b""}, other_tensor, other_list):
        assert len(load("runs").differences(other, good)) == 1
        assert len(load("runs").differences(good, other)) == 1
