"""Keys of the original that have no effect: accepted, warned of, and never taken from who reads them."""

import copy
from dataclasses import dataclass

import pytest

from fourdfy.guidance.base import Guidance
from fourdfy.launching.experiment import ExperimentConfig, load_experiment
from fourdfy.original.keys import NO_EFFECT, without_effect_dropped
from fourdfy.registry import find, register
from tests.commands import CONFIGS

PROMPT = "system.prompt_processor.prompt=a panda dancing"
PARTS = (
    "system.exporter={texture_size: 64}",
    "system.geometry.pos_encoding_config.time_encoding_config={otype: Grid}",
)
VALUES = load_experiment([CONFIGS / "fourdfy_stage_3_vc.yaml"], [PROMPT, *PARTS]).values
PLACES = {
    "system.*_encoding_config.num_frames": "system.geometry.pos_encoding_config.num_frames",
    "system.*.time_encoding_config": "system.geometry.pos_encoding_config.time_encoding_config",
}


def with_value(key, value):
    """The values of an experiment with one more."""
    values = copy.deepcopy(dict(VALUES))
    node, *places = values, *key.split(".")
    for place in places[:-1]:
        node = node[place]
    node[places[-1]] = value
    return values


@pytest.mark.parametrize("pattern", NO_EFFECT)
def test_a_key_without_effect_is_dropped_and_warned_of_unless_it_says_what_goes_without_saying(
    pattern, caplog
):
    key = pattern
    for place, one in PLACES.items():
        key = key.replace(place, one)
    key = key.replace("*", "")
    reason, silent = NO_EFFECT[pattern]
    values = with_value(key, silent)
    assert without_effect_dropped(ExperimentConfig, values) == dict(VALUES)
    assert not caplog.records
    values = with_value(key, "anything")
    assert without_effect_dropped(ExperimentConfig, values) == dict(VALUES)
    (record,) = caplog.records
    assert record.message == f"these keys of the config have no effect:\n  {key}: {reason}"
    assert values == with_value(key, "anything")


def test_what_is_dropped_is_still_recorded():
    experiment = load_experiment([CONFIGS / "shapes_stage_1.yaml"], [PROMPT, "n_gpus=2", "system.stage=x"])
    record = experiment.record()
    assert (record["n_gpus"], record["system"]["stage"]) == (2, "x")


ZeroScope = find("zeroscope-guidance", Guidance)


@register("test-guidance-with-a-config")
class GuidanceWithAConfig(ZeroScope):
    @dataclass(frozen=True, kw_only=True)
    class Config(ZeroScope.Config):
        config: str = ""


def test_a_component_that_has_such_a_key_gets_it(caplog):
    given = ["system.guidance_type_video=test-guidance-with-a-config", "system.guidance_video.config=b"]
    model = "system.guidance_video.pretrained_model_name_or_path=a"
    experiment = load_experiment([CONFIGS / "fourdfy_stage_3.yaml"], [*given, model, PROMPT])
    assert experiment.cfg.system.guidance_video.config == "b"
    assert not caplog.records
