"""Functions of tensors that are recorded as CUDA graphs, and replayed from then on.

A network of a thousand small kernels spends its time in launching them; a recording is one launch. Where
its memory lies is part of a recording, so:

- Arguments are copied to places outside of it, and results are copied out at once. Nothing else in the
  memory of a recording without gradients outlives a replay, so all of these share theirs: together they
  need as much as the largest.
- A function that runs beside others (``beside``) has memory and a stream of its own.
- What a recording with gradients keeps for its backward pass lies in memory of its own, and is there once:
  a second call before that backward pass is computed without the recording.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_replays: weakref.WeakSet[Replay] = weakref.WeakSet()

WARM_UP = 2
"""Calls of a kind before it is recorded; libraries load and choose their kernels in them."""
MOST = 8
"""Recordings of one function."""

Arguments = Sequence[Tensor | None]
Tensors = tuple[Tensor, ...]


class Replay:
    """A function of tensors; on CUDA each kind of call is recorded at its third time, and then replayed.

    A kind is the shapes, types and devices of the arguments, which of them learn, the states of autograd and
    autocast, and ``variant``, which stands for whatever else the function depends on. It must be computed
    from its arguments and from tensors that stay where they are (weights; their values may change), without
    random numbers and without reading a value on the host. Gradients reach its arguments and no other tensor.

    What can't be recorded is computed as without this class, with one warning that says why.

    Args:
        function: from tensors, some of them perhaps None, to a tensor or a tuple of tensors.
        name: for the warning.
        alone: none of its memory is shared, so that it may run beside others.
    """

    def __init__(self, function: Callable[..., Any], name: str, *, alone: bool = False) -> None:
        self.function, self.name, self.alone = function, name, alone
        self._calls: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording | None] = {}
        _replays.add(self)

    def __call__(self, *inputs: Tensor | None, variant: Hashable = None) -> Any:
        """The function of ``inputs``, in new tensors.

        Raises:
            RuntimeError: in the backward pass, if gradients of gradients are asked for.
        """
        graphs = graphs_of(_device(inputs))
        if graphs is None:
            return self.function(*inputs)
        kind = (variant, _kind(inputs))
        if kind not in self._recordings:
            self._calls[kind] += 1
            if self._calls[kind] <= WARM_UP:
                return self._checked(kind, inputs)
            self._recordings[kind] = self._recorded(graphs, inputs)
        recording = self._recordings[kind]
        if recording is None or recording.busy:
            with _as_recorded(inputs):
                return self.function(*inputs)
        results = recording(inputs)
        return results if recording.several else results[0]

    def _checked(self, kind: Hashable, inputs: Arguments) -> Any:
        """The function's own results, unless they carry gradients to what a recording would not know."""
        with _as_recorded(inputs):
            results = self.function(*inputs)
        if not _learns(inputs) and any(result.requires_grad for result in _tuple(results)):
            self._recordings[kind] = None
            self._warn("gradients reach more than its arguments")
        return results

    def _recorded(self, graphs: Graphs, inputs: Arguments) -> _Recording | None:
        if sum(recording is not None for recording in self._recordings.values()) == MOST:
            self._warn(f"there are {MOST} recordings of other shapes already")
            return None
        try:
            with graphs.lock:
                if _learns(inputs):
                    return _Learning(self.function, inputs, graphs, graphs.new_memory())
                memory = graphs.new_memory() if self.alone else graphs.shared_memory()
                return _Recording(self.function, inputs, graphs, memory)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            self._warn(f"{type(error).__name__}: {reason}")
            return None

    def _warn(self, reason: str) -> None:
        _warn_once(f"{self.name} can't be replayed as a CUDA graph and is launched anew each time: {reason}")


def release_recordings() -> None:
    """Free the memory of all recordings; each kind of call is recorded anew, from its third time on."""
    for replay in _replays:
        replay._calls.clear()
        replay._recordings.clear()


def beside(function: Callable[..., Any], *inputs: Tensor | None, **keywords: Any) -> Callable[[], Any]:
    """Start a function of tensors on a stream of its own, beside whatever is launched next.

    Returns:
        What waits for the function, and returns its results; it must be called. On the CPU, the function is
        computed before.
    """
    device = _device(inputs)
    if device.type != "cuda":
        results = function(*inputs, **keywords)
        return lambda: results
    here, own = torch.cuda.current_stream(device), _own_stream(device)
    own.wait_stream(here)
    with torch.cuda.stream(own):
        results = function(*inputs, **keywords)

    def wait(_inputs: Arguments = inputs) -> Any:  # whose memory is not given to others until then
        here.wait_stream(own)
        return results

    return wait


@cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Graphs:
    """The recorder of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.RLock()
        """Held while something is recorded, and from a replay until its results are copied."""
        self.stream = torch.cuda.Stream(device)
        self._shared, self._sharing = self.new_memory(), weakref.WeakSet[torch.cuda.CUDAGraph]()

    def shared_memory(self) -> Any:
        """The memory that recordings share; another one once all that lay in the last one are gone."""
        if not self._sharing:
            self._shared = self.new_memory()
        return self._shared

    def new_memory(self) -> Any:
        """A handle of memory that no recording lies in yet."""
        return torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensors], memory: Any) -> tuple[Callable[[], None], Tensors]:
        """(what repeats ``work``, the tensors in which its results then lie); nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.device.index]
        numbers = generator.clone_state()
        stream = torch.cuda.current_stream(self.device)
        if stream == torch.cuda.default_stream(self.device):
            stream = self.stream
        # Otherwise the stream is one that runs beside others: a recording holds on to the work space that
        # matrix products have on its stream, which two replays at once must not share.
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what others have freed, for this recording's memory
            # Other threads may go on to use the device.
            graph.capture_begin(pool=memory, capture_error_mode="thread_local")
            try:
                results = work()
            except BaseException:
                with suppress(RuntimeError):  # the recording is void; the cause is what matters
                    graph.capture_end()
                generator.graphsafe_set_state(numbers)  # it waits for the end of the recording
                raise
            graph.capture_end()
        if memory == self._shared:
            self._sharing.add(graph)
        return graph.replay, results


@cache
def graphs_of(device: torch.device) -> Graphs | None:
    """The recorder of a device; None if it has no graphs."""
    return Graphs(device) if device.type == "cuda" else None


class _Recording:
    """A function of one kind of arguments, without gradients."""

    learns = False
    busy: Any = False

    def __init__(self, function: Callable[..., Any], inputs: Arguments, graphs: Graphs, memory: Any) -> None:
        self.inputs = [x if x is None else x.detach().clone() for x in inputs]
        for place, given in zip(self.inputs, inputs, strict=True):
            if self.learns and place is not None and given is not None:
                place.requires_grad_(given.requires_grad)
        self.function, self.several, self.lock = function, False, graphs.lock
        self.with_graph = torch.is_grad_enabled()
        self.replay, self.results = graphs.record(self._call, memory)

    @torch.no_grad()
    def __call__(self, inputs: Arguments) -> Tensors:
        with self.lock:
            _copy(self.inputs, inputs)
            self.replay()
            return tuple(result.clone() for result in self.results)

    def _call(self) -> Tensors:
        with _as_recorded(self.inputs), torch.set_grad_enabled(self.with_graph):
            results = self.function(*self.inputs)
        self.several = isinstance(results, tuple)
        return _tuple(results)


class _Learning(_Recording):
    """A function of one kind of arguments, with its backward pass."""

    learns = True

    def __init__(self, function: Callable[..., Any], inputs: Arguments, graphs: Graphs, memory: Any) -> None:
        self.owner: weakref.ref | None = None
        super().__init__(function, inputs, graphs, memory)
        self.upstream = [torch.empty_like(x) for x, on in zip(self.results, self.learned, strict=True) if on]
        self.replay_backward, self.grads = graphs.record(self._differentiate, memory)
        self.graph: Tensors = ()  # nothing else is recorded into this memory, so what it kept stays there

    @property
    def busy(self) -> bool:
        """Whether the backward pass of the last call may still come."""
        return self.owner is not None and self.owner() is not None

    def __call__(self, inputs: Arguments) -> Tensors:
        return _Replayed.apply(self, *inputs)

    def backward(self, upstream: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of all arguments, None for those that do not learn, from those of all results."""
        with self.lock:
            _copy(self.upstream, [x for x, on in zip(upstream, self.learned, strict=True) if on])
            self.replay_backward()
            grads = iter(self.grads)
            return [next(grads).clone() if x is not None and x.requires_grad else None for x in self.inputs]

    def _call(self) -> Tensors:
        results = super()._call()
        self.learned = [result.requires_grad for result in results]
        self.graph = tuple(result for result in results if result.requires_grad)
        return tuple(result.detach() for result in results)

    def _differentiate(self) -> Tensors:
        learning = [x for x in self.inputs if x is not None and x.requires_grad]
        return torch.autograd.grad(self.graph, learning, self.upstream)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recording, *inputs):
        results = _Recording.__call__(recording, inputs)
        ctx.recording, ctx.token = recording, _Token()
        recording.owner = weakref.ref(ctx.token)
        ctx.mark_non_differentiable(*(x for x, on in zip(results, recording.learned, strict=True) if not on))
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        recording = ctx.recording
        if recording.owner is None or recording.owner() is not ctx.token:
            raise RuntimeError("a replayed function has one backward pass for each call")
        grads = recording.backward(upstream)
        recording.owner = None
        return None, *grads


class _Token:
    """Lives as long as the autograd graph of a call."""


def _as_recorded(inputs: Arguments) -> torch.autocast:
    """Autocast as it is, but without its cache: a weight that was cast outside of a recording would be gone.

    Calls before the recording have no cache either: torch.compile makes other code where there is one, and
    nothing can be compiled in a recording.
    """
    device = _device(inputs).type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _kind(inputs: Arguments) -> Hashable:
    learns, device = torch.is_grad_enabled(), _device(inputs).type
    tensors = (x if x is None else (x.shape, x.dtype, x.device, learns and x.requires_grad) for x in inputs)
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return *tensors, learns, autocast, torch.are_deterministic_algorithms_enabled()


def _learns(inputs: Arguments) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _device(inputs: Arguments) -> torch.device:
    return next(x.device for x in inputs if x is not None)


def _copy(places: Arguments, values: Arguments) -> None:
    for place, value in zip(places, values, strict=True):
        if place is not None and value is not None:
            place.copy_(value)


def _tuple(results: Any) -> Tensors:
    return results if isinstance(results, tuple) else (results,)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
