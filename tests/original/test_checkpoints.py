"""Checkpoints of the original code: every tensor finds its place, and strange objects in them stay inert."""

import json
import random
from pathlib import Path

import pytest
import torch

from fourdfy.config import ConfigError
from fourdfy.original.checkpoints import own_names
from fourdfy.systems.checkpoint import read_checkpoint
from tests.commands import launch, trial

STATE = json.loads((Path(__file__).parents[1] / "data" / "geometry_state.json").read_text())
ADAPTER = STATE["guidance_tensors"]["guidance_single_view"]
PREFIX = "guidance_single_view."


@pytest.fixture(scope="module")
def adapter_names():
    """The names that our adapter's parameters have on Stable Diffusion 2.1's U-Net, in some order."""
    names = [
        f"{PREFIX}lora.{attention}.{layer}.{matrix}.weight"
        for attention in ADAPTER["lora_layer_order"]
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
        for matrix in ("lora_A", "lora_B")
    ]
    names += [f"{PREFIX}camera_embedding.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    return names


@pytest.mark.parametrize("order", [list, lambda names: random.Random(1).sample(names, len(names)), set])
def test_every_tensor_of_the_original_s_adapter_has_one_place_in_whatever_order_ours_come(
    adapter_names, order
):
    state = {f"{PREFIX}{name}": torch.zeros(shape) for name, shape in ADAPTER["shapes"].items()}
    moved = own_names(state, order(adapter_names))
    assert sorted(moved) == sorted(adapter_names)
    # The numbers follow the facts' order, and q, k, v, out and down, up land where they belong.
    for number in random.Random(0).sample(range(32), 8):
        attention = ADAPTER["lora_layer_order"][number]
        old = f"{PREFIX}lora_layers.layers.{number}.to_out_lora.up.weight"
        assert moved[f"{PREFIX}lora.{attention}.to_out.0.lora_B.weight"] is state[old]
        old = f"{PREFIX}lora_layers.layers.{number}.to_k_lora.down.weight"
        assert moved[f"{PREFIX}lora.{attention}.to_k.lora_A.weight"] is state[old]


def test_an_adapter_for_another_unet_is_an_error(adapter_names):
    with pytest.raises(ConfigError, match="more than 32 attentions"):
        own_names({f"{PREFIX}lora_layers.layers.32.to_q_lora.up.weight": torch.zeros(1)}, adapter_names)


@pytest.mark.parametrize("variant", list(STATE["variants"]))
def test_scene_tensors_keep_their_names_and_the_grid_of_either_renderer_is_taken(variant):
    names = list(STATE["variants"][variant])
    state = {name: torch.zeros(0) for name in names}
    frozen = {"guidance.model.betas": torch.zeros(0), "guidance_multi_view.model.betas": torch.zeros(0)}
    assert set(own_names(state | frozen, names)) == set(names)
    plain = [name.replace("renderer.base_renderer.", "renderer.") for name in names]
    assert set(own_names(state, plain)) == set(plain)


class Stranger:
    """Stands for what Lightning pickles into a checkpoint: configs, callbacks."""

    def __init__(self):
        self.secret = 1


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(folder of outputs, our checkpoint, the same scene as the original's file would hold it)."""
    root = tmp_path_factory.mktemp("outputs")
    assert launch("shapes_stage_3.yaml", "train", root) == 0
    ours = trial(root, "shapes_stage_3") / "ckpts" / "last.ckpt"
    checkpoint = read_checkpoint(ours)
    state = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("guidance")}
    state["guidance.model.betas"] = state["guidance_multi_view.model.betas"] = torch.ones(1000)
    theirs = root / "original.ckpt"
    torch.save(
        {
            "state_dict": state,
            "epoch": 0,
            "global_step": 2,
            "hyper_parameters": Stranger(),
            "callbacks": {"ModelCheckpoint": {"best_model_path": Path("ckpts/last.ckpt")}},
        },
        theirs,
    )
    return root, ours, theirs


def test_the_original_s_checkpoint_starts_a_stage(original, tmp_path):
    _, ours, theirs = original
    given = [f"system.weights={theirs}", "trainer.max_steps=1"]
    assert launch("shapes_stage_3.yaml", "train", tmp_path, *given) == 0
    after = read_checkpoint(trial(tmp_path, "shapes_stage_3") / "ckpts" / "last.ckpt")["state_dict"]
    before = read_checkpoint(ours)["state_dict"]
    static = "geometry.encoding.encoding.encoding.params"
    assert torch.equal(after[static], before[static])


def test_the_original_s_checkpoint_is_rendered(original):
    root, _, theirs = original
    config = trial(root, "shapes_stage_3") / "configs" / "parsed.yaml"
    assert launch(config, "test", root, f"resume={theirs}") == 0
    assert (trial(root, "shapes_stage_3") / "save" / "it2-test.mp4").exists()


def test_training_does_not_go_on_from_the_original_s_optimizer(original, tmp_path, capsys):
    _, _, theirs = original
    assert launch("shapes_stage_3.yaml", "train", tmp_path, f"resume={theirs}", "trainer.max_steps=3") == 2
    assert "system.weights=" in capsys.readouterr().err


def test_reading_a_strange_object_gives_nothing_that_acts(original):
    hyper_parameters = read_checkpoint(original[2])["hyper_parameters"]
    assert not isinstance(hyper_parameters, Stranger)
