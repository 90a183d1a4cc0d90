"""Writes ``docs/config.md``, every key of every config: ``python -m tools.config_reference``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args, get_origin

from fourdfy import registry
from fourdfy.config import Component, Named, Schema, Slot, held, init_fields, kinds
from fourdfy.launching.experiment import ExperimentConfig
from fourdfy.launching.sweeps.jobs import SweepConfig
from fourdfy.study.settings import StudyConfig

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
INTRODUCTION = """# Every key of a config

Written from the source by `python -m tools.config_reference`; a test fails where it is out of date. A key is
set in a file (`seed: 1`) or on the command line (`seed=1`), with dots between a section and its keys
(`system.geometry.radius=1.5`). Keys of the original that have no effect are in `fourdfy/original/keys.py`.

A *schedule* is a number, or `[start, v0, v1, end]`: `v0` until step `start`, then linearly to `v1` at step
`end`; `[v0, v1, end]` starts at step 0. With the word `sqrt` last, it is linear in the root of the share of
the steps: most of the change comes early.
"""


def reference() -> str:
    """The whole page, in Markdown."""
    return "\n".join((INTRODUCTION, *map(_section, configs(ExperimentConfig, SweepConfig, StudyConfig))))


def configs(*pending: type) -> list[type]:
    """The dataclasses of the package that a config can reach, each after the one that it derives from."""
    found: list[type] = []
    waiting = list(pending)
    while waiting:
        schema = waiting.pop(0)
        family = [base for base in reversed(schema.__mro__) if _is_own(base) and base not in found]
        family = family if _is_own(schema) else []  # of a plugin
        found += family
        for base in family:
            for name in own_fields(base):
                waiting += _reached(held(base, name))
    return found


def _is_own(schema: type) -> bool:
    owner = vars(schema).get("component", schema)
    is_config = dataclasses.is_dataclass(schema) and schema not in (Schema, Component.Config)
    return is_config and owner.__module__.startswith("fourdfy.")


def _reached(spec: type | Slot | Named | None) -> Iterator[type]:
    if isinstance(spec, Named):
        yield from _reached(spec.entry)
    elif isinstance(spec, Slot):
        yield spec.kind.Config
        yield from (registry.find(n, spec.kind).Config for n in registry.names(spec.kind) if "+" not in n)
    elif spec:
        yield spec


def own_fields(schema: type) -> dict[str, dataclasses.Field]:
    """Name -> field, of those that the class declares itself."""
    return {
        name: f for name, f in init_fields(schema).items() if name in vars(schema).get("__annotations__", {})
    }


def field_docs(schema: type) -> dict[str, str]:
    """Name -> the string below a field, in the class itself or the nearest that it derives from."""
    docs = {}
    for base in reversed(schema.__mro__):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):  # made without a source, or builtin
            continue
        for statement, after in pairwise(tree.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                docs[statement.target.id] = inspect.cleandoc(after.value.value)
    return docs


def undocumented(schema: type) -> list[str]:
    """The fields of the class that have no string below them and need one: all that say no kind of config."""
    return [
        name for name in own_fields(schema) if not field_docs(schema).get(name) and not _says(schema, name)
    ]


def _section(schema: type) -> str:
    parents = [_title(base) for base in schema.__bases__ if _is_own(base)]
    own, docs = own_fields(schema), field_docs(schema)
    about = inspect.getdoc(vars(schema).get("component") or schema) or ""
    lines = [f"## {_title(schema)}", "", _line(about.partition("\n\n")[0]), ""]
    if parents:
        lines += [f"Has the keys of {' and of '.join(parents)}{', and:' if own else '.'}", ""]
    if own:
        lines += ["| key | type | default | range | meaning |", "| --- | --- | --- | --- | --- |"]
        lines += [_row(schema, f, docs.get(name, "")) for name, f in own.items()]
        lines.append("")
    return "\n".join(lines)


def _title(schema: type) -> str:
    component = vars(schema).get("component")
    if component is None:
        return schema.__name__
    names = [n for n in registry.names(component) if registry.find(n, component) is component]
    return ", ".join(f"`{name}`" for name in names) or component.__name__


def _row(schema: type, f: dataclasses.Field, doc: str) -> str:
    key = " or ".join(f"`{name}`" for name in (f.name, f.metadata.get("alias")) if name)
    meaning = " ".join(part for part in (_says(schema, f.name), _line(doc)) if part)
    cells = key, _type(schema, f), _default(schema, f), str(f.metadata.get("bounds", "")), meaning
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type(schema: type, f: dataclasses.Field) -> str:
    if held(schema, f.name):
        return ""
    allowed = kinds(schema)[f.name]
    words = [json.dumps(word) for kind in allowed if get_origin(kind) is Literal for word in get_args(kind)]
    if words:
        return f"`{' | '.join(words + ['None'] * (type(None) in allowed))}`"
    return f"`{str(f.type).replace('Schedule', 'schedule')}`"


def _says(schema: type, name: str) -> str:
    """What follows from a field's declaration: which keys it holds, or which class it names."""
    spec = held(schema, name)
    for other in init_fields(schema):
        told = held(schema, other)
        if isinstance(told, Slot) and not told.inside and told.by == name:
            return f"The {told.kind.__name__} whose keys `{other}` holds."
    if isinstance(spec, Named):
        told = f"{spec.entry.kind.__name__}, by its `{spec.entry.by}`" if isinstance(spec.entry, Slot) else ""
        return f"Free names, each with the keys of a {told or spec.entry.__name__}."
    if isinstance(spec, Slot):
        return f"The keys of the {spec.kind.__name__} that {'its own ' * spec.inside}`{spec.by}` names."
    return f"The keys of {_title(spec)}." if spec else ""


def _line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _default(schema: type, f: dataclasses.Field) -> str:
    default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    if default is dataclasses.MISSING or default == "???":
        return "required"
    if dataclasses.is_dataclass(default) or (held(schema, f.name) and not default):
        return ""
    return f"`{json.dumps(default)}`"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
