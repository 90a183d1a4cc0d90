"""From config files and ``key=value`` overrides to one mapping of plain values, for ``parse_config``.

The schema that the values are meant for is looked at on the way: it alone knows which keys hold text, which
hold paths, and which settings belong to a component that another class replaces.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    InterpolationToMissingValueError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from fourdfy import registry
from fourdfy.config import (
    Named,
    Schema,
    Slot,
    config_error,
    default_of,
    held,
    init_fields,
    kinds,
    mapping_at,
    schema_at,
    selector,
    source_of,
    walk,
)
from fourdfy.config_files import (
    COMMAND_LINE,
    ConfigError,
    Layer,
    expand_path,
    join,
    plain,
    read_layers,
    read_yaml,
    split_overrides,
)
from fourdfy.schedules import schedule_max

UNRESOLVED = (GrammarParseError, InterpolationKeyError, UnsupportedInterpolationType)
"""Errors of a ``${...}`` that may have been meant as text."""


@dataclass(frozen=True)
class LoadedConfig:
    """The merged, resolved mapping, and for each dotted leaf key the file that set it last."""

    values: dict[str, Any]
    sources: dict[str, str]


def load_config(
    paths: Sequence[str | Path],
    overrides: Sequence[str] = (),
    stage: int | None = None,
    *,
    schema: type = Schema,
) -> LoadedConfig:
    """Files merged left to right, then ``key=value`` overrides, interpolations resolved.

    Args:
        stage: of a recipe, which one this is: ``stage_2: {...}`` in the files is for the second alone.
        schema: the dataclass that the result is to be parsed into. It says which keys hold text, which is
            taken as it was typed, which hold paths, what a component that is replaced leaves behind, and
            which keys follow others.

    Raises:
        ConfigError: a file is missing or no YAML mapping; an override has no ``=``; a bad interpolation; a
            plugin that can't be imported; a name that no component has.
    """
    register_resolvers()
    layers = [layer for path in paths for layer in read_layers(Path(path))]
    if stage is not None:
        layers = [_without_stages(layer) for layer in layers] + [_of_stage(layer, stage) for layer in layers]
    typed = list(split_overrides(overrides))
    plugins = _import_plugins([*layers, _override_layer(typed)], paths)
    sources: dict[str, str] = {}
    texts: dict[str, str] = {}
    replaced: dict[str, dict[str, Any]] = {}
    try:
        merged = OmegaConf.create()
        for layer in layers:
            _record(layer, sources, texts)
            merged = _merge(merged, layer, schema, replaced)
        _tie(schema, merged, texts)
        _check_emptied(merged, typed)
        draft_layer = _override_layer(typed)
        _record(draft_layer, sources, texts)
        draft = _merge(copy.deepcopy(merged), draft_layer, schema, {})
        keyed = [
            join(path, name)
            for path, owner, _ in walk(schema, draft)
            for name, f in init_fields(owner).items()
            if "keyed_by_path" in f.metadata
        ]
        typed_layer = _override_layer(typed, lambda key, value: _places(keyed, merged, key, value))
        merged = _merge(merged, typed_layer, schema, replaced)
        for path, owner, node in walk(schema, merged):
            _settle(owner, node, path, texts, sources)
        lent = _lend(schema, merged, replaced)
        _share(schema, merged)
        values: dict[str, Any] = OmegaConf.to_container(merged, resolve=True)  # type: ignore[assignment]
        for key in lent:
            _without(values, key)
    except InterpolationToMissingValueError as error:
        key = str(error).splitlines()[0].split(": ")[-1]
        raise ConfigError(f"{key}: missing; set it in the file or as key=value") from error
    except OmegaConfBaseException as error:
        key, problem = error.full_key or "", str(error).splitlines()[0]
        if isinstance(error, GrammarParseError):
            problem = f"not understood as a ${{reference}} ({problem})"
        if isinstance(error, UNRESOLVED):
            problem += "; write \\${ for these characters"
        source = {key: COMMAND_LINE} if key in dict(typed) else sources
        raise ConfigError(f"{key}{source_of(key, source)}: {problem}") from error
    return LoadedConfig(values | plugins, sources)


def _without_stages(layer: Layer) -> Layer:
    own = {k: v for k, v in layer.values.items() if not re.fullmatch(r"stages|stage_\d+", str(k))}
    return dataclasses.replace(layer, values=own)


def _of_stage(layer: Layer, stage: int) -> Layer:
    key = f"stage_{stage}"
    values = layer.values.get(key) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{key} (in {layer.source}): expected a mapping, got {values!r}")
    texts = {k.removeprefix(f"{key}."): text for k, text in layer.texts.items() if k.startswith(f"{key}.")}
    return Layer(values, texts, layer.source)


def _override_layer(
    typed: Sequence[tuple[str, str]], places_of: Callable[[str, Any], list[str]] | None = None
) -> Layer:
    """``key=text`` overrides as one layer; what is no YAML stays a text."""
    layer = Layer({}, {}, COMMAND_LINE)
    for key, text in typed:
        try:
            value, inner = read_yaml(text, COMMAND_LINE)
        except ConfigError:
            value, inner = text, {}
        *places, last = places_of(key, value) if places_of else key.split(".")
        node = layer.values
        for place in places:
            if not isinstance(node.get(place), dict):
                node[place] = {}
            node = node[place]
        node[last] = value
        layer.texts.update({key + ("." * (not k.startswith("[")) + k): t for k, t in inner.items() if k})
        layer.texts[key] = text
    return layer


def _check_emptied(merged: DictConfig, typed: Sequence[tuple[str, str]]) -> None:
    for key, text in typed:
        if re.fullmatch(r"\{\s*\}", text.strip()) and OmegaConf.select(merged, key):
            raise ConfigError(
                f"{key}={text}: an empty mapping changes nothing of what is there; switch single entries off "
                f"with null, e.g. {key}.{next(iter(OmegaConf.select(merged, key)))}=null"
            )


def _import_plugins(layers: Sequence[Layer], paths: Sequence[str | Path]) -> dict[str, list[str]]:
    """Import the ``plugins`` of all layers; gives what a trial must know to find them again."""
    registry.import_installed_plugins()
    names, folders = [], []
    for layer in layers:
        for key, collected in (("plugins", names), ("plugin_path", folders)):
            given = layer.values.get(key) or []
            given = [given] if isinstance(given, str) else given
            if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
                raise ConfigError(f"{key} (in {layer.source}): expected a list of names, got {given!r}")
            collected += [name for name in given if name not in collected]
    if not names:
        return {}
    here = [Path(path).parent for path in paths]
    try:
        places = [Path(expand_path(folder)) for folder in folders]
        used = registry.import_plugins(names, [p.resolve() for p in (*places, *here, Path.cwd())])
    except ValueError as error:
        raise ConfigError(f"plugins: {error}") from error
    return {"plugins": names, "plugin_path": [str(folder) for folder in used]}


def _merge(below: DictConfig, layer: Layer, schema: type, replaced: dict[str, dict[str, Any]]) -> DictConfig:
    """``layer`` over ``below``, which is used up. Where it names another class (``renderer_type``), the
    settings of the one that it replaces (``renderer``) are left behind, and noted in ``replaced``."""
    above = OmegaConf.create(layer.values)
    for path, owner, node in walk(schema, below):
        if (over := mapping_at(above, path)) is not None:
            _leave_behind(owner, node, over, path, replaced)
    _drop_other_kinds(below, above)
    return OmegaConf.merge(below, above)  # type: ignore[return-value]


def _drop_other_kinds(below: DictConfig, above: DictConfig) -> None:
    """Drop each list of ``below`` over which ``above`` lays a mapping, and the reverse: they can't merge."""
    for key in above:
        old, new = below._get_node(key), above._get_node(key)
        if mapping_at(below, key) is not None and mapping_at(above, key) is not None:
            _drop_other_kinds(old, new)
        elif {type(old), type(new)} == {ListConfig, DictConfig}:
            del below[key]


