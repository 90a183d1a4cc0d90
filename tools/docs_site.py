"""Hooks of ``mkdocs build``: links to files of the repository, as git hosts follow them, lead to pages too.

Markdown outside of ``docs/`` becomes a page as it is, a notebook one with its cells, any other text a page
that shows it. A link to what does not exist stays as it is, which ``mkdocs build --strict`` refuses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!https?:|data:)[^)#\s]+")
CODE = re.compile(r"`[^`\n]+`")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds a page for each file that a page links to, and for those that these link to."""
    waiting = [Path(page.src_dir or "", page.src_uri) for page in files.documentation_pages()]
    while waiting:
        for source in _linked(waiting.pop()):
            if not files.get_file_from_path(uri := _page_of(source)):
                content = source.read_text(encoding="utf-8")
                if source.suffix == ".md":
                    waiting.append(source)
                else:
                    content = _notebook(content) if source.suffix == ".ipynb" else _listing(source, content)
                given: dict[str, Any] = {"content": content, "inclusion": InclusionLevel.NOT_IN_NAV}
                files.append(File.generated(config, uri, **given))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    r"""Turns links to files into links to their pages, and ``\|`` in code, for git hosts, into ``|``."""
    here = page.file.src_uri
    if Path(here).with_suffix("").suffix not in ("", ".ipynb"):  # a listing
        return markdown
    source = ROOT / here.removeprefix("repository/") if here.startswith("repository/") else DOCS / here

    def follow(link: re.Match[str]) -> str:
        target = (source.parent / link[0]).resolve()
        return relpath(_page_of(target), dirname(here)) if target.is_file() else link[0]

    return CODE.sub(lambda code: code[0].replace(r"\|", "|"), LINK.sub(follow, markdown))


def _linked(source: Path) -> Iterator[Path]:
    """The text files that a page of Markdown links to."""
    for link in LINK.findall(source.read_text(encoding="utf-8")):
        target = (source.parent / link).resolve()
        if target.is_file() and _page_of(target).endswith(".md"):
            yield target


def _page_of(source: Path) -> str:
    """The address in the site's sources of what stands for a file of the repository."""
    inside = source.is_relative_to(DOCS)
    uri = (
        source.relative_to(DOCS).as_posix() if inside else f"repository/{source.relative_to(ROOT).as_posix()}"
    )
    is_shown = source.suffix not in {".md", ".png", ".webp", ".glb"}
    return f"{uri}.md" if is_shown else uri


def _listing(source: Path, text: str) -> str:
    language = {".py": "python", ".yaml": "yaml", ".cff": "yaml"}.get(source.suffix, "text")
    title = f"# `{source.relative_to(ROOT).as_posix()}`"
    return f"---\nsearch: {{exclude: true}}\n---\n{title}\n\n{_fenced(text, language)}"


def _notebook(text: str) -> str:
    """Its cells, with the texts and pictures that they gave."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _fenced(source, "python"))
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", ())})
            if "image/png" in data:
                parts.append(f"![](data:image/png;base64,{''.join(data['image/png'].split())})")
            else:
                parts.append(_fenced("".join(data["text/plain"]), "text"))
    return "\n\n".join(parts)


def _fenced(text: str, language: str) -> str:
    return f"~~~~~~ {language}\n{text}\n~~~~~~"
