"""``compare.html``: trials side by side, their clips in step and their curves in the same axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fourdfy.files.images import TEST_FPS
from fourdfy.pages.charts import brief, legend
from fourdfy.pages.page import BAR, escaped, page, section, table
from fourdfy.pages.report import clock, curve_sections, score_section
from fourdfy.pages.settings import flat, without_folders
from fourdfy.pages.trials import clip_of_test, curves, readable, sessions, views_of_test

NO_CLIP = '<p class="soft">no test views; --test renders them</p>'


def compare_page(
    trials: Mapping[Path, Mapping[str, Any]], prompts: Sequence[str], better: Mapping[str, str]
) -> str:
    """The page.

    Args:
        trials: folder -> the settings of its experiment.
        prompts: of the trials.
        better: score -> the direction in which it gets better.
    """
    labels = shortest_names([*trials])
    same = len({*prompts}) == 1
    title = prompts[0] if same else "Different prompts"
    clips = [clip_of_test(folder) for folder in trials]
    captions = [
        label if same else f"{label}: {prompt}" for label, prompt in zip(labels, prompts, strict=True)
    ]
    figures = "".join(
        f"<figure>{clip or NO_CLIP}<figcaption>{escaped(caption)}</figcaption></figure>"
        for clip, caption in zip(clips, captions, strict=True)
    )
    seconds = max(len(views_of_test(folder)) for folder in trials) / TEST_FPS
    return page(
        title,
        f'<h1>{escaped(title)}</h1><p class="soft">{len(trials)} trials</p>'
        f'{BAR if any(clips) else ""}<div class="beside">{figures}</div>'
        + score_section([*trials], labels, better)
        + section("Time and memory", _rows([_cost(folder) for folder in trials], labels))
        + section("Curves", legend(labels))
        + curve_sections({label: readable(curves, f) for label, f in zip(labels, trials, strict=True)})
        + section("Settings that differ", _rows(_differing([*trials.values()]), labels)),
        scripts=["player.js"] if any(clips) else [],
        data={"seconds": seconds},
    )


def shortest_names(folders: Sequence[Path]) -> list[str]:
    """What tells the paths apart: as many of their last parts as it takes, without those that all share."""
    parts = [folder.parts for folder in folders]
    lengths = range(1, max(map(len, parts)) + 1)
    count = next(n for n in lengths if len({of[-n:] for of in parts}) == len(parts))
    shared = next(n for n in range(count) if len({of[-n - 1] for of in parts if len(of) > n}) > 1)
    return ["/".join(of[-count : len(of) - shared]) for of in parts]


def _rows(of_trials: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """A column for each trial, a row for each name."""
    names = dict.fromkeys(name for values in of_trials for name in values)
    return table(((name, (brief(values.get(name, "")) for values in of_trials)) for name in names), labels)


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those that are not the same in all trials, without folders: of paths, what tells them apart."""
    exact, shown = ([flat(values) for values in of] for of in (settings, map(without_folders, settings)))
    for name in dict.fromkeys(name for values in exact for name in values):
        cells = [values.get(name, "") for values in exact]
        paths = [*dict.fromkeys(cell for cell in cells if isinstance(cell, str))]
        if all(cell == cells[0] for cell in cells):
            for values in shown:
                values.pop(name, None)
        elif len({str(values.get(name, "")) for values in shown}) == 1 < len(paths):
            names = dict(zip(paths, shortest_names([*map(Path, paths)]), strict=True))
            for values, cell in zip(shown, cells, strict=True):
                values[name] = names.get(cell, cell)
    return shown


def _cost(folder: Path) -> dict[str, str]:
    """Of all sessions together."""
    done = sessions(folder)
    if not done:
        return {}
    return {
        "training": clock(sum(session.seconds for session in done)),
        "peak memory": f"{max(session.memory_gib for session in done):.2f} GiB",
        "device": ", ".join(dict.fromkeys(session.device for session in done)),
    }
