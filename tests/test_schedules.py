"""Scheduled scalars against the original's values (tests/data/schedules.json)."""

import json
from pathlib import Path

import pytest

from fourdfy.schedules import schedule_max, schedule_value

CASES = json.loads((Path(__file__).parent / "data" / "schedules.json").read_text())["cases"]


@pytest.mark.parametrize("case", [c for c in CASES if c.get("type") in ("int", "float", "bool")])
def test_every_reference_value_is_reproduced(case):
    value = schedule_value(case["value"], case["step"], case["epoch"])
    assert value == case["result"]
    assert type(value).__name__ == case["type"]


@pytest.mark.parametrize(
    "case", [c for c in CASES if ("error" in c or c.get("type") == "list") and not c.get("plain_python_list")]
)
def test_what_is_no_schedule_is_refused_by_name(case):
    with pytest.raises(ValueError, match="expected a number"):
        schedule_value(case["value"], case["step"], case["epoch"])


def test_a_float_end_counts_epochs_which_stay_0():
    assert schedule_value([0, 1.0, 3.0, 10.0], step=5000) == 1.0


def test_the_largest_value_is_found_in_both_forms():
    assert schedule_max([10000, 0.0, 1000.0, 10001]) == 1000.0
    assert schedule_max([0.98, 0.5, 8000]) == 0.98
    assert schedule_max(3) == 3
