"""Tiny random-weight models in genuine folder layouts, loaded through the genuine code paths.

``save_stable_diffusion(folder)``, ``save_multi_view(folder)``, ``save_zeroscope(folder)``,
``save_videocrafter2(folder)``, ``save_wan(folder)`` and ``save_animatediff(folder)`` write a diffusers folder
of about a megabyte and return it; the tokenizer is a real CLIP byte-pair encoding (Wan's: a T5 unigram model)
with a small vocabulary, so prompts of the usual lengths fit into 77 tokens.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import TimestepEmbedding
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
    XCLIPConfig,
    XCLIPModel,
    XCLIPTextConfig,
    XCLIPVisionConfig,
)

from fourdfy.priors import convert
from fourdfy.priors.convert import targets_of
from fourdfy.prompts.library import LIBRARY

SAMPLE_SIZE = 8
"""Latents per side; the VAE makes 4 pixels of one, so the models' own size is 32 x 32."""
TEXT_WIDTH = 16
MAX_TOKENS = 77
DATA = Path(__file__).with_name("data")
KEY_MAPS = Path(convert.__file__).with_name("key_maps")
ORIGINAL_UNET = {"sample_size": 8, "block_out_channels": (64,) * 4, "cross_attention_dim": 64}
"""One head of the published width: the narrowest that the original checkpoints' layout allows."""
QUALITY_WORDS = (
    "ugly, bad anatomy, blurry, pixelated, obscure, unnatural colors, poor lighting, dull, unclear, cropped, "
    "lowres, low quality, artifacts, duplicate, morbid, mutilated, poorly drawn face, deformed, dehydrated, "
    "bad proportions, low motion, static statue, not moving, no motion, "
    "side front back overhead backside view"
)


def save_stable_diffusion(
    folder: Path, prediction_type: str = "epsilon", sample_size: int = SAMPLE_SIZE, seed: int = 0
) -> Path:
    """Stable Diffusion: UNet2D, VAE, scheduler, tokenizer, CLIP text encoder."""
    torch.manual_seed(seed)
    save_common(folder, "StableDiffusionPipeline", "UNet2DConditionModel", prediction_type)
    randomise(UNet2DConditionModel(**unet_config(sample_size))).save_pretrained(folder / "unet")
    return folder


def save_multi_view(folder: Path, sample_size: int = SAMPLE_SIZE, seed: int = 0) -> Path:
    """MVDream as a diffusers folder: the U-Net takes 16 camera numbers as a projected class label."""
    torch.manual_seed(seed)
    save_common(folder, "StableDiffusionPipeline", "UNet2DConditionModel", "epsilon")
    config = unet_config(sample_size)
    config |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16}
    randomise(UNet2DConditionModel(**config)).save_pretrained(folder / "unet")
    return folder


def save_zeroscope(folder: Path, sample_size: int = SAMPLE_SIZE, seed: int = 0) -> Path:
    """ZeroScope: UNet3D and the parts of Stable Diffusion."""
    torch.manual_seed(seed)
    save_common(folder, "TextToVideoSDPipeline", "UNet3DConditionModel", "epsilon")
    _save_video_unet(folder, sample_size)
    return folder


def save_videocrafter2(folder: Path, sample_size: int = SAMPLE_SIZE, seed: int = 0) -> Path:
    """VideoCrafter2 as it is after conversion: ZeroScope's parts and ``fps_embedding``."""
    torch.manual_seed(seed)
    save_common(folder, "TextToVideoSDPipeline", "UNet3DConditionModel", "epsilon")
    unet = _save_video_unet(folder, sample_size)
    place = folder / "fps_embedding"
    place.mkdir()
    linear = unet.time_embedding.linear_1
    embedding = TimestepEmbedding(linear.in_features, linear.out_features)
    save_file(embedding.state_dict(), place / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "TimestepEmbedding", "in_channels": linear.in_features}
    (place / "config.json").write_text(json.dumps(config | {"time_embed_dim": linear.out_features}))
    return folder


