"""From YAML files and ``key=value`` arguments to frozen, typed configs, before anything is built.

1. ``load_layers`` merges files (each over its own ``base`` files, left to right) and dotlist
   overrides, and remembers which file set each key.
2. ``parse_config`` turns a mapping into a component's frozen ``Config`` dataclass, and goes down into
   the configs of the components it names. A typo dies here, with its full key, its file, what was
   expected and the nearest right key.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationToMissingValueError, OmegaConfBaseException

from fourdfy import registry
from fourdfy.bounds import misfit
from fourdfy.schedules import schedule_max

logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """Something a user wrote in a config file or on the command line; the message says the mend."""


# ---------------------------------------------------------------------------------------------
# Components: classes that a config names


class Component:
    """A class that configs name; ``Config`` is its schema, ``cfg`` its parsed, frozen instance."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        pass

    cfg: Config


@dataclass(frozen=True)
class Slot:
    """How a config field that holds another component's config is parsed."""

    kind: type
    by: str
    """The key that names the class: beside the field, or inside it."""
    inside: bool


def slot(kind: type, by: str, default: Mapping[str, Any] | None = None) -> Any:
    """A field holding the config of the ``kind`` that the key ``by``, beside it, names.

    Where that key is null the field is None.
    """
    return _slot(Slot(kind, by, inside=False), default)


def inner_slot(kind: type, by: str, default: Mapping[str, Any] | None = None) -> Any:
    """A field holding the config of the ``kind`` that its own key ``by`` (say ``otype``) names.

    Given keys are laid over the default's unless they name another class. Without a default the field
    may be left out and is then None.
    """
    return _slot(Slot(kind, by, inside=True), default)


def _slot(spec: Slot, default: Mapping[str, Any] | None) -> Any:
    return field(default_factory=lambda: dict(default or {}), metadata={"slot": spec})


def ignored(reason: str, default: Any = None) -> Any:
    """A field that old files set and nothing reads; ``warn_of_ignored`` names it where it is set.

    Args:
        reason: what takes its place, or why nothing does.
        default: the value that goes without saying.
    """
    return field(default=default, metadata={"ignored": reason})


def warn_of_ignored(cfg: Any) -> None:
    """One warning that names every key of a parsed config that was set and has no effect."""
    if lines := [f"  {key}: {reason}" for key, reason in _ignored_keys(cfg, "")]:
        logger.warning("these keys of the config have no effect:\n%s", "\n".join(lines))


def _ignored_keys(cfg: Any, path: str) -> Iterator[tuple[str, str]]:
    for f in dataclasses.fields(cfg):
        value, key = getattr(cfg, f.name), _join(path, f.name)
        if "ignored" in f.metadata and value != f.default:
            yield key, f.metadata["ignored"]
        elif dataclasses.is_dataclass(value):
            yield from _ignored_keys(value, key)


def component_class(cfg: Component.Config) -> type:
    """The class whose ``Config`` this is: ``build(cfg, ...)`` without repeating the name."""
    return cfg._component  # type: ignore[attr-defined]


def build(cfg: Component.Config, *args: Any, **kwargs: Any) -> Any:
    """The component that ``cfg`` was parsed for: ``component_class(cfg)(cfg, *args, **kwargs)``."""
    return component_class(cfg)(cfg, *args, **kwargs)


# ---------------------------------------------------------------------------------------------
# Parsing


def parse_config(
    schema: type, given: Mapping[str, Any], path: str = "", sources: Mapping[str, str] | None = None
) -> Any:
    """An instance of the dataclass ``schema``, checked down into every component it names.

    Args:
        schema: a (frozen) dataclass; fields made with ``slot`` hold components' configs.
        given: plain values, e.g. from ``OmegaConf.to_container(cfg, resolve=True)``.
        path: the dotted key of ``given`` in the whole config, for messages.
        sources: dotted key -> the file that set it, for messages.

    Raises:
        ConfigError: unknown key, wrong type, missing value, unknown component name.
    """
    sources = sources or {}
    given = dict(given)
    known = {f.name: f for f in dataclasses.fields(schema) if f.init}
    for key in given:
        if key not in known:
            raise _error(path, key, sources, _unknown_key(key, known))

    parsed_slots = {}
    for name, f in known.items():
        if spec := f.metadata.get("slot"):
            defaults = f.default_factory()  # type: ignore[misc]
            parsed_slots[name] = _parse_slot(spec, name, given, known, defaults, path, sources)
            given.pop(name, None)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
        missing = [key for key in OmegaConf.missing_keys(merged) if key.split(".")[0] not in parsed_slots]
        if missing:
            raise _error(path, missing[0], sources, "missing; set it in the file or as key=value")
        for key, problem in _misfits(schema, merged, parsed_slots):
            raise _error(path, key, sources, problem)
        values = {
            name: OmegaConf.to_object(merged[name]) if OmegaConf.is_config(merged[name]) else merged[name]
            for name in known
            if name not in parsed_slots
        }
        return schema(**values, **parsed_slots)
    except OmegaConfBaseException as error:
        key = error.full_key or _culprit(schema, given)
        raise _error(path, key, sources, _explain(error, schema, key)) from error
    except ValueError as error:  # from __post_init__, of a nested dataclass or the schema's own
        raise error if isinstance(error, ConfigError) else _error(path, "", sources, str(error)) from error


