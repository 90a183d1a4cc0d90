"""Optical flow, by scikit-image.

F frames of a clip, S = F - 1 steps between them, H x W pixels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

FLOW_PIXELS = 128
"""Longer side of the images between which it is computed."""


def optical_flow(rgb: Float[Tensor, "F H W 3"]) -> Float[Tensor, "S H W 2"]:
    """Displacement (right, down) in pixels of each pixel of a frame, all but the last, to the next frame.

    Computed at ``FLOW_PIXELS``, where it is quick.
    """
    from skimage.registration import optical_flow_tvl1

    height, width = rgb.shape[1:3]
    scale = min(1.0, FLOW_PIXELS / max(height, width))
    size = (round(height * scale), round(width * scale))
    grey = interpolate(rgb.mean(dim=-1)[:, None], size=size, mode="area")[:, 0].numpy()
    found = [optical_flow_tvl1(here, there) for here, there in pairwise(grey)]
    flows = torch.stack([torch.from_numpy(each).float() for each in found]).flip(1)  # (down, right) before
    flows = flows * torch.tensor([width / size[1], height / size[0]]).view(2, 1, 1)
    return interpolate(flows, size=(height, width), mode="bilinear").movedim(1, -1)
