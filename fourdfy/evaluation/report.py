"""Measurements on a scene of the shapes world, and their display on a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fourdfy.files.atomic import write_whole


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The measurements at one scene time."""

    time: float
    iou: float
    psnr: float
    track: float | None
    """The coordinate that the prompt's motion moves: scene units, or degrees when spinning; None
    when the prompt stands still or nothing was seen."""
    track_truth: float | None


@dataclass(frozen=True, kw_only=True)
class ShapesReport:
    """A scene against the ground truth of its prompt."""

    prompt: str
    held_out: bool
    """Whether the diffusion models never saw this combination in training."""
    iou: float
    """Mean silhouette intersection over union."""
    psnr: float
    """Mean of the frames' PSNR, dB."""
    colour_error: float
    """Root mean square difference of the median body colours, 0..1."""
    colour_ok: bool
    """Whether the prompt's colour is the nearest of the palette's six, and the body is not grey."""
    saturation_error: float
    """Mean HSV saturation of the object less that of the truth, -1..1; above 0 is oversaturated."""
    motion_corr: float | None
    """Correlation of the track with the true one; 0 if frozen or lost, None if nothing should move."""
    motion_gain: float | None
    """How far the track moves for each unit of the true one; 1 is right, None if nothing should move."""
    motion_right: bool | None
    """``motion_corr >= RIGHT_MOTION``; None if nothing should move."""
    still_drift: float | None
    """Largest mean colour change of the object since t = 0, 0..1; only if nothing should move."""
    fronts: int
    """Marks seen around the object at t = 0; 1 is right, 2 or more is the Janus problem."""
    front_scores: tuple[float, ...]
    """How much of a mark is seen from each azimuth of ``AROUND_DEG`` at t = 0, 0..1."""
    over_time: tuple[Moment, ...]


def write_json(path: Path, values: Any) -> None:
    """Reports as JSON: the old file or the new one, never half of it."""
    write_whole(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def print_report(report: ShapesReport, console: Console | None = None) -> None:
    """One scene's numbers, and what was measured over time, on the terminal or ``console``."""
    (console or Console()).print(*_report_tables(report))


def brief(report: ShapesReport) -> str:
    """One scene's numbers in one line."""
    motion = report.motion_right
    return ", ".join(
        [
            f"IoU {_number(report.iou)}",
            f"PSNR {report.psnr:.1f} dB",
            f"colour {_yes(report.colour_ok)}",
            f"motion {_yes(motion) if motion is not None else _motion(report)}",
            f"{report.fronts} front{'' if report.fronts == 1 else 's'}",
        ]
    )


def summary_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line for each prompt (a row of the command's JSON), then means and counts."""
    table = Table("prompt", "held out", "without", "IoU", "PSNR", "colour", "motion", "fronts", "seconds")
    for row in rows:
        table.add_row(
            row["prompt"],
            "yes" if row["held_out"] else "",
            row["drop"] or "",
            _number(row["iou"]),
            f"{row['psnr']:.1f}",
            _yes(row["colour_ok"]),
            _number(row["motion_corr"]),
            str(row["fronts"]),
            f"{row['seconds']:.0f}",
        )
    if rows:
        count = len(rows)
        moving = [row for row in rows if row["motion_right"] is not None]
        table.add_section()
        table.add_row(
            f"{count} in all",
            str(sum(row["held_out"] for row in rows)),
            "",
            _number(sum(row["iou"] for row in rows) / count),
            f"{sum(row['psnr'] for row in rows) / count:.1f}",
            f"{sum(row['colour_ok'] for row in rows)}/{count}",
            f"{sum(row['motion_right'] for row in moving)}/{len(moving)} right",
            f"{sum(row['fronts'] == 1 for row in rows)}/{count} one",
            f"{sum(row['seconds'] for row in rows):.0f}",
        )
    return table


def _report_tables(report: ShapesReport) -> tuple[Table, Table]:
    numbers = Table(title=report.prompt + (" (held out)" if report.held_out else ""), show_header=False)
    for name, value in (
        ("silhouette IoU", _number(report.iou)),
        ("PSNR", f"{report.psnr:.1f} dB"),
        ("colour", f"{_yes(report.colour_ok)}, error {_number(report.colour_error)}"),
        ("motion", _motion(report)),
        ("fronts", str(report.fronts)),
    ):
        numbers.add_row(name, value)
    over_time = Table("time", "IoU", "PSNR", "track", "truth", "error")
    for moment in report.over_time:
        error = None
        if moment.track is not None and moment.track_truth is not None:
            error = moment.track - moment.track_truth
        over_time.add_row(
            _number(moment.time),
            _number(moment.iou),
            f"{moment.psnr:.1f}",
            _number(moment.track),
            _number(moment.track_truth),
            _number(error),
        )
    return numbers, over_time


def _motion(report: ShapesReport) -> str:
    if report.motion_corr is None:
        return f"still, drift {_number(report.still_drift)}"
    return (
        f"{_yes(bool(report.motion_right))}, correlation {_number(report.motion_corr)}, "
        f"gain {_number(report.motion_gain)}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _yes(right: bool) -> str:
    return "right" if right else "wrong"
