"""``launch.py --study``, ``--collect`` and ``--study-results``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fourdfy.signals import StopSignals
from fourdfy.study.collector import collector
from fourdfy.study.folder import write_study
from fourdfy.study.results import strength_cells, write_results
from fourdfy.terminal import printable

logger = logging.getLogger(__name__)


def make_study(file: Path, overrides: Sequence[str]) -> None:
    page = write_study(file, overrides)
    logger.info("written: %s; send its folder, or launch.py --collect %s", page, page.parents[1])


def collect(folder: Path, stop: StopSignals) -> None:
    """Serve until a signal comes."""
    stop.advice = lambda: f"launch.py --study-results {folder}"
    with collector(folder) as server:
        server.serve_forever()


def show_results(folder: Path) -> None:
    """Write them, and print what the page's tables say first."""
    found = write_results(folder)
    table = Table("question", "", "preferred", "95 % interval", "p (Holm)")
    for row in found.rows:
        share, interval, *_, p_holm = map(str, row.cells)
        names = (printable(row.question), printable(f"{row.first} over {row.second}"))
        table.add_row(*map(Text, (*names, share, interval, p_holm)))
    Console().print(table)
    if found.strengths:
        table = Table("question", "method", "strength", "95 % interval")
        for question, method, strength in found.strength_rows:
            cells = (question, method, *strength_cells(strength))
            table.add_row(*(Text(printable(cell)) for cell in cells))
        Console().print(table)
    Console().print(found.summary, highlight=False)
    if found.warning:
        logger.warning(found.warning)
    logger.info("written: %s", ", ".join(str(folder / name) for name in ("results.html", *found.tables)))
