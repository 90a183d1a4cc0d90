"""The config section of the viewer."""

from __future__ import annotations

from dataclasses import dataclass

from fourdfy.bounds import number


@dataclass(frozen=True, kw_only=True)
class ViewerConfig:
    """``viewer``: a page on which a scene is seen while it is trained (docs/viewer.md)."""

    enable: bool = False
    """Whether training opens the page; ``--view`` sets it."""
    host: str = "127.0.0.1"
    """Address that the page is served at. Whoever can reach it can pause the run, save and export."""
    port: int = number(8080, 0, 65535)
    """Port of the page; where it is taken, one of the next ones. 0: any that is free."""
    budget: float = number(0.1, above=0, high=1)
    """Share of the training time that the viewer may take. A run that is paused in the page waits for it."""
    size: int = number(512, 16, 4096)
    """Pixels along the longer side of an image at rest; while something moves, fewer."""
