"""Loading frozen parts: types, safety, and what a wrong folder says."""

from __future__ import annotations

import json
import logging
import pickle

import pytest
import torch
from torch import nn

from fourdfy.diffusion.frozen import (
    FrozenModels,
    MemoryOptions,
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


def test_half_precision_is_a_type_of_weights_and_float32_on_the_cpu(folder, caplog):
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