def _parse_slot(
    spec: Slot,
    name: str,
    given: Mapping[str, Any],
    known: Mapping[str, dataclasses.Field],
    defaults: Mapping[str, Any],
    path: str,
    sources: Mapping[str, str],
) -> Any:
    inner = given.get(name, defaults)
    if isinstance(inner, Component.Config) or inner is None:
        return inner
    if not isinstance(inner, Mapping):
        raise _error(path, name, sources, f"expected a mapping, got {inner!r}")
    inner = dict(inner)
    if spec.inside:
        if not inner and name not in given:
            return None
        same_class = inner.get(spec.by, defaults.get(spec.by)) == defaults.get(spec.by)
        inner = {**defaults, **inner} if same_class else inner
        selector, where = inner.pop(spec.by, None), f"{name}.{spec.by}"
    else:
        default = known[spec.by].default
        selector, where = given.get(spec.by, None if default is dataclasses.MISSING else default), spec.by
    if selector is None:
        if spec.inside:
            raise _error(path, where, sources, f"missing; one of {', '.join(registry.names(spec.kind))}")
        return None
    try:
        cls = registry.find(selector, spec.kind)
    except ValueError as error:
        raise _error(path, where, sources, str(error)) from error
    cfg = parse_config(cls.Config, inner, _join(path, name), sources)
    object.__setattr__(cfg, "_component", cls)
    return cfg


def _misfits(schema: type, values: DictConfig, done: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of every number that its field doesn't take; see ``bounds``."""
    for f in dataclasses.fields(schema):
        if f.name in done or OmegaConf.is_missing(values, f.name):
            continue
        value, inner = values[f.name], OmegaConf.get_type(values, f.name)
        if isinstance(value, DictConfig) and dataclasses.is_dataclass(inner):
            yield from ((f"{f.name}.{key}", problem) for key, problem in _misfits(inner, value))
        elif problem := misfit(_plain(value), f.metadata):
            yield f.name, problem


def _explain(error: OmegaConfBaseException, schema: type, key: str) -> str:
    if isinstance(error, ConfigKeyError):
        owner = error.object_type if dataclasses.is_dataclass(error.object_type) else schema
        return _unknown_key(key.split(".")[-1], {f.name: f for f in dataclasses.fields(owner)})
    return str(error).split("\n")[0]


def _culprit(schema: type, given: Mapping[str, Any], places: tuple[str, ...] = ()) -> str:
    """The dotted key whose value alone does not fit, for errors that name none."""
    for key, value in given.items():
        nested: Any = value
        for place in (key, *reversed(places)):
            nested = {place: nested}
        try:
            OmegaConf.merge(OmegaConf.structured(schema), nested)
        except OmegaConfBaseException:
            here = (*places, str(key))
            inside = _culprit(schema, value, here) if isinstance(value, Mapping) else ""
            return inside or ".".join(here)
    return ""


def _unknown_key(key: str, known: Mapping[str, Any]) -> str:
    guess = difflib.get_close_matches(str(key), list(known), n=1)
    hint = f"did you mean {guess[0]!r}?" if guess else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key; {hint}"


def _error(path: str, key: str, sources: Mapping[str, str], message: str) -> ConfigError:
    full = _join(path, key)
    return ConfigError(f"{full}{_source_of(full, sources)}: {message}")


def _source_of(full_key: str, sources: Mapping[str, str]) -> str:
    """The file that set the key, or that set something below it."""
    exact = sources.get(full_key) or next(
        (file for key, file in sources.items() if key.startswith(full_key + ".")), None
    )
    return f" (in {exact})" if exact else ""


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key


# ---------------------------------------------------------------------------------------------
# Loading


@dataclass(frozen=True)
class LoadedConfig:
    """The merged, resolved mapping, and for each dotted leaf key the file that set it last."""

    values: dict[str, Any]
    sources: dict[str, str]


def load_config(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), stage: int | None = None
) -> LoadedConfig:
    """Files merged left to right, then ``key=value`` overrides, interpolations resolved.

    Args:
        stage: of a recipe, which one this is: ``stage_2: {...}`` in the files is for the second alone.

    Raises:
        ConfigError: a file is missing or no YAML mapping; an override has no ``=``; a bad interpolation.
    """
    register_resolvers()
    sources: dict[str, str] = {}
    merged = OmegaConf.create()
    for path in paths:
        merged = _merge(merged, _load_layers(Path(path), sources))
    if stage is not None:
        merged = _merge(_without_stages(merged), merged.get(f"stage_{stage}", OmegaConf.create()))
    for override in overrides:
        if "=" not in override or override.startswith(("-", "=")):
            raise ConfigError(f"{override!r}: expected key=value, e.g. trainer.max_steps=1000")
    try:
        dotlist = OmegaConf.from_dotlist(list(overrides))
        _record(dotlist, "the command line", sources)
        merged = _merge(merged, dotlist)
        _share_prompt(merged)
        return LoadedConfig(OmegaConf.to_container(merged, resolve=True), sources)  # type: ignore[arg-type]
    except InterpolationToMissingValueError as error:
        key = str(error).splitlines()[0].split(": ")[-1]
        raise ConfigError(f"{key}: missing; set it in the file or as key=value") from error
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise ConfigError(f"{key}{_source_of(key, sources)}: {str(error).splitlines()[0]}") from error


