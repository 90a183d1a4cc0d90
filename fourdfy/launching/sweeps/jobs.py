"""The jobs of a sweep: prompts x seeds x settings, each an ordinary run with its own trial folders.

Nothing else says how far a sweep is: a job is done when the test views of its last stage are complete.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fourdfy.bounds import number
from fourdfy.config import Schema, file_path, inner_slot, parse_config
from fourdfy.config_files import COMMAND_LINE, PROMPT, ConfigError, expand_path, find_config, literal_override
from fourdfy.config_layers import load_config
from fourdfy.evaluation.registry import METRICS, PRIOR, find_metric
from fourdfy.files.evaluations import TEST, is_evaluated
from fourdfy.files.names import sanitize_tag
from fourdfy.files.prompt_lists import read_prompts
from fourdfy.launching.experiment import Experiment
from fourdfy.launching.plan import check_files
from fourdfy.launching.recipe import changed_settings, load_recipe, makes_another_run, settings
from fourdfy.launching.sweeps.runners import Runner
from fourdfy.launching.trial import IN_USE, is_owned
from fourdfy.prompts.base import PromptProcessor
from fourdfy.systems.checkpoint import LAST, has_checkpoint

FOLDER = "sweep"
"""Of results and logs, in ``exp_root_dir``."""
MOST_SEEDS = 10_000
COLUMNS = ("prompt", "settings", "seed", "stages", "seconds", PRIOR, "trial")
"""Of ``results.csv``, in every sweep."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Schema):
    """A sweep file. Its jobs are all combinations of ``prompts``, ``seeds``, ``settings`` and ``grid``."""

    config: list[str] = field(default_factory=list)
    """The recipe or experiment of every job, by name or file; several are merged left to right."""
    prompts: Any = None
    """Texts, or a file with one in each line; null: that of the config."""
    seeds: Any = 0
    """One seed, or several: a range with both ends such as ``0-3``, or ``0,2,5-7``, or a list."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Name -> ``key=value`` overrides, as a list; jobs are made with each of them."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Dotted key of the config -> values to try; all combinations are."""
    overrides: list[str] = field(default_factory=list)
    """``key=value`` for all jobs."""
    exp_root_dir: str = file_path("outputs/sweep")
    """The folder of all trials, and of ``sweep/`` with the results."""
    retries: int = number(1, 0)
    """How often a job that has failed is started again."""
    keep: str = ""
    """Such as ``2 of 8 after stage 1``: of the seeds of each prompt and settings, only the best two go on
    after the first stage. Empty: all do."""
    keep_by: str = "prior"
    """The metric by which seeds are kept (docs/evaluation.md lists them), or ``lowest`` or ``highest`` and a
    metric or curve, such as ``lowest loss/video/sds_video``. ``prior`` is the mean of the priors' losses over
    the last quarter of a stage."""
    runner: Any = inner_slot(Runner, by="type", default={"type": "local"})
    """What starts the processes: ``local``, ``ray`` or ``slurm``."""

    def __post_init__(self) -> None:
        if self.keep and not re.fullmatch(r"\d+ of \d+ after stage \d+", self.keep):
            raise ValueError(f"keep={self.keep!r}: expected such as 2 of 8 after stage 1")
        if not self.keep and self.keep_by != "prior":
            raise ValueError(
                f"keep_by={self.keep_by!r}: without keep, all seeds go on; set keep=1 of 4 after stage 1, "
                "say, or leave keep_by out"
            )
        if not re.fullmatch(r"((lowest|highest) )?\S+", self.keep_by):
            raise ValueError(f"keep_by={self.keep_by!r}: expected a metric, or such as: lowest prior")
        for key, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"grid.{key}={values!r}: expected a list of values")
        for name, overrides in self.settings.items():
            if not isinstance(overrides, list) or not all(isinstance(word, str) for word in overrides):
                raise ValueError(f"settings.{name}={overrides!r}: expected a list of key=value")
            if alone := [word for word in overrides if "=" not in word]:
                raise ValueError(
                    f"settings.{name}: {alone[0]!r}: expected key=value, e.g. trainer.max_steps=1000"
                )


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    prompt: str | None
    seed: int
    settings: Mapping[str, str]
    """What distinguishes it besides prompt and seed, as texts: ``settings``, and keys of the grid, by their
    last word where that is enough."""
    tag: str
    trials: tuple[Path, ...]
    """The trial folder of each stage."""
    ends: tuple[int, ...]
    """The last global step of each stage."""
    arguments: tuple[str, ...]
    """What follows ``launch.py``."""
    given: tuple[Mapping[str, Any], ...] = ()
    """The settings of each stage, those of the sweep's first prompt and of any seed."""

    @property
    def name(self) -> str:
        """For people: the prompt, the settings and the seed."""
        given = [f"{key} {value}" for key, value in self.settings.items()]
        return ", ".join([*([self.prompt] if self.prompt else []), *given, f"seed {self.seed}"])

    def has_finished(self, stages: int) -> bool:
        """Whether the test views of the first so many stages are complete."""
        done = zip(self.trials[:stages], self.ends, strict=False)
        return all(is_evaluated(trial, TEST.format(end)) for trial, end in done)

    @property
    def has_begun(self) -> bool:
        """Whether there is something that another run may not overwrite, or count as its own."""
        return (
            self.has_finished(1)
            or self.is_owned
            or any(has_checkpoint(trial / LAST) for trial in self.trials)
        )

    @property
    def is_owned(self) -> bool:
        """Whether some process is at work on one of its trials."""
        return any(map(is_owned, self.trials))


