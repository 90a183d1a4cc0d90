"""What users write in files and on the command line, and what is made of it before it is parsed."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fourdfy import registry
from fourdfy.config import Component, ConfigError, file_path, keyed_by_path, parse_config, slot
from fourdfy.config_files import expand_path, literal_override, save_yaml
from fourdfy.config_layers import load_config
from fourdfy.launching.cli import main
from fourdfy.launching.experiment import ExperimentConfig, load_experiment
from fourdfy.launching.recipe import load_recipe
from fourdfy.priors.hub import cache_root
from tests.commands import CONFIGS


class Speaker(Component):
    pass


@registry.register("test-speaker")
class TestSpeaker(Speaker):
    __test__ = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Speaker.Config):
        prompt: str = ""
        negative: str | None = "ugly"
        moments: list[str] | None = None
        count: int = 1
        rate: float = 1.0
        active: bool = False


@registry.register("test-louder-speaker")
class TestLouderSpeaker(Speaker):
    __test__ = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Speaker.Config):
        volume: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Options:
    params: dict[str, Any] = keyed_by_path()


@dataclass(frozen=True, kw_only=True)
class Room:
    tag: str = ""
    seed: int = 0
    speaker_type: str = "test-speaker"
    speaker: Any = slot(Speaker, "speaker_type")
    options: Options = field(default_factory=Options)
    folder: str | None = file_path()
    folders: list[str] = file_path([])
    plugins: list[str] = field(default_factory=list)
    plugin_path: list[str] = file_path([])
    size: Any = 0


@pytest.fixture
def load(tmp_path):
    """Room from the text of a file and overrides."""

    def load(text: str = "", *overrides: str) -> Room:
        file = tmp_path / "room.yaml"
        file.write_text(text, encoding="utf-8")
        loaded = load_config([file], overrides, schema=Room)
        return parse_config(Room, loaded.values, sources=loaded.sources)

    return load


TYPED = [
    "a robot #7 dancing",
    "&a dog",
    "*star* dancing",
    "a fox: the movie",
    "[V] dog running",
    "@home robot",
    "100% pure",
    "% done",
    "`tick`",
    "'quoted",
    '"q" and more',
    "{brace",
    "- dash",
    "yes",
    "null",
    "1984",
    "010",
    "1e4",
    "2024_01_01",
    "12:30:45",
    "e = mc^2",
    "costs $5",
    " spaced ",
    "two\nlines",
    "un éléphant",
    "",
]
TAG = 'tag: "${rmspace:${speaker.prompt},_}"'


@pytest.mark.parametrize("text", TYPED)
def test_a_text_of_the_command_line_is_what_was_typed_and_so_is_what_is_made_of_it(load, text):
    room = load(TAG, f"speaker.prompt={text}")
    assert (room.speaker.prompt, room.tag) == (text, text.replace(" ", "_"))
    assert load("", f"tag={text}").tag == text


@pytest.mark.parametrize("text", [*TYPED, "${x}", "\\${x}", "a ${b"])
def test_a_literal_text_is_taken_whole_and_lives_through_being_saved(load, tmp_path, text):
    file = tmp_path / "saved.yaml"
    (tmp_path / "room.yaml").write_text(TAG)
    override = literal_override("speaker.prompt", text)
    loaded = load_config([tmp_path / "room.yaml"], [override], schema=Room)
    save_yaml(loaded.values, file)
    for values in (loaded.values, load_config([file], schema=Room).values):
        room = parse_config(Room, values)
        assert (room.speaker.prompt, room.tag) == (text, text.replace(" ", "_"))


def test_null_is_nothing_only_where_a_text_may_be_left_out(load):
    room = load("", "speaker.negative=null", "speaker.prompt=null", "folder=null")
    assert (room.speaker.negative, room.speaker.prompt, room.folder) == (None, "null", None)
    assert load("", "speaker.negative=").speaker.negative == ""


@pytest.mark.parametrize(
    ("written", "override", "message"),
    [
        (
            TAG + "\nspeaker: {prompt: [V]}",
            "",
            r"speaker\.prompt \(in .*room\.yaml\): expected a text, got \['V'\]",
        ),
        (
            TAG + "\nspeaker: {prompt: {a: b}}",
            "",
            r"speaker\.prompt \(in .*room\.yaml\): expected a text, got",
        ),
        (
            TAG + "\nspeaker: {prompt: null}",
            "",
            r"speaker\.prompt \(in .*room\.yaml\): expected a text, got null",
        ),
        ("", "speaker.prompt=a ${ b", r"speaker\.prompt \(in the command line\): .*; write \\\$\{ for"),
        ("", "speaker.prompt=${x}", r"speaker\.prompt \(in the command line\): .*; write \\\$\{ for"),
        ("speaker: {prompt: '${x y}'}", "", r"speaker\.prompt \(in .*room\.yaml\): .*; write \\\$\{ for"),
    ],
)
def test_what_is_no_text_is_refused_by_its_own_key(load, written, override, message):
    with pytest.raises(ConfigError, match=message):
        load(written, *[override] * bool(override))


def test_a_text_may_be_made_from_another(load):
    assert load("", "speaker.prompt=a ${tag} b", "tag=#1").speaker.prompt == "a #1 b"
    assert load(TAG, "speaker.prompt=${seed}", "seed=3").tag == "3"


@pytest.mark.parametrize(
    "written", ["1984", "yes", "010", "1e4", "2024_01_01", "2024-01-01", "12:30:45", "1.50"]
)
def test_a_text_of_a_file_is_what_was_written(load, written):
    room = load(f"tag: {written}\nspeaker: {{moments: [{written}, 'b', {written}]}}")
    assert room.tag == written
    assert room.speaker.moments == [written, "b", written]
    assert load(f"tag: {written}", "tag=b").tag == "b"


def test_lists_of_texts_on_the_command_line_too(load):
    assert load("", "speaker.moments=[yes, 1984, in the end]").speaker.moments == [
        "yes",
        "1984",
        "in the end",
    ]
    assert load("speaker: {moments: [1, 2]}", "speaker.moments=['x', 3]").speaker.moments == ["x", "3"]


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("010", "seed", 10),
        ("1e4", "seed", 10000),
        ("1_000", "seed", 1000),
        ("0x10", "seed", 16),
        ("1e-3", "speaker.rate", 0.001),
        ("1.e-15", "speaker.rate", 1e-15),
        ("3", "speaker.rate", 3.0),
        ("yes", "speaker.active", True),
        ("off", "speaker.active", False),
    ],
)
@pytest.mark.parametrize("place", ["file", "command line"])
def test_numbers_are_those_of_yaml_1_2(load, written, key, value, place):
    top, _, inner = key.partition(".")
    text = f"{top}: {{{inner}: {written}}}" if inner else f"{top}: {written}"
    room = load(text) if place == "file" else load("", f"{key}={written}")
    found = getattr(room.speaker, inner) if inner else room.seed
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("written", ["12:30:45", "1.5", "five", "[1", "", "a #b", "nan"])
def test_what_is_no_whole_number_is_refused_by_its_key(load, written):
    with pytest.raises(ConfigError, match=r"^seed \(in the command line\): "):
        load("", f"seed={written}")


def test_a_text_that_is_no_reference_says_how_to_write_the_characters(load):
    message = r"^tag \(in the command line\): not understood as a \$\{reference\} .*; write \\\$\{ for"
    with pytest.raises(ConfigError, match=message):
        load("", "tag=a ${b")
    assert load("", "tag=a \\${b").tag == "a ${b"


def test_the_texts_of_one_stage_are_taken_as_typed_too():
    overrides = ["stage_2.tag=a #7: b", "stage_3.system.prompt_processor.negative_prompt=", "tag=1984"]
    stages = [stage.experiment.cfg for stage in load_recipe([CONFIGS / "shapes.yaml"], overrides)]
    assert [cfg.tag for cfg in stages] == ["1984", "a #7: b", "1984"]
    assert stages[2].system.prompt_processor.negative_prompt == ""


# -- files that can't be read ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: [1\nc: 2", r"x\.yaml:3: "),
        (b"a: 1\n\tb: 2", r"x\.yaml:2: "),
        (b"a: *b", r"x\.yaml:1: found undefined alias 'b'"),
        (b"a: 1\nb: {c: 1,\n c: 2}", r"x\.yaml:3: the key 'c' occurs here again, after line 2"),
        (b"seed: 1\ntag: x\nseed: 2", r"x\.yaml:3: the key 'seed' occurs here again, after line 1"),
        (b"a: &a [*a]", r"x\.yaml: an anchor"),
        (b"\x89PNG\r\n\x1a\n\0\0", r"x\.yaml:1: not UTF-8 text"),
        (b"a: 1\nb: \xe9", r"x\.yaml:2: not UTF-8 text"),
        (b"a: 1\nb: \0", r"x\.yaml:2: not a text"),
        (b"a: 1\n2: b", r"x\.yaml:2: expected a word as the key, got 2"),
        (b"- 1", r"x\.yaml: expected a mapping"),
        (b"a: !!python/object:os.system 1", r"x\.yaml:1: could not determine a constructor"),
        (b"a: !new {b: 1}", r"x\.yaml:1: could not determine a constructor"),
        (b"a: 1\nb: {<<: 3}", r"x\.yaml:2: expected a mapping or list of mappings for merging"),
        (b"base: x.yaml", r"x\.yaml: its base files lead back to it: x\.yaml -> x\.yaml"),
        (b"base: {a: 1}", r"x\.yaml: base: expected the name of a file"),
        (b"base: .", r"\(base of .*x\.yaml\): a folder"),
        (b"base: /etc/passwd", r"x\.yaml: base: /etc/passwd: expected a config file, .* \.yaml$"),
        (b"base: y.yaml", r"y\.yaml \(base of .*x\.yaml\): no such config file$"),
    ],
)
def test_a_file_that_can_not_be_read_is_named_with_the_line(tmp_path, content, message):
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_config([file])
    assert "\n" not in str(error.value)


def test_bases_in_a_circle_are_named(tmp_path):
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml")
    with pytest.raises(ConfigError, match=r"b\.yaml: .* lead back to it: b\.yaml -> c\.yaml -> b\.yaml$"):
        load_config([tmp_path / "a.yaml"])


def test_a_mapping_that_is_merged_twice_has_no_key_twice(load):
    text = "speaker: {<<: &a {prompt: 1984, count: 2}, count: 3}\nsize: {<<: *a}"
    room = load(text)
    assert (room.speaker.prompt, room.speaker.count, room.size) == ("1984", 3, {"prompt": 1984, "count": 2})


def test_an_empty_mapping_of_the_command_line_is_not_ignored(tmp_path):
    (tmp_path / "x.yaml").write_text("system: {loss: {lambda_sds: 1.0}}")
    with pytest.raises(ConfigError, match=r"^system\.loss=\{\}: .* e\.g\. system\.loss\.lambda_sds=null$"):
        load_config([tmp_path / "x.yaml"], ["system.loss={}"])


def test_a_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert load_config([tmp_path / "x.yaml"]).values == {"a": 1}


# -- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tag=a", "red", "cube", "seed=1"], r"^'red cube' stands alone; .* write tag=\"a red cube\"$"),
        (["seed", "=", "5"], r"^seed = 5: write it without spaces: seed=5$"),
        (["seed", "=5"], r"^seed =5: write it without spaces: seed=5$"),
        (["seed=", "5"], r"^'5' stands alone; .* write seed=5$"),
        (["seed = 5"], r"^seed = 5: write it without spaces: seed=5$"),
        (["--seed=5"], r"^--seed=5: settings are written without dashes: seed=5$"),
        (["seed"], r"^'seed': expected key=value"),
        (["=5"], r"^'=5': expected key=value"),
    ],
)
def test_what_is_no_override_says_what_to_type(load, words, message):
    with pytest.raises(ConfigError, match=message):
        load("", *words)


STAGE_1 = str(CONFIGS / "shapes_stage_1.yaml")


def check(*arguments):
    return main(["--config", STAGE_1, "--check", "--gpu", "cpu", *arguments])


def test_a_prompt_given_as_such_is_taken_literally(capsys):
    assert check("seed=2", "--prompt", "a ${robot} #7") == 0
    assert "prompt: 'a ${robot} #7'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.max_steps=5"], "error: --trainer.max_steps=5: .* without dashes: trainer.max_steps=5"),
        (["--trainer.max_steps", "5"], "error: --trainer.max_steps: .* dashes: trainer.max_steps=..."),
        (["-seed=5"], "error: -seed=5: .* without dashes: seed=5"),
        (["--prompt", "a", "red", "cube", "seed=5"], "'red cube' stands alone; .*prompt=\"a red cube\""),
    ],
)
def test_what_is_no_setting_says_how_it_is_written(capsys, arguments, message):
    assert check(*arguments) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "system.prompt_processor.prompt=b"], "both name the prompt"),
        (["--prompt", "a", "stage_2.system.prompt_processor.prompt=b"], "both name the prompt"),
        (["--promt", "a"], "unrecognized arguments: --promt"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        check(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "override", "expected"),
    [
        ("a.b: {lr: 1}", "a.b.lr=2", {"a.b": {"lr": 2}}),
        ("a.b: {lr: 1}", "a.b.c.lr=2", {"a.b": {"lr": 1}, "a.b.c": {"lr": 2}}),
        ("a.b: {lr: 1}", "a.b.eps=2", {"a.b": {"lr": 1, "eps": 2}}),
        ("a.b: {lr: 1}", "a.b=null", {"a.b": None}),
        ("a.b: {lr: 1}", "a.b.lr=null", {"a.b": {"lr": None}}),
        ("a.b: {lr: 1}", "a.b={eps: 2}", {"a.b": {"lr": 1, "eps": 2}}),
        ("a.b: null", "a.b.lr=2", {"a.b": {"lr": 2}}),
        ("", "a.b={eps: 2}", {"a.b": {"eps": 2}}),
        ("", "a.lr=2", {"a": {"lr": 2}}),
        ("", "a=2", {"a": 2}),
    ],
)
def test_keys_that_are_dotted_paths_can_be_set_on_the_command_line(load, file, override, expected):
    room = load(f"options: {{params: {{{file}}}}}", f"options.params.{override}")
    assert room.options.params == expected


@pytest.mark.parametrize("stage", [1, 3])
def test_any_group_s_learning_rate_can_be_set_at_every_stage(stage):
    group = "geometry.encoding.encoding.encoding_time"
    override = f"system.optimizer.params.{group}.lr=0.5"
    overrides = [override, "system.prompt_processor.prompt=x"]
    cfg = load_experiment([CONFIGS / f"shapes_stage_{stage}.yaml"], overrides).cfg
    assert cfg.system.optimizer.params[group] == {"lr": 0.5}


def test_an_option_that_an_optimizer_group_has_not_is_an_error():
    overrides = ["system.optimizer.params.geometry.encoding.lrr=0.5", "system.prompt_processor.prompt=x"]
    with pytest.raises(
        ConfigError, match=r"^system\.optimizer .*: params\.geometry\.encoding\.lrr: .* 'lr'\?"
    ):
        load_experiment([CONFIGS / "shapes_stage_1.yaml"], overrides)


def test_a_key_of_another_class_names_that_class(load):
    with pytest.raises(ConfigError) as error:
        load("", "speaker.volume=3")
    assert str(error.value) == (
        "speaker.volume (in the command line): unknown key of test-speaker; "
        "test-louder-speaker has it: speaker_type=test-louder-speaker"
    )


# -- paths ----------------------------------------------------------------------------------------


def test_paths_are_expanded_once(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/$me")
    monkeypatch.setenv("DATA", "/data/$x")
    room = load("folder: ~/a\nfolders: [$DATA/b, ./~, 'c$$d']\ntag: ~ $DATA", "size=~/a")
    assert room.folder == "/home/$me/a"
    assert room.folders == ["/data/$x/b", "./~", "c$d"]
    assert (room.tag, room.size) == ("~ $DATA", "~/a")
    assert load("folder: ~/a\nfolders: ['${folder}/b']").folders == ["/home/$me/a/b"]


@pytest.mark.parametrize("path", ["$NOWHERE/a", "~nobody-of-this-name/a", ""])
def test_a_path_that_leads_nowhere_is_refused_by_its_key(load, path):
    expected = rf"'\{path[0]}.*/a': " if path else "is empty; write . for the current folder, or null "
    with pytest.raises(ConfigError, match=rf"^folder \(in the command line\): {expected}"):
        load("", f"folder={path}")


@pytest.mark.parametrize(
    "key",
    [
        "exp_root_dir",
        "resume",
        "system.weights",
        "system.exporter.trajectory",
        "system.prompt_processor.pretrained_model_name_or_path",
        "system.prompt_processor_video.pretrained_model_name_or_path",
        "system.guidance.pretrained_model_name_or_path",
        "system.guidance.pretrained_model_name_or_path_lora",
        "system.guidance_multi_view.ckpt_path",
        "system.guidance_video.pretrained_model_name_or_path",
    ],
)
def test_every_path_of_an_experiment_is_expanded_and_recorded_so(key, monkeypatch, tmp_path):
    monkeypatch.setenv("MODELS", str(tmp_path))
    overrides = [
        f"{key}=$MODELS/a",
        "system.exporter_type=video-exporter",
        "system.prompt_processor.prompt=x",
    ]
    found = load_config([CONFIGS / "shapes_stage_3.yaml"], overrides, schema=ExperimentConfig).values
    for part in key.split("."):
        found = found[part]
    assert found == f"{tmp_path}/a"


def test_the_cache_s_folder_is_expanded_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FOURDFY_CACHE", "~/cache")
    assert cache_root() == tmp_path / "cache"
    monkeypatch.setenv("FOURDFY_CACHE", "$NOWHERE/cache")
    with pytest.raises(ConfigError, match=r"FOURDFY_CACHE=.*\$NOWHERE is not set"):
        cache_root()


def test_expanding_leaves_a_plain_path_alone():
    assert expand_path("a/b~/${c}") == "a/b~/${c}"


# -- plugins --------------------------------------------------------------------------------------

PLUGIN = """
from fourdfy.config import Component
from fourdfy.registry import find, register

