import builtins
import importlib
import io
import logging
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import fourdfy.terminal
from fourdfy import devices
from fourdfy.callbacks import base, progress
from fourdfy.callbacks.progress import LiveLine, ProgressLine, fit
from tests.runs import new_run


class Terminal(io.StringIO):
    """A terminal's stderr; ``rows`` is what a reader sees."""

    columns = 80

    def isatty(self):
        return True

    def rows(self):
        rows, at = [""], 0
        for letter in self.getvalue():
            if letter == "\n" or (letter != "\r" and at == self.columns):
                rows.append("")
            if letter in "\r\n":
                at = 0
            else:
                rows[-1] = rows[-1][:at].ljust(at) + letter + rows[-1][at + 1 :]
                at += 1
        return [row.rstrip() for row in rows]


@pytest.fixture
def terminal(monkeypatch):
    terminal = Terminal()
    # Not sys.stderr itself, which pytest sets anew after the fixtures.
    for module in (progress, fourdfy.terminal):
        monkeypatch.setattr(module, "sys", SimpleNamespace(**{**vars(sys), "stderr": terminal}))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(terminal)])
    return terminal


def train(losses, max_steps=100000):
    """Send steps of (kind, loss) through a callback and end the training."""
    run, callback = new_run(max_steps=max_steps, label="stage 3/3"), ProgressLine()
    callback.begin(run)
    for kind, loss in losses:
        run.means.add({f"loss/{kind}/total": loss, f"loss/{kind}/sds": 0.5, f"{kind}/opacity": 0.5})
        callback.after_step(run, None, {})
    callback.end(run, None)


def test_a_stage_with_every_kind_of_step_takes_one_row_of_80_columns(terminal):
    train([("multi_view", 12345.0), ("single_view", 0.00123), ("video", 3.0)] * 3)
    rows = terminal.rows()
    assert rows[1:] == [""]
    for text in ("stage 3/3", "0/100000", "views 12345", "image 0.0012", "video 3"):
        assert text in rows[0]


@pytest.mark.parametrize("is_live", [True, False], ids=["a terminal", "a pipe"])
def test_training_goes_on_where_nobody_reads_the_line_any_more(is_live, terminal, monkeypatch):
    def gone(text):
        raise BrokenPipeError

    monkeypatch.setattr(terminal, "isatty", lambda: is_live)
    monkeypatch.setattr(terminal, "write", gone)
    train([("multi_view", 1.0)])


def test_a_wider_terminal_also_shows_the_memory(terminal, monkeypatch):
    steps = [("multi_view", 12345.0), ("single_view", 0.00123), ("video", 3.0)]
    train(steps, max_steps=10**9)
    monkeypatch.setattr(terminal, "columns", 120)
    monkeypatch.setenv("COLUMNS", "120")
    train(steps, max_steps=10**9)
    narrow, wide, _ = terminal.rows()
    assert "GiB" not in narrow and "GiB" in wide


def test_a_kind_is_shown_as_the_mean_of_its_steps(terminal):
    losses = [2.0] * 10 + [4.0] * 10
    train([pair for loss in losses for pair in (("video", loss), ("multi_view", 7.0))])
    assert "video 3  views 7" in terminal.rows()[0]


@pytest.mark.parametrize(
    "loss, shown", [(9.97, "10"), (99.4, "99"), (99.7, "100"), (-99.96, "-100"), (123456.7, "123457")]
)
def test_a_loss_is_shown_without_an_exponent(loss, shown, terminal):
    train([("multi_view", loss)])
    assert f"views {shown}  " in terminal.rows()[0] + "  "


def test_the_line_shows_the_newest_numbers_that_have_come(terminal, monkeypatch):
    coming = [True]
    monkeypatch.setattr(base.Means, "is_ready", property(lambda means: not (coming[0] and len(means))))
    monkeypatch.setattr(progress, "REDRAW_SECONDS", {True: 0.0})
    run, callback = new_run(label="stage"), ProgressLine()
    callback.begin(run)
    shown = []
    for step, now in enumerate([True, False, True, True, False]):
        coming[0] = now
        run.means.add({"loss/video/total": float(step)})
        run.means.take()
        callback.after_step(run, None, {})
        shown.append(terminal.rows()[0].partition("video ")[2][:1])
    callback.end(run, None)
    assert shown == ["", "1", "1", "1", "4"]


def test_records_and_warnings_stand_above_the_line(terminal):
    handlers = list(logging.root.handlers)
    line = LiveLine()
    line.open()
    line.show([(0, "step 1 of a line that is longer than the record")])
    logging.getLogger("fourdfy.anything").warning("a record")
    warnings.showwarning(UserWarning("a warning"), UserWarning, __file__, 1)
    line.show([(0, "step 2")])
    line.close()
    logging.getLogger("fourdfy.anything").warning("below")
    rows = terminal.rows()
    assert rows[0] == "a record"
    assert "UserWarning: a warning" in rows[1]
    assert rows[-3:] == ["step 2", "below", ""]
    assert not any("step 1" in row for row in rows)
    assert logging.root.handlers == handlers


def test_an_error_ends_the_line(terminal):
    run, callback = new_run(), ProgressLine()
    callback.begin(run)
    callback.end(run, KeyboardInterrupt())
    terminal.write("error")
    assert terminal.rows()[-1] == "error"


def test_rendering_shows_how_far_it_is_but_for_the_validations_in_between(terminal):
    run, callback = new_run(label="test"), ProgressLine()
    for split in ("val", "val_video", "test", "test_static"):
        callback.after_frames(run, SimpleNamespace(split=split), None, done=3, total=3)
        assert ("rendering test views, 100%" in terminal.getvalue()) == split.startswith("test")
    callback.after_test(run)
    assert [row for row in terminal.rows() if row] == ["test  rendering test views, 100%"]


def test_a_log_file_gets_whole_lines(capsys):
    train([("multi_view", 1.0), ("single_view", 2.0), ("video", 3.0)])
    first, last = capsys.readouterr().err.splitlines()
    assert "0%" in first and "GiB" in last and "video 3" in last
    assert "\r" not in first + last


@pytest.mark.parametrize(
    "width, line", [(11, "aa  bb  ccc"), (10, "aa  bb"), (6, "aa  bb"), (5, "aa"), (1, "aa")]
)
def test_the_highest_rank_gives_way_first(width, line):
    assert fit([(0, "aa"), (1, "bb"), (2, "ccc")], width) == line


def test_of_one_rank_the_last_gives_way_first():
    assert fit([(0, "aa"), (1, "xx"), (1, "bb")], 6) == "aa  xx"


def test_without_the_resource_module_no_memory_is_shown(terminal, monkeypatch):
    """As on Windows; simulated."""
    real = builtins.__import__

    def windows(name, *args, **kwargs):
        if name == "resource":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", windows)
    monkeypatch.delitem(sys.modules, "resource", raising=False)
    try:
        monkeypatch.setattr(progress, "peak_memory", importlib.reload(devices).peak_memory)
        assert torch.cuda.is_available() or progress._memory() == ""
    finally:
        monkeypatch.undo()
        importlib.reload(devices)
