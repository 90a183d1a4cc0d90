"""``report.html`` and ``--compare``: what they hold, and that they never cost a run."""

import base64
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fourdfy.files.images import save_frames
from fourdfy.launching import reports
from fourdfy.launching.cli import main
from fourdfy.launching.experiment import load_experiment
from fourdfy.ops.ranks import Ranks, together
from fourdfy.pages.charts import brief, chart
from fourdfy.pages.compare import shortest_names
from fourdfy.pages.report import Stage, report_page
from fourdfy.pages.trials import curves, sessions
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
    with together(Ranks(0, 2)):
        made = reports.Reports(experiment, "cpu")
        made.begin(run)
        made.end(run, KeyboardInterrupt())
    (session,) = sessions(tmp_path)
    assert session.device.startswith("2 x ")


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
    (folders[1] / "save" / "it2-evaluation.json").write_text(json.dumps({"iou": 0.91234, "colour_ok": True}))
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
    assert rows["iou"] == "<td></td><td>0.912</td>" and rows["colour_ok"] == "<td></td><td>true</td>"
    assert rows["seed"] == "<td>0</td><td>5</td>" and "name" not in rows and "data_type" not in rows
    (total,) = re.findall(r'aria-label="total".*?</svg>', page.read_text())
    assert 'class="c0"' in total and 'class="c1"' in total


def test_trials_are_named_by_what_tells_them_apart():
    def names(*paths):
        return shortest_names([*map(Path, paths)])

    assert names("/out/a/x", "/out/b/x", "/out/c/x") == ["a", "b", "c"]
    assert names("/out/a/x", "/out/a/y") == ["x", "y"]
    assert names("/out/a/x", "/out/a/y", "/out/b/x") == ["a/x", "a/y", "b/x"]
    assert names("/one/a/x", "/two/a/x") == ["one", "two"] and names("/x", "/a/x") == ["/", "a"]


@needs_browser
def test_compared_clips_are_in_step(two, tmp_path):
    assert main(["--compare", *map(str, two), "--out", str(tmp_path)]) == 0
    moments = [f"compare.html#t={moment}" for moment in (0.4, 0.6)]
    pixels, asked = screenshot(framed(tmp_path, *moments, height=800), width=600, height=800)
    assert asked == [CONTROL]
    before, after = np.split(pixels.mean(-1), 2, axis=1)
    for clip in (slice(240, 440), slice(560, 740)):
        assert before[clip, 100:200].max() < 30 and after[clip, 100:200].min() > 225


def test_what_is_damaged_is_left_out_with_a_warning(two, tmp_path, caplog):
    (two[1] / "save" / "it2-evaluation.json").write_text("[1")
    (two[1] / "csv_logs" / "version_0" / "metrics.csv").write_text("loss/a/total,step\nx,1\n")
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


def test_a_curve_shows_what_is_finite_on_the_axis_that_suits_it():
    def heights(*values):
        line = re.search(r'class="c0" d="M([^"]+)"', chart("x", {"": list(enumerate(values))}))[1]
        return [float(point.split()[1]) for point in line.split("L")]

    low, middle, high = heights(1.0, math.nan, 2.0, 3.0)
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    low, middle, high = heights(0.01, 1.0, 100.0)
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert "no finite value" in chart("x", {"": [(0, math.inf)]})
    long = chart("x", {"": [(step, float(step % 2)) for step in range(5000)]})
    raw, smooth = re.findall(r'class="(?:raw )?c0" d="([^"]+)"', long)
    assert raw.count("L") < 300 and smooth.count("L") < 300


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.123456, "0.123"), (12345.6, "12346"), (1.5e7, "1.5e7"), (2e-9, "2e-9"), (True, "true"), ([1], "[1]")],
)
def test_numbers_are_short(value, shown):
    assert brief(value) == shown


def test_a_row_that_a_full_disk_has_cut_is_left_out(tmp_path):
    file = tmp_path / "csv_logs" / "version_0" / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_text("loss/a/total,step\n1.5,0\n2.5,9\n3.")
    assert curves(tmp_path) == {"loss/a/total": [(0, 1.5), (9, 2.5)]}
