"""``report.html`` and ``--compare``: what they hold, and that they never cost a run."""

import base64
import io
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fourdfy.files.images import save_frames
from fourdfy.launching import reports
from fourdfy.launching.cli import main
from fourdfy.launching.experiment import load_experiment
from fourdfy.ops.ranks import Ranks, together
from fourdfy.pages.charts import brief, chart, intervals
from fourdfy.pages.clips import clip, spread
from fourdfy.pages.compare import compare_page, shortest_names
from fourdfy.pages.report import Stage, report_page
from fourdfy.pages.trials import (
    Session,
    add_session,
    curves,
    readable,
    scores,
    sessions,
    validation_strip,
    views_of_test,
)
from tests.commands import launch, trial
from tests.pages.elements import EVIL, Found
from tests.runs import new_run
from tests.screenshots import CONTROL, framed, needs_browser, screenshot

VALIDATE = "trainer.val_check_interval=1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    assert launch("shapes_stage_1.yaml", "train", root, VALIDATE) == 0
    return root


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def test_a_stage_ends_with_a_report_of_all_that_it_was_and_made(trained):
    folder = trial(trained, "shapes_stage_1")
    text = (folder / "report.html").read_text()
    found = Found(text)
    assert found.is_inert() and "a red cube bouncing" in found.under("h1")
    headings = found.under("h2")
    assert headings == [
        "Time and memory",
        "Validation",
        "Plan",
        "multi_view steps",
        "To repeat it",
        "Settings",
    ]
    assert found.under("figcaption")[:3] == ["Test views", "1", "2"]
    (clip,) = found.of("canvas")
    assert (clip["width"], clip["data-frames"]) == ("8", "2")
    cells, lines = found.under("td"), "\n".join(found.under("pre"))
    assert any(re.search(r"torch \d+\.\d+", cell) for cell in cells) and any("GiB" in cell for cell in cells)
    assert "probability 1" in lines and "launch.py --config" in lines and "--train" in lines
    assert re.search(r"min_step_percent: 0.02", lines)
    (session,) = sessions(folder)
    assert (session.first, session.last) == (0, 2) and session.seconds > 0 and session.test_seconds > 0


def test_other_settings_of_a_test_are_not_those_of_the_training(copy, tmp_path, capsys):
    folder = trial(copy, "shapes_stage_1")
    (folder / "report.html").unlink()
    other = ["--prompt", "a blue ball bouncing", "system.loss.lambda_sparsity=77", "--gpu", "cpu"]
    assert main(["--trial", str(folder), "--test", *other]) == 0
    text = (folder / "report.html").read_text()
    assert (
        "a red cube bouncing" in text and "blue ball" not in text and "77" not in Found(text).under("pre")[-1]
    )
    assert main(["--trial", str(folder), "--evaluate", *other]) == 2
    assert "error: the scene was trained for 'a red cube bouncing'" in capsys.readouterr().err


def test_a_validation_view_is_cut_out_of_its_row(trained):
    found = Found((trial(trained, "shapes_stage_1") / "report.html").read_text())
    pictures = [given["src"] for given in found.of("img") if given["alt"].startswith("step ")]
    contents = [base64.b64decode(address.partition(",")[2]) for address in pictures]
    assert [Image.open(io.BytesIO(content)).size for content in contents] == [(8, 8), (8, 8)]


def test_a_report_that_fails_costs_one_warning_and_is_made_up_for(copy, monkeypatch, caplog):
    folder = trial(copy, "shapes_stage_1")
    (folder / "report.html").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(reports, "report_page", lambda stage: 1 / 0)
        assert launch("shapes_stage_1.yaml", "train", copy, "trainer.max_steps=3") == 0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("report.html could not be written; the run continues (ZeroDivisionError")
    assert not (folder / "report.html").exists()
    assert launch("shapes_stage_1.yaml", "train", copy, "trainer.max_steps=3") == 0  # finished already
    found = Found((folder / "report.html").read_text())
    assert {"steps 0 to 2", "steps 2 to 3"} <= {*found.under("th")}
    assert sum("max_steps=3" in line for line in found.under("pre")[1].splitlines()) == 1


def test_an_error_before_the_first_step_is_no_session(trained):
    experiment = load_experiment([trial(trained, "shapes_stage_1") / "configs" / "parsed.yaml"])
    before = sessions(experiment.trial_dir)
    reports.Reports(experiment, "cpu").end(new_run(), ValueError())
    assert sessions(experiment.trial_dir) == before


