"""Measurements on a scene of the shapes world, and their display on a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fourdfy.files.atomic import write_whole


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The measurements at one scene time."""

    time: float
    iou: float
    psnr: float
    mark: float
    """How much of the true mark is seen where it should be, 0..1: the lesser of white and pupil."""
    ghost: float
    """Pixels that look like a mark where the truth has none, for each pixel of the true mark."""
    track: float | None
    """The coordinate that the prompt's motion moves: height or offset in scene units, scale, or degrees when
    spinning; None when the prompt stands still or the moment is untracked."""
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
    motion_corr: float | None
    """Correlation of the track with the true one over the tracked moments; 0 if frozen, None if nothing
    should move or too few moments are tracked (``metrics.TRACKED_SHARE``)."""
    motion_gain: float | None
    """How far the track moves for each unit of the true one; 1 is right, None where ``motion_corr`` is."""
    motion_right: bool | None
    """Whether enough moments are tracked, ``motion_corr >= scenes.RIGHT_MOTION`` and the gain is within
    ``RIGHT_GAIN``; None if nothing should move."""
    untracked: int | None
    """Moments at which the true object matches nothing that is seen; None if nothing should move."""
    still_drift: float | None
    """Largest mean colour change of the object since t = 0, 0..1; only if nothing should move."""
    mark_seen: int
    """Moments of ``over_time`` at which the mark is seen where it should be; the truth shows it at all."""
    ghosts: int
    """Moments at which a mark is seen where the truth has none."""
    fronts: int
    """Marks seen around the object at t = 0; 1 is right, 2 or more is the Janus problem."""
    colour_error: float
    """Root mean square difference of the median body colours, 0..1."""
    colour_ok: bool
    """Whether the prompt's colour is the nearest of the palette's six, and the body is not grey."""
    saturation_error: float
    """Mean HSV saturation of the object less that of the truth, -1..1; above 0 is oversaturated."""
    front_scores: tuple[float, ...]
    """How much of a mark is seen from each azimuth of ``AROUND_DEG`` at t = 0, 0..1."""
    over_time: tuple[Moment, ...]


@dataclass(frozen=True, kw_only=True)
class CreatureMoment:
    """The measurements at one scene time."""

    time: float
    iou: float
    psnr: float


@dataclass(frozen=True, kw_only=True)
class CreatureReport:
    """A scene against the ground truth of its creature; of groups of parts such as ``left_arm``."""

    prompt: str
    held_out: bool
    """Whether the diffusion models never saw this combination in training."""
    iou: float
    """Mean silhouette intersection over union."""
    psnr: float
    """Mean of the frames' PSNR, dB."""
    colour_error: float
    """Mean of ``colour_errors``."""
    colour_errors: dict[str, float]
    """Group -> root mean square difference of its median colour, 0..1."""
    colours_right: float
    """Share of the groups whose error is below ``creatures.RIGHT_COLOUR``."""
    motion_corr: float | None
    """Mean of ``part_motion``; None if nothing should move."""
    part_motion: dict[str, float]
    """Group that moves -> correlation of its centroid's track with the true one."""
    parts_right: float | None
    """Share of them with at least ``creatures.RIGHT_MOTION``; None if nothing should move."""
    still_drift: float | None
    """Largest mean colour change of the creature since t = 0, 0..1; only if nothing should move."""
    faces: int
    """Faces seen around the creature at t = 0; 1 is right, 2 or more is the Janus problem."""
    face_scores: tuple[float, ...]
    """How much of the face is seen from each azimuth of ``AROUND_DEG`` at t = 0, 0..1."""
    over_time: tuple[CreatureMoment, ...]


Report = ShapesReport | CreatureReport
Row = Mapping[str, Any]
"""A report and ``drop`` and ``seconds``, as the command writes them."""


