"""Layers in front of the text see one of two equal guidance branches, and the U-Net predicts the same."""

import pytest
import torch

from fourdfy.priors.frozen import load_part
from fourdfy.priors.hub import resolve_model
from fourdfy.priors.mvdream import enable_multi_view_attention
from fourdfy.priors.prefix import compute_prefix_once
from fourdfy.priors.stable_diffusion import StableDiffusion

CPU = torch.device("cpu")


def shipped(name):
    """A U-Net, and the axes of a latent."""
    video = name == "shapes-video"
    kind = "UNet3DConditionModel" if video else "UNet2DConditionModel"
    unet = load_part(resolve_model(f"fourdfy/{name}"), "unet", kind, dtype=torch.float32, device=CPU)
    if name == "shapes-4view":
        enable_multi_view_attention(unet, 4)
    return unet, (4, 8, 8, 8) if video else (4, 8, 8)


def inputs(name, shape, count):
    generator = torch.Generator().manual_seed(0)
    told = {"class_labels": torch.ones(count, 16)} if name == "shapes-4view" else {}
    texts = torch.randn(count, 7, 64, generator=generator)
    latents = torch.randn(count, *shape, generator=generator)
    return latents, torch.full((count,), 300), {"encoder_hidden_states": texts, "return_dict": False, **told}


def rows_of(layer):
    """The batch sizes that a layer's convolutions or products see."""
    seen = []
    first = next(module for module in layer.modules() if not list(module.children()))
    first.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize(
    ("name", "count", "group"), [("shapes-image", 2, 1), ("shapes-4view", 8, 4), ("shapes-video", 2, 8)]
)
def test_equal_branches_are_computed_once_up_to_the_text(name, count, group):
    unet, shape = shipped(name)
    latents, timesteps, others = inputs(name, shape, count)
    latents = torch.cat([latents[: count // 2]] * 2)
    with torch.no_grad():
        (expected,) = unet(latents, timesteps, **others)
        compute_prefix_once(unet)
        resnet, later = (rows_of(block.resnets[0]) for block in unet.down_blocks[:2])
        (found,) = unet(latents, timesteps, **others)
    assert (expected[: count // 2] - expected[count // 2 :]).abs().max() > 0.01, "the texts differ"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    per_latent = 8 if name == "shapes-video" else 1
    assert resnet == [count // 2 * per_latent] and later == [count * per_latent]


@pytest.mark.parametrize("name", ["shapes-image", "shapes-4view", "shapes-video"])
def test_other_batches_are_computed_as_they_are(name):
    """Different branches, and halves of one clip or of the views of one object that are equal."""
    unet, shape = shipped(name)
    count = 4 if name == "shapes-4view" else 2
    latents, timesteps, others = inputs(name, shape, count)
    halves = latents.clone()
    if name == "shapes-video":
        halves, timesteps, others = latents[:1].clone(), timesteps[:1], {**others}
        others["encoder_hidden_states"] = others["encoder_hidden_states"][:1]
        halves[:, :, 4:] = halves[:, :, :4]
        latents = latents[:1]
    elif name == "shapes-4view":
        halves[2:] = halves[:2]
    with torch.no_grad():
        expected = [unet(x, timesteps, **others)[0] for x in (latents, halves)]
        compute_prefix_once(unet)
        found = [unet(x, timesteps, **others)[0] for x in (latents, halves)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_graph_is_made_of_the_whole_batch():
    unet, shape = shipped("shapes-image")
    latents, timesteps, others = inputs("shapes-image", shape, 2)
    latents[1] = latents[0]
    compute_prefix_once(unet)
    rows = rows_of(unet.down_blocks[0].resnets[0])
    leaf = latents.requires_grad_()
    (gradient,) = torch.autograd.grad(unet(leaf, timesteps, **others)[0].square().sum(), leaf)
    assert rows == [2] and (gradient[0] - gradient[1]).abs().max() > 1e-4


def test_a_prior_on_the_cpu_is_made_so():
    """The VAE has its weights channels last and the same latents; the prefix is computed once."""
    cfg = StableDiffusion.Config(pretrained_model_name_or_path="fourdfy/shapes-image")
    prior = StableDiffusion(cfg, device=CPU)
    last = prior.vae.encoder.conv_in.weight
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = load_part(
        resolve_model("fourdfy/shapes-image"), "vae", "AutoencoderKL", dtype=torch.float32, device=CPU
    )
    means = [vae.encode(images).latent_dist.mean for vae in (prior.vae, plain)]
    torch.testing.assert_close(*means, atol=1e-5, rtol=1e-4)
    rows = rows_of(prior.denoiser.network.down_blocks[0].resnets[0])
    latents, timesteps, others = inputs("shapes-image", (4, 8, 8), 2)
    with torch.no_grad():
        prior.predict(
            prior.denoiser.network, latents[:1].repeat(2, 1, 1, 1), timesteps, others["encoder_hidden_states"]
        )
    assert rows == [1]
