"""Frozen, typed configs of components that name each other, parsed before anything is built.

``parse_config`` turns a mapping (see ``config_layers.load_config``) into a component's ``Config`` dataclass,
and goes down into the configs of the components it names. A typo is an error here, with its full key, its
file, what was expected and the nearest correct key. ``Config(...).build(...)`` does the same from Python.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from functools import cache
from typing import Any, ClassVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fourdfy import registry
from fourdfy.bounds import misfits
from fourdfy.config_files import ConfigError, escaped, join, plain

MISSES = "missing; set it in the file or as key=value"
MOST_SAID = 2000
"""Characters of a message, which may quote what a file holds."""

# ---------------------------------------------------------------------------------------------
# Components: classes that a config names


class _Parsing(type):
    """A dataclass whose config fields accept plain mappings, which are parsed when it is made."""

    def __call__(cls, **given: Any) -> Any:
        return super().__call__(**given | _parse_inner(cls, given, "", {}))


@dataclass(frozen=True, kw_only=True)
class Schema(metaclass=_Parsing):
    """Base of dataclasses that may be made from Python although they hold components' configs."""


class Component:
    """A class that configs name; ``Config`` is its schema, ``cfg`` its parsed, frozen instance."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Schema):
        component: ClassVar[type[Any]]
        """The class that this configures; every component has its own Config."""

        def build(self, *args: Any, **kwargs: Any) -> Any:
            """The component: ``component(self, *args, **kwargs)``."""
            return self.component(self, *args, **kwargs)

    cfg: Config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" not in vars(cls) or "component" in vars(cls.Config):
            names = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Config"}
            own: Any = types.new_class("Config", (cls.Config,), {}, lambda body: body.update(names))
            cls.Config = dataclass(frozen=True, kw_only=True)(own)  # type: ignore[misc]  # no fixed class
        cls.Config.component = cls


# ---------------------------------------------------------------------------------------------
# Fields


@dataclass(frozen=True)
class Slot:
    """Holds the config of a component of some kind."""

    kind: type[Component]
    by: str
    """The key that names the class: beside the slot, or inside it."""
    inside: bool
    shares: str = ""
    """A key of the slot beside it, such as ``prompt_processor.prompt``; see ``slot``."""


@dataclass(frozen=True)
class Named:
    """Holds a mapping from free names to dataclasses or components' configs."""

    entry: type | Slot
    default: Mapping[str, Any]


def slot(kind: type[Component], by: str, shares: str = "") -> Any:
    """A field holding the config of the ``kind`` that the key ``by``, beside it, names.

    If that key is null, the field is None.

    Args:
        shares: a key of another slot in the same config, such as ``prompt_processor.prompt``. If files and
            overrides don't set this slot's own ``prompt``, or files set both alike, it follows the other's.
    """
    return _holding(Slot(kind, by, inside=False, shares=shares), {})


def inner_slot(kind: type[Component], by: str, default: Mapping[str, Any] | None = None) -> Any:
    """A field holding the config of the ``kind`` that its own key ``by`` (say ``otype``) names.

    Given keys are merged over the default's unless they name another class. Without a default, the field
    may be left out and is then None.
    """
    return _holding(Slot(kind, by, inside=True), default or {})


def named(schema: type, default: Mapping[str, Any] | None = None) -> Any:
    """A field holding a mapping from free names to instances of the dataclass ``schema``.

    Given names are added to the default's, and null switches one off.
    """
    return _holding(Named(schema, default or {}), default or {})


def named_slots(kind: type[Component], by: str, default: Mapping[str, Any] | None = None) -> Any:
    """A field holding a mapping from free names to configs of the ``kind`` that each one's key ``by`` names.

    Given names are added to the default's, and null switches one off. If a later file or override names
    another class, the replaced entry is dropped completely.
    """
    return _holding(Named(Slot(kind, by, inside=True), default or {}), default or {})


def _holding(spec: Slot | Named, default: Mapping[str, Any]) -> Any:
    return field(default_factory=lambda: dict(default), metadata={"holds": spec})


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


def alias(other: str, declared: Any) -> Any:
    """The field ``declared``, which other programs' files call ``other``."""
    declared.metadata = {**declared.metadata, "alias": other}
    return declared


# ---------------------------------------------------------------------------------------------
# Which schema is for which mapping


def init_fields(schema: type | Named) -> dict[str, dataclasses.Field]:
    """Name -> field, of the fields that a config can set; none of free names."""
    return {} if isinstance(schema, Named) else _init_fields(schema)


@cache
def _init_fields(schema: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(schema) if f.init}


@cache
def kinds(schema: type) -> dict[str, tuple[Any, ...]]:
    """Field -> the types that its annotation allows."""
    hints = typing.get_type_hints(schema)
    unions = (typing.Union, types.UnionType)
    return {key: typing.get_args(h) if typing.get_origin(h) in unions else (h,) for key, h in hints.items()}


