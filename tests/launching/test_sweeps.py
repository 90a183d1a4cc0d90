"""Sweeps: many runs, whose folders alone say how far they are."""

import csv
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import load_file

from fourdfy.config import ConfigError
from fourdfy.evaluation.registry import METRICS, Metric
from fourdfy.files.atomic import write_whole
from fourdfy.launching.cli import main
from fourdfy.launching.sweeps import command, results, runners, scheduler
from fourdfy.launching.sweeps.jobs import Job, Sweep, SweepConfig, _seeds, read_sweep
from fourdfy.launching.sweeps.results import row_of, write_results
from fourdfy.launching.sweeps.runners import LocalRunner, Runner, Task
from fourdfy.launching.sweeps.scheduler import Entry, Scheduler, State, seconds_left
from fourdfy.launching.trial import IN_USE, owned
from fourdfy.prompts.base import KEY, cache_embeddings
from fourdfy.prompts.stable_diffusion import StableDiffusionPromptProcessor
from fourdfy.signals import Stopped
from fourdfy.systems.checkpoint import read_checkpoint
from tests.browser import wait_for
from tests.commands import CONFIGS, ROOT, TINY, launch, trial

OWN = ("use_timestamp", "tag", "system.prompt_processor.prompt")
GIVEN = [word for word in TINY if not word.startswith(OWN)]
STAGE = str(CONFIGS / "shapes_stage_1.yaml")
PROMPTS = ["a red cube bouncing", "a blue ball spinning"]


class Here(Runner):
    """Runs each task at once, in this process; ``statuses`` replaces the first results."""

    def __init__(self, capacity: int = 1, statuses: Sequence[int | None] = ()) -> None:
        super().__init__(Runner.Config(), "cpu")
        self.most, self.statuses, self.started, self.stopped = capacity, [*statuses], [], []

    @property
    def capacity(self) -> int:
        return self.most

    def start(self, tasks):
        return [self._start(task) for task in tasks]

    def _start(self, task):
        self.started.append(task)
        return self.statuses.pop(0) if self.statuses else main(list(task.arguments))

    def poll(self, handle):
        return handle

    def stop(self, handle):
        self.stopped.append(handle)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(scheduler, "ELSEWHERE_SECONDS", 0.0)


@pytest.fixture
def made(tmp_path):
    """``made(text, *overrides)``: the sweep of a YAML file."""

    def read(text: str, *overrides: str) -> Sweep:
        file = tmp_path / "many.yaml"
        file.write_text(f"exp_root_dir: {tmp_path / 'out'}\n{text}")
        return read_sweep(file, {}, [*GIVEN, "trainer.max_steps=1", *overrides])

    return read


def entries(sweep: Sweep, runner: Runner, show=lambda entries: None) -> list:
    """Of the sweep, when it has been run."""
    runs = Scheduler(sweep, runner, show)
    runs.run()
    return runs.entries


def states(found) -> list[str]:
    return [str(entry.state) for entry in found]


# ---------------------------------------------------------------------------------------------
# Jobs


def test_the_jobs_are_all_combinations_and_each_has_a_folder(made, tmp_path):
    sweep = made(
        f"config: {STAGE}\nprompts: {PROMPTS}\nseeds: 2-3\n"
        "settings: {all: [], sparse: [system.loss.lambda_sparsity=3]}\n"
        "grid: {trainer.max_steps: [1, 2]}\noverrides: [data.multi_view.width=8]"
    )
    assert len(sweep.jobs) == 16 == len({job.trials for job in sweep.jobs})
    job = sweep.jobs[-1]
    assert job.name == "a blue ball spinning, settings sparse, max_steps 2, seed 3"
    tag = "a_blue_ball_spinning_settings=sparse_max_steps=2_seed_3"
    assert job.trials == (tmp_path / "out" / "shapes_stage_1" / tag,) and job.ends == (2,)
    given = [word for word in job.arguments if "=" in word]
    assert given.index("data.multi_view.width=8") < given.index("system.loss.lambda_sparsity=3")
    assert given[-5:-3] == ["trainer.max_steps=2", "seed=3"] and f"tag={tag}" in given


def test_keys_of_a_grid_that_end_alike_are_told_apart():
    grid = {"stage_1.trainer.max_steps": [1], "stage_2.trainer.max_steps": [3], "a.b": [True]}
    # results.csv has columns of these names
    grid |= {"x.prompt": [[1, None]], "x.seed": [{"y": False}], "x.iou": [2]}
    ((words, given),) = Sweep(SweepConfig(grid=grid))._combinations()
    assert words == {"stage_1.trainer.max_steps": "1", "stage_2.trainer.max_steps": "3", "b": "true"} | {
        "x.prompt": "[1, null]", "x.seed": '{"y": false}', "x.iou": "2",
    }  # fmt: skip
    assert given[:3] == ["stage_1.trainer.max_steps=1", "stage_2.trainer.max_steps=3", "a.b=true"]


def test_a_text_file_of_prompts_is_a_sweep_too(tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "\ufeffa red cube bouncing\n\n# not this one\n  # nor this\na blue ball spinning\n", encoding="utf-8"
    )
    given = {"config": [STAGE], "seeds": "0-3"}
    sweep = read_sweep(tmp_path / "prompts.txt", given, [f"exp_root_dir={tmp_path}"])
    assert [(job.prompt, job.seed) for job in sweep.jobs] == [(p, s) for p in PROMPTS for s in range(4)]
    assert sweep.root == tmp_path
    (tmp_path / "many.yaml").write_text(f"config: {STAGE}\nprompts: prompts.txt")  # beside it
    assert read_sweep(tmp_path / "many.yaml", {}, []).prompts == PROMPTS


