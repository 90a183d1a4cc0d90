"""What came of the faults that were planted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Row:
    """One kind of fault."""

    fault: str
    outcomes: Counter[str] = field(default_factory=Counter)
    """What happened, and how often."""
    command: str = ""
    """What plants it again."""
    wrong: list[str] = field(default_factory=list)
    """What should not have happened, with all that helps to repeat it."""

    @property
    def times(self) -> int:
        return self.outcomes.total()

    def add(self, outcome: str, wrong: list[str] | None = None) -> None:
        self.outcomes["wrong" if wrong else outcome] += 1
        self.wrong += wrong or []


def markdown(rows: list[Row]) -> str:
    lines = ["| fault | times | outcome |", "| --- | --- | --- |"]
    for row in rows:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in row.outcomes.most_common())
        lines.append(f"| {row.fault} | {row.times} | {outcomes} |")
    return "\n".join(lines)