def test_a_step_over_several_devices_is_said(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "write_report", lambda experiment, system: None)
    experiment = load_experiment([trial(trained, "shapes_stage_1") / "configs" / "parsed.yaml"])
    run = new_run(folder=tmp_path)
    clock = iter([0.0, 10.0, 13.0])
    monkeypatch.setattr(reports, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with together(Ranks(0, 2)):
        made = reports.Reports(experiment, "cpu")
        made.begin(run)
        made.end(run, KeyboardInterrupt())
        made.after_test(run)
    (session,) = sessions(tmp_path)
    assert session.device.startswith("2 x ") and (session.seconds, session.test_seconds) == (10.0, 3.0)


def test_nothing_that_a_trial_holds_can_act_on_its_report(copy):
    folder = trial(copy, "shapes_stage_1")
    (folder / "cmd.txt").write_text(f"launch.py --prompt '{EVIL}'\n")
    given = {"steps": (1, 2), "plan": [EVIL], "settings": {EVIL: EVIL}, "view_width": None}
    found = Found(report_page(Stage(folder=folder, prompt=EVIL, label=EVIL, **given)))
    assert found.is_inert() and found.under("h1") == [EVIL]
    assert found.under("p")[0] == f"{EVIL}, stopped at step 1 of 2"


def test_a_report_of_an_empty_folder_is_a_page_all_the_same(tmp_path):
    given = {"steps": (0, 2), "plan": ["2 steps"], "settings": {"seed": 0}, "view_width": 8}
    found = Found(report_page(Stage(folder=tmp_path, prompt="a ball", label="stage", **given)))
    assert found.under("h2") == ["Plan", "Settings"] and not found.of("canvas")


SESSIONS = [
    Session(first=first, last=last, seconds=seconds, memory_gib=memory, device="CPU", versions={})
    for first, last, seconds, memory in ((0, 2, 60.0, 3.0), (2, 12, 3705.0, 1.0))
]


def test_a_report_tells_each_session_and_every_curve_that_tells_something(tmp_path):
    add_session(tmp_path, SESSIONS[:1], SESSIONS[1])
    file = tmp_path / "csv_logs" / "version_0" / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_text("step,loss/a/total,loss/a/x,weight/a/x,lr/all\n0,1,2,1,0.1\n5,1,2,3,0.1\n")
    given = {"steps": (12, 12), "plan": ["12 steps"], "settings": {"seed": 0}, "view_width": 8}
    found = Found(report_page(Stage(folder=tmp_path, prompt="a ball", label="stage", **given)))
    assert (
        found.under("figcaption") == ["total", "x", "weight of x"]
        and found.under("p")[0] == "stage, 12 steps"
    )
    assert {"1 min 0 s", "1 h 1 min", "0.0333", "0.0027", "3.00 GiB", "1.00 GiB"} <= {*found.under("td")}
    assert {"test views", "versions"}.isdisjoint(found.under("th")), "of neither session"


@pytest.fixture
def two(copy):
    """Trials of other seeds and lengths, one with four test views, one with two; half of them are white."""
    folders = [trial(copy, "shapes_stage_1"), copy / "shapes_stage_1" / "other"]
    shutil.copytree(*folders)
    parsed = folders[1] / "configs" / "parsed.yaml"
    parsed.write_text("plugins: [not_here]\n" + parsed.read_text().replace("seed: 0", "seed: 5"))
    for folder, views in zip(folders, (4, 2), strict=True):
        frames = np.zeros((views, 64, 64, 3), np.uint8)
        frames[views // 2 :] = 255
        save_frames(folder / "save" / "it9-test", frames)
    numbers = {"held_out": True, "iou": 0.91234, "colour_ok": True}
    (folders[1] / "save" / "it2-evaluation.json").write_text(json.dumps(numbers))
    return folders


def test_trials_are_compared_by_clips_scores_curves_and_settings(two, tmp_path, caplog):
    caplog.set_level("INFO")
    assert main(["--compare", *map(str, two), "--out", str(tmp_path / "out")]) == 0
    page = tmp_path / "out" / "compare.html"
    assert caplog.records[-1].getMessage() == f"written to {page}"
    found = Found(page.read_text())
    assert found.is_inert() and found.under("h1") == ["a red cube bouncing"]
    assert [clip["data-frames"] for clip in found.of("canvas")] == ["4", "2"]
    assert found.under("figcaption")[:2] == ["tiny", "other"]
    rows = dict(re.findall(r"<tr><th>([^<]+)</th>((?:<td>[^<]*</td>)+)</tr>", page.read_text()))
    assert rows["iou"].endswith("<td></td><td>0.912</td>") and "held_out" not in rows
    assert rows["seed"] == "<td>0</td><td>5</td>" and "name" not in rows and "data_type" not in rows
    (total,) = re.findall(r'aria-label="total".*?</svg>', page.read_text())
    assert 'class="c0"' in total and 'class="c1"' in total


def test_scores_say_in_which_direction_they_get_better(two):
    given = {"steps": (2, 2), "plan": [], "settings": {}, "view_width": None, "better": {"iou": "highest"}}
    report = report_page(Stage(folder=two[1], prompt="a ball", label="stage", **given))
    compared = compare_page({folder: {} for folder in two}, ["a ball"] * 2, given["better"])
    for text, heads, before in ((report, ["value"], ""), (compared, ["tiny", "other"], "<td></td>")):
        cells = "".join(f"<th>{head}</th>" for head in ("", "better", *heads))
        assert f"<tr>{cells}</tr><tr><th>iou</th><td>highest</td>{before}<td>0.912</td></tr>" in text
        assert f"<th>colour_ok</th><td></td>{before}<td>true</td>" in text and "held_out" not in text


def test_trials_of_other_prompts_are_told_apart_and_have_all_of_their_sessions(two):
    add_session(two[1], SESSIONS[:1], SESSIONS[1])
    text = compare_page({folder: {} for folder in two}, ["a cube", "a ball"], {})
    found = Found(text)
    assert found.under("h1") == ["Different prompts"] and found.under("figcaption")[:2] == [
        "tiny: a cube",
        "other: a ball",
    ]
    assert {"1 h 2 min", "3.00 GiB"} <= {*found.under("td")} and '"seconds": 0.26' in text, "four views"


def test_trials_are_named_by_what_tells_them_apart():
    def names(*paths):
        return shortest_names([*map(Path, paths)])

    assert names("/out/a/x", "/out/b/x", "/out/c/x") == ["a", "b", "c"]
    assert names("/out/a/x", "/out/a/y") == ["x", "y"]
    assert names("/out/a/x", "/out/a/y", "/out/b/x") == ["a/x", "a/y", "b/x"]
    assert names("/one/a/x", "/two/a/x") == ["one", "two"] and names("/x", "/a/x") == ["/", "a"]


def test_paths_that_differ_are_told_apart_without_their_folders(two):
    given = ["/home/me/out/stage_2/a/last.ckpt", "/home/me/out/stage_2/b/last.ckpt"]
    settings = [{"system": {"weights": path, "clip": f"{path[:-9]}x"}, "seed": 0} for path in given]
    text = compare_page(dict(zip(two, settings, strict=True)), ["a cube"] * 2, {})
    rows = dict(re.findall(r"<tr><th>([^<]+)</th>((?:<td>[^<]*</td>)+)</tr>", text))
    assert rows["system.weights"] == "<td>a</td><td>b</td>" and "seed" not in rows and "home" not in text


@needs_browser
def test_compared_clips_are_in_step(two, tmp_path):
    assert main(["--compare", *map(str, two), "--out", str(tmp_path)]) == 0
    moments = [f"compare.html#t={moment}" for moment in (0.4, 0.6)]
    pixels, asked = screenshot(framed(tmp_path, *moments, height=800), width=600, height=800)
    assert asked == [CONTROL]
    before, after = np.split(pixels.mean(-1), 2, axis=1)
    for rows in (slice(240, 440), slice(560, 740)):
        assert before[rows, 100:200].max() < 30 and after[rows, 100:200].min() > 225


def test_what_is_damaged_is_left_out_with_a_warning(two, tmp_path, caplog):
    (two[1] / "save" / "it2-evaluation.json").write_text("[1")
    (two[1] / "csv_logs" / "version_0" / "metrics.csv").write_text("loss/a/total,step\nx,1\n")
    assert readable(curves, two[1]) == {}
    (two[1] / "csv_logs" / "version_0" / "metrics.csv").write_text("\0\0\0\n1,2\n")
    (two[1] / "save" / "it9-test" / "1.png").write_text("torn")
    (two[1] / "save" / "it9-test" / "cover.png").write_text("not a view")
    (two[1] / "sessions.json").write_text("{")
    assert main(["--compare", *map(str, two), "--out", str(tmp_path)]) == 0
    for part in ("scores", "curves", "test views"):
        assert f"other: its {part} can't be" in caplog.text
    found = Found((tmp_path / "compare.html").read_text())
    assert len(found.of("canvas")) == 1 and "no test views; --test renders them" in found.under("p")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}", "{}/configs/parsed.yaml"], "error: --compare: a trial is there twice\n"),
        (["{}", "{}/ckpts"], "ckpts: not a trial folder"),
    ],
)
def test_what_can_not_be_compared_is_one_line(trained, capsys, words, message):
    folder = str(trial(trained, "shapes_stage_1"))
    assert main(["--compare", *(word.format(folder) for word in words)]) == 2
    assert message in capsys.readouterr().err


