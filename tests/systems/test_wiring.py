"""What a training step tells its parts, and what it makes of their answers.

The guidances are fakes that record what they are asked; scene, renderer, data and plan are the real ones.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from fourdfy.config import ConfigError
from fourdfy.guidance.base import Guidance
from fourdfy.launching.experiment import load_experiment
from fourdfy.scenes.nerf.scene import NeRFScene
from fourdfy.seeds import step_generator
from fourdfy.systems.checkpoint import write_checkpoint
from fourdfy.types import GuidanceOutput
from tests.commands import CONFIGS, TINY

KINDS = ["multi_view", "single_view", "video"]


class FakeGuidance(Guidance):
    """Losses ``sds`` and ``lora``: the mean colour, and its own parameter."""

    losses = ("sds", "lora")

    @dataclass(frozen=True, kw_only=True)
    class Config(Guidance.Config):
        pass

    def __init__(self, cfg, *, device):
        super().__init__(cfg, device=device)
        self.adapter = nn.Parameter(torch.ones(1))
        self.asked = []

    def accelerate(self, compile_small):
        self.compile_small = compile_small

    def forward(self, frames, text, cameras, context):
        self.asked.append((frames, text, cameras, context))
        return GuidanceOutput(losses={"sds": frames.comp_rgb.mean(), "lora": self.adapter.sum()}, metrics={})


LOSSES = ["sparsity", "opaque", "orient", "z_variance", "deformation", "sds", "sds_video", "vsd", "lora"]
OFF = [f"system.loss.lambda_{name}=0" for name in LOSSES]


def experiment(*overrides):
    """A moving stage of all three kinds, whose guidances are fakes."""
    free = ["system.freeze_static_modules=false", "data.single_view.prob_single_view_video=0.5"]
    this = load_experiment([CONFIGS / "shapes_stage_3.yaml"], [*TINY, *free, *OFF, *overrides])
    kinds = tuple(replace(kind, guidance=FakeGuidance.Config(), prompts=None) for kind in this.plan.kinds)
    return replace(this, plan=replace(this.plan, kinds=kinds))


def ready(this):
    system = this.build_system()
    system.prepare(torch.device("cpu"), resumed=False)
    return system


def batch_of(this, kind, after=0):
    """The first batch of a kind from the step ``after`` on."""
    steps = range(after, after + 200)
    return this.build_data().batch(next(n for n in steps if this.plan.choose(this.cfg.seed, n).name == kind))


def fresh(step, stream, part=0, seed=0):
    """The first numbers of a stream, as documented."""
    return torch.rand(4, generator=step_generator(seed, step, stream, part=part))


@pytest.fixture
def rendered(monkeypatch):
    """(context, budget) of each call of the scene; its generator is a copy that nothing else draws from."""
    told, render = [], NeRFScene.render

    def watched(self, cameras, context, budget="image"):
        told.append((context.copied(), budget))
        return render(self, cameras, context, budget)

    monkeypatch.setattr(NeRFScene, "render", watched)
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_weighted_sum(kind):
    this = experiment("system.loss.lambda_sds=0.3", "system.loss.lambda_sparsity=[0,1.0,3.0,200]")
    system, batch = ready(this), batch_of(this, kind, after=20)
    out = system.training_step(batch)
    weights = {"sds": 0.3, "sparsity": 1.0 + 2.0 * batch.step / 200}
    assert out.loss_weights == pytest.approx(weights)
    torch.testing.assert_close(out.loss.detach(), sum(w * out.losses[name] for name, w in weights.items()))
    assert {"sds", "sparsity", "lora"} == out.losses.keys(), (
        "a loss that is off is a curve too, if it is there"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_guidance_sees_its_text_its_cameras_and_the_step(kind):
    this = experiment("system.loss.lambda_sds=1")
    system, batch = ready(this), batch_of(this, kind, after=9)
    system.texts = {name: f"text of {name}" for name in KINDS}
    system.training_step(batch)
    ((frames, text, cameras, context),) = getattr(system, system.plan[kind].module).asked
    assert text == f"text of {kind}"
    assert cameras is batch.cameras and frames.comp_rgb.requires_grad
    assert frames.group_size == batch.cameras.group_size
    assert context.step == batch.step > 8


@pytest.mark.parametrize("kind", KINDS)
def test_the_scene_is_told_the_step_and_the_budget(kind, rendered):
    system, batch = ready(this := experiment("system.loss.lambda_sds=1")), batch_of(this, kind, after=9)
    system.training_step(batch)
    ((context, budget),) = rendered
    assert (context.step, budget) == (batch.step, "video" if kind == "video" else "image")


@pytest.mark.parametrize(("part", "stream"), [(0, "guidance"), (3, "guidance"), (0, "render"), (2, "render")])
def test_each_part_draws_its_own_stream_of_the_step(part, stream, rendered):
    this = experiment("system.loss.lambda_sds=1")
    system, batch = ready(this), replace(batch_of(this, "single_view", after=5), part=part)
    drawn = {}
    guidance = system.guidance_single_view
    guidance.register_forward_pre_hook(
        lambda _, args: drawn.update(guidance=torch.rand(4, generator=args[3].generator.clone_state()))
    )
    system.training_step(batch)
    drawn["render"] = torch.rand(4, generator=rendered[0][0].generator)
    assert torch.equal(drawn[stream], fresh(batch.step, stream, part))


def test_streams_steps_parts_and_seeds_draw_different_numbers():
    streams = ("kind", "camera", "render", "guidance", "occupancy")
    draws = [fresh(step, stream) for step in (3, 7) for stream in streams]
    draws += [fresh(3, "guidance", part=1), fresh(3, "guidance", seed=1)]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


HALVES = {"multi_view": {"static"}, "single_view": {"static"}, "video": {"static", "dynamic"}}


def learned(system):
    """The halves of the scene that have a gradient."""
    halves = system.scene.halves().items()
    return {name for name, half in halves if any(p.grad is not None for p in half)}


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_trains_its_halves_of_the_scene_and_its_guidance(kind, freeze):
    this = experiment(
        "system.loss.lambda_sds=1", "system.loss.lambda_lora=1", f"system.freeze_static_modules={freeze}"
    )
    system, batch = ready(this), batch_of(this, kind)
    system.before_step(replace(batch, step=0))  # fills the occupancy grid, so that there is something to see
    system.training_step(batch).loss.backward()
    assert learned(system) == ({"dynamic"} if freeze else HALVES[kind])
    trained = {name for name in KINDS if getattr(system, system.plan[name].module).adapter.grad is not None}
    assert trained == {kind}
    assert all(p.requires_grad for p in system.parameters()), "what is frozen is frozen for the step alone"


@pytest.mark.parametrize(("stage", "dynamic"), [(1, False), (3, True)])
def test_the_occupancy_of_a_moving_scene_is_refreshed_at_all_times(stage, dynamic, monkeypatch):
    this = load_experiment([CONFIGS / f"shapes_stage_{stage}.yaml"], [*TINY])
    system, told = this.build_system(), []
    monkeypatch.setattr(system.scene.renderer.estimator, "refresh", lambda *_, **given: told.append(given))
    batch = batch_of(this, "multi_view")
    while batch.step % system.scene.renderer.cfg.update_interval:
        batch = batch_of(this, "multi_view", after=batch.step + 1)
    system.before_step(batch)
    assert [given["num_times"] > 0 for given in told] == [dynamic]
    drawn = torch.rand(4, generator=told[0]["generator"])
    assert torch.equal(drawn, fresh(batch.step, "occupancy"))


def test_the_scene_sees_its_gradients_before_the_optimizer_takes_them(monkeypatch):
    this = experiment("system.loss.lambda_sds=1")
    system, batch, told = ready(this), batch_of(this, "video", after=5), []
    monkeypatch.setattr(system.scene, "after_backward", lambda *args: told.append(args))
    system.training_step(batch).loss.backward()
    optimizer = torch.optim.Adam(system.parameters())
    optimizer.param_groups[0]["name"] = "all"
    system.after_backward(batch, optimizer)
    ((context, given),) = told
    assert (context.step, given) == (batch.step, optimizer) and context.generator is not None


def test_evaluation_anneals_as_at_the_step_of_the_checkpoint(rendered):
    this = experiment()
    system, saved = this.build_system(), this.build_system()
    system.load_checkpoint({"state_dict": saved.state_dict(), "global_step": 9})
    system.render(this.build_data().val_cameras(dynamic=True)["val"][:1])
    assert [(context.step, context.generator) for context, _ in rendered] == [(9, None)]


def test_a_lora_of_the_earlier_stage_is_taken_up(tmp_path):
    first = ready(experiment())
    nn.init.constant_(first.guidance_single_view.adapter, 5.0)
    write_checkpoint({"state_dict": first.state_dict(), "global_step": 1}, tmp_path / "a.ckpt")
    second = ready(experiment(f"system.weights={tmp_path}/a.ckpt"))
    assert second.guidance_single_view.adapter.item() == 5.0
    assert second.guidance_video.adapter.item() == 1.0


def test_building_and_preparing_leave_the_global_generator_alone():
    this = experiment("system.loss.lambda_sds=1")
    state = torch.get_rng_state()
    system = ready(this)
    system.training_step(batch_of(this, "video"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = ready(this)
    assert all(torch.equal(p, q) for p, q in zip(system.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (
            {"sdds": torch.ones(())},
            r"gives the loss 'sdds', which has no weight; name .* set system\.loss\.lambda_sdds",
        ),
        ({"sds": torch.ones(2, 3)}, r"gives the loss 'sds' of shape \[2, 3\], expected \[\]"),
        (None, "gives a NoneType, expected a GuidanceOutput"),
    ],
)
def test_a_guidance_that_gives_something_else_is_named(output, problem, monkeypatch):
    made = output and GuidanceOutput(losses={}, metrics={})
    if made:
        made.losses.update(output)
    monkeypatch.setattr(FakeGuidance, "forward", lambda *_: made)
    this = experiment("system.loss.lambda_sparsity=1")
    with pytest.raises(ConfigError, match=rf"^system\.guidance_video: FakeGuidance\.forward {problem}"):
        ready(this).training_step(batch_of(this, "video"))


@pytest.mark.parametrize(("setting", "asked"), [("auto", None), ("false", None), ("true", True)])
def test_networks_are_accelerated_as_the_config_says(setting, asked):
    system = ready(experiment(f"system.compile={setting}"))
    assert getattr(system.guidance_video, "compile_small", None) is asked


def test_a_way_to_compile_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="compile='fast'; expected auto, true or false"):
        experiment("system.compile=fast")
