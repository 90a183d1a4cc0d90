"""Volume rendering of a field over space and time: march, prune, evaluate the field, composite.

F frames of H x W pixels, R rays of them (all, or those of one pass), N samples over these. A sample's time
is that of its ray's frame, so all frames of a step are rendered at once. If a cap bounds the samples
with a graph, rays are shaded in passes that the backward pass recomputes one at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fourdfy.bounds import number
from fourdfy.config import alias, slot
from fourdfy.ops.compositing import composite
from fourdfy.ops.ranks import ALONE, Ranks, ranks
from fourdfy.ops.ray_marching import find_visible, march
from fourdfy.ops.ray_marching.rays import SteppedRays, step_size
from fourdfy.ops.recomputation import recomputed
from fourdfy.registry import register
from fourdfy.scenes.nerf.base import Parts, Renderer, ShadingPoints
from fourdfy.scenes.nerf.memory import bytes_per_sample
from fourdfy.scenes.nerf.occupancy import OccupancyGrid
from fourdfy.scenes.nerf.passes import (
    FlatRays,
    ShadedRays,
    assemble,
    chunks,
    cut,
    of_all_ranks,
    split_rays,
)
from fourdfy.scenes.nerf.subset import Quotas, draw_subset, interleaved, whole_call
from fourdfy.types import (
    Budget,
    FieldOutput,
    RayBundle,
    RenderOutput,
    Samples,
    StepContext,
    joined,
    joined_records,
)

logger = logging.getLogger(__name__)

MAX_SAMPLES = 1 << 22
"""Samples that a CPU shades at once in an evaluation, about 100 bytes each, or evaluates before pruning."""
NO_CAP = 1 << 62
FEWEST = 1 << 17
"""The least that memory bounds the samples with a graph to: fewer take hardly less beside the hash tables."""


FieldAt = Callable[[Tensor, Tensor, int], FieldOutput]
"""A function that evaluates the geometry, of positions, times and the step."""


@register("nerf-volume-renderer")
class NeRFVolumeRenderer(Renderer):
    """Occupancy-grid guided volume renderer (nerfacc's scheme, as threestudio uses it).

    A cap on the samples with a graph changes neither images nor gradients. Each ray is then shaded twice, and
    20 bytes per sample (44 with normals) are kept for the whole image.

    Args:
        share_out: distributes the cap over groups of rays, with ``gradient: subset``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Renderer.Config):
        radius: float = number(1.0, above=0, high=1000)
        """Half side of the box that rays are marched through, in scene units."""
        num_samples_per_ray: int = number(512, 1, 16384)
        """Number of steps that the box's diagonal is divided into."""
        eval_samples_per_ray: int | None = number(None, 1, 16384)
        """The same in validation, test and evaluation, where nothing shifts the samples, so that edges are
        smoother with more of them; null: as many as in training."""
        randomized: bool = True
        """Whether training shifts the samples of each ray by a random part of a step."""
        eval_chunk_size: int | None = number(None, 1, 1 << 26)
        """Points per call of the field where no gradient is needed: pruning, occupancy, evaluation. null:
        160000 on a CPU, 2^21 on a GPU, where starting a kernel takes longer than a small call's work."""
        return_comp_normal: bool = False
        """Compute normals even if the material does not need them."""
        return_normal_perturb: bool = False
        """Not supported; an old file that sets it gets an error."""
        estimator: Literal["occgrid"] = "occgrid"
        """How samples are placed."""
        grid_prune: bool = True
        """Skip empty cells and invisible samples. False keeps every sample in the box."""
        prune_alpha_threshold: bool = True
        """Also evaluate the current density, and drop samples that are thin or hidden."""
        alpha_thre: float = number(0.01, 0, 1)
        """A sample is thin below min(this, mean of the grid's values); 0 drops only hidden ones.
        Dropped samples have no gradient: lower it where density must grow in empty space."""
        eval_alpha_thre: float = number(0.1, 0, 1)
        """The same without randomness: validation, test, evaluation, export. A sample is thin below min(this,
        a tenth of the grid's largest value), so that specks around solid matter vanish while a scene that is
        faint everywhere stays. The alpha is that of a training's step, whatever ``eval_samples_per_ray``."""
        grid_resolution: int = alias("occ_grid_res", number(32, 1, 254))
        """Cells per side of the occupancy grid."""
        occ_thre: float = number(0.01, 0, 1000)
        """A cell is empty below min(this, mean of the grid's values), in units of density * step."""
        update_interval: int = number(16, 1, 100_000)
        """Training steps from one refresh of the grid to the next."""
        warmup_steps: int = number(256, 0)
        """Before this step every cell is refreshed; later, at most half of them."""
        occ_times: int = number(4, 1, 64)
        """Number of times at which a refresh evaluates a cell, in dynamic scenes."""
        occ_dilation: int = number(1, 0, 16)
        """Cells around an occupied one that count as occupied too, in dynamic scenes. Without it, a
        few random times miss the rim of moving objects: 2 to 3 % of their samples."""
        train_max_nums: int | None = number(None, 1)
        """Most samples of a video step that have a graph at once; null, the best choice: as many as fit into
        ``trainer.memory_budget_gb`` on a GPU, all on a CPU. A ray is never cut in two. Small numbers are
        slow: each pass makes and adds a gradient of the whole hash tables."""
        train_max_nums_static: int | None = number(None, 1)
        """The same for all other steps."""
        gradient: Literal["exact", "subset"] = "exact"
        """``subset`` is the original's method, for comparison: a random choice of ``train_max_nums`` samples
        carries gradients, without rescaling, and the others carry none."""

        def __post_init__(self) -> None:
            if self.return_normal_perturb:
                raise ValueError("return_normal_perturb is not supported: no loss here uses it; remove it")

        def samples_with_graph(self, rays: int, occupied: float, budget: Budget) -> float:
            return float(min(rays * self.num_samples_per_ray * occupied, self.cap(budget)))

        def cap(self, budget: Budget) -> int:
            """The most samples that have a graph at once."""
            cap = getattr(self, self.cap_key(budget))
            return NO_CAP if cap is None else cap

        @staticmethod
        def cap_key(budget: Budget) -> str:
            """The key of ``cap``."""
            return "train_max_nums" if budget == "video" else "train_max_nums_static"

        @property
        def wants_normals(self) -> bool:
            return self.return_comp_normal

    cfg: Config
    bbox: Float[Tensor, "2 3"]

    def __init__(
        self, cfg: Config, parts: Parts, share_out: Callable[[RayBundle, int], Quotas] = whole_call
    ) -> None:
        super().__init__(cfg, parts)
        if cfg.radius > parts.geometry.radius:
            raise ValueError(
                f"renderer.radius={cfg.radius} exceeds geometry.radius={parts.geometry.radius}, "
                f"where the field ends; use renderer.radius={parts.geometry.radius}"
            )
        self.share_out = share_out
        self.step_size = step_size(cfg.radius, cfg.num_samples_per_ray)
        self.register_buffer("bbox", torch.tensor([[-cfg.radius] * 3, [cfg.radius] * 3]))
        self.estimator = OccupancyGrid(cfg.grid_resolution, cfg.radius)
        self.fitting = NO_CAP
        """Samples with a graph that fit into memory; see ``bound_memory``."""
        self.shaded = 0
        """Samples of the last training step."""

    def forward(self, rays: RayBundle, context: StepContext, budget: Budget = "image") -> RenderOutput:
        """See ``Renderer``: march, prune, shade, put together."""
        with nullcontext() if context.generator else torch.no_grad():
            # The order ensures that no draw depends on how the samples are shaded.
            jitter = self._jitter(rays, context.generator)
            background = self.parts.background(rays.directions, generator=context.generator)
            flat = FlatRays.of(rays)
            us, n_rays = self._ranks(context), len(flat)
            mine = us.share(n_rays)
            flat = flat[mine]
            samples = self._samples(flat, jitter[mine], context)
            if context.generator is None:
                passes = split_rays(samples, len(flat), self._samples_at_once)
                shaded = [
                    self._shade(*cut(flat, samples, part), context, self._field_in_chunks) for part in passes
                ]
            elif self.cfg.gradient == "exact":
                self.shaded = len(samples)
                cap = min(self.cfg.cap(budget), self.fitting)
                shaded = self._shade_in_passes(flat, samples, context.copied(), cap)
            else:
                quotas = self.share_out(rays, self.cfg.cap(budget))
                shaded = [self._shade_with_subset(flat, samples, context.copied(), quotas)]
            whole = joined_records(shaded)
            if us.count > 1:
                samples, whole = of_all_ranks(samples, whole, mine.start, n_rays)
            return assemble(rays, background, samples, whole)

    def bound_memory(self, available: float) -> None:
        """See ``Scene.bound_memory``; ``gradient: subset`` keeps its caps, which are part of its method."""
        parameters = [p for part in (self.parts.geometry, self.parts.material) for p in part.parameters()]
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        if self.cfg.gradient == "subset" or not learning:
            return
        context = StepContext(0, torch.Generator(self.bbox.device).manual_seed(0))
        try:
            each = bytes_per_sample(
                lambda rays, samples: self._shade(rays, samples, context, self._field),
                learning,
                self.cfg.radius,
            )
        except torch.OutOfMemoryError:
            each = math.inf
        self.fitting = max(FEWEST, int(available / each))
        logger.debug("renderer: %.0f bytes for each sample, at most %d at once", each, self.fitting)

    def halve_chunks(self, budget: Budget | None) -> dict[str, int]:
        key, count = "eval_chunk_size", self._chunk_size
        if budget and self.cfg.gradient == "exact":
            with_graph = min(self.cfg.cap(budget), self.fitting, self.shaded)
            if with_graph > FEWEST:  # they take the most
                key, count = self.cfg.cap_key(budget), with_graph
        halved: dict[str, Any] = {key: max(count // 2, FEWEST)} if count > FEWEST else {}
        self.cfg = replace(self.cfg, **halved)
        return halved

    @torch.no_grad()
    def update_occupancy(self, context: StepContext, *, dynamic: bool) -> None:
        """Refresh the grid where one is due at this step."""
        cfg, step = self.cfg, context.step
        if not cfg.grid_prune or step % cfg.update_interval:
            return
        self.estimator.refresh(
            lambda positions, times: self.parts.geometry.density(positions, times, step=step),
            step_size=self.step_size,
            all_cells=step < cfg.warmup_steps,
            num_times=cfg.occ_times if dynamic else 0,
            threshold=cfg.occ_thre,
            dilation=cfg.occ_dilation if dynamic else 0,
            chunk_size=self._chunk_size,
            generator=context.random,
        )

    @property
    def _chunk_size(self) -> int:
        return self.cfg.eval_chunk_size or (1 << 21 if self.bbox.is_cuda else 160_000)

    @property
    def _samples_at_once(self) -> int:
        """Of an evaluation, which shades them; before pruning, a GPU evaluates four times as many."""
        return 2 * self._chunk_size if self.bbox.is_cuda else MAX_SAMPLES

    def _ranks(self, context: StepContext) -> Ranks:
        """Those that share the rays: not in an evaluation, and not where a draw depends on all samples."""
        return ranks() if context.generator and self.cfg.gradient == "exact" else ALONE

    def _jitter(self, rays: RayBundle, generator: torch.Generator | None) -> Float[Tensor, "R"]:
        count = rays.directions[..., 0].numel()
        if generator is None or not self.cfg.randomized:
            return rays.origins.new_zeros(count)
        return torch.rand(count, generator=generator, device=generator.device).to(rays.origins)

    def _samples(self, rays: FlatRays, jitter: Float[Tensor, "R"], context: StepContext) -> Samples:
        """The samples that are shaded."""
        cfg, occs = self.cfg, self.estimator.occs
        if context.generator is None:
            step = step_size(cfg.radius, cfg.eval_samples_per_ray or cfg.num_samples_per_ray)
            thin = 1 - (1 - (occs.amax() / 10).clamp(max=cfg.eval_alpha_thre)) ** (step / self.step_size)
        else:
            step, thin = self.step_size, occs.mean().clamp(max=cfg.alpha_thre)
        stepped = SteppedRays(
            rays=rays,
            jitter=jitter,
            radius=cfg.radius,
            step_size=step,
            occupied=self.estimator.occupied if cfg.grid_prune else None,
        )
        if not (cfg.grid_prune and cfg.prune_alpha_threshold):
            return march(stepped)

        def density(positions: Float[Tensor, "M 3"], times: Float[Tensor, "M 1"]) -> Float[Tensor, "M"]:
            return joined(
                [
                    self.parts.geometry.density(*chunk, step=context.step)
                    for chunk in chunks(positions, times, self._chunk_size)
                ]
            )

        return find_visible(
            stepped,
            density,
            alpha_threshold=thin,
            max_samples=self._samples_at_once * (4 if self.bbox.is_cuda else 1),
        )

    def _shade_in_passes(
        self, rays: FlatRays, samples: Samples, context: StepContext, cap: int
    ) -> list[ShadedRays]:
        if len(samples) <= cap:
            return [self._shade(rays, samples, context, self._field)]
        parameters = *self.parts.geometry.parameters(), *self.parts.material.parameters()
        return recomputed(
            lambda part: self._shade(*cut(rays, samples, part), context, self._field),
            split_rays(samples, len(rays), cap),
            inputs=(*parameters, *rays.tensors().values()),
        )

    def _shade_with_subset(
        self, rays: FlatRays, samples: Samples, context: StepContext, quotas: Quotas
    ) -> ShadedRays:
        carries = draw_subset(samples, quotas, context.random)
        return self._shade(rays, samples, context, partial(self._field_of_subset, carries=carries))

    def _shade(self, rays: FlatRays, samples: Samples, context: StepContext, field_at: FieldAt) -> ShadedRays:
        """Evaluate the field and its colours."""
        positions, times = rays.midpoints(samples)
        field = field_at(positions, times, context.step)
        directions = rays.directions.index_select(0, samples.ray_indices)
        points = ShadingPoints(
            positions=positions,
            directions=directions,
            light_positions=rays.light_positions[samples.ray_indices],
        )
        # A copy, so that other rays, or these again, are shaded with the same draws.
        rgb = self.parts.material(field, points, context.copied())
        extras = [extra for extra in (field.normals, field.deformation) if extra is not None]
        seen = composite(field.sigmas, joined([rgb, *extras], dim=1), samples, len(rays))
        colors, *sums = seen.values.split(3, dim=1)
        return ShadedRays(
            rgb=colors,
            opacity=seen.opacity,
            depth=seen.depth,
            z_variance=seen.z_variance,
            normal=None if field.normals is None else sums.pop(0),
            deformation=None if field.deformation is None else sums.pop(0),
            weights=seen.weights,
            normals=field.normals,
            t_dirs=None if field.normals is None else directions,
        )

    def _field(self, positions: Float[Tensor, "N 3"], times: Float[Tensor, "N 1"], step: int) -> FieldOutput:
        want_normals = self.parts.material.requires_normal or self.cfg.return_comp_normal
        return self.parts.geometry(positions, times, step=step, want_normals=want_normals)

    def _field_of_subset(
        self,
        positions: Float[Tensor, "N 3"],
        times: Float[Tensor, "N 1"],
        step: int,
        carries: Bool[Tensor, "N"],
    ) -> FieldOutput:
        """The field at all samples, with a graph for those that ``carries`` marks."""
        trained, fixed = carries.nonzero().squeeze(1), (~carries).nonzero().squeeze(1)
        with torch.no_grad():
            without = self._field_in_chunks(
                positions.index_select(0, fixed), times.index_select(0, fixed), step
            )
        field = self._field(positions.index_select(0, trained), times.index_select(0, trained), step)
        both, order = joined_records([field, without]), torch.cat([trained, fixed]).argsort()
        return both.mapped(lambda value: value.index_select(0, order))

    def _field_in_chunks(
        self, positions: Float[Tensor, "N 3"], times: Float[Tensor, "N 1"], step: int
    ) -> FieldOutput:
        """Only for use under no_grad: a graph would hold all chunks."""
        return joined_records(
            [self._field(*chunk, step) for chunk in chunks(positions, times, self._chunk_size)]
        )


@register("mask-nerf-volume-renderer")
class MaskedVolumeRenderer(NeRFVolumeRenderer):
    """``nerf-volume-renderer`` with the caps of the original, whose masks chose the samples with a graph."""

    @dataclass(frozen=True, kw_only=True)
    class Config(NeRFVolumeRenderer.Config):
        train_max_nums: int | None = number(100_000, 1)
        train_max_nums_static: int | None = number(2_000_000, 1)

    cfg: Config


@register("stable-nerf-volume-renderer")
class StableVolumeRenderer(Renderer):
    """The renderer that ``base_renderer`` describes, as the original's files for small cards nest it.

    With ``gradient: subset`` the 3 x 3 interleaved sub-images of a frame share its cap.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Renderer.Config):
        base_renderer_type: str = "mask-nerf-volume-renderer"
        base_renderer: Any = slot(MaskedVolumeRenderer, "base_renderer_type")

        def samples_with_graph(self, rays: int, occupied: float, budget: Budget) -> float:
            return self.base_renderer.samples_with_graph(rays, occupied, budget)

        @property
        def wants_normals(self) -> bool:
            return self.base_renderer.wants_normals

        def build(self, parts: Parts) -> MaskedVolumeRenderer:
            """The nested renderer, so that there is one kind alone."""
            return self.base_renderer.build(parts, share_out=interleaved)
