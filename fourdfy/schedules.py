"""Scheduled scalars: a number, or ``[start, v0, v1, end]``, or ``[v0, v1, end]`` with start 0.

The ramp is ``v0 + (v1 - v0) * clip((step - start) / (end - start), 0, 1)`` of the global step. In
threestudio an ``end`` that is a float counts epochs. Training is one endless epoch, so such a schedule
would never move; it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Schedule = Any
"""Annotation of a config field that holds a scheduled scalar; check it with ``check_schedule``."""


def schedule_value(value: Schedule, step: int) -> float | int:
    """The scalar at the global ``step``. A number is returned unchanged, with its type.

    Raises:
        ValueError: not a number and not a list of 3 or 4 numbers with whole start != end.
    """
    check_schedule(value, "schedule")
    if isinstance(value, int | float):
        return value
    start, v0, v1, end = value if len(value) == 4 else [0, *value]
    return v0 + (v1 - v0) * max(min(1.0, (step - start) / (end - start)), 0.0)


def schedule_max(value: Schedule) -> float | int:
    """The largest value that the schedule ever takes."""
    check_schedule(value, "schedule")
    return value if isinstance(value, int | float) else max(value[-3], value[-2])


def check_schedule(value: Schedule, key: str) -> None:
    """Raise a ValueError naming ``key`` unless ``value`` is a scheduled scalar."""
    if isinstance(value, int | float) and math.isfinite(value):
        return
    expected = f"{key}={value!r}: expected a number, [start, v0, v1, end] or [v0, v1, end]"
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in (3, 4):
        raise ValueError(expected)
    if not all(isinstance(number, int | float) for number in value):
        raise ValueError(expected)
    if isinstance(end := value[-1], float):
        step = max(1, round(end)) if math.isfinite(end) else "a whole number"
        raise ValueError(
            f"{key}={value!r}: a schedule ends at a step, {end!r} would count epochs; write {step}"
        )
    if (value[0] if len(value) == 4 else 0) == end:
        raise ValueError(f"{expected}; start and end are equal")
