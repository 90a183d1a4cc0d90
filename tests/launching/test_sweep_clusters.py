"""The runners of clusters, on one machine: a local Ray cluster, submitit's local and debug executors."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fourdfy.config import ConfigError
from fourdfy.launching.cli import main
from fourdfy.launching.sweeps.jobs import Job, Sweep, read_sweep
from fourdfy.launching.sweeps.runners import Runner, Task
from fourdfy.launching.sweeps.scheduler import Scheduler
from fourdfy.registry import find
from fourdfy.systems.checkpoint import LAST, read_checkpoint
from tests.commands import CONFIGS, TINY

PROMPTS = ["a red cube bouncing", "a blue ball spinning"]


def statuses(runner: Runner, tasks: list[Task], seconds: float = 120.0) -> list[int | None]:
    handles, until = [*runner.start(tasks)], time.monotonic() + seconds
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


def test_a_sweep_on_a_ray_cluster_survives_a_killed_worker(ray_cluster, sweep_of):
    """One job's worker is killed, another can't succeed; the first equals a run in this process."""
    sweep, (good, hopeless) = sweep_of("ray", PROMPTS, 12)
    hopeless.trials[0].parent.mkdir(parents=True)
    hopeless.trials[0].write_text("a file in the place of its folder")
    killed = []

    def show(entries):
        if not killed and (good.trials[0] / LAST).exists():
            pid = next(int(pid) for pid in os.listdir("/proc") if pid.isdecimal() and runs(pid, good))
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    scheduler = Scheduler(sweep, sweep.cfg.runner.build("cpu"), show)
    scheduler.run()
    assert killed and [(str(entry.state), entry.failures) for entry in scheduler.entries] == [
        ("done", 1), ("failed", 2),
    ]  # fmt: skip
    assert_equals_a_serial_run(good, sweep)


def runs(pid: str, job: Job) -> bool:
    """Whether a process is this job's."""
    with contextlib.suppress(OSError):
        words = Path("/proc", pid, "cmdline").read_bytes().decode(errors="replace").split("\0")
        return "fourdfy.launching.cli" in words and f"tag={job.tag}" in words
    return False


def test_a_sweep_in_submitit_s_debug_executor(sweep_of, tmp_path):
    pytest.importorskip("submitit")
    folder = f", cluster: debug, folder: {tmp_path / 'slurm'}"
    sweep, (job,) = sweep_of("slurm" + folder, PROMPTS[:1], 1)
    scheduler = Scheduler(sweep, sweep.cfg.runner.build("cpu"), lambda entries: None)
    scheduler.run()
    assert [str(entry.state) for entry in scheduler.entries] == ["done"]
    assert_equals_a_serial_run(job, sweep)


def assert_equals_a_serial_run(job: Job, sweep: Sweep) -> None:
    found = read_checkpoint(job.trials[0])["state_dict"]
    words = [word for word in job.arguments if not word.startswith("exp_root_dir=")]
    assert main([*words, "--gpu", "cpu", f"exp_root_dir={sweep.root / 'alone'}"]) == 0
    alone = read_checkpoint(sweep.root / "alone" / job.trials[0].relative_to(sweep.root))["state_dict"]
    assert all(torch.equal(value, alone[name]) for name, value in found.items()) and found


@pytest.fixture
def sweep_of(tmp_path):
    """``sweep_of(runner, prompts, steps)``: a sweep of tiny jobs, and its jobs."""

    def make(runner: str, prompts: list[str], steps: int) -> tuple[Sweep, list[Job]]:
        file = tmp_path / "many.yaml"
        file.write_text(
            f"config: {CONFIGS / 'shapes_stage_1.yaml'}\nprompts: {prompts}\nretries: 1\n"
            f"exp_root_dir: {tmp_path / 'out'}\nrunner: {{type: {runner}}}\n"
        )
        own = ("use_timestamp", "tag", "system.prompt_processor.prompt")
        given = [word for word in TINY if not word.startswith(own)]
        sweep = read_sweep(
            file, {}, [*given, f"trainer.max_steps={steps}", "checkpoint.every_n_train_steps=2"]
        )
        return sweep, sweep.jobs

    return make


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
    gone = {"Alive": False, "Resources": {"GPU": 8, "CPU": 64}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, gone])
    config = find("ray", Runner).Config
    runner = config().build(None)
    assert runner.capacity == 4 and config(num_cpus=4.0).build(None).capacity == 3
    too_few = (
        r"no machine of the Ray cluster has 3 GPUs and 1 processors; .*num_gpus.*without a GPU: --gpu cpu$"
    )
    with pytest.raises(ConfigError, match=too_few):
        config(num_gpus=3.0).build(None)
    nodes.append({"Alive": True, "Resources": {"GPU": 2.0, "CPU": 2.0}})
    assert runner.capacity == 6  # it joined later


