"""A further kind of training step: seen from the front, the scene shall look like a given picture."""

from dataclasses import dataclass

import imageio.v3 as imageio
import torch
from omegaconf import MISSING

from fourdfy.bounds import number
from fourdfy.config import Component, file_path
from fourdfy.data.base import CameraSampler
from fourdfy.guidance.base import Guidance
from fourdfy.ops.cameras import orbit_cameras
from fourdfy.registry import register
from fourdfy.types import GuidanceOutput


@register("front-camera")
class FrontCamera(CameraSampler):
    """One camera in front of the scene, at time 0."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Component.Config):
        size: int = number(64, 1, 4096)
        """Height and width of the image, in pixels."""
        distance: float = number(2.5, above=0, high=100)
        """From the origin, in scene units."""
        fovy_deg: float = number(40.0, above=0, high=179)
        """Vertical angle of view, in degrees."""

    def sample(self, context):
        zero = torch.zeros(1)
        lens = {"distance": self.cfg.distance, "fovy_deg": self.cfg.fovy_deg}
        return orbit_cameras(zero, zero, times=zero, height=self.cfg.size, width=self.cfg.size, **lens)

    def sizes(self):
        return [(1, self.cfg.size, self.cfg.size)]


@register("image-reconstruction")
class ImageReconstruction(Guidance):
    """Loss ``image``: the mean squared error against the picture."""

    losses = ("image",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Guidance.Config):
        reads_text = False
        image: str = file_path(MISSING)
        """The picture, of any size; its opacity is not read."""

    def __init__(self, cfg, *, device):
        super().__init__(cfg, device=device)
        try:
            pixels = torch.from_numpy(imageio.imread(cfg.image)[..., :3])
        except OSError as error:  # a ValueError here becomes a line that names the key of the guidance
            raise ValueError(f"image={cfg.image} can't be read as a picture ({error})") from error
        self.target = pixels.movedim(-1, 0)[None].to(device).float() / 255

    def forward(self, frames, text, cameras, context):
        size = frames.comp_rgb.shape[1:3]
        target = torch.nn.functional.interpolate(self.target, size, mode="area").movedim(1, -1)
        error = (frames.comp_rgb - target).square().mean()
        return GuidanceOutput(losses={"image": error}, metrics={"psnr": -10 * error.detach().log10()})
