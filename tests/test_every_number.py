"""Every number of an experiment, set to what can't work: refused when parsed, by its key, in one line.

What is accepted stands in ``ACCEPTED`` with the reason.
"""

import copy
import dataclasses
import fnmatch
import math
from typing import Any

import pytest

from fourdfy.config import ConfigError, parse_config
from fourdfy.config_layers import LoadedConfig
from fourdfy.launching.experiment import load_experiment, parse_experiment
from tests.commands import CONFIGS

PROMPT = "system.prompt_processor.prompt=a red cube bouncing"
EXPERIMENT = load_experiment([CONFIGS / "shapes_stage_3.yaml"], [PROMPT, "use_timestamp=false"])
HUGE = 10**9
VALUES = (0, -1, HUGE, math.nan, math.inf, "", None)

ACCEPTED = (
    # Zero of it is a meaning: none, off, black, level with the ground.
    (0, "seed trainer.max_steps trainer.val_check_interval"),
    (0, "data.prob_multi_view data.single_view.prob_single_view_video data.*_perturb"),
    (0, "data.*.elevation_range.*"),
    (0, "system.geometry.density_blob_scale system.background.* system.renderer.*alpha_thre"),
    (0, "system.renderer.occ_dilation"),
    (0, "system.prompt_processor.*_threshold system.guidance*.guidance_scale*"),
    (0, "system.guidance*.min_step_percent* system.guidance*.recon_std_rescale"),
    (0, "system.loss.lambda_* system.optimizer.params.*.lr"),
    # A schedule may begin at any step, also before the first one.
    (0, "system.guidance*.m??_step_percent.0"),
    (-1, "system.guidance*.m??_step_percent.0 system.guidance*.guidance_scale.0 system.loss.lambda_*.0"),
    # A camera below the ground.
    (-1, "data.*.elevation_range.0"),
    # A billion steps: a long run, a slow schedule, or an event that doesn't come; any seed is as good.
    (HUGE, "seed trainer.*_step* trainer.val_check_interval checkpoint.every_n_train_steps"),
    (HUGE, "system.guidance*.m??_step_percent.3 system.guidance*.guidance_scale.3 system.loss.lambda_*.3"),
    # Null says: as elsewhere (no multi-view steps, one moment, the model's own size).
    (None, "data.prob_multi_view data.multi_view.num_frames system.guidance_video.height"),
    (None, "system.guidance_video.width system.renderer.eval_samples_per_ray"),
)


def numbers(values: Any, places: tuple = ()):
    for place, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            yield from numbers(value, (*places, place))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (*places, place)


KEYS = list(numbers(EXPERIMENT.values))


def is_accepted(key: str, value: Any) -> bool:
    for accepted, patterns in ACCEPTED:
        if accepted == value and any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns.split()):
            return True
    return False


def refusal_of_component(places: tuple, value: Any) -> str:
    """What the part that holds the number says of ``value``, parsed alone; "" if it takes it."""
    owner, path = EXPERIMENT.cfg, places
    while dataclasses.is_dataclass(below := getattr(owner, str(path[0]), None)):
        owner, path = below, path[1:]
    above = places[: len(places) - len(path)]
    inner = changed(places, value)
    for place in above:
        inner = inner[place]
    try:
        parse_config(type(owner), {path[0]: inner[path[0]]}, ".".join(above))
    except ConfigError as error:
        return str(error)
    return ""


def refusal_of_experiment(places: tuple, value: Any) -> str:
    try:
        parse_experiment(LoadedConfig(changed(places, value), {}))
    except ConfigError as error:
        return str(error)
    return ""


def changed(places: tuple, value: Any) -> dict:
    values = copy.deepcopy(dict(EXPERIMENT.values))
    node = values
    for place in places[:-1]:
        node = node[place]
    node[places[-1]] = value
    return values


def names(message: str, places: tuple) -> bool:
    return [str(place) for place in places if not isinstance(place, int)][-1] in message


@pytest.mark.parametrize("places", KEYS, ids=lambda places: ".".join(map(str, places)))
def test_a_value_that_can_not_work_is_refused_by_its_key(places):
    key = ".".join(map(str, places))
    for value in VALUES:
        message = refusal_of_component(places, value)
        if not names(message, places):
            if is_accepted(key, value):
                continue
            message = refusal_of_experiment(places, value)  # slower; it compares the parts
        assert names(message, places), f"{key}={value!r}: {message or 'is taken'}"
        assert "\n" not in message


def test_there_are_numbers_to_try():
    assert len(KEYS) > 90
    assert {places[0] for places in KEYS} == {"seed", "data", "system", "trainer", "checkpoint"}
