"""Tests marked ``triton`` run on a GPU, or interpreted with ``TRITON_INTERPRET=1``; else they are skipped."""

import os
import signal
from importlib.util import find_spec

import pytest
import torch

from fourdfy.signals import NAMES


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
