"""Models of the real size with random weights, in diffusers layout.

They give time and memory and say nothing of the pictures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))  # for the tests' models

IMAGE = {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "sample_size": 64,
}
VIEWS = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16, "sample_size": 32}
DDPM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
EPSILON, VELOCITY = (
    ("DDIMScheduler", DDPM | {"prediction_type": prediction}) for prediction in ("epsilon", "v_prediction")
)
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
# Text encoders have one layer: they run once.
T5 = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 1, "feed_forward_proj": "gated-gelu"}
CLIP, CLIP_L, CLIP_G = (
    {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "projection_dim": width,
        "num_hidden_layers": 1,
    }
    for width in (1024, 768, 1280)
)
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
SD3 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": [*range(13)],
    "qk_norm": "rms_norm",
}
SD3_VAE = VAE | {"latent_channels": 16, "shift_factor": 0.0609, "scaling_factor": 1.5305}
SD3_VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}
WAN = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
MODELS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "stable-diffusion": {"unet": ("UNet2DConditionModel", IMAGE), "scheduler": EPSILON},
    "stable-diffusion-v": {
        "unet": ("UNet2DConditionModel", IMAGE | {"upcast_attention": True}),
        "scheduler": VELOCITY,
    },
    "mvdream": {"unet": ("UNet2DConditionModel", IMAGE | VIEWS), "scheduler": EPSILON},
    "zeroscope": {"unet": ("UNet3DConditionModel", {"sample_size": 32}), "scheduler": EPSILON},
    "videocrafter2": {"unet": ("UNet3DConditionModel", {"sample_size": (40, 64)}), "scheduler": EPSILON},
    "animatediff": {
        "unet": ("UNet2DConditionModel", {"cross_attention_dim": 768, "sample_size": 64}),
        "motion_adapter": ("MotionAdapter", {"use_motion_mid_block": False}),
        "scheduler": EPSILON,
        "text_encoder": ("CLIPTextModel", CLIP_L),
    },
    "sdxl": {
        "unet": ("UNet2DConditionModel", SDXL),
        "scheduler": EPSILON,
        "text_encoder": ("CLIPTextModel", CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
    },
    "sd3": {
        "transformer": ("SD3Transformer2DModel", SD3),
        "vae": ("AutoencoderKL", SD3_VAE),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        "text_encoder_3": ("T5EncoderModel", T5),
    },
    "wan": {
        "transformer": ("WanTransformer3DModel", WAN),
        "vae": ("AutoencoderKLWan", {}),
        "scheduler": (
            "UniPCMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        ),
        "text_encoder": ("UMT5EncoderModel", T5),
    },
    "ltx": {
        "transformer": ("LTXVideoTransformer3DModel", {}),
        "vae": ("AutoencoderKLLTXVideo", {}),
        "scheduler": (
            "FlowMatchEulerDiscreteScheduler",
            {
                "use_dynamic_shifting": True,
                "base_shift": 0.95,
                "max_shift": 2.05,
                "base_image_seq_len": 1024,
                "max_image_seq_len": 4096,
                "shift_terminal": 0.1,
            },
        ),
        "text_encoder": ("T5EncoderModel", T5),
    },
    "cogvideox": {
        "transformer": ("CogVideoXTransformer3DModel", {}),
        "vae": ("AutoencoderKLCogVideoX", {}),
        "scheduler": (
            "CogVideoXDDIMScheduler",
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
        "text_encoder": ("T5EncoderModel", T5),
    },
}
"""Folder -> the classes and configs of its parts; a VAE and a text encoder that are missing are shared."""
VIDEO = {
    "_vc": "videocrafter2",
    "_wan": "wan",
    "_cogvideox": "cogvideox",
    "_animatediff": "animatediff",
    "_ltx": "ltx",
}
"""What the names of configs contain -> the video model that they use; ZeroScope otherwise."""


def make_models(root: Path, names: Iterable[str] = MODELS) -> None:
    """Write the folders that ``root`` lacks (3 to 5 GB each)."""
    for name in names:
        if (root / name).exists():
            continue
        began = time.perf_counter()
        half_made = root / f"{name}.part"
        for part, (class_name, config) in MODELS[name].items():
            save(class_name, config, half_made / part)
        link_common(half_made, root / "common")
        if name == "videocrafter2":
            from diffusers.models.embeddings import TimestepEmbedding

            save_tensors(TimestepEmbedding(320, 1280), half_made / "fps_embedding")
        half_made.rename(root / name)
        print(f"{name}: made in {time.perf_counter() - began:.0f} s", file=sys.stderr)


def make_tiny_models(root: Path) -> None:
    """The same folders with the tests' tiny models."""
    from tests import tiny_models, tiny_transformers

    for name, save_model in (
        ("stable-diffusion", tiny_models.save_stable_diffusion),
        ("stable-diffusion-v", partial(tiny_models.save_stable_diffusion, prediction_type="v_prediction")),
        ("mvdream", tiny_models.save_multi_view),
        ("zeroscope", tiny_models.save_zeroscope),
        ("videocrafter2", tiny_models.save_videocrafter2),
        ("animatediff", tiny_models.save_animatediff),
        ("sdxl", tiny_transformers.save_sdxl),
        ("sd3", tiny_transformers.save_sd3),
        ("wan", tiny_models.save_wan),
        ("cogvideox", tiny_transformers.save_cogvideox),
        ("ltx", tiny_transformers.save_ltx),
    ):
        if not (root / name).exists():
            save_model(root / name)


