"""Original checkpoints of MVDream and VideoCrafter2, as folders in diffusers layout.

Both are Stable Diffusion 2.1's networks (or ZeroScope's) under the names of the ldm code base. The key
maps in ``key_maps/`` give each module its diffusers name: ``modules`` by the longest fitting start of a
key, ``inside`` for what lies below, ``split`` for a fused tensor that becomes several. Every key of a
checkpoint is accounted for: it has a place in the diffusers network, or a reason in ``DROPPED``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourdfy.files.safe_load import read_torch_file
from fourdfy.priors.base import Network

logger = logging.getLogger(__name__)

State = Mapping[str, Any]
"""Names and tensors."""

UNET = "model.diffusion_model."
TEXT = "cond_stage_model.model."

DROPPED = {
    "the noise schedule, which the scheduler's constants give": re.compile(
        r"betas|(sqrt_(one_minus_|recip_|recipm1_)?|log_one_minus_)?alphas_cumprod(_prev)?|scale_arr"
        r"|posterior_(variance|log_variance_clipped|mean_coef[12])"
    ),
    "the text tower's projection, scale and mask, which no U-Net sees": re.compile(
        re.escape(TEXT) + r"(text_projection|logit_scale|attn_mask)"
    ),
}
"""Keys that are left out, by reason, besides the text tower's last block (see ``convert_text``)."""

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a kind of checkpoint is recognised, and what its U-Net is."""

    mark: str
    """A key that only this family has."""
    key_map: str
    sample_size: int | tuple[int, int]
    """Latents per side (height, width) that the model was trained at."""


FAMILIES = {
    "MVDream": Family(
        mark=f"{UNET}camera_embed.0.weight",
        key_map="mvdream_unet",
        sample_size=32,
    ),
    "VideoCrafter2": Family(
        mark=f"{UNET}fps_embedding.0.weight",
        key_map="videocrafter2_unet",
        sample_size=(40, 64),
    ),
}


def convert_checkpoint(file: Path, folder: Path) -> None:
    """Write the parts of an original checkpoint into ``folder``, in the precision that they have.

    These are ``unet``, ``vae``, ``text_encoder``, ``scheduler``, and VideoCrafter2's ``fps_embedding``.

    Raises:
        ValueError: no checkpoint of a known family, or one with a key too many or too few.
    """
    state = unwrapped(read_torch_file(file))
    try:
        name = family_of(state)
        check_schedule(state)
        check_all_known(state)
        parts = convert_unet(state, name) | {"vae": convert_vae(state), "text_encoder": convert_text(state)}
    except KeyError as error:
        raise ValueError(f"{file} lacks the key {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    for part, network in parts.items():
        save_network(network, folder / part)
    from diffusers import DDIMScheduler

    DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    logger.info("%s is a checkpoint of %s: %s", file, name, ", ".join((*parts, "scheduler")))


def unwrapped(content: State) -> State:
    """The network's own tensors, without Lightning's or DeepSpeed's wrapping."""
    if "module" in content:
        # DeepSpeed's engine puts "_forward_module." in front of every key.
        return {key.removeprefix("_forward_module."): value for key, value in content["module"].items()}
    return content.get("state_dict", content)


def family_of(state: State) -> str:
    """The name in ``FAMILIES`` of the checkpoint's kind.

    Raises:
        ValueError: none of them.
    """
    for name, family in FAMILIES.items():
        if family.mark in state:
            return name
    marks = ", ".join(f"{name} by {family.mark}" for name, family in FAMILIES.items())
    raise ValueError(f"not a checkpoint of a known kind ({marks}). Its keys: {_first(state)}")


def convert_unet(state: State, name: str, head_width: int = 64) -> dict[str, nn.Module]:
    """``unet`` and, where the family has one, ``fps_embedding``.

    Args:
        head_width: channels of an attention head, which no shape shows; 64 in all published checkpoints.
    """
    import diffusers
    from diffusers.models.embeddings import TimestepEmbedding

    family = FAMILIES[name]
    tensors = rename(state, family.key_map)
    widths = [len(state[f"{UNET}input_blocks.{1 + 3 * level}.0.in_layers.2.bias"]) for level in range(4)]
    context = tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    config = {
        "sample_size": family.sample_size,
        "block_out_channels": widths,
        "cross_attention_dim": context.shape[1],
    }
    if name == "MVDream":
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(
                **config,
                attention_head_dim=[width // head_width for width in widths],  # sic: diffusers wants counts
                use_linear_projection=True,
                class_embed_type="projection",
                projection_class_embeddings_input_dim=tensors["class_embedding.linear_1.weight"].shape[1],
            )
        return {"unet": fill(unet, tensors, "the U-Net")}
    fps = {key: tensors.pop(key) for key in list(tensors) if key.startswith("fps_embedding.")}
    fps = {key.removeprefix("fps_embedding."): value for key, value in fps.items()}
    width, inputs = fps["linear_1.weight"].shape
    with torch.device("meta"):
        unet = diffusers.UNet3DConditionModel(**config, attention_head_dim=head_width)
        embedding = TimestepEmbedding(inputs, width)
    return {
        "unet": fill(unet, tensors, "the U-Net"),
        "fps_embedding": fill(embedding, fps, "the embedding of frames per second"),
    }


def convert_vae(state: State) -> nn.Module:
    """The image autoencoder, the same network in both families."""
    from diffusers import AutoencoderKL

    tensors = rename(state, "vae")
    channels = [len(tensors[f"encoder.down_blocks.{level}.resnets.0.conv2.bias"]) for level in range(4)]
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=channels,
            layers_per_block=2,
            sample_size=512,
            scaling_factor=0.18215,
        )
    return fill(vae, tensors, "the VAE")


