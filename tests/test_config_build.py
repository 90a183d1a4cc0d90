"""Configs made from Python: they know their component, and parse what they hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest

from fourdfy import registry
from fourdfy.config import Component, ConfigError, Schema, inner_slot, parse_config, slot
from fourdfy.scenes.nerf.implicit_volume import ImplicitVolume
from fourdfy.systems.fourdfy import FourdfySystem


class Engine(Component):
    def __init__(self, cfg, *given, **named):
        self.cfg, self.given, self.named = cfg, given, named


@registry.register("test-diesel")
class Diesel(Engine):
    @dataclass(frozen=True, kw_only=True)
    class Config(Engine.Config):
        power: int = 50


@registry.register("test-turbo-diesel")
class TurboDiesel(Diesel):
    """Has no Config of its own."""


class Wheel(Component):
    pass


@dataclass(frozen=True, kw_only=True)
class Trailer(Schema):
    length: float = 2.0


class Car(Component):
    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        engine_type: str | None = "test-diesel"
        engine: Any = slot(Engine, "engine_type")
        spare: Any = inner_slot(Engine, "type", {"type": "test-diesel", "power": 20})
        trailer: Trailer = field(default_factory=Trailer)

        def __post_init__(self) -> None:
            if self.engine and self.engine.power < self.trailer.length:
                raise ValueError(f"engine.power={self.engine.power}: too weak for the trailer")


def test_a_config_builds_the_component_that_it_belongs_to():
    engine = Diesel.Config(power=70).build(1, colour="red")
    assert type(engine) is Diesel
    assert (engine.cfg.power, engine.given, engine.named) == (70, (1,), {"colour": "red"})


def test_a_class_without_a_config_of_its_own_is_still_the_one_that_is_built():
    assert type(TurboDiesel.Config(power=70).build()) is TurboDiesel
    assert type(Diesel.Config().build()) is Diesel
    assert type(parse_config(Car.Config, {"engine_type": "test-turbo-diesel"}).engine.build()) is TurboDiesel


def test_a_config_that_two_classes_are_given_belongs_to_each():
    class Electric(Engine):
        Config = Diesel.Config

    assert type(Electric.Config().build()) is Electric
    assert type(Diesel.Config().build()) is Diesel


def test_what_a_config_holds_is_parsed_when_it_is_made():
    car = Car.Config(engine={"power": 70}, trailer={"length": 3})
    assert (car.engine, car.spare) == (Diesel.Config(power=70), Diesel.Config(power=20))
    assert car.trailer == Trailer(length=3.0)
    assert Car.Config(engine=TurboDiesel.Config(power=3)).engine == TurboDiesel.Config(power=3)
    assert Car.Config(engine_type=None).engine is None
    assert dataclasses.replace(car, engine={"power": 9}).engine.power == 9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": {"powr": 70}}, r"^engine\.powr: unknown key; did you mean 'power'\?$"),
        ({"engine": {"power": "much"}}, r"^engine\.power: .*could not be converted"),
        (
            {"engine_type": "test-desel"},
            r"^engine_type: no Engine .*; did you mean 'test-diesel'\? For .* plugins=MODULE$",
        ),
        ({"spare": {"type": "test-wheel"}}, r"^spare\.type: no Engine"),
        ({"trailer": {"lenght": 1}}, r"^trailer\.lenght: unknown key; did you mean 'length'\?$"),
        ({"engine": Wheel.Config()}, r"^engine: expected the Config of Engine, got Wheel\.Config$"),
        ({"engine": Trailer()}, r"^engine: expected the Config of Engine, got Trailer$"),
        ({"engine": 3}, r"^engine: expected a mapping, got 3$"),
        ({"trailer": None}, r"^trailer: expected a mapping, got null$"),
        ({"engine": {"power": 1}}, r"^engine\.power=1: too weak for the trailer$"),
    ],
)
def test_a_mistake_is_named_by_its_key(given, message):
    with pytest.raises(ValueError, match=message):
        Car.Config(**given)


def test_the_project_s_own_components_are_made_so():
    cfg = FourdfySystem.Config(geometry={"radius": 2.0})
    assert (cfg.geometry.radius, cfg.material, cfg.guidance) == (2.0, cfg.material.component.Config(), None)
    assert isinstance(ImplicitVolume.Config(pos_encoding_config={"n_levels": 2}).build(), ImplicitVolume)
    with pytest.raises(
        ConfigError, match=r"^geometry\.pos_encoding_config\.n_level: unknown key; did you mean"
    ):
        FourdfySystem.Config(geometry={"pos_encoding_config": {"n_level": 2}})
