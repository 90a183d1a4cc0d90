"""The creatures: bodies of smooth parts on a skeleton, each with a face that tells its front.

Axes as in the rest of the world: the front looks along +x, z is up, +y is the creature's left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

Number = float | int
Vector = tuple[Number, Number, Number]
Colour = tuple[float, float, float]

WHITE, BLACK, PINK = (0.97, 0.96, 0.94), (0.09, 0.09, 0.11), (0.95, 0.60, 0.60)


@dataclass(frozen=True)
class Part:
    """An ellipsoid or a rounded box, in rest pose."""

    group: str
    """What it belongs to for the evaluation: torso, head, face, left_arm, ..."""
    bone: str
    centre: Vector
    size: Vector
    """Radii, or half extents of a box."""
    colour: Colour | None
    """None: the creature's own colour, or the prompt's."""
    rounding: float | None = None
    """Radius of a box's edges; None for an ellipsoid."""
    towards: Vector = (0, 0, 1)
    """Direction of its own z axis."""
    shade: float = 1.0
    """Factor on the colour."""


@dataclass(frozen=True, eq=False)
class Creature:
    colour: Colour
    joints: Mapping[str, tuple[str, Vector]]
    """Bone -> the bone that it hangs on, and the point that it turns about."""
    parts: tuple[Part, ...]
    arms: str = "aside"
    """How arms are raised: ``aside``, or ``ahead`` for forelegs."""
    gestures: tuple[str, ...] = field(default=())


def limb(
    group: str, bone: str, start: Vector, end: Vector, radius: float, colour: Colour | None = None
) -> Part:
    """A capsule."""
    (x, y, z), (to_x, to_y, to_z) = start, end
    centre = ((x + to_x) / 2, (y + to_y) / 2, (z + to_z) / 2)
    size = (0.0, 0.0, math.dist(start, end) / 2)
    return Part(group, bone, centre, size, colour, radius, (to_x - x, to_y - y, to_z - z))


def both(*parts: Part) -> tuple[Part, ...]:
    """Parts of the left side, and their mirror images; "left" in names becomes "right"."""
    return (*parts, *(_mirrored(part) for part in parts))


def _mirrored(part: Part) -> Part:
    def flip(vector: Vector) -> Vector:
        return vector[0], -vector[1], vector[2]

    names = part.group.replace("left", "right"), part.bone.replace("left", "right")
    return Part(
        *names, flip(part.centre), part.size, part.colour, part.rounding, flip(part.towards), part.shade
    )


def eyes(bone: str, at: Vector, radius: float, outward: float = 0.25) -> tuple[Part, ...]:
    """White eyes with pupils that look ahead and a little aside."""
    x, y, z = at
    pupil = (x + 0.72 * radius, y + outward * radius, z + 0.05 * radius)
    return both(
        Part("face", bone, at, (radius, radius, 1.15 * radius), WHITE),
        Part("face", bone, pupil, (0.5 * radius, 0.58 * radius, 0.68 * radius), BLACK),
    )


BIPED = {
    "torso": ("root", (0, 0, -0.4)),
    "head": ("torso", (0, 0, 0.1)),
    "left_arm": ("torso", (0, 0.22, 0.02)),
    "right_arm": ("torso", (0, -0.22, 0.02)),
    "left_leg": ("root", (0, 0.14, -0.38)),
    "right_leg": ("root", (0, -0.14, -0.38)),
}

PANDA = Creature(
    WHITE,
    BIPED,
    (
        Part("torso", "torso", (0, 0, -0.22), (0.26, 0.29, 0.31), None),
        Part("shoulders", "torso", (-0.01, 0, -0.02), (0.225, 0.265, 0.11), BLACK),
        Part("head", "head", (0.03, 0, 0.30), (0.29, 0.345, 0.275), None),
        Part("head", "head", (0.25, 0, 0.21), (0.12, 0.15, 0.10), None),
        *both(
            Part("ears", "head", (-0.02, 0.25, 0.55), (0.06, 0.105, 0.105), BLACK),
            Part("face", "head", (0.252, 0.145, 0.325), (0.066, 0.102, 0.130), BLACK, towards=(0, 0.45, 1)),
            Part("face", "head", (0.312, 0.150, 0.368), (0.026, 0.030, 0.032), WHITE),
            limb("left_arm", "left_arm", (0, 0.23, 0.0), (0.10, 0.37, -0.26), 0.095, BLACK),
            limb("left_leg", "left_leg", (0, 0.14, -0.42), (0.02, 0.16, -0.56), 0.115, BLACK),
            Part("left_leg", "left_leg", (0.09, 0.165, -0.62), (0.16, 0.11, 0.07), BLACK),
        ),
        Part("face", "head", (0.365, 0, 0.235), (0.030, 0.048, 0.032), BLACK),
        Part("torso", "torso", (-0.26, 0, -0.36), (0.08, 0.08, 0.07), None),
    ),
    gestures=("walking", "dancing", "jumping", "waving"),
)

