"""Every key is documented where it is declared, and docs/config.md says what the source says."""

import dataclasses
from dataclasses import dataclass

import pytest

from fourdfy.launching.experiment import ExperimentConfig
from tools.config_reference import PAGE, configs, field_docs, reference, undocumented

CONFIGS = configs(ExperimentConfig)


@pytest.mark.parametrize("schema", CONFIGS, ids=lambda schema: f"{schema.__module__}.{schema.__qualname__}")
def test_every_key_says_what_it_does(schema):
    assert not undocumented(schema), "write a string below the field"


def test_the_page_is_the_source_s():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run python -m tools.config_reference"


def test_what_a_config_reaches_is_found():
    names = {schema.__qualname__ for schema in CONFIGS}
    assert {"ImplicitVolume.Config", "TrainerConfig", "VanillaMLP.Config", "WandbConfig"} <= names


def test_a_key_without_a_string_is_found():
    @dataclass
    class Base:
        fourth: int = 0
        """The fourth."""

    @dataclass
    class Options(Base):
        first: int = 0
        """The first."""
        second: int = 0
        third: int = dataclasses.field(default=0)
        fourth: int = 1

        def method(self) -> None:
            """Not a field's."""

    assert field_docs(Options) == {"first": "The first.", "fourth": "The fourth."}
    assert undocumented(Options) == ["second", "third"]
