"""Loading and strict parsing of configs."""

import importlib
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from fourdfy import registry
from fourdfy.config import (
    Component,
    ConfigError,
    inner_slot,
    parse_config,
    slot,
)
from fourdfy.config_layers import load_config
from fourdfy.launching.experiment import ExperimentConfig


class Animal(Component):
    pass


@registry.register("test-cat")
class Cat(Animal):
    @dataclass(frozen=True, kw_only=True)
    class Config(Animal.Config):
        lives: int = 9
        name: str
        sizes: list[float] = field(default_factory=lambda: [1.0])

        def __post_init__(self):
            if self.lives < 1:
                raise ValueError(f"lives={self.lives}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class House:
    animal_type: str | None = "test-cat"
    animal: Any = slot(Animal, "animal_type")
    guest: Any = inner_slot(Animal, "otype", {"otype": "test-cat", "name": "Tom"})
    rooms: int | list[int] = 1


def parse(given, **sources):
    return parse_config(House, given, "house", sources)


def test_components_are_parsed_down_into_their_own_config():
    house = parse({"animal": {"name": "Mia", "sizes": [1, 2]}, "rooms": [1, 2]})
    assert house.animal == Cat.Config(name="Mia", sizes=[1.0, 2.0])
    assert house.guest.name == "Tom"
    assert house.rooms == [1, 2]


def test_a_null_type_leaves_the_component_out():
    assert parse({"animal_type": None, "animal": {"anything": 1}}).animal is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"anmial": {}}, r"^house\.anmial: unknown key; did you mean 'animal'\?"),
        ({"animal": {"name": "M", "live": 1}}, r"^house\.animal\.live: unknown key; did you mean 'lives'\?"),
        ({"lives": 1, "animal": {"lives": 9}}, r"^house\.lives: unknown key; did you mean 'animal\.lives'\?"),
        ({"animal": {"name": "M", "lives": "many"}}, r"^house\.animal\.lives: .*could not be converted"),
        (
            {"animal": {"name": "M", "sizes": "x"}},
            r"^house\.animal\.sizes: expected a list, for example \[x\]$",
        ),
        ({"animal": {"name": "M", "sizes": ["x"]}}, r"^house\.animal\.sizes\[0\]: "),
        ({"animal": {}}, r"^house\.animal\.name: missing; set it"),
        ({"animal": {"name": "???"}}, r"^house\.animal\.name: missing; set it"),
        ({"animal": {"name": "M", "lives": 0}}, r"^house\.animal: lives=0: expected at least 1"),
        ({"animal_type": "test-cta"}, r"^house\.animal_type: no Animal .*did you mean 'test-cat'\?"),
        ({"guest": {"otype": "dog"}}, r"^house\.guest\.otype: no Animal is registered as 'dog'"),
        (
            {"animal": {"sizes": {"a": 1}}},
            r"^house\.animal\.sizes.*: a mapping stands where a list is expected",
        ),
        ({"animal": 3}, r"^house\.animal: expected a mapping, got 3"),
    ],
)
def test_a_mistake_is_named_with_its_full_key_and_the_mend(given, message):
    with pytest.raises(ConfigError, match=message):
        parse({"animal": {"name": "Mia"}} | given)


def test_the_error_names_the_file_that_set_the_key(tmp_path):
    (tmp_path / "base.yaml").write_text("animal: {name: Mia}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nanimal: {livse: 3}\n")
    loaded = load_config([tmp_path / "top.yaml"])
    with pytest.raises(ConfigError, match=r"animal\.livse \(in .*top\.yaml\): unknown key"):
        parse_config(House, loaded.values, sources=loaded.sources)


def test_later_layers_win_and_overrides_win_over_files(tmp_path):
    (tmp_path / "a.yaml").write_text("x: 1\ny: 1\nz: 1\n")
    (tmp_path / "b.yaml").write_text("base: [a.yaml]\ny: 2\nz: 2\n")
    (tmp_path / "c.yaml").write_text("w: ${add:${x},${z}}\n")
    loaded = load_config([tmp_path / "b.yaml", tmp_path / "c.yaml"], ["z=3"])
    assert loaded.values == {"x": 1, "y": 2, "z": 3, "w": 4}
    assert loaded.sources["z"] == "the command line"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("${add:1,2}", 3),
        ("${sub:1,2}", -1),
        ("${mul:2,3}", 6),
        ("${div:1,2}", 0.5),
        ("${idiv:7,2}", 3),
        ("${basename:a/b.yaml}", "b.yaml"),
        ("${rmspace:a panda dancing,_}", "a_panda_dancing"),
        ("${tuple2:3}", [3.0, 3.0]),
        ("${gt0:1}", True),
        ("${not:true}", False),
        ("${cmaxgt0:[0,0.0,1.0,10]}", True),
        ("${cmaxgt0:0}", False),
        ("${cmaxgt0orcmaxgt0:0,[0.0,1.0,10]}", True),
        ("${calc_exp_lr_decay_rate:0.25,2}", 0.5),
    ],
)
def test_the_originals_resolvers(tmp_path, expression, value):
    (tmp_path / "a.yaml").write_text(f"v: {expression!r}\n")
    assert load_config([tmp_path / "a.yaml"]).values["v"] == value


