"""What the viewer and its page know of each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from fourdfy.callbacks.base import Run
from fourdfy.files.images import Pixels
from fourdfy.viewing.pace import Playback
from fourdfy.viewing.progress import Progress
from fourdfy.viewing.views import Eye


@dataclass
class Controls:
    """What the widgets say. The page's threads write it, the viewer reads it."""

    view: str = "rgb"
    beside_truth: bool = False
    playback: Playback = field(default_factory=Playback)
    paused: bool = False
    requests: deque[tuple[str, ...]] = field(default_factory=deque)
    """``("save",)``, ``("export",)`` or ``("look", KIND)``, in the order of the clicks, until done."""

    def ask(self, *request: str) -> None:
        """Add a request, unless it is pending already."""
        if request not in self.requests:
            self.requests.append(request)


@dataclass(frozen=True)
class Scenery:
    """What a page needs to know of the scene when it is opened."""

    label: str
    prompt: str | None
    step: int
    dynamic: bool
    has_truth: bool
    eye: Eye
    """Where the camera is at first."""
    kinds: tuple[str, ...]
    """The kinds of step that are trained; none: the scene is finished."""


@runtime_checkable
class Page(Protocol):
    """Where images and panels are shown; ``viewing.page`` has the real one."""

    controls: Controls

    def eyes(self) -> Mapping[int, Eye]:
        """The cameras of all that look on, by client."""

    def show(self, client: int, image: Pixels) -> None:
        """Put an image behind everything."""

    def show_time(self, moment: float) -> None:
        """Move the time slider."""

    def show_paused(self) -> None:
        """Show whether the run is paused."""

    def tell(self, progress: Progress, run: Run, taken: float) -> None:
        """Update the panels of a training."""

    def show_look(self, kind: str, images: Mapping[str, Pixels]) -> None:
        """Show what the prior of a kind of step saw."""

    def notify(self, text: str) -> None:
        """Say something to all."""

    def close(self) -> None: ...
