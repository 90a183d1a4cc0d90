"""Frozen networks: loaded part by part from a folder, never trained, saved or counted.

Weights are safetensors, or pickles read with ``weights_only=True``; code from a model folder is never
run. diffusers and transformers are imported where they are used: they take seconds, and parsing a
config must not.

B images, H x W pixels, C latent channels, h x w latents.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fourdfy.config_files import ConfigError
from fourdfy.ops.diffusion import sample_noise, shifted_alphas_cumprod
from fourdfy.ops.finite import not_finite
from fourdfy.ops.ranks import ranks, spread
from fourdfy.ops.recomputation import recomputed
from fourdfy.priors.base import DDPMSchedule, FlowSchedule, Network, NoiseSchedule
from fourdfy.priors.convert import no_progress_bar
from fourdfy.priors.half_copy import converted_once, keep_converted
from fourdfy.priors.model_folder import (
    JUDGES,
    PIECES,
    TEXT_ENCODERS,
    TOKENIZERS,
    ModelNotFound,
    description_file,
    part_flaw,
    part_folder,
    read_description,
    read_mapping,
    shown,
    weight_files,
)
from fourdfy.priors.network_file import check_network_file
from fourdfy.priors.scheduler_file import read_scheduler
from fourdfy.priors.vae_encoder import posterior
from fourdfy.types import TensorRecord

logger = logging.getLogger(__name__)

CLASSES = {
    "vae": ("_class_name", "AutoencoderKL"),
    **dict.fromkeys(TEXT_ENCODERS, ("architectures", "CLIPTextModel")),
    **dict.fromkeys(JUDGES, ("architectures", "CLIPModel")),
    **dict.fromkeys(TOKENIZERS, ("tokenizer_class", "CLIPTokenizer")),
    "fps_embedding": ("_class_name", "TimestepEmbedding"),
}
"""For each part, the key that names its class, and the class that most priors have."""

Gradient = Literal["exact", "subset"]
"""How ``encode_images`` computes gradients in parts."""


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Ways to need less memory; none of them changes a result by more than rounding.

    Attention is PyTorch's SDPA unless another kernel is asked for here and installed.
    """

    half_precision_weights: bool | str = True
    """true (float16), false (float32) or "bf16"."""
    enable_memory_efficient_attention: bool = False
    """Use the attention of xformers instead of SDPA, if it is installed."""
    enable_sequential_cpu_offload: bool = False
    """Keep weights in main memory and move each layer's to the GPU when it runs."""
    shard_over_ranks: bool = False
    """On several GPUs, keep a share of the denoiser's weights on each, and gather those of a block when it
    runs: for networks that one GPU can't hold. It is then neither compiled nor replayed as CUDA graphs."""
    enable_attention_slicing: bool = False
    """Compute attention a few heads at a time."""
    enable_channels_last_format: bool = False
    """Store the weights of 2D convolutions channels last."""

    def dtype(self, device: torch.device) -> torch.dtype:
        """The weights' type; on a CPU always float32."""
        if self.half_precision_weights is False:
            return torch.float32
        if device.type == "cpu":
            _say_once(f"half_precision_weights={self.half_precision_weights}: float32 on the CPU")
            return torch.float32
        return torch.bfloat16 if self.half_precision_weights == "bf16" else torch.float16


MEMORY_OPTIONS = tuple(sorted({option.name for option in fields(MemoryOptions)} - {"half_precision_weights"}))
"""Their names, but for that of the precision, which changes results by more."""


def check_part(folder: Path, part: str, class_name: str = "") -> None:
    """Refuse a part that can't be what is needed; reads its description, not its weights.

    Args:
        class_name: the class that the description must name; by default that of ``CLASSES``.

    Raises:
        ModelNotFound: the part is missing or incomplete.
        ConfigError: it is of another class, or its file can't be read.
    """
    if (index := folder / "model_index.json").is_file():
        read_mapping(index)
    if flaw := part_flaw(folder, part):
        raise ModelNotFound(f"{folder} holds no {part} that can be read ({flaw})")
    if part == "scheduler":
        read_scheduler(folder)
        return
    description = read_description(folder, part)
    key, wanted = CLASSES.get(part, ("_class_name", ""))
    wanted = class_name or wanted
    stated = description.get(key, wanted)
    # transformers' names come in a list, or end in Fast; XCLIPModel is no CLIPModel.
    is_exact = key == "_class_name" or part in JUDGES
    if wanted and not (stated in (wanted, [wanted]) if is_exact else wanted in str(stated)):
        name = stated[:60] if isinstance(stated, str) else shown(stated)
        raise ConfigError(
            f"{part_folder(folder, part)} holds a {name}, expected a {wanted} ({key} of "
            f"{description_file(folder, part).name}); is pretrained_model_name_or_path another kind of model?"
        )
    if part in TOKENIZERS:
        for file in (folder / part).glob("*.json"):
            read_mapping(file)
    else:
        check_network_file(folder, part)


