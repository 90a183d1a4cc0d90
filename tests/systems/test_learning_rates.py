"""Schedulers by threestudio's names, and what a resumed run takes over from an optimizer."""

import pytest
import torch

from fourdfy.config import ConfigError, parse_config
from fourdfy.launching.experiment import load_experiment
from fourdfy.systems.learning_rates import SchedulerConfig, advance, continued
from tests.commands import CONFIGS, TINY

WARM_UP = {"name": "LinearLR", "interval": "step", "args": {"start_factor": 0.1, "total_iters": 4}}
DECAY = {"name": "ExponentialLR", "interval": "step", "args": {"gamma": 0.5}}
SEQUENTIAL = {"name": "SequentialLR", "interval": "step", "milestones": [4], "schedulers": [WARM_UP, DECAY]}
CHAINED = {"name": "ChainedScheduler", "interval": "step", "schedulers": [WARM_UP, DECAY]}
FORMS = {
    "decay": DECAY,
    "sequential": SEQUENTIAL,
    "chained": CHAINED,
    "cosine": {"name": "CosineAnnealingLR", "args": {"T_max": 7}},
    "one_cycle": {"name": "OneCycleLR", "args": {"max_lr": 0.3, "total_steps": 20}},
}


def adam(lr=1.0, **options):
    parameter = torch.nn.Parameter(torch.ones(2))
    return torch.optim.AdamW([{"params": [parameter], "name": "a"}], lr=lr, **options)


def trained(optimizer, steps, scheduler=None):
    (parameter,) = optimizer.param_groups[0]["params"]
    for _ in range(steps):
        parameter.grad = parameter.detach().clone()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return optimizer


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("decay", [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
        ("sequential", [0.1, 0.325, 0.55, 0.775, 1.0, 0.5]),
        ("chained", [0.1, 0.1625, 0.1375, 0.096875, 0.0625, 0.03125]),
    ],
)
def test_schedulers_of_threestudios_forms_move_the_rate_at_every_step(form, expected):
    optimizer = adam()
    scheduler = parse_config(SchedulerConfig, FORMS[form]).build(optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in expected[1:]:
        trained(optimizer, 1, scheduler)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("error:Detected call of")
def test_a_scheduler_is_a_function_of_the_step(form):
    cfg = SchedulerConfig(**FORMS[form])
    there, resumed = adam(), adam()
    trained(there, 9, cfg.build(there))
    advance(cfg.build(resumed), 9)
    assert resumed.param_groups[0]["lr"] == there.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "{name: ExponentialLr, args: {gamma: 0.5}}",
            r"system.*: scheduler: name=.*did you mean 'ExponentialLR'",
        ),
        ("{name: ReduceLROnPlateau}", "it needs code"),
        ("{name: LambdaLR, args: {lr_lambda: x}}", "it needs code"),
        ("{name: ExponentialLR, args: {gama: 0.5}}", r"ExponentialLR: .*gama"),
        ("{name: SequentialLR, schedulers: [{name: StepLR}]}", "StepLR: .*step_size"),
        ("{name: ExponentialLR, interval: epoch, args: {gamma: 0.5}}", "scheduler.interval"),
        ("{name: ChainedScheduler, schedulers: [{name: StepLR, interval: epoch}]}", "it would never move"),
        (
            "{name: StepLR, args: {step_size: 9}, milestones: [3]}",
            "milestones: StepLR takes none; SequentialLR",
        ),
        (
            "{name: ChainedScheduler, schedulers: [], milestones: [3]}",
            "milestones: ChainedScheduler takes none",
        ),
        (
            "{name: StepLR, args: {step_size: 9}, schedulers: [{name: StepLR}]}",
            "schedulers: StepLR takes none",
        ),
        ("{name: OneCycleLR, args: {max_lr: 1, total_steps: 5}}", "OneCycleLR fails at step 6"),
        ("{name: ExponentialLR, args: {gamma: 1.0e+300}}", "a learning rate of 1e.297 at step 1; expected"),
        ("{name: ExponentialLR, args: {gamma: 20}}", "a learning rate of 3200 at step 5; expected 0 to 1000"),
    ],
)
def test_a_scheduler_that_cannot_work_is_refused_at_parse(given, message):
    overrides = [*TINY, "trainer.max_steps=9", f"system.scheduler={given}"]
    with pytest.raises(ConfigError, match=message):
        load_experiment([CONFIGS / "shapes_stage_1.yaml"], overrides)


def test_rates_and_decay_given_anew_are_used_and_the_moments_kept():
    saved = trained(adam(), 3).state_dict()
    new = adam(lr=0.25, weight_decay=0.5)
    new.load_state_dict(continued(saved, "AdamW", new))
    (group,) = new.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)
    (state,) = new.state.values()
    assert state["step"] == 3 and torch.equal(state["exp_avg"], saved["state"][0]["exp_avg"])


def test_moments_follow_the_names_of_groups():
    first, second = (torch.nn.Parameter(torch.full((size,), 1.0)) for size in (2, 3))
    groups = [{"params": [first], "name": "a"}, {"params": [second], "name": "b"}]
    old = torch.optim.AdamW(groups)
    first.grad, second.grad = torch.ones(2), torch.ones(3)
    old.step()
    new = torch.optim.AdamW([dict(groups[1]), dict(groups[0])])
    new.load_state_dict(continued(old.state_dict(), None, new))
    assert [len(new.state[p]["exp_avg"]) for p in (first, second)] == [2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: torch.optim.Adam(adam().param_groups), r"optimizer\.name: .* the class AdamW, not Adam"),
        (lambda: adam(amsgrad=True), r"optimizer\.args\.amsgrad: .* no amsgrad"),
        (
            lambda: torch.optim.AdamW([{"params": [torch.ones(1)], "name": "b"}]),
            r"params\.a: .* such a group",
        ),
        (
            lambda: torch.optim.AdamW([{"params": [torch.ones(1), torch.ones(1)], "name": "a"}]),
            r"params\.a: .* 1 tensors there, not 2",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_continued_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        continued(trained(adam(), 1).state_dict(), "AdamW", change())
