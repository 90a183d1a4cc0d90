"""The results of a sweep, read from its trials: ``results.csv`` and the contact sheet ``index.html``."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from fourdfy.files.atomic import by_product, warn_once, write_whole
from fourdfy.files.images import TEST_FPS, save_animated_image
from fourdfy.launching.sweeps.jobs import COLUMNS, Job, Sweep

OF_PRIORS = re.compile(r"loss/[^/]+/(sds|vsd)\w*")
CLIP_PIXELS, CLIP_FRAMES = 128, 24
"""Most pixels of a clip's longer side, and most frames, in the contact sheet."""
SHOWN = 4
"""Most numbers below a clip; losses are in ``results.csv``."""

STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse } th, td { padding: .5em; vertical-align: top; text-align: left }
th { font-weight: 600; max-width: 16em } tr { border-top: 1px solid #ddd }
img { display: block; width: 128px; image-rendering: auto; background: #eee } .state { color: #777 }
"""


def write_results(sweep: Sweep) -> list[dict[str, Any]]:
    """Write both files anew, and return the rows; what can't be written costs a warning."""
    rows = [row_of(sweep, job) for job in sweep.jobs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    with by_product("results.csv"):
        write_whole(sweep.folder / "results.csv", text.getvalue())
    with by_product("index.html"):
        write_whole(sweep.folder / "index.html", contact_sheet(sweep, rows))
    return rows


def row_of(sweep: Sweep, job: Job) -> dict[str, Any]:
    """What a job is, how far, its numbers after the last stage that is complete, and where it is."""
    stages = max(count for count in range(len(job.trials) + 1) if job.has_finished(count))
    return {
        "prompt": job.prompt or "",
        **job.settings,
        "seed": job.seed,
        "stages": f"{stages} of {len(job.trials)}",
        "seconds": round(sweep.seconds(job), 1),
        **numbers(job, stages),
        "trial": str(job.trials[max(stages, 1) - 1]),
    }


def score_of(job: Job, column: str, stage: int) -> float | None:
    """A number of a job after so many stages, by its column in ``results.csv``; None if it has none."""
    value = numbers(job, stage).get(column)
    return float(value) if isinstance(value, int | float) else None


def best_first(jobs: Iterable[Job], by: str, stage: int) -> list[Job]:
    """Jobs in the order of ``keep_by`` after so many stages; those without a number come last."""
    order, column = by.split(" ", 1)

    def rank(job: Job) -> tuple[bool, float]:
        score = score_of(job, column, stage) if job.has_finished(stage) else None
        return score is None, (score or 0.0) * (1 if order == "lowest" else -1)

    return sorted(jobs, key=rank)


def dropped(sweep: Sweep) -> set[str]:
    """Tags of the jobs that ``keep`` drops, when all seeds of a prompt and settings have come so far."""
    best, stage = sweep.kept
    tags: set[str] = set()
    for _, group in groupby(sweep.jobs, key=lambda job: (job.prompt, job.settings)) if stage else ():
        seeds = list(group)
        if all(job.has_finished(stage) for job in seeds):
            others = best_first(seeds, sweep.cfg.keep_by, stage)[best:]
            tags |= {job.tag for job in others if not job.has_finished(len(job.trials))}
    return tags


def numbers(job: Job, stage: int) -> dict[str, float]:
    """Of the evaluation against the ground truth, where there is one; ``prior``; and the last losses.

    A file that is damaged costs a warning: there are none then.
    """
    try:
        return _numbers(job, stage) if stage else {}
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        warn_once(f"{job.name}: its numbers can't be read from {job.trials[stage - 1]} ({error})")
        return {}


def _numbers(job: Job, stage: int) -> dict[str, float]:
    trial, end = job.trials[stage - 1], job.ends[stage - 1]
    found: dict[str, float] = {}
    report = trial / "save" / f"it{end}-evaluation.json"
    if report.is_file():
        content = json.loads(report.read_text(encoding="utf-8"))
        found |= {name: value for name, value in content.items() if isinstance(value, int | float)}
    curves = _curves(trial / "csv_logs" / "version_0" / "metrics.csv")
    if late := [fmean(late_part(points)) for name, points in curves.items() if OF_PRIORS.fullmatch(name)]:
        found["prior"] = fmean(late)
    return found | {name: points[-1] for name, points in curves.items() if name.startswith("loss/")}


def late_part(points: Sequence[float]) -> Sequence[float]:
    """The last quarter of a curve, at least one point."""
    return points[-max(1, len(points) // 4) :]


def _curves(file: Path) -> dict[str, list[float]]:
    """Column -> its values."""
    curves: dict[str, list[float]] = {}
    if file.is_file():
        with open(file, newline="", encoding="utf-8", errors="replace") as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if name and name != "step" and value:
                        curves.setdefault(name, []).append(float(value))
    return curves


def contact_sheet(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> str:
    """A page that needs no other file: a row for each prompt and settings, a column for each seed."""
    pairs = list(zip(sweep.jobs, rows, strict=True))
    seeds = list(dict.fromkeys(job.seed for job in sweep.jobs))
    head = "".join(f"<th>seed {seed}</th>" for seed in seeds)
    body = []
    for (prompt, settings), group in groupby(pairs, key=lambda pair: (pair[0].prompt, pair[0].settings)):
        given = "".join(f"<br>{html.escape(f'{key} = {value}')}" for key, value in settings.items())
        cells = "".join(_cell(sweep, job, row) for job, row in group)
        body.append(f"<tr><th>{html.escape(prompt or '')}<small>{given}</small></th>{cells}</tr>")
    finished = sum(job.has_finished(len(job.trials)) for job in sweep.jobs)
    state = f"{finished} of {len(rows)} {'job is' if len(rows) == 1 else 'jobs are'} done"
    state += f", {len(tags)} dropped" if (tags := dropped(sweep)) else ""
    title = html.escape(sweep.root.name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><p>{state}.</p>"
        f"<table><tr><th></th>{head}</tr>{''.join(body)}</table></html>\n"
    )


def _cell(sweep: Sweep, job: Job, row: Mapping[str, Any]) -> str:
    folder = html.escape(os.path.relpath(row["trial"], sweep.folder), quote=True)
    described = {*job.settings, *COLUMNS} - {"prior"}
    values = [
        (name, value)
        for name, value in row.items()
        if name not in described and not name.startswith("loss/") and not isinstance(value, bool)
    ]
    lines = "".join(f"<br>{html.escape(name)} {float(value):.3g}" for name, value in values[:SHOWN])
    clip = _clip(Path(row["trial"]))
    picture = f'<img src="{clip}" alt="{html.escape(job.name, quote=True)}">' if clip else ""
    state = f'<span class="state">stage {html.escape(row["stages"])}</span>'
    return f'<td><a href="{folder}">{picture}{state}</a><small>{lines}</small></td>'


def _clip(trial: Path) -> str:
    """The test views of the last step that has some, small, as a looping WebP in a data URI; "" for none."""
    matches = [(re.fullmatch(r"it(\d+)-test", path.name), path) for path in (trial / "save").glob("it*-test")]
    found = [(int(match[1]), path) for match, path in matches if match]
    files = sorted(max(found)[1].glob("*.png"), key=lambda file: int(file.stem)) if found else []
    if not files:
        return ""
    chosen = [files[round(i)] for i in np.linspace(0, len(files) - 1, min(len(files), CLIP_FRAMES))]
    try:
        versions = tuple((file, file.stat().st_mtime_ns) for file in chosen)
        return _encoded(versions, TEST_FPS * len(chosen) / len(files))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's for a broken PNG
        warn_once(f"{trial}: its test views can't be shown ({error})")
        return ""


@lru_cache(maxsize=4096)  # a sheet is written each minute, by the process that starts the jobs
def _encoded(versions: tuple[tuple[Path, int], ...], fps: float) -> str:
    """Files, each with the time of its last change, as a WebP in a data URI."""
    from PIL import Image

    frames = []
    for file, _ in versions:
        with Image.open(file) as image:
            image.thumbnail((CLIP_PIXELS, CLIP_PIXELS))
            frames.append(np.asarray(image.convert("RGB")))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.webp")
        save_animated_image(path, np.stack(frames), fps=fps)
        return f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}"
