"""Volume rendering of a field over space and time: march, prune, ask the field, composite.

F frames of H x W pixels, R = F*H*W rays; a pass renders r of them, with N samples in all. A sample's
time is that of its ray's frame, so all frames of a step are rendered at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from fourdfy.ops.compositing import accumulate, opacity_and_depth, weights_from_density, z_variance
from fourdfy.ops.ray_marching import march, step_size, visible
from fourdfy.registry import register
from fourdfy.renderers.base import Renderer, Scene
from fourdfy.renderers.occupancy import OccupancyGrid
from fourdfy.types import FieldOutput, RayBundle, RenderOutput, Samples

# Samples that one pass of an evaluation may have before pruning: a few hundred MB of indices.
MAX_EVAL_SAMPLES = 1 << 23


@register("nerf-volume-renderer")
class NeRFVolumeRenderer(Renderer):
    """Occupancy-grid guided volume renderer (nerfacc's scheme, as threestudio uses it)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Renderer.Config):
        radius: float = 1.0
        """Half side of the box that rays are marched through, in scene units."""
        num_samples_per_ray: int = 512
        """Steps that the box's diagonal is cut into."""
        randomized: bool = True
        """Whether training shifts the samples of each ray by a random part of a step."""
        eval_chunk_size: int = 160000
        """Points per call of the field where no gradient is needed: pruning, occupancy, evaluation."""
        frames_per_pass: int = 0
        """Frames rendered at once in training; the backward pass recomputes them. 0 renders all at
        once. Bounds memory; images and gradients stay the same."""
        return_comp_normal: bool = False
        """Ask the geometry for normals even where the material does not need them."""
        return_normal_perturb: bool = False
        """Not supported; here so that old files say what is wrong."""
        estimator: str = "occgrid"
        """What knows where samples are needed; only ``occgrid``."""
        grid_prune: bool = True
        """Skip empty cells and invisible samples. False keeps every sample in the box."""
        prune_alpha_threshold: bool = True
        """Also ask the current density, and drop samples that are thin or hidden."""
        alpha_thre: float = 0.01
        """A sample is thin below min(this, mean of the grid's values); 0 drops only hidden ones.
        Dropped samples have no gradient: lower it where density must grow in empty space."""
        grid_resolution: int = 32
        """Cells per side of the occupancy grid."""
        occ_thre: float = 0.01
        """A cell is empty below min(this, mean of the grid's values), in units of density * step."""
        update_interval: int = 16
        """Training steps from one refresh of the grid to the next."""
        warmup_steps: int = 256
        """Before this step every cell is refreshed, later half of them at most."""
        occ_times: int = 4
        """Moments at which a refresh looks into a cell, in dynamic scenes."""
        occ_dilation: int = 1
        """Cells around an occupied one that count as occupied too, in dynamic scenes. Without it a
        few random moments miss the rim of what moves: 2 to 3 % of its samples."""

        def __post_init__(self) -> None:
            if self.estimator != "occgrid":
                raise ValueError(
                    f"estimator={self.estimator!r} is not available in nerf-volume-renderer; use occgrid"
                )
            if self.return_normal_perturb:
                raise ValueError("return_normal_perturb is not supported: no loss here uses it; remove it")
            for key in ("num_samples_per_ray", "eval_chunk_size", "update_interval", "occ_times"):
                if getattr(self, key) < 1:
                    raise ValueError(f"{key}={getattr(self, key)}: expected at least 1")
            if not 1 <= self.grid_resolution <= 254:
                raise ValueError(f"grid_resolution={self.grid_resolution}: expected 1..254")
            if self.radius <= 0:
                raise ValueError(f"radius={self.radius}: expected a positive length")

    cfg: Config
    bbox: Float[Tensor, "2 3"]

    def __init__(self, cfg: Config, scene: Scene) -> None:
        super().__init__(cfg, scene)
        if cfg.radius > scene.geometry.radius:
            raise ValueError(
                f"renderer.radius={cfg.radius} exceeds geometry.radius={scene.geometry.radius}, "
                f"where the field ends; use renderer.radius={scene.geometry.radius}"
            )
        self.step_size = step_size(cfg.radius, cfg.num_samples_per_ray)
        self.register_buffer("bbox", torch.tensor([[-cfg.radius] * 3, [cfg.radius] * 3]))
        self.estimator = OccupancyGrid(cfg.grid_resolution, cfg.radius)

    def forward(
        self, rays: RayBundle, *, step: int, generator: torch.Generator | None = None
    ) -> RenderOutput:
        """See ``Renderer``. Rays that meet nothing show the background; without a generator no graph
        is built."""
        with nullcontext() if generator else torch.no_grad():
            # In this order, so that no draw depends on how the frames are split into passes.
            jitter = self._jitter(rays, generator)
            background = self.scene.background(rays.directions, generator=generator)
            shading = generator.clone_state() if generator else None
            parts = [
                self._render_pass(rays, jitter, start, stop, step, shading)
                for start, stop in self._passes(rays, training=generator is not None)
            ]
            return _assemble(rays, background, parts)

    @torch.no_grad()
    def update_occupancy(self, *, step: int, dynamic: bool, generator: torch.Generator) -> None:
        """Refresh the grid where one is due at ``step``."""
        cfg = self.cfg
        if not cfg.grid_prune or step % cfg.update_interval:
            return
        self.estimator.refresh(
            lambda positions, times: self.scene.geometry.density(positions, times, step=step),
            step_size=self.step_size,
            all_cells=step < cfg.warmup_steps,
            num_times=cfg.occ_times if dynamic else 0,
            threshold=cfg.occ_thre,
            dilation=cfg.occ_dilation if dynamic else 0,
            chunk_size=cfg.eval_chunk_size,
            generator=generator,
        )

    def _jitter(self, rays: RayBundle, generator: torch.Generator | None) -> Float[Tensor, "R"]:
        count = rays.directions[..., 0].numel()
        if generator is None or not self.cfg.randomized:
            return rays.origins.new_zeros(count)
        return torch.rand(count, generator=generator, device=generator.device).to(rays.origins)

    def _passes(self, rays: RayBundle, training: bool) -> Iterator[tuple[int, int]]:
        """Ranges of rays; training passes hold whole frames."""
        frames, height, width = rays.directions.shape[:3]
        total = frames * height * width
        if training:
            size = (self.cfg.frames_per_pass or frames) * height * width
        else:
            size = max(1, MAX_EVAL_SAMPLES // self.cfg.num_samples_per_ray)
        return ((start, min(start + size, total)) for start in range(0, total, size))

    def _render_pass(
        self,
        rays: RayBundle,
        jitter: Float[Tensor, "R"],
        start: int,
        stop: int,
        step: int,
        generator: torch.Generator | None,
    ) -> _Part:
        """Rays ``start`` to ``stop``; in several training passes the backward pass shades them anew."""
        frames = torch.arange(start, stop, device=jitter.device) // rays.directions[0, ..., 0].numel()
        part = _PassRays(
            origins=rays.origins.reshape(-1, 3)[start:stop],
            directions=rays.directions.reshape(-1, 3)[start:stop],
            times=rays.times[frames],
            light_positions=rays.light_positions[frames],
        )
        samples, positions, times = self._visible_samples(part, jitter[start:stop], step)
        args = (part, samples, positions, times, step, generator)
        if generator and stop - start < len(jitter):
            modules = (self.scene.geometry, self.scene.material)
            shaded = checkpoint(
                self._shade,
                *args,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), _RequiresGradAsNow(modules)),
            )
        else:
            shaded = self._shade(*args)
        return dataclasses.replace(shaded, start=start)

    @torch.no_grad()
    def _visible_samples(
        self, rays: _PassRays, jitter: Float[Tensor, "r"], step: int
    ) -> tuple[Samples, Float[Tensor, "N 3"], Float[Tensor, "N 1"]]:
        """Where to look: samples, their midpoints, their times."""
        cfg = self.cfg
        samples = march(
            rays.origins,
            rays.directions,
            jitter,
            radius=cfg.radius,
            step_size=self.step_size,
            occupied=self.estimator.occupied if cfg.grid_prune else None,
        )
        t_mids = (samples.t_starts + samples.t_ends) / 2
        # index_select, here and below: several times faster than indexing on the CPU.
        origins, directions, times = (
            values.index_select(0, samples.ray_indices)
            for values in (rays.origins, rays.directions, rays.times[:, None])
        )
        positions = torch.addcmul(origins, directions, t_mids[:, None])
        if not (cfg.grid_prune and cfg.prune_alpha_threshold):
            return samples, positions, times
        sigmas = _joined(
            [
                self.scene.geometry.density(some_positions, some_times, step=step)
                for some_positions, some_times in _chunks(positions, times, cfg.eval_chunk_size)
            ]
        )
        threshold = self.estimator.occs.mean().clamp(max=cfg.alpha_thre)
        kept = visible(samples, sigmas, len(rays.origins), alpha_threshold=threshold).nonzero().squeeze(1)
        samples = Samples(
            ray_indices=samples.ray_indices.index_select(0, kept),
            t_starts=samples.t_starts.index_select(0, kept),
            t_ends=samples.t_ends.index_select(0, kept),
        )
        return samples, positions.index_select(0, kept), times.index_select(0, kept)

    def _shade(
        self,
        rays: _PassRays,
        samples: Samples,
        positions: Float[Tensor, "N 3"],
        times: Float[Tensor, "N 1"],
        step: int,
        generator: torch.Generator | None,
    ) -> _Part:
        """What is there, and what it looks like."""
        field = self._field(positions, times, step, training=generator is not None)
        ray_indices = samples.ray_indices
        rgb = self.scene.material(
            field.features,
            positions=positions,
            normals=field.normals,
            light_positions=rays.light_positions[ray_indices],
            step=step,
            # A copy: every pass, and its recomputation, sees the same draws.
            generator=generator.clone_state() if generator else None,
        )
        n_rays = len(rays.origins)
        weights = weights_from_density(field.sigmas, samples.t_starts, samples.t_ends, ray_indices, n_rays)
        t_mids = (samples.t_starts + samples.t_ends) / 2
        opacity, depth = opacity_and_depth(weights, t_mids, ray_indices, n_rays)

        def summed(values: Float[Tensor, "N 3"] | None) -> Float[Tensor, "r 3"] | None:
            return None if values is None else accumulate(weights, values, ray_indices, n_rays)

        return _Part(
            rgb=summed(rgb),
            opacity=opacity,
            depth=depth,
            z_variance=z_variance(weights, t_mids, depth, ray_indices),
            normal=summed(field.normals),
            deformation=summed(field.deformation),
            samples=samples,
            weights=weights,
            normals=field.normals,
            t_dirs=None if field.normals is None else rays.directions.index_select(0, ray_indices),
        )

    def _field(
        self, positions: Float[Tensor, "N 3"], times: Float[Tensor, "N 1"], step: int, training: bool
    ) -> FieldOutput:
        want_normals = self.scene.material.requires_normal or self.cfg.return_comp_normal
        # In training chunks would save nothing: the graph holds all of them.
        size = max(1, len(positions)) if training else self.cfg.eval_chunk_size
        chunks = [
            self.scene.geometry(some_positions, some_times, step=step, want_normals=want_normals)
            for some_positions, some_times in _chunks(positions, times, size)
        ]
        return _cat_fields(chunks)