@registry.register("test-dog")
class Dog(Animal):
    @dataclass(frozen=True, kw_only=True)
    class Config(Animal.Config):
        name: str = "Rex"
        lives: int = 2
        normal: float = 1.0
        normal_type: str = "left"


@dataclass(frozen=True, kw_only=True)
class Street:
    house: House = field(default_factory=House)
    width: Any = 0


def load(text, *overrides, schema=House, folder):
    file = folder / "x.yaml"
    file.write_text(text)
    return load_config([file], overrides, schema=schema).values


@pytest.mark.parametrize(
    ("overrides", "left"),
    [
        ([], {"lives": 3}),
        (["animal_type=test-dog"], {}),
        (["animal_type=test-cat"], {"lives": 3}),
        (["animal_type=test-dog", "animal.name=Bello"], {"name": "Bello"}),
        (["animal.lives=4"], {"lives": 4}),
        (["guest.otype=test-dog"], {"lives": 3}),
    ],
)
def test_naming_another_class_leaves_the_old_one_s_settings_behind(tmp_path, overrides, left):
    values = load("animal: {lives: 3}", *overrides, folder=tmp_path)
    assert values.get("animal", {}) == left


def test_a_class_named_inside_of_its_settings_is_given_those_that_stand_there(tmp_path):
    values = load("guest: {otype: test-dog, lives: 3}", "guest.otype=test-cat", folder=tmp_path)
    assert values["guest"] == {"otype": "test-cat", "lives": 3}


def test_the_last_file_that_touched_a_section_is_named_for_what_is_wrong_with_all_of_it(tmp_path):
    (tmp_path / "below.yaml").write_text("animal: {name: Mia, lives: 0}")
    (tmp_path / "top.yaml").write_text("base: below.yaml\nanimal: {sizes: [2]}")
    loaded = load_config([tmp_path / "top.yaml"], schema=House)
    with pytest.raises(ConfigError, match=r"^animal \(in .*top\.yaml\): lives=0"):
        parse_config(House, loaded.values, sources=loaded.sources)


def test_a_class_can_be_named_by_another_key(tmp_path):
    values = load("width: test-dog\nhouse: {animal_type: '${width}'}", schema=Street, folder=tmp_path)
    assert parse_config(Street, values).house.animal == Dog.Config()


def test_a_value_that_a_later_file_wants_set_is_set_by_an_earlier_one(tmp_path):
    (tmp_path / "below.yaml").write_text("width: 3\nhouse: ???")
    text = "base: below.yaml\nwidth: ???\nhouse: {rooms: 2}"
    assert load(text, schema=Street, folder=tmp_path) == {"width": 3, "house": {"rooms": 2}}


@pytest.mark.parametrize(
    ("written", "given", "kept"),
    [("width: [1, 2]", "width={a: 1}", {"a": 1}), ("width: {a: 1}", "width=[1, 2]", [1, 2])],
)
def test_a_mapping_takes_the_place_of_a_list_and_the_reverse(tmp_path, written, given, kept):
    assert load(written, given, schema=Street, folder=tmp_path)["width"] == kept


def test_a_key_with_type_in_its_name_is_no_class(tmp_path):
    text = "animal_type: test-dog\nanimal: {normal: 3, normal_type: right}"
    values = load(text, "animal.normal_type=left", folder=tmp_path)
    assert values["animal"] == {"normal": 3, "normal_type": "left"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("lives", 2), ("sizes", [5])],
    ids=["the new class's own default", "what the old one had, if the new one has no such key"],
)
def test_what_others_refer_to_outlives_the_class_it_belonged_to(tmp_path, key, value):
    text = f"house: {{animal: {{lives: 3, sizes: [5]}}}}\nwidth: ${{house.animal.{key}}}"
    values = load(text, "house.animal_type=test-dog", schema=Street, folder=tmp_path)
    assert values == {"house": {"animal_type": "test-dog", "animal": {}}, "width": value}


def test_a_class_that_is_nowhere_is_named_before_what_refers_to_its_settings(tmp_path):
    text = "house: {animal: {lives: 3}}\nwidth: ${house.animal.lives}"
    message = r"^house\.animal_type \(in the command line\): no Animal .* 'test-dog'\?"
    with pytest.raises(ConfigError, match=message):
        load(text, "house.animal_type=test-dgo", schema=Street, folder=tmp_path)


