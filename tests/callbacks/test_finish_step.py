"""When a run stops at a signal."""

import signal

from fourdfy.callbacks import signals
from fourdfy.callbacks.signals import FinishStep
from fourdfy.signals import StopSignals
from tests.runs import new_run


def test_a_signal_that_comes_while_ranks_wait_for_each_other_stops_the_next_step(monkeypatch):
    """All ranks know of it only then."""
    stop = StopSignals(lambda: "")
    stopped: list[bool] = []
    run = new_run(stop=lambda: stopped.append(True))
    finish = FinishStep(stop)

    def meanwhile(values):
        stop.received = signal.SIGTERM
        return values

    monkeypatch.setattr(signals, "largest", meanwhile)
    finish.after_step(run)
    assert not stopped and stop.received == signal.SIGTERM
    finish.after_step(run)
    assert stopped


def test_a_signal_to_another_rank_is_one_to_this(monkeypatch):
    stop = StopSignals(lambda: "")
    stopped: list[bool] = []
    monkeypatch.setattr(signals, "largest", lambda values: [int(signal.SIGINT)])
    FinishStep(stop).after_step(new_run(stop=lambda: stopped.append(True)))
    assert stopped and stop.received == signal.SIGINT
