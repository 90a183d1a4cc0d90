"""The VAE encoder without weight gradients is the same function as diffusers' own."""

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL

from fourdfy.priors import vae_encoder
from fourdfy.priors.vae_encoder import VAEEncoder, posterior

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_vae(channels=(8, 16, 32), layers=1, groups=4, **options):
    torch.manual_seed(0)
    levels = len(channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=layers,
        norm_num_groups=groups,
        **options,
    )
    for parameter in vae.parameters():
        if parameter.ndim == 1:  # not the ones and zeros that norms and biases begin with
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    return vae.requires_grad_(False).eval()


def moments_and_gradient(encode, images):
    images = images.detach().requires_grad_()
    moments = encode(images)
    weights = torch.randn(moments.shape, generator=torch.Generator().manual_seed(1)).to(moments)
    return moments.detach(), torch.autograd.grad(moments, images, weights)[0]


def plain(vae):
    return lambda images: vae.encode(images).latent_dist.parameters


def random_images(*size, dtype=torch.float64):
    return (torch.rand(size, generator=torch.Generator().manual_seed(2)) * 2 - 1).to(dtype)


@pytest.mark.parametrize("size", [(1, 16, 16), (3, 24, 40), (1, 37, 50), (2, 36, 51), (1, 35, 35)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": (8, 8, 16, 16), "layers": 2},
        {"channels": (12, 24), "groups": 4, "use_quant_conv": False},
        {"channels": (8,), "mid_block_add_attention": False},
    ],
    ids=["three levels", "four levels", "no quant_conv", "no attention"],
)
def test_values_and_gradients_are_those_of_diffusers(options, size):
    vae = make_vae(**options).double()
    images = random_images(size[0], 3, *size[1:])
    ours = moments_and_gradient(VAEEncoder(vae, torch.float64), images)
    for mine, theirs in zip(ours, moments_and_gradient(plain(vae), images), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10 * theirs.abs().max().item())


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_flat_and_huge_images_are_no_exception(value):
    vae = make_vae().double()
    images = random_images(1, 3, 16, 24) * value
    for mine, theirs in zip(
        moments_and_gradient(VAEEncoder(vae, torch.float64), images),
        moments_and_gradient(plain(vae), images),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8 * theirs.abs().max().item())


