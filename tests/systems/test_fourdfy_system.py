"""The system: losses, what learns from which step, weights."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import yaml

from fourdfy.config import ConfigError
from fourdfy.files.atomic import warn_once
from fourdfy.launching.experiment import load_experiment
from fourdfy.ops import regularizers
from fourdfy.ops.regularizers import REGULARIZERS, regularizer
from fourdfy.seeds import step_generator
from fourdfy.systems.checkpoint import write_checkpoint
from fourdfy.types import StepContext
from tests.commands import CONFIGS, TINY


def experiment(*overrides, stage=3):
    return load_experiment([CONFIGS / f"shapes_stage_{stage}.yaml"], [*TINY, *overrides])


@pytest.fixture
def built():
    """A stage-3 system without guidances, and its data; unlike as shipped, its static half learns too."""
    this = experiment("system.freeze_static_modules=false")
    return this, this.build_system(), this.build_data()


def start_from_weights(this):
    system = this.build_system()
    system.load_weights(system.read_weights())
    return system


SHADING = "system.material_type=diffuse-with-point-light-material"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["system.loss.lambda_orient=1"], "lambda_orient=1: needs normals"),
        (["system.loss.lambda_orient=[0,0.0,1.0,9]"], "lambda_orient=.*needs normals"),
        (["system.loss.lambda_deformation=1"], "lambda_deformation=1: needs deformation"),
        (["system.geometry.n_feature_dims=4"], "reads 3 features and the geometry gives 4"),
        (["system.geometry.n_feature_dims=2", SHADING], "use system.geometry.n_feature_dims=3"),
        (["system.material_type=neural-radiance-material"], "use system.geometry.n_feature_dims=8"),
        (["system.loss.lambda_tv=1"], "lambda_tv=1: there is no such loss"),
        (["system.loss.sparsity=1"], r"system\.loss\.sparsity: unknown key; did you mean 'lambda_sparsity'"),
        (["system.geometry.normal_type=null", SHADING], "normal_type=null: the material or the renderer"),
        (
            ["system.geometry.normal_type=null", "system.renderer.return_comp_normal=true"],
            "use system.geometry.normal_type=finite_difference",
        ),
    ],
)
def test_a_part_that_reads_what_no_other_gives_is_refused_when_the_config_is_parsed(given, message):
    with pytest.raises(ConfigError, match=message):
        experiment(*given)


def test_losses_that_get_what_they_read_are_taken():
    experiment("system.loss.lambda_orient=1", SHADING)
    experiment("system.loss.lambda_orient=1", "system.renderer.return_comp_normal=true")
    given = ["system.prompt_processor.prompt=a fox", "system.loss.lambda_orient=1"]
    given += ["system.renderer.base_renderer.return_comp_normal=true"]
    load_experiment([CONFIGS / "fourdfy_stage_3_low_vram.yaml"], given)


def test_a_deformation_is_there_where_the_scene_moves():
    moving = experiment(
        "system.loss.lambda_deformation=1",
        "system.geometry.pos_encoding_config.otype=HashGridSpatialTimeDeform",
    )
    assert moving.cfg.system.geometry.has_deformation
    with pytest.raises(ConfigError, match="in a dynamic stage"):
        experiment(
            "system.loss.lambda_deformation=1",
            "system.geometry.pos_encoding_config.otype=HashGridSpatialTimeDeform",
            stage=1,
        )


def test_a_loss_is_on_when_its_weight_is_not_0_at_the_step():
    kind = experiment("system.loss.lambda_opaque=[10,0.0,3.0,11]").plan["video"]
    assert "opaque" not in kind.loss_weights(10)
    assert kind.loss_weights(11)["opaque"] == 3.0
    assert "orient" not in kind.loss_weights(0)


def test_a_guidance_whose_losses_all_have_weight_0_is_named(caplog):
    warn_once.cache_clear()
    experiment("system.loss.lambda_lora=0")
    assert "weight 0" not in caplog.text
    experiment("system.loss.lambda_vsd=0")  # its LoRA still learns, but not the scene
    assert "system.guidance: its losses of the scene have weight 0" in caplog.text
    experiment("system.loss.lambda_sds_video=0")
    assert "system.guidance_video: its losses of the scene have weight 0" in caplog.text


@pytest.mark.parametrize("stage", [1, 3])
def test_an_encoding_without_time_is_refused_where_the_scene_moves(stage, tmp_path):
    values = experiment(stage=stage).record()
    values["system"]["geometry"]["pos_encoding_config"] = {"otype": "HashGrid"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    moves = pytest.raises(ConfigError, match=r"pos_encoding_config\.otype: this encoding has no time")
    with moves if stage == 3 else nullcontext():
        load_experiment([tmp_path / "other.yaml"])


def test_a_weight_without_a_loss_must_be_0():
    experiment("system.loss.lambda_tv=0")
    with pytest.raises(ConfigError, match=r"lambda_tv.*there is no such loss; known: .*lambda_sparsity"):
        experiment("system.loss.lambda_tv=1")


def test_a_step_of_positive_probability_needs_its_guidance():
    with pytest.raises(ConfigError, match=r"system\.guidance_video: missing, and video steps"):
        experiment("system.guidance_type_video=null", "system.guidance_video=null")


def test_frames_of_one_scene_differ_only_by_time(built):
    _, system, data = built
    with torch.no_grad():
        for p in system.scene.halves()["dynamic"]:
            p.normal_()
    system.scene.before_step(StepContext(0, step_generator(0, 0, "occupancy")), dynamic=True)
    cameras = data.test_cameras(dynamic=True)["test"][:1]
    cameras = replace(cameras[torch.tensor([0, 0])], times=torch.tensor([0.1, 0.7]))
    together = system.render(cameras)
    assert len(together.samples) > 100
    apart = torch.cat([system.render(cameras[n : n + 1]).comp_rgb for n in (1, 0)]).flip(0)
    torch.testing.assert_close(together.comp_rgb, apart)
    assert (apart[0] - apart[1]).abs().max() > 0.01


def test_weights_of_another_shape_are_refused_by_name(tmp_path, built):
    _, system, _ = built
    saved = {"state_dict": system.state_dict(), "global_step": 1}
    write_checkpoint(saved, tmp_path / "a.ckpt")
    other = experiment(f"system.weights={tmp_path}/a.ckpt", "system.geometry.pos_encoding_config.n_levels=3",
                       "system.geometry.pos_encoding_config.time_encoding_config.n_levels=3")  # fmt: skip
    with pytest.raises(ConfigError, match=r"geometry\.encoding\.encoding\.encoding\.params has shape"):
        start_from_weights(other)


def test_a_scene_that_is_not_finite_is_not_loaded(tmp_path, built):
    _, system, _ = built
    state = {key: value.clone() for key, value in system.state_dict().items()}
    state["geometry.density_network.layers.0.weight"][0, 0] = float("nan")
    saved = {"state_dict": state, "global_step": 1}
    torch.save(saved, tmp_path / "a.ckpt")
    said = r"geometry\.density_network\.layers\.0\.weight holds numbers that are not finite; use an earlier"
    with pytest.raises(ConfigError, match=rf"^resume: {said}"):
        system.load_checkpoint(saved)
    with pytest.raises(ConfigError, match=rf"^system\.weights: {said}"):
        start_from_weights(experiment(f"system.weights={tmp_path}/a.ckpt"))


def test_modules_can_be_left_out_of_weights(tmp_path, built):
    _, system, _ = built
    state = {key: torch.ones_like(value) for key, value in system.state_dict().items()}
    write_checkpoint({"state_dict": state, "global_step": 1}, tmp_path / "a.ckpt")
    taken = experiment(
        f"system.weights={tmp_path}/a.ckpt", "system.weights_ignore_modules=[geometry.density_network]"
    )
    taken = start_from_weights(taken)
    assert taken.scene.geometry.feature_network.layers[0].weight.eq(1).all()
    assert not taken.scene.geometry.density_network.layers[0].weight.eq(1).any()


@pytest.mark.parametrize("meant", [True, False], ids=["a group that is null", "no group"])
def test_an_adapter_in_no_optimizer_group_is_named_unless_it_is_meant(meant, built, caplog, monkeypatch):
    _, system, _ = built
    if not meant:
        monkeypatch.delitem(system.cfg.optimizer.params, "guidance_single_view")
    for kind in system.plan.kinds:
        adapter = torch.nn.Linear(1, 1) if kind.name == "single_view" else torch.nn.Identity()
        setattr(system, kind.module, adapter)
    with caplog.at_level("INFO"):
        system.configure_optimizer()
    told = "no group holds the LoRA of guidance_single_view; it stays as it is" in caplog.text
    assert told is not meant


@pytest.fixture
def own_regularizers(monkeypatch):
    monkeypatch.setattr(regularizers, "REGULARIZERS", {**REGULARIZERS})
    monkeypatch.setattr("fourdfy.systems.fourdfy.REGULARIZERS", regularizers.REGULARIZERS)


def test_a_plugin_s_regularizer_has_a_weight_and_says_what_it_reads(own_regularizers):
    @regularizer("stillness", needs=("deformation",))
    def stillness(render):
        return render.deformation.square().mean()

    deforms = "system.geometry.pos_encoding_config.otype=HashGridSpatialTimeDeform"
    this = experiment("system.loss.lambda_stillness=2", deforms)
    assert this.plan["video"].loss_weights(0)["stillness"] == 2
    with pytest.raises(ConfigError, match=r"lambda_stillness=2: needs deformation, .* set it to 0$"):
        experiment("system.loss.lambda_stillness=2")


def test_two_regularizers_never_share_a_name(own_regularizers):
    with pytest.raises(ValueError, match=r"'sparsity' is already fourdfy\.ops\.regularizers\.sparsity"):
        regularizer("sparsity")(lambda render: render.opacity.mean())


def test_a_scene_is_built_alike_and_leaves_the_global_generator_as_it_was():
    before = torch.get_rng_state()
    first = experiment().build_system().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    again, other = experiment().build_system().state_dict(), experiment("seed=5").build_system().state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not torch.equal(other["geometry.density_network.layers.0.weight"],
                           first["geometry.density_network.layers.0.weight"])  # fmt: skip
