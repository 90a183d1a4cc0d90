"""The documentation's site: its links lead somewhere, and it loads nothing from elsewhere."""

import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from tests.commands import ROOT
from tests.screenshots import needs_browser

pytest.importorskip("material", reason="needs mkdocs-material (the extra docs)")
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from tools.docs_site import _notebook


def build_site(folder, **given):
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True, **given)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build_site(tmp_path_factory.mktemp("site"))


class Loaded(HTMLParser):
    """What a page loads by itself: not where its links lead."""

    def __init__(self, text):
        super().__init__()
        self.addresses = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag != "a":
            self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset")]


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        for address in Loaded(page.read_text(encoding="utf-8")).addresses:
            assert (
                address.startswith("data:image/")
                or (page.parent / address).exists()
                or page.name == "404.html"
            )
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet


def test_links_to_the_repository_lead_to_pages_that_show_its_files(site):
    assert 'href="repository/fourdfy/priors/hub.py.html"' in (site / "priors.html").read_text()
    assert "fourdfy/priors/hub.py" in (site / "repository/fourdfy/priors/hub.py.html").read_text()
    assert 'href="plugins/flow_prior.py.html"' in (site / "extending.html").read_text()
    assert 'src="data:image/png;base64,' in (site / "shapes.ipynb.html").read_text()
    assert 'href="../benchmarks.html"' in (site / "repository/index.html").read_text()


def test_pages_are_found_by_a_search_and_listings_are_not(site):
    entries = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    found = {entry["location"] for entry in entries}
    assert {"priors.html", "repository/index.html"} <= found
    assert "repository/fourdfy/priors/hub.py.html" not in found


def test_a_link_that_leads_nowhere_is_an_error(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# A page\n\n[missing](../fourdfy/missing.py)\n")
    nav = [{"Start": "index.md"}]
    with pytest.raises(Abort):
        build_site(tmp_path / "site", docs_dir=str(tmp_path / "docs"), nav=nav)


@needs_browser
def test_the_site_is_searched_offline(site, tmp_path):
    pytest.importorskip("websockets", reason="comes with viser")
    from tests.browser import Browser, wait_for

    with Browser(tmp_path) as browser:
        browser.open((site / "index.html").as_uri() + "?q=hybrid")
        wait_for(lambda: browser.run("document.querySelectorAll('.md-search-result__item').length"))
        assert [address for address in browser.requests if not address.startswith(("file:", "data:"))] == []


def test_the_paper_is_cited_as_in_the_citation_file():
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    page = " ".join((ROOT / "docs/citing.md").read_text(encoding="utf-8").split())
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(authors) in page and paper["title"] in page and str(paper["year"]) in page


def test_a_notebook_becomes_a_page_with_what_its_cells_gave():
    outputs = [
        {"output_type": "stream", "text": ["12\n"]},
        {"output_type": "execute_result", "data": {"image/png": "QUJD\n", "text/plain": ["<Image>"]}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "text"]},
        {"cell_type": "code", "source": ["print(12)\n", "image"], "outputs": outputs},
    ]
    page = _notebook(json.dumps({"cells": cells}))
    assert page.startswith("# Title\n\ntext\n\n~~~~~~ python\nprint(12)\nimage\n~~~~~~\n\n~~~~~~ text\n12\n")
    assert page.endswith("![](data:image/png;base64,QUJD)")