@dataclass(frozen=True)
class Sweep:
    """A parsed sweep file."""

    cfg: SweepConfig
    file: Path = Path()
    typed: tuple[str, ...] = ()
    """Those of ``cfg.overrides`` that the command line has."""
    options: tuple[str, ...] = ()
    """Of ``launch.py``, for all jobs."""

    @property
    def root(self) -> Path:
        return Path(self.cfg.exp_root_dir).absolute()

    @cached_property
    def prompts(self) -> list[str]:
        """None of its own: that of the config."""
        return _texts(self.cfg.prompts)

    @property
    def folder(self) -> Path:
        """Of results and logs."""
        return self.root / FOLDER

    def log(self, job: Job) -> Path:
        """What its processes write, and the seconds that each took; another recipe in the same folder has
        logs of its own."""
        return self.folder / "logs" / job.trials[-1].parent.name / f"{job.tag}.log"

    def seconds(self, job: Job) -> float:
        """Of all of its processes that have ended."""
        return sum((float(seconds) for seconds, _ in self._ends(job)), 0.0)

    def has_failed(self, job: Job) -> bool:
        """Whether its last process has."""
        *_, (_, end) = [("", "stopped"), *self._ends(job)]
        return end not in ("stopped", "exit status 0", f"exit status {IN_USE}")

    def _ends(self, job: Job) -> list[tuple[str, str]]:
        """(seconds, how it ended) of its processes, by its log."""
        log = self.log(job)
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        return re.findall(r"^# ([\d.]+) s, (exit status -?\d+|stopped)$", text, re.M)

    def record(self, job: Job) -> Path:
        """The settings that it was started with."""
        return self.log(job).with_suffix(".json")

    def check(self) -> None:
        """Before anything runs, or is listed.

        Raises:
            ConfigError: see ``jobs`` and ``kept``; or a job's trials have other settings than it, which would
                count as its own.
        """
        _ = self.kept
        self._check_keys()
        jobs = self.jobs
        for *_, stages in self.recipes:
            check_files(stages)
        for job in jobs:
            if changed := self._changed(job):
                raise ConfigError(
                    f"{job.name}: trained with other settings ({', '.join(changed[:4])}); give these "
                    "settings another name, or the sweep another folder: exp_root_dir=DIR"
                )

    def _check_keys(self) -> None:
        """Refuse a key for all jobs, to which some job's own settings give another value."""
        own = {f"settings.{name}": words for name, words in self.cfg.settings.items()}
        own |= {f"grid.{key}": [f"{key}="] for key in self.cfg.grid}
        for where, words in own.items():
            of_all = self.typed if where.startswith("settings.") else self.cfg.overrides
            by_key = {word.partition("=")[0]: word for word in reversed(of_all)}
            for key in (word.partition("=")[0] for word in words):
                if key in by_key:
                    raise ConfigError(
                        f"{by_key[key]}: for all jobs, but {where} sets {key} too; remove one of them"
                    )

    def _changed(self, job: Job) -> list[str]:
        try:
            began = json.loads(self.record(job).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not yet started, by an earlier version, or torn: its run still checks
            return []
        if not job.has_begun:
            return []
        if len(began) != len(job.given):
            return [f"{len(began)} stages"]
        return [
            f"stage_{number}.{key}" if len(began) > 1 else key
            for number, (before, now) in enumerate(zip(began, job.given, strict=True), 1)
            for key in changed_settings(before, now)
            if makes_another_run(key) and key != "seed" and not (job.prompt and key.endswith(".prompt"))
        ]

    @cached_property
    def kept(self) -> tuple[int, int]:
        """(how many seeds go on, after which stage), as ``keep`` says; zeros if all do.

        Raises:
            ConfigError: there are other numbers of seeds or stages.
        """
        if not self.cfg.keep:
            return 0, 0
        best, of, stage = map(int, re.findall(r"\d+", self.cfg.keep))
        seeds, stages = len(_seeds(self.cfg.seeds)), min(len(stages) for *_, stages in self.recipes)
        if of != seeds or not 0 < best <= of:
            raise ConfigError(f"keep: {self.cfg.keep}: there are {seeds} seeds")
        if not 0 < stage < stages:
            raise ConfigError(
                f"keep: {self.cfg.keep}: the recipe has {stages} stages; name one before the last"
            )
        if best == of:
            raise ConfigError(
                f"keep: {self.cfg.keep}: all seeds go on; keep fewer of them, or leave keep out"
            )
        _ = self.keep_by
        return best, stage

    @cached_property
    def keep_by(self) -> tuple[str, str]:
        """(``lowest`` or ``highest``, metric or curve), as ``keep_by`` says.

        Raises:
            ConfigError: there is no such metric.
        """
        *order, name = self.cfg.keep_by.split(" ")
        _ = self.recipes  # whose plugins may have metrics
        try:
            best = "lowest" if name.startswith("loss/") else find_metric(name).best
        except ValueError as error:
            raise ConfigError(f"keep_by: {error}, or a curve: loss/KIND/NAME") from error
        return (order or [best])[0], name

    @cached_property
    def recipes(self) -> list[tuple[dict[str, str], list[str], list[Experiment]]]:
        """(what distinguishes it, its overrides, its stages) of each combination of settings and grid.

        Raises:
            ConfigError: a config or an override is wrong.
        """
        return [(words, given, self._stages(words, given)) for words, given in self._combinations()]

    @cached_property
    def jobs(self) -> list[Job]:
        """All of them; those of one prompt and settings, which differ by their seed, together.

        Raises:
            ConfigError: see ``recipes``; or two jobs are the same.
        """
        prompts: list[str | None] = [*self.prompts] or [None]
        seeds = _seeds(self.cfg.seeds)
        combined = itertools.product(self.recipes, prompts, seeds)
        jobs = [self._job(prompt, seed, *recipe) for recipe, prompt, seed in combined]
        known: dict[str, Job] = {}
        for job in jobs:
            other = known.setdefault(job.tag, job)
            if other is not job:
                is_same = other.name == job.name
                said = "is there more than once" if is_same else f"and {job.name!r} would share a folder"
                raise ConfigError(f"prompts, seeds, settings: {other.name!r} {said}; change one of them")
        return jobs

    def texts(self) -> Iterator[PromptProcessor.Config]:
        """What the jobs encode, as far as it follows from their prompts; what they refuse is left out."""
        for _, _, stages in self.recipes:
            for cfg in (kind.prompts for stage in stages for kind in stage.plan.kinds if kind.prompts):
                yield cfg
                for prompt in self.prompts[1:] if cfg.prompt == self.prompts[0] else ():
                    with suppress(ValueError):
                        yield replace(cfg, prompt=prompt)

    def _combinations(self) -> Iterator[tuple[dict[str, str], list[str]]]:
        keys = [*self.cfg.grid]
        last = [key.rpartition(".")[2] for key in keys]
        labels = [
            word if last.count(word) == 1 and word not in (*COLUMNS, *METRICS) else key
            for key, word in zip(keys, last, strict=True)
        ]
        for name in self.cfg.settings or [""]:
            for point in itertools.product(*([*map(_text, values)] for values in self.cfg.grid.values())):
                words = ({"settings": name} if name else {}) | dict(zip(labels, point, strict=True))
                own = [f"{key}={value}" for key, value in zip(keys, point, strict=True)]
                yield words, [*self._judging, *self.cfg.overrides, *self.cfg.settings.get(name, ()), *own]

    @property
    def _judging(self) -> list[str]:
        """What has jobs write the number by which seeds are kept, if training does not."""
        name = self.cfg.keep_by.split(" ")[-1]
        is_logged = name.startswith("loss/") or (name in METRICS and METRICS[name].logged)
        return [] if is_logged or not self.cfg.keep else ["evaluation.after_training=true"]

    def _stages(self, words: Mapping[str, str], given: Sequence[str]) -> list[Experiment]:
        if not self.cfg.config:
            raise ConfigError("config: missing; name the recipe or experiment of the jobs: --config NAME")
        place = self._place("tag")
        prompts = [literal_override(PROMPT, text) for text in self.prompts[:1]]
        try:
            return [stage.experiment for stage in load_recipe(self.cfg.config, [*prompts, *given, *place])]
        except ConfigError as error:
            raise self._with_origin(error, words, given) from error

    def _with_origin(self, error: ConfigError, words: Mapping[str, str], given: Sequence[str]) -> ConfigError:
        """The error, with the place in the sweep file of the override that it is about."""
        own = f"settings.{name}" if (name := words.get("settings")) else ""
        lists = {own: self.cfg.settings.get(name or "", ()), "overrides": self.cfg.overrides}
        for word in reversed(given):
            key = word.partition("=")[0]
            section, _, last = (bare := _without_stage(key)).rpartition(".")
            whole = rf"{re.escape(bare)}(?![\w.])"
            about = rf"(stage_\d+\.)?({whole}|{re.escape(section)} \(.*?\): {re.escape(last)}\b)"
            if not bare or not re.match(about, str(error)):
                continue
            origin = next((at for at, some in lists.items() if word in some), f"grid.{key}")
            if origin == "overrides" and word in self.typed:
                return error
            place = f"(in {self.file}, {origin})"
            said = str(error).replace(f"(in {COMMAND_LINE})", place)
            return ConfigError(said if place in said else f"{said} {place}")
        return error

    def _place(self, tag: str) -> list[str]:
        root = str(self.root).replace("$", "$$")
        return ["use_timestamp=false", literal_override("tag", tag), literal_override("exp_root_dir", root)]

    def _job(
        self,
        prompt: str | None,
        seed: int,
        words: dict[str, str],
        given: list[str],
        stages: list[Experiment],
    ) -> Job:
        distinct = [f"{key}={value}" for key, value in words.items()]
        tag = sanitize_tag(" ".join([*([prompt] if prompt else []), *distinct, f"seed {seed}"]))
        prompts = [] if prompt is None else [literal_override(PROMPT, prompt)]
        configs = [
            word for name in self.cfg.config for word in ("--config", str(find_config(name).absolute()))
        ]
        return Job(
            prompt=prompt,
            seed=seed,
            settings=words,
            tag=tag,
            trials=tuple(stage.trial_dir.with_name(tag) for stage in stages),
            ends=tuple(stage.cfg.trainer.max_steps for stage in stages),
            arguments=(
                *configs,
                "--train",
                *self.options,
                *prompts,
                *given,
                f"seed={seed}",
                *self._place(tag),
            ),
            given=tuple(settings(stage.values) for stage in stages),
        )


def read_sweep(
    file: Path, given: Mapping[str, Any], overrides: Sequence[str], options: Sequence[str] = ()
) -> Sweep:
    """The sweep of a YAML file, or of a text file of prompts, one in each line.

    Args:
        given: keys of ``SweepConfig`` that replace the file's, and ``per_gpu`` of its runner.
        overrides: ``key=value`` for all jobs, after the file's own.
        options: of ``launch.py``, for all jobs.

    Raises:
        ConfigError: names the key and the file.
    """
    values: dict[str, Any] = {"prompts": str(file)}
    sources: dict[str, str] = {}
    if file.suffix in (".yaml", ".yml"):
        loaded = load_config([file], schema=SweepConfig)
        values, sources = dict(loaded.values), loaded.sources
        names = values.get("config") or []
        names = names if isinstance(names, list) else [names]
        values["config"] = [str(find_config(str(name), file.parent)) for name in names]
        if isinstance(prompts := values.get("prompts"), str):
            try:
                values["prompts"] = str(file.parent / expand_path(prompts, is_typed=False))
            except ValueError as error:
                raise ConfigError(f"prompts ({file}): {error}") from error
    given = dict(given)
    if (per_gpu := given.pop("per_gpu", None)) is not None:
        runner = values.get("runner") or {}
        is_named = isinstance(runner, Mapping)  # else it is refused below
        values["runner"] = {"type": "local", **runner, "per_gpu": per_gpu} if is_named else runner
    roots = [word.partition("=")[2] for word in overrides if word.startswith("exp_root_dir=")]
    overrides = [word for word in overrides if not word.startswith("exp_root_dir=")]
    values |= {**given, **({"exp_root_dir": expand_path(roots[-1])} if roots else {})}
    sources = sources | dict.fromkeys(given, COMMAND_LINE)
    cfg: SweepConfig = parse_config(SweepConfig, values, sources=sources)
    _check_overrides(cfg, overrides)
    cfg = replace(cfg, overrides=[*cfg.overrides, *overrides])
    return Sweep(cfg, file, tuple(overrides), tuple(options))


def _check_overrides(cfg: SweepConfig, typed: Sequence[str]) -> None:
    """Refuse keys that the sweep sets in each job."""
    own = {"seed": "seeds", "tag": "prompts", "use_timestamp": "prompts", "exp_root_dir": "exp_root_dir"}
    own |= {} if cfg.prompts is None else {PROMPT: "prompts"}
    lists = [*cfg.overrides, *typed, *cfg.grid, *itertools.chain(*cfg.settings.values())]
    for key in (str(word).partition("=")[0] for word in lists):
        if (bare := _without_stage(key)) in own:
            raise ConfigError(f"{key}: a sweep sets it for each of its jobs, from its own key {own[bare]}")


def _without_stage(key: str) -> str:
    """The key of an experiment that one of a recipe, perhaps of one stage, sets."""
    return re.sub(r"^stage_\d+\.", "", key)


def _texts(prompts: Any) -> list[str]:
    if prompts is None:
        return []
    if isinstance(prompts, list):
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, str) or not prompt.strip()]:
            raise ConfigError(f"prompts: expected texts, got {wrong[0]!r}; write a text in quotes")
        if not prompts:
            raise ConfigError("prompts: there are none; leave the key out for that of the config")
        return prompts
    return read_prompts(Path(str(prompts)))


def _seeds(seeds: Any) -> list[int]:
    parts = seeds if isinstance(seeds, list) else str(seeds).split(",")
    matches = [re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", str(part)) for part in parts]
    ranges = [range(int(match[1]), int(match[2] or match[1]) + 1) for match in matches if match]
    if not 0 < sum(map(len, ranges)) <= MOST_SEEDS or not all(matches) or not all(ranges):
        raise ConfigError(
            f"seeds: expected up to {MOST_SEEDS} of them, such as 0-3, 5 or 0,2,5-7, got {seeds!r}"
        )
    return [*itertools.chain(*ranges)]


def _text(value: Any) -> str:
    """A value as it is typed."""
    is_yaml_s_own = value is None or isinstance(value, bool | list | dict)
    return json.dumps(value, ensure_ascii=False) if is_yaml_s_own else str(value)
