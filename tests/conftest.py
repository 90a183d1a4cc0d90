"""Tests marked ``triton`` run on a GPU, or interpreted with ``TRITON_INTERPRET=1``; else they are skipped."""

import os
from importlib.util import find_spec

import pytest
import torch


def pytest_runtest_setup(item):
    if item.get_closest_marker("triton") is None:
        return
    if find_spec("triton") is None:
        pytest.skip("needs triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs CUDA or TRITON_INTERPRET=1; tests/test_interpreted.py runs it")
