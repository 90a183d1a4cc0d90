"""One step over several processes is the step of one."""

import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from fourdfy.config import ConfigError
from fourdfy.devices import LAUNCHED, select_devices
from fourdfy.launching import ranks as launching
from fourdfy.launching.cli import main
from fourdfy.ops import ranks
from fourdfy.ops.ranks import RankError, Ranks
from fourdfy.systems.checkpoint import read_checkpoint, step_of
from tests.commands import ROOT, launch
from tests.rank_steps import CASES, LONG

COUNTS = (2, 3)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What 1, 2 and 3 ranks find."""
    folder = tmp_path_factory.mktemp("ranks")
    return find(folder, "cpu", 1, *COUNTS) | {"folder": folder}


def find(folder, device, *counts):
    command = [sys.executable, "-m", "tests.rank_steps", str(folder), device, *map(str, counts)]
    env = os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}  # or a GPU would round products to 10 bits
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {
        count: torch.load(folder / f"{count}.pt", map_location="cpu", weights_only=True) for count in counts
    }


@pytest.mark.parametrize(
    ("count", "case"), [(count, case) for count in COUNTS for case in [*CASES][: 2 if count > 2 else None]]
)
def test_steps_of_several_ranks_are_those_of_one(count, case, found):
    compare(found[1][case], found[count][case])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_steps_of_two_gpus_are_those_of_one(tmp_path):
    found = find(tmp_path, "cuda", 1, 2)
    for case in CASES:
        compare(found[1][case], found[2][case])


def compare(one, several):
    """Of a case."""
    assert len(one["steps"]) == len(several["steps"]) > 0
    for alone, together in zip(one["steps"], several["steps"], strict=True):
        assert alone["kind"] == together["kind"] and alone["samples"] == together["samples"] > 0
        assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4), alone["kind"]
        assert together["grads"].keys() == alone["grads"].keys()
        for name, grad in alone["grads"].items():
            difference = (together["grads"][name] - grad).norm()
            assert difference <= 1e-4 * grad.norm() + 1e-9, (alone["kind"], name)  # sums in another order
    for name, value in one["state"].items():
        torch.testing.assert_close(several["state"][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_every_kind_of_step_is_among_them(found):
    kinds = {step["kind"] for case in found[1].values() for step in case["steps"]}
    assert kinds == {"multi_view", "single_view", "video"}
    learning = {
        name.split(".")[0] for case in found[1].values() for s in case["steps"] for name in s["grads"]
    }
    assert learning == {"scene", "guidance_single_view"}


def test_the_weights_of_a_prior_are_shared_where_that_is_asked_for(found):
    for count in COUNTS:
        shared = [case["sharded"] for case in found[count].values()]
        assert shared == [set(), {"video"}, {"single_view", "multi_view"}, set()][: len(shared)]
    assert not any(found[1][case]["sharded"] for case in CASES)


def ended(found, name):
    """(exit statuses, what the first rank said, what the second one said)."""
    folder = found["folder"]
    statuses = [file.read_text() for file in sorted(folder.glob(f"{name}.*.status"))]
    return statuses, *((folder / f"{name}.{rank}.log").read_text() for rank in (0, 1))


def test_a_signal_to_one_rank_ends_all_and_another_number_of_them_goes_on(found, tmp_path):
    statuses, first, second = ended(found, "stopped")
    assert statuses == ["143", "0"]
    assert first.count("writing to") == first.count("stopped by SIGTERM; continue with") == 1
    assert "writing to" not in second and "continue" not in second
    trial = found["folder"] / "stopped" / "shapes_stage_1" / "tiny"
    assert step_of(trial) == 3 and not [*trial.rglob("*.previous.ckpt")]
    assert main(["--trial", str(trial), "--train", "--gpu", "cpu"]) == 0
    assert launch("shapes_stage_1.yaml", "train", tmp_path, *LONG) == 0
    mixed, alone = (
        read_checkpoint(folder)["state_dict"] for folder in (trial, tmp_path / "shapes_stage_1" / "tiny")
    )
    assert mixed.keys() == alone.keys()
    for name, value in alone.items():  # Adam divides gradients of 0 but for rounding by their size
        unequal = (mixed[name].double() - value.double()).abs() > 1e-3
        assert unequal.double().mean() < 1e-2, name
    assert (trial / "save" / "it6-test.mp4").exists()


def test_a_rank_that_dies_ends_the_run_with_one_line(found):
    statuses, first, _ = ended(found, "died")
    assert statuses == ["1"], "the second one is gone"
    lines = [line for line in first.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "rank 0: another rank has ended, or has not answered" in lines[0]
    assert "Traceback" not in first


def test_ranks_that_do_not_find_each_other_are_ended_with_an_error_that_names_the_key(monkeypatch):
    from pytorch_lightning.strategies.launchers import subprocess_script

    started = []

    def start_another(_, **options):
        started.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, **options))
        return started[0]

    monkeypatch.setattr(subprocess_script, "subprocess", SimpleNamespace(Popen=start_another))
    monkeypatch.setattr(launching, "LAST_WORDS_SECONDS", 0.0)
    before = dict(os.environ)
    with (
        pytest.raises(RankError, match=r"^rank 0: can't join .* raise trainer.rank_timeout_minutes=0.01$"),
        launching.as_ranks(["cpu", "cpu"], timeout_minutes=0.01),
    ):
        pass
    assert [process.returncode is None for process in started] == [False]
    assert dict(os.environ) == before and not torch.distributed.is_initialized()


@pytest.mark.skipif(os.name == "nt", reason="needs a system that tells a process that its parent is gone")
def test_a_rank_whose_parent_was_gone_before_it_looked_ends(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(launching.os, "_exit", lambda _: ended.set())
    monkeypatch.setattr(launching, "LAST_WORDS_SECONDS", 0.0)
    monkeypatch.setenv(LAUNCHED, str(os.getpid()))  # any but that of this process's parent
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launching._launch(["cpu", "cpu"]) == []
    assert ended.wait(10)


def test_the_benchmark_compares_one_rank_with_several(found):
    phases = json.loads((found["folder"] / "fourdfy_stage_1-ranks.json").read_text())["phases"]
    one, again, several = phases.values()
    assert one.keys() == again.keys() == several.keys() == {"multi_view 8"}
    for name, block in several.items():
        assert block["median"] > 0 and block["parts_ms"]["ranks"] > 0
        assert again[name]["difference"]["scene"] == 0 < block["difference"]["scene"] < 1e-4


@pytest.mark.parametrize("length", [0, 1, 4, 8, 17])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_neighbours_that_leave_nothing_out(length, group, count):
    length -= length % group
    shares = [Ranks(rank, count).share(length, group) for rank in range(count)]
    assert [n for share in shares for n in range(length)[share]] == [*range(length)]
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= group and not any(size % group for size in sizes)


@pytest.fixture
def machine(monkeypatch):
    """So many GPUs, and processes that torchrun has started."""

    def there_are(gpus, processes=0):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        if processes:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    return there_are


@pytest.mark.parametrize(
    ("gpus", "processes", "gpu", "devices"),
    [
        (4, 0, "0,2", ["cuda:0", "cuda:2"]),
        (0, 0, "cpu,cpu,cpu", ["cpu"] * 3),
        (4, 0, None, ["cuda:0"]),
        (4, 2, None, ["cuda:0", "cuda:1"]),
        (4, 2, "1,3", ["cuda:1", "cuda:3"]),
        (0, 2, None, ["cpu", "cpu"]),
        (4, 2, "cpu", ["cpu", "cpu"]),
    ],
)
def test_each_process_has_a_device(gpus, processes, gpu, devices, machine):
    machine(gpus, processes)
    assert select_devices(gpu) == devices


@pytest.mark.parametrize(
    ("gpus", "processes", "gpu", "message"),
    [
        (2, 0, "0,2", "--gpu 2: no such GPU; PyTorch sees --gpu 0 to --gpu 1"),
        (2, 0, "0,0", "--gpu 0,0: names cuda:0 twice"),
        (2, 0, "0,cpu", "on GPUs or on the CPU, not on both"),
        (2, 0, "0,", "--gpu : expected cpu, cuda, cuda:N, or N"),
        (4, 3, "0,1", "names 2 devices, and torchrun has started 3 processes here"),
        (4, 2, "0", "names 1 device, and torchrun has started 2 processes here"),
        (1, 2, None, "no such GPU; PyTorch sees only --gpu 0"),
    ],
)
def test_devices_that_are_not_there_are_refused_in_one_line(gpus, processes, gpu, message, machine):
    machine(gpus, processes)
    with pytest.raises(ConfigError) as error:
        select_devices(gpu)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_sent_is_contiguous_as_nccl_wants_it(monkeypatch):
    def send(tensor, *_):
        assert tensor.is_contiguous()
        tensor += 1

    monkeypatch.setattr(torch.distributed, "all_reduce", send)
    monkeypatch.setattr(torch.distributed, "broadcast", send)
    images = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    with ranks.together(Ranks(0, 2)):
        learned = images.clone().requires_grad_()
        (whole,) = ranks.gathered([learned], 0, 2)
        assert (whole == 1).all()
        whole.backward(images)
        assert (learned.grad == 1).all()
        told = ranks.of_first_rank(images)
    assert told is images and (images == 1).all() and not images.is_contiguous()
