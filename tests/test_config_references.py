"""What somebody else's config can make of ``${...}``: no secrets, no flood."""

import re

import pytest
from omegaconf import OmegaConf

from fourdfy.config import ConfigError
from fourdfy.config_layers import load_config
from fourdfy.launching.experiment import load_experiment
from tests.commands import CONFIGS

PROMPT = "system.prompt_processor.prompt=x"


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    monkeypatch.setenv("SCRATCH", "/scratch/me")

    def load(text, *overrides):
        (tmp_path / "x.yaml").write_text(text)
        return load_config([tmp_path / "x.yaml"], overrides).values

    return load


@pytest.mark.parametrize(
    "text", ["${oc.env:HF_TOKEN}", "a ${oc.env:HF_TOKEN,x}", "${oc.decode:'${oc.env:HF_TOKEN}'}"]
)
def test_a_config_reads_no_secret_and_says_how_to_allow_it(load, text):
    with pytest.raises(ConfigError) as error:
        load(f"tag: {text}")
    assert re.match(
        r"tag \(in .*x\.yaml\): the environment variable HF_TOKEN may hold a secret", str(error.value)
    )
    assert str(error.value).endswith("export FOURDFY_ALLOW_ENV=HF_TOKEN")
    assert "a-secret" not in str(error.value)


@pytest.mark.parametrize("problem", ["${oc.env:HF_TOKEN}", "${div:1,0}", "${nowhere}"])
def test_an_error_names_the_key_that_has_the_reference_and_none_that_leads_there(load, problem):
    text = f"tag: ${{name}}\nname: '${{rmspace:${{a.b}},_}}'\na: {{c: 'x {problem}', b: '${{.c}}'}}"
    with pytest.raises(ConfigError, match=r"^a\.c \(in .*x\.yaml\): "):
        load(text)


def test_what_is_no_secret_or_allowed_by_name_is_read(load, monkeypatch):
    assert load("tag: ${oc.env:SCRATCH}/x") == {"tag": "/scratch/me/x"}
    monkeypatch.setenv("FOURDFY_ALLOW_ENV", "OTHER, HF_TOKEN")
    assert load("tag: ${oc.env:HF_TOKEN}") == {"tag": "a-secret"}
    monkeypatch.setenv("FOURDFY_ALLOW_ENV", "HF")
    with pytest.raises(ConfigError, match=r"export FOURDFY_ALLOW_ENV=HF,HF_TOKEN$"):
        load("tag: ${oc.env:HF_TOKEN}")


@pytest.mark.parametrize("line", ["exp_root_dir: $HF_TOKEN/x", "plugin_path: [/a/$HF_TOKEN]\nplugins: [x]"])
def test_a_path_of_a_file_reads_no_secret_and_a_typed_one_does(tmp_path, monkeypatch, line):
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    (tmp_path / "x.yaml").write_text(f"base: {CONFIGS / 'shapes_stage_1.yaml'}\n{line}")
    with pytest.raises(
        ConfigError, match=r"\(in .*x\.yaml\): the environment variable HF_TOKEN may hold"
    ) as error:
        load_experiment([tmp_path / "x.yaml"], [PROMPT])
    assert "a-secret" not in str(error.value)
    typed = load_experiment([CONFIGS / "shapes_stage_1.yaml"], [PROMPT, "exp_root_dir=$HF_TOKEN/x"])
    assert typed.cfg.exp_root_dir == "a-secret/x"


def test_another_program_s_own_configs_still_read_the_environment(load):
    load("tag: x")
    assert OmegaConf.create({"a": "${oc.env:HF_TOKEN}"}).a == "a-secret"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\n".join(f"a{k}: '{f'${{a{k + 1}}}' * 10}'" for k in range(30)) + "\na30: x",
            r"^a\d+ .*: its references mult",
        ),
        (f"a: '{'${${b}}' * 20}'\nb: c\nc: x", r"^a .*: its references multiply beyond any use$"),
        ("a: ${mul:x,1000000000}", r"^a .*: mul: expected two numbers, got x and 1000000000$"),
        ("a: ${mul:1e200,1e200}", r"^a .*: mul: expected two numbers"),
        ("a: ${rmspace:x y,too long a text}", r"^a .*: rmspace: expected a character"),
        ("a: x ${b}\nb: {c: 1}", r"^a .*: b is a mapping, and this a text$"),
        ("\n".join(f"a{k}: ${{a{k + 1}}}" for k in range(900)) + "\na900: x", "lead on and on$"),
        ("a: ${b}\nb: ${a}", r"^a .*: Recursive interpolation detected$"),
    ],
)
def test_references_that_flood_are_refused_at_once(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_ordinary_references_are_followed(load):
    text = "a: {b: [1, '${c}'], d: '${.b[1]} ${..c}'}\nc: 7\ne: ${a}\nf: ${oc.select:nothing,4}"
    inner = {"b": [1, 7], "d": "7 7"}
    assert load(text) == {"a": inner, "c": 7, "e": inner, "f": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a0: &a0 [x]\n" + "\n".join(f"a{k}: &a{k} [{f'*a{k - 1}, ' * 9}]" for k in range(1, 20)),
            r"x\.yaml:\d+: more than 10,000 values, with those that aliases \(\*\) repeat$",
        ),
        ("a: " + "9" * 5000, r"x\.yaml:1: '9+' is no int$"),
        ("a: !!timestamp 9999-99-99", r"x\.yaml:1: '9999-99-99' is no timestamp$"),
        ("a: !!seq x", r"x\.yaml:1: expected a sequence node"),
        ('"a\\u001bb": 1', r"x\.yaml:1: expected a word as the key, got 'a\\x1bb'$"),
        ("base: ['" + "x" * 300 + "']", r"x\.yaml: base: expected the name of a file"),
        ("a: x" + " " * 2**20, r"x\.yaml: has 1,048,580 bytes; expected a config file"),
        (
            "trainer: {callbacks: {a: {type: [1]}}}",
            r"callbacks\.a\.type \(in .*\): expected a name, got \[1\]$",
        ),
    ],
)
def test_a_file_that_floods_or_deceives_is_one_line(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_experiment([tmp_path / "x.yaml"], [PROMPT])
    assert "\n" not in str(error.value)


def test_base_files_that_multiply_are_refused(tmp_path):
    for k in range(9):
        (tmp_path / f"{k}.yaml").write_text(f"base: [{', '.join([f'{k + 1}.yaml'] * 10)}]")
    (tmp_path / "9.yaml").write_text("tag: x")
    with pytest.raises(ConfigError, match=r"6\.yaml: base: leads to more than 200 files$"):
        load_config([tmp_path / "0.yaml"])


def test_a_text_beyond_any_use_is_refused(load):
    with pytest.raises(ConfigError, match=r"^tag: has 10,000,000 characters; expected 1,048,576 at most$"):
        load("", f"tag={'x' * 10**7}")
