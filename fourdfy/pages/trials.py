"""What pages show of a trial, read from its folder; what is missing is left out."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourdfy.files.atomic import warn_once, write_whole
from fourdfy.pages.clips import MAX_FRAMES, MAX_PIXELS, clip_of, picture, spread

PICTURES = 12
"""Most pictures of a strip."""
DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    RecursionError,
    SyntaxError,
    csv.Error,
)
"""What is raised for broken files; the seventh by Pillow."""


def readable(read: Callable[[Path], dict[str, Any]], trial: Path) -> dict[str, Any]:
    """``read(trial)``, or nothing and a warning if a file of it is damaged."""
    try:
        return read(trial)
    except DAMAGED as error:
        warn_once(f"{trial}: its {read.__name__} can't be read ({error})")
        return {}


def curves(trial: Path) -> dict[str, list[tuple[int, float]]]:
    """Column of ``metrics.csv`` -> its curve.

    Raises:
        DAMAGED: the file is damaged beyond a row that is cut short.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    file = trial / "csv_logs" / "version_0" / "metrics.csv"
    if file.is_file():
        with open(file, newline="", encoding="utf-8", errors="replace") as lines:
            for row in csv.DictReader(lines):
                if not (row["step"] or "").isdecimal():
                    continue
                for name, value in row.items():
                    if name and name != "step" and value:
                        found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def views_of_test(trial: Path) -> list[Path]:
    """The test views of the last step that has some, in order."""
    found = _by_step(trial, r"it(\d+)-test")
    files = found[max(found)].glob("*.png") if found else ()
    return sorted((file for file in files if file.stem.isdecimal()), key=lambda file: int(file.stem))


def video_of_test(trial: Path) -> Path | None:
    """The video of the test views of the last step that has one."""
    found = _by_step(trial, r"it(\d+)-test\.mp4")
    return found[max(found)] if found else None


def clip_of_test(
    trial: Path, *, css: str = "clip", frames: int = MAX_FRAMES, pixels: int = MAX_PIXELS
) -> str:
    """At most so many of the test views, as a clip; "" for none."""
    files = views_of_test(trial)
    try:
        chosen = tuple((files[i], files[i].stat().st_mtime_ns) for i in spread(len(files), frames))
        return clip_of(chosen, f"test views of {trial.name}", css, pixels) if files else ""
    except DAMAGED as error:
        warn_once(f"{trial}: its test views can't be shown ({error})")
        return ""


def validation_strip(trial: Path, width: int | None) -> str:
    """The first validation view over the steps, ``width`` pixels of its image; "" for none."""
    found = sorted(_by_step(trial, r"it(\d+)-0\.png").items())
    figures = []
    for step, file in (found[len(found) - 1 - index] for index in reversed(spread(len(found), PICTURES))):
        try:
            shown = picture(file, f"step {step}", width=width)
            figures.append(f"<figure>{shown}<figcaption>{step}</figcaption></figure>")
        except DAMAGED as error:
            warn_once(f"{file}: can't be shown ({error})")
    return f'<div class="strip">{"".join(figures)}</div>' if figures else ""


def commands(trial: Path) -> list[str]:
    """The command lines that trained it, as they can be typed."""
    try:
        lines = (trial / "cmd.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    return [f"python {line}" if line.startswith("launch.py ") else line for line in lines]


@dataclass(frozen=True, kw_only=True)
class Session:
    """What one process did for a trial."""

    first: int
    last: int
    """Global steps at its start and end."""
    seconds: float
    """Of training, with its validations."""
    test_seconds: float = 0.0
    memory_gib: float
    """The most that the process had taken by then; 0 if that is not known."""
    device: str
    versions: Mapping[str, str]


SESSIONS = "sessions.json"


def sessions(trial: Path) -> list[Session]:
    """Those that ended by themselves, in order."""
    try:
        return [Session(**entry) for entry in json.loads((trial / SESSIONS).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):  # there is none, or a power cut has torn it
        return []


def add_session(trial: Path, earlier: Sequence[Session], session: Session) -> None:
    """Write the list anew.

    Raises:
        WriteError: it can't be written.
    """
    write_whole(trial / SESSIONS, json.dumps([asdict(each) for each in (*earlier, session)], indent=1))


def scores(trial: Path, step: int | None = None) -> dict[str, float | int]:
    """Numbers of the evaluation at a step, or the last that has one; empty without.

    Raises:
        DAMAGED: its file is damaged.
    """
    found = _by_step(trial, r"it(\d+)-evaluation\.json")
    file = found.get(max(found, default=0) if step is None else step)
    content = json.loads(file.read_text(encoding="utf-8")) if file else {}
    return {name: value for name, value in content.items() if isinstance(value, int | float)}


def _by_step(trial: Path, pattern: str) -> dict[int, Path]:
    """The files of ``save`` whose whole names match, by the step in them."""
    matches = ((re.fullmatch(pattern, path.name), path) for path in (trial / "save").glob("it*"))
    return {int(match[1]): path for match, path in matches if match}
