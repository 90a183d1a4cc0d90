"""From config files and ``key=value`` overrides to one mapping of plain values, for ``parse_config``.

The schema of the result is consulted on the way: it alone knows which keys hold text, which hold paths, and
which settings belong to a component that another class replaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
    walk,
)
from fourdfy.config_files import (
    COMMAND_LINE,
    ConfigError,
    Leaf,
    Section,
    expand_path,
    join,
    plain,
    read_layers,
    read_yaml,
    split_overrides,
)
from fourdfy.config_references import register_resolvers, resolved


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
        stage: the number of this stage in a recipe; ``stage_2: {...}`` in the files is for the second alone.
        schema: the dataclass that the result will be parsed into. It says which keys hold text, which is
            taken as typed, which hold paths, which settings a replaced component loses, and which keys
            follow others.

    Raises:
        ConfigError: a file is missing or is no YAML mapping, an override has no ``=``, an interpolation is
            bad, a plugin can't be imported, or a name is that of no component.
    """
    register_resolvers()
    layers = [layer for path in paths for layer in read_layers(Path(path))]
    if stage is not None:
        layers = [_without_stages(layer) for layer in layers] + [_of_stage(layer, stage) for layer in layers]
    typed = list(split_overrides(overrides))
    draft = _override_layer(typed)
    plugins = _import_plugins([*layers, draft], paths)
    merged, replaced = Section(), Section()
    for layer in layers:
        merged = _lay(layer, merged, schema, replaced)
    _share(schema, merged, alike=True)
    keyed = [
        join(path, name)
        for path, owner, _ in walk(schema, draft.over(merged))
        for name, f in init_fields(owner).items()
        if "keyed_by_path" in f.metadata
    ]
    merged = _lay(_override_layer(typed, merged, keyed), merged, schema, replaced)
    sources = dict(_sources(merged))
    for path, owner, node in walk(schema, merged):
        _settle(owner, node, path, sources)
    restored = _restore_referenced(schema, merged, replaced)
    _share(schema, merged, alike=False)
    values = resolved(plain(merged), sources)
    for place, name in restored:
        del mapping_at(values, place)[name]
    return LoadedConfig(values | plugins, sources)


def _without_stages(layer: Section) -> Section:
    own = {key: value for key, value in layer.items() if not re.fullmatch(r"stages|stage_\d+", key)}
    return Section(own, layer.source)


def _of_stage(layer: Section, stage: int) -> Section:
    own = layer.get(key := f"stage_{stage}")
    if not isinstance(values := plain(own) or {}, dict):
        raise ConfigError(f"{key} (in {layer.source}): expected a mapping, got {values!r}")
    return Section(own if values else {}, layer.source)


def _override_layer(
    typed: Sequence[tuple[str, str]], files: Section | None = None, keyed: Sequence[str] = ()
) -> Section:
    """``key=text`` overrides as one layer; text that is no YAML stays text.

    Args:
        keyed: dotted keys of mappings whose own keys are dotted paths.
    """
    files, layer = files or Section(), Section(source=COMMAND_LINE)
    for key, text in typed:
        try:
            value = read_yaml(text, COMMAND_LINE)
        except ConfigError:
            value = Leaf(text, COMMAND_LINE)
        if value == {} and (known := mapping_at(files, key)):
            raise ConfigError(
                f"{key}={text}: an empty mapping changes nothing of what is there; switch single entries off "
                f"with null, e.g. {key}.{next(iter(known))}=null"
            )
        value = replace(value, text=text) if isinstance(value, Leaf) else Section(value, COMMAND_LINE, text)
        layer.put(_places(keyed, files, key, value), value)
    return layer


def _places(keyed: Sequence[str], files: Section, key: str, value: Section | Leaf) -> list[str]:
    """The nested names that a dotted key of the command line stands for."""
    for owner in keyed:
        if key.startswith(f"{owner}."):
            known, rest = mapping_at(files, owner) or {}, key.removeprefix(f"{owner}.")
            group, _, option = rest.rpartition(".")
            is_whole = isinstance(value, Section) or plain(value) is None
            is_group = not group or rest in known or (group not in known and is_whole)
            return [*owner.split("."), *([rest] if is_group else [group, option])]
    return key.split(".")


def _import_plugins(layers: Sequence[Section], paths: Sequence[str | Path]) -> dict[str, list[str]]:
    """Import the ``plugins`` of all layers; returns what a trial must record to find them again."""
    registry.import_installed_plugins()
    names: list[str] = []
    folders: list[str] = []
    for layer in layers:
        for key, collected in (("plugins", names), ("plugin_path", folders)):
            given = plain(layer.get(key)) or []
            given = [given] if isinstance(given, str) else given
            if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
                raise ConfigError(f"{key} (in {layer.source}): expected a list of names, got {given!r}")
            if key == "plugin_path":
                given = [str(_expanded(name, key, layer.source, {key: layer.source})) for name in given]
            collected += [name for name in given if name not in collected]
    if not names:
        return {}
    here = [Path(path).parent for path in paths]
    try:
        places = [place.resolve() for place in (*map(Path, folders), *here, Path.cwd())]
        used = registry.import_plugins(names, places)
    except ValueError as error:
        raise ConfigError(f"plugins: {error}") from error
    return {"plugins": names, "plugin_path": [str(folder) for folder in used]}


