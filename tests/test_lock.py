"""``requirements*.lock``: every package that an installation takes, by version and hash (``make lock``)."""

import re
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.commands import ROOT

LOCKS = ("requirements.lock", "requirements-cuda.lock")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}")


def entries(name):
    """(requirement, the lines of its hashes) of a lock file."""
    for entry in re.split(r"\n(?=\S)", (ROOT / name).read_text().strip()):
        requirement, *hashes = entry.split(" \\\n")
        yield Requirement(requirement), hashes


def locked():
    """Name -> the version that this Python and system get."""
    found = [entry for name in LOCKS for entry, _ in entries(name)]
    return {
        canonicalize_name(entry.name): str(entry.specifier).removeprefix("==")
        for entry in found
        if entry.marker is None or entry.marker.evaluate()
    }


@pytest.mark.parametrize("name", LOCKS)
def test_every_entry_is_one_version_with_hashes_and_names_no_place(name):
    for entry, hashes in entries(name):
        assert re.fullmatch(r"==[\w.]+", str(entry.specifier)) and not entry.url
        assert hashes and all(HASH.fullmatch(line) for line in hashes), entry


def test_the_lock_fits_the_requirements():
    """Those of requirements.txt and, as far as it is installed here, of everything that they need."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needed = {line: "requirements.txt" for line in lines if line and not line.startswith("#")}
    versions = locked()
    for name, version in versions.items():
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # of the CUDA build
        if found.version.partition("+")[0] == version:
            needed |= dict.fromkeys(found.requires or (), name)
    for line, by in needed.items():
        requirement = Requirement(line.partition("  #")[0])
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version = versions.get(canonicalize_name(requirement.name))
            assert version and requirement.specifier.contains(version, prereleases=True), f"{line} of {by}"


def test_pytorch_and_its_cuda_are_in_a_lock_of_their_own():
    names = {name: {entry.name for entry, _ in entries(name)} for name in LOCKS}
    assert "torch" in names[LOCKS[1]] and not names[LOCKS[0]] & names[LOCKS[1]]
    assert not [name for name in names[LOCKS[0]] if name.startswith(("nvidia-", "cuda-"))]
    assert f"pip install torch=={locked()['torch']} --index-url" in (ROOT / "README.md").read_text()