DOG = Creature(
    (0.72, 0.46, 0.22),
    {
        "torso": ("root", (-0.25, 0, -0.2)),
        "head": ("torso", (0.24, 0, 0.02)),
        "tail": ("torso", (-0.46, 0, 0.0)),
        "left_arm": ("torso", (0.2, 0.13, -0.18)),
        "right_arm": ("torso", (0.2, -0.13, -0.18)),
        "left_leg": ("root", (-0.32, 0.13, -0.18)),
        "right_leg": ("root", (-0.32, -0.13, -0.18)),
    },
    (
        Part("torso", "torso", (-0.08, 0, -0.12), (0.43, 0.20, 0.19), None),
        Part("torso", "torso", (0.10, 0, -0.17), (0.20, 0.175, 0.17), WHITE),
        limb("torso", "head", (0.22, 0, -0.02), (0.32, 0, 0.16), 0.12),
        Part("head", "head", (0.36, 0, 0.24), (0.21, 0.215, 0.20), None),
        Part("face", "head", (0.54, 0, 0.17), (0.15, 0.115, 0.085), WHITE),
        Part("face", "head", (0.68, 0, 0.20), (0.045, 0.055, 0.042), BLACK),
        Part("face", "head", (0.60, 0, 0.085), (0.07, 0.045, 0.03), PINK),
        *eyes("head", (0.505, 0.09, 0.31), 0.055),
        limb("tail", "tail", (-0.46, 0, 0.0), (-0.62, 0, 0.22), 0.05),
        *both(
            Part(
                "ears",
                "head",
                (0.30, 0.205, 0.24),
                (0.075, 0.045, 0.15),
                None,
                shade=0.55,
                towards=(0, -0.25, 1),
            ),
            limb("left_arm", "left_arm", (0.2, 0.13, -0.2), (0.2, 0.13, -0.52), 0.072),
            Part("left_arm", "left_arm", (0.235, 0.13, -0.575), (0.11, 0.08, 0.055), WHITE),
            limb("left_leg", "left_leg", (-0.32, 0.13, -0.2), (-0.34, 0.13, -0.52), 0.078),
            Part("left_leg", "left_leg", (-0.305, 0.13, -0.575), (0.11, 0.08, 0.055), WHITE),
        ),
    ),
    arms="ahead",
    gestures=("walking", "dancing", "jumping", "waving"),
)

BIRD = Creature(
    (0.16, 0.52, 0.88),
    {
        "torso": ("root", (0, 0, -0.3)),
        "head": ("torso", (0.08, 0, 0.1)),
        "tail": ("torso", (-0.26, 0, -0.1)),
        "left_arm": ("torso", (0, 0.23, 0.06)),
        "right_arm": ("torso", (0, -0.23, 0.06)),
        "left_leg": ("root", (0, 0.1, -0.34)),
        "right_leg": ("root", (0, -0.1, -0.34)),
    },
    (
        Part("torso", "torso", (0, 0, -0.12), (0.30, 0.26, 0.28), None),
        Part("belly", "torso", (0.105, 0, -0.15), (0.225, 0.205, 0.225), WHITE),
        Part("head", "head", (0.12, 0, 0.30), (0.235, 0.24, 0.23), None),
        Part("face", "head", (0.37, 0, 0.27), (0.14, 0.075, 0.05), (0.98, 0.62, 0.08)),
        Part("face", "head", (0.35, 0, 0.225), (0.10, 0.06, 0.035), (0.90, 0.48, 0.05)),
        *eyes("head", (0.275, 0.115, 0.375), 0.062),
        Part("crest", "head", (0.02, 0, 0.54), (0.09, 0.025, 0.09), None, shade=0.6, towards=(-0.6, 0, 1)),
        Part("crest", "head", (0.12, 0, 0.56), (0.05, 0.025, 0.09), None, shade=0.6, towards=(-0.2, 0, 1)),
        Part("tail", "tail", (-0.40, 0, -0.06), (0.20, 0.14, 0.04), None, shade=0.6, towards=(0.35, 0, 1)),
        *both(
            Part(
                "left_arm",
                "left_arm",
                (-0.05, 0.285, -0.10),
                (0.21, 0.055, 0.18),
                None,
                shade=0.6,
                towards=(0.25, -0.12, 1),
            ),
            limb("left_leg", "left_leg", (0, 0.1, -0.32), (0.01, 0.1, -0.56), 0.03, (0.98, 0.62, 0.08)),
            Part("left_leg", "left_leg", (0.07, 0.1, -0.59), (0.12, 0.08, 0.032), (0.98, 0.62, 0.08)),
        ),
    ),
    gestures=("walking", "dancing", "jumping", "waving"),
)

