"""``report.html``: what a stage was made from, how it went, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourdfy.files.images import TEST_FPS
from fourdfy.pages.charts import Curve, brief, charts
from fourdfy.pages.page import BAR, escaped, page, preformatted, section, table
from fourdfy.pages.settings import settings_text
from fourdfy.pages.trials import (
    Session,
    clip_of_test,
    commands,
    curves,
    readable,
    scores,
    sessions,
    validation_strip,
    views_of_test,
)

AGAIN = "Run in the folder of the first run; configs/ has all settings, and code.zip the code that was used."


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a report says that the folder of its trial does not hold."""

    folder: Path
    prompt: str
    label: str
    """The name of the stage."""
    steps: tuple[int, int]
    """Trained so far, and planned."""
    plan: Sequence[str]
    """Lines."""
    settings: Mapping[str, Any]
    view_width: int | None
    """Pixels of a validation view, which stands first in its image; None for the whole image."""
    better: Mapping[str, str] = field(default_factory=dict)
    """Score -> the direction in which it gets better."""


def report_page(stage: Stage) -> str:
    """The page, with as much of the results as there is by now."""
    folder, (done, planned) = stage.folder, stage.steps
    state = f"{planned} steps" if done >= planned else f"stopped at step {done} of {planned}"
    clip = clip_of_test(folder)
    figure = f"<figure>{clip}<figcaption>Test views</figcaption></figure>" if clip else ""
    facts = section("Time and memory", _session_table(sessions(folder)))
    facts += score_section([folder], ["value"], stage.better)
    return page(
        stage.prompt,
        f'<h1>{escaped(stage.prompt)}</h1><p class="soft">{escaped(f"{stage.label}, {state}")}</p>'
        + (f'{BAR if clip else ""}<div class="beside">{figure}<div>{facts}</div></div>')
        + section("Validation", validation_strip(folder, stage.view_width))
        + section("Plan", preformatted("\n".join(stage.plan)))
        + curve_sections({folder.name: readable(curves, folder)})
        + section("To repeat it", preformatted("\n".join(commands(folder)), AGAIN))
        + section("Settings", settings_text(stage.settings)),
        scripts=["player.js"] if clip else [],
        data={"seconds": len(views_of_test(folder)) / TEST_FPS},
    )


def score_section(folders: Sequence[Path], labels: Sequence[str], better: Mapping[str, str]) -> str:
    """A column for each trial, behind the direction in which each score gets better, where that is known."""
    found = [readable(scores, folder) for folder in folders]
    names = dict.fromkeys(name for values in found for name in values)
    names.pop("held_out", None)  # a fact of the prompt
    rows = ((name, [better.get(name, ""), *(brief(of.get(name, "")) for of in found)]) for name in names)
    return section("Scores", table(rows, ["better", *labels]))


def _session_table(done: Sequence[Session]) -> str:
    """A column for each session."""
    rows = {
        "training": [clock(s.seconds) for s in done],
        "steps per second": [brief((s.last - s.first) / max(s.seconds, 1e-6)) for s in done],
        "test views": [clock(s.test_seconds) if s.test_seconds else "" for s in done],
        "peak memory": [f"{s.memory_gib:.2f} GiB" if s.memory_gib else "" for s in done],
        "device": [s.device for s in done],
        "versions": [", ".join(f"{name} {number}" for name, number in s.versions.items()) for s in done],
    }
    told = ((name, cells) for name, cells in rows.items() if any(cells))
    return table(told, [f"steps {s.first} to {s.last}" for s in done]) if done else ""


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def curve_sections(trials: Mapping[str, Mapping[str, Curve]]) -> str:
    """A section for each kind of step, with a chart for each of its curves, in which each trial has a line.

    Weights and learning rates that never change are left out, since the settings tell them.
    """
    names = {name for curves in trials.values() for name in curves}
    groups: dict[str, dict[str, dict[str, Curve]]] = {}
    for name in sorted(names, key=lambda name: (not name.endswith("/total"), name)):
        of = {label: curves.get(name, []) for label, curves in trials.items()}
        kind, title = _place(name)
        values = {value for curve in of.values() for _, value in curve}
        if len(values) > 1 or name.startswith("loss/"):
            groups.setdefault(kind, {})[title] = of
    losses = [kind for kind in groups if f"loss/{kind}/total" in names]
    order = [*losses, *(kind for kind in groups if kind not in losses)]
    return "".join(
        section(f"{kind} steps" if kind in losses else kind, charts(groups[kind])) for kind in order
    )


def _place(name: str) -> tuple[str, str]:
    """The section of a logged scalar, and its title there; see ``Run.means``."""
    first, _, rest = name.partition("/")
    if first == "lr":
        return "Learning rates", rest
    kind, _, title = rest.partition("/")
    if first in ("loss", "weight") and title:
        return kind, title if first == "loss" else f"weight of {title}"
    return first, rest or first
