"""Compiled and recorded networks: the same predictions, losses and gradients."""

from __future__ import annotations

import functools
import logging
import os

import pytest
import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import cache_dir

from fourdfy.ops import replay
from fourdfy.priors import acceleration, latent
from fourdfy.priors.acceleration import CACHE_VARIABLE, compiled
from tests.guidance.networks import ALL, generator, images, make_any, make_vsd, run
from tests.recordings import FakeGraphs
from tests.tiny_models import save_multi_view, save_stable_diffusion, save_videocrafter2, save_zeroscope


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny_models")
    return {
        "sd": save_stable_diffusion(root / "sd"),
        "sd_v": save_stable_diffusion(root / "sd_v", prediction_type="v_prediction", seed=1),
        "multi_view": save_multi_view(root / "multi_view"),
        "zeroscope": save_zeroscope(root / "zeroscope"),
        "videocrafter": save_videocrafter2(root / "videocrafter"),
    }


@pytest.fixture
def recorder(monkeypatch):
    graphs = FakeGraphs()
    monkeypatch.setattr(replay, "graphs_of", lambda device: graphs)
    return graphs


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile without its code generator: what it traces and when it does so again are genuine."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    monkeypatch.setenv(CACHE_VARIABLE, "unused")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def twice(make):
    """Two equal guidances."""
    first, second = make(), make()
    second.load_state_dict(first.state_dict())
    return first, second


def network_of(*layers: nn.Module) -> nn.Module:
    """A network with its layers where those of a U-Net are."""
    network = nn.Module()
    network.mid_block = nn.Module()
    network.mid_block.resnets = nn.ModuleList(layers)
    return network


def results(guidance, seed: int = 0) -> dict[str, torch.Tensor]:
    """Losses and gradients of a step."""
    rgb, out = run(guidance, seed=seed)
    guidance.zero_grad()
    sum(out.losses.values()).backward()
    grads = {name: p.grad for name, p in guidance.named_parameters() if p.grad is not None}
    return {**out.losses, "images": rgb.grad, **grads}


