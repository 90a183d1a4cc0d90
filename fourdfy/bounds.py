"""The range of numbers that a config field accepts, declared with the field.

``width: int = number(64, 1, 8192)`` refuses 0 when the config is parsed, naming the key. NaN and infinity are
refused everywhere, even in fields that declare no range.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

from fourdfy.schedules import check_schedule, ramp


@dataclass(frozen=True)
class Bounds:
    """An interval; ``above`` excludes its lower end."""

    low: float | int = -math.inf
    high: float | int = math.inf
    above: float | int | None = None

    def __contains__(self, value: float | int) -> bool:
        return self.low <= value <= self.high and (self.above is None or value > self.above)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:g}"
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{self.low:g} to {self.high:g}"
        lower = f"at least {self.low:g}" if math.isfinite(self.low) else ""
        lower = lower if self.above is None else f"more than {self.above:g}"
        upper = f"at most {self.high:g}" if math.isfinite(self.high) else ""
        return " and ".join(part for part in (lower, upper) if part)


def number(
    default: Any = MISSING,
    low: float | int = -math.inf,
    high: float | int = math.inf,
    *,
    above: float | int | None = None,
) -> Any:
    """A config field of numbers from ``low`` to ``high``, or ``above`` a bound; of a list, each entry."""
    return _field(default, {"bounds": Bounds(low, high, above)})


def scheduled(default: Any = MISSING, low: float | int = -math.inf, high: float | int = math.inf) -> Any:
    """A config field of a scheduled scalar (see ``schedules``) whose values lie from ``low`` to ``high``.

    It may be null if that is the default. With a mapping as the default, every entry is such a scalar.
    """
    entries = isinstance(default, dict)
    metadata = {
        "bounds": Bounds(low, high),
        "scheduled": True,
        "optional": default is None,
        "entries": entries,
    }
    return _field(default, metadata)


def _field(default: Any, metadata: Mapping[str, Any]) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def misfits(value: Any, metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong) for the numbers in a field's plain value; ``metadata`` is the field's.

    The key is "" for the value itself, and dotted inside a mapping, whose entries are checked one by one.
    """
    if isinstance(value, Mapping) and metadata.get("entries", True):
        of_entry = {**metadata, "entries": "scheduled" not in metadata}
        for key, entry in value.items():
            for inner, problem in misfits(entry, of_entry):
                yield f"{key}.{inner}" if inner else str(key), problem
    elif problem := _misfit(value, metadata):
        yield "", problem


def _misfit(value: Any, metadata: Mapping[str, Any]) -> str:
    if unreal := [number for number in _numbers(value) if not math.isfinite(number)]:
        return f"{unreal[0]} cannot work; expected a finite number"
    if "bounds" not in metadata or (value is None and metadata.get("optional", True)):
        return ""
    if "scheduled" in metadata:
        try:
            check_schedule(value, "value")
        except ValueError as error:
            return str(error)
        if isinstance(value, list | tuple):
            start, v0, v1, end = ramp(value)
            if end < start:
                return f"{value}: the schedule ends (step {end}) before it starts (step {start})"
            value = [v0, v1]
    outside = [number for number in _numbers(value) if number not in metadata["bounds"]]
    return f"{outside[0]:.15g} is outside the range; expected {metadata['bounds']}" if outside else ""


def _numbers(value: Any) -> Iterator[float]:
    """Every number in a plain value, including those in lists."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(entry)
