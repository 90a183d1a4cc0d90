"""Which evaluations of a trial are complete: ``evaluations.json`` lists their files and sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourdfy.files.atomic import write_whole

RECORD = "evaluations.json"
VALIDATION, TEST = "it{}-[0-9]*", "it{}-test*"
"""The names of what they write into ``save`` at a step."""


def record_evaluation(trial: Path, names: str) -> None:
    """Note that an evaluation is complete, with the files of these names as they are now."""
    found = [file for path in (trial / "save").glob(names) for file in (path, *path.rglob("*"))]
    sizes = {file.relative_to(trial).as_posix(): file.stat().st_size for file in found if file.is_file()}
    write_whole(trial / RECORD, json.dumps({**_recorded(trial), names: sizes}, indent=1))


def is_evaluated(trial: Path, names: str) -> bool:
    """Whether an evaluation is complete, and its files still have the sizes that they were written with."""
    sizes = _recorded(trial).get(names)
    if not isinstance(sizes, Mapping):
        return False
    return all((trial / f).is_file() and (trial / f).stat().st_size == size for f, size in sizes.items())


def _recorded(trial: Path) -> dict[str, Any]:
    try:
        recorded = json.loads((trial / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or a power cut has torn it
        return {}
    return recorded if isinstance(recorded, dict) else {}