def agree(found: dict, expected: dict) -> None:
    """But for rounding: weights are in another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 5e-3 * value.norm(), name


def warnings(caplog) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def moved(guidance) -> None:
    """A LoRA, if there is one, that is not the identity any more."""
    g = generator(5)
    with torch.no_grad():
        for parameter in guidance.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)


@pytest.mark.parametrize("kind", ALL)
def test_an_accelerated_guidance_gives_what_it_gave(tiny, recorder, kind):
    plain, quick = twice(lambda: make_any(tiny, kind))
    quick.accelerate(compile_small=False)
    for guidance in (plain, quick):
        moved(guidance)
    for seed in range(replay.WARM_UP + 2):
        agree(results(quick, seed), results(plain, seed))
    recorded = [quick.prior.denoise, quick.prior.recorded_vae]
    if kind == "vsd":
        recorded += [quick.denoise_renderings, quick.recorded_lora]
    assert all(any(call._recordings.values()) for call in recorded)


def test_a_recorded_lora_follows_its_weights_and_what_is_trained(tiny, recorder):
    plain, quick = twice(lambda: make_vsd(tiny))
    quick.accelerate(compile_small=False)
    for step in range(2 * replay.WARM_UP + 4):
        if step == replay.WARM_UP + 2:  # a group that is switched off
            for guidance in (plain, quick):
                guidance.lora.requires_grad_(False)
        found = [results(guidance, step) for guidance in (quick, plain)]
        agree(*found)
        assert ("lora.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight" in found[0]) == (
            step < replay.WARM_UP + 2
        )
        for guidance in (plain, quick):
            moved(guidance)


def test_the_loras_gradient_follows_its_weight(tiny, recorder):
    guidance = make_vsd(tiny)
    guidance.accelerate(compile_small=False)
    weight = guidance.camera_embedding.linear_2.bias
    grads = [
        torch.autograd.grad(factor * run(guidance)[1].losses["lora"], weight)[0] for factor in (1.0, 0.0, 3.0)
    ]
    torch.testing.assert_close(grads[2], 3 * grads[0])
    assert grads[0].any() and not grads[1].any()


@pytest.mark.parametrize("kind", ["multi_view", "video"])
def test_a_compiled_guidance_gives_what_it_gave(tiny, quick_compiler, kind):
    plain, quick = twice(lambda: make_any(tiny, kind))
    quick.accelerate(compile_small=True)
    for guidance in (plain, quick):
        moved(guidance)
    for seed in range(2):
        agree(results(quick, seed), results(plain, seed))
    layers = quick.prior.denoiser.network.up_blocks[1].attentions
    assert len(layers) and all(layer._compiled_call_impl for layer in layers)


def test_one_compiled_network_is_the_prior_and_carries_the_lora(tiny, quick_compiler):
    """What is compiled with the adapter is not used without it, nor the reverse."""
    plain, quick = twice(lambda: make_vsd(tiny))
    assert quick.renderings is quick.prior.denoiser
    quick.accelerate(compile_small=True)
    for seed in range(2):
        agree(results(quick, seed), results(plain, seed))
        for guidance in (plain, quick):
            moved(guidance)


def test_the_lora_is_not_compiled(tiny, quick_compiler):
    guidance = make_vsd(tiny)
    guidance.accelerate(compile_small=True)
    results(guidance)
    graphs = torch._dynamo.utils.counters["stats"]
    compiled_before = graphs["unique_graphs"]
    torch._dynamo.reset_code_caches()  # whatever is called now is compiled again, if at all
    noisy, timesteps, text = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.randn(1, 77, 16)
    inputs = (noisy, timesteps, text, torch.randn(1, 16), None)
    guidance.recorded_lora(noisy, *inputs)
    with torch.no_grad():
        guidance.denoise_renderings(*inputs)
    assert graphs["unique_graphs"] == compiled_before > 0


def test_only_large_networks_are_compiled_unless_all_shall_be(monkeypatch):
    network = network_of(nn.Linear(100, 100))

    def call(x):
        return network.mid_block.resnets[0](x)

    assert compiled(call, network, "it", small_too=False) is call
    assert compiled(call, network, "it", small_too=True) is not call
    monkeypatch.setattr(acceleration, "LARGE", 10_000)
    assert compiled(call, network, "it", small_too=False) is not call


def test_what_can_t_be_compiled_runs_as_it_is_and_is_told_once(monkeypatch, caplog):
    network = network_of(nn.Linear(3, 3), nn.Linear(3, 3))

    def fail(self, **options):
        self._compiled_call_impl = lambda *args: (_ for _ in ()).throw(RuntimeError("no compiler\nat all"))

    monkeypatch.setattr(nn.Module, "compile", fail)
    call = compiled(lambda x: network.mid_block.resnets[0](x), network, "the net", small_too=True)
    x = torch.randn(2, 3)
    for _ in range(3):
        torch.testing.assert_close(call(x), network.mid_block.resnets[0](x))
    (record,) = warnings(caplog)
    assert record.message == "the net can't be compiled: RuntimeError: no compiler"


def test_an_error_of_the_network_is_not_taken_for_one_of_the_compiler(quick_compiler, caplog):
    network = network_of(nn.Linear(3, 3))
    call = compiled(lambda x: network.mid_block.resnets[0](x), network, "it", small_too=True)
    with pytest.raises(RuntimeError):
        call(torch.randn(2, 4))
    assert not warnings(caplog)


def test_a_network_that_runs_out_of_memory_stays_compiled(quick_compiler):
    net, calls = network_of(nn.Linear(3, 3)), []

    def function(x):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return net.mid_block.resnets[0](x)

    fast = compiled(function, net, "the net", small_too=True)
    fast(torch.ones(2, 3))
    with pytest.raises(torch.OutOfMemoryError):
        fast(torch.ones(2, 3))
    assert len(calls) == 2 and fast.layers


def test_a_network_without_blocks_is_not_compiled(caplog):
    call = compiled(lambda x: x, nn.Linear(3, 3), "it", small_too=True)
    x = torch.randn(2)
    assert call(x) is x and "down_blocks" in caplog.text


@pytest.mark.parametrize("given", ["by the user", "by torch", "by nobody"])
def test_the_compiler_s_cache_is_ours_unless_there_is_one(monkeypatch, tmp_path, quick_compiler, given):
    monkeypatch.delenv(CACHE_VARIABLE)
    if given == "by the user":
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "elsewhere"))
    elif given == "by torch":
        assert cache_dir() == os.environ[CACHE_VARIABLE]
    monkeypatch.setenv("FOURDFY_CACHE", str(tmp_path))
    network = network_of(nn.Linear(3, 3))
    compiled(lambda x: network.mid_block.resnets[0](x), network, "it", small_too=True)(torch.randn(2, 3))
    expected = "elsewhere" if given == "by the user" else "compiled"
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / expected)


def test_weights_that_move_are_neither_compiled_nor_recorded(tiny, caplog):
    guidance = make_any(tiny, "sds", enable_sequential_cpu_offload=True)
    denoise = guidance.prior.denoise
    guidance.accelerate(compile_small=True)
    assert guidance.prior.denoise == denoise and "neither compiled nor replayed" in caplog.text


def test_many_pixels_are_encoded_without_a_recording(tiny, recorder, monkeypatch):
    guidance = make_any(tiny, "sds")
    guidance.accelerate(compile_small=False)
    monkeypatch.setattr(latent, "RECORDED_PIXELS", 3 * 32 * 32)
    for _ in range(replay.WARM_UP + 1):
        few, many = (guidance.prior.encode(images(count), 1, generator()) for count in (3, 4))
        torch.testing.assert_close(few, many[:3])
    (kind,) = guidance.prior.recorded_vae._recordings
    assert (3, 3, 32, 32) in [shape for shape, *_ in kind[1][:1]]


def test_what_fails_while_it_is_recorded_stays_compiled(quick_compiler, monkeypatch):
    network, failing = network_of(nn.Linear(3, 3)), []

    def function(x):
        if failing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return network.mid_block.resnets[0](x)

    call = compiled(function, network, "it", small_too=True)
    call(torch.randn(2, 3))
    failing.append(True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="not permitted"):
        call(torch.randn(2, 3))
    assert network.mid_block.resnets[0]._compiled_call_impl
