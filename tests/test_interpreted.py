"""Triton's kernels pass their tests in its interpreter, where there is no GPU to run them on."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FILES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "tests").rglob("test_*.py")
    if "mark." + "triton" in path.read_text()
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the same tests run in this process")
@pytest.mark.parametrize("paths", [FILES[::2], FILES[1::2]], ids=" ".join)
def test_kernels_pass_their_tests_interpreted(paths):
    """In a process of its own: the choice is made when triton is imported, and much imports it early.

    Of several files, as it takes longer to start than one of them to run.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", "triton", "-p", "no:cacheprovider", *paths]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
