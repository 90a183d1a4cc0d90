"""HTML pages that need no other file: one look, one way to move, and a policy that lets nothing be loaded.

Every text of a user goes through ``escaped`` or ``data``. The policy is a second wall: a browser runs no
script but the page's own and makes no request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BAR = (
    '<div id="bar"><button type="button" id="play" aria-label="play or pause">&#10074;&#10074;</button>'
    '<input type="range" id="time" min="0" max="1" step="any" value="0" aria-label="time">'
    '<output id="now" for="time"></output></div>'
)
"""What moves all that ``player.js`` shows; ``#t=0.5`` in a page's address stops it at that moment."""


def page(
    title: str,
    body: str,
    *,
    scripts: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    allowed: str = "",
) -> str:
    """A whole page.

    Args:
        body: HTML, in which texts are escaped; neither ``style`` nor ``on...`` attributes have an effect.
        scripts: files beside this one, in the order in which they run.
        data: what they find, as JSON, in the element ``data``.
        allowed: what the policy lets the page load, such as ``media-src 'self'``.
    """
    style = _file("style.css")
    script = "".join(_file(name) for name in scripts)
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'; {allowed}"
    )
    # "<" could end the element.
    held = json.dumps(data or {}).replace("<", r"\u003c")
    whole = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{style}</style></head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{held}</script>\n<script>{script}</script>\n'
        "</body></html>\n"
    )
    return whole.encode(errors="replace").decode()  # a command line may hold half characters


def escaped(value: object) -> str:
    """A text as HTML, also inside of a quoted attribute."""
    return html.escape(str(value), quote=True)


def table(rows: Iterable[tuple[str, Iterable[object]]], head: Sequence[object] = ()) -> str:
    """Rows of a name and its values; "" if there are none."""
    lines = [
        f"<tr><th>{escaped(name)}</th>{''.join(f'<td>{escaped(v)}</td>' for v in of)}</tr>"
        for name, of in rows
    ]
    if not lines:
        return ""
    top = f"<tr><th></th>{''.join(f'<th>{escaped(name)}</th>' for name in head)}</tr>" if head else ""
    return f'<div class="wide"><table>{top}{"".join(lines)}</table></div>'


def section(title: str, content: str) -> str:
    """A headed part of a page; "" without content."""
    return f"<section><h2>{escaped(title)}</h2>{content}</section>" if content else ""


def preformatted(content: str, caption: str = "") -> str:
    """Plain text in lines; "" without content."""
    below = f'<p class="soft">{escaped(caption)}</p>' if caption else ""
    return f"<pre>{escaped(content)}</pre>{below}" if content else ""


def data_url(content: bytes, kind: str) -> str:
    """Bytes of a MIME type, as an address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
