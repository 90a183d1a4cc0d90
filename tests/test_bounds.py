"""Numbers that a field does not take are refused when a config is parsed, by key."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from fourdfy import registry
from fourdfy.bounds import number, scheduled
from fourdfy.config import Component, ConfigError, parse_config
from fourdfy.data.base import DataModule
from fourdfy.data.settings import MultiViewConfig, SingleViewConfig
from fourdfy.guidance.base import Guidance
from fourdfy.scenes.nerf.base import Background, Geometry, Material, Renderer
from fourdfy.scenes.nerf.encodings import Encoding
from fourdfy.scenes.nerf.implicit_volume import BlobStdAnnealing
from fourdfy.scenes.nerf.mlp import VanillaMLP


@dataclass(frozen=True, kw_only=True)
class Lens:
    fovy_range: tuple[float, float] = number((40.0, 70.0), high=179, above=0)


@dataclass(frozen=True, kw_only=True)
class Camera(Component.Config):
    width: int = number(64, 1, 8192)
    share: Any = scheduled(0.5, 0, 1)
    shares: dict[str, Any] = scheduled({}, 0, 1)
    sizes: list[int] = number([1, 2], 1)
    free: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    lens: Lens = field(default_factory=Lens)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 0}, r"^camera\.width: 0 is outside the range; expected 1 to 8192"),
        ({"width": 10**9}, r"^camera\.width: 1000000000 is outside"),
        ({"share": [0, 0.5, 98.0, 100]}, r"^camera\.share: 98 is outside the range; expected 0 to 1"),
        ({"share": None}, r"^camera\.share: value=None: expected a number"),
        (
            {"share": [100, 0.5, 0.6, 50]},
            r"^camera\.share: .* ends \(step 50\) before it starts",
        ),
        ({"shares": {"a": 0.5, "b.c": 2}}, r"^camera\.shares\.b\.c: 2 is outside the range; expected 0 to 1"),
        ({"share": {"a": 0.5}}, r"^camera\.share: value=\{'a': 0\.5\}: expected a number"),
        ({"shares": {"a": {"b": 0.5}}}, r"^camera\.shares\.a: value=\{'b': 0\.5\}: expected a number"),
        ({"share": "much"}, r"^camera\.share: value='much': expected a number, \[start, v0, v1, end\]"),
        ({"sizes": [1, 0]}, r"^camera\.sizes: 0 is outside the range; expected at least 1"),
        ({"lens": {"fovy_range": [0, 0]}}, r"^camera\.lens\.fovy_range: 0 .* more than 0 and at most 179"),
        ({"free": float("nan")}, r"^camera\.free: nan cannot work; expected a finite number"),
        ({"options": {"eps": float("inf")}}, r"^camera\.options\.eps: inf cannot work"),
    ],
)
def test_a_number_outside_is_refused_by_its_key(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(Camera, given, "camera")


def test_a_number_inside_is_taken():
    cfg = parse_config(
        Camera, {"width": 8192, "share": [0, 0.0, 1.0, 1000], "lens": {"fovy_range": [1, 179]}}
    )
    assert (cfg.width, cfg.share, cfg.lens.fovy_range) == (8192, [0, 0.0, 1.0, 1000], (1.0, 179.0))


@pytest.mark.parametrize(
    "config",
    [
        SingleViewConfig,
        MultiViewConfig,
        BlobStdAnnealing,
        *(
            registry.find(kind, base).Config
            for base in (DataModule, Guidance, Geometry, Material, Background, Encoding, VanillaMLP, Renderer)
            for kind in registry.names(base)
        ),
    ],
    ids=lambda config: config.__qualname__,
)
def test_every_number_of_a_component_has_a_range(config):
    numeric = ("int", "float", "Schedule")
    free = [
        f.name
        for f in fields(config)
        if any(word in numeric for word in re.findall(r"\w+", str(f.type))) and "bounds" not in f.metadata
    ]
    assert not free