def test_seeds_are_one_or_ranges_or_a_list():
    given = {0: [0], "2": [2], "0-2": [0, 1, 2], "0,2, 5-7": [0, 2, 5, 6, 7], (3, "5-6"): [3, 5, 6]}
    for seeds, numbers in given.items():
        assert _seeds([*seeds] if isinstance(seeds, tuple) else seeds) == numbers


def test_the_command_line_says_how_many_run_on_a_gpu(tmp_path):
    (tmp_path / "many.yaml").write_text("runner: {type: local}")
    assert read_sweep(tmp_path / "many.yaml", {"per_gpu": 3}, []).cfg.runner.per_gpu == 3
    (tmp_path / "many.yaml").write_text("runner: {type: ray}")
    with pytest.raises(ConfigError, match=r"runner\.per_gpu.*: unknown key of ray; local has it"):
        read_sweep(tmp_path / "many.yaml", {"per_gpu": 3}, [])
    (tmp_path / "many.yaml").write_text("runner: local")
    with pytest.raises(ConfigError, match=r"^runner .*expected a mapping"):
        read_sweep(tmp_path / "many.yaml", {"per_gpu": 3}, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: shapes_stage_9", r"shapes_stage_9: no such config file"),
        ("", r"^config: missing; .*--config NAME$"),
        (
            f"config: {STAGE}\nprompts: nowhere.txt",
            r"^prompts: .*nowhere\.txt: expected a list, or a text file",
        ),
        ("config:", r"^config: missing; .*--config NAME$"),
        (f"config: {STAGE}\nprompts: []", r"^prompts: there are none; leave the key out"),
        (f"config: {STAGE}\nprompts: ['']", r"^prompts: expected texts, got ''"),
        (f"config: {STAGE}\nprompts: [a red cube: bouncing]", r"^prompts: expected texts, got \{'a red"),
        (f"config: {STAGE}\nprompts: [null]", r"^prompts: expected texts, got None"),
        (f"config: {STAGE}\nprompts: {os.devnull}", r"^prompts: /dev/null: there are none"),
        (
            f"config: {STAGE}\nseeds: 3-0",
            r"^seeds: expected up to 10000 of them, such as 0-3, 5 or 0,2,5-7, got '3-0'$",
        ),
        (f"config: {STAGE}\nsettings: {{a: [3]}}", r"settings\.a=\[3\]: expected a list of key=value"),
        (
            f"config: {STAGE}\nseeds: 3-x",
            r"^seeds: expected up to 10000 of them, such as 0-3, 5 or 0,2,5-7, got '3-x'$",
        ),
        (f"config: {STAGE}\nprompts: [a red cube spinning, a red cube spinning]", "there more than once"),
        (
            f"config: {STAGE}\nprompts: [a red cube, a_red_cube]",
            r"'a red cube, seed 0' and 'a_red_cube, seed 0' would share a folder",
        ),
        (f"config: {STAGE}\nseeds: 0-999999999", r"^seeds: expected up to 10000 of them"),
        (f"config: {STAGE}\nprompts: $SECRET/x.txt", r"^prompts \(.*many\.yaml\): .*SECRET may hold"),
        (
            f"config: {STAGE}\nprompts: {PROMPTS}\ngrid: {{system.loss.lambda_sparsty: [1]}}",
            r"^system\.loss\.lambda_sparsty=1: there is no such loss",
        ),
        (f"config: {STAGE}\ngrid: {{seed: [1]}}", r"^seed: a sweep sets it .* its own key seeds$"),
        (f"config: {STAGE}\ngrid: {{stage_2.seed: [1]}}", r"^stage_2\.seed: a sweep sets it .* key seeds$"),
        (f"config: {STAGE}\noverrides: [tag=x]", r"^tag: a sweep sets it"),
        (f"config: {STAGE}\ngrid: {{trainer.max_steps: 3}}", r"grid\.trainer\.max_steps=3: expected a list"),
        (f"config: {STAGE}\nkeep: two of 8", r"keep='two of 8': expected such as 2 of 8 after stage 1"),
        (
            f"config: {STAGE}\nprompts: {PROMPTS}\nkeep: 2 of 8 after stage 1",
            r"^keep: .*: there are 1 seeds$",
        ),
        (
            f"config: {STAGE}\nprompts: {PROMPTS}\nseeds: 0-1\nkeep: 3 of 2 after stage 1",
            r"^keep: .*: there are 2 seeds$",
        ),
        (
            f"config: {STAGE}\nprompts: {PROMPTS}\nkeep: 1 of 1 after stage 1",
            r"^keep: .* the recipe has 1 stages",
        ),
        (
            f"config: {CONFIGS / 'shapes.yaml'}\nprompts: {PROMPTS}\nseeds: 0-1\nkeep: 2 of 2 after stage 1",
            r"^keep: .*: all seeds go on",
        ),
        (f"config: {STAGE}\nkeep_by: flow", r"^keep_by='flow': without keep, all seeds go on"),
        (f"config: {STAGE}\nsettings: {{a: [x]}}", r"^settings\.a: 'x': expected key=value"),
        (
            f"config: {STAGE}\nprompts: {PROMPTS}\noverrides: [trainer.max_steps=3]\n"
            "grid: {trainer.max_steps: [1, 2]}",
            r"^trainer\.max_steps=3: for all jobs, but grid\.trainer\.max_steps sets trainer\.max_steps too",
        ),
        (f"config: {STAGE}\nprompts: {PROMPTS}\noverrides: [resume=/x]", r"^resume=/x: no such checkpoint"),
        (f"config: {STAGE}\nrunner: {{type: loca}}", r"runner\.type .* did you mean 'local'"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(made, text, message):
    with pytest.raises(ConfigError, match=message):
        sweep = made(text)
        sweep.check()


def test_an_override_that_is_wrong_is_named_with_its_place(made, tmp_path):
    where = re.escape(f"(in {tmp_path / 'many.yaml'}, ")
    wrong = "system.loss.lambda_sparsity=x"
    for text, place in (
        (f"settings: {{a: [], b: [{wrong}]}}", r"settings\.b"),
        ("grid: {system.loss.lambda_sparsity: [x]}", r"grid\.system\.loss\.lambda_sparsity"),
        (f"overrides: [{wrong}]", "overrides"),
    ):
        with pytest.raises(ConfigError, match=rf"^system\.loss\.lambda_sparsity.*{where}{place}\)"):
            _ = made(f"config: {STAGE}\nprompts: {PROMPTS}\n{text}").jobs
    with pytest.raises(ConfigError, match=r"lambda_sparsity.*\(in the command line\)"):
        _ = made(f"config: {STAGE}\nprompts: {PROMPTS}\n", wrong).jobs
    with pytest.raises(ConfigError, match=rf"^evaluation {where}overrides\): metrics: no metric 'foo'"):
        _ = made(f"config: {STAGE}\nprompts: {PROMPTS}\noverrides: ['evaluation.metrics=[foo]']").jobs


def test_what_is_typed_for_all_jobs_is_not_overruled_in_silence(made):
    sweep = made(f"config: {STAGE}\nprompts: {PROMPTS}\nsettings: {{a: [name=b]}}", "name=a")
    with pytest.raises(ConfigError, match=r"^name=a: for all jobs, but settings\.a sets name too"):
        sweep._check_keys()
    made(
        f"config: {STAGE}\nprompts: {PROMPTS}\noverrides: [name=a]\nsettings: {{a: [name=b], b: []}}"
    ).check()


# ---------------------------------------------------------------------------------------------
# Running


def test_a_sweep_goes_on_where_it_stopped_and_equals_single_runs(made, tmp_path, caplog):
    sweep = made(f"config: {STAGE}\nprompts: {PROMPTS[:1]}\nretries: 1")
    runner = Here(statuses=[1])
    assert states(entries(sweep, runner)) == ["done"]
    assert len(runner.started) == 2  # it failed once
    assert "a red cube bouncing, seed 0: exit status 1; it is started again; see " in caplog.text
    assert sweep.seconds(sweep.jobs[0]) > 0

    again = Here()
    more = made(f"config: {STAGE}\nprompts: {PROMPTS[:1]}\nseeds: 0-1")
    assert states(entries(more, again)) == ["done", "done"]
    assert [task.name for task in again.started] == ["a_red_cube_bouncing_seed_1"]

    launch(STAGE.split("/")[-1], "train", tmp_path / "alone", "trainer.max_steps=1")
    alone = read_checkpoint(trial(tmp_path / "alone", "shapes_stage_1"))["state_dict"]
    for name, value in read_checkpoint(sweep.jobs[0].trials[0])["state_dict"].items():
        assert torch.equal(value, alone[name]), name


def test_what_was_trained_with_other_settings_does_not_count(made, tmp_path):
    """Names are the same, what they stand for isn't."""
    config = tmp_path / "own.yaml"
    config.write_text(f"base: {STAGE}\n")
    text = f"config: {config}\nprompts: {PROMPTS[:1]}\nsettings: {{much: [system.loss.lambda_sparsity=3]}}"
    sweep = made(text)
    assert states(entries(sweep, Here())) == ["done"]
    made(text).check()
    made(text, "trainer.max_steps=2").check()  # longer: goes on
    made(text.replace(PROMPTS[0], PROMPTS[1])).check()
    made(text.replace(str(PROMPTS[:1]), str(PROMPTS[::-1]))).check()
    config.write_text(f"base: {STAGE}\nseed: 5\n")  # the sweep's own are others
    made(text).check()
    other = r"^a red cube bouncing, settings much, seed 0: .* \(system\.loss\.lambda_sparsity\); .*name"
    with pytest.raises(ConfigError, match=other):
        made(text.replace("=3", "=4")).check()
    with pytest.raises(ConfigError, match=r"\(data\.multi_view\.height\)"):
        made(text, "data.multi_view.height=12").check()
    config.write_text(f"base: {STAGE}\ndata: {{multi_view: {{batch_size: 8}}}}\n")
    with pytest.raises(ConfigError, match=r"\(data\.multi_view\.batch_size\)"):
        made(text).check()


def test_what_fails_for_good_does_not_stop_the_others(made):
    sweep = made(f"config: {STAGE}\nprompts: {PROMPTS}\nseeds: 0-2\nretries: 1")
    runner = Here(capacity=2, statuses=[0, 2, 143, *[1] * 8])  # 0: without any test views
    assert states(entries(sweep, runner)) == ["failed"] * 6
    assert all(task.arguments[-2:] == ("--gpu", "cpu") for task in runner.started)
    names = [task.name.rpartition("a_")[2] for task in runner.started]
    assert len(names) == 11 and names.count("red_cube_bouncing_seed_1") == 1  # 2: not once more


def test_a_job_without_a_log_fails_and_the_others_go_on(made, caplog):
    sweep = made(f"config: {STAGE}\nprompts: {PROMPTS}")
    sweep.log(sweep.jobs[0]).mkdir(parents=True)
    runner = Here(capacity=2)
    assert states(entries(sweep, runner)) == ["failed", "done"] and len(runner.started) == 1
    assert "_seed_0.log: Is a directory" in caplog.text


def test_a_job_that_another_process_began_first_has_not_failed(made):
    sweep = made(f"config: {STAGE}\nprompts: {PROMPTS[:1]}\nretries: 0")
    runner = Here(statuses=[IN_USE, IN_USE])
    assert states(entries(sweep, runner)) == ["done"] and len(runner.started) == 3
    assert not sweep.has_failed(sweep.jobs[0])


def test_two_recipes_in_one_folder_have_records_and_logs_of_their_own(made, tmp_path):
    (tmp_path / "own.yaml").write_text(
        f"base: {STAGE}\nname: own\nsystem: {{loss: {{lambda_sparsity: 3}}}}\n"
    )
    text = f"config: CONFIG\nprompts: {PROMPTS[:1]}"
    one, other = (made(text.replace("CONFIG", config)) for config in (STAGE, str(tmp_path / "own.yaml")))
    for sweep in (one, other):
        assert states(entries(sweep, Here())) == ["done"]
    for sweep in (one, other):
        sweep.check()
        assert sweep.log(sweep.jobs[0]).read_text().count("exit status 0") == 1


def test_a_trial_that_another_process_owns_is_waited_for(made):
    sweep = made(f"config: {STAGE}\nprompts: {PROMPTS[:1]}")
    other = owned(sweep.jobs[0].trials[0])
    other.__enter__()
    write_whole(sweep.record(sweep.jobs[0]), json.dumps(sweep.jobs[0].given))
    with pytest.raises(ConfigError, match="trained with other settings"):
        made(f"config: {STAGE}\nprompts: {PROMPTS[:1]}", "system.loss.lambda_sparsity=3").check()
    seen = []

    def show(found):
        seen.append(found[0].state)
        if seen == [State.ELSEWHERE] * 3:
            other.__exit__(None, None, None)

    assert states(entries(sweep, Here(), show)) == ["done"]
    assert seen[:3] == [State.ELSEWHERE] * 3


def test_a_task_that_does_not_end_is_told_of(made, monkeypatch, caplog):
    monkeypatch.setattr(runners, "STOP_SECONDS", 0.0)

    def show(found):
        raise Stopped(143)

    runner = Here(statuses=[None])
    sweep = made(f"config: {STAGE}\nprompts: {PROMPTS[:1]}")
    with pytest.raises(Stopped):
        entries(sweep, runner, show)
    assert "jobs that have not ended, and go on by themselves: 1" in caplog.text
    assert sweep.log(sweep.jobs[0]).read_text() == ""  # it has not stopped


def test_a_signal_stops_the_tasks_first(made, caplog):
    def show(found):
        raise Stopped(143)

    runner = Here(capacity=2, statuses=[None, None])
    polls = iter([None, None, 143, 143, 143, 143])
    runner.poll = lambda handle: next(polls)
    sweep = made(f"config: {STAGE}\nprompts: {PROMPTS}\nseeds: 0-1")
    for job in sweep.jobs:
        sweep.log(job).parent.mkdir(parents=True, exist_ok=True)
        sweep.log(job).write_text("# 9.0 s, exit status 1\n")
    with pytest.raises(Stopped):
        entries(sweep, runner, show)
    assert len(runner.stopped) == 2 and list(polls) == []
    assert "have not ended" not in caplog.text
    ends = [sweep.log(job).read_text().splitlines()[-1] for job in sweep.jobs]
    assert [end.endswith(" s, stopped") for end in ends] == [True, True, False, False]
    assert all(9 <= sweep.seconds(job) < 60 for job in sweep.jobs)


def test_the_best_seeds_go_on(made, tmp_path, capsys, caplog):
    recipe = tmp_path / "two.yaml"
    recipe.write_text(f"stages: [{STAGE}, {CONFIGS / 'shapes_stage_2.yaml'}]\n")
    text = f"config: {recipe}\nprompts: {PROMPTS[:1]}\nseeds: 0-2\nkeep: 1 of 3 after stage 1\n"
    sweep = made(text)
    found = entries(sweep, Here(statuses=[2]))  # seed 0 fails
    assert sorted(states(found)) == ["done", "dropped", "failed"] and found[0].state is State.FAILED
    assert results.dropped(sweep) == {entry.job.tag for entry in found if entry.state is State.DROPPED}
    priors = {
        state: row_of(sweep, entry.job).get("prior")
        for state, entry in zip(states(found), found, strict=True)
    }
    scores = [scheduler.score_of(entry.job, "prior", 1) for entry in found]
    done = states(found).index("done")
    assert scores[0] is None and scores[done] == min(scores[1:]) and priors["done"] > 0
    assert [row_of(sweep, entry.job)["stages"] for entry in found if entry.state is State.DROPPED] == [
        "1 of 2"
    ]
    again, fewer = Here(), made(text.replace("0-2", "1-2").replace("of 3", "of 2"))
    assert states(entries(fewer, again)) == states(found)[1:]
    assert not again.started
    write_results(fewer)
    assert "1 of 2 jobs are done, 1 dropped." in (fewer.folder / "index.html").read_text()
    command.list_jobs(fewer)
    said = capsys.readouterr().out
    assert re.search(r"seed \d +│ dropped ", said) and said.endswith("\n0 of 2 jobs to do\n")
    for wrong, message in (
        ("lowest piror", r"^keep_by: no metric 'piror'; expected one of .*iou, .*prior.*, or a curve: loss/"),
        ("loss/a", r"^keep_by: .*: no 'loss/a' after stage 1; .*loss/.*, prior"),
    ):
        with pytest.raises(ConfigError, match=message):
            entries(made(text.replace("0-2", "1-2").replace("of 3", "of 2") + f"keep_by: {wrong}"), again)
    for job in fewer.jobs:  # a disk was full, a copy torn
        if job.has_finished(2):
            (job.trials[1] / "save" / f"it{job.ends[1]}-evaluation.json").write_text("[")
        else:
            (job.trials[0] / "csv_logs" / "version_0" / "metrics.csv").write_text("step,loss/a\n1,0.0-1\n")
    rows = write_results(fewer)
    assert [row["stages"] for row in rows if "prior" not in row] == [row["stages"] for row in rows]
    assert caplog.text.count("its numbers can't be read from") == 2


RECIPE = f"config: {CONFIGS / 'shapes.yaml'}\nprompts: {PROMPTS[:1]}\n"


@pytest.mark.parametrize(("order", "dropped"), [("lowest", {1, 2}), ("highest", {0, 1})])
def test_seeds_without_a_number_are_the_worst_and_complete_ones_stay(made, monkeypatch, order, dropped):
    sweep = made(f"{RECIPE}seeds: 0-3\nkeep: 2 of 4 after stage 1\nkeep_by: {order} motion")
    monkeypatch.setattr(results, "score_of", lambda job, *_: (1.0, None, 3.0, 2.0)[job.seed])
    assert results.not_kept(sweep, sweep.jobs) == {sweep.jobs[seed].tag for seed in dropped}
    monkeypatch.setattr(Job, "has_finished", lambda job, stages: job.seed == 1)
    assert results.not_kept(sweep, sweep.jobs) == {sweep.jobs[seed].tag for seed in dropped - {1}}


def test_numbers_are_the_stage_s_own_last_ones_and_prior_is_of_priors_late(made):
    (job,) = made(RECIPE).jobs
    for folder, scale in zip(job.trials, (1, 10, 100), strict=True):
        rows = "".join(f"{step},{scale * step},5\n" for step in range(8))
        file = folder / "csv_logs" / "version_0" / "metrics.csv"
        file.parent.mkdir(parents=True)
        file.write_text(f"step,loss/a/sds,loss/a/sparsity\n{rows}")
    assert results.numbers(job, 2) == {"prior": 65.0, "loss/a/sds": 70.0, "loss/a/sparsity": 5.0}


def test_a_number_takes_no_other_column_s_place(made):
    sweep = made(f"config: {STAGE}\nprompts: {PROMPTS[:1]}\ngrid: {{data.multi_view.width: [16]}}")
    (job,) = sweep.jobs
    with pytest.MonkeyPatch.context() as patched:
        found = {"seed": 7.0, "width": 8.0, "trial": 9.0, "iou": 0.5, "prior": 1.0}
        patched.setattr(results, "numbers", lambda job, stages: found)
        row = row_of(sweep, job)
    assert (row["seed"], row["width"], row["iou"], row["prior"]) == (0, "16", 0.5, 1.0)
    assert row["trial"] == str(job.trials[0])
    assert [row[f"metric/{name}"] for name in ("seed", "width", "trial")] == [7.0, 8.0, 9.0]
    sweep.log(job).parent.mkdir(parents=True)
    sweep.log(job).write_text("# 1.5 s, exit status 1\nsaid\n# 2.0 s, exit status 0\n")
    assert row_of(sweep, job)["seconds"] == 3.5


def test_a_kind_of_step_with_a_text_of_its_own_has_no_other(made):
    own = "system.prompt_processor_multi_view.prompt=a green ball sliding"
    assert [cfg.prompt for cfg in made(f"config: {STAGE}\nprompts: {PROMPTS}", own).texts()] == [
        "a green ball sliding"
    ]
    assert [cfg.prompt for cfg in made(f"config: {STAGE}\nprompts: {PROMPTS}").texts()] == PROMPTS


def test_texts_are_encoded_once_before_the_jobs_start(made, tmp_path, monkeypatch):
    """Each encoder is loaded once, and the embeddings are those that the jobs themselves would compute."""
    config = tmp_path / "two.yaml"
    config.write_text(f"stages: [{STAGE}, {CONFIGS / 'shapes_stage_2.yaml'}]\n")
    sweep = made(f"config: {config}\nprompts: {[*PROMPTS, 'red ' * 100]}\nseeds: 0-1")  # one is too long
    loads, load = [], StableDiffusionPromptProcessor.load_encoder
    counted = lambda self, folder, device: [loads.append(folder), load(self, folder, device)][1]  # noqa: E731
    monkeypatch.setattr(StableDiffusionPromptProcessor, "load_encoder", counted)
    found = []
    for name in ("ahead", "each"):
        monkeypatch.setenv("FOURDFY_CACHE", str(tmp_path / name))
        if name == "ahead":
            cache_embeddings(sweep.texts(), "cpu")
            assert len(loads) == len({*loads}) == 2  # the image model's encoder, the four-view model's
        for cfg in sweep.texts():
            if cfg.prompt in PROMPTS:
                cfg.build().embeddings("cpu")
        assert len(loads) == (2 if name == "ahead" else 2 + 4)
        files = (tmp_path / name / "text_embeddings").iterdir()
        found.append({file.name: load_file(file)[KEY] for file in files})
    assert found[0] and found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_seeds_are_kept_by_a_metric_of_their_views(made, tmp_path, monkeypatch):
    """The jobs judge themselves; what the numbers say decides."""
    recipe = tmp_path / "two.yaml"
    recipe.write_text(f"stages: [{STAGE}, {CONFIGS / 'shapes_stage_2.yaml'}]\n")
    text = f"config: {recipe}\nprompts: {PROMPTS[:1]}\nseeds: 0-1\nkeep: 1 of 2 after stage 1\n"
    monkeypatch.setitem(METRICS, "brightness", Metric("brightness", "highest", lambda views: next(numbers)))
    numbers = iter([0.25, 0.75, 0.5])
    sweep = made(text + "keep_by: brightness", "evaluation.metrics=[brightness]", "evaluation.size=8")
    assert states(entries(sweep, Here())) == ["dropped", "done"]
    assert [row_of(sweep, job)["brightness"] for job in sweep.jobs] == [0.25, 0.5]  # the second stage's


def test_the_time_that_is_left_is_that_of_those_that_are_done(monkeypatch):
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: 100.0)

    def entry(state, seconds=0.0, began=0.0):
        job = Job("", 0, {}, "", (), (), ())
        return Entry(job, Path(), 1, state, seconds=seconds, began=began)

    waiting, running = entry(State.WAITING), entry(State.RUNNING, began=95.0)
    assert seconds_left([waiting, running, entry(State.DONE)], 2) is None  # done before this command
    done = entry(State.DONE, 20.0)
    assert seconds_left([waiting, waiting, running, done], 2) == (20 + 20 + 15) / 2
    assert seconds_left([waiting, running, done], 8) == 20  # one job is not divided
    assert seconds_left([done], 8) == 0


# ---------------------------------------------------------------------------------------------
# The local runner


def test_each_gpu_has_its_tasks_and_a_task_sees_one(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16), raising=False)
    given: list = []

    def start(self, environment):
        given.append(environment)
        return Mock(spec=subprocess.Popen, pid=len(given), poll=lambda: 0)

    monkeypatch.setattr(Task, "start", start)
    runner = LocalRunner.Config(per_gpu=2).build()
    task = Task((), tmp_path / "log", "x")
    assert runner.capacity == 4
    handles = [*runner.start([task] * 4)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in given] == ["3", "5", "3", "5"]
    assert runner.poll(handles[1]) == runner.poll(handles[1]) == runner.poll(handles[0]) == 0
    assert len([*runner.start([task, task])]) == 2
    assert [each["CUDA_VISIBLE_DEVICES"] for each in given[4:]] == ["5", "3"]
    assert {each["OMP_NUM_THREADS"] for each in given} == {"4"}
    assert LocalRunner.Config().build("cpu").capacity == 1


