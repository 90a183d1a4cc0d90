"""Scheduled scalars against the original's values (tests/data/schedules.json)."""

import json
from pathlib import Path

import pytest

from fourdfy.schedules import schedule_max, schedule_value

CASES = json.loads((Path(__file__).parent / "data" / "schedules.json").read_text())["cases"]
EPOCHS = [c for c in CASES if c.get("type") == "float" and isinstance(c["value"], list)]
EPOCHS = [c for c in EPOCHS if isinstance(c["value"][-1], float)]
"""Schedules that the original counts in epochs, of which its training has one."""


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.get("type") in ("int", "float", "bool") and c not in EPOCHS]
)
def test_every_reference_value_is_reproduced(case):
    value = schedule_value(case["value"], case["step"])
    assert value == case["result"]
    assert type(value).__name__ == case["type"]


@pytest.mark.parametrize(
    "case", [c for c in CASES if ("error" in c or c.get("type") == "list") and not c.get("plain_python_list")]
)
def test_what_is_no_schedule_is_refused_by_name(case):
    with pytest.raises(ValueError, match="expected a number"):
        schedule_value(case["value"], case["step"])


@pytest.mark.parametrize("case", EPOCHS)
def test_an_end_in_epochs_is_refused_and_says_what_to_write(case):
    with pytest.raises(ValueError, match=f"would count epochs; write {case['value'][-1]:.0f}$"):
        schedule_value(case["value"], case["step"])


def test_the_largest_value_is_found_in_both_forms():
    assert schedule_max([10000, 0.0, 1000.0, 10001]) == 1000.0
    assert schedule_max([0.98, 0.5, 8000]) == 0.98
    assert schedule_max(3) == 3
    assert schedule_max([100, 0.98, 0.5, 200, "sqrt"]) == 0.98


@pytest.mark.parametrize(("step", "share"), [(0, 0), (100, 0), (104, 0.2), (125, 0.5), (200, 1), (300, 1)])
def test_with_a_root_most_of_the_change_comes_early(step, share):
    assert schedule_value([100, 0.75, 0.25, 200, "sqrt"], step) == pytest.approx(0.75 - 0.5 * share)


@pytest.mark.parametrize(
    "value", [["sqrt"], [1, "sqrt"], [1, 2, "sqrt"], [0, 1, 2, 3, "cos"], [1, "sqrt", 3, 4]]
)
def test_a_word_behind_no_schedule_is_refused(value):
    with pytest.raises(ValueError, match=r"expected a number, \[start, .* with or without sqrt$"):
        schedule_value(value, 0)
