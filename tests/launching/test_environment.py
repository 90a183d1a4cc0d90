"""What the machine gives: threads, a home, folders that can be written to."""

import importlib
import os
from importlib.util import find_spec, module_from_spec
from pathlib import Path

import pytest

import fourdfy


@pytest.fixture
def anew(monkeypatch):
    """Import the package again, in an environment that ends with the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return lambda: importlib.reload(fourdfy)


@pytest.mark.parametrize("given, policy", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_without_spinning_unless_the_user_says_otherwise(given, policy, anew):
    os.environ.pop("OMP_WAIT_POLICY", None)
    if given:
        os.environ["OMP_WAIT_POLICY"] = given
    anew()
    assert os.environ["OMP_WAIT_POLICY"] == policy


def test_a_user_without_a_home_gets_a_temporary_one(anew, monkeypatch, tmp_path):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    anew()
    assert os.environ["HOME"] == str(tmp_path)


def test_a_home_stays(anew):
    os.environ["HOME"] = "/somewhere"
    anew()
    assert os.environ["HOME"] == "/somewhere"


def test_the_hash_grid_compiles_where_its_code_cannot_be_kept(monkeypatch):
    """Neither beside the sources nor in a home: numba then refuses to cache, at the definition."""
    from numba.core import caching

    monkeypatch.setattr(caching.FunctionCache, "_impl_class", NoFolder)
    found = find_spec("fourdfy.ops.hash_grid.numba_kernels")
    kernels = module_from_spec(found)  # a second one, which nothing else sees
    found.loader.exec_module(kernels)
    assert isinstance(kernels._wrap._cache, caching.NullCache)


class NoFolder:
    def __init__(self, function):
        raise RuntimeError(f"cannot cache function {function.__name__!r}: no locator available")