def convert_text(state: State, head_width: int = 64) -> nn.Module:
    """OpenCLIP's text tower without its last block, whose output these U-Nets were trained on."""
    from transformers import CLIPTextConfig, CLIPTextModel

    found = (re.match(rf"{re.escape(TEXT)}transformer\.resblocks\.(\d+)\.", key) for key in state)
    blocks = {int(match[1]) for match in found if match}
    last = f"{TEXT}transformer.resblocks.{max(blocks, default=0)}."
    used = {key: value for key, value in state.items() if not key.startswith(last)}
    tensors = rename(used, "openclip_text")
    tokens, width = tensors["embeddings.token_embedding.weight"].shape
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=len(tensors["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=len(blocks) - 1,
        num_attention_heads=width // head_width,
        max_position_embeddings=len(tensors["embeddings.position_embedding.weight"]),
        hidden_act="gelu",
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=0,
    )
    with torch.device("meta"):
        encoder = CLIPTextModel(config)
    return fill(encoder, tensors, "the text encoder")


def rename(state: State, key_map: str) -> dict[str, Tensor]:
    """The tensors below the key map's prefix, under their diffusers names.

    Raises:
        ValueError: keys that the map doesn't know.
    """
    table = _key_map(key_map)
    prefix, renamed, unknown = table["prefix"], {}, []
    for key, tensor in state.items():
        if not key.startswith(prefix) or _dropped(key):
            continue
        targets = targets_of(key.removeprefix(prefix), table)
        if not targets or not isinstance(tensor, Tensor):
            unknown.append(key)
        elif len(targets) == 1:
            renamed[targets[0]] = tensor
        else:
            # Cloned: parts of one tensor can't be written to a safetensors file.
            pieces = (piece.clone() for piece in tensor.chunk(len(targets)))
            renamed |= dict(zip(targets, pieces, strict=True))
    if unknown:
        raise ValueError(f"{len(unknown)} unknown keys: {_first(unknown)}")
    return renamed


def targets_of(key: str, table: Mapping[str, Any]) -> tuple[str, ...]:
    """The diffusers names of a key (without its prefix): one, several if it is split, none if unknown."""
    words = key.split(".")
    for length in range(len(words), 0, -1):
        module = table["modules"].get(".".join(words[:length]))
        if module is None:
            continue
        rest = "".join(f".{word}" for word in words[length:])
        for old, new in table["inside"].items():
            rest = re.sub(rf"\.{re.escape(old)}(?=\.|$)", f".{new}", rest)
        stem, _, leaf = (module + rest).rpartition(".")
        return tuple(f"{stem}.{name}" for name in table.get("split", {}).get(leaf, [leaf]))
    return ()


def fill(network: nn.Module, tensors: Mapping[str, Tensor], what: str) -> nn.Module:
    """The ``network`` (on the meta device) with ``tensors`` as its weights; 1x1 convolutions may become
    linear layers.

    Raises:
        ValueError: a tensor too many, too few, or of another shape.
    """
    wanted = network.state_dict()
    fitting = {}
    for key, tensor in tensors.items():
        shape = wanted[key].shape if key in wanted else tensor.shape
        if set(tensor.shape[len(shape) :]) <= {1}:
            tensor = tensor.reshape(tensor.shape[: len(shape)])
        fitting[key] = tensor
    problems = {
        "unknown keys": [key for key in fitting if key not in wanted],
        "missing keys": [key for key in wanted if key not in fitting],
        "keys of another shape": [
            f"{key} {list(fitting[key].shape)}, expected {list(wanted[key].shape)}"
            for key in wanted
            if key in fitting and fitting[key].shape != wanted[key].shape
        ],
    }
    found = [f"{len(keys)} {problem}: {_first(keys)}" for problem, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{what} doesn't fit {type(network).__name__}; " + "; ".join(found))
    network.load_state_dict(fitting, assign=True)
    return network


def save_network(network: Network, folder: Path) -> None:
    """Write a part, as ``frozen.load_part`` and ``videocrafter.load_unet`` read it."""
    if hasattr(network, "save_pretrained"):
        with no_progress_bar():
            network.save_pretrained(folder)
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": type(network).__name__}), encoding="utf-8")


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bar, which it draws even for a local file; the run has its own."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def check_all_known(state: State) -> None:
    """Refuse keys that belong to no part and are not in ``DROPPED``.

    Raises:
        ValueError: names the first few.
    """
    prefixes = tuple(_key_map(name)["prefix"] for name in ("mvdream_unet", "vae", "openclip_text"))
    unknown = [key for key in state if not key.startswith(prefixes) and not _dropped(key)]
    if unknown:
        raise ValueError(f"{len(unknown)} unknown keys: {_first(unknown)}")


def check_schedule(state: State) -> None:
    """Refuse a checkpoint that was trained with other noise levels than ``SCHEDULE``'s.

    Raises:
        ValueError: says where they differ.
    """
    from diffusers import DDIMScheduler

    ours = DDIMScheduler(**SCHEDULE).alphas_cumprod
    theirs = state.get("alphas_cumprod", ours).float()
    # 1e-5: theirs were computed in float64, ours in float32; the two differ by 5e-7.
    if theirs.shape != ours.shape or (theirs - ours).abs().max() > 1e-5:
        raise ValueError("its noise schedule (alphas_cumprod) is not the one of Stable Diffusion 2.1")


@cache
def _key_map(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).with_name("key_maps") / f"{name}.json").read_text(encoding="utf-8"))


def _dropped(key: str) -> bool:
    return any(pattern.fullmatch(key) for pattern in DROPPED.values())


def _first(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
