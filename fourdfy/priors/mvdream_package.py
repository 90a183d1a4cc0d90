"""MVDream by its authors' own package ``mvdream``, with the interface of our networks.

It serves comparisons with the original; everything else runs on diffusers. The package is imported only
here. Its model is built from its own config, without the text encoder (prompts have
theirs), and filled by our own reader of checkpoints.

B images = groups of V views, L tokens, E text channels, C latent channels.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from fourdfy.files.safe_load import read_torch_file
from fourdfy.priors.base import DDPMSchedule, Denoiser, Network
from fourdfy.priors.convert import TEXT, unwrapped
from fourdfy.priors.frozen import freeze
from fourdfy.priors.hub import resolve_file

EXTERN = Path(__file__).parents[2] / "extern" / "MVDream"
"""Folder of an unmodified checkout, used if the package is not installed."""

CONFIGS = {"sd-v2.1-base-4view": "sd-v2-base.yaml"}
"""The package's config file for each of its models that can be used here."""

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}


def load_mvdream_package(
    model_name: str,
    checkpoint: str | Path,
    num_views: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Denoiser, nn.Module]:
    """(denoiser, VAE), called as those of ``LatentPrior`` are.

    Args:
        model_name: one of ``CONFIGS``.
        checkpoint: the original's file, or the hub's name of it.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: an unknown name, a type that the package can't compute in, or a file that doesn't fit.
    """
    if dtype != torch.float32:
        raise ValueError(
            f"backend=mvdream computes in float32, not {dtype}; set half_precision_weights=false "
            "or backend=diffusers"
        )
    config = read_config(model_name)
    OmegaConf.update(config, "params.cond_stage_config", {"target": "torch.nn.Identity"}, merge=False)
    model = import_module("mvdream.ldm.util").instantiate_from_config(config)
    file = resolve_file(checkpoint)
    state = unwrapped(read_torch_file(file))
    try:
        model.load_state_dict({key: value for key, value in state.items() if not key.startswith(TEXT)})
    except RuntimeError as error:
        raise ValueError(f"{file} doesn't fit the mvdream package's {model_name}: {error}") from error
    freeze(model.to(device))
    parameters = config.params
    prediction = PREDICTIONS[model.parameterization]
    return (
        Denoiser(
            PackageUNet(model, num_views, parameters.unet_config.params.image_size),
            DDPMSchedule(alphas_cumprod=model.alphas_cumprod, prediction=prediction),
        ),
        PackageVAE(model, len(parameters.first_stage_config.params.ddconfig.ch_mult)),
    )


def read_config(model_name: str) -> DictConfig:
    """The ``model`` section of the package's own config.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: an unknown name.
    """
    if model_name not in CONFIGS:
        raise ValueError(f"model_name={model_name!r}; backend=mvdream knows {', '.join(CONFIGS)}")
    if find_spec("mvdream") is None and (EXTERN / "mvdream").is_dir():
        sys.path.append(str(EXTERN))  # last, so that it hides no other module
    spec = find_spec("mvdream")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(
            "backend=mvdream needs the authors' package: pip install "
            f"git+https://github.com/bytedance/MVDream, or a checkout at {EXTERN}; "
            "backend=diffusers runs the same network without it"
        )
    (root,) = spec.submodule_search_locations
    return OmegaConf.load(Path(root) / "configs" / CONFIGS[model_name]).model


class PackageUNet(nn.Module):
    """The package's network with the call of a diffusers ``UNet2DConditionModel``."""

    def __init__(self, model: Network, num_views: int, sample_size: int) -> None:
        super().__init__()
        self.model = model
        self.num_views = num_views
        self.config = SimpleNamespace(sample_size=sample_size)

    def forward(
        self,
        sample: Float[Tensor, "B C h w"],
        timestep: Int[Tensor, "B"],
        encoder_hidden_states: Float[Tensor, "B L E"],
        class_labels: Float[Tensor, "B 16"],
        return_dict: bool = True,
    ) -> Any:
        """The predicted noise, in a tuple or as ``.sample``."""
        conditions = {
            "context": encoder_hidden_states,
            "camera": class_labels,
            "num_frames": self.num_views,
        }
        prediction = self.model.apply_model(sample, timestep, conditions)
        return SimpleNamespace(sample=prediction) if return_dict else (prediction,)


class PackageVAE(nn.Module):
    """The package's autoencoder with as much of diffusers' as encoding needs."""

    def __init__(self, model: Network, levels: int) -> None:
        super().__init__()
        self.model = model
        widths = (None,) * levels  # only their number is asked for
        self.config = SimpleNamespace(scaling_factor=model.scale_factor, block_out_channels=widths)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> SimpleNamespace:
        """``latent_dist`` with ``mean`` and ``std``; ``images`` in -1..1."""
        return SimpleNamespace(latent_dist=self.model.encode_first_stage(images))
