"""Which processor ``--gpu`` names."""

import platform
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from fourdfy.config import ConfigError
from fourdfy.config_files import PROMPT
from fourdfy.devices import on_device, select_device
from fourdfy.launching.run import run
from fourdfy.signals import StopSignals
from tests.commands import CONFIGS


@pytest.fixture
def gpus(monkeypatch):
    def there_are(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return there_are


@pytest.mark.parametrize(
    ("count", "gpu", "device"),
    [
        (1, None, "cuda:0"),
        (1, "0", "cuda:0"),
        (1, "cuda", "cuda:0"),
        (1, "cuda:0", "cuda:0"),
        (4, "3", "cuda:3"),
        (4, "cuda:2", "cuda:2"),
        (4, None, "cuda:0"),
        (4, "cpu", "cpu"),
        (0, "cpu", "cpu"),
        (0, None, "cpu"),
    ],
)
def test_a_gpu_is_named_by_its_number(count, gpu, device, gpus):
    gpus(count)
    assert select_device(gpu) == device


@pytest.mark.parametrize(
    ("count", "gpu", "message"),
    [
        (1, "7", "no such GPU; PyTorch sees only --gpu 0"),
        (1, "cuda:1", "no such GPU; PyTorch sees only --gpu 0"),
        (4, "4", "no such GPU; PyTorch sees --gpu 0 to --gpu 3"),
        (0, "0", "sees no GPU"),
        (0, "cuda", "sees no GPU"),
        (2, "0,1", "only a training uses several"),
        (1, "banana", "expected cpu, cuda, cuda:N, or N"),
        (1, "-1", "expected cpu, cuda, cuda:N, or N"),
        (1, "", "expected cpu, cuda, cuda:N, or N"),
        (1, "cuda:", "expected cpu, cuda, cuda:N, or N"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_and_never_the_cpu_instead(count, gpu, message, gpus):
    gpus(count)
    with pytest.raises(ConfigError, match=f"--gpu {gpu}: .*{message}") as error:
        select_device(gpu)
    assert "\n" not in str(error.value)


def test_numbers_count_what_cuda_visible_devices_leaves(gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    gpus(1)  # what torch counts then
    assert select_device("0") == "cuda:0"
    assert select_device("3") == select_device("cuda:3") == "cuda:0"  # that one by its number outside
    with pytest.raises(ConfigError, match="PyTorch sees only --gpu 0 with CUDA_VISIBLE_DEVICES=3"):
        select_device("1")


def test_a_gpu_is_the_current_device_for_a_while(monkeypatch):
    current = []

    @contextmanager
    def device(name):
        current.append(name)
        yield
        current.remove(name)

    monkeypatch.setattr(torch.cuda, "device", device)
    for name in ("cuda:1", "cpu"):
        with on_device(name):
            assert current == [name] * (name != "cpu")
        assert not current


def test_a_run_that_asks_for_deterministic_operations_leaves_them_as_they_were():
    with on_device("cpu"):
        torch.use_deterministic_algorithms(True)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("gpu", "said"), [(None, True), ("cpu", False)])
def test_a_cpu_nobody_asked_for_is_mentioned(gpu, said, gpus, caplog, tmp_path):
    gpus(0)
    config, given = [CONFIGS / "shapes_stage_1.yaml"], [f"exp_root_dir={tmp_path}", f"{PROMPT}=a"]
    with caplog.at_level("INFO"), pytest.raises(ConfigError, match="no checkpoint"):
        run("test", config, given, gpu=gpu, command=[], stop=StopSignals(str))
    assert ("no GPU found" in caplog.text) == said


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_without_being_cleared():
    script = """
import resource
import torch
from fourdfy.devices import keep_freed_memory

def page_faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# 64 MiB, and a little less each time: glibc 2.36 may not find the place of an equal block again.
sizes = range(1 << 24, (1 << 24) - (4 << 16), -1 << 16)
returned = min(page_faults(size) for size in sizes)
keep_freed_memory()
kept = min(page_faults(size) for size in sizes)
print(returned, kept)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    assert kept < 10 < returned
