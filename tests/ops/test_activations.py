"""Activations by name."""

import math

import pytest
import torch

from fourdfy.ops.activations import ACTIVATIONS, get_activation

X = torch.tensor([-2.0, 0.0, 0.5, 3.0])


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        (None, lambda x: x),
        ("none", lambda x: x),
        ("exp", math.exp),
        ("shifted_exp", lambda x: math.exp(x - 1)),
        ("trunc_exp", math.exp),
        ("shifted_trunc_exp", lambda x: math.exp(x - 1)),
        ("softplus", lambda x: math.log1p(math.exp(x))),
        ("shifted_softplus", lambda x: math.log1p(math.exp(x - 1))),
        ("relu", lambda x: max(x, 0.0)),
        ("ReLU", lambda x: max(x, 0.0)),
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("sigmoid", lambda x: 1 / (1 + math.exp(-x))),
        ("tanh", math.tanh),
        ("elu", lambda x: x if x > 0 else math.expm1(x)),
        ("leaky_relu", lambda x: x if x > 0 else 0.01 * x),
        ("softsign", lambda x: x / (1 + abs(x))),
        ("gelu", lambda x: x * (1 + math.erf(x / 2**0.5)) / 2),
        ("hardtanh", lambda x: min(max(x, -1.0), 1.0)),
        ("scale_-11_01", lambda x: (x + 1) / 2),
        ("lin2srgb", lambda x: 0.0 if x <= 0 else min(1.0, 1.055 * x ** (1 / 2.4) - 0.055)),
    ],
)
def test_the_name_means_its_formula(name, formula):
    expected = torch.tensor([formula(x) for x in X.tolist()])
    torch.testing.assert_close(get_activation(name)(X), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_has_finite_gradients(name):
    x = X.clone().requires_grad_()
    get_activation(name)(x).sum().backward()
    assert x.grad.isfinite().all()


def test_the_gradient_of_trunc_exp_stops_growing_at_15():
    x = torch.tensor([1.0, 15.0, 20.0], requires_grad=True)
    get_activation("trunc_exp")(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 15.0, 15.0]).exp())


def test_a_name_that_is_wrong_gets_the_nearest_one():
    with pytest.raises(ValueError, match=r"'softpluss'; did you mean 'softplus'\?"):
        get_activation("softpluss")


@pytest.mark.parametrize("name", ["dropout", "softmax", "cross_entropy", "__doc__", "torch"])
def test_what_is_no_elementwise_activation_is_refused(name):
    with pytest.raises(ValueError, match="no activation is called"):
        get_activation(name)


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(ValueError, match="known: celu, "):
        get_activation("qqq")
