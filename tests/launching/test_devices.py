"""Which processor ``--gpu`` names."""

import pytest
import torch

from fourdfy.config import ConfigError
from fourdfy.launching.devices import select_device, use_device


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
        (2, "0,1", "several GPUs are not supported yet"),
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


def test_the_gpu_becomes_the_current_device(gpus, monkeypatch):
    gpus(2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert use_device("1") == "cuda:1"
    assert current == ["cuda:1"]


@pytest.mark.parametrize(("gpu", "said"), [(None, True), ("cpu", False)])
def test_a_cpu_nobody_asked_for_is_mentioned(gpu, said, gpus, caplog):
    gpus(0)
    with caplog.at_level("INFO"):
        use_device(gpu)
    assert ("no GPU found" in caplog.text) == said
