"""Original checkpoints in diffusers' layout: every key has a place, and the numbers stay."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet3DConditionModel
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel

from fourdfy.priors import convert
from fourdfy.priors.convert import convert_checkpoint, convert_text, convert_unet, convert_vae
from fourdfy.priors.videocrafter import VideoCrafter, load_unet
from tests.priors.twins import HEAD_WIDTH, original_keys, recorded, twin_state
from tests.tiny_models import save_mvdream_checkpoint, save_videocrafter2_checkpoint

NAMES = {"mvdream": "MVDream", "videocrafter2": "VideoCrafter2"}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def full_size(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in original_keys(name).items()}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    error = (ours.double() - theirs).abs().max().item()
    spread = theirs.std().item()
    assert error <= tolerance, f"max abs error {error:.3g} > {tolerance:g}, outputs' std {spread:.3g}"


# The published checkpoints, on the meta device


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mvdream", {"unet": 867_572_164, "vae": 83_653_863, "text_encoder": 340_387_840}),
        (
            "videocrafter2",
            {
                "unet": 1_411_233_860,
                "fps_embedding": 2_050_560,
                "vae": 83_653_863,
                "text_encoder": 340_387_840,
            },
        ),
    ],
)
def test_every_key_of_the_published_checkpoint_has_its_place(name, parameters, monkeypatch):
    state = full_size(name)
    monkeypatch.setattr(convert, "check_schedule", lambda state: None)
    assert convert.family_of(state) == NAMES[name]
    convert.check_all_known(state)
    parts = convert_unet(state, NAMES[name])
    parts |= {"vae": convert_vae(state), "text_encoder": convert_text(state)}
    assert {part: count(network) for part, network in parts.items()} == parameters
    # fill() found each network's keys once; what is left are the two reasons for leaving out.
    renamed = {
        key
        for map_name in (f"{name}_unet", "vae", "openclip_text")
        for key in convert.rename(state, map_name)
    }
    last_block = {key for key in state if ".resblocks.23." in key}
    dropped = {key for key in state if convert._dropped(key)}
    assert len(last_block) == 12
    assert len(dropped) == 2 + {"mvdream": 12, "videocrafter2": 13}[name]
    # The text tower's 24 fused weights and biases are three each; the last block was still in here.
    assert len(renamed) == len(state) - len(dropped) + 2 * 2 * 24


# The twins; those of the U-Nets are in test_mvdream.py and test_videocrafter2.py


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_vaes_twin_gives_what_the_original_gave(name, dtype):
    facts = recorded(name)
    vae = convert_vae(twin_state(name, "vae")).to(dtype).eval()
    with torch.no_grad():
        posterior = vae.encode(facts["vae/image"].to(dtype)).latent_dist
        decoded = vae.decode(facts["vae/z"].to(dtype)).sample
    assert_close(posterior.mean, facts["vae/mean"], TOLERANCE[dtype])
    assert_close(posterior.logvar, facts["vae/logvar"], TOLERANCE[dtype])
    # Four levels of unscaled activations: float32 costs the decoder 2e-5.
    assert_close(decoded, facts["vae/decoded"], TOLERANCE[dtype] * 5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_text_encoders_twin_gives_what_the_original_gave(dtype, tmp_path):
    facts = recorded("videocrafter2")
    convert_text(twin_state("videocrafter2", "text"), HEAD_WIDTH["text"]).save_pretrained(tmp_path)
    encoder = CLIPTextModel.from_pretrained(tmp_path, dtype=dtype).eval()
    with torch.no_grad():
        ours = encoder(facts["text/tokens"]).last_hidden_state
    assert_close(ours, facts["text/output"], TOLERANCE[dtype])


# Whole files


def test_an_mvdream_file_becomes_the_network_that_it_was_made_of(tmp_path):
    given = save_mvdream_checkpoint(tmp_path / "mvdream.pt")
    convert_checkpoint(tmp_path / "mvdream.pt", tmp_path / "out")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    assert_same_weights(unet, given["unet"])
    assert unet.config.attention_head_dim == given["unet"].config.attention_head_dim
    assert_same_weights(AutoencoderKL.from_pretrained(tmp_path / "out" / "vae"), given["vae"])
    text = CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder")
    assert_same_weights(text, given["text_encoder"])


def test_a_videocrafter2_file_becomes_all_that_its_guidance_needs(tmp_path):
    given = save_videocrafter2_checkpoint(tmp_path / "model.ckpt")
    out = tmp_path / "out"
    convert_checkpoint(tmp_path / "model.ckpt", out)
    assert {*VideoCrafter.Config.parts, "text_encoder"} == {place.name for place in out.iterdir()}
    unet = UNet3DConditionModel.from_pretrained(out / "unet")
    assert_same_weights(unet, given["unet"])
    assert unet.config.sample_size == [40, 64]
    fps = load_file(out / "fps_embedding" / "diffusion_pytorch_model.safetensors")
    assert fps.keys() == given["fps_embedding"].state_dict().keys()
    assert load_unet(out, 8, dtype=torch.float32, device=torch.device("cpu"))
    config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert (config["beta_start"], config["beta_end"]) == (0.00085, 0.012)


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# What is refused


def test_a_key_too_many_or_too_few_is_named():
    state = twin_state("mvdream", "vae")
    gone = "first_stage_model.encoder.mid.attn_1.q.weight"
    with pytest.raises(ValueError, match=r"1 missing keys: encoder.mid_block.attentions.0.to_q.weight"):
        convert_vae({key: value for key, value in state.items() if key != gone})
    with pytest.raises(ValueError, match=r"1 unknown keys: encoder.down_blocks.0.resnets.0.norm7.bias"):
        convert_vae(state | {"first_stage_model.encoder.down.0.block.0.norm7.bias": torch.zeros(32)})
    with pytest.raises(ValueError, match=r"1 unknown keys: first_stage_model.colour.bias"):
        convert_vae(state | {"first_stage_model.colour.bias": torch.zeros(32)})
    with pytest.raises(ValueError, match=r"another shape: .*to_q.weight \[128, 64\], expected \[128, 128\]"):
        convert_vae(state | {gone: torch.zeros(128, 64, 1, 1)})
    with pytest.raises(ValueError, match=r"4 unknown keys: a, b, c, \.\.\."):
        convert.check_all_known(state | {key: torch.zeros(1) for key in "abcd"})


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt: not a checkpoint of a known kind.*Its keys: weight"):
        convert_checkpoint(tmp_path / "other.pt", tmp_path / "out")


def test_half_a_file_is_refused_by_name(tmp_path):
    state = {convert.FAMILIES["MVDream"].mark: torch.zeros(1)}
    torch.save(state, tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"half.pt lacks the key 'model.diffusion_model.input_blocks.1"):
        convert_checkpoint(tmp_path / "half.pt", tmp_path / "out")


def test_other_noise_levels_are_refused():
    with pytest.raises(ValueError, match="noise schedule"):
        convert.check_schedule({"alphas_cumprod": torch.linspace(1, 0, 1000)})


def test_wrappings_are_taken_off():
    inner = {"a": torch.zeros(1)}
    assert convert.unwrapped(inner) == inner
    assert convert.unwrapped({"state_dict": inner, "epoch": 3}) == inner
    assert convert.unwrapped({"module": {"_forward_module.a": inner["a"]}}) == inner
