"""Fields that hold entries under free names: dataclasses, and components that name their class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fourdfy import registry
from fourdfy.bounds import number
from fourdfy.config import Component, ConfigError, keyed_by_path, named, named_slots, parse_config, slot
from fourdfy.config_layers import load_config


class Tool(Component):
    pass


@registry.register("test-hammer")
class Hammer(Tool):
    @dataclass(frozen=True, kw_only=True)
    class Config(Tool.Config):
        label: str = ""
        weight: float = number(1.0, 0, 9)


@registry.register("test-saw")
class Saw(Tool):
    @dataclass(frozen=True, kw_only=True)
    class Config(Tool.Config):
        label: str = ""
        teeth: int = 20


@dataclass(frozen=True, kw_only=True)
class Task:
    aid_type: str | None = None
    aid: Any = slot(Tool, "aid_type")
    probability: float = number(0.5, 0, 1)
    tool_type: str = "test-hammer"
    tool: Any = slot(Tool, "tool_type")
    note: str = ""
    parts: dict[str, Any] = keyed_by_path()


@dataclass(frozen=True, kw_only=True)
class Workshop:
    tasks: dict[str, Task] = named(Task, {"sweep": {"probability": 0.1, "note": "daily"}})
    box: dict[str, Any] = named_slots(Tool, "type", {"old": {"type": "test-saw", "label": "rusty"}})


@pytest.fixture
def load(tmp_path):
    """Workshop from the text of files, each over the one before, and overrides."""

    def load(*texts: str, overrides: tuple[str, ...] = ()) -> Workshop:
        files = [tmp_path / f"{index}.yaml" for index in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        loaded = load_config(files, overrides, schema=Workshop)
        return parse_config(Workshop, loaded.values, sources=loaded.sources)

    return load


def test_entries_join_the_default_s_and_are_parsed(load):
    shop = load("tasks: {build: {tool: {weight: 2}}}\nbox: {big: {type: test-hammer, weight: 5}}")
    assert list(shop.tasks) == ["sweep", "build"]
    assert (shop.tasks["sweep"].probability, shop.tasks["build"].tool) == (0.1, Hammer.Config(weight=2.0))
    assert shop.box == {"old": Saw.Config(label="rusty"), "big": Hammer.Config(weight=5.0)}


def test_an_entry_is_laid_over_the_default_of_its_name(load):
    shop = load("tasks: {sweep: {note: weekly}}\nbox: {old: {teeth: 3}}")
    assert (shop.tasks["sweep"].probability, shop.tasks["sweep"].note) == (0.1, "weekly")
    assert shop.box["old"] == Saw.Config(label="rusty", teeth=3)
    assert load("box: {old: {type: test-hammer}}").box["old"] == Hammer.Config()


@pytest.mark.parametrize("off", ["tasks.sweep=null", "tasks={sweep: null}", "tasks=null"])
def test_null_switches_an_entry_off(load, off):
    assert load("box: {old: null}", overrides=(off,)) == Workshop(tasks={}, box={})
    assert load("tasks: {a: {}}", "tasks: {a: null, sweep: null}").tasks == {}


def test_an_entry_that_is_switched_off_can_be_set_again(load):
    shop = load("tasks: {sweep: null}", "tasks: {sweep: {probability: 0.3}}")
    assert shop.tasks["sweep"].probability == 0.3


def test_overrides_reach_into_an_entry(load):
    given = ("tasks.sweep.probability=0.3", "tasks.sweep.parts.a.b.lr=2", "tasks.sweep.tool.weight=3")
    sweep = load("", overrides=given).tasks["sweep"]
    assert (sweep.probability, sweep.parts, sweep.tool.weight) == (0.3, {"a.b": {"lr": 2}}, 3.0)


@pytest.mark.parametrize("text", ["1984", "yes", "a #7: b", ""])
def test_a_text_in_an_entry_is_what_was_typed(load, text):
    given = (f"tasks.sweep.note={text}", f"box.old.label={text}", f"tasks.sweep.tool.label={text}")
    shop = load("", overrides=given)
    assert (shop.tasks["sweep"].note, shop.box["old"].label, shop.tasks["sweep"].tool.label) == (text,) * 3


def test_another_class_leaves_the_settings_of_the_one_it_replaces_behind(load):
    below = "tasks: {a: {tool: {weight: 3}}}\nbox: {b: {type: test-hammer, label: x, weight: 3}}"
    shop = load(below, "box: {b: {type: test-saw, teeth: 4}}", overrides=("tasks.a.tool_type=test-saw",))
    assert (shop.tasks["a"].tool, shop.box["b"]) == (Saw.Config(), Saw.Config(teeth=4))
    assert load(below, "box: {b: {weight: 4}}").box["b"] == Hammer.Config(label="x", weight=4.0)
    assert load(below, "box: {b: {type: test-hammer}}").box["b"] == Hammer.Config(label="x", weight=3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: {a: {nota: x}}", r"^tasks\.a\.nota \(in .*0\.yaml\): unknown key; did you mean 'note'\?"),
        ("tasks: {a: {probability: 2}}", r"^tasks\.a\.probability \(in .*\): 2 is outside the range"),
        ("tasks: {a: {tool: {teeth: 2}}}", r"^tasks\.a\.tool\.teeth .* tasks\.a\.tool_type=test-saw$"),
        ("tasks: {a: {aid: {teeth: 2}}}", r"^tasks\.a\.aid_type: missing; one of test-hammer, test-saw$"),
        ("tasks: {a: 3}", r"^tasks\.a \(in .*0\.yaml\): expected a mapping, got 3$"),
        ("tasks: 3", r"^tasks \(in .*0\.yaml\): expected a mapping, got 3$"),
        ("tasks: {a: {note: [x]}}", r"^tasks\.a\.note \(in .*0\.yaml\): expected a text, got \['x'\]"),
        ("box: {b: {label: x}}", r"^box\.b\.type: missing; one of test-hammer, test-saw$"),
        (
            "box: {b: {type: test-sew}}",
            r"^box\.b\.type \(in .*0\.yaml\): no Tool .*did you mean 'test-saw'\?",
        ),
        ("box: {b: {type: test-saw, weight: 2}}", r"^box\.b\.weight .*: box\.b\.type=test-hammer$"),
    ],
)
def test_a_mistake_in_an_entry_is_named_with_its_full_key(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)
