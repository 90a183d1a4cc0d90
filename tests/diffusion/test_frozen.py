"""Loading frozen parts: types, safety, and what a wrong folder says."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import nn

from fourdfy.diffusion import frozen
from fourdfy.diffusion.frozen import (
    FrozenModels,
    MemoryOptions,
    apply_memory_options,
    load_noise_schedule,
    load_part,
    load_text_encoder,
)
from tests.tiny_models import save_stable_diffusion

CPU = torch.device("cpu")
UNET = "UNet2DConditionModel"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("models") / "sd", prediction_type="v_prediction")


@pytest.fixture
def pickled(folder, tmp_path):
    """The U-Net's folder with a .bin in place of safetensors; returns (root, the file)."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    assert not list((tmp_path / "unet").glob("*.safetensors"))
    return tmp_path, tmp_path / "unet" / "diffusion_pytorch_model.bin"


def test_a_pickled_part_loads_as_the_safe_one_does(folder, pickled):
    safe = load_part(folder, "unet", UNET, dtype=torch.float32, device=CPU).state_dict()
    other = load_part(pickled[0], "unet", UNET, dtype=torch.float32, device=CPU).state_dict()
    assert safe.keys() == other.keys()
    assert all(torch.equal(safe[key], other[key]) for key in safe)


def test_a_pickle_from_a_stranger_runs_no_code(pickled, tmp_path):
    marker = tmp_path / "was_here"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    pickled[1].write_bytes(pickle.dumps({"conv_in.weight": Evil()}))
    with pytest.raises((OSError, pickle.UnpicklingError, RuntimeError)):
        load_part(pickled[0], "unet", UNET, dtype=torch.float32, device=CPU)
    torch.save({"conv_in.weight": Evil()}, pickled[1])
    with pytest.raises((OSError, pickle.UnpicklingError, RuntimeError)):
        load_part(pickled[0], "unet", UNET, dtype=torch.float32, device=CPU)
    assert not marker.exists()


def test_a_text_encoder_from_a_stranger_runs_no_code(folder, tmp_path):
    marker, copy = tmp_path / "was_here", tmp_path / "model"
    shutil.copytree(folder, copy)
    weights = copy / "text_encoder" / "model.safetensors"
    weights.unlink()
    evil = weights.with_name("pytorch_model.bin")

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"text_model.final_layer_norm.weight": Evil()}, evil)
    with pytest.raises((OSError, pickle.UnpicklingError, RuntimeError)):
        load_text_encoder(copy, CPU)
    assert not marker.exists()
    torch.load(evil, weights_only=False)
    assert marker.exists(), "this file is harmless, so nothing was shown"


def test_half_precision_is_a_type_of_weights_and_float32_on_the_cpu(folder, caplog, unheard):
    gpu = torch.device("cuda")
    assert MemoryOptions(half_precision_weights=True).dtype(gpu) == torch.float16
    assert MemoryOptions(half_precision_weights="bf16").dtype(gpu) == torch.bfloat16
    assert MemoryOptions(half_precision_weights=False).dtype(gpu) == torch.float32
    with caplog.at_level(logging.INFO):
        assert MemoryOptions(half_precision_weights=True).dtype(CPU) == torch.float32
    assert "float32 on the CPU" in caplog.text
    unet = load_part(folder, "unet", UNET, dtype=torch.bfloat16, device=CPU)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}


def test_the_schedule_is_read_whatever_sampler_the_file_names(folder, tmp_path):
    schedule = load_noise_schedule(folder, CPU)
    assert schedule.prediction == "v_prediction"
    assert len(schedule) == 1000
    assert schedule.alphas_cumprod[0].item() == pytest.approx(0.99915)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(config | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}))
    assert torch.equal(load_noise_schedule(tmp_path, CPU).alphas_cumprod, schedule.alphas_cumprod)
    file.write_text(json.dumps(config | {"prediction_type": "sample"}))
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        load_noise_schedule(tmp_path, CPU)


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no unet"):
        load_part(tmp_path, "unet", UNET, dtype=torch.float32, device=CPU)
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load_text_encoder(tmp_path, CPU)
    with pytest.raises(FileNotFoundError, match="holds no scheduler"):
        load_noise_schedule(tmp_path, CPU)


def test_models_in_a_holder_are_not_part_of_the_module_that_has_it():
    owner = nn.Module()
    owner.models = FrozenModels(unet=nn.Linear(1, 1))
    assert not list(owner.parameters())
    with pytest.raises(AttributeError, match="'vae'; there are unet"):
        _ = owner.models.vae


@pytest.fixture
def unheard():
    """Nothing was said yet."""
    frozen._say_once.cache_clear()


def installed(monkeypatch, *names: str) -> None:
    monkeypatch.setattr(frozen, "find_spec", lambda name: ModuleSpec(name, None) if name in names else None)


def test_attention_is_sdpa_unless_xformers_is_asked_for_and_there(folder, monkeypatch, caplog, unheard):
    unet = load_part(folder, "unet", UNET, dtype=torch.float32, device=CPU)
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"AttnProcessor2_0"}
    calls, network = [], nn.Module()
    network.enable_xformers_memory_efficient_attention = lambda: calls.append("xformers")
    asked = MemoryOptions(enable_memory_efficient_attention=True)
    installed(monkeypatch)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            apply_memory_options(network, asked, torch.device("cuda"))
    assert not calls
    assert caplog.text.count("PyTorch's own SDPA") == 1
    installed(monkeypatch, "xformers")
    apply_memory_options(network, MemoryOptions(), torch.device("cuda"))
    apply_memory_options(network, asked, CPU)
    assert not calls
    apply_memory_options(network, asked, torch.device("cuda"))
    assert calls == ["xformers"]


def test_offloading_is_accelerates_and_for_gpus(monkeypatch, caplog, unheard):
    import accelerate

    calls = []
    monkeypatch.setattr(accelerate, "cpu_offload", lambda network, execution_device: calls.append(network))
    network, options = nn.Linear(1, 1), MemoryOptions(enable_sequential_cpu_offload=True)
    with caplog.at_level(logging.INFO):
        apply_memory_options(network, options, CPU)
    assert "without effect on the CPU" in caplog.text and not calls
    apply_memory_options(network, options, torch.device("cuda"))
    assert calls == [network]
    installed(monkeypatch)
    with pytest.raises(ValueError, match="pip install accelerate"):
        apply_memory_options(network, options, torch.device("cuda"))


def test_channels_last_is_for_images_and_leaves_videos_weights_alone():
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv3d(4, 8, 3), nn.Linear(4, 8))
    before = [p.clone() for p in network.parameters()]
    apply_memory_options(network, MemoryOptions(enable_channels_last_format=True), CPU)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[1].weight.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
