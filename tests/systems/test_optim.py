"""Optimizer groups, scoped freezing, and the gradient audit."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from fourdfy.config import ConfigError
from fourdfy.systems.learning_rates import continued
from fourdfy.systems.optim import (
    GradientAudit,
    OptimizerConfig,
    build_optimizer,
    frozen,
    fused_by_default,
    parameter_groups,
)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.geometry = nn.ModuleDict({"encoding": nn.Linear(2, 2), "network": nn.Linear(2, 1)})
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Module()

    def forward(self, x):
        return self.geometry["network"](self.geometry["encoding"](x)).sum() * self.scale


@pytest.fixture
def toy():
    toy = Toy()
    toy.geometry.encoding, toy.geometry.network = toy.geometry["encoding"], toy.geometry["network"]
    return toy


def test_a_path_names_a_module_or_a_parameter(toy):
    groups = parameter_groups(toy, {"geometry.encoding": {"lr": 0.1}, "scale": {"lr": 0.2}})
    assert [(g["name"], len(g["params"]), g["lr"]) for g in groups] == [
        ("geometry.encoding", 2, 0.1),
        ("scale", 1, 0.2),
    ]


def test_null_switches_a_group_off(toy):
    groups = parameter_groups(toy, {"geometry.encoding": None, "scale": {"lr": 0.2}})
    assert [g["name"] for g in groups] == ["scale"]


def test_groups_hold_only_what_some_step_trains(toy):
    params = {"guidance": {"lr": 1}, "geometry.encoding": {"lr": 0.1}, "geometry.network": {"lr": 0.1}}
    toy.geometry.network.bias.requires_grad_(False)
    groups = parameter_groups(toy, params, absent={"guidance"}, untrained=toy.geometry.encoding.parameters())
    assert [(g["name"], [id(p) for p in g["params"]]) for g in groups] == [
        ("geometry.network", [id(toy.geometry.network.weight)])
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_the_most_specific_path_has_a_parameter_in_any_order(toy, order):
    params = {
        "geometry": {"lr": 0.1},
        "geometry.encoding": {"lr": 0.2},
        "geometry.encoding.bias": {"lr": 0.3},
    }
    groups = parameter_groups(toy, dict(list(params.items())[::order]))
    encoding, network = toy.geometry.encoding, toy.geometry.network
    assert {g["lr"]: [id(p) for p in g["params"]] for g in groups} == {
        0.1: [id(network.weight), id(network.bias)],
        0.2: [id(encoding.weight)],
        0.3: [id(encoding.bias)],
    }


def test_a_path_whose_parameters_are_all_in_other_groups_is_left_out(toy):
    toy.geometry["whole"] = nn.Sequential(toy.geometry.encoding)
    groups = parameter_groups(toy, {"geometry.whole": {"lr": 0.1}, "geometry.whole.0": {"lr": 0.2}})
    assert [g["name"] for g in groups] == ["geometry.whole.0"]


def test_without_any_path_everything_that_learns_is_one_group(toy):
    toy.geometry.network.bias.requires_grad_(False)
    optimizer = build_optimizer(OptimizerConfig(args={"lr": 0.5}), toy, untrained=[toy.scale])
    (group,) = optimizer.param_groups
    expected = [toy.geometry.encoding.weight, toy.geometry.encoding.bias, toy.geometry.network.weight]
    assert [id(p) for p in group["params"]] == [id(p) for p in expected]
    assert (group["name"], group["lr"]) == ("system", 0.5)


def test_nothing_to_train_is_an_error(toy):
    with pytest.raises(ConfigError, match="no group holds anything that this stage trains"):
        parameter_groups(toy, {"scale": None})


def test_a_group_that_is_switched_off_must_exist(toy):
    with pytest.raises(ConfigError, match=r"'scale\.lr' leads nowhere at 'lr'"):
        parameter_groups(toy, {"scale": {"lr": 0.1}, "scale.lr": None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": {"beta": [0.9, 0.9]}}, r"args\.beta: AdamW has no such option; did you mean 'betas'\?"),
        ({"params": {"a": {"params": 1}}}, r"params\.a\.params: AdamW has no such option; known: lr"),
        ({"params": {"a": {"lr": [0, 0.1, 0.2, 9]}}}, r"params\.a\.lr=\[.*\]: expected a number, 0 to 1000"),
        ({"params": {"a.b": {"lrr": 0.1}}}, r"params\.a\.b\.lrr: AdamW has no such option; .* 'lr'\?"),
        ({"params": {"a": {"encoding": {"lr": 1}}}}, r"params\.a\.encoding: AdamW has no such option"),
        ({"params": {"a.b": {"lr": -1}}}, r"params\.a\.b\.lr: -1 is outside the range; expected 0 to 1000"),
        ({"params": {"a.b": {"lr": None}}}, r"params\.a\.b\.lr=None: expected a number, 0 to 1000"),
        ({"params": {"a.b": {"lr": 1e9}}}, r"params\.a\.b\.lr: 1e\+09 is outside the range"),
        ({"args": {"lr": float("nan")}}, r"args\.lr: nan is outside the range"),
        ({"args": {"eps": 0}}, r"args\.eps: 0 is outside the range; expected more than 0 and at most 1"),
        ({"args": {"betas": [0.9]}}, r"args\.betas=\[0\.9\]: AdamW refuses it"),
        ({"name": "SGD", "args": {"nesterov": True, "momentum": 0}}, "SGD refuses it: Nesterov"),
        ({"params": {"a.b": 0.1}}, r"params\.a\.b=0\.1: expected options such as"),
        ({"name": "Optimizer"}, r"no such class in torch\.optim"),
    ],
)
def test_options_that_the_optimizer_does_not_take_are_refused_by_key(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def test_options_that_need_each_other_are_taken():
    OptimizerConfig(name="SGD", args={"momentum": 0.9}, params={"a": {"nesterov": True}})


def test_what_no_group_has_is_frozen_for_good(toy):
    build_optimizer(OptimizerConfig(params={"scale": {"lr": 0.5}}), toy)
    assert [name for name, p in toy.named_parameters() if p.requires_grad] == ["scale"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("geometry.encodign", r"leads nowhere at 'encodign'; did you mean 'encoding'\?"),
        ("wings", "groups could be: geometry.encoding, geometry.network, scale"),
        ("empty", "holds no parameter"),
    ],
)
def test_a_path_to_nothing_names_what_exists(toy, path, message):
    with pytest.raises(ConfigError, match=message):
        parameter_groups(toy, {path: {"lr": 0.1}})


def test_the_configured_optimizer_is_built(toy):
    args = {"betas": [0.9, 0.99], "eps": 1e-15}
    cfg = OptimizerConfig(name="AdamW", args=args, params={"scale": {"lr": 0.5}})
    optimizer = build_optimizer(cfg, toy)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["eps"] == 1e-15


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"no such class in torch\.optim"):
        OptimizerConfig(name="AdamV")


def test_what_is_frozen_gets_no_gradient_and_is_restored_on_error(toy):
    with pytest.raises(RuntimeError), frozen(toy.geometry.parameters()):
        loss = toy(torch.ones(1, 2))
        raise RuntimeError
    loss.backward()
    assert toy.geometry.encoding.weight.grad is None
    assert toy.scale.grad is not None
    assert all(p.requires_grad for p in toy.parameters())


def test_the_audit_names_a_group_that_nothing_reaches(toy):
    groups = parameter_groups(toy, {"geometry.encoding": {"lr": 0.1}, "scale": {"lr": 0.2}})
    audit = GradientAudit(frozenset({"a", "b"}))
    with frozen(iter([toy.scale])):
        loss = toy(torch.ones(1, 2))
    loss.backward()
    assert "no gradient" in audit.record("a", groups)
    assert not audit.is_new("a")
    with pytest.raises(RuntimeError, match=r"no step of this stage \(a, b\) sends a gradient to scale"):
        audit.record("b", groups)


def test_the_audit_accepts_a_group_that_one_kind_reaches(toy):
    groups = parameter_groups(toy, {"scale": {"lr": 0.2}})
    audit = GradientAudit(frozenset({"a", "b"}))
    audit.record("a", groups)
    toy(torch.ones(1, 2)).backward()
    assert "gradient norm" in audit.record("b", groups)


GPU, CPU = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)


@pytest.mark.parametrize(
    ("name", "args", "group", "fused"),
    [
        ("AdamW", {}, {"params": [GPU, GPU]}, True),
        ("AdamW", {}, {"params": [GPU, CPU]}, None),
        ("AdamW", {"fused": False}, {"params": [GPU]}, False),
        ("SGD", {"momentum": 0.9}, {"params": [GPU]}, True),
        ("Adam", {"foreach": True}, {"params": [GPU]}, None),
        ("Adam", {}, {"params": [GPU], "capturable": True}, None),
        ("RMSprop", {}, {"params": [GPU]}, None),
    ],
)
def test_fused_kernels_are_used_on_a_gpu_unless_the_config_says_otherwise(name, args, group, fused):
    options = fused_by_default(name, args, [group])
    assert options.get("fused") == fused
    assert {**options, **args} == options


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_without_fused_kernels_is_continued_with_them(toy):
    def optimizer(device, **args):
        toy.to(device)
        return build_optimizer(OptimizerConfig(args=args), toy)

    for before, now in (("cpu", "cuda"), ("cuda", "cpu")):
        old = optimizer(before)
        for p in toy.parameters():
            p.grad = torch.full_like(p, 0.5)
        old.step()
        new = optimizer(now)
        saved = tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, old.state_dict())
        new.load_state_dict(continued(saved, "AdamW", new))
        for p in toy.parameters():
            p.grad = torch.full_like(p, 0.5)
        new.step()
        assert {int(state["step"]) for state in new.state.values()} == {2}
        assert new.defaults["fused"] == (True if now == "cuda" else None)