def save_wan(folder: Path, seed: int = 0) -> Path:
    """Wan 2.1: a flow transformer, a causal VAE of the genuine strides, a UMT5 encoder."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    randomise(transformer).save_pretrained(folder / "transformer")
    randomise(AutoencoderKLWan(base_dim=4, num_res_blocks=1)).save_pretrained(folder / "vae")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    pieces = unigram_pieces()
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer")
    text_config = UMT5Config(
        vocab_size=len(pieces),
        d_model=TEXT_WIDTH,
        d_ff=32,
        d_kv=8,
        num_heads=2,
        num_layers=2,
        tie_word_embeddings=False,
    )
    UMT5EncoderModel(text_config).save_pretrained(folder / "text_encoder")
    return folder


def save_animatediff(folder: Path, seed: int = 0, in_the_middle: bool = False) -> Path:
    """Stable Diffusion, and in ``motion_adapter`` the layers in time: those of version 3, or of version 2,
    which has some ``in_the_middle``."""
    save_stable_diffusion(folder, seed=seed)
    config = {"motion_layers_per_block": 1, "motion_norm_num_groups": 8, "motion_num_attention_heads": 2}
    config |= {"block_out_channels": (16, 32), "use_motion_mid_block": in_the_middle}
    adapter = MotionAdapter(**config)
    randomise(adapter).save_pretrained(folder / "motion_adapter")
    return folder


def save_mvdream_checkpoint(file: Path, seed: int = 0) -> dict[str, torch.nn.Module]:
    """MVDream as its authors' one file, at a small width; returns the diffusers networks in it."""
    unet = UNet2DConditionModel(
        **ORIGINAL_UNET,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        attention_head_dim=[1] * 4,
        use_linear_projection=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=16,
    )
    networks = {"unet": unet} | _original_common(seed)
    torch.save(_original_state("mvdream", networks), file)
    return networks


def save_videocrafter2_checkpoint(file: Path, seed: int = 0) -> dict[str, torch.nn.Module]:
    """VideoCrafter2 as its authors' one file, at a small width; returns the networks in it.

    As Lightning's files do, it also holds an object of a class that a reader need not have.
    """
    networks = {
        "unet": UNet3DConditionModel(**ORIGINAL_UNET, attention_head_dim=64),
        "fps_embedding": TimestepEmbedding(64, 256),
    } | _original_common(seed)
    state = _original_state("videocrafter2", networks)
    torch.save({"epoch": 1, "callbacks": Path("a callback"), "state_dict": state}, file)
    return networks


def save_clip(folder: Path, seed: int = 0, pixels: int = 32) -> Path:
    """CLIP as its authors publish it: both networks, the tokenizer and the images' mean in one folder."""
    return _save_judge(folder, seed, CLIPModel, CLIPConfig, CLIPTextConfig, CLIPVisionConfig, pixels)


def save_xclip(folder: Path, seed: int = 0, pixels: int = 32) -> Path:
    """X-CLIP, for clips of 4 frames."""
    kinds = (XCLIPModel, XCLIPConfig, XCLIPTextConfig, XCLIPVisionConfig)
    return _save_judge(folder, seed, *kinds, pixels, num_frames=4, mit_hidden_size=TEXT_WIDTH)


def _save_judge(folder: Path, seed: int, model, config, text, vision, pixels: int, **more) -> Path:
    torch.manual_seed(seed)
    words = folder / "words"
    save_tokenizer(words)
    for file in (words / "tokenizer").iterdir():
        file.rename(folder / file.name)
    shutil.rmtree(words)
    vocab = _byte_pairs()[0]
    common = {"hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 2, "projection_dim": TEXT_WIDTH}
    ends = {"bos_token_id": vocab["<|startoftext|>"], "eos_token_id": vocab["<|endoftext|>"]}
    words_config = text(**common, **ends, vocab_size=len(vocab), max_position_embeddings=MAX_TOKENS)
    eyes = {"mit_hidden_size", "num_frames"} & more.keys()
    vision_config = vision(**common, image_size=pixels, patch_size=8, **{key: more[key] for key in eyes})
    whole = config(
        text_config=words_config.to_dict(),
        vision_config=vision_config.to_dict(),
        projection_dim=TEXT_WIDTH,
        **({"prompt_num_attention_heads": 2} if eyes else {}),
    )
    randomise(model(whole)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]})
    )
    return folder


