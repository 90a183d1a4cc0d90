"""Frozen, typed configs of components that name each other, parsed before anything is built.

``parse_config`` turns a mapping (see ``config_layers.load_config``) into a component's ``Config`` dataclass,
and goes down into the configs of the components it names. A typo dies here, with its full key, its file,
what was expected and the nearest right key.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from fourdfy import registry
from fourdfy.bounds import misfits
from fourdfy.config_files import ConfigError, escaped, join, plain

logger = logging.getLogger(__name__)


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


def file_path(default: Any = None) -> Any:
    """A field that names a file or folder, or a list of them; ``~`` and ``$VAR`` are expanded on loading."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"path": True})
    return field(default=default, metadata={"path": True})


def keyed_by_path() -> Any:
    """A mapping whose keys are dotted paths, such as ``geometry.encoding``, and its values options.

    On the command line the last key is an option (``params.geometry.encoding.lr=0.1``), unless the value
    is a mapping or null, which is for the whole entry.
    """
    return field(default_factory=dict, metadata={"keyed_by_path": True})


def ignored(reason: str, default: Any = None) -> Any:
    """A field that old files set and nothing reads; ``warn_of_ignored`` names it where it is set.

    Args:
        reason: what takes its place, or why nothing does.
        default: the value that goes without saying.
    """
    return field(default=default, metadata={"ignored": reason})


def alias(other: str, declared: Any) -> Any:
    """The field ``declared``, which other programs' files call ``other``."""
    declared.metadata = {**declared.metadata, "alias": other}
    return declared


def warn_of_ignored(cfg: Any) -> None:
    """One warning that names every key of a parsed config that was set and has no effect."""
    if lines := [f"  {key}: {reason}" for key, reason in _ignored_keys(cfg, "")]:
        logger.warning("these keys of the config have no effect:\n%s", "\n".join(lines))


def _ignored_keys(cfg: Any, path: str) -> Iterator[tuple[str, str]]:
    for f in dataclasses.fields(cfg):
        value, key = getattr(cfg, f.name), join(path, f.name)
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
    known = init_fields(schema)
    for name, f in known.items():
        if (other := f.metadata.get("alias")) in given:
            if name in given:
                raise config_error(path, other, sources, f"is {name} by another name; set one of the two")
            given[name] = given.pop(other)
    for key in given:
        if key not in known:
            raise config_error(path, key, sources, _unknown_key(key, known, given))

    parsed_slots = {}
    for name, f in known.items():
        if spec := f.metadata.get("slot"):
            defaults = f.default_factory()  # type: ignore[misc]
            parsed_slots[name] = _parse_slot(spec, name, given, known, defaults, path, sources)
            given.pop(name, None)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), escaped(given))
        missing = [key for key in OmegaConf.missing_keys(merged) if key.split(".")[0] not in parsed_slots]
        if missing:
            raise config_error(path, missing[0], sources, "missing; set it in the file or as key=value")
        for key, problem in _misfits(schema, merged, parsed_slots):
            raise config_error(path, key, sources, problem)
        values = {}
        for name in known.keys() - parsed_slots.keys():
            try:
                values[name] = OmegaConf.to_object(v) if OmegaConf.is_config(v := merged[name]) else v
            except ValueError as error:  # from __post_init__ of a nested dataclass
                raise config_error(path, name, sources, str(error)) from error
        return schema(**values, **parsed_slots)
    except OmegaConfBaseException as error:
        key = error.full_key or _culprit(schema, given)
        raise config_error(path, key, sources, _explain(error, schema, key)) from error
    except TypeError as error:  # of merging, which does not say where
        if not (key := _culprit(schema, given)):
            raise
        problem = "a mapping stands where a list is expected, or a list in place of a mapping"
        raise config_error(path, key, sources, problem) from error
    except ValueError as error:  # from __post_init__
        raise (
            error if isinstance(error, ConfigError) else config_error(path, "", sources, str(error))
        ) from error


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
        raise config_error(path, name, sources, f"expected a mapping, got {inner!r}")
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
            raise config_error(
                path, where, sources, f"missing; one of {', '.join(registry.names(spec.kind))}"
            )
        return None
    try:
        cls = registry.find(selector, spec.kind)
    except ValueError as error:
        raise config_error(path, where, sources, str(error)) from error
    for key in inner.keys() - init_fields(cls.Config).keys():
        if others := [
            n for n in registry.names(spec.kind) if key in init_fields(registry.find(n, spec.kind).Config)
        ]:
            message = f"unknown key of {selector}; {others[0]} has it: {join(path, where)}={others[0]}"
            raise config_error(join(path, name), key, sources, message)
    cfg = parse_config(cls.Config, inner, join(path, name), sources)
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
        else:
            found = misfits(plain(value), f.metadata)
            yield from ((join(f.name, key), problem) for key, problem in found)


def _explain(error: OmegaConfBaseException, schema: type, key: str) -> str:
    if isinstance(error, ConfigKeyError):
        owner = error.object_type if dataclasses.is_dataclass(error.object_type) else schema
        return _unknown_key(key.split(".")[-1], {f.name: f for f in dataclasses.fields(owner)}, {})
    problem = str(error).split("\n")[0]
    return re.sub(r"Invalid value assigned: \w+ is not a .*\blist\b.*", "expected a list", problem)


def _culprit(schema: type, given: Mapping[str, Any], places: tuple[str, ...] = ()) -> str:
    """The dotted key whose value alone does not fit, for errors that name none."""
    for key, value in given.items():
        nested: Any = value
        for place in (key, *reversed(places)):
            nested = {place: nested}
        try:
            OmegaConf.merge(OmegaConf.structured(schema), nested)
        except (OmegaConfBaseException, TypeError):
            here = (*places, str(key))
            inside = _culprit(schema, value, here) if isinstance(value, Mapping) else ""
            return inside or ".".join(here)
    return ""


def _unknown_key(key: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    guesses = [*_places(key, given)] or difflib.get_close_matches(str(key), list(known), n=1)
    hint = (
        f"did you mean {' or '.join(map(repr, guesses[:3]))}?"
        if guesses
        else f"known keys: {', '.join(sorted(known))}"
    )
    return f"unknown key; {hint}"


def _places(key: str, given: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Where below ``given`` there is such a key."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            if key in value:
                yield join(path, f"{name}.{key}")
            yield from _places(key, value, join(path, str(name)))


def init_fields(schema: type) -> dict[str, dataclasses.Field]:
    """Name -> field, of the fields that a config can set."""
    return {f.name: f for f in dataclasses.fields(schema) if f.init}


def config_error(path: str, key: str, sources: Mapping[str, str], message: str) -> ConfigError:
    """The error of a key inside ``path``, with the file that set it."""
    full = join(path, key)
    return ConfigError(f"{full}{source_of(full, sources)}: {message}")


def source_of(full_key: str, sources: Mapping[str, str]) -> str:
    """The file that set the key, or that set something below it."""
    exact = sources.get(full_key) or next(
        (file for key, file in sources.items() if key.startswith(full_key + ".")), None
    )
    return f" (in {exact})" if exact else ""
