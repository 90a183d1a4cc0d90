"""The authors' package as a back end: against a small fake of it, and against ours where it is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fourdfy.priors import mvdream_package
from fourdfy.priors.convert import convert_unet, convert_vae
from fourdfy.priors.frozen import encode_images, vae_factor
from fourdfy.priors.mvdream import enable_multi_view_attention
from fourdfy.priors.mvdream_package import load_mvdream_package, read_config
from tests.priors.twins import HEAD_WIDTH, recorded, twin_state

CPU = torch.device("cpu")
NAME = "sd-v2.1-base-4view"

CONFIG = """
model:
  target: mvdream.fake.Interface
  params:
    scale_factor: 0.5
    unet_config: {params: {image_size: 16}}
    first_stage_config: {params: {ddconfig: {ch_mult: [1, 2, 4]}}}
    cond_stage_config: {target: mvdream.fake.Forbidden}
"""

UTIL = """
from importlib import import_module
def instantiate_from_config(config):
    module, _, name = config["target"].rpartition(".")
    return getattr(import_module(module), name)(**config.get("params", {}))
"""

FAKE = """
from types import SimpleNamespace
import torch
from mvdream.ldm.util import instantiate_from_config
class Forbidden:
    def __init__(self): raise AssertionError("the text encoder was built")
