"""Replay files: a training step whose numbers were not finite, to be repeated, and the search for the first.

A file holds the experiment's config, the scene as the step saw it, the batch, the states of torch's global
generators (a step's own draws follow from the seed), the losses and what was not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourdfy import __version__
from fourdfy.config import Component, ConfigError
from fourdfy.files.atomic import whole_file
from fourdfy.files.checksum import save_with_checksum
from fourdfy.files.safe_load import read_torch_file
from fourdfy.seeds import generator_states
from fourdfy.systems.base import System
from fourdfy.systems.finite import StepNumbers
from fourdfy.types import Cameras, StepBatch

REPLAY = Path("replay.pt")
"""Path of the newest replay file inside a trial folder."""

KEYS = ("config", "device", "step", "parts", "generators", "losses", "not_finite", "state_dict")
"""What a replay file holds."""

WATCHED = ("render", "encode", "predict", "guided_x0", "adjust")
"""Methods of scenes and priors that are no modules' forward passes, and whose results are looked at too."""


@dataclass
class StepRecord:
    """What a training step was computed from, besides the parameters."""

    generators: dict[str, Tensor]
    """States of torch's global generators before it, by type of device."""
    parts: list[StepBatch] = field(default_factory=list)
    """The batches, one for each part in which the step is accumulated."""
    buffers: list[Tensor] | None = None
    """Copies of the system's buffers as the step saw them; None: they are as they were."""

    @classmethod
    def begin(cls, device: torch.device) -> StepRecord:
        return cls(generator_states(device))

    def __str__(self) -> str:
        return f"global step {self.parts[-1].step}, a {self.parts[-1].kind} step"


def write_step(path: Path, system: System, numbers: StepNumbers, config: str) -> None:
    """Write the replay file of the ``StepRecord`` that ``numbers`` are of, atomically.

    Args:
        config: the content of the trial's ``parsed.yaml``.
    """
    record: Any = numbers.step
    # Which of the system's tensors were others then; the rest are as the step left them.
    as_seen = dict(zip(map(id, system.buffers()), record.buffers or (), strict=False))
    state = {k: as_seen.get(id(v), v).detach().cpu() for k, v in system.state_dict(keep_vars=True).items()}
    content = {
        "fourdfy": __version__,
        "config": config,
        "device": system.device.type,
        "step": record.parts[-1].step,
        "parts": [asdict(part.to("cpu")) for part in record.parts],
        "generators": record.generators,
        "losses": numbers.losses,
        "not_finite": numbers.wrong,
        "state_dict": state,
    }
    with whole_file(path, sync=True) as half_written:
        save_with_checksum(content, half_written)


def read_step(path: Path) -> dict[str, Any]:
    """The content of a replay file, its ``parts`` as batches; nothing in it can run code.

    Raises:
        ConfigError: no such file, or another kind of file.
    """
    problem = "is a folder" if path.is_dir() else "no such file"
    if path.is_file():
        try:
            content = read_torch_file(path)
        except ValueError as error:
            raise ConfigError(f"--replay {error}") from error
        try:
            parts = [
                StepBatch(**{**part, "cameras": Cameras(**part["cameras"])}) for part in content["parts"]
            ]
            return {key: content[key] for key in KEYS} | {"parts": parts}
        except (LookupError, TypeError):
            problem = "is a checkpoint" if "global_step" in content else "is a file of another kind"
    raise ConfigError(f"--replay {path}: {problem}; a step that is not finite writes <trial>/{REPLAY}")


def first_not_finite(
    system: System, parts: list[StepBatch], precision: Callable[[], AbstractContextManager] = nullcontext
) -> str:
    """Repeat a step without the optimizer; the first thing in it that is not finite, or "".

    Looked at, in this order: what the step is given (parameters, embeddings, noise levels, cameras), what
    every module and method of ``WATCHED`` is given and gives, the losses, the gradients of what modules give,
    and those of the parameters.

    Args:
        precision: the context of forward passes.
    """
    search = Search()
    for batch in parts:
        search.look("what the step is given:", batch)
    for name, thing in components(system):
        own = {key: value for key, value in vars(thing).items() if not key.startswith("_")}
        if isinstance(thing, nn.Module):
            own |= dict(thing.named_parameters(recurse=False))
        given = {f"{name}.{key}".removeprefix("."): value for key, value in own.items()}
        search.look("what the step is given:", given)
    if not search.found:
        with search.watching(system):
            for batch in parts:
                with precision():
                    out = system.training_step(batch)
                search.look("the losses", {**out.losses, "total": out.loss})
                (out.loss / len(parts)).backward()
        gradients = {name: p.grad for name, p in system.named_parameters() if p.grad is not None}
        search.look("the gradient of", gradients)
    return search.found


class Search:
    """Looks for the first tensor that is not finite."""

    def __init__(self) -> None:
        self.found = ""

    def look(self, what: str, values: Any) -> None:
        """Look at every tensor in ``values``: a tensor, or a record, list or dict of them."""
        for name, tensor in {} if self.found else _tensors(values):
            wrong = ~tensor.isfinite()
            if wrong.any():
                index = wrong.nonzero()[0].tolist()
                value = tensor[tuple(index)].item()
                place, count = f"{what} {name}".strip(" :"), f"{int(wrong.sum())} of {tensor.numel()}"
                self.found = f"{place}, {value} at {index} ({count} entries)"
                return

    @contextmanager
    def watching(self, system: System) -> Iterator[None]:
        """A context in which everything is looked at that the parts of ``system`` are given and give."""
        undo: list[Callable[[], Any]] = []
        try:
            for name, thing in components(system):
                if isinstance(thing, nn.Module):
                    given = partial(self._given, name)
                    undo.append(thing.register_forward_pre_hook(given, with_kwargs=True).remove)
                    undo.append(thing.register_forward_hook(partial(self._gives, name)).remove)
                for method in WATCHED:
                    if callable(getattr(thing, method, None)):
                        setattr(
                            thing, method, partial(self._call, f"{name}.{method}", getattr(thing, method))
                        )
                        undo.append(partial(delattr, thing, method))
            yield
        finally:
            for step in undo:
                step()

    def _given(self, name: str, module: Any, args: Any, keywords: Any) -> None:
        self.look(f"what {name} is given:", dict(enumerate(args)) | keywords)

    def _gives(self, name: str, module: Any, args: Any, result: Any) -> None:
        self.look(f"what {name} gives:", result)
        for _, tensor in _tensors(result):
            if tensor.requires_grad:
                tensor.register_hook(partial(self.look, f"the gradient of what {name} gives:"))

    def _call(self, name: str, method: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        result = method(*args, **keywords)
        self._gives(name, method, args, result)
        return result


def components(thing: Any, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Every module and component in ``thing``, itself first, with where it is; a frozen network inside of a
    prior too."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module | Component):
        yield name.removeprefix("scene."), thing
        inside = {**getattr(thing, "_modules", {}), **vars(thing)}
    elif isinstance(thing, tuple) and hasattr(thing, "_asdict"):
        inside = thing._asdict()
    else:
        return
    for key, part in inside.items():
        yield from components(part, f"{name}.{key}".removeprefix("."), seen)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of floats in ``value``, with where it is."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
        yield name, value
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    elif isinstance(value, list | tuple):
        value = getattr(value, "_asdict", lambda: dict(enumerate(value)))()
    for key, part in value.items() if isinstance(value, Mapping) else ():
        yield from _tensors(part, f"{name}.{key}".removeprefix("."))
