"""What the ``config.json`` of a network may hold.

diffusers and transformers build what the file says: a billion layers take all time and memory, and a null
where a number belongs fails somewhere inside, perhaps only in the first step. Keys that are not listed here
are left to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from fourdfy.bounds import Bounds
from fourdfy.config_files import ConfigError
from fourdfy.priors.model_folder import description_file, read_description, shown
from fourdfy.priors.scheduler_file import Allowed, either, fits

MOST = 128
"""Layers of a kind, and entries of a list."""
LAYERS, SIZE, NUMBER = range(1, MOST + 1), range(1, 2**20), Bounds(-1e6, 1e6)

ALLOWED: dict[str, Allowed] = {
    **dict.fromkeys(
        (
            "decoder_layers_per_block", "dim_mult", "layers_per_block", "mit_num_hidden_layers",
            "motion_layers_per_block", "prompt_layers",
            "motion_mid_block_layers_per_block",
            "motion_transformer_layers_per_block", "motion_transformer_layers_per_mid_block",
            "num_decoder_layers", "num_heads", "num_hidden_layers",
            "num_layers", "num_res_blocks", "patch_size", "reverse_transformer_layers_per_block",
            "transformer_layers_per_block",
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        (
            "addition_embed_type_num_heads", "addition_time_embed_dim", "attention_head_dim", "base_dim",
            "block_out_channels", "caption_channels", "caption_projection_dim", "conv_in_channels",
            "conv_in_kernel", "conv_out_kernel", "cross_attention_dim", "d_ff", "d_kv", "d_model",
            "decoder_base_dim", "decoder_block_out_channels", "encoder_hid_dim", "ffn_dim", "freq_dim",
            "hidden_size", "in_channels", "intermediate_size", "joint_attention_dim", "latent_channels",
            "max_position_embeddings", "max_text_seq_length", "motion_max_seq_length",
            "motion_norm_num_groups", "motion_num_attention_heads", "norm_num_groups", "num_attention_heads",
            "num_class_embeds",
            "out_channels", "pooled_projection_dim", "pos_embed_max_size", "projection_dim",
            "projection_class_embeddings_input_dim",
            "relative_attention_max_distance", "relative_attention_num_buckets", "rope_max_seq_len",
            "sample_frames", "sample_height", "sample_size", "sample_width", "scale_factor_spatial",
            "scale_factor_temporal", "temporal_compression_ratio", "text_dim", "text_embed_dim",
            "time_cond_proj_dim", "time_embed_dim", "time_embedding_dim", "vocab_size", "z_dim",
            "image_size", "mit_hidden_size", "mit_intermediate_size", "mit_num_attention_heads",
            "num_channels", "num_frames", "prompt_num_attention_heads",
        ),
        SIZE,
    ),
    **dict.fromkeys(
        (
            "attention_dropout", "dropout", "dropout_rate", "eps", "freq_shift", "initializer_factor",
            "initializer_range", "latents_mean", "latents_std", "layer_norm_eps", "layer_norm_epsilon",
            "mid_block_scale_factor", "norm_eps", "resnet_out_scale_factor", "scaling_factor",
            "shift_factor", "spatial_interpolation_scale", "temporal_interpolation_scale",
        ),
        NUMBER,
    ),
    **dict.fromkeys(
        (
            "center_input_sample", "class_embeddings_concat", "cross_attn_norm", "dual_cross_attention",
            "flip_sin_to_cos", "force_upcast", "is_residual", "mid_block_add_attention",
            "mid_block_only_cross_attention", "only_cross_attention", "resnet_skip_time_act",
            "temperal_downsample", "upcast_attention", "use_linear_projection", "use_motion_mid_block",
            "use_post_quant_conv", "use_quant_conv", "use_rotary_positional_embeddings",
        ),
        (False, True),
    ),
    **dict.fromkeys(
        (
            "act_fn", "attention_type", "down_block_types", "hidden_act", "mid_block_type",
            "resnet_time_scale_shift", "time_embedding_act_fn", "time_embedding_type",
            "timestep_post_act", "up_block_types",
        ),
        str,
    ),
    **dict.fromkeys(("bos_token_id", "downsample_padding", "eos_token_id", "pad_token_id"), range(2**20)),
}  # fmt: skip
"""The values of a key or, in a list, of each entry."""

LISTS = ("block_out_channels", "down_block_types", "up_block_types")
"""Keys of lists, with one entry for each block."""

OR_LISTS = (
    "attention_head_dim", "cross_attention_dim", "decoder_block_out_channels", "decoder_layers_per_block",
    "dim_mult", "latents_mean", "latents_std",
    "layers_per_block", "motion_layers_per_block", "motion_num_attention_heads",
    "motion_transformer_layers_per_block", "motion_transformer_layers_per_mid_block", "num_attention_heads",
    "only_cross_attention", "patch_size", "reverse_transformer_layers_per_block", "sample_size",
    "temperal_downsample", "transformer_layers_per_block",
)  # fmt: skip
"""Keys that may have a list."""

OR_NULL = (
    "addition_time_embed_dim", "bos_token_id", "conv_in_channels", "decoder_base_dim", "encoder_hid_dim",
    "latents_mean", "latents_std", "mid_block_only_cross_attention", "mid_block_type", "num_attention_heads",
    "num_class_embeds", "pad_token_id", "patch_size", "projection_class_embeddings_input_dim",
    "reverse_transformer_layers_per_block", "sample_size", "shift_factor", "temporal_compression_ratio",
    "time_cond_proj_dim", "time_embedding_act_fn", "time_embedding_dim", "timestep_post_act",
    "upcast_attention",
)  # fmt: skip
"""Keys that may be null."""


NETWORKS = ("text_config", "vision_config")
"""Keys of networks inside of one, with keys of their own."""


def check_network_file(folder: Path, part: str) -> None:
    """Refuse a description of a network that none can be made from.

    Raises:
        ConfigError: names the file, the key and what was expected.
    """
    file, description = description_file(folder, part), read_description(folder, part)
    inner = [value for key, value in description.items() if key in NETWORKS and isinstance(value, dict)]
    for key, value in chain(*(section.items() for section in (description, *inner))):
        if key not in ALLOWED or (value is None and key in OR_NULL):
            continue
        entries = [*_entries(value)] if key in LISTS or key in OR_LISTS else [value]
        has_shape = isinstance(value, list) or key not in LISTS
        if not has_shape or not 0 < len(entries) <= MOST or not all(fits(e, ALLOWED[key]) for e in entries):
            a_list = f"a list of 1 to {MOST}: " if key in LISTS else ""
            raise ConfigError(f"{file}: {key}={shown(value)}; expected {a_list}{either(ALLOWED[key])}")
    counts = [len(description.get(key, ())) for key in LISTS]
    if "up_block_types" in description and len({*counts}) > 1:
        raise ConfigError(f"{file}: {', '.join(LISTS)} have {counts} entries; expected as many in each")


def _entries(value: Any) -> Iterator[Any]:
    """What is no list in nested lists."""
    for entry in value if isinstance(value, list) else (value,):
        yield from _entries(entry) if isinstance(entry, list) else (entry,)