def test_tasks_run_as_many_at_a_time_as_the_runner_takes(monkeypatch, tmp_path):
    """A long task first: whoever hands out places in turn gives its place a second one meanwhile."""
    monkeypatch.setattr(runners, "POLL_SECONDS", 0.0)
    left, most = {}, []

    class Slow(Here):
        def _start(self, task):
            left[task.name] = int(task.name)
            most.append(sum(count > 0 for count in left.values()))
            return task.name

        def poll(self, handle):
            left[handle] -= 1
            return int(handle) if left[handle] <= 0 else None

    tasks = [Task((), tmp_path, name) for name in ("20", "1", "2", "3")]
    assert runners.run_all(tasks, Slow(capacity=2)) == [20, 1, 2, 3]
    assert max(most) == 2


def test_what_ends_a_run_of_tasks_stops_them_first(monkeypatch, tmp_path):
    monkeypatch.setattr(runners, "POLL_SECONDS", 0.0)
    runner = Here(capacity=2, statuses=[7, 8])
    found = iter([0, KeyboardInterrupt, None, 143])

    def poll(handle):
        if (status := next(found)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return status

    runner.poll = poll
    with pytest.raises(KeyboardInterrupt):
        runners.run_all([Task((), tmp_path, name) for name in "abc"], runner)
    assert runner.stopped == [8] and list(found) == []


def test_a_task_is_the_command_line_in_a_process_with_a_log(tmp_path):
    runner = LocalRunner.Config(per_gpu=2).build("cpu")
    words = (("--help",), ("--train",))
    tasks = [Task(given, tmp_path / given[0], "x") for given in words]
    tasks[0].log.write_text("an earlier one\n")
    handles = [*runner.start(tasks)]
    for handle in handles:
        handle.wait()
    assert [runner.poll(handle) for handle in handles] == [0, 2]
    said = tasks[0].log.read_text()
    assert (
        said.startswith("an earlier one\n")
        and "--sweep FILE" in said
        and "is required" in tasks[1].log.read_text()
    )


def test_a_task_stops_when_the_one_that_started_it_is_killed(tmp_path):
    starts = "\n".join([
        "import sys, time; from pathlib import Path; from fourdfy.launching.sweeps.runners import Task",
        "Task((), Path(sys.argv[1]), 'x', ('-c', sys.argv[2])).start(); time.sleep(100)",
    ])  # fmt: skip
    runs = "\n".join([
        "import time; from fourdfy.signals import StopSignals, stop_with_parent",
        "with StopSignals(lambda: 'again'):",
        "    stop_with_parent(); print('begun', flush=True); time.sleep(100)",
    ])  # fmt: skip
    log = tmp_path / "log"
    parent = subprocess.Popen([sys.executable, "-c", starts, str(log), runs], cwd=ROOT)
    wait_for(lambda: log.is_file() and "begun" in log.read_text())
    parent.kill()
    parent.wait()
    wait_for(lambda: "stopped by SIGTERM; again" in log.read_text())


# ---------------------------------------------------------------------------------------------
# The command line, and the results


def test_a_terminal_shows_what_runs_and_what_is_logged_above_it(monkeypatch, tmp_path):
    entry = Entry(Job("a\x1b[2J cube", 3, {}, "x", (), (), ()), tmp_path / "log", 1, State.RUNNING)
    entry.log.write_text("stage 1/3  40/100\n")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    handler = logging.StreamHandler()
    monkeypatch.setattr(logging.root, "handlers", [handler])
    with command.Display(Sweep(SweepConfig()), Here(capacity=0)) as display:  # its machines are gone
        display.show([entry, replace(entry, state=State.DONE, seconds=3600.0)])
        logging.getLogger().warning("a job failed")
    shown = terminal.getvalue()
    assert re.search(r"a\\x1b\[2J cube, seed 3 +│ stage 1/3  40/100", shown) and "1 running" in shown
    assert shown.index("1 running") < shown.index("a job failed\n") < shown.rindex("1 running")
    assert handler.stream is terminal


@pytest.mark.parametrize(("count", "last"), [(18, "a red…, seed 17"), (19, "and 2 more")])
def test_each_job_that_runs_has_one_line_of_the_terminal(count, last, tmp_path):
    (tmp_path / "log").write_text("stage 1/3  4000/10000  40%  eta 0:12:03  3.21/s  multi-view 12  video 3\n")
    found = [
        Entry(Job("a red cube " * 9, seed, {}, "x", (), (), ()), tmp_path / "log", 1, State.RUNNING)
        for seed in range(count)
    ]
    found += [Entry(found[0].job, tmp_path / "log", 1, state) for state in State if state != State.RUNNING]
    console = Console(width=80, height=24, file=io.StringIO())
    console.print(command.table_of(found, 600.0, console.size))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 23 and all(cell_len(line) == 80 for line in lines)
    assert lines[0].startswith(f"1 waiting, {count} running, 1 running elsewhere, 1 done, 1 failed")
    assert re.search(r"^│ a red .*…[a-z ]*, seed 0 │ stage 1/3  4000/10000  40%  eta 0:12:03… │$", lines[4])
    assert re.search(last.replace("…", ".*"), lines[-2])


def test_the_command_lists_runs_and_gathers(tmp_path, monkeypatch, capsys, caplog):
    here = Here()
    monkeypatch.setattr(LocalRunner.Config, "build", lambda self, gpu: here)
    (tmp_path / "prompts.txt").write_text("a red cube bouncing\n")
    words = ["--sweep", str(tmp_path / "prompts.txt"), "--config", STAGE, "--seeds", "0-1", "--gpu", "cpu"]
    words += [*GIVEN, "trainer.max_steps=1", f"exp_root_dir={tmp_path / 'out'}"]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"a red cube bouncing, seed 1 +│ to do +│ \d\.\d GiB", said)
    assert said.splitlines()[-2:] == [
        "2 of 2 jobs to do, 1 steps each",
        "time unknown until a job is done; docs/scaling.md has measured times of steps",
    ]
    assert main([*words, "--gather"]) == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'out'} has no trial of this sweep; ")
    assert said.endswith("exp_root_dir=DIR\n") and said.count("\n") == 1
    assert main([*words, "--dry-run", "--gpu", "0"]) == 2 and "--gpu: a sweep uses" in capsys.readouterr().err
    encoded = []
    monkeypatch.setattr(command, "cache_embeddings", lambda texts, device: encoded.append((*texts, device)))
    assert main([*words, "--verbose"]) == 0
    ((texts, device),) = encoded
    assert (texts.prompt, device) == ("a red cube bouncing", "cpu")
    assert here.started and all("--verbose" in task.arguments for task in here.started)
    folder = tmp_path / "out" / "sweep"
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [(row["prompt"], row["seed"], row["stages"]) for row in rows] == [
        ("a red cube bouncing", "0", "1 of 1"), ("a red cube bouncing", "1", "1 of 1"),
    ]  # fmt: skip
    assert float(rows[0]["prior"]) > 0 and Path(rows[0]["trial"]).is_dir() and float(rows[0]["seconds"]) > 0
    page = (folder / "index.html").read_text()
    assert page.count('src="data:image/webp;base64,') == 2 and "http:" not in page and "https:" not in page
    assert "../shapes_stage_1/a_red_cube_bouncing_seed_1" in page and "2 of 2 jobs are done." in page
    assert "a red cube bouncing, seed 1: done (2 done)" in caplog.text
    (folder / "index.html").unlink()
    with monkeypatch.context() as patched:  # the clips have not changed
        patched.setattr("fourdfy.pages.clips.clip", None)
        assert main([*words, "--gather"]) == 0 and (folder / "index.html").read_text() == page
    (folder / "index.html").unlink()
    (folder / "index.html").mkdir()
    capsys.readouterr()
    assert main([*words, "--gather"]) == 1 and "the run continues" not in caplog.text
    assert re.fullmatch(r"error: .*index\.html can't be written: .*; move away .*\n", capsys.readouterr().err)
    (folder / "results.csv").unlink()
    (folder / "results.csv").mkdir()
    assert main([*words, "--gather"]) == 1 and "results.csv can't be written" in capsys.readouterr().err


