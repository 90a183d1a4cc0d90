"""What the documentation names exists: files, folders, and the headings that links point at."""

import re
import shlex

import pytest

from fourdfy.launching.recipe import load_recipe
from tests.commands import CONFIGS, ROOT
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


TROUBLESHOOTING = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")


def settings(lines):
    """The ``key=value`` of a config in the code of some lines."""
    words = shlex.split(" ".join(re.findall(r"`([^`]+)`", "\n".join(lines))))
    return [word for word in words if re.match(r"(data|system|trainer|checkpoint)\.[\w.]+=(?![A-Z])", word)]


def test_the_keys_of_troubleshooting_exist_and_take_their_values():
    """Those of the first columns, all together."""
    rows = settings(re.findall(r"^\| (.*?) \|", TROUBLESHOOTING, re.MULTILINE))
    files = [CONFIGS / "fourdfy_stage_3.yaml", CONFIGS / "overlays/videocrafter.yaml"]
    prompt = "system.prompt_processor.prompt=a red ball spinning"
    load_recipe(files, [prompt, *rows])
    assert len(rows) > 20


MESSAGES = (
    "the scene does not move; raise",
    "the scene is empty; ",
    "fog fills the whole scene; ",
    "out of memory; repeated with less at once; for good: ",
    "; stopped before the optimizer's step",
    "was not found. Tried:",
    "could not be written; the run continues",
    "can't be written",
    "in use by ",
    "holds a run with other settings",
)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_messages_of_troubleshooting_are_those_of_the_code(message):
    assert message.strip("; ") in TROUBLESHOOTING
    assert any(message in path.read_text(encoding="utf-8") for path in (ROOT / "fourdfy").rglob("*.py"))