def drawn(*values, css="c0"):
    """(x, y) of the points of a line."""
    shown = chart("x", {"first": list(enumerate(values)), "second": [(0, 1.0)]})
    assert 'class="c1" d="M' in shown and shown.count("h.01") == 1, "one point is a dot, of its own colour"
    line = re.search(rf'class="{css}" d="M([^"]+)"', shown)[1]
    return np.array([[float(number) for number in point.split()] for point in line.split("L")])


def test_a_curve_shows_what_is_finite_on_the_axis_that_suits_it():
    for values in ((1.0, math.nan, 2.0, 3.0), (0.01, 1.0, 100.0)):
        low, middle, high = drawn(*values)[:, 1]
        assert low > middle > high and low - middle == pytest.approx(middle - high, abs=0.2)
    assert len({*drawn(1.0, 1.0)[:, 1]}) == 1
    assert "no finite value" in chart("x", {"": [(0, math.inf)]})


def test_a_long_curve_is_drawn_in_fewer_points_and_smooth():
    raw, smooth = (drawn(*map(float, range(1200)), css=css) for css in ("raw c0", "c0"))
    assert len(raw) == len(smooth) == 300
    assert (np.diff(smooth[:, 0]) > 0).all() and np.abs(raw - smooth)[10:-10].max() < 0.2
    first, last = (raw - smooth)[[0, -1], 1]  # means of half as many points
    assert first == pytest.approx(-last, abs=0.2) and first == pytest.approx(118 * 15 / 1200, abs=0.2)


