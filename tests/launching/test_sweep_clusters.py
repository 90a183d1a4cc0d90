"""The runners of clusters, with real ones of one machine: a local Ray cluster, submitit's local executor."""

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
def ray_cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


def test_tasks_run_on_a_ray_cluster(ray_cluster, tasks, tmp_path, monkeypatch):
    runner = find("ray", Runner).Config().build("cpu")
    assert runner.capacity == 2
    assert statuses(runner, tasks) == [0, 2]
    assert "--sweep FILE" in tasks[0].log.read_text()
    with pytest.raises(ConfigError, match=r"no machine of the Ray cluster has 1 GPUs and 1 processors"):
        find("ray", Runner).Config().build(None)


def test_tasks_run_in_submitit_s_local_executor(tasks, tmp_path):
    pytest.importorskip("submitit")
    runner = find("slurm", Runner).Config(folder=str(tmp_path), cluster="local").build("cpu")
    assert statuses(runner, tasks) == [0, 2]
    assert "--sweep FILE" in tasks[0].log.read_text()


@pytest.mark.parametrize(("name", "advice"), [("ray", "ray>=2.50"), ("slurm", "submitit")])
def test_what_is_not_installed_is_named_with_what_to_type(name, advice, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, {"slurm": "submitit"}.get(name, name), None)
    with pytest.raises(ConfigError, match=f"runner.type={name}: .*pip install .*{advice}"):
        find(name, Runner).Config().build(None)
