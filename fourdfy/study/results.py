"""``--study-results``: what raters preferred, as a table and a plot."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from fourdfy.config_files import ConfigError
from fourdfy.files.atomic import write_whole
from fourdfy.pages.charts import intervals
from fourdfy.pages.page import escaped, page, section, table
from fourdfy.study.analysis import (
    FEW,
    Estimate,
    Preference,
    Votes,
    agreement,
    bradley_terry,
    holm,
    preference,
    vote_weights,
)
from fourdfy.study.folder import ANSWERS, Key, read_key

HEAD = ("preferred", "95 % interval", "wins", "ties", "losses", "p", "p (Holm)")
COLUMNS = (
    *("question", "first", "second", "preferred", "low", "high"),
    *("wins", "ties", "losses", "p", "p_holm", "agreement"),
)
METHOD = """Preferred: the share of answers for the first method; a tie counts half. Its interval is that
of a bootstrap over raters and prompts. p: exact binomial test of wins against losses, two-sided, which takes
answers as independent; where raters or prompts differ much, trust the interval, unless it has no width, as
where all answers agree. p (Holm): corrected for the number of rows. Agreement: Krippendorff's alpha, 1 if
raters always agree, 0 as by chance, - if it is not defined. Strength: Bradley-Terry, in log odds."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A question about two methods."""

    question: str
    first: str
    second: str
    found: Preference
    p_holm: float

    @property
    def name(self) -> str:
        return f"{self.question}: {self.first} over {self.second}"

    @property
    def cells(self) -> tuple[object, ...]:
        """In the order of ``HEAD``."""
        share, found = self.found.share, self.found
        return (
            f"{share.value:.1%}",
            f"{share.low:.1%} to {share.high:.1%}",
            *(found.wins, found.ties, found.losses, f"{found.p:.2g}", f"{self.p_holm:.2g}"),
        )


@dataclass(frozen=True)
class Results:
    rows: Sequence[Row]
    strengths: Mapping[str, Mapping[str, Estimate]]
    """Question -> method -> its Bradley-Terry strength; empty for two methods."""
    agreement: Mapping[str, float | None]
    """Of each question; None where it is not defined."""
    raters: int
    left_out: int
    """Raters who failed a check."""

    @property
    def summary(self) -> str:
        raters = f"{self.raters} rater{'' if self.raters == 1 else 's'}"
        return f"{raters}; {self.left_out} more failed a check (not counted)"

    @property
    def warning(self) -> str:
        """Of intervals that rest on too little; "" for none."""
        few = sum(row.found.clusters < FEW for row in self.rows)
        where = f"here, those of {few} of {len(self.rows)} rows"
        return f"Intervals of fewer than {FEW} raters or prompts can't be trusted: {where}." if few else ""

    @property
    def strength_rows(self) -> list[tuple[str, str, Estimate]]:
        """(question, method, strength)."""
        return [(question, *of) for question, methods in self.strengths.items() for of in methods.items()]

    @property
    def tables(self) -> dict[str, list[tuple[object, ...]]]:
        """File -> its lines, the head first."""
        lines: list[tuple[object, ...]] = [COLUMNS]
        for row in self.rows:
            of, share = row.found, row.found.share
            numbers = (share.value, share.low, share.high, of.wins, of.ties, of.losses, of.p, row.p_holm)
            lines.append((row.question, row.first, row.second, *numbers, self.agreement[row.question]))
        strengths = [(*names, of.value, of.low, of.high) for *names, of in self.strength_rows]
        more = {"strengths.csv": [("question", "method", "strength", "low", "high"), *strengths]}
        return {"results.csv": lines, **(more if strengths else {})}


def write_results(folder: Path) -> Results:
    """Write ``results.html`` and ``Results.tables`` into a study's folder.

    Raises:
        ConfigError: it is no study, or has no answers.
        WriteError: it can't be written.
    """
    key = read_key(folder)
    found = results(key, read_answers(folder, key), folder)
    write_whole(folder / "results.html", _page(found))
    for name, lines in found.tables.items():
        text = io.StringIO(newline="")
        csv.writer(text).writerows(lines)
        write_whole(folder / name, text.getvalue())
    return found


