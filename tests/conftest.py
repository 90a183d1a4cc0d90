"""Tests marked ``triton`` run on a GPU, or interpreted with ``TRITON_INTERPRET=1``; else they are skipped."""

import gc
import os
import signal
from importlib.util import find_spec

import pytest
import torch
from _pytest import runner

from fourdfy.signals import NAMES

# The tests and the processes that they start compute with one thread each, so that they round alike.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_finish(session):
    """What was imported and collected is no test's garbage: the collector need not look at it each time."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    return _with_room_on_the_stack(item, nextitem)


def _with_room_on_the_stack(item, nextitem):
    """Run a test as pytest does, with one piece of memory for the frames of all functions that it calls.

    Python's own pieces have 16 kB, and a loop whose calls begin at the end of one maps and unmaps the next at
    each call, which was half of the time of some tests.
    """
    return runner.pytest_runtest_protocol(item, nextitem)


_with_room_on_the_stack.__code__ = _with_room_on_the_stack.__code__.replace(co_stacksize=2**17)


def pytest_runtest_setup(item):
    if item.get_closest_marker("triton") is None:
        return
    if find_spec("triton") is None:
        pytest.skip("needs triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs CUDA or TRITON_INTERPRET=1; tests/test_interpreted.py runs it")


@pytest.fixture
def heard():
    """No signal is ignored, even where the tests themselves run under ``nohup`` or in the background."""
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