def load_part(
    folder: Path, part: str, class_name: str, *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The diffusers network in ``folder/part``, frozen, in evaluation mode.

    Args:
        class_name: the class that the folder's description must name, e.g. ``UNet2DConditionModel``.

    Raises:
        ModelNotFound: the part is missing or incomplete.
        ConfigError: the part is a network of another class, or can't be loaded.
    """
    check_part(folder, part, class_name)
    import diffusers

    place = part_folder(folder, part)
    with loading(place):
        network, found = getattr(diffusers, class_name).from_pretrained(
            place, torch_dtype=dtype, **_loading_options(folder, part, dtype)
        )
        _check_complete(found)
        return _checked(freeze(network.to(device)))


def load_text_encoder(
    folder: Path,
    device: torch.device,
    class_name: str = "CLIPTextModel",
    tokenizer: str = "CLIPTokenizer",
    dtype: torch.dtype = torch.float32,
    number: str = "",
) -> tuple[Any, nn.Module]:
    """(tokenizer, text encoder, frozen) of a model folder.

    Args:
        class_name: of the encoder in transformers, as ``tokenizer`` is of the other part.
        number: the end of both parts' names: nothing, ``_2`` or ``_3``.

    Raises:
        ModelNotFound: a part is missing or incomplete.
        ConfigError: a part is of another class, or can't be loaded.
    """
    words, part = load_tokenizer(folder, tokenizer, number), f"text_encoder{number}"
    check_part(folder, part, class_name)
    home = converted_once(folder, part) if dtype == torch.bfloat16 else folder
    encoder = load_transformer(home, part, class_name, device, dtype, words)
    if dtype == torch.bfloat16 and home is folder:
        with loading(folder / part):
            keep_converted(encoder, folder, part)
    return words, encoder


def load_transformer(
    folder: Path,
    part: str,
    class_name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = (),
) -> Any:
    """The network of ``transformers`` in a model folder, frozen, which knows all tokens of its tokenizer.

    Raises:
        ModelNotFound: the part is missing or incomplete.
        ConfigError: it is of another class, or can't be loaded.
    """
    check_part(folder, part, class_name)
    import transformers

    place = part_folder(folder, part)
    with no_progress_bar(), loading(place):
        network, found = getattr(transformers, class_name).from_pretrained(
            place, dtype=dtype, **_loading_options(folder, part, dtype)
        )
        _check_complete(found)
        known_words = network.config.get_text_config().vocab_size
        if (most := len(tokenizer)) > known_words:
            raise ValueError(f"the tokenizer has {most} tokens, of which it knows {known_words}")
        return _checked(freeze(network.to(device)))


def load_tokenizer(folder: Path, class_name: str = "CLIPTokenizer", number: str = "") -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelNotFound: it is missing or incomplete.
        ConfigError: it is of another class, or can't be loaded.
    """
    part = f"tokenizer{number}"
    check_part(folder, part, class_name)
    import transformers

    place = folder / part
    with loading(place):
        cls = getattr(transformers, class_name)
        if (place / PIECES).is_file() and not (place / "tokenizer.json").is_file():
            return cls(**_sentencepiece(place))
        return cls.from_pretrained(place, local_files_only=True)


def load_noise_schedule(folder: Path, device: torch.device, **betas: Any) -> NoiseSchedule:
    """The noise schedule that ``folder/scheduler`` describes, whichever sampler it names.

    Args:
        betas: keys of a DDPM's file whose values there are those of another model.

    Raises:
        ModelNotFound: no scheduler there.
        ConfigError: the file may describe other noise levels than we would read from it.
    """
    check_part(folder, "scheduler")
    from diffusers import DDPMScheduler

    levels, prediction = read_scheduler(folder)
    if prediction == "flow_prediction":
        return FlowSchedule(**levels, device=device)
    if "snr_shift_scale" in levels:
        alphas_cumprod = shifted_alphas_cumprod(**levels | betas)
    else:
        alphas_cumprod = DDPMScheduler(**levels | betas).alphas_cumprod
    return DDPMSchedule(alphas_cumprod=alphas_cumprod.to(device), prediction=prediction)


def freeze(network: nn.Module) -> nn.Module:
    """The network itself, without gradients for its parameters and in evaluation mode."""
    return network.requires_grad_(False).eval()


def apply_memory_options(network: Network, options: MemoryOptions, device: torch.device) -> None:
    """Apply ``options`` to a diffusers network, in place."""
    if options.enable_memory_efficient_attention:
        if find_spec("xformers") and device.type == "cuda":
            network.enable_xformers_memory_efficient_attention()
        else:
            _say_once("enable_memory_efficient_attention: PyTorch's own SDPA, which is the default")
    if options.enable_attention_slicing:
        if hasattr(network, "set_attention_slice"):
            network.set_attention_slice("auto")
        elif not hasattr(network, "decode"):  # VAEs can't either, and hardly have any
            _say_once(f"enable_attention_slicing: {type(network).__name__} can't; its attention is whole")
    if options.enable_channels_last_format:
        to_channels_last(network)
    if options.enable_sequential_cpu_offload:
        if device.type == "cpu":
            _say_once("enable_sequential_cpu_offload: without effect on the CPU")
        elif not find_spec("accelerate"):
            raise ValueError("enable_sequential_cpu_offload=true needs accelerate: pip install accelerate")
        else:
            from accelerate import cpu_offload

            cpu_offload(network, execution_device=device)


def sharded(network: nn.Module, device: torch.device) -> nn.Module:
    """The network itself, a share of its weights on each rank's ``device`` (FSDP2); all ranks call it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks().count,))
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    inside = {id(inner) for outer in lists for part in outer for inner in part.modules() if inner is not part}
    for block in (block for blocks in lists for block in blocks if id(block) not in inside):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network.to(device)


def encode_images(
    vae: Network,
    images: Float[Tensor, "B 3 H W"],
    generator: torch.Generator,
    chunk: int = 0,
    gradient: Gradient = "exact",
    posterior_of: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Float[Tensor, "B C h w"]:
    """Latents drawn from the VAE's posterior, in float32, normalised by its shift and ``scaling_factor``.

    With ``chunk`` > 0 that many images are in the network at once. Gradients reach ``images``:

    - exact: the parts are encoded again in the backward pass; the same numbers and gradients from
      less memory.
    - subset: only ``chunk`` images, drawn at random, get theirs; nothing is rescaled.

    Args:
        images: in 0..1.
        generator: of the subset, and of the posterior's noise, drawn for all images at once.
        posterior_of: something faster that computes ``posterior`` of this VAE and some images.
    """
    images = images * 2 - 1
    posterior_of = posterior_of or partial(posterior, vae)
    if gradient == "subset" and 0 < chunk < len(images):
        mean, std = _subset_posterior(posterior_of, images, chunk, generator)
    else:
        mean, std = spread(partial(_exact_posterior, posterior_of, chunk), images)
    noise = sample_noise(mean.shape, generator, mean.device, mean.dtype)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (mean + std * noise - shift) * vae.config.scaling_factor


def vae_factor(vae: Network) -> int:
    """Pixels per latent, along each axis."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@dataclass(frozen=True)
class _Posterior(TensorRecord):
    mean: Float[Tensor, "B C h w"]
    std: Float[Tensor, "B C h w"]


def _exact_posterior(
    posterior_of: Callable[..., tuple[Tensor, Tensor]], chunk: int, images: Float[Tensor, "B 3 H W"]
) -> tuple[Tensor, Tensor]:
    if not 0 < chunk < len(images):
        return posterior_of(images)
    rows = torch.arange(len(images)).split(chunk)
    parts = recomputed(lambda part: _Posterior(*posterior_of(images[part[0] : part[-1] + 1])), rows, [images])
    return _joined([(part.mean, part.std) for part in parts])


def _subset_posterior(
    posterior_of: Callable[..., tuple[Tensor, Tensor]],
    images: Float[Tensor, "B 3 H W"],
    chunk: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)
    learn, *others = images[order].split(chunk)
    with torch.no_grad():
        fixed = [posterior_of(part) for part in others]
    mean, std = _joined([posterior_of(learn), *fixed])
    back = order.argsort()
    return mean[back], std[back]


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    mean, std = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return mean, std


@cache
def _say_once(message: str) -> None:
    """A run has many networks, and the same settings for them all."""
    logger.info(message)


def to_channels_last(network: nn.Module) -> None:
    """Store the weights of 2D convolutions channels last, in place."""
    # Not network.to(memory_format=...): the video U-Net's 5-axis weights have no such format.
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _loading_options(folder: Path, part: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for diffusers and transformers, so that they open the files that ``part_flaw`` examined.

    ``use_safetensors`` is explicit: without it, diffusers warns before it reads a pickle (with
    weights_only=True).
    """
    files = weight_files(folder, part)
    if files.variant and dtype == torch.float32:
        _say_once(f"{part_folder(folder, part)}: rounded to half precision; there are no other weights")
    return {
        "local_files_only": True,
        "variant": files.variant,
        "use_safetensors": files.use_safetensors,
        "output_loading_info": True,
    }


def _sentencepiece(place: Path) -> dict[str, Any]:
    """Arguments of a T5 tokenizer; transformers' own reader of these files wants another package."""
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto.FromString((place / PIECES).read_bytes())
    return {
        "vocab": [(piece.piece, piece.score) for piece in model.pieces],
        "extra_ids": read_description(place.parent, place.name).get("extra_ids", 100),
        "_spm_precompiled_charsmap": model.normalizer_spec.precompiled_charsmap or None,
    }


def _check_complete(found: Mapping[str, Any]) -> None:
    """Refuse missing weights: both libraries only warn of them and draw them at random."""
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, {missing[0]} among them")


def _checked(network: nn.Module) -> nn.Module:
    """The network itself; every weight is finite."""
    if broken := not_finite(dict(network.named_parameters())):
        raise ValueError(f"{broken[0]} holds numbers that are not finite; fetch the model anew")
    return network


@contextlib.contextmanager
def loading(place: Path) -> Iterator[None]:
    """Turn whatever the libraries raise at a broken file into one line that names it; no tables."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{place} can't be loaded: {type(error).__name__}: {reason}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
