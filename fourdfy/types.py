"""The data that components exchange: cameras, rays, samples, fields, images, texts, batches.

F frames of a step, H x W pixels, R = F*H*W rays, N samples over all rays (packed, sorted by ray),
M moments and D view directions of a prompt, L tokens, C channels. All are frozen; ``.to(...)`` copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourdfy.schedules import Schedule, schedule_value

Self = TypeVar("Self", bound="TensorRecord")


@dataclass(frozen=True)
class TensorRecord:
    """A frozen dataclass of tensors that move between devices together."""

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """A copy with ``Tensor.to(*args, **kwargs)`` applied to every tensor, records included."""
        return self.mapped(lambda value: value.to(*args, **kwargs))

    def pin_memory(self: Self) -> Self:
        """A copy in memory from which ``to(device, non_blocking=True)`` copies while the host goes on."""
        # Only contiguous tensors can be pinned.
        return self.mapped(lambda v: (v.contiguous() if isinstance(v, Tensor) else v).pin_memory())

    def mapped(self: Self, change: Callable[[Any], Any]) -> Self:
        """A copy with ``change(value)`` for each of ``tensors()``, in order."""
        return replace(self, **{name: change(value) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Any]:
        """Its tensors and records by name, without those that are None or numbers."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor | TensorRecord)}


def joined_records(records: Sequence[Self]) -> Self:
    """Field by field, one after the other; all have the same fields."""
    names = records[0].tensors()
    return replace(records[0], **{name: joined([getattr(one, name) for one in records]) for name in names})


def joined(values: list[Tensor], dim: int = 0) -> Tensor:
    """Concatenated, without a copy if there is only one."""
    return values[0] if len(values) == 1 else torch.cat(values, dim)


Budget = Literal["image", "video"]
"""Whose bound on a renderer's memory holds in a step; see ``Scene.render``."""


@dataclass(frozen=True)
class StepContext:
    """The global step and the randomness of a computation; always an argument, never stored."""

    step: int
    """The global step, for schedules and annealing."""
    generator: torch.Generator | None = None
    """One stream of the step's randomness, on the device (``seeds.step_generator``). None in evaluation:
    nothing is random there, and nothing builds a graph."""

    @property
    def random(self) -> torch.Generator:
        """The generator, for what happens in training alone.

        Raises:
            RuntimeError: this is the context of an evaluation.
        """
        if self.generator is None:
            raise RuntimeError("an evaluation has no generator: nothing is random there")
        return self.generator

    def at_step(self, value: Schedule) -> float:
        """The scheduled scalar at this step."""
        return float(schedule_value(value, self.step))

    def copied(self) -> StepContext:
        """A copy with a separate generator that draws the same numbers, for a part that is recomputed."""
        return replace(self, generator=self.generator and self.generator.clone_state())


@dataclass(frozen=True, kw_only=True)
class Cameras(TensorRecord):
    """F frames to render, each a pinhole camera and a time. The world is right-handed, z up."""

    c2w: Float[Tensor, "F 4 4"]
    """Camera to world; columns right, up, backward, position."""
    fovy_deg: Float[Tensor, "F"]
    """Vertical field of view."""
    elevation_deg: Float[Tensor, "F"]
    azimuth_deg: Float[Tensor, "F"]
    """0 looks at the object's front from +x, 90 from +y."""
    distances: Float[Tensor, "F"]
    """Distance from the camera to the origin, scene units."""
    times: Float[Tensor, "F"]
    """Scene time of the frame, 0..1; static scenes pass zeros."""
    light_positions: Float[Tensor, "F 3"]
    """Point light, for materials that shade."""
    height: int
    width: int
    group_size: int = 1
    """Consecutive frames that belong together: the views of one object, the frames of one clip."""

    def __len__(self) -> int:
        return len(self.c2w)

    def __getitem__(self, index: slice | Tensor) -> Cameras:
        """Some of the frames, by slice or by indices, without groups."""
        return replace(self, group_size=1).mapped(lambda value: value[index])


@dataclass(frozen=True, kw_only=True)
class RayBundle(TensorRecord):
    """One ray for each pixel of F frames."""

    origins: Float[Tensor, "F H W 3"]
    directions: Float[Tensor, "F H W 3"]
    """Unit length, so distances along a ray are in scene units."""
    times: Float[Tensor, "F"]
    light_positions: Float[Tensor, "F 3"]


@dataclass(frozen=True, kw_only=True)
class Samples(TensorRecord):
    """Intervals along rays, packed over all rays and sorted by ray."""

    ray_indices: Int[Tensor, "N"]
    t_starts: Float[Tensor, "N"]
    t_ends: Float[Tensor, "N"]

    def __len__(self) -> int:
        return len(self.ray_indices)


