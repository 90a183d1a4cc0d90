"""The creatures: prompts, poses and renderings."""

from dataclasses import replace

import pytest
import torch

from fourdfy.shapes import tracing
from fourdfy.shapes.creature_prompts import (
    all_creature_prompts,
    encode_creatures,
    is_held_out,
    parse_creature,
    render_creatures,
)
from fourdfy.shapes.creatures import CREATURES
from fourdfy.shapes.gestures import GESTURES, allowed, bodies, groups
from fourdfy.shapes.grammar import COLOURS
from fourdfy.shapes.world import BACKGROUNDS, COLOUR_RGB, orbit

ALL = [(name, gesture) for name in CREATURES for gesture in allowed(name)]


def rendered(texts, azimuths=None, times=None, size=32, supersample=1, background=BACKGROUNDS[:1]):
    azimuth = torch.tensor(azimuths or [0.0] * len(texts))
    cameras = orbit(torch.full_like(azimuth, 12.0), azimuth, torch.tensor(times or [0.0] * len(texts)), size)
    background = torch.tensor(background).expand(len(texts), 3)
    codes = encode_creatures([parse_creature(text) for text in texts])
    return render_creatures(codes, cameras, background, supersample=supersample)


def test_every_prompt_is_parsed_from_its_own_text():
    assert [parse_creature(prompt.text) for prompt in all_creature_prompts()] == list(all_creature_prompts())
    assert parse_creature("A panda  dancing").colour is None
    assert parse_creature("a orange panda dancing").text == "an orange panda dancing"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a pandas dancing", "did you mean 'panda'"),
        ("a panda dancin", "did you mean 'dancing'"),
        ("a rad panda dancing", "did you mean 'red'"),
        ("a panda", "too short"),
        ("a fish walking", "no limbs for 'walking'"),
    ],
)
def test_what_is_not_of_the_grammar_is_refused_with_the_right_word(text, said):
    with pytest.raises(ValueError, match=said):
        parse_creature(text)


def test_a_fifth_is_held_out_and_every_pair_occurs_in_training():
    prompts = all_creature_prompts()
    known = [prompt for prompt in prompts if not is_held_out(prompt)]
    assert 0.17 < 1 - len(known) / len(prompts) < 0.23
    assert not is_held_out(parse_creature("a panda dancing"))
    assert {(p.creature, p.gesture) for p in known} == set(ALL)
    assert {(p.creature, p.colour) for p in known} == {(c, k) for c in CREATURES for k in (None, *COLOURS)}
    assert {(p.gesture, p.colour) for p in known} == {(g, k) for g in GESTURES for k in (None, *COLOURS)}


@pytest.mark.parametrize(("name", "gesture"), ALL)
def test_every_gesture_begins_at_rest_repeats_and_stays_in_the_box(name, gesture):
    times = torch.tensor([0.0, 1.0, *(k / 24 for k in range(24))])
    rest = bodies(CREATURES[name], "standing still", times[:1])
    posed = bodies(CREATURES[name], gesture, times)
    for moment in (0, 1):
        assert torch.allclose(posed.centres[moment], rest.centres[0], atol=1e-5)
        assert torch.allclose(posed.axes[moment], rest.axes[0], atol=1e-5)
    assert (posed.centres.abs().amax(dim=(0, 2)) + posed.reach < 1.12).all()
    moved = (posed.centres - rest.centres).norm(dim=-1).amax()
    assert (moved > 0.1) == (gesture != "standing still")


POSES = {
    "panda": (0.504, 0.596, -2.111, 1.177, 0.981, 0.634),
    "dog": (-1.858, -4.833, -2.736, -1.782, -0.44, -4.393),
    "bird": (-0.656, 5.308, -2.168, 5.091, 0.915, -0.092),
    "fish": (-5.256, -5.491, -3.188, -4.079),
    "robot": (-8.519, -4.36, -7.603, -12.573, -14.531, -16.426),
}
"""By ``allowed``: all numbers of the body at two moments, in one sum."""


@pytest.mark.parametrize("name", CREATURES)
def test_creatures_move_as_when_the_models_learned_them(name):
    """Who changes a pose trains the models anew."""
    found = []
    for gesture in allowed(name):
        posed = bodies(CREATURES[name], gesture, torch.tensor([0.3, 0.8]))
        sizes = posed.sizes.expand_as(posed.centres)
        numbers = torch.cat([posed.centres, posed.axes.flatten(-2), posed.colours, sizes], dim=-1).flatten()
        found.append(float((numbers * torch.arange(len(numbers)).cos()).sum()))
    assert found == pytest.approx(POSES[name], abs=2e-3)


