"""Signals that ask a run to end."""

import os
import signal
import threading

import pytest

from fourdfy.callbacks.signals import NAMES, Stopped, StopSignals

HERE = [name for name in NAMES if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def heard():
    """No signal is ignored, even where the tests themselves run under ``nohup`` or in the background."""
    before = {name: signal.signal(getattr(signal, name), signal.SIG_DFL) for name in HERE}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


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
def test_a_step_is_finished_unless_asked_twice(name):
    with pytest.raises(Stopped), StopSignals(str) as stop:
        stop.deferred = True
        send(name)
        assert stop.received == getattr(signal, name)
        send("SIGTERM")


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