def took(sweep: Sweep, **seconds: list[float]) -> dict[str, str]:
    """States of its jobs, in order: as many of each as have seconds; the others are to do."""
    states = {job.tag: "to do" for job in sweep.jobs}
    ends = [(state, each) for state, some in seconds.items() for each in some]
    for job, (state, each) in zip(sweep.jobs, ends, strict=False):
        sweep.log(job).parent.mkdir(parents=True, exist_ok=True)
        sweep.log(job).write_text(f"# {each:.1f} s, exit status 0\n")
        states[job.tag] = state
    return states


def test_hours_to_go_are_told_by_the_jobs_that_are_done(made):
    sweep = made(f"config: {STAGE}\nprompts: {PROMPTS}\nseeds: 0-1\n")
    unknown = "time unknown until a job is done; docs/scaling.md has measured times of steps"
    failed = took(sweep) | took(sweep, **{"to do": [7200.0]})
    assert command.left_to_do(sweep, failed) == ["4 of 4 jobs to do, 1 steps each", unknown]
    assert command.left_to_do(sweep, took(sweep, done=[7200.0, 3600.0])) == [
        "2 of 4 jobs to do, 1 steps each",
        "about 3.0 hours of one device, by those that are done",
    ]
    sweep = made(RECIPE + "grid: {stage_3.trainer.max_steps: [2, 4]}")
    assert command.left_to_do(sweep, took(sweep))[0] == "2 of 2 jobs to do, 4 to 6 steps each"