def write_json(path: Path, values: Any) -> None:
    """Reports as JSON: the old file or the new one, never half of it."""
    write_whole(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def read_report(path: Path) -> Report:
    """The comparison with the ground truth in a file of ``write_json``, whatever else it holds."""
    content = json.loads(path.read_text(encoding="utf-8"))
    kind, moment = (CreatureReport, CreatureMoment) if "faces" in content else (ShapesReport, Moment)
    values = {entry.name: content[entry.name] for entry in fields(kind)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    values["over_time"] = tuple(moment(**at) for at in values["over_time"])
    return kind(**values)


def print_report(report: Report, console: Console | None = None) -> None:
    """One scene's numbers, and what was measured over time, on the terminal or ``console``."""
    tables = _creature_tables(report) if isinstance(report, CreatureReport) else _solid_tables(report)
    (console or Console()).print(*tables)


def brief(report: Report) -> str:
    """One scene's numbers in one line."""
    if isinstance(report, CreatureReport):
        colour, motion = f"colours {_colours(report)}", _parts(report)
        fronts = _counted(report.faces, "face")
    else:
        colour, motion = f"colour {_yes(report.colour_ok)}", _motion(report)
        fronts = _counted(report.fronts, "front")
    likeness = f"IoU {_number(report.iou)}, PSNR {report.psnr:.1f} dB"
    return f"{likeness}, {colour}, motion {motion}, {fronts}"


def summary_tables(rows: Sequence[Row]) -> list[Table]:
    """That of the solids and that of the creatures, if there are any.

    One line for each prompt (a row of the command's JSON; * is held out), then means and counts. What was
    left out has a column if something was. They fit into 80 columns.
    """
    kinds = ([row for row in rows if ("faces" in row) == creatures] for creatures in (False, True))
    cells = ((_solid_cells, _solid_totals), (_creature_cells, _creature_totals))
    return [_summary(some, *own) for some, own in zip(kinds, cells, strict=True) if some]


def _summary(
    rows: Sequence[Row],
    own_cells: Callable[[Row], dict[str, str]],
    own_totals: Callable[[Sequence[Row]], Sequence[str]],
) -> Table:
    """A table of the columns that all have and, before the last, those of ``own_cells`` (heading -> cell)."""
    dropped = any(row["drop"] for row in rows)
    lines = [
        {
            "prompt": row["prompt"] + (" *" if row["held_out"] else ""),
            **({"without": row["drop"] or ""} if dropped else {}),
            "IoU": _number(row["iou"]),
            "PSNR": f"{row['psnr']:.1f}",
            **own_cells(row),
            "s": f"{row['seconds']:.0f}",
        }
        for row in rows
    ]
    table = Table(*lines[0], box=SIMPLE, padding=0)
    for line in lines:
        table.add_row(*line.values())
    table.add_section()
    table.add_row(
        f"{len(rows)} in all, {sum(row['held_out'] for row in rows)} held out",
        *([""] if dropped else []),
        _number(_mean(rows, "iou")),
        f"{_mean(rows, 'psnr'):.1f}",
        *own_totals(rows),
        f"{sum(row['seconds'] for row in rows):.0f}",
    )
    return table


def _solid_cells(row: Row) -> dict[str, str]:
    return {
        "colour": _yes(row["colour_ok"]),
        "motion": _number(row["motion_corr"]),
        "gain": _number(row["motion_gain"]),
        "untracked": "-" if row["untracked"] is None else str(row["untracked"]),
        "mark": f"{row['mark_seen']}/{len(row['over_time'])}",
        "ghosts": str(row["ghosts"]),
        "fronts": str(row["fronts"]),
    }


def _solid_totals(rows: Sequence[Row]) -> Sequence[str]:
    moving = [row for row in rows if row["motion_right"] is not None]
    return (
        f"{sum(row['colour_ok'] for row in rows)}/{len(rows)}",
        f"{sum(row['motion_right'] for row in moving)}/{len(moving)} right",
        "",
        str(sum(row["untracked"] for row in moving)),
        f"{_mean(rows, 'mark_seen'):.1f}",
        f"{_mean(rows, 'ghosts'):.1f}",
        f"{sum(row['fronts'] == 1 for row in rows)}/{len(rows)} one",
    )


def _creature_cells(row: Row) -> dict[str, str]:
    return {
        "colours": _percent(row["colours_right"]),
        "motion": _number(row["motion_corr"]),
        "parts": _percent(row["parts_right"]),
        "faces": str(row["faces"]),
    }


def _creature_totals(rows: Sequence[Row]) -> Sequence[str]:
    moving = [row for row in rows if row["parts_right"] is not None]
    return (
        _percent(_mean(rows, "colours_right")),
        _number(_mean(moving, "motion_corr") if moving else None),
        _percent(_mean(moving, "parts_right") if moving else None),
        f"{sum(row['faces'] == 1 for row in rows)}/{len(rows)} one",
    )


def _mean(rows: Sequence[Row], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _solid_tables(report: ShapesReport) -> tuple[Table, Table]:
    numbers = Table(title=_title(report), show_header=False)
    for name, value in (
        ("silhouette IoU", _number(report.iou)),
        ("PSNR", f"{report.psnr:.1f} dB"),
        ("colour", f"{_yes(report.colour_ok)}, error {_number(report.colour_error)}"),
        ("motion", _motion(report) + _motion_numbers(report)),
        ("mark", f"in its place at {report.mark_seen} of {len(report.over_time)}, ghost at {report.ghosts}"),
        ("fronts", str(report.fronts)),
    ):
        numbers.add_row(name, value)
    over_time = Table("time", "IoU", "PSNR", "mark", "ghost", "track", "truth", "error")
    for moment in report.over_time:
        error = None
        if moment.track is not None and moment.track_truth is not None:
            error = moment.track - moment.track_truth
            if "spinning" in report.prompt.split():
                error = math.remainder(error, 360)  # whole turns, which tracks are not counted from
        over_time.add_row(
            _number(moment.time),
            _number(moment.iou),
            f"{moment.psnr:.1f}",
            _number(moment.mark),
            _number(moment.ghost),
            _number(moment.track),
            _number(moment.track_truth),
            _number(error),
        )
    return numbers, over_time


def _creature_tables(report: CreatureReport) -> tuple[Table, Table, Table]:
    numbers = Table(title=_title(report), show_header=False)
    for name, value in (
        ("silhouette IoU", _number(report.iou)),
        ("PSNR", f"{report.psnr:.1f} dB"),
        ("colours", f"{_colours(report)}, mean error {_number(report.colour_error)}"),
        (
            "motion",
            f"{_parts(report)}"
            + (f", correlation {_number(report.motion_corr)}" if report.part_motion else ""),
        ),
        ("faces", str(report.faces)),
    ):
        numbers.add_row(name, value)
    parts = Table("part", "colour error", "motion")
    for name in dict.fromkeys((*report.colour_errors, *report.part_motion)):
        error, corr = report.colour_errors.get(name), report.part_motion.get(name)
        parts.add_row(name.replace("_", " "), _number(error), _number(corr))
    over_time = Table("time", "IoU", "PSNR")
    for moment in report.over_time:
        over_time.add_row(_number(moment.time), _number(moment.iou), f"{moment.psnr:.1f}")
    return numbers, parts, over_time


def _title(report: Report) -> str:
    return report.prompt + (" (held out)" if report.held_out else "")


def _colours(report: CreatureReport) -> str:
    count = len(report.colour_errors)
    return f"{round(report.colours_right * count)} of {count}"


def _parts(report: CreatureReport) -> str:
    if report.parts_right is None:
        return f"still, drift {_number(report.still_drift)}"
    count = len(report.part_motion)
    return f"{round(report.parts_right * count)} of {count} parts"


def _motion(report: ShapesReport) -> str:
    if report.motion_right is None:
        return f"still, drift {_number(report.still_drift)}"
    return "untracked" if report.motion_corr is None else _yes(report.motion_right)


def _motion_numbers(report: ShapesReport) -> str:
    if report.motion_right is None:
        return ""
    corr, gain = _number(report.motion_corr), _number(report.motion_gain)
    return f", correlation {corr}, gain {gain}, {report.untracked} untracked"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _yes(right: bool) -> str:
    return "right" if right else "wrong"
