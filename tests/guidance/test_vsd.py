"""VSD's second network: a LoRA that is told the camera."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.guidance.networks import generator, make, make_vsd, run


def test_vsd_trains_the_adapter_and_the_camera_embedding_alone(tiny):
    guidance = make_vsd(tiny, lora="sd_v")
    names = dict(guidance.named_parameters())
    assert {name.split(".")[0] for name in names} == {"camera_embedding", "lora"}
    assert {"camera_embedding.linear_1.weight", "camera_embedding.linear_2.bias"} <= names.keys()
    assert "lora.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_B.weight" in names
    assert all(p.shape[0] == 4 for n, p in names.items() if n.endswith("lora_A.weight"))
    # Two attentions in each of 4 transformers; to_q, to_k, to_v, to_out; A and B.
    assert len([n for n in names if n.startswith("lora.")]) == 2 * 4 * 4 * 2
    _, out = run(guidance)
    out.losses["lora"].backward()
    moved = {n for n, p in names.items() if p.grad is not None and p.grad.any()}
    # A moves once B has: B starts at zero.
    assert {n for n in names if n.endswith("lora_B.weight") or n.startswith("camera")} <= moved
    networks = (guidance.prior.denoiser.network, guidance.prior.vae, guidance.renderings.network)
    frozen = [p for net in networks for n, p in net.named_parameters() if "lora_" not in n]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_the_vsd_loss_moves_the_images_and_not_the_adapter(tiny):
    guidance = make_vsd(tiny)
    rgb, out = run(guidance)
    out.losses["vsd"].backward()
    assert rgb.grad.any()
    assert all(p.grad is None for p in guidance.parameters())
    rgb, out = run(guidance)
    out.losses["lora"].backward()
    assert rgb.grad is None


@pytest.fixture
def lora_inputs():
    g = generator()
    shapes = ((2, 4, 8, 8), (2, 77, 16), (2, 16))
    noisy, text, c2w = (torch.randn(s, generator=g) for s in shapes)
    return noisy, torch.tensor([100, 700]), text, c2w


@torch.no_grad()
def predicted(guidance, noisy, timesteps, text):
    """By the prior's own network."""
    return guidance.prior.predict(guidance.prior.denoiser.network, noisy, timesteps, text)


def set_adapter(guidance) -> None:
    """An adapter that does something."""
    g = generator(5)
    for name, parameter in guidance.lora.named_parameters():
        if name.endswith("lora_B.weight"):
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=g)


def test_the_adapter_starts_as_the_identity(tiny, lora_inputs):
    guidance = make_vsd(tiny)
    for parameter in guidance.camera_embedding.parameters():
        torch.nn.init.zeros_(parameter)
    with_adapter = guidance.predict_renderings(*lora_inputs)
    torch.testing.assert_close(with_adapter, predicted(guidance, *lora_inputs[:3]))


def test_one_shared_network_does_what_two_do(tiny, lora_inputs, tmp_path):
    """Adapter and cameras are on for the LoRA's calls, and leave no trace in the prior's."""
    copy = shutil.copytree(tiny["sd"], tmp_path / "copy")
    shared, twofold = make_vsd(tiny), make_vsd({"sd": tiny["sd"], "copy": copy}, lora="copy")
    assert shared.prior.denoiser is shared.renderings
    assert twofold.prior.denoiser.network is not twofold.renderings.network
    separate = make("stable-diffusion-guidance", tiny["sd"])
    set_adapter(shared)
    before = shared.predict_renderings(*lora_inputs)
    prior = predicted(shared, *lora_inputs[:3])
    torch.testing.assert_close(prior, predicted(separate, *lora_inputs[:3]), rtol=0, atol=0)
    torch.testing.assert_close(shared.predict_renderings(*lora_inputs), before, rtol=0, atol=0)
    assert (before - prior).abs().max() > 1e-3
    twofold.load_state_dict(shared.state_dict())
    torch.testing.assert_close(twofold.predict_renderings(*lora_inputs), before, rtol=0, atol=0)


def test_the_adapter_adds_its_product_unscaled(tiny, lora_inputs):
    """W + B A, checked by a plain network with merged weights and the same cameras."""
    guidance = make_vsd(tiny)
    set_adapter(guidance)
    merged = make("stable-diffusion-guidance", tiny["sd"])
    unet = merged.prior.denoiser.network
    adapter = dict(guidance.lora.named_parameters())
    for name in {name.rpartition(".lora_")[0] for name in adapter}:
        update = adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
        unet.get_submodule(name).weight.data += update.detach()
    unet.class_embedding = guidance.camera_embedding
    with torch.no_grad():
        wanted = merged.prior.predict(unet, *lora_inputs)
    torch.testing.assert_close(guidance.predict_renderings(*lora_inputs), wanted, rtol=1e-4, atol=1e-5)


def test_switching_the_adapter_leaves_freezing_to_the_system(tiny):
    guidance = make_vsd(tiny)
    for parameter in guidance.lora.parameters():
        parameter.requires_grad_(False)
    run(guidance)
    assert not any(p.requires_grad for p in guidance.lora.parameters())
    assert all(p.requires_grad for p in guidance.camera_embedding.parameters())


def test_a_lora_with_its_own_model_reads_its_prediction_type(tiny):
    guidance = make_vsd(tiny, lora="sd_v")
    assert guidance.prior.denoiser.network is not guidance.renderings.network
    assert guidance.prior.denoiser.schedule.prediction == "epsilon"
    assert guidance.renderings.schedule.prediction == "v_prediction"
