"""Answers become results; those that can't count are named."""

import csv
import json
import random

import pytest

from fourdfy.config import ConfigError
from fourdfy.launching.cli import main
from fourdfy.study.folder import ANSWERS
from fourdfy.study.results import write_results
from tests.study.studies import answers, put, study


def prefers(*order):
    """Whoever comes first; "text" is always a tie."""
    return lambda question, *methods: "" if question == "text" else min(methods, key=order.index)


def test_endless_brackets_are_left_out_with_a_warning(tmp_path, caplog):
    folder = study(tmp_path)
    put(folder, *(answers(folder, f"rater {i}", prefers("theirs", "ours")) for i in range(6)))
    (folder / ANSWERS / "deep.json").write_text("[" * 200_000)
    assert write_results(folder).rows
    assert "deep.json is left out" in caplog.text


def test_sides_become_methods_and_ties_stay(tmp_path):
    folder = study(tmp_path)
    put(folder, *(answers(folder, f"rater {i}", prefers("theirs", "ours")) for i in range(6)))
    text, overall = write_results(folder).rows
    assert (text.found.wins, text.found.ties, text.found.losses, text.found.p) == (0, 12, 0, 1.0)
    assert (overall.found.wins, overall.found.losses, overall.found.share.value) == (0, 12, 0.0)
    assert overall.p_holm == pytest.approx(2 * overall.found.p) == pytest.approx(4 / 2**12)
    rows = [*csv.DictReader((folder / "results.csv").read_text().splitlines())]
    assert [row["question"] for row in rows] == ["text", "overall"] and rows[1]["losses"] == "12"


def test_of_three_methods_the_order_is_found(tmp_path, capsys):
    folder = study(tmp_path, ["one", "two", "three"])
    put(folder, *(answers(folder, f"rater {i}", prefers("three", "one", "two")) for i in range(5)))
    found = write_results(folder)
    strengths = {method: of.value for method, of in found.strengths["overall"].items()}
    assert sorted(strengths, key=strengths.get) == ["two", "one", "three"]
    assert [of.value for of in found.strengths["text"].values()] == pytest.approx([0, 0, 0])
    assert main(["--study-results", str(folder)]) == 0
    assert "5 raters" in capsys.readouterr().out and "overall: three" in (folder / "results.html").read_text()


def test_who_fails_a_check_is_left_out_and_counted(tmp_path):
    folder = study(tmp_path)
    good, bad = (answers(folder, name, prefers("ours", "theirs"), check=name) for name in ("left", "right"))
    put(folder, good, bad)
    found = write_results(folder)
    assert (found.raters, found.left_out) == (1, 1) and found.rows[1].found.wins == 2


def test_who_fails_one_of_two_checks_is_left_out(tmp_path):
    folder = study(tmp_path, checks=2)
    good, bad = (answers(folder, name, prefers("ours", "theirs"), check=name) for name in ("left", "right"))
    twice = [{**good, "checks": 2 * good["checks"]}, {**bad, "checks": good["checks"] + bad["checks"]}]
    put(folder, *twice)
    found = write_results(folder)
    assert (found.raters, found.left_out) == (1, 1)


@pytest.mark.parametrize("checks", [0, 2])
def test_answers_without_the_study_s_checks_do_not_count(tmp_path, caplog, checks):
    folder = study(tmp_path)
    good, odd = (answers(folder, name, prefers("ours", "theirs")) for name in ("anna", "ben"))
    put(folder, good, {**odd, "checks": checks * odd["checks"]})
    assert write_results(folder).raters == 1
    assert f"1.json is left out: it has {checks} attention checks; expected 1" in caplog.text


def test_damaged_foreign_and_repeated_answers_are_warned_of(tmp_path, caplog):
    folder = study(tmp_path)
    good = answers(folder, "anna", prefers("ours", "theirs"))
    again = answers(folder, "anna", prefers("theirs", "ours"))
    put(folder, good, {**good, "study": "another"}, again, good)
    (folder / ANSWERS / "torn.json").write_text(json.dumps(good)[:50])
    assert write_results(folder).rows[1].found.wins == 2
    assert [line.split(" is left out: ")[0][-6:] for line in caplog.messages] == [
        "1.json",
        "2.json",
        "n.json",
    ]


@pytest.mark.parametrize("part", ["answers", "checks"])
def test_answers_that_the_page_can_t_have_made_are_refused(tmp_path, caplog, part):
    folder = study(tmp_path)
    good = answers(folder, "anna", prefers("ours", "theirs"))
    entry = good[part][0]
    wrong = [7, [7], [{**entry, "answer": "both"}]]
    if part == "answers":
        wrong += [[entry, entry], [{**entry, "question": "own"}], [{**entry, "left": entry["right"]}]]
        wrong += [[{**entry, "left": ["x"]}]]
    put(folder, *({**good, "rater": str(i), part: of} for i, of in enumerate(wrong)))
    with pytest.raises(ConfigError, match="no answers yet"):
        write_results(folder)
    assert len(caplog.messages) == len(wrong)


def test_nothing_to_count_is_said(tmp_path, capsys):
    folder = study(tmp_path)
    assert main(["--study-results", str(folder)]) == 2
    assert "no answers yet; put the raters' JSON files there" in capsys.readouterr().err
    assert main(["--study-results", str(tmp_path)]) == 2
    assert "not a study (it has no key.json); launch.py --study makes one" in capsys.readouterr().err


def test_raters_who_guess_are_no_evidence(tmp_path):
    folder, generator = study(tmp_path), random.Random(0)
    guess = lambda question, *methods: generator.choice(methods)  # noqa: E731
    put(folder, *(answers(folder, f"rater {i}", guess) for i in range(30)))
    found = write_results(folder)
    assert all(row.p_holm > 0.05 and row.found.share.low < 0.5 < row.found.share.high for row in found.rows)
    assert all(abs(alpha) < 0.2 for alpha in found.agreement.values())
