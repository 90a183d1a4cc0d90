"""Scheduled scalars: a number, or ``[start, v0, v1, end]``, or ``[v0, v1, end]`` with start 0.

The ramp is ``v0 + (v1 - v0) * clip((now - start) / (end - start), 0, 1)``. ``now`` is the global
step where ``end`` is an int and the epoch where it is a float (threestudio's rule, kept because its
YAML files rely on it; an endless training epoch stays 0, so a float end never moves).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Schedule = Any
"""Annotation of a config field that holds a scheduled scalar; check it with ``check_schedule``."""


def schedule_value(value: Schedule, step: int, epoch: int = 0) -> float | int:
    """The scalar at ``step``. A number is returned as it is, its type kept.

    Raises:
        ValueError: not a number and not a list of 3 or 4 numbers with start != end.
    """
    check_schedule(value, "schedule")
    if isinstance(value, int | float):
        return value
    start, v0, v1, end = value if len(value) == 4 else [0, *value]
    now = step if isinstance(end, int) else epoch
    return v0 + (v1 - v0) * max(min(1.0, (now - start) / (end - start)), 0.0)


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
    if (value[0] if len(value) == 4 else 0) == value[-1]:
        raise ValueError(f"{expected}; start and end are equal")
