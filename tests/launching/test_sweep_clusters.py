"""The runners of clusters, with real ones of one machine: a local Ray cluster, submitit's local executor."""

import subprocess
import sys
import time

import pytest

from fourdfy.config import ConfigError
from fourdfy.launching.sweeps.runners import Runner, Task
from fourdfy.registry import find


def statuses(runner: Runner, tasks: list[Task], seconds: float = 120.0) -> list[int | None]:
    handles, until = runner.start(tasks), time.monotonic() + seconds
    while (found := [runner.poll(handle) for handle in handles]).count(None) and time.monotonic() < until:
        time.sleep(0.2)
    return found


@pytest.fixture
def tasks(tmp_path):
    """One that succeeds, and one that fails."""
    return [Task(("--help",), tmp_path / "help.log", "a"), Task(("--train",), tmp_path / "train.log", "b")]


@pytest.fixture
def endless(tmp_path):
    """Says that it is ready, and when it is asked to stop that it has saved."""
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved')))\n"
        "print('ready', flush=True)\nwhile True: signal.pause()"
    )
    return Task((code,), tmp_path / "endless.log", "c", ("-c",))


def wait_until_ready(task: Task) -> None:
    until = time.monotonic() + 60
    while not (task.log.exists() and "ready" in task.log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)


@pytest.fixture
def ray_cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


def test_a_task_that_is_cancelled_saves_first(endless, monkeypatch):
    def cancelled(process):
        wait_until_ready(endless)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "poll", cancelled)
    with pytest.raises(KeyboardInterrupt):
        endless.run()
    assert endless.log.read_text().split() == ["ready", "saved"]


def test_tasks_run_on_a_ray_cluster(ray_cluster, tasks, endless):
    runner = find("ray", Runner).Config().build("cpu")
    assert runner.capacity == 2
    assert statuses(runner, tasks) == [0, 2]
    assert "--sweep FILE" in tasks[0].log.read_text()
    (handle,) = runner.start([endless])
    wait_until_ready(endless)
    runner.stop(handle)
    while runner.poll(handle) is None:
        time.sleep(0.1)
    assert "saved" in endless.log.read_text()
    with pytest.raises(ConfigError, match=r"no machine of the Ray cluster has 1 GPUs and 1 processors"):
        find("ray", Runner).Config().build(None)


def test_tasks_run_in_submitit_s_local_executor(tasks, endless, tmp_path):
    pytest.importorskip("submitit")
    runner = find("slurm", Runner).Config(folder=str(tmp_path), cluster="local").build("cpu")
    assert statuses(runner, tasks) == [0, 2]
    assert "--sweep FILE" in tasks[0].log.read_text()
    (handle,) = runner.start([endless])
    wait_until_ready(endless)
    runner.stop(handle)
    until = time.monotonic() + 30
    while "saved" not in endless.log.read_text() and time.monotonic() < until:
        time.sleep(0.1)
    assert "saved" in endless.log.read_text()


def test_a_task_fits_on_one_machine_of_a_ray_cluster(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    machines = [{"GPU": 1.0, "CPU": 8.0}] * 2 + [{"GPU": 2.0, "CPU": 4.0}, {"CPU": 64.0}]
    nodes = [{"Alive": True, "Resources": each} for each in machines]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"GPU": 8, "CPU": 64}}])
    config = find("ray", Runner).Config
    assert config().build(None).capacity == 4 and config(num_cpus=4).build(None).capacity == 3
    with pytest.raises(ConfigError, match=r"no machine of the Ray cluster has 3 GPUs and 1 processors"):
        config(num_gpus=3).build(None)


@pytest.mark.parametrize(("name", "advice"), [("ray", "ray>=2.50"), ("slurm", "submitit")])
def test_what_is_not_installed_is_named_with_what_to_type(name, advice, monkeypatch):
    monkeypatch.setitem(sys.modules, {"slurm": "submitit"}.get(name, name), None)
    with pytest.raises(ConfigError, match=f"runner.type={name}: .*pip install .*{advice}"):
        find(name, Runner).Config().build(None)
