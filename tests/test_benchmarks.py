"""The benchmarks' jobs share out the GPUs."""

import importlib
import threading
import time
from collections import Counter
from pathlib import Path

import pytest


@pytest.mark.parametrize("per_gpu", [1, 2])
def test_no_gpu_has_more_jobs_than_its_share(per_gpu, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
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
    assert importlib.import_module("gpus").spread(jobs, run, per_gpu) == jobs
    assert most == {"3": per_gpu, "5": per_gpu}
