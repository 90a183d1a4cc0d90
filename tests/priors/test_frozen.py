"""Loading frozen parts: types, safety, and what a wrong folder says."""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
import shutil
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fourdfy.config import ConfigError
from fourdfy.priors import frozen
from fourdfy.priors.frozen import (
    MemoryOptions,
    apply_memory_options,
    check_part,
    load_noise_schedule,
    load_part,
    load_text_encoder,
)
from fourdfy.priors.network_file import ALLOWED, LISTS, OR_LISTS, OR_NULL
from tests.tiny_models import save_stable_diffusion

CPU = torch.device("cpu")
ABAR = torch.from_numpy(np.load("tests/data/sds_reference.npz")["schedule/alphas_cumprod"])
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
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_part(pickled[0], "unet", UNET, dtype=torch.float32, device=CPU)
    torch.save({"conv_in.weight": Evil()}, pickled[1])
    with pytest.raises(ConfigError, match="can't be loaded"):
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
    with pytest.raises(ConfigError, match="can't be loaded"):
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


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_weights_that_are_not_finite_are_refused_by_name(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "sd")
    (file,) = (copy / part).glob("*.safetensors")
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(math.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{part} can't be loaded: .* holds numbers that are not finite"):
        if part == "vae":
            load_part(copy, "vae", "AutoencoderKL", dtype=torch.float32, device=CPU)
        else:
            load_text_encoder(copy, CPU)


def describe(folder, part, file, **changes):
    """``folder``'s copy of a part with other entries in its description; None takes one away."""
    config = json.loads(file.read_text()) | changes
    (folder / part).mkdir(exist_ok=True)
    kept = {key: value for key, value in config.items() if key not in changes or value is not None}
    (folder / part / file.name).write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "sampler",
    [
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2, "use_flow_sigmas": False},
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "discrete", "sigma_min": None},
    ],
)
def test_the_noise_levels_are_the_same_whichever_sampler_the_file_names(folder, tmp_path, sampler):
    expected = load_noise_schedule(folder, CPU)
    assert expected.prediction == "v_prediction"
    assert len(expected) == 1000
    # 2e-6: the reference was accumulated otherwise.
    torch.testing.assert_close(expected.alphas_cumprod, ABAR, rtol=2e-6, atol=0)
    describe(tmp_path, "scheduler", folder / "scheduler" / "scheduler_config.json", **sampler)
    schedule = load_noise_schedule(tmp_path, CPU)
    assert torch.equal(schedule.alphas_cumprod, expected.alphas_cumprod)
    assert schedule.prediction == "v_prediction"


def test_trained_betas_and_zero_terminal_snr_are_read(folder, tmp_path):
    file = folder / "scheduler" / "scheduler_config.json"
    describe(tmp_path, "scheduler", file, trained_betas=[0.1, 0.5], beta_start=None)
    alphas = load_noise_schedule(tmp_path, CPU).alphas_cumprod
    assert torch.allclose(alphas, torch.tensor([0.9, 0.45]))
    describe(tmp_path, "scheduler", file, rescale_betas_zero_snr=True)
    assert load_noise_schedule(tmp_path, CPU).alphas_cumprod[-1].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}, "FlowMatchHeunDiscreteScheduler"),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "snr_shift_scale is missing"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ({"_class_name": None}, "describes a None"),
        ({"_class_name": ["DDIMScheduler"]}, "DDIMScheduler"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "flow_shift is missing"),
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"prediction_type": "x0"}, "prediction_type='x0'"),
        ({"prediction_type": None}, None),
        ({"snr_shift_scale": 3.0}, "snr_shift_scale=3.0"),
        ({"timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range'"),
        ({"shift": 3.0}, "unknown keys that might change the noise levels: shift"),
        ({"beta_schedule": "exp"}, "beta_schedule='exp'"),
        ({"beta_schedule": ["linear"]}, "beta_schedule=['linear']"),
        ({"beta_end": math.nan}, "beta_end=nan"),
        ({"beta_start": 5, "beta_end": 9}, "beta_start=5"),
        ({"beta_start": "0.1"}, "beta_start='0.1'"),
        ({"beta_start": None}, "beta_start is missing"),
        ({"trained_betas": [0.1, 2.0]}, "trained_betas"),
        ({"trained_betas": 3}, "trained_betas"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps=10.5"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr='yes'"),
    ],
)
def test_a_scheduler_file_that_may_mean_other_noise_levels_is_refused(folder, tmp_path, changes, said):
    describe(tmp_path, "scheduler", folder / "scheduler" / "scheduler_config.json", **changes)
    if said is None:  # every class predicts epsilon unless the file says otherwise
        assert load_noise_schedule(tmp_path, CPU).prediction == "epsilon"
        return
    with pytest.raises(ConfigError) as error:
        load_noise_schedule(tmp_path, CPU)
    assert str(tmp_path / "scheduler" / "scheduler_config.json") in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize("content", ["[1]", "null", "{", "3", "[" * 100_000])
