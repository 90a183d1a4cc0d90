"""Safe reading of torch files: tensors and plain values come out, and no code in them is run.

A pickle is a program that may call anything by name. Here only a handful of names that build tensors and
containers are allowed; every other one becomes an inert ``Placeholder``.
"""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TENSOR_BUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
"""The functions of ``torch._utils`` that dense tensors are pickled with."""

CONTAINERS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}
"""Classes that may be built; a pickle can change none of them."""


def read_torch_file(path: str | Path) -> dict[str, Any]:
    """The dict that ``torch.save`` wrote into ``path``, with its tensors on the CPU.

    torch's own ``weights_only`` reader comes first; files that it refuses, such as Lightning checkpoints
    with pickled settings and callbacks, are read with their foreign objects as ``Placeholder``. Files of
    the zip format are mapped into memory: what isn't used is never read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a torch file, not a dict, or a file that can't be read without running code in it.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(4)
    if tarfile.is_tarfile(path):
        raise ValueError(f"{path} is a tar file (torch before 0.4): save it again with a newer torch")
    mmap = zipfile.is_zipfile(path)
    if not start or (start == b"PK\x03\x04" and not mmap):
        raise ValueError(f"{path} is {'cut short' if start else 'empty'}")
    try:
        try:
            content = torch.load(path, "cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:
            # Our own unpickler, which looks nothing up, instead of torch's.
            content = torch.load(path, "cpu", InertPickle, weights_only=False, mmap=mmap)
    except Exception as error:  # a broken pickle may fail in any way
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{path} can't be read as a torch file ({type(error).__name__}: {reason}); is it cut short?"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict of tensors")
    return content


class Placeholder:
    """Replaces an object of a foreign class; ``state`` is what the file holds of it."""

    def __init__(self, *state: Any, **_options: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<placeholder of {type(self).__module__}.{type(self).__name__}>"

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...

    def __call__(self, *_args: Any, **_options: Any) -> Placeholder:
        return self


class InertUnpickler(pickle.Unpickler):
    """An unpickler that looks nothing up: neither modules nor classes, only the tables above."""

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) in CONTAINERS:
            return CONTAINERS[module, name]
        if module == "torch._utils" and name in TENSOR_BUILDERS:
            return _once(getattr(torch._utils, name))
        if (module, name) == ("_codecs", "encode"):  # bytes, in the older pickle protocols
            return _once(lambda text, _encoding: text.encode("latin1"))
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return type(name, (Placeholder,), {"__module__": module})


class InertPickle:
    """The interface that ``torch.load`` needs of a pickle module."""

    Unpickler = InertUnpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return InertUnpickler(file, **options).load()


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A new function around another: a pickle may set attributes on what it is given."""

    def call(*args: Any) -> Any:
        return function(*args)

    return call
