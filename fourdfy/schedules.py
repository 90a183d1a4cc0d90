"""Scheduled scalars: a number, or ``[start, v0, v1, end]``, or ``[v0, v1, end]`` with start 0.

The ramp is ``v0 + (v1 - v0) * clip((step - start) / (end - start), 0, 1)`` of the global step. The word
``sqrt`` behind the numbers takes that share's root: most of the change comes early (Zhu et al. 2023, HiFA).
In threestudio an ``end`` that is a float counts epochs. Training is one endless epoch, so such a schedule
would never move; it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Schedule = Any
"""Annotation of a config field that holds a scheduled scalar; check it with ``check_schedule``."""

SQRT = "sqrt"
"""Last entry of a schedule most of whose change comes early."""


def ramp(value: Sequence[Any]) -> list[Any]:
    """``[start, v0, v1, end]`` of a schedule that is no number itself."""
    numbers = [number for number in value if number != SQRT]
    return numbers if len(numbers) == 4 else [0, *numbers]


def schedule_value(value: Schedule, step: int) -> float | int:
    """The scalar at the global ``step``. A number is returned unchanged, with its type.

    Raises:
        ValueError: not a number and not a list of 3 or 4 numbers, perhaps with ``sqrt`` behind them, with
            whole start != end.
    """
    check_schedule(value, "schedule")
    if isinstance(value, int | float):
        return value
    start, v0, v1, end = ramp(value)
    share = max(min(1.0, (step - start) / (end - start)), 0.0)
    return v0 + (v1 - v0) * (math.sqrt(share) if value[-1] == SQRT else share)


def schedule_max(value: Schedule) -> float | int:
    """The largest value that the schedule ever takes."""
    check_schedule(value, "schedule")
    return value if isinstance(value, int | float) else max(ramp(value)[1:3])


def check_schedule(value: Schedule, key: str) -> None:
    """Raise a ValueError naming ``key`` unless ``value`` is a scheduled scalar."""
    if isinstance(value, int | float) and math.isfinite(value):
        return
    forms = f"[start, v0, v1, end] or [v0, v1, end], with or without {SQRT}"
    expected = f"{key}={value!r}: expected a number, {forms}"
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(expected)
    numbers = value[:-1] if value and value[-1] == SQRT else value
    if len(numbers) not in (3, 4) or not all(isinstance(number, int | float) for number in numbers):
        raise ValueError(expected)
    if isinstance(end := numbers[-1], float):
        step = max(1, round(end)) if math.isfinite(end) else "a whole number"
        raise ValueError(
            f"{key}={value!r}: a schedule ends at a step, {end!r} would count epochs; write {step}"
        )
    if ramp(value)[0] == end:
        raise ValueError(f"{expected}; start and end are equal")
