"""Sizes that no machine has room for are told at once, before anything of that size is made."""

import pytest

from fourdfy.config import ConfigError
from fourdfy.launching import plan
from fourdfy.launching.experiment import load_experiment
from tests.commands import CONFIGS

PROMPT = "system.prompt_processor.prompt=a red cube bouncing"
VIEW, GRID = "data.single_view", "system.geometry.pos_encoding_config"


def load(*overrides):
    return load_experiment([CONFIGS / "shapes_stage_3.yaml"], [PROMPT, *overrides])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            [f"{VIEW}.eval_{key}=8192" for key in ("width", "height")] + [f"{VIEW}.eval_batch_size=8"],
            "pixels at once",
        ),
        ([f"{VIEW}.num_frames=1024", f"{VIEW}.num_test_loop_factor=100"], "is 1,654,784 test frames"),
        (
            [f"{GRID}.n_levels=32", f"{GRID}.n_features_per_level=8", f"{GRID}.log2_hashmap_size=24"],
            "4,294,967,296 num",
        ),
        (
            ["system.geometry.mlp_network_config={n_neurons: 4096, n_hidden_layers: 32}"],
            "536,870,912 weights",
        ),
        (["data.single_view.n_test_views=1000000000"], "expected 1 to 10000"),
    ],
)
def test_sizes_beyond_any_use_are_refused_by_their_keys(overrides, said):
    with pytest.raises(ConfigError, match=said) as error:
        load(*overrides)
    assert overrides[0].partition("=")[0].rpartition(".")[2] in str(error.value)


def test_a_step_that_does_not_fit_is_refused_by_its_estimate(monkeypatch):
    sizes = [f"{VIEW}.{key}_vid=8192" for key in ("width", "height")]
    with pytest.raises(ConfigError, match=r"^shapes_stage_3: a step needs [\d,]+ GiB at least, and cpu has"):
        plan.check_run([load(*sizes, f"{VIEW}.num_frames=512", "trainer.memory_budget_gb=1")], "cpu")
    plan.check_run([load()], "cpu")
    monkeypatch.setattr(plan, "memory_of", lambda device: 2.0**20)
    with pytest.raises(ConfigError, match=r"and cpu has 0; lower the scene's sizes"):
        plan.check_run([load()], "cpu")
