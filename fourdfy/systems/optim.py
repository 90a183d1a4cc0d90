"""Optimizer groups by dotted path, and an audit of their first gradients."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fourdfy.bounds import Bounds
from fourdfy.config import ConfigError, keyed_by_path

logger = logging.getLogger(__name__)

OPTION_BOUNDS = {"lr": Bounds(0, 1000), "eps": Bounds(high=1, above=0), "weight_decay": Bounds(0, 1000)}
"""Ranges of optimizer options; values outside diverge, or divide by zero if a gradient is zero."""

NOTHING_LEARNS = "system.optimizer.params: no group holds anything that this stage trains"
FUSED = ("Adam", "AdamW", "SGD")
"""Classes of torch.optim with fused kernels for CUDA."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """``system.optimizer``: a class of torch.optim, its arguments, and learning rates by path."""

    name: str = "AdamW"
    """A class of torch.optim."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the optimizer, for every group. On a GPU, ``fused`` is true unless they say otherwise, for
    the classes that have it."""
    params: dict[str, Any] = keyed_by_path()
    """Dotted path from the system (``geometry.encoding``) -> group options (``{lr: 0.01}``); null
    switches an inherited group off. Parameters that no path names are not trained; without paths, all are."""

    def __post_init__(self) -> None:
        if not _is_optimizer(self.name):
            raise ValueError(f"name={self.name!r}: no such class in torch.optim, e.g. AdamW")
        self._check("args", self.args)
        for path, options in self.params.items():
            if options is not None and not isinstance(options, Mapping):
                raise ValueError(f"params.{path}={options!r}: expected options such as {{lr: 0.01}}")
            self._check(f"params.{path}", options or {})

    def _check(self, place: str, options: Mapping[str, Any]) -> None:
        """Raise a ValueError unless the optimizer takes these options, with these values."""
        known = [*inspect.signature(getattr(torch.optim, self.name)).parameters][1:]
        for key in options.keys() - known:
            guess = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {guess[0]!r}?" if guess else f"known: {', '.join(known)}"
            raise ValueError(f"{place}.{key}: {self.name} has no such option; {hint}")
        for key in OPTION_BOUNDS.keys() & options.keys():
            value = options[key]
            if not isinstance(value, int | float):
                raise ValueError(f"{place}.{key}={value!r}: expected a number, {OPTION_BOUNDS[key]}")
            if value not in OPTION_BOUNDS[key]:
                raise ValueError(
                    f"{place}.{key}: {value:g} is outside the range; expected {OPTION_BOUNDS[key]}"
                )
        if problem := self._refusal({**self.args, **options}):
            alone = ((key, self._refusal({key: value})) for key, value in options.items())
            key, problem = next(((key, why) for key, why in alone if why), ("", problem))
            given = f".{key}={options[key]!r}" if key else f"={options!r}"
            raise ValueError(f"{place}{given}: {self.name} refuses it: {problem}")

    def _refusal(self, options: Mapping[str, Any]) -> str:
        """The error of the optimizer's constructor for these options; "" if it accepts them."""
        # Its decorator imports torch._dynamo, which takes longer than all the rest of parsing.
        plain = inspect.unwrap(torch.optim.Optimizer.add_param_group)
        probe = type("Probe", (getattr(torch.optim, self.name),), {"add_param_group": plain})
        try:
            probe([torch.zeros(1, 1)], **options)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            return str(error)
        return ""


