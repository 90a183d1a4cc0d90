"""MVDream as a diffusers model (Shi et al. 2023): SD 2.1's U-Net, camera vectors, views that attend.

The U-Net is a plain ``UNet2DConditionModel`` with a projection class embedding of the camera; what
is not in it is the attention over the views of a group, which ``enable_multi_view_attention`` adds.

B images = groups of V views, the views of a group neighbours in the batch; L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


def enable_multi_view_attention(unet: nn.Module, num_views: int = 4) -> None:
    """Let the ``num_views`` neighbours of a batch see each other in every self-attention.

    Each ``attn1`` of ``unet`` keeps its weights and its kernel (SDPA, sliced, xformers); only its
    tokens are regrouped. Cross attention, convolutions and norms stay per image. Call it after the
    attention kernel was chosen; calling it again changes the number of views.

    Raises:
        ValueError: ``unet`` has no ``attn1``.
    """
    blocks = [module for name, module in unet.named_modules() if name.rpartition(".")[2] == "attn1"]
    if not blocks:
        raise ValueError(f"{type(unet).__name__} has no self-attention (attn1) for views to share")
    for block in blocks:
        kernel = block.processor
        if isinstance(kernel, MultiViewAttention):
            kernel = kernel.kernel
        block.set_processor(MultiViewAttention(kernel, num_views))


def camera_vectors(c2w: Float[Tensor, "B 4 4"]) -> Float[Tensor, "B 16"]:
    """What MVDream's camera embedding takes: ``c2w`` row by row, its position scaled to unit length.

    Distance and field of view are not seen by the model. A camera at the origin stays there.
    """
    position = c2w[:, :3, 3]
    # 1e-8 is added, not a lower bound: the published vectors were made so.
    unit = position / (torch.linalg.vector_norm(position, dim=-1, keepdim=True) + 1e-8)
    top = torch.cat([c2w[:, :3, :3], unit[:, :, None]], dim=-1)
    return torch.cat([top, c2w[:, 3:]], dim=1).flatten(1)


class MultiViewAttention:
    """A diffusers attention processor: another one, on the tokens of all views of a group."""

    def __init__(self, kernel: Callable[..., Tensor], num_views: int) -> None:
        self.kernel = kernel
        self.num_views = num_views

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "B L C"],
        encoder_hidden_states: None = None,
        attention_mask: None = None,
    ) -> Float[Tensor, "B L C"]:
        assert encoder_hidden_states is None and attention_mask is None
        batch, tokens, channels = hidden_states.shape
        if batch % self.num_views:
            raise ValueError(
                f"{batch} images do not fill whole groups of {self.num_views} views; "
                f"use a multiple of {self.num_views}"
            )
        grouped = hidden_states.reshape(batch // self.num_views, self.num_views * tokens, channels)
        return self.kernel(attn, grouped).reshape(batch, tokens, channels)
