"""torch.compile for large frozen networks, whose calls are replayed as CUDA graphs (``ops.replay``).

A CUDA graph spares the launches and changes nothing else. Compiling also joins what lies between
convolutions, matrix products and attention: results differ by rounding, of which there is less. It takes
a minute or two for a network, and its results are kept below the project's cache.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fourdfy.priors.base import Network
from fourdfy.priors.frozen import to_channels_last
from fourdfy.priors.hub import cache_root

logger = logging.getLogger(__name__)

LARGE = 100_000_000
"""Parameters from which on a network earns back the time of compiling it."""

BLOCKS = ("down_blocks", "mid_block", "up_blocks")
"""Where the layers of a diffusers U-Net are that are compiled (residual blocks, transformers, convolutions
in time), each for itself, so that equal ones share what is made for one. A transformer's are its ``blocks``
or ``transformer_blocks``.
The embedding of the noise level is not among them: hooks may add to it (``guidance.vsd``), which compiled
code would not notice."""

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

VERSIONS = 256
"""Compiled versions of one piece of code: all layers of a class share theirs, in all networks."""


def compiled(
    function: Callable[..., Any], network: Network, name: str, *, small_too: bool
) -> Callable[..., Any]:
    """``function``, which calls ``network``, with its weights channels last and, if it is large, compiled.

    Args:
        name: for messages.
        small_too: compile a small network as well.
    """
    to_channels_last(network)
    if small_too or sum(parameter.numel() for parameter in network.parameters()) > LARGE:
        return Compiled(function, network, name)
    return function


class Compiled:
    """A function that calls a network, whose layers are compiled in the first call of each kind.

    If that fails, the function is called as it is, after one warning that says why.
    """

    def __init__(self, function: Callable[..., Any], network: Network, name: str) -> None:
        self.function, self.name = function, name
        self.layers, self.called = list(_layers(network)), False
        if not self.layers:
            logger.warning("%s can't be compiled: no layers in its %s", name, ", ".join(BLOCKS))

    def __call__(self, *inputs: Any) -> Any:
        if not self.layers:
            return self.function(*inputs)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self._compiled(*inputs)  # all is compiled by now: an error is the recorder's
        try:
            return self._compiled(*inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            for layer in self.layers:
                layer._compiled_call_impl = None
            self.layers = []
            results = self.function(*inputs)  # raises the error again if compiling is not its cause
            reason = str(error).strip().partition("\n")[0]
            logger.warning("%s can't be compiled: %s: %s", self.name, type(error).__name__, reason)
            return results

    def _compiled(self, *inputs: Any) -> Any:
        import torch._dynamo as dynamo

        place = _cache()
        if not self.called:
            self.called = True
            logger.info("%s: compiling, for a minute or two unless %s holds it", self.name, place)
        for layer in self.layers:
            if layer._compiled_call_impl is None:
                layer.compile(dynamic=False)
        began, made = time.perf_counter(), dynamo.utils.counters["stats"]["unique_graphs"]
        with dynamo.config.patch(recompile_limit=VERSIONS):
            results = self.function(*inputs)
        if dynamo.utils.counters["stats"]["unique_graphs"] > made:
            seconds = time.perf_counter() - began
            logger.info("%s: compiled in %.0f s; kept in %s", self.name, seconds, place)
        return results


def _cache() -> str:
    """The folder of compiled code: what the user has set, or else below the project's cache."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Importing the compiler sets the variable to its own default, which a restart may empty.
    if os.environ.get(CACHE_VARIABLE) in (None, default_cache_dir()):
        os.environ[CACHE_VARIABLE] = str(cache_root() / "compiled")
    return os.environ[CACHE_VARIABLE]


def _layers(network: Network) -> Iterator[nn.Module]:
    if first := getattr(network, "transformer_in", None):
        yield first
    for blocks in ("blocks", "transformer_blocks"):
        yield from getattr(network, blocks, ())
    for part in (getattr(network, name, None) for name in BLOCKS):
        for block in part if isinstance(part, nn.ModuleList) else [part] if part else []:
            for child in block.children():
                yield from child if isinstance(child, nn.ModuleList) else []