def _leave_behind(
    schema: type | Named, below: DictConfig, above: DictConfig, path: str, replaced: dict[str, dict[str, Any]]
) -> None:
    """Drop what stands in the slots of ``below`` for which ``above`` names another class."""
    for name in list(below):
        spec = held(schema, name)
        if not isinstance(spec, Slot) or (spec.inside and not isinstance(schema, Named)):
            continue
        teller = mapping_at(above, name) if spec.inside else above
        if teller is None or teller._get_node(spec.by) is None:
            continue
        if len({registry.canonical(str(selector(schema, name, node))) for node in (below, above)}) > 1:
            if (old := mapping_at(below, name)) is not None:
                replaced.setdefault(join(path, name), {}).update(plain(old))
            del below[name]


def _places(keyed: Sequence[str], files: DictConfig, key: str, value: Any) -> list[str]:
    """The keys, each inside the one before, that a dotted key of the command line means.

    Args:
        keyed: the mappings whose own keys are dotted paths.
    """
    for owner in keyed:
        if key.startswith(f"{owner}."):
            known, rest = mapping_at(files, owner) or {}, key.removeprefix(f"{owner}.")
            group, _, option = rest.rpartition(".")
            is_group = rest in known or (group not in known and (value is None or isinstance(value, dict)))
            return [*owner.split("."), *([rest] if is_group or not group else [group, option])]
    return key.split(".")