def held(schema: type | Named, name: str) -> type | Slot | Named | None:
    """The schema of a field or named entry that is a mapping; None if it holds plain values."""
    if isinstance(schema, Named):
        return schema.entry
    f = init_fields(schema).get(name)
    if f is None:
        return None
    if "holds" in f.metadata:
        return f.metadata["holds"]
    allowed = (kind for kind in kinds(schema)[name] if isinstance(kind, type))
    return next((kind for kind in allowed if dataclasses.is_dataclass(kind)), None)


def default_of(schema: type | Named, name: str) -> Any:
    """The default of a field or of a named entry; None if it has none."""
    if isinstance(schema, Named):
        return schema.default.get(name)
    f = init_fields(schema).get(name)
    if f is None or f.default is not MISSING:
        return f and f.default
    return None if f.default_factory is MISSING else f.default_factory()


def mapping_at(values: Any, key: str) -> Any:
    """The mapping at a dotted key of ``values``; None if there is none."""
    for name in key.split(".") if key else ():
        values = values.get(name)
        if not isinstance(values, Mapping):
            return None
    return values


def selector(schema: type | Named, name: str, values: Mapping[str, Any]) -> Any:
    """The name of the class of the slot ``name``, from the mapping around it or its default."""
    spec = held(schema, name)
    assert isinstance(spec, Slot)
    if spec.inside:
        default, values = (default_of(schema, name) or {}).get(spec.by), mapping_at(values, name) or {}
    else:
        default = default_of(schema, spec.by)
    found = plain(values.get(spec.by, default))
    return None if isinstance(found, str) and "${" in found else found  # until it is resolved


def schema_at(
    schema: type | Named, name: str, values: Any, path: str = "", sources: Mapping[str, str] | None = None
) -> type | Named | None:
    """The schema of the mapping ``name`` in ``values``; None if it holds plain values.

    Raises:
        ConfigError: no class has the name that selects it.
    """
    if not isinstance(spec := held(schema, name), Slot):
        return spec
    if (chosen := selector(schema, name, values)) is None:
        return None
    if not isinstance(chosen, str):
        raise config_error(path, _key_of_type(spec, name), sources or {}, f"expected a name, got {chosen!r}")
    try:
        return registry.find(chosen, spec.kind).Config
    except ValueError as error:
        raise config_error(path, _key_of_type(spec, name), sources or {}, str(error)) from error


def _key_of_type(spec: Slot, name: str) -> str:
    return f"{name}.{spec.by}" if spec.inside else spec.by


def walk(schema: type | Named, values: Any, path: str = "") -> Iterator[tuple[str, type | Named, Any]]:
    """(dotted key, schema, mapping) of ``values`` and of each mapping in it that has a schema, top down.

    A component whose class is not known is left out.
    """
    yield path, schema, values
    for name in list(values):
        if (below := mapping_at(values, name)) is not None:
            inner = None
            with contextlib.suppress(ConfigError):
                inner = schema_at(schema, name, values)
            if inner:
                yield from walk(inner, below, join(path, name))


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
    inner = _parse_inner(schema, given, path, sources)
    leaves = _parse_leaves(schema, {k: v for k, v in given.items() if k not in inner}, path, sources)
    try:
        return schema(**leaves, **inner)
    except ConfigError:
        raise
    except ValueError as error:  # from __post_init__
        raise config_error(path, "", sources, str(error)) from error


def _parse_inner(
    schema: type, given: Mapping[str, Any], path: str, sources: Mapping[str, str]
) -> dict[str, Any]:
    """The fields that hold dataclasses, components' configs or named ones, parsed."""
    return {
        name: _parse_held(schema, name, given, path, sources)
        for name in init_fields(schema)
        if held(schema, name)
    }


def _parse_held(
    schema: type | Named, name: str, given: Mapping[str, Any], path: str, sources: Mapping[str, str]
) -> Any:
    spec, default = held(schema, name), default_of(schema, name)
    value = given.get(name, default)
    if dataclasses.is_dataclass(value):  # made in Python, or a default
        component = value.component if isinstance(value, Component.Config) else type(value)
        if isinstance(spec, Slot) and not issubclass(component, spec.kind):
            problem = f"expected the Config of {spec.kind.__name__}, got {type(value).__qualname__}"
            raise config_error(path, name, sources, problem)
        return value
    if value is None and isinstance(spec, type):
        if type(None) in kinds(schema)[name]:
            return None
        problem = "expected a mapping, got null" if name in given else MISSES
        raise config_error(path, name, sources, problem)
    if value is None:
        return {} if isinstance(spec, Named) else None
    if not isinstance(value, Mapping):
        raise config_error(path, name, sources, f"expected a mapping, got {value!r}")
    here = join(path, name)
    if isinstance(spec, Named):
        entries = {**spec.default, **value}
        kept = [key for key, entry in entries.items() if entry is not None]
        return {key: _parse_held(spec, key, entries, here, sources) for key in kept}
    base = default if isinstance(default, Mapping) else {}
    if isinstance(spec, Slot):
        return _parse_slot(schema, name, given, base, path, sources)
    assert spec is not None
    return parse_config(spec, {**base, **value}, here, sources)