def test_of_seeds_that_are_dropped_the_first_stages_count(made):
    text = RECIPE.replace(str(PROMPTS[:1]), str(PROMPTS)) + "seeds: 0-3\nkeep: 1 of 4 after stage 1\n"
    sweep, of_done = made(text), " hours of one device, by those that are done"
    some = "4 of 8 jobs to do, 1 of them with all 3 steps, the others to stage 1"
    for dropped, hours in (([3600.0] * 3, "about 5.0"), ([0.0] * 3, "at most 8.0")):
        states = took(sweep, done=[7200.0], dropped=dropped)
        assert command.left_to_do(sweep, states) == [some, hours + of_done]
    of_one = command.left_to_do(sweep, took(sweep, done=[7200.0], dropped=[0.0] * 6))
    assert of_one == ["1 of 8 jobs to do, 3 steps each", "about 2.0" + of_done]


def test_a_damaged_file_costs_a_warning_and_the_trial_is_the_last_column(made, caplog):
    """The first row has no numbers then."""
    sweep = made(f"config: {STAGE}\nprompts: {PROMPTS[:1]}\nseeds: 0-1")
    for job, rows in zip(sweep.jobs, ("garbage\n1,2\n", "step,loss/a/sds\n1,2\n"), strict=True):
        file = job.trials[0] / "csv_logs" / "version_0" / "metrics.csv"
        file.parent.mkdir(parents=True)
        file.write_text(rows)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Job, "has_finished", lambda job, stages: True)
        rows = write_results(sweep)
    assert "prior" not in rows[0] and rows[1]["prior"] == 2
    assert caplog.text.count("its numbers can't be read from") == 1
    (header, *_) = (sweep.folder / "results.csv").read_text().splitlines()
    assert header == "prompt,seed,stages,seconds,prior,loss/a/sds,trial"