def test_what_a_recipe_holds_for_one_stage_goes_to_that_stage_alone(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("stages: [a, b]\nseed: 1\nstage_2: {seed: 2, name: second}")
    assert load_config([file], stage=1).values == {"seed": 1}
    assert load_config([file], stage=2).values == {"seed": 2, "name": "second"}
    assert load_config([file], ["seed=3"], stage=2).values == {"seed": 3, "name": "second"}


def test_one_prompt_serves_all_processors_unless_they_have_their_own(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "system: {prompt_processor: {prompt: a}, prompt_processor_multi_view: {prompt: '???'},"
        " prompt_processor_video: {prompt: b}}\n"
    )
    system = load_config(
        [tmp_path / "a.yaml"], ["system.prompt_processor.prompt=c d"], schema=ExperimentConfig
    ).values["system"]
    assert [system[key]["prompt"] for key in system] == ["c d", "c d", "b"]


@pytest.mark.parametrize("prompt", ["a dog", "1984"])
def test_the_prompt_that_a_parsed_file_has_for_each_processor_is_changed_as_one(tmp_path, prompt):
    names = ("prompt_processor", "prompt_processor_multi_view", "prompt_processor_video")
    own = "system.prompt_processor_video.prompt=b"
    lines = [
        f"  {name}: {{prompt: {prompt}}}\n"
        f"  {name.replace('processor', 'processor_type')}: stable-diffusion-prompt-processor\n"
        for name in names
    ]
    (tmp_path / "parsed.yaml").write_text("system:\n" + "".join(lines))
    for given, expected in (([], [prompt] * 3), (["c"], ["c"] * 3), (["c", own], ["c", "c", "b"])):
        overrides = [f"system.prompt_processor.prompt={g}" if g == "c" else g for g in given]
        loaded = load_config([tmp_path / "parsed.yaml"], overrides, schema=ExperimentConfig)
        assert [loaded.values["system"][name]["prompt"] for name in names] == expected


def test_a_value_that_others_are_made_from_is_asked_for_by_its_own_key(tmp_path):
    (tmp_path / "a.yaml").write_text("tag: ${rmspace:${system.prompt},_}\nsystem: {prompt: '???'}\n")
    with pytest.raises(ConfigError, match=r"^system\.prompt: missing; set it in the file or as key=value"):
        load_config([tmp_path / "a.yaml"])


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "shapes.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"no such config file; did you mean .*shapes\.yaml"):
        load_config([tmp_path / "shape.yaml"])


def test_an_override_without_a_value_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("x: 1")
    with pytest.raises(ConfigError, match="expected key=value"):
        load_config([tmp_path / "a.yaml"], ["x"])


def test_a_name_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="already registered"):

        @registry.register("test-cat")
        class Other(Animal):
            pass


PLUGIN = """
from fourdfy.config import Component
from fourdfy.registry import register

@register("{name}")
class Mine(Component):
    pass
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Imports a module of that name which registers a class ``Mine``, or several."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def plugin(module, name, times=1):
        (tmp_path / f"{module}.py").write_text(PLUGIN.format(name=name) * times)
        return importlib.import_module(module)

    return plugin


def test_classes_of_the_same_name_in_two_modules_do_not_share_a_name(plugin):
    first = plugin("first_plugin", "test-mine")
    with pytest.raises(ValueError, match=r"'test-mine' is already registered for first_plugin\.Mine"):
        plugin("second_plugin", "test-mine")
    assert registry.find("test-mine", Component) is first.Mine


def test_two_classes_of_the_same_name_in_one_module_do_not_share_a_name(plugin):
    with pytest.raises(ValueError, match=r"'test-twice' is already registered for third_plugin\.Mine"):
        plugin("third_plugin", "test-twice", times=2)


def test_a_module_that_is_imported_again_brings_no_second_class(plugin):
    module = plugin("fourth_plugin", "test-again")
    first = module.Mine
    registry.register("test-again")(first)
    for again in (
        importlib.reload,
        lambda module: sys.modules.pop(module.__name__) and plugin(module.__name__, "test-again"),
    ):
        module = again(module)
        assert registry.find("test-again", Component) is module.Mine is not first
        first = module.Mine


def test_a_cell_that_a_notebook_runs_again_brings_no_second_class():
    cells = [type("Cell", (Component,), {"__module__": "a_notebook"}) for _ in range(2)]
    for cell in cells:
        registry.register("test-cell")(cell)
    assert registry.find("test-cell", Component) is cells[1]


@pytest.mark.parametrize("name", ["implicit-volume", "4dfy-zeroscope-guidance"])
def test_a_plugin_cannot_take_the_name_of_a_component_of_the_project(name):
    with pytest.raises(ValueError, match=r"already registered, in fourdfy\."):
        registry.register(name)(type("Mine", (Animal,), {}))


def test_find_says_which_kind_it_wanted():
    class Plant(Component):
        pass

    with pytest.raises(ValueError, match="is a Cat, not a Plant"):
        registry.find("test-cat", Plant)
