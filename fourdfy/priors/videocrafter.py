"""VideoCrafter2 (Chen et al. 2024) as a prior: ZeroScope's U-Net conditioned on the frame rate.

The only thing that a plain ``UNet3DConditionModel`` lacks is a second time embedding, of the frames per
second, whose output is added to the first one's. A run has one frame rate, so its output is a single
vector, which is folded into an existing bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from fourdfy.bounds import number
from fourdfy.config import file_path
from fourdfy.priors.base import Network
from fourdfy.priors.frozen import freeze, load_part, loading
from fourdfy.priors.model_folder import ModelNotFound, part_flaw, weight_files
from fourdfy.priors.video import VideoPrior
from fourdfy.registry import register


@register("videocrafter")
class VideoCrafter(VideoPrior):
    follows_autocast: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(VideoPrior.Config):
        parts: ClassVar[tuple[str, ...]] = ("unet", "fps_embedding", "vae", "scheduler")

        pretrained_model_name_or_path: str = file_path("VideoCrafter/VideoCrafter2")
        half_precision_weights: bool | str = False
        """False, unlike in other priors: the published runs left precision to the trainer."""
        height: int | None = number(320, 1, 8192)
        """Pixels that frames are resized to before the VAE; null: the model's own size."""
        width: int | None = number(512, 1, 8192)
        """Pixels, as ``height``."""
        fps: int = number(28, 1, 1000)
        """Frame rate that the model is conditioned on: the higher, the less motion between two frames."""
        use_hifa: bool = False
        """Must be false: the original's HiFA loss called a decoder that raises an error."""

        def activation_bytes(self, frames: int, height: int, width: int) -> int:
            bytes_in_float32 = 2 if self.half_precision_weights is False else 1
            return super().activation_bytes(frames, height, width) // bytes_in_float32  # a trainer's autocast

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.use_hifa:
                raise ValueError("use_hifa=true never worked with this prior; set use_hifa=false")

    cfg: Config

    def read_network(self, folder: Path, part: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        if part == "unet":
            return load_unet(folder, self.cfg.fps, dtype=dtype, device=device)
        return super().read_network(folder, part, dtype, device)


def load_unet(folder: Path, fps: int, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen ``UNet3DConditionModel`` of a converted folder, for videos of ``fps`` frames per second.

    Raises:
        ModelNotFound: ``unet`` or ``fps_embedding`` is missing.
    """
    unet: Network = load_part(
        folder, "unet", "UNet3DConditionModel", dtype=torch.float32, device=torch.device("cpu")
    )
    layer = unet.time_embedding.linear_2
    # Added before the cast: the sum is rounded once.
    bias = layer.bias.double() + fps_vector(folder, fps)
    nn.Module.to(unet, device=device, dtype=dtype)  # diffusers' own warns about every cast
    layer.bias.copy_(bias)
    return freeze(unet)


def fps_vector(folder: Path, fps: int) -> Float[Tensor, "E"]:
    """The frame rate's contribution to the time embedding, in float64.

    Raises:
        ModelNotFound: the folder has no ``fps_embedding``.
    """
    if flaw := part_flaw(folder, "fps_embedding"):
        raise ModelNotFound(
            f"{folder} holds no fps_embedding ({flaw}): a VideoCrafter2 folder is made from its model.ckpt; "
            "name that file, or VideoCrafter/VideoCrafter2, as pretrained_model_name_or_path"
        )
    from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding

    (file,) = weight_files(folder, "fps_embedding").paths
    with loading(file):
        weights = load_file(file)
        width, channels = weights["linear_1.weight"].shape
        embedding = TimestepEmbedding(channels, width).double().requires_grad_(False)
        embedding.load_state_dict(weights)
    # Cosines first and unshifted frequencies, as the timesteps are embedded.
    waves = get_timestep_embedding(
        torch.tensor([fps]), channels, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    return embedding(waves.double())[0]