@pytest.mark.parametrize(
    ("rows", "middle", "ticks", "ends"),
    [
        ([(60.0, 40.0, 83.0), (50.0, 45.0, 55.0)], 50.0, "10 30 50 70 90", [(38, 89.6), (44, 56)]),
        ([(100.0, 100.0, 100.0)], 50.0, "0 25 50 75 100", [(98, 98)]),
        ([(0.1, -0.03, 0.2)], 0.0, "-0.2 -0.1 0 0.1 0.2", [(42.8, 98)]),
        ([(0.0, 0.0, 0.0)], 0.0, "-1 -0.5 0 0.5 1", [(50, 50)]),
    ],
)
def test_an_interval_is_drawn_from_end_to_end_on_a_round_axis(rows, middle, ticks, ends):
    found = Found(intervals([(f"row {i}", *of) for i, of in enumerate(rows)], middle))
    lines = [line for line in found.of("line") if line["class"] == "c0"]
    shown = [tuple(float(line[end].rstrip("%")) for end in ("x1", "x2")) for line in lines]
    assert shown == [pytest.approx(of, abs=0.05) for of in ends]
    assert found.under("text") == ticks.split() and found.under("p")[0] == "row 0"


def test_a_clip_has_all_of_its_frames_row_by_row_or_some_evenly():
    frames = np.arange(0, 250, 50, np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    content = re.search(r"base64,([^\"]+)", clip(frames, "x"))[1]
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("L")).astype(float)
    cells = [sheet[8 * (k // 3) :, 8 * (k % 3) :][:8, :8].mean() for k in range(6)]
    assert cells == pytest.approx([0, 50, 100, 150, 200, 0], abs=4)
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 8) == [0, 1, 2] and spread(0, 8) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.123456, "0.123"), (12345.6, "12346"), (1.5e7, "1.5e7"), (2e-9, "2e-9"), (True, "true"), ([1], "[1]")],
)
def test_numbers_are_short(value, shown):
    assert brief(value) == shown


def test_a_row_that_a_full_disk_has_cut_is_left_out(tmp_path):
    file = tmp_path / "csv_logs" / "version_0" / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_text("loss/a/total,step\n1.5,0\n0.0,9\n3.")
    assert curves(tmp_path) == {"loss/a/total": [(0, 1.5), (9, 0.0)]}


def test_views_steps_and_scores_are_in_the_order_of_their_numbers(tmp_path):
    for step in (9, 10):
        save_frames(tmp_path / "save" / f"it{step}-test", np.zeros((11, 8, 8, 3), np.uint8))
        (tmp_path / "save" / f"it{step}-evaluation.json").write_text(json.dumps({"iou": step}))
    for step in range(1, 15):
        Image.new("RGB", (8, 8)).save(tmp_path / "save" / f"it{step}-0.png")
    wanted = [tmp_path / "save" / "it10-test" / f"{view}.png" for view in range(11)]
    assert views_of_test(tmp_path) == wanted
    assert scores(tmp_path)["iou"] == 10 and scores(tmp_path, 9)["iou"] == 9
    steps = [int(step) for step in re.findall(r"<figcaption>(\d+)<", validation_strip(tmp_path, None))]
    assert len(steps) == 12 and steps == sorted(steps) and steps[-1] == 14