def models_folder(*, toy: bool) -> Path:
    """Where the models are unless the command line says so."""
    return Path(tempfile.gettempdir()) / f"fourdfy-models-{'toy' if toy else 'real'}"


def parse_with_models(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of ``parser``, and ``--toy`` and ``--models``, which is never None."""
    parser.add_argument("--models", type=Path, help="folder of the models, made if missing")
    parser.add_argument("--toy", action="store_true", help="tiny models and images, to see that it runs")
    args = parser.parse_intermixed_args(argv)
    args.models = args.models or models_folder(toy=args.toy)
    return args


def model_paths(root: Path, config: str) -> list[str]:
    """Overrides that let an experiment use the models in ``root``.

    Args:
        config: its name, perhaps with that of an overlay for image steps: ``fourdfy_stage_2+sdxl``.
    """
    image = config.partition("+")[2] or "stable-diffusion"
    video = next((model for end, model in VIDEO.items() if end in config), "zeroscope")
    models = {
        "prompt_processor.pretrained_model_name_or_path": image,
        "prompt_processor_multi_view.pretrained_model_name_or_path": "stable-diffusion",
        "prompt_processor_video.pretrained_model_name_or_path": video,
        "guidance.pretrained_model_name_or_path": image,
        "guidance.pretrained_model_name_or_path_lora": "stable-diffusion-v" if "+" not in config else image,
        "guidance_multi_view.pretrained_model_name_or_path": "mvdream",
        "guidance_video.pretrained_model_name_or_path": video,
    }
    if video == "animatediff":
        models["guidance_video.motion_adapter"] = f"{video}/motion_adapter"
    return [f"system.{key}={root / name}" for key, name in models.items()]


def link_common(folder: Path, common: Path) -> None:
    """Link the VAE, the tokenizer and the text encoder that the model lacks."""
    if not common.exists():
        save("AutoencoderKL", VAE, common / "vae")
        save("CLIPTextModel", CLIP, common / "text_encoder")
    for part in ("vae", "tokenizer", "text_encoder"):
        if not (folder / part).exists():
            (folder / part).symlink_to((common / part).absolute())


def save(class_name: str, config: dict[str, Any], folder: Path) -> None:
    """Save a scheduler, or a network in float16, with PyTorch's initial weights, which a GPU draws faster."""
    import diffusers

    torch.manual_seed(0)
    if folder.name.startswith("text_encoder"):
        save_text_encoder(class_name, config, folder)
        return
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        part = getattr(diffusers, class_name)(**config)
        (part.half() if isinstance(part, torch.nn.Module) else part).save_pretrained(folder)


def save_text_encoder(class_name: str, config: dict[str, Any], folder: Path) -> None:
    """Save it with a tokenizer of the tests, whose part has the same number."""
    import transformers

    from tests import tiny_models, tiny_transformers

    encoder, number = getattr(transformers, class_name), folder.name.removeprefix("text_encoder")
    if "T5" in class_name:
        tiny_transformers.save_t5_text(folder.parent, number)
        config = config | {"vocab_size": len(tiny_models.unigram_pieces())}
    else:
        tiny_models.save_clip_text(folder.parent, number)
        config = config | {"hidden_act": "gelu", "max_position_embeddings": tiny_models.MAX_TOKENS}
    encoder(encoder.config_class(**config)).half().save_pretrained(folder)


def save_tensors(network: torch.nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text("{}", encoding="utf-8")