def test_the_cluster_that_is_joined_is_the_one_that_is_named(monkeypatch):
    """No other is: neither that of ``RAY_ADDRESS`` nor one that happens to run here."""
    ray = pytest.importorskip("ray")
    config, asked = find("ray", Runner).Config, []

    def init(address, **options):
        asked.append(address)
        if address == "auto":
            raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    assert config().build("cpu").capacity == 2 and asked == ["local"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"127.0.0.1:{server.getsockname()[1]}"
        config(address=there).build("cpu")
    for address in ("auto", there, f"ray://{there}"):  # nobody listens any more
        with pytest.raises(
            ConfigError, match=rf"^runner\.address={address}: .*type: ray start --head, or leave"
        ):
            config(address=address).build("cpu")
    assert asked == ["local", there, "auto"]


@pytest.mark.parametrize("cluster", ["local", "debug"])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"slurm_partion": "gpu"}, "Unknown argument 'partion'"),
        ({"cpus_per_tsk": 8}, "Unknown executor 'cpus' in parameter 'cpus_per_tsk'"),
        ({"mem_gb": "32GB"}, '"mem_gb" expected type'),
    ],
)
def test_a_parameter_that_submitit_refuses_is_one_line(cluster, parameters, message, tmp_path):
    pytest.importorskip("submitit")
    config = find("slurm", Runner).Config(folder=str(tmp_path), cluster=cluster, parameters=parameters)
    with pytest.raises(
        ConfigError, match=rf"^runner\.parameters: [^\n]*{message}[^\n]*slurm_partition: gpu"
    ) as error:
        config.build("cpu")
    assert "\n" not in str(error.value)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Stands in for SLURM's commands: whatever is submitted waits for ever."""
    for name, said in (("srun", ""), ("sbatch", "Submitted batch job 12"), ("sacct", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("queue")
@pytest.mark.parametrize("count", [1, 2])  # an array
def test_a_job_that_runs_out_of_time_is_queued_again_as_often_as_it_takes(count, tmp_path):
    utils = pytest.importorskip("submitit.core.utils")
    given = {"folder": str(tmp_path / "jobs"), "minutes": 30, "parameters": {"gpus_per_node": 2}}
    runner = find("slurm", Runner).Config(**given).build(None)
    handles = [*runner.start([Task((), tmp_path / "log", str(number)) for number in range(count)])]
    for handle in handles:
        job = utils.DelayedSubmission.load(handle.paths.submitted_pickle)
        assert job._timeout_countdown >= 1000 and job._timeout_min == 30
    (script,) = (tmp_path / "jobs").glob("12_submission.sh")
    assert "--gpus-per-node=2" in script.read_text()  # a parameter has precedence


def test_an_unknown_cluster_of_submitit_is_one_line():
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match=r"^runner\.type=slurm: .* loca; .*cluster: local$"):
        find("slurm", Runner).Config(cluster="loca").build(None)


@pytest.mark.parametrize(("name", "advice"), [("ray", "ray>=2.50"), ("slurm", "submitit")])
def test_what_is_not_installed_is_named_with_what_to_type(name, advice, monkeypatch):
    monkeypatch.setitem(sys.modules, {"slurm": "submitit"}.get(name, name), None)
    with pytest.raises(ConfigError, match=f"runner.type={name}: .*pip install .*{advice}"):
        find(name, Runner).Config().build(None)
