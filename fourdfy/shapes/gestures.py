"""How creatures move: the turns of their bones over one period, and bodies posed by them.

All gestures are periodic and begin at rest. Turns are in radians: about x (a roll; it lifts a left arm
aside), y (a pitch; it swings a limb back) and z (a yaw). F frames, P parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from fourdfy.shapes.creatures import CREATURES, Creature, Part
from fourdfy.shapes.tracing import Bodies

GESTURES = ("standing still", "spinning", "walking", "dancing", "jumping", "waving")

Turns = dict[str, tuple[Tensor | float, Tensor | float, Tensor | float]]
"""Bone -> roll, pitch, yaw at F moments; "offset" is where the whole body is instead."""


def bodies(
    creature: Creature, gesture: str, times: Float[Tensor, "F"], colour: Float[Tensor, "F 3"] | None = None
) -> Bodies:
    """A creature at ``times``.

    Args:
        colour: of its body, instead of its own.
    """
    parts = _parts(creature)
    turns = _GESTURES[gesture](creature, times)
    frames = _bones(creature, turns, times)
    rest = times.new_tensor([part.centre for part in parts])
    turn = torch.stack([frames[part.bone][0] for part in parts], dim=1)
    shift = torch.stack([frames[part.bone][1] for part in parts], dim=1)
    own = times.new_tensor(creature.colour).expand(len(times), 3) if colour is None else colour
    shades = times.new_tensor([part.shade for part in parts])[:, None]
    given = times.new_tensor([part.colour or (0, 0, 0) for part in parts])
    is_own = torch.tensor([part.colour is None for part in parts], device=times.device)[:, None]
    return Bodies(
        centres=torch.einsum("fpij,pj->fpi", turn, rest) + shift,
        axes=turn @ times.new_tensor([_axes(part) for part in parts]),
        sizes=times.new_tensor([part.size for part in parts]),
        rounding=times.new_tensor([part.rounding or 0.0 for part in parts]),
        colours=torch.where(is_own, own[:, None], given) * shades,
        ellipsoids=sum(part.rounding is None for part in parts),
    )


def groups(creature: Creature) -> tuple[str, ...]:
    """The group of each part of ``bodies``."""
    return tuple(part.group for part in _parts(creature))


@lru_cache
def _parts(creature: Creature) -> tuple[Part, ...]:
    """Ellipsoids first, as ``Bodies`` wants them."""
    return tuple(sorted(creature.parts, key=lambda part: part.rounding is not None))


def _axes(part: Part) -> list[list[float]]:
    """Rows of the rotation that turns z towards ``part.towards`` in the plane of both."""
    x, y, z = (value / math.sqrt(sum(v * v for v in part.towards)) for value in part.towards)
    if z < -0.9999:
        return [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, -1.0]]
    k = 1 / (1 + z)
    return [[1 - k * x * x, -k * x * y, x], [-k * x * y, 1 - k * y * y, y], [-x, -y, z]]


def _bones(
    creature: Creature, turns: Turns, times: Float[Tensor, "F"]
) -> dict[str, tuple[Float[Tensor, "F 3 3"], Float[Tensor, "F 3"]]]:
    """Rotation and shift of each bone: a point of the rest pose goes to ``rotation @ point + shift``."""
    angles = torch.stack([_vectors(turns.get(bone, ()), times) for bone in ("root", *creature.joints)], dim=1)
    root, *rotations = _rotations(angles).unbind(dim=1)
    frames = {"root": (root, _vectors(turns.get("offset", ()), times))}
    for own, (bone, (parent, pivot)) in zip(rotations, creature.joints.items(), strict=True):
        turn, shift = frames[parent]  # parents stand before their children
        at = times.new_tensor(pivot)
        frames[bone] = (turn @ own, (turn @ (at - own @ at)[..., None])[..., 0] + shift)
    return frames


def _vectors(values: Sequence[Tensor | float], times: Float[Tensor, "F"]) -> Float[Tensor, "F 3"]:
    """Of three numbers or none, each for all moments or one for each."""
    vectors = times.new_zeros(len(times), 3)
    for axis, value in enumerate(values):
        vectors[:, axis] = value
    return vectors


def _rotations(angles: Float[Tensor, "F B 3"]) -> Float[Tensor, "F B 3 3"]:
    """Roll, then pitch, then yaw."""
    (cx, cy, cz), (sx, sy, sz) = angles.cos().unbind(dim=-1), angles.sin().unbind(dim=-1)
    rows = (
        (cy * cz, sx * sy * cz - cx * sz, cx * sy * cz + sx * sz),
        (cy * sz, sx * sy * sz + cx * cz, cx * sy * sz - sx * cz),
        (-sy, sx * cy, cx * cy),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _raised(creature: Creature, left: Tensor, right: Tensor) -> Turns:
    """Both arms lifted by so much: aside, or ahead."""
    if creature.arms == "ahead":
        return {"left_arm": (0.0, -0.6 * left, 0.0), "right_arm": (0.0, -0.6 * right, 0.0)}
    return {"left_arm": (left, 0.0, 0.0), "right_arm": (-right, 0.0, 0.0)}


def _walking(creature: Creature, times: Tensor) -> Turns:
    swing = torch.sin(2 * math.pi * times)
    arms = 0.5 * swing if creature.arms == "ahead" else 0.7 * swing
    return {
        "offset": (0.0, 0.0, 0.03 * (1 - torch.cos(4 * math.pi * times))),
        "torso": (0.07 * swing, 0.0, 0.12 * swing),
        "head": (-0.07 * swing, 0.0, -0.12 * swing),
        "left_leg": (0.0, -0.65 * swing, 0.0),
        "right_leg": (0.0, 0.65 * swing, 0.0),
        "left_arm": (0.0, arms, 0.0),
        "right_arm": (0.0, -arms, 0.0),
        "tail": (0.0, 0.0, 0.5 * swing),
    }


def _dancing(creature: Creature, times: Tensor) -> Turns:
    """Two beats: to the left with the left arm up, to the right with the right arm up."""
    sway, beat = torch.sin(2 * math.pi * times), torch.sin(4 * math.pi * times)
    left, right = sway.clamp_min(0), (-sway).clamp_min(0)
    lift = torch.sin(2 * math.pi * times).square()
    return _raised(creature, 0.35 * lift + 1.9 * left, 0.35 * lift + 1.9 * right) | {
        "offset": (0.0, 0.14 * sway, 0.08 * lift),
        "root": (0.0, 0.0, 0.25 * sway),
        "torso": (-0.22 * sway, 0.0, 0.18 * beat),
        "head": (0.30 * sway, 0.0, 0.0),
        "left_leg": (0.55 * right, 0.0, 0.0),
        "right_leg": (-0.55 * left, 0.0, 0.0),
        "tail": (0.0, 0.0, 0.9 * beat),
    }


def _jumping(creature: Creature, times: Tensor) -> Turns:
    """Up and down once; limbs fly."""
    up = torch.sin(math.pi * times).square()
    return _raised(creature, 1.5 * up, 1.5 * up) | {
        "offset": (0.0, 0.0, 0.36 * up),
        "torso": (0.0, -0.18 * up if creature.arms == "ahead" else 0.0, 0.0),
        "left_leg": (0.28 * up, 0.45 * up, 0.0),
        "right_leg": (-0.28 * up, 0.45 * up, 0.0),
        "tail": (0.0, 0.0, 0.8 * torch.sin(4 * math.pi * times)),
    }


def _waving(creature: Creature, times: Tensor) -> Turns:
    """The right arm goes up, waves twice and comes down."""
    ramp = (torch.minimum(times, 1 - times) / 0.2).clamp(0, 1)
    up = ramp.square() * (3 - 2 * ramp)
    wave = up * torch.sin(4 * math.pi * times)
    return _raised(creature, 0 * up, 1.95 * up + 0.4 * wave) | {
        "torso": (0.08 * up, 0.0, 0.0),
        "head": (0.16 * up + 0.06 * wave, 0.0, 0.0),
        "tail": (0.0, 0.0, 0.6 * wave),
    }


_GESTURES: dict[str, Callable[[Creature, Tensor], Turns]] = {
    "standing still": lambda creature, times: {},
    "spinning": lambda creature, times: {"root": (0.0, 0.0, 2 * math.pi * times)},
    "walking": _walking,
    "dancing": _dancing,
    "jumping": _jumping,
    "waving": _waving,
}


def allowed(name: str) -> tuple[str, ...]:
    """The gestures that a creature has limbs for."""
    return ("standing still", "spinning", *CREATURES[name].gestures)
