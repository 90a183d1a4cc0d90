"""Renders made by hand."""

import torch

from fourdfy.types import RenderOutput, Samples


def images_of(rgb):
    """A render whose images are ``rgb``."""
    return render_output(torch.ones_like(rgb[..., :1]), comp_rgb=rgb)


def render_output(opacity, **given):
    """Black images of the opacity's size, from one sample of weight 1."""
    image = torch.zeros(*opacity.shape[:3], 3)
    ray_indices = torch.zeros(1, dtype=torch.long)
    fields = {
        "comp_rgb": image,
        "comp_rgb_fg": image,
        "opacity": opacity,
        "depth": torch.zeros_like(opacity),
        "z_variance": torch.zeros_like(opacity),
        "samples": Samples(ray_indices=ray_indices, t_starts=torch.zeros(1), t_ends=torch.ones(1)),
        "weights": torch.ones(1),
    }
    return RenderOutput(**(fields | given))