def kept_bytes(encode, images):
    """What a forward pass keeps for the backward pass."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        encode(images.detach().requires_grad_())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_convolutions_and_linear_layers_keep_nothing_for_the_backward_pass():
    vae, images = make_vae().double(), random_images(2, 3, 32, 32)
    # torch's group norm and SiLU keep an input each, and a sum's is new; the kernels keep one of the three.
    assert kept_bytes(VAEEncoder(vae, torch.float64), images) < 0.7 * kept_bytes(plain(vae), images)


@pytest.mark.triton
def test_with_the_kernels_it_is_the_same_function_in_less_than_half_of_the_memory(monkeypatch):
    for name in ("add_norm", "bias_norm", "add", "attention"):
        monkeypatch.setattr(vae_encoder, name, partial(getattr(vae_encoder, name), backend="triton"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = make_vae((8, 24), groups=8).to(DEVICE)
    images = random_images(2, 3, 19, 32, dtype=torch.float32).to(DEVICE)
    encode = VAEEncoder(vae, torch.float32)
    ours = moments_and_gradient(encode, images)
    for mine, theirs in zip(ours, moments_and_gradient(plain(vae), images), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())
    assert kept_bytes(encode, images) < 0.5 * kept_bytes(plain(vae), images)


def test_without_a_graph_nothing_is_kept():
    encoder = VAEEncoder(make_vae(), torch.float32)
    assert not encoder(random_images(1, 3, 16, 16, dtype=torch.float32)).requires_grad


# Which one is used


@pytest.fixture
def trusted(monkeypatch):
    """As on CUDA, where the kernels work."""
    monkeypatch.setattr(
        vae_encoder, "OPERATION", SimpleNamespace(select=lambda *_: "triton", load=lambda name: name)
    )


def test_the_cpu_uses_diffusers_own(monkeypatch):
    monkeypatch.setattr(vae_encoder, "VAEEncoder", None)
    vae, images = make_vae(), random_images(2, 3, 16, 16, dtype=torch.float32)
    mean, std = posterior(vae, images)
    expected = vae.encode(images).latent_dist
    assert torch.equal(mean, expected.mean) and torch.equal(std, expected.std)


def test_the_fast_encoder_gives_the_same_posterior_and_is_made_once(trusted, monkeypatch):
    made = []
    monkeypatch.setattr(vae_encoder, "VAEEncoder", lambda *args: made.append(VAEEncoder(*args)) or made[-1])
    vae, images = make_vae(), random_images(2, 3, 16, 16, dtype=torch.float32) * 50
    for _ in range(2):
        mean, std = posterior(vae, images)
    expected = vae.encode(images).latent_dist
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(std, expected.std)
    assert len(made) == 1


def test_it_computes_in_the_type_of_the_weights_or_of_autocast(trusted, monkeypatch):
    types = []
    monkeypatch.setattr(vae_encoder, "_checked_encoder", lambda vae, dtype, device: types.append(dtype))
    vae, images = make_vae(), random_images(1, 3, 16, 16, dtype=torch.float32)
    posterior(vae, images)
    with torch.autocast("cpu", torch.bfloat16):
        posterior(vae, images)
    posterior(make_vae().bfloat16(), images)
    assert types == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_in_autocast_it_is_as_close_to_float32_as_diffusers_own():
    vae, images = make_vae(), random_images(2, 3, 32, 32, dtype=torch.float32)
    exact = moments_and_gradient(plain(vae), images)
    ours = moments_and_gradient(VAEEncoder(vae, torch.bfloat16), images)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = moments_and_gradient(plain(vae), images)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert (mine - true).norm() < 1.2 * (other - true).norm() < 0.2 * true.norm()


def scaled(vae):
    vae.encoder.mid_block.resnets[0].output_scale_factor = 2.0


def another_activation(vae):
    vae.encoder.down_blocks[0].resnets[0].nonlinearity = torch.nn.ReLU()


def symmetric_padding(vae):
    vae.encoder.down_blocks[0].downsamplers[0].padding = 1
    vae.encoder.down_blocks[0].downsamplers[0].conv.padding = (1, 1)


def more_heads(vae):
    vae.encoder.mid_block.attentions[0].heads = 2


@pytest.mark.parametrize("change", [scaled, another_activation, symmetric_padding, more_heads])
def test_an_encoder_of_another_kind_is_left_to_diffusers_and_that_is_said_once(change, trusted, caplog):
    vae, images = make_vae(), random_images(1, 3, 16, 16, dtype=torch.float32)
    change(vae)
    for _ in range(2):
        mean, _ = posterior(vae, images)
    assert torch.equal(mean, vae.encode(images).latent_dist.mean)
    assert caplog.text.count("the slow one is used") == 1


def test_gradients_that_are_wrong_are_noticed(trusted, monkeypatch, caplog):
    class Wrong(VAEEncoder):
        def __call__(self, images):
            return super().__call__(images.detach()) + 0 * images.sum()

    monkeypatch.setattr(vae_encoder, "VAEEncoder", Wrong)
    with caplog.at_level(logging.WARNING):
        posterior(make_vae(), random_images(1, 3, 16, 16, dtype=torch.float32))
    assert "relative differences of" in caplog.text


# On a GPU


@pytest.fixture
def real_vae():
    """Of Stable Diffusion's size, in float32; convolutions are not TF32."""
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield make_vae((128, 256, 512, 512), layers=2, groups=32).cuda()
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("size", [(1, 256, 256), (2, 160, 288), (1, 264, 200)])
def test_the_real_encoder_is_no_less_exact_in_half_precision_than_diffusers_own(real_vae, size):
    images = random_images(size[0], 3, *size[1:], dtype=torch.float32).cuda()
    exact = moments_and_gradient(plain(real_vae), images)
    in_float32 = moments_and_gradient(VAEEncoder(real_vae, torch.float32), images)
    in_half = moments_and_gradient(VAEEncoder(real_vae, torch.float16), images)
    half = real_vae.half()
    theirs = moments_and_gradient(lambda x: plain(half)(x.half()), images)
    for true, ours, mine, other in zip(exact, in_float32, in_half, theirs, strict=True):
        assert (ours - true).norm() < 1e-4 * true.norm()
        assert (mine - true).norm() < 1.05 * (other - true).norm() < 0.02 * true.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_it_can_be_recorded_and_repeats_bit_for_bit_where_it_must(real_vae, caplog):
    vae, images = real_vae.half(), random_images(2, 3, 160, 288, dtype=torch.float32).cuda()

    def encode():
        leaf = images.detach().requires_grad_()
        mean, std = posterior(vae, leaf)
        return mean.detach(), std.detach(), *torch.autograd.grad(mean.sum() + std.sum(), leaf)

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = encode(), encode()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))
    encode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = encode()
    graph.replay()
    for result, expected in zip(recorded, first, strict=True):
        assert (result - expected).norm() < 1e-2 * expected.norm()
    assert not caplog.text
