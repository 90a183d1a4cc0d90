"""What the documentation names exists: files, folders, and the headings that links point at."""

import re

import pytest

from tests.commands import ROOT
from tests.test_layers import MAY_IMPORT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "extern" / "README.md", *ROOT.glob("docs/*.md")]
FOLDERS = "benchmarks|configs|docs|extern|fourdfy|tests|tools"
OF_A_TRIAL = {"configs/parsed.yaml", "configs/raw.yaml"}


def anchors(page):
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_the_text_exist(page):
    named = re.findall(rf"\b((?:{FOLDERS})/[\w./-]*\.\w+)", page.read_text(encoding="utf-8"))
    assert [path for path in set(named) - OF_A_TRIAL if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_architecture_page_draws_the_floors_that_hold():
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| (.*) \|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE
    )
    assert {room: set(re.findall(r"`(\w+)`", below)) for room, below in rows} == MAY_IMPORT