class Interface(torch.nn.Module):
    parameterization = "eps"
    def __init__(self, scale_factor, unet_config, first_stage_config, cond_stage_config):
        super().__init__()
        self.scale_factor = scale_factor
        self.cond_stage_model = instantiate_from_config(cond_stage_config)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("alphas_cumprod", torch.zeros(1000))
    def apply_model(self, x, t, cond):
        assert set(cond) == {"context", "camera", "num_frames"}
        scalars = t + cond["context"].sum((1, 2)) + cond["camera"].sum(1) + 1000 * cond["num_frames"]
        return self.weight * x + scalars[:, None, None, None]
    def encode_first_stage(self, x):
        mean = self.weight * x[:, :, ::4, ::4]
        return SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.1))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A tree with the package's layout, where a checkout would be; and a checkpoint of it."""
    root = tmp_path / "extern" / "MVDream"
    for file, content in {
        "mvdream/__init__.py": "",
        "mvdream/fake.py": FAKE,
        "mvdream/ldm/__init__.py": "",
        "mvdream/ldm/util.py": UTIL,
        "mvdream/configs/sd-v2-base.yaml": CONFIG,
    }.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(content)
    monkeypatch.setattr(mvdream_package, "EXTERN", root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield write_checkpoint(tmp_path / "mvdream.pt")
    for name in [name for name in sys.modules if name.partition(".")[0] == "mvdream"]:
        del sys.modules[name]


def write_checkpoint(file: Path, **more) -> Path:
    state = {"weight": torch.tensor(2.0), "alphas_cumprod": torch.linspace(1, 0, 1000)}
    # The object of a foreign class is what only our own reader gets past.
    torch.save(
        {"state_dict": state | {"cond_stage_model.model.x": torch.ones(1)} | more, "o": Path("x")}, file
    )
    return file


@pytest.mark.skipif(find_spec("mvdream") is not None, reason="the real package goes before the tree")
def test_the_packages_network_is_called_as_ours_is(fake):
    (unet, schedule), _ = load_mvdream_package(NAME, fake, 4, torch.float32, CPU)
    x, t = torch.randn(8, 4, 2, 2), torch.full((8,), 7)
    context, camera = torch.randn(8, 3, 5), torch.randn(8, 16)
    given = {"encoder_hidden_states": context, "class_labels": camera}
    (prediction,) = unet(x, t, **given, return_dict=False)
    scalars = 7 + context.sum((1, 2)) + camera.sum(1) + 4000
    torch.testing.assert_close(prediction, 2 * x + scalars[:, None, None, None])
    assert torch.equal(unet(x, t, **given).sample, prediction)
    assert unet.config.sample_size == 16
    assert not any(p.requires_grad for p in unet.parameters())
    assert (schedule.prediction, len(schedule)) == ("epsilon", 1000)
    assert torch.equal(schedule.alphas_cumprod, torch.linspace(1, 0, 1000))


@pytest.mark.skipif(find_spec("mvdream") is not None, reason="the real package goes before the tree")
def test_the_packages_autoencoder_encodes_as_ours_does(fake):
    _, vae = load_mvdream_package(NAME, str(fake), 4, torch.float32, CPU)
    assert vae_factor(vae) == 4
    images = torch.rand(2, 3, 8, 8)
    latents = encode_images(vae, images, torch.Generator().manual_seed(0))
    mean = 2 * (images * 2 - 1)[:, :, ::4, ::4]
    assert (latents / 0.5 - mean).abs().max() < 0.5  # five standard deviations
    assert (latents / 0.5 - mean).abs().max() > 0


@pytest.mark.skipif(find_spec("mvdream") is not None, reason="the real package goes before the tree")
def test_a_checkpoint_that_does_not_fit_is_named(fake, tmp_path):
    file = write_checkpoint(tmp_path / "other.pt", colour=torch.ones(1))
    with pytest.raises(ValueError, match=r"other.pt doesn't fit .*(?s:.)*colour"):
        load_mvdream_package(NAME, file, 4, torch.float32, CPU)
    with pytest.raises(ValueError, match=r"is a folder; expected an original checkpoint file"):
        load_mvdream_package(NAME, tmp_path, 4, torch.float32, CPU)


@pytest.mark.skipif(find_spec("mvdream") is not None, reason="the real package is there")
def test_without_the_package_the_error_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(mvdream_package, "EXTERN", tmp_path / "none")
    with pytest.raises(ModuleNotFoundError, match=r"pip install git.*checkout at .*none; backend=diffusers"):
        load_mvdream_package(NAME, "MVDream/MVDream", 4, torch.float32, CPU)


def test_what_the_package_cannot_do_is_said():
    with pytest.raises(ValueError, match="half_precision_weights=false"):
        load_mvdream_package(NAME, "MVDream/MVDream", 4, torch.float16, CPU)
    with pytest.raises(ValueError, match=r"model_name='sd-v9'; backend=mvdream knows sd-v2.1-base-4view"):
        load_mvdream_package("sd-v9", "MVDream/MVDream", 4, torch.float32, CPU)


@pytest.mark.skipif(find_spec("mvdream") is None, reason="needs the authors' package mvdream")
def test_the_package_and_ours_agree(tmp_path, monkeypatch):
    config = read_config(NAME)
    config.params.unet_config.params |= {"model_channels": 32, "num_head_channels": 8, "context_dim": 24}
    config.params.first_stage_config.params.ddconfig.ch = 32
    monkeypatch.setattr(mvdream_package, "read_config", lambda name: config)
    from mvdream.ldm.util import instantiate_from_config

    config.params.cond_stage_config = {"target": "torch.nn.Identity"}
    state = instantiate_from_config(config).state_dict()
    state |= twin_state("mvdream", "unet") | twin_state("mvdream", "vae")
    torch.save(state, tmp_path / "twin.pt")
    theirs, their_vae = load_mvdream_package(NAME, tmp_path / "twin.pt", 4, torch.float32, CPU)
    unet = convert_unet(state, "MVDream", HEAD_WIDTH["unet"])["unet"].eval()
    enable_multi_view_attention(unet, 4)
    vae = convert_vae(state).eval()
    facts = recorded("mvdream")
    sample, context, camera = (facts[f"unet_t777/{key}"] for key in ("sample", "context", "camera"))
    timesteps = torch.full((len(sample),), 777)
    given = {"encoder_hidden_states": context, "class_labels": camera}
    with torch.no_grad():
        torch.testing.assert_close(
            unet(sample, timesteps, **given).sample,
            theirs.network(sample, timesteps, **given).sample,
            atol=5e-5,
            rtol=0,
        )
        ours, other = (network.encode(facts["vae/image"]).latent_dist for network in (vae, their_vae))
        torch.testing.assert_close(ours.mean, other.mean, atol=5e-5, rtol=0)
