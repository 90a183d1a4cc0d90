"""Multi-view attention and camera vectors, against recorded outputs of the original model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from fourdfy.priors.convert import convert_unet
from fourdfy.priors.mvdream import camera_vectors, enable_multi_view_attention
from tests.priors.twins import HEAD_WIDTH, recorded, twin_state

DATA = Path(__file__).parents[1] / "data"
CAMERAS = json.loads((DATA / "camera_conditioning.json").read_text())
CASES = next(value for value in CAMERAS.values() if isinstance(value, list))

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def twin() -> UNet2DConditionModel:
    """The small twin of MVDream's U-Net."""
    unet = convert_unet(twin_state("mvdream", "unet"), "MVDream", HEAD_WIDTH["unet"])["unet"]
    enable_multi_view_attention(unet, num_views=4)
    return unet.eval()


def predict(unet, sample, timestep, context, camera):
    with torch.no_grad():
        return unet(sample, timestep, context, class_labels=camera).sample


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("timestep", [20, 777])
def test_the_twin_gives_what_the_original_gave(twin, timestep, dtype):
    facts = recorded("mvdream")
    sample, context, camera = (
        facts[f"unet_t{timestep}/{key}"].to(dtype) for key in ("sample", "context", "camera")
    )
    output = facts[f"unet_t{timestep}/output"]
    ours = predict(twin.to(dtype), sample, timestep, context, camera)
    error = (ours.double() - output).abs().max().item()
    # Without the attention over views the error is 0.4.
    assert error <= TOLERANCE[dtype], f"max abs error {error:.3g}, outputs' std {output.std():.3g}"


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 16,
    }
    return UNet2DConditionModel(**config).double().eval()


def tiny_inputs(count: int):
    generator = torch.Generator().manual_seed(1)
    shapes = ((count, 4, 8, 8), (count, 5, 24), (count, 16))
    sample, context, camera = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return sample, 400, context, camera


def test_attention_over_views_is_attention_over_all_their_tokens():
    attn = tiny_unet().mid_block.attentions[0].transformer_blocks[0].attn1
    hidden = torch.randn(6, 5, 16, dtype=torch.float64)
    kernel = attn.processor
    block = torch.nn.ModuleDict({"attn1": attn})
    enable_multi_view_attention(block, num_views=3)
    for group in range(2):
        views = hidden[3 * group : 3 * group + 3]
        together = kernel(attn, torch.cat(list(views))[None])[0].reshape(3, 5, 16)
        torch.testing.assert_close(attn(hidden)[3 * group : 3 * group + 3], together)


def test_permuted_groups_give_permuted_outputs():
    unet = tiny_unet()
    enable_multi_view_attention(unet)
    sample, t, context, camera = tiny_inputs(8)
    swap = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    output = predict(unet, sample, t, context, camera)
    torch.testing.assert_close(predict(unet, sample[swap], t, context[swap], camera[swap]), output[swap])


def test_a_view_sees_its_own_group_and_no_other():
    unet = tiny_unet()
    enable_multi_view_attention(unet)
    sample, t, context, camera = tiny_inputs(8)
    changed = sample.clone()
    changed[1] += 1
    before, after = (predict(unet, x, t, context, camera) for x in (sample, changed))
    difference = (before - after).abs().amax(dim=(1, 2, 3))
    assert (difference[:4] > 1e-4).all()
    assert (difference[4:] < 1e-12).all()


def test_one_view_per_group_is_the_plain_network_again():
    unet = tiny_unet()
    inputs = tiny_inputs(4)
    plain = predict(unet, *inputs)
    enable_multi_view_attention(unet, num_views=4)
    assert (predict(unet, *inputs) - plain).abs().max() > 1e-4
    enable_multi_view_attention(unet, num_views=1)
    torch.testing.assert_close(predict(unet, *inputs), plain)


def test_a_broken_group_is_an_error():
    unet = tiny_unet()
    enable_multi_view_attention(unet, num_views=4)
    with pytest.raises(ValueError, match="whole groups of 4 views"):
        predict(unet, *tiny_inputs(6))
    with pytest.raises(ValueError, match="no self-attention"):
        enable_multi_view_attention(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_camera_vectors_are_the_recorded_ones(case):
    c2w = torch.tensor([case["c2w"]])
    given = c2w.clone()
    vector = camera_vectors(c2w)[0]
    # 1e-6: the reference is float32.
    torch.testing.assert_close(vector, torch.tensor(case["camera_vector"]), rtol=1e-6, atol=1e-7)
    assert torch.equal(c2w, given), "the batch's cameras were overwritten"
