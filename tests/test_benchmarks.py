"""The benchmarks share out the GPUs, and run at toy size."""

import importlib
import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark by name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize("per_gpu", [1, 2])
def test_no_gpu_has_more_jobs_than_its_share(per_gpu, load, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    running, most, lock = Counter(), Counter(), threading.Lock()

    def run(seconds, gpu):
        with lock:
            running[gpu] += 1
            most[gpu] = max(most[gpu], running[gpu])
        time.sleep(seconds)
        with lock:
            running[gpu] -= 1
        return seconds

    # A long job first: whoever hands out places in turn gives its GPU a second one meanwhile.
    jobs = [0.2, 0.01, 0.01, 0.01, 0.01, 0.01]
    assert load("gpus").spread(jobs, run, per_gpu) == jobs
    assert most == {"3": per_gpu, "5": per_gpu}


def test_every_kind_of_step_is_measured_at_toy_size(load, tmp_path, capsys):
    config = "fourdfy_stage_2"
    folders = ["--models", str(tmp_path / "models"), "--out", str(tmp_path)]
    load("train_step").main([config, "--state", "ball", "--toy", *folders])
    measured = json.loads((tmp_path / f"{config}-ball.json").read_text())
    blocks = measured["blocks"]
    assert list(blocks) == ["multi_view 8", "multi_view 16", "single_view 16"]
    for block in blocks.values():
        assert 0 < block["min"] <= block["median"] <= block["max"] and block["steps"] == 2
        parts = block["parts_ms"]
        assert all(parts[part] > 0 for part in ("shade", "VAE", "U-Net", "backward", "optimizer"))
    mean = (blocks["multi_view 16"]["mean"] + blocks["single_view 16"]["mean"]) / 2
    assert measured["mixture_ms"] == pytest.approx(mean), "half of the steps are multi-view, at full size"
    assert f"| stage_2 | ball | mixture | {mean:.1f} |" in capsys.readouterr().out