def parameter_groups(
    system: nn.Module,
    params: Mapping[str, Any],
    *,
    absent: Collection[str] = (),
    untrained: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """One optimizer group for each path, in order; a parameter belongs to the most specific path.

    Args:
        params: group options by path; if empty, one group holds everything that is trained.
        absent: optional parts that this system lacks; their groups are left out.
        untrained: parameters that no step trains; like frozen ones, they are in no group.

    Raises:
        ConfigError: a path leads nowhere or to no parameter (says which exist), or nothing is left to train.
    """
    wanted = parameters_of(system, params, absent)
    if not params:
        wanted, params = {"system": list(system.parameters())}, {"system": {}}
    owner: dict[int, str] = {}
    for path in sorted(wanted, key=lambda path: -path.count(".")):
        for parameter in wanted[path]:
            owner.setdefault(id(parameter), path)

    groups, frozen_ids = [], {id(parameter) for parameter in untrained}
    for path, parameters in wanted.items():
        own = [p for p in parameters if owner[id(p)] == path]
        if learning := [p for p in own if p.requires_grad and id(p) not in frozen_ids]:
            groups.append({"params": learning, "name": path, **params[path]})
        else:
            logger.info("system.optimizer.params: no step of this stage trains %s", path)
    if not groups:
        raise ConfigError(NOTHING_LEARNS)
    return groups


def parameters_of(
    system: nn.Module, params: Mapping[str, Any], absent: Collection[str]
) -> dict[str, list[nn.Parameter]]:
    """Path -> the parameters that it names, without paths that are null or in a part that is ``absent``.

    Raises:
        ConfigError: a path leads nowhere or to no parameter; says which exist.
    """
    found = {path: _parameters_at(system, path) for path in params if path.split(".")[0] not in absent}
    for path, parameters in found.items():
        if not parameters and params[path] is not None:
            raise ConfigError(
                f"system.optimizer.params: {path!r} holds no parameter; "
                f"groups could be: {', '.join(_groups_of(system))}"
            )
    return {path: parameters for path, parameters in found.items() if params[path] is not None}


def build_optimizer(
    cfg: OptimizerConfig,
    system: nn.Module,
    *,
    absent: Collection[str] = (),
    untrained: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The optimizer over the configured groups of ``system``; parameters in no group are frozen for good.

    See ``parameter_groups`` for the arguments.
    """
    groups = parameter_groups(system, cfg.params, absent=absent, untrained=untrained)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    for parameter in system.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    return getattr(torch.optim, cfg.name)(groups, **fused_by_default(cfg.name, cfg.args, groups))


def fused_by_default(
    name: str, args: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]
) -> Mapping[str, Any]:
    """``args``, with one kernel for all tensors of a group where they are on a GPU and nothing forbids it."""
    given = args.keys() | {key for group in groups for key in group}
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    chosen = given & {"fused", "foreach", "capturable", "differentiable"}
    return {**args, "fused": True} if name in FUSED and on_gpu and not chosen else args


def _is_optimizer(name: str) -> bool:
    found = getattr(torch.optim, name, None)
    return isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and name != "Optimizer"


def _parameters_at(system: nn.Module, path: str) -> list[nn.Parameter]:
    scene = getattr(system, "scene", system)  # its parts need not be called scene.geometry
    node: Any = scene if hasattr(scene, path.split(".")[0]) else system
    for name in path.split("."):
        if not hasattr(node, name):
            places = (scene, system) if node is system else (node,)
            modules = [place for place in places if isinstance(place, nn.Module)]
            children = [key for module in modules for key in (*module._modules, *module._parameters)]
            guess = difflib.get_close_matches(name, children, n=1)
            groups = f"groups could be: {', '.join(_groups_of(system))}"
            hint = f"did you mean {guess[0]!r}?" if guess else groups
            raise ConfigError(f"system.optimizer.params: {path!r} leads nowhere at {name!r}; {hint}")
        node = getattr(node, name)
    return [node] if isinstance(node, nn.Parameter) else list(node.parameters())


def _groups_of(system: nn.Module) -> list[str]:
    """Paths worth naming in a message: modules with parameters, two levels down."""
    names = (name.removeprefix("scene.") for name, p in system.named_parameters() if p.numel())
    return sorted({".".join(name.split(".")[:2]) for name in names})


@contextmanager
def frozen(parameters: Iterator[nn.Parameter]) -> Iterator[None]:
    """No gradient reaches ``parameters`` from what is computed inside; restored on error too."""
    switched = [p for p in parameters if p.requires_grad]
    for parameter in switched:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in switched:
            parameter.requires_grad_(True)


@dataclass
class GradientAudit:
    """Records which groups get a gradient at the first step of each kind, and how much.

    A LoRA that never trains, or a grid that nothing reaches, is a bug that no loss curve shows.
    """

    kinds: frozenset[str]
    """The step kinds of the plan."""
    norms: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Step kind -> group name -> gradient norm, None without any gradient."""
    images: dict[str, Tensor] = field(default_factory=dict)
    """Step kind -> norm of the gradient at its rendered images."""

    def is_new(self, kind: str) -> bool:
        return kind not in self.norms

    def watch(self, kind: str, images: Tensor) -> None:
        """Note the gradient that a step's losses will send to its images, unless nothing learns from it."""
        if images.requires_grad:
            self.images[kind] = images.new_zeros(())
            images.register_hook(lambda gradient: self.images.update({kind: gradient.norm()}))

    def record(self, kind: str, groups: list[dict[str, Any]]) -> str:
        """Note the gradients of a step kind; returns the table to log.

        Raises:
            RuntimeError: all kinds have been seen and a group of positive rate never got a gradient.
        """
        self.norms[kind] = {group["name"]: gradient_norm(group["params"]) for group in groups}
        rows = [
            f"  {group['name']:<45} {sum(p.numel() for p in group['params']):>12,} parameters  "
            + ("no gradient" if norm is None else f"gradient norm {norm:.3g}")
            for group in groups
            for norm in [self.norms[kind][group["name"]]]
        ]
        if self.kinds <= self.norms.keys():
            dry = [
                group["name"]
                for group in groups
                if group["lr"] > 0 and all(seen[group["name"]] is None for seen in self.norms.values())
            ]
            if dry:
                raise RuntimeError(
                    f"no step of this stage ({', '.join(sorted(self.kinds))}) sends a gradient to "
                    f"{', '.join(dry)}; switch the group off (system.optimizer.params: null) or give a "
                    f"step that trains it a probability"
                )
        return f"gradients at the first {kind} step:\n" + "\n".join(rows)


def gradient_norm(parameters: list[nn.Parameter]) -> float | None:
    """The norm of all their gradients together; None if they have none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return None
    return torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item()