def read_answers(folder: Path, key: Key) -> list[dict[str, Any]]:
    """One entry for each rater; the others are warned of."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((folder / ANSWERS).glob("[!.]*")):  # one that begins with a dot is being written
        try:
            if file.suffix.lower() != ".json":
                raise ValueError("it is no .json file")
            answers = json.loads(file.read_text(encoding="utf-8"))
            key.check(answers)
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s is left out: %s", file, error)
            continue
        rater = answers["rater"]
        if rater in found and answers != found[rater]:
            logger.warning("%s is left out: rater %s has answered in another file", file, rater)
        found.setdefault(rater, answers)
    return [*found.values()]


def results(key: Key, answers: Sequence[Mapping[str, Any]], folder: Path) -> Results:
    """Raises:
    ConfigError: there are no answers of raters who passed the checks.
    """
    passed = [of for of in answers if all(check["answer"] == check.get("expected") for check in of["checks"])]
    if not passed:
        failed = f"; {len(answers) - len(passed)} failed a check" if len(passed) < len(answers) else ""
        raise ConfigError(f"{folder / ANSWERS}: no answers yet{failed}; put the raters' JSON files there")
    found, strengths, alphas = [], {}, {}
    for question in key.questions:
        votes = _votes(key, passed, question)
        weights = vote_weights(votes)
        for first, second in combinations(range(len(key.methods)), 2):
            if of_pair := preference(votes, first, second, weights):
                found.append((question, key.methods[first], key.methods[second], of_pair))
        if len(key.methods) > 2:
            estimates = bradley_terry(votes, len(key.methods), weights)
            strengths[question] = dict(zip(key.methods, estimates, strict=True))
        alphas[question] = agreement(votes)
    corrected = holm([of_pair.p for *_, of_pair in found])
    rows = [Row(*of, p) for of, p in zip(found, corrected, strict=True)]
    return Results(rows, strengths, alphas, len(passed), len(answers) - len(passed))


def _votes(key: Key, answers: Sequence[Mapping[str, Any]], question: str) -> Votes:
    prompts = sorted({clip.prompt for clip in key.clips.values()})
    votes = []
    for rater, of in enumerate(answers):
        for entry in of["answers"]:
            if entry["question"] == question:
                left, right = key.clips[entry["left"]], key.clips[entry["right"]]
                sides = [key.methods.index(left.method), key.methods.index(right.method)]
                score = {"left": 1.0, "tie": 0.5, "right": 0.0}[entry["answer"]]
                score = score if sides[0] < sides[1] else 1 - score
                votes.append((rater, prompts.index(left.prompt), *sorted(sides), score))
    *numbers, scores = np.array(votes).reshape(-1, 5).T
    raters, texts, first, second = (column.astype(int) for column in numbers)
    return Votes(raters, texts, first, second, scores)


def _page(found: Results) -> str:
    shares = [(row.name, *_percent(row.found.share)) for row in found.rows]
    strengths = [(f"{question}: {method}", of) for question, method, of in found.strength_rows]
    drawn = intervals([(name, of.value, of.low, of.high) for name, of in strengths], 0.0)
    listed = table(((name, strength_cells(of)) for name, of in strengths), ("strength", "95 % interval"))
    agreed = table(
        (question, ["-" if alpha is None else f"{alpha:.2f}"]) for question, alpha in found.agreement.items()
    )
    return page(
        "Results of the study",
        f'<h1>Results of the study</h1><p class="soft">{escaped(found.summary)}</p>'
        + (f"<p><strong>{escaped(found.warning)}</strong></p>" if found.warning else "")
        + section("Preferred, %", intervals(shares, 50.0))
        + section("Table", table(((row.name, row.cells) for row in found.rows), HEAD))
        + section("Strength", drawn + listed if strengths else "")
        + section("Agreement", agreed)
        + section("How it was computed", f"<p>{escaped(METHOD)}</p>"),
    )


def strength_cells(strength: Estimate) -> tuple[str, str]:
    """The value and its interval."""
    return f"{strength.value:.2f}", f"{strength.low:.2f} to {strength.high:.2f}"


def _percent(share: Estimate) -> tuple[float, float, float]:
    return 100 * share.value, 100 * share.low, 100 * share.high
