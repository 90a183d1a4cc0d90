"""How much time the viewer takes, how large it renders, and which moment it shows. Clocks are in seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

Clock = Callable[[], float]

SAVED_SECONDS = 0.5
"""Most time that a budget saves up, and that an image takes while a scene is trained."""
MOVING_SECONDS = 0.05
"""Most time that an image takes while something moves, unless the smallest takes longer."""
REST_SECONDS = 0.3
"""After which a view that has not changed is at rest."""
SMALLEST = 64
"""Pixels along the longer side of the smallest image."""
LOOP_SECONDS = 2.0
"""How long the scene's time from 0 to 1 lasts at speed 1."""


class Budget:
    """A share of the time that goes by. An image that takes longer than expected overdraws it; then nothing
    is rendered until that is paid."""

    def __init__(self, share: float, clock: Clock = time.perf_counter) -> None:
        self.share, self._clock = share, clock
        self._saved, self._spent, self._waited = SAVED_SECONDS, 0.0, 0.0
        self._began = self._at = clock()

    @property
    def room(self) -> float:
        """Seconds that may be spent now; below 0 if it is overdrawn."""
        now = self._clock()
        self._saved = min(self._saved + self.share * (now - self._at), SAVED_SECONDS)
        self._at = now
        return self._saved

    @property
    def taken(self) -> float:
        """The share that was spent so far."""
        return self._spent / max(self._clock() - self._began - self._waited, 1e-6)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """What happens inside is paid for."""
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            self._saved, self._spent = self.room - seconds, self._spent + seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside does not count, neither as spent nor as gone by."""
        began, saved, spent = self._clock(), self.room, self._spent
        try:
            yield
        finally:
            self._at = self._clock()
            self._saved, self._spent = saved, spent
            self._waited += self._at - began


class Refinement:
    """The sizes of a page's images: small while anything changes, larger step by step at rest."""

    def __init__(self, largest: int) -> None:
        halved = [largest >> count for count in range(largest.bit_length())]
        self.sizes = sorted(size for size in halved if size >= SMALLEST) or [largest]
        """Pixels along the longer side, ascending."""
        self.shown_at = -math.inf
        self._view: Hashable = None
        self._step = self._size = 0
        self._changed, self._seconds_per_pixel = -math.inf, 0.0

    def next_size(
        self, view: Hashable, step: int, now: float, room: float, most: float = SAVED_SECONDS
    ) -> int | None:
        """The size to render ``view`` at now; None: what is shown is good, or the time must be saved first.

        Args:
            step: the scene changes with it.
            room: seconds that may be spent.
            most: seconds that an image at rest may take.
        """
        if view != self._view:
            self._view, self._changed, self._size = view, now, 0
        if is_moving := self._size == 0 or now - self._changed < REST_SECONDS:
            most = min(most, MOVING_SECONDS)
        is_known = self._seconds_per_pixel > 0
        fitting = [size for size in self.sizes if is_known and self._seconds(size) <= most] or self.sizes[:1]
        larger = [] if is_moving else [size for size in fitting if size > self._size]
        size = larger[0] if larger else fitting[-1]
        if size <= self._size and step == self._step:
            return None
        return size if room >= min(self._seconds(size), SAVED_SECONDS) else None

    def shown(self, step: int, size: int, seconds: float, now: float) -> None:
        """Note that the last view was rendered."""
        self._step, self._size, self.shown_at = step, size, now
        self._seconds_per_pixel = seconds / size**2

    def _seconds(self, size: int) -> float:
        """How long an image takes, after the last one; 0 before the first."""
        return self._seconds_per_pixel * size**2


class Playback:
    """The scene's time that is shown, 0..1."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.is_playing, self.ping_pong, self.speed = False, False, 1.0
        self._clock, self._phase, self._at = clock, 0.0, clock()

    def seek(self, moment: float) -> None:
        self._phase = moment

    def now(self) -> float:
        """The moment of now. At its end the clip begins again, or with ``ping_pong`` runs back."""
        now = self._clock()
        if self.is_playing:
            self._phase += self.speed * (now - self._at) / LOOP_SECONDS
            self._phase %= 2 if self.ping_pong else 1
        self._at = now
        return 1 - abs(self._phase - 1)