def test_a_prompt_can_not_act_on_the_page(made):
    sweep = made(f"config: {STAGE}\nprompts: ['<script>alert(1)</script> \"x']")
    write_results(sweep)
    page = (sweep.folder / "index.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "x.yaml", "--train"], "--sweep takes no"),
        (["--config", "shapes", "--train", "--seeds", "0-3"], "are for --sweep"),
        (["--compare", "one", "two", "--prompt", "a panda"], "--out, and nothing else"),
        (["--config", "shapes", "--check", "--stages", "2"], "--stages says how many"),
        (["--train"], "one of --config --trial --replay --compare --sweep --study"),
        (["--config", "shapes", "--trian"], "unrecognized arguments: --trian; --help lists"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1


def test_more_stages_than_a_recipe_has_are_refused(capsys):
    assert (
        main(["--config", STAGE, "--train", "--stages", "2", "--gpu", "cpu", "--prompt", "a red cube"]) == 2
    )
    assert capsys.readouterr().err == f"error: --stages 2: {STAGE} has 1\n"


def test_the_log_s_last_line_is_shown(tmp_path):
    assert command.last_line(tmp_path / "no.log") == ""
    (tmp_path / "a.log").write_text("first\nstage 1/3  4/4\n\n")
    assert command.last_line(tmp_path / "a.log") == "stage 1/3  4/4"
