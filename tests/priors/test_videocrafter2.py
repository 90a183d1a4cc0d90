"""VideoCrafter2's U-Net against recorded outputs of the original, and its frame rate in a bias."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from fourdfy.priors.convert import convert_unet, save_network
from fourdfy.priors.frozen import load_part
from fourdfy.priors.videocrafter import load_unet
from tests.priors.twins import HEAD_WIDTH, recorded, twin_state
from tests.tiny_models import save_videocrafter2

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin")
    parts = convert_unet(twin_state("videocrafter2", "unet"), "VideoCrafter2", HEAD_WIDTH["unet"])
    for part, network in parts.items():
        save_network(network, folder / part)
    return folder


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("timestep", [20, 777])
def test_the_twin_gives_what_the_original_gave(twin, timestep, dtype):
    facts = recorded("videocrafter2")
    sample, context, output = (facts[f"unet_t{timestep}/{key}"] for key in ("sample", "context", "output"))
    unet = load_unet(twin, 8, dtype=dtype, device=CPU)
    ours = predict(unet, sample.to(dtype), timestep, context.to(dtype))
    error = (ours.double() - output).abs().max().item()
    # Without the frame rate the error is 0.15 and more.
    assert error <= TOLERANCE[dtype], f"max abs error {error:.3g}, outputs' std {output.std():.3g}"


class AddedFrameRate(nn.Module):
    """What the original does: embed timestep and frame rate, and add."""

    def __init__(self, time_embedding: nn.Module, fps_embedding: nn.Module, fps: int) -> None:
        super().__init__()
        self.time_embedding, self.fps_embedding, self.fps = time_embedding, fps_embedding, fps

    def forward(self, sample: Tensor, condition: None = None) -> Tensor:
        waves = Timesteps(sample.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0)
        fps = waves(torch.full(sample.shape[:1], self.fps)).to(sample.dtype)
        return self.time_embedding(sample) + self.fps_embedding(fps)


@pytest.mark.parametrize("fps", [8, 28])
def test_a_folded_frame_rate_is_an_added_one(tmp_path, fps):
    from safetensors.torch import load_file

    folder = save_videocrafter2(tmp_path / "model")
    weights = load_file(folder / "fps_embedding" / "diffusion_pytorch_model.safetensors")
    width, inputs = weights["linear_1.weight"].shape
    embedding = TimestepEmbedding(inputs, width)
    embedding.load_state_dict(weights)
    plain = load_part(folder, "unet", "UNet3DConditionModel", dtype=torch.float32, device=CPU)
    added = copy.deepcopy(plain)
    added.time_embedding = AddedFrameRate(added.time_embedding, embedding, fps)
    folded = load_unet(folder, fps, dtype=torch.float64, device=CPU)
    inputs = (
        torch.randn(2, 4, 3, 8, 8, dtype=torch.float64),
        300,
        torch.randn(2, 77, 16, dtype=torch.float64),
    )
    expected = predict(added.double(), *inputs)
    torch.testing.assert_close(predict(folded, *inputs), expected, rtol=0, atol=1e-12)
    assert (predict(plain.double(), *inputs) - expected).abs().max() > 1e-3


def test_the_sum_is_rounded_once(tmp_path):
    folder = save_videocrafter2(tmp_path / "model")
    exact = load_unet(folder, 8, dtype=torch.float64, device=CPU).time_embedding.linear_2.bias
    half = load_unet(folder, 8, dtype=torch.bfloat16, device=CPU)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in half.parameters())
    assert torch.equal(half.time_embedding.linear_2.bias, exact.bfloat16())


def test_a_folder_without_the_frame_rates_embedding_says_where_one_comes_from(tmp_path):
    folder = save_videocrafter2(tmp_path / "model")
    shutil.rmtree(folder / "fps_embedding")
    with pytest.raises(FileNotFoundError, match=r"holds no fps_embedding.*VideoCrafter/VideoCrafter2"):
        load_unet(folder, 8, dtype=torch.float32, device=CPU)


@torch.no_grad()
def predict(unet: nn.Module, sample: Tensor, timestep: int, context: Tensor) -> Tensor:
    return unet(sample, timestep, context).sample