def _load_layers(path: Path, sources: dict[str, str]) -> DictConfig:
    """The file over its ``base`` files, left to right; later wins."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such config file{hint}")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path}: expected a mapping at the top level")
    bases = layer.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    merged = OmegaConf.create()
    for base in bases:
        merged = _merge(merged, _load_layers(path.parent / base, sources))
    _record(layer, str(path), sources)
    return _merge(merged, layer)


def _without_stages(recipe: DictConfig) -> DictConfig:
    own = [key for key in recipe if not re.fullmatch(r"stages|stage_\d+", str(key))]
    return OmegaConf.masked_copy(recipe, own)


def _merge(below: DictConfig, layer: DictConfig) -> DictConfig:
    """``layer`` over ``below``. Where it names another class (``renderer_type``), the settings of the one
    that it replaces (``renderer``) are left behind."""
    below = copy.deepcopy(below)
    _drop_replaced(below, layer)
    return OmegaConf.merge(below, layer)  # type: ignore[return-value]


def _drop_replaced(below: DictConfig, layer: DictConfig) -> None:
    for key in layer:
        mine, theirs = layer._get_node(key), below._get_node(key)
        if isinstance(mine, DictConfig) and isinstance(theirs, DictConfig):
            _drop_replaced(theirs, mine)
        elif "_type" in str(key) and theirs is not None and _canonical(mine) != _canonical(theirs):
            below.pop(key.replace("_type", "", 1), None)


def _canonical(node: Any) -> Any:
    return registry.ALIASES.get(node._value(), node._value())


def _record(layer: DictConfig, source: str, sources: dict[str, str], prefix: str = "") -> None:
    for key in layer:
        node = layer._get_node(key)
        full = _join(prefix, str(key))
        if isinstance(node, DictConfig) and not node._is_interpolation() and not node._is_missing():
            _record(node, source, sources, full)
        sources[full] = source


def _share_prompt(merged: DictConfig) -> None:
    """``system.prompt_processor.prompt`` serves the other processors unless they have their own."""
    system = merged.get("system")
    prompt = OmegaConf.select(merged, "system.prompt_processor.prompt", throw_on_missing=False)
    for name in ("prompt_processor_multi_view", "prompt_processor_video"):
        if prompt is None or system is None or name not in system:
            continue
        if OmegaConf.is_missing(system[name], "prompt") or "prompt" not in system[name]:
            system[name].prompt = prompt


def register_resolvers() -> None:
    """The resolvers of threestudio's YAML files, under their names."""
    resolvers = {
        "calc_exp_lr_decay_rate": lambda factor, n: factor ** (1.0 / n),
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "idiv": lambda a, b: a // b,
        "basename": lambda path: Path(path).name,
        "rmspace": lambda text, sub: text.replace(" ", sub),
        "tuple2": lambda scalar: [float(scalar), float(scalar)],
        "gt0": lambda value: value > 0,
        "not": lambda value: not value,
        "cmaxgt0": lambda value: schedule_max(_plain(value)) > 0,
        "cmaxgt0orcmaxgt0": lambda a, b: schedule_max(_plain(a)) > 0 or schedule_max(_plain(b)) > 0,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_resolver(name, resolver, replace=True)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