def _settle(
    schema: type | Named, node: DictConfig, path: str, texts: Mapping[str, str], sources: Mapping[str, str]
) -> None:
    """Put what was typed in the place of what YAML read, in every field of text, and expand paths."""
    for name, f in init_fields(schema).items():
        key, allowed = join(path, name), kinds(schema)[name]
        if set(allowed) <= {str, type(None)}:
            if key in texts:
                node[name] = None if texts[key] == "null" and type(None) in allowed else texts[key]
            written = node._get_node(name)
            if written is not None and not isinstance(written._value(), (str, *allowed)):
                given = "null" if written._is_none() else plain(written)
                raise config_error("", key, sources, f"expected a text, got {given}; put texts in quotes")
            if "path" in f.metadata:
                _expand(node, name, key, sources)
        elif list[str] in allowed and isinstance(entries := node._get_node(name), ListConfig):
            for index in range(len(entries)):
                if (text := texts.get(f"{key}[{index}]")) is not None:
                    entries[index] = text
                if "path" in f.metadata:
                    _expand(entries, index, key, sources)
    for name in [*init_fields(schema)] or list(node):
        schema_at(schema, name, node, path, sources)  # raises where no class has the name


def _expand(node: Any, place: str | int, key: str, sources: Mapping[str, str]) -> None:
    written = node._get_node(place)
    if written is None or not isinstance(written._value(), str):
        return
    try:
        if not written._value():
            raise ValueError("is empty; write . for the current folder, or null for no file")
        node[place] = expand_path(written._value())
    except ValueError as error:
        raise config_error("", key, sources, str(error)) from error


def _lend(schema: type, merged: DictConfig, replaced: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Put back what other keys refer to in a component that was replaced, for their sake alone.

    That is the default of the new class, or what was left behind where it has none. Gives the keys.
    """
    lent: list[str] = []
    references = {key for text in _strings(merged) for key in re.findall(r"\$\{([\w.]+)\}", text)}
    for owner, left in replaced.items():
        for key in sorted(references):
            if key.startswith(f"{owner}.") and _node_at(merged, key) is None:
                place, _, name = key.rpartition(".")
                OmegaConf.update(merged, place, {}, force_add=True)
                schemas = {path: inner for path, inner, _ in walk(schema, merged)}
                value = default_of(schemas[place], name) if place in schemas else None
                if value is None:
                    value = _node_at(OmegaConf.create(left), key.removeprefix(f"{owner}."))
                OmegaConf.update(merged, key, value, force_add=True)
                lent.append(key)
    return lent


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, DictConfig | ListConfig) and not node._is_interpolation():
        for key in node if isinstance(node, DictConfig) else range(len(node)):
            yield from _strings(node._get_node(key))
    elif node is not None and isinstance(node._value(), str):
        yield node._value()


def _node_at(node: DictConfig, key: str) -> Any:
    place, _, name = key.rpartition(".")
    owner = mapping_at(node, place)
    return None if owner is None else owner._get_node(name)


def _without(values: dict[str, Any], key: str) -> None:
    *places, last = key.split(".")
    for place in places:
        values = values[place]
    del values[last]


def _record(layer: Layer, sources: dict[str, str], texts: dict[str, str]) -> None:
    """Note where each key of a layer comes from, and what was typed for it; a later layer's word counts."""
    pending = [("", layer.values)]
    while pending:
        path, values = pending.pop()
        for name, value in values.items():
            key = join(path, str(name))
            sources[key] = layer.source
            if isinstance(value, dict):
                pending.append((key, value))
            for stale in [k for k in texts if k == key or k.startswith(f"{key}[")]:
                del texts[stale]
    texts.update(layer.texts)


def _tie(schema: type, merged: DictConfig, texts: dict[str, str]) -> None:
    """Let the command line's prompt change all that files, such as a ``parsed.yaml``, say once each."""
    for key, node, name, source in _sharing(schema, merged):
        own, other = node._get_node(name), _node_at(merged, source)
        if own is not None and other is not None and own._value() == other._value() != "???":
            node[name] = f"${{{source}}}"
            texts.pop(key, None)


def _share(schema: type, merged: DictConfig) -> None:
    """What a slot shares with another serves it unless it has its own."""
    for _, node, name, source in _sharing(schema, merged):
        if OmegaConf.select(merged, source) is not None and (
            name not in node or OmegaConf.is_missing(node, name)
        ):
            node[name] = f"${{{source}}}"


def _sharing(schema: type, merged: DictConfig) -> Iterator[tuple[str, DictConfig, str, str]]:
    """Dotted key, mapping and name of each setting that follows another, and the other's dotted key."""
    for path, owner, node in walk(schema, merged):
        for slot in init_fields(owner):
            if (
                isinstance(spec := held(owner, slot), Slot)
                and spec.shares
                and (inner := mapping_at(node, slot))
            ):
                name = spec.shares.rpartition(".")[2]
                yield join(path, f"{slot}.{name}"), inner, name, join(path, spec.shares)


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
        "rmspace": lambda text, sub: str(text).replace(" ", sub),
        "tuple2": lambda scalar: [float(scalar), float(scalar)],
        "gt0": lambda value: value > 0,
        "not": lambda value: not value,
        "cmaxgt0": lambda value: schedule_max(plain(value)) > 0,
        "cmaxgt0orcmaxgt0": lambda a, b: schedule_max(plain(a)) > 0 or schedule_max(plain(b)) > 0,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_resolver(name, resolver, replace=True)
