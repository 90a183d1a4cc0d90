"""Answers become results; those that can't count are named."""

import csv
import json
import random
from dataclasses import astuple

import pytest

from fourdfy.config import ConfigError
from fourdfy.launching.cli import main
from fourdfy.study.folder import ANSWERS
from fourdfy.study.results import write_results
from tests.pages.elements import Found
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
    assert not (folder / "strengths.csv").exists(), "of two methods"


def test_of_three_methods_the_order_is_found(tmp_path, capsys, caplog):
    folder = study(tmp_path, ["one", "two", "three"])
    put(folder, *(answers(folder, f"rater {i}", prefers("three", "one", "two")) for i in range(5)))
    found = write_results(folder)
    strengths = {method: of.value for method, of in found.strengths["overall"].items()}
    assert sorted(strengths, key=strengths.get) == ["two", "one", "three"]
    assert [of.value for of in found.strengths["text"].values()] == pytest.approx([0, 0, 0])
    assert main(["--study-results", str(folder)]) == 0
    named = ", ".join(str(folder / name) for name in ("results.html", "results.csv", "strengths.csv"))
    assert caplog.messages[-1] == f"written: {named}"
    best = found.strengths["overall"]["three"]
    shown = (f"{best.value:.2f}", f"{best.low:.2f} to {best.high:.2f}")
    lines = capsys.readouterr().out.splitlines()
    assert any(all(cell in line for cell in ("three", *shown)) for line in lines)
    assert max(map(len, lines)) <= 80 and "5 raters; 0 more failed a check (not counted)" in lines
    row = "".join(f"<td>{cell}</td>" for cell in shown)
    assert f"<th>overall: three</th>{row}" in (folder / "results.html").read_text()
    rows = [*csv.DictReader((folder / "strengths.csv").read_text().splitlines())]
    assert [row["method"] for row in rows] == 2 * ["one", "two", "three"]
    assert [float(rows[-1][name]) for name in ("strength", "low", "high")] == [*astuple(best)]


@pytest.mark.parametrize(("raters", "prompts"), [(5, 5), (4, 5), (5, 4), (1, 1)])
def test_intervals_of_few_raters_or_prompts_are_warned_of(tmp_path, caplog, raters, prompts):
    folder = study(tmp_path, prompts=[f"thing {i}" for i in range(prompts)])
    put(folder, *(answers(folder, f"rater {i}", prefers("ours", "theirs")) for i in range(raters)))
    assert main(["--study-results", str(folder)]) == 0
    warning = "Intervals of fewer than 5 raters or prompts can't be trusted: here, those of 2 of 2 rows."
    shown = Found((folder / "results.html").read_text()).under("strong")
    assert caplog.messages[:-1] == shown == ([warning] if min(raters, prompts) < 5 else [])


def test_one_rater_is_no_plural_and_has_no_agreement(tmp_path, capsys):
    folder = study(tmp_path)
    put(folder, answers(folder, "anna", prefers("ours", "theirs")))
    assert main(["--study-results", str(folder)]) == 0
    assert "1 rater; 0 more failed a check" in capsys.readouterr().out
    found = Found((folder / "results.html").read_text())
    assert found.under("td")[-2:] == ["-", "-"] and "nan" not in found.under("td")
    rows = [*csv.DictReader((folder / "results.csv").read_text().splitlines())]
    assert [row["agreement"] for row in rows] == ["", ""]


def test_who_answered_nothing_is_no_rater(tmp_path, caplog):
    folder = study(tmp_path, checks=0)
    anna, ben = ({**answers(folder, name, prefers("ours", "theirs")), "checks": []} for name in "ab")
    put(folder, anna, {**ben, "answers": []})
    assert write_results(folder).raters == 1
    assert caplog.messages == [f"{folder / ANSWERS / '1.json'} is left out: it has no answers"]


def test_a_suffix_may_have_capitals_and_no_other_file_is_passed_over_in_silence(tmp_path, caplog):
    folder = study(tmp_path)
    for name in ("anna.JSON", "ben.txt", ".half.tmp.json"):
        (folder / ANSWERS / name).write_text(json.dumps(answers(folder, name, prefers("ours", "theirs"))))
    (folder / ANSWERS / "more").mkdir()
    assert write_results(folder).raters == 1
    lost = [folder / ANSWERS / name for name in ("ben.txt", "more")]
    assert caplog.messages == [f"{file} is left out: it is no .json file" for file in lost]


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