@register("{name}")
class Mine(find("test-speaker", Component)):
    pass
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write a plugin module with one speaker; gives its folder."""
    monkeypatch.setattr("sys.path", [*sys.path])

    def write(name: str, folder: str = "", text: str = PLUGIN) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.py").write_text(text.format(name=name.replace("_", "-")))
        return tmp_path / folder

    return write


def test_a_plugin_beside_the_config_is_imported_and_recorded(load, plugin):
    folder = plugin("plugin_beside")
    room = load("plugins: [plugin_beside]\nspeaker_type: plugin-beside", "speaker.prompt=a #1")
    assert room.speaker.prompt == "a #1"
    assert (room.plugins, room.plugin_path) == (["plugin_beside"], [str(folder)])


def test_plugins_of_files_and_of_the_command_line_add_up(load, plugin, tmp_path, monkeypatch):
    plugin("plugin_here", "here"), plugin("plugin_file")
    monkeypatch.chdir(tmp_path / "here")
    room = load("plugins: plugin_file", "plugins=[plugin_here]", "speaker_type=plugin-here")
    assert room.plugins == ["plugin_file", "plugin_here"]
    assert room.plugin_path == [str(tmp_path), str(tmp_path / "here")]


def test_what_is_recorded_finds_the_plugin_from_anywhere(load, plugin, tmp_path):
    plugin("plugin_away", "away")
    text = f"plugins: [plugin_away]\nplugin_path: [{tmp_path}/away]\nspeaker_type: plugin-away"
    assert load(text).plugin_path == [f"{tmp_path}/away"]


def test_a_module_that_is_installed_needs_no_folder(load):
    room = load("", "plugins=[json]")
    assert (room.plugins, room.plugin_path) == (["json"], [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "plugin_missing",
            r"^plugins: plugin_missing can't be imported \(Mod[^,]*\); looked in /.*; .* set plugin_path",
        ),
        (
            "plugin_broken",
            r"^plugins: plugin_broken can't be imported \(ZeroDivisionError: .*plugin_broken\.py, line 1\)$",
        ),
        ("plugin_typo", r"^plugins: plugin_typo can't be imported \(SyntaxError: .*line 1\)\)$"),
        ("plugin_broken.py", r"write the module's name, plugin_broken$"),
        ("{a: 1}", r"^plugins \(in the command line\): expected a list of names"),
    ],
)
def test_a_plugin_that_can_not_be_imported_is_one_line(load, plugin, given, message):
    plugin("plugin_broken", text="1 / 0"), plugin("plugin_typo", text="def")
    with pytest.raises(ConfigError, match=message) as error:
        load("", f"plugins={given}")
    assert "\n" not in str(error.value)


def test_installed_plugins_come_by_their_entry_points(load, monkeypatch, caplog):
    class Broken:
        name, value = "mine", "my.module"

        def load(self):
            raise RuntimeError("no")

    loaded = []
    good = SimpleNamespace(name="good", value="a.b", load=lambda: loaded.append("good"))
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [Broken(), good] * (group == "fourdfy.plugins")
    )
    registry.import_installed_plugins.cache_clear()
    with caplog.at_level(logging.WARNING, "fourdfy.registry"):
        load()
    assert loaded == ["good"]
    assert "plugin mine (my.module) can't be imported: RuntimeError('no')" in caplog.text
