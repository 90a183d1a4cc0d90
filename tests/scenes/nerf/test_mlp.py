"""The small network between encodings and outputs."""

import torch

from fourdfy.config import parse_config
from fourdfy.scenes.nerf.mlp import VanillaMLP

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def make_mlp(**keys) -> VanillaMLP:
    return VanillaMLP(parse_config(VanillaMLP.Config, keys), 4, 3)


def test_layers_are_linear_without_bias_and_relu_between_them():
    mlp = make_mlp(n_neurons=8, n_hidden_layers=2)
    shapes = {name: tuple(weight.shape) for name, weight in mlp.state_dict().items()}
    assert shapes == {"layers.0.weight": (8, 4), "layers.2.weight": (8, 8), "layers.4.weight": (3, 8)}
    first, second, third = mlp.state_dict().values()
    torch.testing.assert_close(mlp(X), ((X @ first.T).relu() @ second.T).relu() @ third.T)


def test_layers_may_have_a_bias():
    mlp = make_mlp(n_neurons=8, bias=True)
    assert not [name for name in make_mlp(n_neurons=8).state_dict() if name.endswith("bias")]
    first, shift, second, last = mlp.state_dict().values()
    torch.testing.assert_close(mlp(X), (X @ first.T + shift).relu() @ second.T + last)


def test_the_output_activation_comes_last():
    plain, squashed = make_mlp(), make_mlp(output_activation="tanh")
    squashed.load_state_dict(plain.state_dict())
    assert torch.equal(squashed(X), plain(X).tanh())


def test_autocast_changes_nothing():
    mlp = make_mlp()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mlp(X)
    assert torch.equal(inside, mlp(X))


def test_half_precision_input_is_lifted_to_the_weights_dtype():
    assert make_mlp()(X.half()).dtype == torch.float32
