"""One operation, one definition in plain torch, several speeds: which back end computes a call.

An operation is a package of ``ops`` with a module per back end; all of these have the same functions. A
back end's optional packages are imported inside its own module only.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

REFERENCE = "torch"
"""The back end that defines an operation: any device, any float dtype, gradients of any order."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Operation:
    """The back ends of one operation, and the choice between them."""

    name: str
    """What messages call it: ``hash grid``."""
    package: str
    """``__name__`` of the package of its back ends."""
    modules: Mapping[str, str]
    """Back end -> its module, relative to ``package``; imported on first use."""
    fastest: Mapping[str, str]
    """Device type -> its fast back end, which needs the Python package of the same name."""
    sample: Callable[[ModuleType, torch.device, Any], Sequence[Tensor]]
    """A back end's values and all its gradients for some inputs on a device. The last argument is the
    ``family`` of the call that caused the check."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    """What the fast back ends compute."""
    unrepeatable: tuple[str, ...] = ()
    """Back ends whose last bits differ from run to run, so not for
    ``torch.use_deterministic_algorithms``."""
    tolerance: float = 1e-3
    """Bound of a fast back end's mean error relative to the reference's mean size, in ``agrees``."""

    def select(self, backend: str, example: Tensor, family: Hashable = None) -> ModuleType:
        """The module that computes a call.

        Args:
            backend: the name of a back end, or ``auto``: the device's fast one if it is installed,
                serves the dtype, may be used and agrees with the reference; else the reference.
            example: a tensor of the call; its device and dtype count.
            family: what decides which code a fast back end runs; each is checked once.

        Raises:
            ValueError: the back end asked for is unknown or not installed.
        """
        if backend == "auto":
            backend = self.pick(example)
            # Triton's kernels are compiled on the spot by the version that is installed.
            if backend == "triton" and not self.agrees(backend, example.device, family):
                backend = REFERENCE
            _log_once(self.name, backend, example.device.type, str(example.dtype))
        return self.load(backend)

    def pick(self, example: Tensor) -> str:
        """The fastest back end that is installed and serves the device and dtype of ``example``."""
        name = self.fastest.get(example.device.type, REFERENCE)
        repeatable = name not in self.unrepeatable or not torch.are_deterministic_algorithms_enabled()
        if name == REFERENCE or example.dtype not in self.dtypes or not repeatable or not is_installed(name):
            return REFERENCE
        return name

    @cache  # noqa: B019 - an operation is made once, at import
    def agrees(self, backend: str, device: torch.device, family: Hashable = None) -> bool:
        """Whether a back end gives the reference's ``sample`` on this device; a warning says if not."""
        try:
            with torch.enable_grad():
                pairs = zip(
                    *(self.sample(self.load(name), device, family) for name in (backend, REFERENCE)),
                    strict=True,
                )
                # Means are compared, because rounding may decide otherwise at single points, such as
                # those at a cell's border.
                errors = [float((ours - theirs).abs().mean() / theirs.abs().mean()) for ours, theirs in pairs]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # anything that a compiler or a driver raises
            trouble = f"{type(error).__name__}: {error}"
        else:
            if all(error < self.tolerance for error in errors):
                return True
            trouble = f"its relative errors are {', '.join(f'{error:.1e}' for error in errors)}"
        logger.warning(
            "the %s back end of the %s does not work here (%s); the slow one is used",
            backend,
            self.name,
            trouble,
        )
        return False

    @cache  # noqa: B019
    def load(self, backend: str) -> ModuleType:
        """A back end's module.

        Raises:
            ValueError: it is unknown or not installed.
        """
        self.check(backend)
        try:
            return import_module(self.modules[backend], self.package)
        except ImportError as error:
            raise ValueError(
                f"the {backend} back end of the {self.name} needs {error.name}: "
                f"pip install {error.name}, or use backend=auto"
            ) from error

    def check(self, backend: str) -> None:
        """Raise a ValueError unless ``backend`` is ``auto`` or the name of a back end."""
        if backend != "auto" and backend not in self.modules:
            raise ValueError(f"{self.name} back end {backend!r}: expected auto, {', '.join(self.modules)}")


@cache
def is_installed(package: str) -> bool:
    """Whether a back end's package can be used; a warning says what to install if not."""
    if package == "triton" and not _has_c_compiler():
        logger.warning(
            "no C compiler, which Triton starts its kernels with: the hash grid and other operations will "
            "be slow; install gcc"
        )
        return False
    if find_spec(package) is None:
        logger.warning(
            "%s is not installed: the hash grid and other operations will be slow; pip install %s",
            package,
            package,
        )
        return False
    return True


def _has_c_compiler() -> bool:
    return bool(os.environ.get("CC")) or any(shutil.which(name) for name in ("gcc", "clang", "cc"))


@cache
def _log_once(name: str, backend: str, device: str, dtype: str) -> None:
    logger.debug("%s: %s back end for %s on %s", name, backend, dtype, device)