def save_clip_text(folder: Path, number: str = "", encoder_class: type = CLIPTextModel) -> None:
    """The parts ``tokenizer`` (vocab.json, merges.txt) and ``text_encoder``, with ``number`` behind their
    names."""
    save_tokenizer(folder, number)
    vocab, _ = _byte_pairs()
    text_config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=TEXT_WIDTH,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["!"],
    )
    encoder_class(text_config).save_pretrained(folder / f"text_encoder{number}")


def save_tokenizer(folder: Path, number: str = "") -> None:
    """The part ``tokenizer`` alone."""
    vocab, merges = _byte_pairs()
    place = folder / f"tokenizer{number}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "vocab.json").write_text(json.dumps(vocab))
    (place / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "!",
        "do_lower_case": True,
    }
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = ("bos_token", "eos_token", "unk_token", "pad_token")
    (place / "special_tokens_map.json").write_text(json.dumps({key: config[key] for key in tokens}))


def save_common(folder: Path, pipeline: str, unet_class: str, prediction_type: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_clip_text(folder)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", unet_class],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def _save_video_unet(folder: Path, sample_size: int) -> UNet3DConditionModel:
    unet = UNet3DConditionModel(
        sample_size=sample_size,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
    )
    randomise(unet).save_pretrained(folder / "unet")
    return unet


def _original_common(seed: int) -> dict[str, torch.nn.Module]:
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    text = CLIPTextConfig(
        vocab_size=len(_byte_pairs()[0]),
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=62,
        eos_token_id=63,
        pad_token_id=0,
    )
    return {"vae": vae, "text_encoder": CLIPTextModel(text)}


def _original_state(name: str, networks: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The networks' tensors under the keys of the published checkpoint, with its left-out ones."""
    ours = {}
    for part, network in networks.items():
        prefix = "fps_embedding." if part == "fps_embedding" else ""
        ours[part] = {prefix + key: value for key, value in randomise(network).state_dict().items()}
    ours["unet"] |= ours.pop("fps_embedding", {})
    maps = {"unet": f"{name}_unet", "vae": "vae", "text_encoder": "openclip_text"}
    tables = {part: json.loads((KEY_MAPS / f"{file}.json").read_text()) for part, file in maps.items()}
    schedule = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    state = {}
    for key, shape in json.loads((DATA / f"original_keys_{name}.json").read_text()).items():
        part = next((part for part, table in tables.items() if key.startswith(table["prefix"])), None)
        targets = targets_of(key.removeprefix(tables[part]["prefix"]), tables[part]) if part else ()
        if key == "alphas_cumprod":
            state[key] = schedule.alphas_cumprod
        elif not targets or ".resblocks.2." in key:
            state[key] = torch.zeros(1)
        elif ours[part].keys() >= set(targets):  # equal widths need no shortcuts; fewer blocks of text
            tensor = torch.cat([ours[part][target] for target in targets])
            state[key] = tensor.reshape(*tensor.shape, *[1] * (len(shape) - tensor.ndim))
    return state


def unet_config(sample_size: int) -> dict:
    return {
        "sample_size": sample_size,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 2,
        "use_linear_projection": True,
    }


def randomise(network: torch.nn.Module) -> torch.nn.Module:
    """Some layers start at zero (temporal convolutions, say) and would hide what they do."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network


@cache
def unigram_pieces() -> list[tuple[str, float]]:
    """T5's kind of vocabulary, learned from the prompt library."""
    texts = [text for group in json.loads(LIBRARY.read_text()).values() for text in group]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*texts, QUALITY_WORDS], trainer)
    return [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]


@cache
def _byte_pairs() -> tuple[dict[str, int], list[str]]:
    """CLIP's kind of vocabulary, learned from the prompt library: every byte, and common words."""
    texts = [text for group in json.loads(LIBRARY.read_text()).values() for text in group]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=" ", behavior="removed"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([*texts, QUALITY_WORDS], trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in learned]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # "!" is id 0, the padding of Stable Diffusion 2's tokenizer.
    tokens = sorted(alphabet, key=lambda byte: byte != "!")
    tokens += [byte + "</w>" for byte in alphabet]
    tokens += [pair.replace(" ", "") for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges
