"""Learning-rate schedules (``system.scheduler``), and the optimizer state that a resumed run takes over.

A scheduler is a function of the global step alone: a resumed run builds it from its config and advances it
by as many steps. So the config's rates and options always apply, and only the optimizer's moments are read
from a checkpoint.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from fourdfy.config import ConfigError
from fourdfy.systems.optim import OPTION_BOUNDS

NEEDS_STATE = ("amsgrad", "centered", "momentum")
"""Options of optimizers that keep an additional moment, which can't be reconstructed for past steps."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """``system.scheduler``: a class of torch.optim.lr_scheduler with its arguments or parts."""

    name: str
    """A class of torch.optim.lr_scheduler."""
    interval: Literal["step"] = "step"
    """The scheduler takes a step after each of the optimizer's; epochs don't count: there is only one."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the scheduler."""
    schedulers: list[dict[str, Any]] = field(default_factory=list)
    """The parts of a SequentialLR or ChainedScheduler, in this same form."""
    milestones: list[int] = field(default_factory=list)
    """Global steps at which the next part of a SequentialLR takes over."""

    def __post_init__(self) -> None:
        try:
            self.build(torch.optim.AdamW([torch.zeros(1)]))
        except ValueError as error:
            raise ValueError(f"scheduler: {error}") from error

    def build(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """The scheduler, at step 0.

        Raises:
            ValueError: there is no such scheduler, or it doesn't accept the arguments; says which.
        """
        return _build(asdict(self), optimizer)

    def check(self, max_steps: int) -> None:
        """Step through a whole run, so that late failures show at once.

        Raises:
            ValueError: at one of the steps the scheduler fails, or a rate leaves the range of rates.
        """
        optimizer = torch.optim.AdamW([torch.zeros(1)])
        scheduler = self.build(optimizer)
        for step in range(max_steps):
            try:
                advance(scheduler, 1)
            except (ValueError, ArithmeticError) as error:
                raise ValueError(f"{self.name} fails at step {step + 1}: {error}") from error
            rate, bounds = float(optimizer.param_groups[0]["lr"]), OPTION_BOUNDS["lr"]
            if rate not in bounds:
                raise ValueError(
                    f"{self.name} makes {optimizer.defaults['lr']:g} a learning rate of {rate:g} at step "
                    f"{step + 1}; expected {bounds}"
                )


TAKERS = {"schedulers": ("SequentialLR", "ChainedScheduler"), "milestones": ("SequentialLR",)}
"""Which schedulers have these keys beside their ``args``."""


def _build(cfg: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> LRScheduler:
    name, args = cfg.get("name"), dict(cfg.get("args") or {})
    if unknown := cfg.keys() - SchedulerConfig.__dataclass_fields__.keys():
        raise ValueError(f"{sorted(unknown)[0]}: unknown key of a scheduler")
    if cfg.get("interval", "step") != "step":
        raise ValueError(
            f"interval={cfg['interval']!r}: there is one epoch, so it would never move; use step"
        )
    if not (cls := _classes().get(str(name))):
        guess = difflib.get_close_matches(str(name), _classes(), n=1)
        hint = f"did you mean {guess[0]!r}?" if guess else f"known: {', '.join(_classes())}"
        raise ValueError(f"name={name!r}: not in torch.optim.lr_scheduler, or it needs code; {hint}")
    for key, takers in TAKERS.items():
        if cfg.get(key) and name not in takers:
            raise ValueError(f"{key}: {name} takes none; {' and '.join(takers)} do, others have their args")
    try:
        if cls in (lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler):
            parts = [_build(part, optimizer) for part in cfg.get("schedulers") or ()]
            if cls is lr_scheduler.ChainedScheduler:
                return lr_scheduler.ChainedScheduler(parts, optimizer, **args)
            milestones = list(cfg.get("milestones") or ())
            return lr_scheduler.SequentialLR(optimizer, parts, milestones, **args)
        return cls(optimizer, **args)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{name}: {error}") from error


def _classes() -> dict[str, type[LRScheduler]]:
    """Schedulers by name, without those that take functions, or a measured value at each step."""
    not_data = ("LRScheduler", "LambdaLR", "MultiplicativeLR", "ReduceLROnPlateau")
    return {
        name: cls
        for name, cls in vars(lr_scheduler).items()
        if isinstance(cls, type) and issubclass(cls, LRScheduler) and name not in not_data and name[0] != "_"
    }


def advance(scheduler: LRScheduler, steps: int) -> None:
    """Take ``steps`` steps without the optimizer's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(steps):
            scheduler.step()


def continued(
    saved: Mapping[str, Any], saved_name: str | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The state for a new ``optimizer`` that continues a ``saved`` one: the new options, the saved moments.

    Args:
        saved: ``state_dict()`` of the saved optimizer.
        saved_name: its class; None in old checkpoints.

    Raises:
        ConfigError: the class or the groups differ, or an option needs moments that were not saved.
    """
    own, name = optimizer.state_dict(), type(optimizer).__name__
    if saved_name not in (None, name):
        raise _refusal("name", f"the class {saved_name}, not {name}")
    theirs = {group["name"]: group for group in saved["param_groups"]}
    ours = {group["name"]: group for group in own["param_groups"]}
    for group in sorted(theirs.keys() ^ ours.keys()):
        raise _refusal(f"params.{group}", "such a group" if group in theirs else "no such group")
    state: dict[int, Any] = {}
    for group, options in ours.items():
        before = theirs[group]
        counts = len(before["params"]), len(options["params"])
        if counts[0] != counts[1]:
            raise _refusal(f"params.{group}", f"{counts[0]} tensors there, not {counts[1]}")
        for key in NEEDS_STATE:
            if options.get(key) and not before.get(key):
                raise _refusal(f"args.{key}", f"no {key}")
        pairs = zip(before["params"], options["params"], strict=True)
        state |= {new: saved["state"][old] for old, new in pairs if old in saved["state"]}
    return {"state": state, "param_groups": own["param_groups"]}


def _refusal(key: str, was: str) -> ConfigError:
    return ConfigError(
        f"system.optimizer.{key}: the checkpoint's optimizer has {was}, so training can't go on from it; "
        "set the old value, or start anew from its scene: system.weights=CKPT in place of resume=CKPT"
    )
