"""A low-rank adapter on a frozen network, whose parameters another module owns (Hu et al. 2021)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn


class LoRA(nn.Module):
    """A peft adapter on every layer of ``network`` whose name ends as one of ``targets`` does; its parameters
    are this module's, in float32.

    It starts as the identity, and off: inside ``with lora.active():`` the network runs with it.
    Parameters keep the network's own names below this module (``down_blocks.0. ... to_q.lora_A.weight``).
    """

    def __init__(self, network: nn.Module, rank: int, targets: Sequence[str]) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        # alpha = rank: W + B A, without a scale. A ~ N(0, 1/rank), B = 0.
        config = LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets)
        )
        inject_adapter_in_model(config, network)
        # A tuple of modules is no submodule, so the frozen weights stay out of this module.
        self._layers = tuple(module for module in network.modules() if isinstance(module, LoraLayer))
        for name, parameter in network.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
                _register(self, name.replace(".default.", "."), parameter)
        self._switch(False)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The adapter is on inside, off outside."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, on: bool) -> None:
        # peft couples the switch to requires_grad, which here is the system's to decide.
        flags = [parameter.requires_grad for parameter in self.parameters()]
        for layer in self._layers:
            layer.enable_adapters(on)
        for parameter, flag in zip(self.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


def _register(root: nn.Module, path: str, parameter: nn.Parameter) -> None:
    *places, name = path.split(".")
    for place in places:
        if place not in root._modules:
            root.add_module(place, nn.Module())
        root = root.get_submodule(place)
    root.register_parameter(name, parameter)
