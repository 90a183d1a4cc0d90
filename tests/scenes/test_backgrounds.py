"""Backgrounds: colours of directions, and the one random colour of a call."""

import pytest
import torch
from field_cases import make
from torch.nn.functional import normalize

from fourdfy.config import ConfigError
from fourdfy.ops.spherical_harmonics import spherical_harmonics
from fourdfy.scenes.backgrounds import NeuralEnvironmentMap, SolidColor, Textured

DIRECTIONS = normalize(torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
every = pytest.mark.parametrize("cls", [NeuralEnvironmentMap, SolidColor, Textured])


def training(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_environment_map_is_a_network_of_spherical_harmonics():
    background = make(NeuralEnvironmentMap)
    first, second, third = (background.network.layers[i].weight for i in (0, 2, 4))
    hidden = (spherical_harmonics(DIRECTIONS.reshape(-1, 3), 3) @ first.T).relu()
    expected = ((hidden @ second.T).relu() @ third.T).sigmoid().view_as(DIRECTIONS)
    torch.testing.assert_close(background(DIRECTIONS), expected)


def test_the_environment_map_stays_float32_inside_autocast():
    background = make(NeuralEnvironmentMap)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = background(DIRECTIONS)
    assert torch.equal(inside, background(DIRECTIONS))


def test_eval_color_is_for_evaluation_only():
    background = make(NeuralEnvironmentMap, eval_color=[0.2, 0.4, 0.6])
    assert torch.equal(background(DIRECTIONS), torch.tensor([0.2, 0.4, 0.6]).expand(2, 4, 3, 3))
    assert background(DIRECTIONS, generator=training(0)).std() > 0


def test_a_solid_color_is_white_unless_told():
    assert torch.equal(make(SolidColor)(DIRECTIONS), torch.ones(2, 4, 3, 3))
    assert torch.equal(make(SolidColor, color=[0, 1, 0])(DIRECTIONS)[1, 2, 1], torch.tensor([0.0, 1.0, 0.0]))


def test_a_solid_color_can_be_learned():
    assert not list(make(SolidColor).parameters())
    background = make(SolidColor, learned=True, color=[0.5, 0.5, 0.5])
    background(DIRECTIONS).sum().backward()
    assert torch.equal(background.env_color.grad, torch.full((3,), 24.0))
    assert "env_color" in make(SolidColor).state_dict()


@pytest.mark.parametrize(
    ("direction", "row", "column"),
    # rows from -y over -x, ... to +y: longitude -180..180; columns from +z to -z
    [((1.0, 0.0, 0.0), 1.5, 1.5), ((0.0, 1.0, 0.0), 2.5, 1.5), ((0.0, -0.6, 0.8), 0.5, 0.319)],
)
def test_a_textured_background_is_a_picture_of_longitude_and_latitude(direction, row, column):
    background = make(Textured, height=4, width=4, color_activation="none")
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    with torch.no_grad():
        background.texture.copy_(torch.stack([rows, columns, rows * 0]))
    seen = background(torch.tensor(direction).expand(1, 1, 1, 3))[0, 0, 0]
    torch.testing.assert_close(seen, torch.tensor([row, column, 0.0]), atol=1e-3, rtol=0)


@every
def test_augmentation_puts_one_color_behind_all_frames(cls):
    background = make(cls, random_aug=True, random_aug_prob=1.0)
    first, second = (
        background(DIRECTIONS, generator=training(0)),
        background(DIRECTIONS, generator=training(1)),
    )
    assert torch.equal(first, first[0, 0, 0].expand_as(first))
    assert not torch.equal(first, second)
    assert torch.equal(first, background(DIRECTIONS, generator=training(0)))


@every
def test_there_is_no_augmentation_in_evaluation_or_unasked(cls):
    plain = make(cls)(DIRECTIONS)
    assert torch.equal(make(cls, random_aug=True, random_aug_prob=1.0)(DIRECTIONS), plain)
    assert torch.equal(make(cls)(DIRECTIONS, generator=training(0)), plain)
    assert torch.equal(
        make(cls, random_aug=True, random_aug_prob=0.0)(DIRECTIONS, generator=training(0)), plain
    )


def test_augmentation_comes_with_its_probability():
    background = make(SolidColor, random_aug=True, random_aug_prob=0.3)
    generator = training(0)
    kept = [background(DIRECTIONS[:1, :1, :1], generator=generator).min() == 1 for _ in range(2000)]
    # three standard deviations of 2000 draws
    assert sum(kept) / 2000 == pytest.approx(0.7, abs=0.031)


@every
def test_augmentation_may_draw_from_a_palette(cls):
    palette = [[1.0, 1.0, 1.0], [0.5, 0.25, 0.0]]
    background = make(cls, random_aug=True, random_aug_prob=1.0, random_aug_colors=palette)
    generator = training(0)
    seen = {tuple(background(DIRECTIONS, generator=generator)[0, 0, 0].tolist()) for _ in range(30)}
    assert seen == {tuple(color) for color in palette}


@pytest.mark.parametrize(
    ("cls", "keys", "message"),
    [
        (SolidColor, {"random_aug_prob": 2}, "random_aug_prob: 2 is outside the range; expected 0 to 1"),
        (SolidColor, {"random_aug_colors": []}, r"expected a list of \[r, g, b\]"),
        (SolidColor, {"random_aug_colors": [[1, 1]]}, r"expected a list of \[r, g, b\]"),
        (SolidColor, {"n_output_dims": 4}, "n_output_dims: 4 is outside the range; expected 3"),
        (SolidColor, {"color": [255, 255, 255]}, "color: 255 is outside the range; expected 0 to 1"),
        (SolidColor, {"random_aug_colors": [[0, 128, 0]]}, "128 is outside the range"),
        (NeuralEnvironmentMap, {"eval_color": [255, 0, 0]}, "255 is outside the range"),
        (Textured, {"height": 0}, "height: 0 is outside the range"),
        (SolidColor, {"colour": [1, 1, 1]}, "did you mean 'color'"),
        (NeuralEnvironmentMap, {"color_activation": "sigmoidal"}, "did you mean 'sigmoid'"),
    ],
)
def test_a_wrong_config_is_an_error_that_names_the_mend(cls, keys, message):
    with pytest.raises(ConfigError, match=message):
        make(cls, **keys)
