"""A recorder for computers without a GPU."""

from __future__ import annotations

import threading

from fourdfy.ops.replay import Graphs


class FakeGraphs(Graphs):
    """A replay computes again, into the same tensors, what was recorded."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def shared_memory(self):
        return "shared"

    def new_memory(self):
        return object()

    def record(self, work, memory):
        assert self.lock.locked()
        results = work()

        def repeat() -> None:
            assert self.lock.locked()
            for place, value in zip(results, work(), strict=True):
                place.copy_(value)

        return repeat, results