def test_axes_of_parts_are_rotations():
    for creature in CREATURES.values():
        axes = bodies(creature, "dancing", torch.tensor([0.3])).axes[0]
        assert torch.allclose(axes @ axes.mT, torch.eye(3).expand_as(axes), atol=1e-5)
        assert torch.allclose(torch.linalg.det(axes), torch.ones(len(axes)), atol=1e-5)


@pytest.mark.parametrize("name", CREATURES)
def test_the_face_is_seen_from_the_front_alone(name):
    _, _, part = rendered([f"a {name} standing still"] * 2, azimuths=[0.0, 180.0])
    face = torch.tensor([group == "face" for group in groups(CREATURES[name])])
    front, back = (face[seen[seen >= 0]].float().mean() for seen in part)
    assert front > 0.05 and back == 0


def test_a_prompts_colour_replaces_the_creatures_own_and_only_that():
    rgb, opacity, _ = rendered(["a robot standing still", "a red robot standing still"], size=48)
    colours = rgb[opacity[..., 0] > 0.5].view(2, -1, 3)
    red = torch.tensor(COLOUR_RGB["red"])
    near = [(torch.cosine_similarity(image, red, dim=-1) > 0.98).float().mean() for image in colours]
    assert near[0] < 0.05 and 0.3 < near[1] < 0.9


def test_a_mixed_batch_equals_frames_one_by_one():
    texts = ["a panda dancing", "a red fish jumping", "a panda dancing", "a panda walking"]
    times, azimuths = [0.1, 0.2, 0.6, 0.4], [10.0, 100.0, 200.0, 300.0]
    grounds = [BACKGROUNDS[k % 2] for k in range(4)]
    together = rendered(texts, azimuths, times, size=24, background=grounds)
    for k, text in enumerate(texts):
        here = slice(k, k + 1)
        alone = rendered([text], azimuths[here], times[here], size=24, background=grounds[here])
        for many, one in zip(together, alone, strict=True):
            assert torch.allclose(many[k].float(), one[0].float(), atol=1e-4)


@pytest.mark.parametrize("name", CREATURES)
def test_parts_that_are_left_out_of_a_ray_change_no_image(name, monkeypatch):
    given = [f"a {name} dancing"] * 4, [20.0, 110.0, 200.0, 290.0], [0.1, 0.3, 0.6, 0.8]
    fast, _, _ = rendered(*given, size=48)
    monkeypatch.setattr(tracing, "NEGLIGIBLE", 9.0)  # every part matters to every ray
    full, opacity, _ = rendered(*given, size=48)
    changed = (fast - full).abs().amax(dim=-1)[opacity[..., 0] > 0] > 1 / 255
    assert changed.float().mean() < 0.01


def test_what_is_behind_the_camera_is_not_seen():
    cameras = orbit(torch.zeros(2), torch.zeros(2), torch.zeros(2), 8)
    cameras = replace(cameras, c2w=cameras.c2w * torch.tensor([-1.0, 1, -1, 1]))  # they look away
    background = torch.tensor(BACKGROUNDS)
    codes = encode_creatures([parse_creature("a dog walking")] * 2)
    rgb, opacity, part = render_creatures(codes, cameras, background)
    assert (rgb == background[:, None, None]).all() and not opacity.any() and (part == -1).all()


def test_walking_lifts_legs_in_turn_and_jumping_leaves_the_ground():
    posed = bodies(CREATURES["panda"], "walking", torch.tensor([0.25, 0.75]))
    names = [
        part.bone for part in sorted(CREATURES["panda"].parts, key=lambda part: part.rounding is not None)
    ]
    left, right = names.index("left_leg"), names.index("right_leg")
    ahead = posed.centres[:, left, 0] - posed.centres[:, right, 0]
    assert ahead[0] > 0.05 and ahead[1] < -0.05
    low, high = bodies(CREATURES["panda"], "jumping", torch.tensor([0.0, 0.5])).centres[:, :, 2].amin(dim=1)
    assert high > low + 0.3