def _lay(layer: Section, below: Section, schema: type, replaced: Section) -> Section:
    """Merge ``layer`` over ``below``, which is changed. If it names another class (``renderer_type``), the
    settings of the replaced class (``renderer``) are dropped, and kept in ``replaced``."""
    for path, owner, node in walk(schema, below):
        over = mapping_at(layer, path)
        for name in list(node) if over else ():
            spec = held(owner, name)
            if not isinstance(spec, Slot) or (spec.inside and not isinstance(owner, Named)):
                continue
            teller = mapping_at(over, name) if spec.inside else over
            if teller and spec.by in teller:
                names = {registry.canonical(str(selector(owner, name, which))) for which in (node, over)}
                if len(names) > 1 and isinstance(old := node.pop(name), Section):
                    key = join(path, name)
                    replaced[key] = old.over(replaced.get(key, Section()))
    return layer.over(below)


def _sources(tree: Section, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, source) of all values that are set."""
    for name, value in tree.items():
        yield join(path, name), value.source
        if isinstance(value, Section):
            yield from _sources(value, join(path, name))


def _settle(schema: type | Named, node: Section, path: str, sources: Mapping[str, str]) -> None:
    """Replace what YAML read by what was typed in every field that holds text, and expand paths."""
    for name, f in init_fields(schema).items():
        if (found := node.get(name)) is None:
            continue
        allowed, key = kinds(schema)[name], join(path, name)
        value, is_path = plain(found), "path" in f.metadata
        if set(allowed) <= {str, type(None)}:
            optional = type(None) in allowed
            if is_path and value is None and found.text in (None, "null") and not optional:
                raise config_error("", key, sources, "expected a file, a folder or a name, got null")
            if found.text is not None:
                value = None if found.text == "null" and optional else found.text
            if not isinstance(value, (str, *allowed)):
                given = "null" if value is None else value
                raise config_error("", key, sources, f"expected a text, got {given}; put texts in quotes")
            if is_path:
                value = _expanded(value, key, found.source, sources, optional)
            node[name] = Leaf(value, found.source)
        elif list[str] in allowed and isinstance(value, list):
            texts = [t if t is not None else entry for entry, t in zip(value, found.entries, strict=True)]
            texts = [_expanded(entry, key, found.source, sources) for entry in texts] if is_path else texts
            node[name] = Leaf(texts, found.source)
    for name in [*init_fields(schema)] or list(node):
        schema_at(schema, name, node, path, sources)  # raises if no class has the name


def _expanded(path: Any, key: str, source: str, sources: Mapping[str, str], optional: bool = False) -> Any:
    if path == "":
        problem = "is empty; write . for the current folder" + ", or null for no file" * optional
        raise config_error("", key, sources, problem)
    try:
        return expand_path(path, source == COMMAND_LINE) if isinstance(path, str) else path
    except ValueError as error:
        raise config_error("", key, sources, str(error)) from error


def _restore_referenced(schema: type, merged: Section, replaced: Section) -> list[tuple[str, str]]:
    """Put back settings of a replaced component that other keys refer to; returns (mapping, name) of each.

    Their value is the default of the new class or, if it has none, the one that was dropped. They serve only
    the references.
    """
    restored = []
    references = sorted(set(re.findall(r"\$\{([\w.]+)\}", repr(plain(merged)))))
    for owner, left in replaced.items():
        for key in references:
            place, _, name = key.rpartition(".")
            if key.startswith(f"{owner}.") and name not in (mapping_at(merged, place) or {}):
                merged.put(key.split("."), Leaf(None, ""))
                schemas = {path: inner for path, inner, _ in walk(schema, merged)}
                value = default_of(schemas[place], name) if place in schemas else None
                if value is None:
                    value = plain((mapping_at(left, place.removeprefix(owner).lstrip(".")) or {}).get(name))
                merged.put(key.split("."), Leaf(value, ""))
                restored.append((place, name))
    return restored


def _share(schema: type, merged: Section, *, alike: bool) -> None:
    """Let settings follow those that ``slot(shares=...)`` names.

    Args:
        alike: affect those with the same value as the other, so that an override changes both, as in a
            ``parsed.yaml``, which has the prompt for each processor; else those without their own value.
    """
    for path, owner, node in walk(schema, merged):
        for name in init_fields(owner):
            spec, inner = held(owner, name), mapping_at(node, name)
            if not isinstance(spec, Slot) or not spec.shares:
                continue
            if inner is None and name not in node and selector(owner, name, node):
                inner = node[name] = Section(source=node.source)  # a type alone was given
            if inner is None:
                continue
            place, _, key = spec.shares.rpartition(".")
            other = plain((mapping_at(node, place) or {}).get(key, "???"))
            own = plain(inner.get(key, "???"))
            if other != "???" and own == (other if alike else "???"):
                inner[key] = Leaf(f"${{{join(path, spec.shares)}}}", inner.source)
