"""The results of a sweep, read from its trials: ``results.csv`` and the contact sheet ``index.html``."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from fourdfy.callbacks.scene_watch import MOTION
from fourdfy.evaluation.registry import PRIOR
from fourdfy.files.atomic import by_product, warn_once, write_whole
from fourdfy.files.images import TEST_FPS
from fourdfy.launching.sweeps.jobs import COLUMNS, Job, Sweep
from fourdfy.pages.page import BAR, escaped, page
from fourdfy.pages.trials import DAMAGED, clip_of_test, curves, scores, views_of_test

OF_PRIORS = re.compile(r"loss/[^/]+/(sds|vsd)\w*")
CLIP_PIXELS, CLIP_FRAMES = 128, 24
"""Most pixels of a clip's longer side, and most frames, in the contact sheet."""
SHOWN = 4
"""Most numbers below a clip; losses are in ``results.csv``."""


def write_results(sweep: Sweep, *, is_essential: bool = False) -> list[dict[str, Any]]:
    """Write both files anew, and return the rows; what can't be written costs a warning.

    Raises:
        WriteError: one can't be written, and ``is_essential``.
    """
    rows = [row_of(sweep, job) for job in sweep.jobs]
    columns = [*dict.fromkeys(name for row in rows for name in row if name != "trial"), "trial"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    with nullcontext() if is_essential else by_product("results.csv"):
        write_whole(sweep.folder / "results.csv", text.getvalue())
    with nullcontext() if is_essential else by_product("index.html"):
        write_whole(sweep.folder / "index.html", contact_sheet(sweep, rows))
    return rows


def row_of(sweep: Sweep, job: Job) -> dict[str, Any]:
    """What a job is, how far, its numbers after the last stage that is complete, and where it is."""
    stages = max(count for count in range(len(job.trials) + 1) if job.has_finished(count))
    own = {
        "prompt": job.prompt or "",
        **job.settings,
        "seed": job.seed,
        "stages": f"{stages} of {len(job.trials)}",
        "seconds": round(sweep.seconds(job), 1),
    }
    taken = {*own, *COLUMNS} - {PRIOR}  # a plugin's report may have any names
    found = {f"metric/{k}" if k in taken else k: value for k, value in numbers(job, stages).items()}
    return {**own, **found, "trial": str(job.trials[max(stages, 1) - 1])}


def score_of(job: Job, metric: str, stage: int) -> float | None:
    """A number of a job after so many stages, by its name; None if it has none."""
    value = numbers(job, stage).get(metric)
    return float(value) if isinstance(value, int | float) else None


def not_kept(sweep: Sweep, seeds: Sequence[Job]) -> set[str]:
    """Tags of those that ``keep`` drops, of jobs that differ by their seed and have come to its stage.

    Those without a number are the worst. What is complete is not dropped: an earlier sweep kept more.
    """
    best, stage = sweep.kept
    order, metric = sweep.keep_by

    def rank(job: Job) -> tuple[bool, float]:
        score = score_of(job, metric, stage)
        return score is None, (score or 0.0) * (1 if order == "lowest" else -1)

    return {job.tag for job in sorted(seeds, key=rank)[best:] if not job.has_finished(len(job.trials))}


def dropped(sweep: Sweep) -> set[str]:
    """Tags of the jobs that ``keep`` drops, when all seeds of a prompt and settings have come so far, or have
    failed."""
    _, stage = sweep.kept
    found = set[str]()
    for _, group in groupby(sweep.jobs, key=lambda job: (job.prompt, job.settings)) if stage else ():
        seeds = [*group]
        come = [job for job in seeds if job.has_finished(stage)]
        if all(job in come or sweep.has_failed(job) for job in seeds):
            found |= not_kept(sweep, come)
    return found


def numbers(job: Job, stage: int) -> dict[str, float | int]:
    """Of the evaluation against the ground truth, where there is one; ``prior``; and the last losses.

    A file that is damaged costs a warning: there are none then.
    """
    try:
        return _numbers(job, stage) if stage else {}
    except DAMAGED as error:
        warn_once(f"{job.name}: its numbers can't be read from {job.trials[stage - 1]} ({error})")
        return {}


def _numbers(job: Job, stage: int) -> dict[str, float | int]:
    trial, end = job.trials[stage - 1], job.ends[stage - 1]
    found = scores(trial, end)
    last = {name: [value for _, value in curve] for name, curve in curves(trial).items()}
    if late := [fmean(late_part(points)) for name, points in last.items() if OF_PRIORS.fullmatch(name)]:
        found[PRIOR] = fmean(late)
    if MOTION in last:
        found["motion"] = last[MOTION][-1]
    return found | {name: points[-1] for name, points in last.items() if name.startswith("loss/")}


def late_part(points: Sequence[float]) -> Sequence[float]:
    """The last quarter of a curve, at least one point."""
    return points[-max(1, len(points) // 4) :]


def contact_sheet(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> str:
    """A page that needs no other file: a row for each prompt and settings, a column for each seed."""
    pairs = list(zip(sweep.jobs, rows, strict=True))
    seeds = list(dict.fromkeys(job.seed for job in sweep.jobs))
    head = "".join(f"<th>seed {seed}</th>" for seed in seeds)
    body = []
    for (prompt, settings), group in groupby(pairs, key=lambda pair: (pair[0].prompt, pair[0].settings)):
        given = "<br>".join(escaped(f"{key} = {value}") for key, value in settings.items())
        cells = "".join(_cell(sweep, job, row) for job, row in group)
        body.append(f"<tr><th>{escaped(prompt or '')}<br><small>{given}</small></th>{cells}</tr>")
    finished = sum(job.has_finished(len(job.trials)) for job in sweep.jobs)
    state = f"{finished} of {len(rows)} {'job is' if len(rows) == 1 else 'jobs are'} done"
    state += f", {len(tags)} dropped" if (tags := dropped(sweep)) else ""
    frames = max((len(views_of_test(Path(row["trial"]))) for row in rows), default=0)
    return page(
        sweep.root.name,
        f"<h1>{escaped(sweep.root.name)}</h1><p>{state}.</p>{BAR if frames else ''}"
        f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(body)}</table></div>',
        scripts=["player.js"] if frames else [],
        data={"seconds": frames / TEST_FPS},
    )


def _cell(sweep: Sweep, job: Job, row: Mapping[str, Any]) -> str:
    folder = escaped(os.path.relpath(row["trial"], sweep.folder))
    described = {*job.settings, *COLUMNS} - {PRIOR}
    values = [
        (name, value)
        for name, value in row.items()
        if name not in described and not name.startswith("loss/") and not isinstance(value, bool)
    ]
    lines = "".join(f"<br>{escaped(name)} {float(value):.3g}" for name, value in values[:SHOWN])
    clip = clip_of_test(Path(row["trial"]), css="small", frames=CLIP_FRAMES, pixels=CLIP_PIXELS)
    state = f'<span class="soft">stage {escaped(row["stages"])}</span>'
    return f'<td><a href="{folder}">{clip}{state}</a><small>{lines}</small></td>'
