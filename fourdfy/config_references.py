"""``${...}`` in configs: references to other keys, and the resolvers of threestudio's files.

A config may be somebody else's: its references must neither read a secret of the environment nor multiply
until the memory is full.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    InterpolationToMissingValueError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from omegaconf.resolvers import oc

from fourdfy.config import MISSES, config_error, source_of
from fourdfy.config_files import PROMPT, ConfigError, check_readable
from fourdfy.schedules import schedule_max

UNRESOLVED = (GrammarParseError, InterpolationKeyError, UnsupportedInterpolationType)
"""Errors of a ``${...}`` that may have been meant as text."""

REFERENCE = re.compile(r"(?<!\\)\$\{\s*(\.*)([\w\[\].-]+?)\s*\}")
COMPUTED = re.compile(r"(?<!\\)\$\{(?!\s*\.*[\w\[\].-]+?\s*\}|\s*(?:oc\.env|(?!oc\.)[\w.]+)\s*:)")
"""A reference whose name is put together, or a resolver that makes references or follows them."""

MOST_TEXT, PER_REFERENCE, MOST_COMPUTED = 10**7, 1000, 16
"""Bounds of a config: characters, what a reference counts as beside those that it leads to, and how many
names may be put together, since what these lead to is not known beforehand."""

_is_ours: ContextVar[bool] = ContextVar("_is_ours", default=False)
"""Whether a config of ours is being resolved, and not one of a program that uses OmegaConf too."""


def resolved(values: dict[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """Plain values, their references replaced.

    Raises:
        ConfigError: a reference leads nowhere, in a circle or to far too much, a resolver fails, or a
            variable of the environment is not for configs (``config_files.READABLE``).
    """
    within, config = _is_ours.set(True), OmegaConf.create()
    try:
        _check_growth(values, sources)
        config = OmegaConf.create(values)
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except InterpolationToMissingValueError as error:
        key = str(error).splitlines()[0].split(": ")[-1]
        option = ", or type --prompt TEXT" if key == PROMPT else ""
        raise ConfigError(f"{key}: {MISSES}{option}") from error
    except RecursionError as error:
        raise ConfigError("the config is nested too deeply, or its references lead on and on") from error
    except OmegaConfBaseException as error:
        key, problem = _origin(config, error.full_key or ""), str(error).splitlines()[0]
        problem = problem.removeprefix("ValueError raised while resolving interpolation: ")
        if isinstance(error, GrammarParseError):
            problem = f"not understood as a ${{reference}} ({problem})"
        if isinstance(error, UNRESOLVED):
            problem += "; write \\${ for these characters"
        raise ConfigError(f"{key}{source_of(key, sources)}: {problem}") from error
    finally:
        _is_ours.reset(within)


def _origin(config: DictConfig, key: str, *before: str) -> str:
    """The key whose own ``${...}`` fails, where that of ``key`` may only lead there; in a circle the first.

    Args:
        before: keys whose references lead to it.
    """
    path = tuple(_names(key))
    text = _at(OmegaConf.to_container(config), path)
    for dots, name in REFERENCE.findall(text) if isinstance(text, str) else ():
        target = ".".join(_target(path, dots, name))
        try:
            OmegaConf.select(config, target)
        except OmegaConfBaseException:
            chain = (*before, key)
            return chain[0] if target in chain else _origin(config, target, *chain)
    return key


def _target(path: tuple[str, ...], dots: str, name: str) -> tuple[str, ...]:
    """Where a reference at ``path`` leads; each of its leading dots goes up by one."""
    return (*(path[: -len(dots)] if dots else ()), *_names(name))


def _names(key: str) -> list[str]:
    return re.findall(r"[^.\[\]]+", key)


def _check_growth(values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Refuse references that multiply: ten keys, each of which names the next one ten times."""
    sizes: dict[tuple[str, ...], int] = {}
    computed = 0

    def size(path: tuple[str, ...], value: Any) -> int:
        """Of a value once it is resolved, in characters, and ``PER_REFERENCE`` for each reference."""
        nonlocal computed
        if isinstance(value, Mapping | list):
            entries = value.items() if isinstance(value, Mapping) else enumerate(value)
            return sum(size((*path, str(name)), entry) for name, entry in entries)
        total = len(value) if isinstance(value, str) else 1
        for dots, name in REFERENCE.findall(value) if isinstance(value, str) else ():
            target = _target(path, dots, name)
            if target not in sizes:
                sizes[target] = 0  # for circles, which OmegaConf finds
                sizes[target] = size(target, found := _at(values, target))
                if isinstance(found, Mapping) and not REFERENCE.fullmatch(value):
                    raise config_error("", ".".join(path), sources, f"{name} is a mapping, and this a text")
            total += sizes[target] + PER_REFERENCE
        computed += len(COMPUTED.findall(value)) if isinstance(value, str) else 0
        if total > MOST_TEXT or computed > MOST_COMPUTED:
            raise config_error("", ".".join(path), sources, "its references multiply beyond any use")
        return total

    size((), values)


def _at(values: Any, path: tuple[str, ...]) -> Any:
    """What is at a path of names and indices; None if nothing is."""
    for name in path:
        if isinstance(values, list):
            values = dict(enumerate(values)).get(int(name)) if name.isdecimal() else None
        else:
            values = values.get(name) if isinstance(values, Mapping) else None
    return values


def register_resolvers() -> None:
    """The resolvers of threestudio's YAML files, under their names, and an ``oc.env`` that keeps secrets."""
    for name, resolver in RESOLVERS.items():
        OmegaConf.register_resolver(name, resolver, replace=True)


def _product(a: Any, b: Any) -> Any:
    """Of numbers: a text times 10^9 would fill the memory."""
    if not isinstance(a, int | float) or not isinstance(b, int | float) or abs(a) > 1e150 or abs(b) > 1e150:
        raise ValueError(f"mul: expected two numbers, got {str(a)[:40]} and {str(b)[:40]}")
    return a * b


def _without_spaces(text: Any, sub: Any) -> str:
    if len(str(sub)) > 8:
        raise ValueError(f"rmspace: expected a character in place of a space, got {str(sub)[:40]!r}")
    return str(text).replace(" ", str(sub))


def _environment(name: str, *default: Any) -> Any:
    if _is_ours.get():
        check_readable(name)
    return oc.env(name, *default)


RESOLVERS: dict[str, Callable[..., Any]] = {
    "calc_exp_lr_decay_rate": lambda factor, n: factor ** (1.0 / n),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": _product,
    "div": lambda a, b: a / b,
    "idiv": lambda a, b: a // b,
    "basename": lambda path: Path(path).name,
    "rmspace": _without_spaces,
    "tuple2": lambda scalar: [float(scalar), float(scalar)],
    "gt0": lambda value: value > 0,
    "not": lambda value: not value,
    "cmaxgt0": lambda value: schedule_max(value) > 0,
    "cmaxgt0orcmaxgt0": lambda a, b: schedule_max(a) > 0 or schedule_max(b) > 0,
    "oc.env": _environment,
}