@dataclass(frozen=True, kw_only=True)
class FieldOutput(TensorRecord):
    """The values of a field at N points and their times."""

    sigmas: Float[Tensor, "N"]
    """Volume density per scene unit, after the activation."""
    features: Float[Tensor, "N C"]
    """Input of the material, before its activation."""
    normals: Float[Tensor, "N 3"] | None = None
    """Unit outward normals; None unless asked for."""
    deformation: Float[Tensor, "N 3"] | None = None
    """Displacement of the point in unit-cube coordinates; None without a deformation field."""


@dataclass(frozen=True, kw_only=True)
class RenderOutput(TensorRecord):
    """Images of F frames; None is what a kind of scene does not have (``Scene.Config.renders``)."""

    comp_rgb: Float[Tensor, "F H W 3"]
    """Foreground over background, 0..1."""
    opacity: Float[Tensor, "F H W 1"]
    depth: Float[Tensor, "F H W 1"]
    """Sum of w t, not divided by opacity; scene units. Images show ``ops.compositing.expected_depth``."""
    group_size: int = 1
    """Group size of the cameras."""
    comp_rgb_fg: Float[Tensor, "F H W 3"] | None = None
    """Foreground, premultiplied by opacity."""
    comp_normal: Float[Tensor, "F H W 3"] | None = None
    deformation: Float[Tensor, "F H W 3"] | None = None
    z_variance: Float[Tensor, "F H W 1"] | None = None
    """How thick the surface looks: sum of w (t - depth)^2."""
    samples: Samples | None = None
    """The samples that the images were composited from, with these ``weights``."""
    weights: Float[Tensor, "N"] | None = None
    normals: Float[Tensor, "N 3"] | None = None
    """Per-sample normals, for the orientation loss."""
    t_dirs: Float[Tensor, "N 3"] | None = None
    """Per-sample ray directions, given with ``normals``."""


Decay = tuple[float, float, float]
"""(a, b, c) of the function ``a exp(-b r) + c``."""


MomentsBetween = Literal["step", "linear", "loop"]


class PerpNegDecays(NamedTuple):
    """How the negative weights of Perp-Neg fall with r, the share of a view in the mixed text."""

    fs: Decay
    """Weight of the front, between front and side; r is the front's share."""
    sf: Decay
    """Weight of the side, between front and side; r is the side's share."""
    fsb: Decay
    """Weight of the front, between side and back; r is the side's share."""
    sb: Decay
    """Weight of the side, between side and back; r is the side's share."""


class Conditions(NamedTuple):
    """A prior's conditioning for B latents (images or videos)."""

    text: Float[Tensor, "B L C"]
    uncond: Float[Tensor, "B L C"]
    negatives: tuple[Float[Tensor, "B L C"], ...] = ()
    """Texts to steer away from, except for what they have in common with ``text`` (Perp-Neg)."""
    weights: tuple[Float[Tensor, "B"], ...] = ()
    """Weight of each negative; negative numbers steer away from it."""
    cameras: Float[Tensor, "B K"] | None = None
    """The network's conditioning on the cameras, if it has one."""


@dataclass(frozen=True, kw_only=True)
class TextEmbeddings(TensorRecord):
    """A prompt's text embeddings for each moment: plain, and one per view (side, front, back, overhead)."""

    text: Float[Tensor, "M L C"]
    text_directions: Float[Tensor, "M D L C"]
    uncond: Float[Tensor, "L C"]
    front_threshold: float
    back_threshold: float
    overhead_threshold: float
    """Degrees; see ``prompts.views.direction_indices``."""
    perp_neg: PerpNegDecays | None = None
    """If given, views between two others get a mixed text and negative ones (``prompts.views``)."""
    moments_between: MomentsBetween = "step"
    """What times between the middles of two moments get; see ``prompts.views.at_times``."""
    still: TextEmbeddings | None = None
    """Those of ``prompt_still``: the same without its motion."""


@dataclass(frozen=True, kw_only=True)
class GuidanceOutput:
    """The losses of a guidance for a batch of images."""

    losses: dict[str, Float[Tensor, ""]]
    """Losses by name; ``sds`` is weighted by ``system.loss.lambda_sds``."""
    metrics: dict[str, Float[Tensor, ""] | float]
    """Logged, not optimised."""


@dataclass(frozen=True, kw_only=True)
class StepBatch(TensorRecord):
    """The frames of one training step, or of one of the parts in which its gradients are accumulated."""

    kind: str
    """Name of the kind of step: multi_view, single_view, video, or a plugin's own."""
    cameras: Cameras
    step: int
    """The global step that the batch was drawn for; batches are a pure function of (seed, step, part)."""
    part: int = 0