@dataclass(frozen=True, kw_only=True)
class _PassRays:
    """The rays of one pass, each with what its frame says."""

    origins: Float[Tensor, "r 3"]
    directions: Float[Tensor, "r 3"]
    times: Float[Tensor, "r"]
    light_positions: Float[Tensor, "r 3"]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one pass renders; sums over samples, without the background."""

    rgb: Float[Tensor, "r 3"]
    opacity: Float[Tensor, "r 1"]
    depth: Float[Tensor, "r 1"]
    z_variance: Float[Tensor, "r 1"]
    normal: Float[Tensor, "r 3"] | None
    deformation: Float[Tensor, "r 3"] | None
    samples: Samples
    """Ray indices count from the pass's first ray, ``start``."""
    weights: Float[Tensor, "N"]
    normals: Float[Tensor, "N 3"] | None
    t_dirs: Float[Tensor, "N 3"] | None
    start: int = 0


def _assemble(rays: RayBundle, background: Float[Tensor, "F H W 3"], parts: Sequence[_Part]) -> RenderOutput:
    """Pixels of all passes as images, over the background."""
    shape = rays.directions.shape[:3]

    def joined(name: str) -> Tensor | None:
        return _joined([getattr(part, name) for part in parts])

    def image(name: str) -> Tensor | None:
        pixels = joined(name)
        return None if pixels is None else pixels.view(*shape, -1)

    foreground, opacity, normal = image("rgb"), image("opacity"), image("normal")
    if normal is not None:
        normal = (normalize(normal, dim=-1) + 1) / 2 * opacity
    return RenderOutput(
        comp_rgb=foreground + background * (1 - opacity),
        comp_rgb_fg=foreground,
        comp_rgb_bg=background,
        opacity=opacity,
        depth=image("depth"),
        z_variance=image("z_variance"),
        samples=Samples(
            ray_indices=_joined([part.samples.ray_indices + part.start for part in parts]),
            t_starts=_joined([part.samples.t_starts for part in parts]),
            t_ends=_joined([part.samples.t_ends for part in parts]),
        ),
        weights=joined("weights"),
        comp_normal=normal,
        deformation=image("deformation"),
        normals=joined("normals"),
        t_dirs=joined("t_dirs"),
    )


def _chunks(positions: Tensor, times: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of both; one empty piece where there are no points."""
    return zip(positions.split(size), times.split(size), strict=True)


def _cat_fields(chunks: Sequence[FieldOutput]) -> FieldOutput:
    names = [f.name for f in dataclasses.fields(FieldOutput)]
    return FieldOutput(**{name: _joined([getattr(chunk, name) for chunk in chunks]) for name in names})


def _joined(values: Sequence[Tensor | None]) -> Tensor | None:
    """One after the other, without a copy where there is one only; None where a field has none."""
    if values[0] is None or len(values) == 1:
        return values[0]
    return torch.cat(values)


class _RequiresGradAsNow(AbstractContextManager):
    """Inside, each parameter requires a gradient where it did when this was made.

    For the backward pass's recomputation: the half that was frozen in the forward pass may be
    trainable again by then, and another graph would be recorded.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]

    def __enter__(self) -> None:
        self.before = [parameter.requires_grad for parameter, _ in self.flags]
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)

    def __exit__(self, *error: object) -> None:
        for (parameter, _), flag in zip(self.flags, self.before, strict=True):
            parameter.requires_grad_(flag)