FISH = Creature(
    (0.98, 0.45, 0.08),
    {
        "torso": ("root", (0, 0, 0)),
        "head": ("torso", (0, 0, 0)),
        "tail": ("torso", (-0.28, 0, 0)),
        "left_arm": ("torso", (0.1, 0.14, -0.06)),
        "right_arm": ("torso", (0.1, -0.14, -0.06)),
    },
    (
        Part("torso", "torso", (0, 0, 0), (0.44, 0.19, 0.29), None),
        Part("bands", "torso", (0.13, 0, 0), (0.045, 0.197, 0.292), WHITE),
        Part("bands", "torso", (-0.16, 0, 0), (0.04, 0.192, 0.284), WHITE),
        Part("face", "head", (0.425, 0, -0.045), (0.035, 0.075, 0.05), PINK),
        *eyes("head", (0.295, 0.125, 0.085), 0.085, outward=0.55),
        Part("fins", "torso", (-0.04, 0, 0.28), (0.22, 0.03, 0.13), None, shade=0.75, towards=(-0.35, 0, 1)),
        Part("fins", "torso", (-0.08, 0, -0.27), (0.12, 0.028, 0.10), None, shade=0.75, towards=(0.4, 0, 1)),
        limb("tail", "tail", (-0.34, 0, 0), (-0.44, 0, 0), 0.075),
        Part("tail", "tail", (-0.55, 0, 0.12), (0.09, 0.032, 0.19), None, shade=0.75, towards=(-0.7, 0, 1)),
        Part("tail", "tail", (-0.55, 0, -0.12), (0.09, 0.032, 0.19), None, shade=0.75, towards=(0.7, 0, 1)),
        *both(
            Part(
                "left_arm",
                "left_arm",
                (0.06, 0.25, -0.10),
                (0.10, 0.13, 0.028),
                None,
                shade=0.75,
                towards=(0, 0.5, 1),
            )
        ),
    ),
    gestures=("dancing", "jumping"),
)

STEEL = (0.30, 0.33, 0.40)
GLOW = (0.45, 0.95, 0.98)
ROBOT = Creature(
    (0.62, 0.68, 0.76),
    BIPED
    | {
        "head": ("torso", (0, 0, 0.16)),
        "left_arm": ("torso", (0, 0.31, 0.06)),
        "right_arm": ("torso", (0, -0.31, 0.06)),
    },
    (
        Part("torso", "torso", (0, 0, -0.11), (0.14, 0.19, 0.18), None, 0.045),
        Part("chest", "torso", (0.185, 0, -0.06), (0.004, 0.08, 0.05), (0.98, 0.62, 0.10), 0.012),
        limb("torso", "torso", (0, 0, 0.1), (0, 0, 0.2), 0.07, STEEL),
        Part("head", "head", (0, 0, 0.37), (0.15, 0.20, 0.13), None, 0.045),
        Part("face", "head", (0.19, 0, 0.375), (0.004, 0.165, 0.095), BLACK, 0.014),
        *both(
            Part("face", "head", (0.208, 0.085, 0.41), (0.022, 0.036, 0.036), GLOW),
            Part("ears", "head", (0, 0.25, 0.37), (0.06, 0.03, 0.06), STEEL),
            Part("left_arm", "left_arm", (0, 0.305, 0.05), (0.08, 0.08, 0.08), STEEL),
            limb("left_arm", "left_arm", (0, 0.33, 0.0), (0.02, 0.35, -0.24), 0.058),
            Part("left_arm", "left_arm", (0.02, 0.35, -0.30), (0.075, 0.065, 0.08), STEEL),
            limb("left_leg", "left_leg", (0, 0.115, -0.34), (0, 0.115, -0.54), 0.07, STEEL),
            Part("left_leg", "left_leg", (0.035, 0.12, -0.61), (0.11, 0.06, 0.02), None, 0.035),
        ),
        Part("face", "head", (0.212, 0, 0.318), (0.004, 0.055, 0.003), GLOW, 0.009),
        limb("crest", "head", (0, 0, 0.54), (0, 0, 0.63), 0.016, STEEL),
        Part("crest", "head", (0, 0, 0.66), (0.045, 0.045, 0.045), (0.90, 0.15, 0.15)),
    ),
    gestures=("walking", "dancing", "jumping", "waving"),
)

CREATURES = {"panda": PANDA, "dog": DOG, "bird": BIRD, "fish": FISH, "robot": ROBOT}
