"""Signals that ask a program to end."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from fourdfy import signals
from fourdfy.signals import NAMES, Stopped, StopSignals
from tests.commands import ROOT

HERE = [name for name in NAMES if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def every_repeat_counts(heard, monkeypatch):
    monkeypatch.setattr(signals, "ONE_REQUEST_SECONDS", 0.0)


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", HERE)
def test_a_signal_ends_the_run_with_its_status_and_says_how_to_go_on(name, caplog):
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(Stopped) as stopped, StopSignals(lambda: "type it again"):
        send(name)
    assert stopped.value.code == 128 + getattr(signal, name)
    assert f"stopped by {name}; type it again" in caplog.text
    assert signal.getsignal(getattr(signal, name)) is before


@pytest.mark.parametrize("name", HERE)
def test_a_deferred_signal_waits_however_often_batch_systems_repeat_it(name, capfd):
    with pytest.raises(Stopped) as stopped, StopSignals(str) as stop:
        stop.deferred = True
        send(name)
        assert f"{name}: stopping; Ctrl-C quits at once" in capfd.readouterr().err
        send("SIGTERM")
        send("SIGXCPU")  # comes every second
        assert stop.received == getattr(signal, name)
    assert stopped.value.code == 128 + getattr(signal, name)


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_a_second_ctrl_c_quits_at_once(deferred, first, capfd, monkeypatch):
    quits = []
    monkeypatch.setattr(os, "_exit", quits.append)
    with pytest.raises(Stopped), StopSignals(lambda: "type it again") as stop:
        stop.deferred = deferred
        try:
            send(first)
        except Stopped:
            assert not deferred
        send("SIGINT")
    assert quits == [130]
    assert "quit at once; type it again" in capfd.readouterr().err


def test_a_signal_that_a_wrapper_passes_on_twice_is_one(monkeypatch):
    monkeypatch.setattr(signals, "ONE_REQUEST_SECONDS", 60)
    with pytest.raises(Stopped), StopSignals(str) as stop:
        stop.deferred = True
        send("SIGINT")
        send("SIGINT")


def test_no_import_is_left_half_done(tmp_path):
    """A module may catch what is raised in it, and is broken from then on."""
    (tmp_path / "catching.py").write_text("try:\n    import sending\nexcept BaseException:\n    pass\n")
    (tmp_path / "sending.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    program = (
        "from fourdfy.signals import StopSignals\n"
        "with StopSignals(lambda: 'type it again'):\n    import catching\n    print('went on')"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
    assert done.stderr == "stopped by SIGTERM; type it again\n"


def test_a_signal_that_comes_while_an_object_is_deleted_is_no_traceback(monkeypatch):
    class Held:
        def __del__(self):
            send("SIGTERM")
            deleted.append(self)

    deleted, ignored = [], []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises(Stopped) as stopped, StopSignals(str):
        Held()
        time.sleep(10)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert deleted and not ignored


def test_a_stop_that_a_library_caught_is_one_all_the_same(caplog):
    with pytest.raises(Stopped), StopSignals(lambda: "type it again"), suppress(SystemExit):
        send("SIGTERM")
    assert "stopped by SIGTERM; type it again" in caplog.text


def test_an_error_of_the_run_is_not_hidden_by_a_signal(caplog):
    with pytest.raises(OSError, match="no space"), StopSignals(lambda: "type it again") as stop:
        stop.deferred = True
        send("SIGTERM")
        raise OSError("no space")
    assert "stopped by SIGTERM; type it again" in caplog.text


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals(str) as stop:
            send("SIGHUP")
        assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_can_run_and_leaves_the_handlers_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with StopSignals(str):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_platforms_without_some_signals_do_without_them(monkeypatch):
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):  # as on Windows
        monkeypatch.delattr(signal, name)
    with pytest.raises(Stopped), StopSignals(str):
        send("SIGTERM")