def _parse_slot(
    schema: type | Named,
    name: str,
    given: Mapping[str, Any],
    default: Mapping[str, Any],
    path: str,
    sources: Mapping[str, str],
) -> Any:
    spec, chosen = held(schema, name), selector(schema, name, given)
    assert isinstance(spec, Slot)
    inner = dict(given.get(name, default))
    if chosen is None:
        forgotten = inner and name in given and spec.by not in given and default_of(schema, spec.by) is None
        if not (forgotten or (spec.inside and (inner or name in given))):
            return None
        problem = f"missing; one of {registry.choices(spec.kind)}"
        raise config_error(path, _key_of_type(spec, name), sources, problem)
    config = schema_at(schema, name, given, path, sources)
    assert isinstance(config, type)
    if spec.inside:
        inner = {**default, **inner} if chosen == default.get(spec.by) else inner
        del inner[spec.by]
    for key in inner.keys() - init_fields(config).keys():
        if others := [
            n for n in registry.names(spec.kind) if key in init_fields(registry.find(n, spec.kind).Config)
        ]:
            type_key = join(path, _key_of_type(spec, name))
            message = f"unknown key of {chosen}; {others[0]} has it: {type_key}={others[0]}"
            raise config_error(join(path, name), key, sources, message)
    return parse_config(config, inner, join(path, name), sources)


def _parse_leaves(
    schema: type, given: Mapping[str, Any], path: str, sources: Mapping[str, str]
) -> dict[str, Any]:
    """The fields that hold plain values, each of its type and inside its bounds, defaults included."""
    merged: Any = copy.deepcopy(_leaves(schema))
    for name, value in given.items():
        try:
            merged.merge_with({name: escaped(value)})
            merged.get(name)  # some texts are refused only now
        except OmegaConfBaseException as error:
            problem = str(error).split("\n")[0]
            if re.match(r"Invalid value assigned: \w+ is not a .*\blist\b", problem):
                problem = f"expected a list, for example [{value}]"
            kinds_differ = "a mapping stands where a list is expected, or a list in place of a mapping"
            problem = problem.replace("Cannot merge incompatible container types", kinds_differ)
            raise config_error(path, error.full_key or name, sources, problem) from error
    values = {}
    for name in merged:
        if OmegaConf.is_missing(merged, name):
            raise config_error(path, name, sources, MISSES)
        value = OmegaConf.to_object(merged[name]) if OmegaConf.is_config(merged[name]) else merged[name]
        for key, problem in misfits(value, init_fields(schema)[name].metadata):
            raise config_error(path, join(name, key), sources, problem)
        values[name] = value
    return values


@cache
def _leaves(schema: type) -> DictConfig:
    """The fields that hold plain values, with their defaults."""
    hints = typing.get_type_hints(schema)
    leaves = [
        (name, hints[name], field(default=f.default, default_factory=f.default_factory))
        for name, f in init_fields(schema).items()
        if not held(schema, name)
    ]
    made = dataclasses.make_dataclass(schema.__name__, leaves, kw_only=True)
    return OmegaConf.structured(made, flags={"readonly": False})


def _unknown_key(key: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    guesses = [*_places(key, given)] or difflib.get_close_matches(str(key), list(known), n=1)
    hint = (
        f"did you mean {' or '.join(map(repr, guesses[:3]))}?"
        if guesses
        else f"known keys: {', '.join(sorted(known))}"
    )
    return f"unknown key; {hint}"


def _places(key: str, given: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The paths below ``given`` at which such a key stands."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            if key in value:
                yield join(path, f"{name}.{key}")
            yield from _places(key, value, join(path, str(name)))


def config_error(path: str, key: str, sources: Mapping[str, str], message: str) -> ConfigError:
    """The error of a key inside ``path``, with the file that set it."""
    full = join(path, key)
    message = message if len(message) < MOST_SAID else f"{message[:MOST_SAID]}..."
    return ConfigError(f"{full}{source_of(full, sources)}: {message}" if full else message)


def source_of(full_key: str, sources: Mapping[str, str]) -> str:
    """The file that set the key, for messages."""
    return f" (in {sources[full_key]})" if sources.get(full_key) else ""