def test_a_description_that_is_no_mapping_is_named(folder, tmp_path, content):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model_index\.json"):
        check_part(tmp_path, "unet", UNET)
    (tmp_path / "model_index.json").unlink()
    copy = shutil.copytree(folder, tmp_path / "model")
    for file in copy.glob("*/*config.json"):
        file.write_text(content)
        with pytest.raises(ConfigError, match=re.escape(str(file))) as error:
            check_part(copy, file.parent.name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_part_of_another_class_is_refused(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "model")
    file = next((copy / part).glob("*config.json"))
    for name in ("AutoencoderKLWan", "T5TokenizerFast", ["T5EncoderModel"]):
        keys = ("_class_name", "architectures", "tokenizer_class")
        describe(copy, part, file, **dict.fromkeys(keys, name))
        with pytest.raises(ConfigError, match=rf"{part} holds a .*expected a "):
            check_part(copy, part)


@pytest.mark.parametrize(
    ("size", "said"),
    [(5, "can't be loaded"), *((size, "config.json: KEY=") for size in (10**9, 0, "wide", [4], True))],
)
def test_sizes_that_fit_no_weights_are_one_line(folder, tmp_path, size, said):
    copy = shutil.copytree(folder, tmp_path / "model")
    describe(copy, "vae", copy / "vae" / "config.json", latent_channels=size)
    describe(copy, "text_encoder", copy / "text_encoder" / "config.json", hidden_size=size)
    with pytest.raises(ConfigError, match=f"vae.{said.replace('KEY', 'latent_channels')}") as error:
        load_part(copy, "vae", "AutoencoderKL", dtype=torch.float32, device=CPU)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=f"text_encoder.{said.replace('KEY', 'hidden_size')}") as error:
        load_text_encoder(copy, CPU)
    assert "\n" not in str(error.value)


def test_blocks_that_do_not_fit_together_are_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    describe(copy, "vae", copy / "vae" / "config.json", down_block_types=["DownEncoderBlock2D"])
    with pytest.raises(ConfigError, match=r"down_block_types, up_block_types have \[3, 1, 3\] entries"):
        check_part(copy, "vae")


def test_every_key_of_a_list_or_null_is_checked():
    assert {*LISTS, *OR_LISTS, *OR_NULL} <= ALLOWED.keys()


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_weights_that_a_file_lacks_are_not_drawn_at_random(folder, tmp_path, part):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "model")
    file = next((copy / part).glob("*.safetensors"))
    weights = load_file(file)
    key = next(key for key in weights if key.endswith("conv_in.weight") or "token_embedding" in key)
    del weights[key]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{part} can't be loaded: .*1 weights are missing"):
        if part == "vae":
            load_part(copy, part, "AutoencoderKL", dtype=torch.float32, device=CPU)
        load_text_encoder(copy, CPU)


def test_half_precision_variants_serve_where_there_is_nothing_else(folder, tmp_path, caplog, unheard):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    copy = shutil.copytree(folder, tmp_path / "model", ignore=lambda *_: ["unet", "text_encoder"])
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").half()
    unet.save_pretrained(copy / "unet", variant="fp16")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").half()
    encoder.save_pretrained(copy / "text_encoder", variant="fp16")
    assert list(copy.glob("*/*.fp16.safetensors"))
    with caplog.at_level(logging.INFO):
        loaded = load_part(copy, "unet", UNET, dtype=torch.float16, device=CPU)
        assert "half precision" not in caplog.text
        load_part(copy, "unet", UNET, dtype=torch.float32, device=CPU)
        assert f"{copy / 'unet'}: rounded to half precision" in caplog.text
    assert torch.equal(loaded.conv_in.weight, unet.conv_in.weight)
    assert load_text_encoder(copy, CPU)[1].dtype == torch.float32


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_shards_are_read(folder, tmp_path, variant):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.save_pretrained(tmp_path / "unet", max_shard_size="100KB", variant=variant)
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    loaded = load_part(tmp_path, "unet", UNET, dtype=torch.float32, device=CPU)
    assert torch.equal(loaded.conv_out.weight, unet.conv_out.weight)


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no unet"):
        load_part(tmp_path, "unet", UNET, dtype=torch.float32, device=CPU)
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load_text_encoder(tmp_path, CPU)
    with pytest.raises(FileNotFoundError, match="holds no scheduler"):
        load_noise_schedule(tmp_path, CPU)


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
