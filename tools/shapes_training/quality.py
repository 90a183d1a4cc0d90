"""Sample from the small models and check the samples against the ground truth.

A check compares a sample with a bank of ground-truth renderings at 32 x 32 and asks which entry is
the nearest: is it one of the prompt's own shape, motion, view? N samples of F frames, K candidates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fourdfy.ops.diffusion import add_noise, classifier_free_guidance, sample_noise, x0_from_prediction
from fourdfy.seeds import step_generator
from fourdfy.shapes.creature_prompts import CreaturePrompt
from fourdfy.shapes.creatures import CREATURES
from fourdfy.shapes.gestures import allowed
from fourdfy.shapes.grammar import (
    COLOURS,
    MOMENTS,
    MOTIONS,
    SHAPES,
    START,
    ShapePrompt,
)
from fourdfy.shapes.prompts import Prompt, every_prompt, is_held_out, render_codes
from fourdfy.shapes.prompts import encode as encode_prompts
from fourdfy.shapes.world import BACKGROUNDS, COLOUR_RGB, orbit
from tools.shapes_training import store
from tools.shapes_training.data import (
    EMPTY_TEXT,
    Scenes,
    TextTable,
    draw_scenes,
    prompts_of,
    render_scenes,
    text_row,
    told_cameras,
    twice,
    view_index,
)
from tools.shapes_training.models import (
    CLIPS,
    FRAMES,
    decode,
    encode,
    latent_shape,
    needs,
    noise_schedule,
    predict_velocity,
)
from tools.shapes_training.text import SOLIDS_ONLY

logger = logging.getLogger(__name__)

CHECK_SIZE = 32
VIEW_TOLERANCE_DEG = 22.5
SCENES_AT_ONCE = 32
CANDIDATES_AT_ONCE = 4096
GRID_SCENES = 16
NOISES = (0.25, 0.5, 0.75)
"""Shares of the schedule."""


def measure(
    part: str,
    out: Path,
    *,
    device: torch.device,
    seed: int,
    num_prompts: int,
    steps: int,
    guidance_scale: float,
) -> None:
    """Sample, check, write ``OUT/PART.png`` and record the shares of samples that are right.

    The shares are over ``num_prompts`` prompts of solids, over as many of creatures if the model knows any,
    and over the held-out ones of each.
    """
    kinds = (ShapePrompt,) if part in SOLIDS_ONLY else (ShapePrompt, CreaturePrompt)
    prompts = [prompt for kind in kinds for prompt in choose_prompts(kind, num_prompts)]
    scenes = ask(part, prompts, seed)
    images = sample(part, out, scenes, device=device, seed=seed, steps=steps, guidance_scale=guidance_scale)
    checks = check(part, images, scenes, prompts)
    held_out = torch.tensor([is_held_out(prompt) for prompt in prompts])
    solid = torch.tensor([isinstance(prompt, ShapePrompt) for prompt in prompts])
    shares = {
        which: {name: round(float(right[rows].float().mean()), 4) for name, right in checks.items()}
        for which, rows in _groups(solid, held_out).items()
    }
    quality: dict[str, Any] = {
        "num_prompts": len(prompts),
        "num_held_out": int(held_out.sum()),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "shares": shares,
        "one_step": one_step(part, out, device=device, seed=seed, count=num_prompts),
        "wrong": [
            f"{prompt.text}: {', '.join(name for name in list(checks)[:-1] if not checks[name][n])}"
            for n, prompt in enumerate(prompts)
            if not checks["right"][n]
        ],
    }
    if part == "multi_view":
        quality["psnr"] = round(_psnr_over_backgrounds(images, scenes), 2)
    store.update_record(out, part, quality=quality)
    shown = (
        [k * len(prompts) // GRID_SCENES for k in range(GRID_SCENES)] if len(prompts) > GRID_SCENES else ...
    )
    _save_grid(images[shown, :: 1 + FRAMES[part] // 9], out / f"{part}.png")
    logger.info("%s: right shares %s; wrong: %s", part, shares, "; ".join(quality["wrong"]))


def choose_prompts(kind: type[Prompt], count: int) -> list[Prompt]:
    """Prompts of one kind, spread evenly over the grammar, a third of them held out if there are enough."""
    held_out, known = (
        [prompt for prompt in prompts_of("text", held_out=apart) if isinstance(prompt, kind)]
        for apart in (True, False)
    )
    num_held_out = min(len(held_out), max(1, count // 3))
    picked = [held_out[k * len(held_out) // num_held_out] for k in range(num_held_out)]
    rest = max(0, count - num_held_out)
    return picked + [known[k * len(known) // rest % len(known)] for k in range(rest)]


def ask(part: str, prompts: Sequence[Prompt], seed: int) -> Scenes:
    """The samples to draw from the model: views in turn; images and groups at the start of the clip."""
    count, frames = len(prompts), FRAMES[part]
    index = torch.tensor([every_prompt().index(prompt) for prompt in prompts])
    elevation = torch.full((count, frames), 15.0)
    azimuth = 90.0 * (torch.arange(count) % 4)[:, None]
    times = torch.zeros(count, frames)
    moment = torch.full((count,), 1 + MOMENTS.index(START))
    view = 1 + view_index("video" if part in CLIPS else "image", elevation[:, 0], azimuth[:, 0])
    if part == "multi_view":
        first = 360 * torch.rand(count, 1, generator=step_generator(seed, 0, "ask"))
        azimuth = first + 90 * torch.arange(frames)
        view = torch.zeros_like(moment)
    if part in CLIPS:
        times = ((torch.arange(frames) + 0.5) / frames).expand(count, -1)
        moment = torch.zeros_like(moment)
    return Scenes(
        codes=encode_prompts(prompts),
        times=times,
        azimuth_deg=azimuth.expand(-1, frames),
        elevation_deg=elevation,
        background=torch.tensor(BACKGROUNDS[:1]).expand(count, -1),
        text=twice(text_row(part, index, moment, view)),
        share=torch.zeros(count),
    )


@torch.no_grad()
def one_step(part: str, out: Path, *, device: torch.device, seed: int, count: int) -> dict[str, list[float]]:
    """How well the model knows the truth, which bounds what is distilled from it.

    The mean PSNR in dB of the decoded x_0 that it predicts without guidance, for each of NOISES, from the
    noisy latents and the text of true scenes: ``count`` of known prompts and ``count`` of held-out ones,
    drawn as in its training.
    """
    text_part, vae_part = needs(part)
    denoiser, vae = store.load_part(out, part, device), store.load_part(out, vae_part, device)
    texts, schedule = TextTable(out, text_part, device), noise_schedule(part, device)
    generator = step_generator(seed, 0, "one step")
    found, solid, held_out = [], [], []
    for apart, start in product((False, True), range(0, count, SCENES_AT_ONCE)):
        number = min(SCENES_AT_ONCE, count - start)
        scenes = draw_scenes(part, number, generator, held_out=apart)
        texts.require(scenes.text)
        images, text = render_scenes(scenes, device), texts.mixed(scenes.text, scenes.share)
        latents, cameras = encode(vae, images), told_cameras(part, scenes, device)
        noise, psnr = sample_noise(latents.shape, generator, device), []
        for share in NOISES:
            timesteps = torch.full((number,), schedule.span(share, share)[0], device=device)
            scales = schedule.scales(timesteps, latents.ndim)
            noisy = add_noise(latents, noise, scales)
            velocity = predict_velocity(part, denoiser, noisy, timesteps, text, cameras)
            clean = decode(vae, x0_from_prediction(velocity, noisy, scales, schedule.prediction))
            psnr.append(-10 * (clean / 2 - images / 2).square().flatten(1).mean(1).log10())
        found.append(torch.stack(psnr, dim=-1).cpu())
        solid.append(scenes.codes[:, 0] == 0)
        held_out.append(torch.full((number,), apart))
    groups = _groups(torch.cat(solid), torch.cat(held_out))
    decibels = {which: torch.cat(found)[rows].mean(0).tolist() for which, rows in groups.items()}
    return {which: [round(value, 2) for value in values] for which, values in decibels.items()}


def _groups(solid: Bool[Tensor, "N"], held_out: Bool[Tensor, "N"]) -> dict[str, Bool[Tensor, "N"]]:
    """Of solids and of creatures all, and those of held-out prompts; without empty ones."""
    groups = {"all": solid, "held_out": solid & held_out}
    groups |= {"creatures": ~solid, "creatures_held_out": ~solid & held_out}
    return {which: rows for which, rows in groups.items() if rows.any()}


@torch.no_grad()
def sample(
    part: str,
    out: Path,
    scenes: Scenes,
    *,
    device: torch.device,
    seed: int,
    steps: int,
    guidance_scale: float,
) -> Float[Tensor, "N F 3 H W"]:
    """Sample images in 0..1 for the texts and cameras of ``scenes``: DDIM (Song et al. 2021), which is
    Euler's method for a flow, and classifier-free guidance."""
    text_part, vae_part = needs(part)
    denoiser, vae = store.load_part(out, part, device), store.load_part(out, vae_part, device)
    texts = TextTable(out, text_part, device)
    texts.require(scenes.text)
    schedule = noise_schedule(part, device)
    shape = latent_shape(part)
    noise = torch.randn(len(scenes), *shape, generator=step_generator(seed, 0, "samples"))
    cameras = told_cameras(part, scenes, device)
    images = []
    for start in range(0, len(scenes), SCENES_AT_ONCE):
        rows = slice(start, start + SCENES_AT_ONCE)
        latents, text = noise[rows].to(device), texts.mixed(scenes.text[rows], scenes.share[rows])
        both = torch.cat([texts.rows[[EMPTY_TEXT]].expand_as(text), text])
        camera = None if cameras is None else cameras[rows].repeat(2, 1, 1)
        for step in range(steps, 0, -1):
            after, now = schedule.span((step - 1) / steps, step / steps)
            timesteps = torch.full((len(both),), now, device=device)
            twice = latents.repeat(2, *[1] * len(shape))
            uncond, cond = predict_velocity(part, denoiser, twice, timesteps, both, camera).chunk(2)
            guided = classifier_free_guidance(cond, uncond, guidance_scale)
            scales = schedule.scales(timesteps[: len(text)], latents.ndim)
            clean = x0_from_prediction(guided, latents, scales, schedule.prediction)
            predicted = (latents - scales.alphas * clean) / scales.sigmas
            scales = schedule.scales(torch.full_like(timesteps[: len(text)], after), latents.ndim)
            latents = add_noise(clean, predicted, scales)
        images.append((decode(vae, clean) / 2 + 0.5).clamp(0, 1))
    return torch.cat(images)


# ---------------------------------------------------------------------------------------------
# Checks


def check(
    part: str,
    images: Float[Tensor, "N F 3 H W"],
    scenes: Scenes,
    prompts: Sequence[Prompt],
    num_azimuths: int = 24,
) -> dict[str, Bool[Tensor, "N"]]:
    """Which samples pass each check, by name.

    Colour and shape (of creatures: which one) are always checked; view for images and groups (which are
    asked for the start of the clip, where the front is known); motion for clips. Under "right" are the
    samples that pass all of them.
    """
    small = avg_pool2d(images.flatten(0, 1), images.shape[-1] // CHECK_SIZE).unflatten(0, images.shape[:2])
    background = _nearest_background(small)
    azimuths = torch.arange(num_azimuths) * (360 / num_azimuths)
    third = "motion" if part in CLIPS else "view"
    checks = {name: torch.zeros(len(prompts), dtype=torch.bool) for name in ("colour", "shape", third)}
    for kind, check_kind in ((ShapePrompt, _check_solids), (CreaturePrompt, _check_creatures)):
        rows = [n for n, prompt in enumerate(prompts) if isinstance(prompt, kind)]
        if rows:
            these = [prompts[n] for n in rows]
            at = scenes.mapped(lambda value, rows=rows: value[rows])
            found = check_kind(part, small[rows], background[rows], at, these, azimuths)
            for name, right in found.items():
                checks[name][rows] = right
    return checks | {"right": torch.stack([*checks.values()]).all(0)}


def _check_solids(
    part: str,
    images: Float[Tensor, "N F 3 h w"],
    background: Int[Tensor, "N"],
    scenes: Scenes,
    prompts: Sequence[ShapePrompt],
    azimuths: Float[Tensor, "K"],
) -> dict[str, Bool[Tensor, "N"]]:
    checks = {
        "colour": _check_colour(images, background, prompts),
        "shape": _check_shape(images, background, prompts),
    }
    if part in CLIPS:
        motions = [[replace(prompt, motion=motion) for motion in MOTIONS] for prompt in prompts]
        return checks | {"motion": _check_nearest(part, images, background, scenes, motions, azimuths)}
    return checks | {"view": _check_view(part, images, background, scenes, azimuths)}


def _check_creatures(
    part: str,
    images: Float[Tensor, "N F 3 h w"],
    background: Int[Tensor, "N"],
    scenes: Scenes,
    prompts: Sequence[CreaturePrompt],
    azimuths: Float[Tensor, "K"],
) -> dict[str, Bool[Tensor, "N"]]:
    """Whether the nearest ground truth that differs in one word only has the prompt's own."""
    others = {
        "colour": [[p, *(replace(p, colour=colour) for colour in _other_colours(p))] for p in prompts],
        "shape": [
            [replace(p, creature=name) for name in CREATURES if p.gesture in allowed(name)] for p in prompts
        ],
    }
    if part in CLIPS:
        others["motion"] = [[replace(p, gesture=name) for name in allowed(p.creature)] for p in prompts]
    checks = {
        name: _check_nearest(part, images, background, scenes, candidates, azimuths)
        for name, candidates in others.items()
    }
    if part in CLIPS:
        return checks
    return checks | {"view": _check_view(part, images, background, scenes, azimuths)}


def _other_colours(prompt: CreaturePrompt) -> list[str | None]:
    """Those that are not nearly the prompt's own, as the fish's is nearly orange."""
    shades = {None: CREATURES[prompt.creature].colour, **COLOUR_RGB}
    return [name for name, shade in shades.items() if math.dist(shade, shades[prompt.colour]) > 0.25]


def _nearest_background(images: Float[Tensor, "N F 3 h w"]) -> Int[Tensor, "N"]:
    """Index into BACKGROUNDS, by the median of the upper corners."""
    corners = torch.cat([images[..., :4, :4], images[..., :4, -4:]], dim=-1)
    colour = corners.movedim(2, 1).flatten(2).median(dim=-1).values
    known = torch.tensor(BACKGROUNDS).to(images)
    return (colour[:, None] - known).square().sum(-1).argmin(-1)


def _foreground(images: Float[Tensor, "N F 3 h w"], background: Int[Tensor, "N"]) -> Bool[Tensor, "N F h w"]:
    """Pixels that differ from the plain background."""
    plain = torch.tensor(BACKGROUNDS).to(images)[background][:, None, :, None, None]
    return (images - plain).abs().amax(dim=2) > 0.12


def _check_colour(
    images: Float[Tensor, "N F 3 h w"], background: Int[Tensor, "N"], prompts: Sequence[ShapePrompt]
) -> Bool[Tensor, "N"]:
    """Whether the median of the body's pixels is nearest to a shade of the prompt's colour."""
    saturated = images.amax(2) - images.amin(2) > 0.25  # not the front mark
    bodies = _foreground(images, background) & saturated
    palette = torch.tensor([COLOUR_RGB[name] for name in COLOURS]).to(images)
    shades = torch.linspace(0.5, 1, 6).to(images)[:, None, None] * palette
    right = []
    for image, body, prompt in zip(images, bodies, prompts, strict=True):
        pixels = image.movedim(1, -1)[body]
        median = pixels.median(dim=0).values if len(pixels) else pixels.new_full((3,), torch.inf)
        distance = (median - shades).square().sum(-1).amin(0)
        right.append(len(pixels) > 0 and COLOURS[int(distance.argmin())] == prompt.colour)
    return torch.tensor(right)


def _check_shape(
    images: Float[Tensor, "N F 3 h w"], background: Int[Tensor, "N"], prompts: Sequence[ShapePrompt]
) -> Bool[Tensor, "N"]:
    """Whether most frames' silhouettes have their highest IoU with the prompt's shape.

    Candidates are all shapes in the prompt's motion, over moments, azimuths and elevations.
    """
    masks = _foreground(images, background).flatten(2).float()
    right = torch.zeros(len(prompts), dtype=torch.bool)
    for motion in {prompt.motion: None for prompt in prompts}:
        rows = [n for n, prompt in enumerate(prompts) if prompt.motion == motion]
        bank = torch.stack([_silhouettes(shape, motion, images.device) for shape in SHAPES])
        some = masks[rows].flatten(0, 1)
        common = some @ bank.flatten(0, 1).T
        union = some.sum(-1)[:, None] + bank.flatten(0, 1).sum(-1) - common
        best = (common / union.clamp_min(1)).unflatten(1, bank.shape[:2]).amax(-1).argmax(-1)
        wanted = torch.tensor([SHAPES.index(prompts[n].shape) for n in rows]).to(best)
        votes = (best.view(len(rows), -1) == wanted[:, None]).float().mean(-1)
        right[rows] = (votes > 0.5).cpu()
    return right


def _silhouettes(shape: str, motion: str, device: torch.device) -> Float[Tensor, "K P"]:
    """Opacity over 0.5 for the moments of ``motion`` x 12 azimuths x 4 elevations."""
    moments = [0.0] if motion == "standing still" else [k / 8 for k in range(8)]
    axes = (torch.tensor(moments), torch.arange(12) * 30.0, torch.tensor([0.0, 10.0, 20.0, 30.0]))
    times, azimuth, elevation = torch.cartesian_prod(*axes).to(device).unbind(-1)
    codes = encode_prompts([ShapePrompt(COLOURS[0], shape, motion)]).expand(len(times), -1)
    cameras = orbit(elevation, azimuth, times, CHECK_SIZE)
    _, opacity = render_codes(codes, cameras, torch.zeros(3), supersample=1)
    return (opacity > 0.5).float().flatten(1)


def _check_view(
    part: str,
    images: Float[Tensor, "N F 3 h w"],
    background: Int[Tensor, "N"],
    scenes: Scenes,
    azimuths: Float[Tensor, "K"],
) -> Bool[Tensor, "N"]:
    """Whether the nearest ground truth at the start is seen from where the sample should be.

    For groups: from the given cameras, up to a tolerance. For images: from the side that the view
    words name, up to a tolerance at its borders.
    """
    if part == "multi_view":
        turned, elevations = scenes.azimuth_deg[:, None] + azimuths[:, None], scenes.elevation_deg
        wanted = ((azimuths + 180) % 360 - 180).abs() <= VIEW_TOLERANCE_DEG
    else:
        turned, elevations = azimuths[:, None].expand(len(images), -1, -1), None
        asked = view_index("image", scenes.elevation_deg, scenes.azimuth_deg)
        shifts = (-VIEW_TOLERANCE_DEG, 0.0, VIEW_TOLERANCE_DEG)
        named = [view_index("image", scenes.elevation_deg, azimuths + shift) == asked for shift in shifts]
        wanted = torch.stack(named).any(0)
    distance = _distances(images, background, scenes.codes, scenes.times, turned, elevations)
    # A round object looks the same from all sides that do not show its front: nearly as near counts.
    nearest = distance.masked_fill(~wanted.to(distance.device), torch.inf).amin(-1)
    return (nearest <= 1.1 * distance.amin(-1) + 2e-4).cpu()


def _check_nearest(
    part: str,
    images: Float[Tensor, "N F 3 h w"],
    background: Int[Tensor, "N"],
    scenes: Scenes,
    candidates: Sequence[Sequence[Prompt]],
    azimuths: Float[Tensor, "K"],
) -> Bool[Tensor, "N"]:
    """Whether the nearest of the candidates of each sample is the prompt itself (``scenes.codes``).

    Groups are compared from the given cameras; others from all azimuths.
    """
    rows = torch.tensor([n for n, prompts in enumerate(candidates) for _ in prompts])
    codes = encode_prompts([prompt for prompts in candidates for prompt in prompts])
    turned, elevations = azimuths[:, None].expand(len(rows), -1, images.shape[1]), None
    if part == "multi_view":
        turned, elevations = scenes.azimuth_deg[rows, None], scenes.elevation_deg[rows]
    distances = _distances(images[rows], background[rows], codes, scenes.times[rows], turned, elevations)
    distances, own = distances.amin(-1).cpu(), (codes == scenes.codes[rows]).all(-1)
    least = torch.full((2, len(images)), torch.inf)
    for kind, mine in enumerate((own, ~own)):
        least[kind].scatter_reduce_(0, rows[mine], distances[mine], "amin")
    return least[0] <= least[1]


def _distances(
    images: Float[Tensor, "N F 3 h w"],
    background: Int[Tensor, "N"],
    codes: Int[Tensor, "N 4"],
    times: Float[Tensor, "N F"],
    azimuth_deg: Float[Tensor, "N K F"],
    elevation_deg: Float[Tensor, "N F"] | None,
) -> Float[Tensor, "N K"]:
    """Mean squared differences to ground truth over K azimuths, the least over elevations if open."""
    elevations = [elevation_deg]
    if elevation_deg is None:
        elevations = [torch.full_like(times, degrees) for degrees in (5.0, 15.0, 25.0)]
    device, (count, candidates, frames) = images.device, azimuth_deg.shape
    plain = torch.tensor(BACKGROUNDS)[background.cpu()]
    least = torch.full((count, candidates), torch.inf, device=device)
    at_once = max(1, CANDIDATES_AT_ONCE // (candidates * frames))
    for elevation in elevations:
        for rows in torch.arange(count).split(at_once):
            size = (len(rows), candidates, frames)
            angles = [values[rows].view(len(rows), -1, frames).expand(size).flatten().to(device)
                      for values in (elevation, azimuth_deg, times)]  # fmt: skip
            each = [values[rows, None, None].expand(*size, -1).flatten(0, 2) for values in (codes, plain)]
            rgb, _ = render_codes(each[0], orbit(*angles, CHECK_SIZE), each[1].to(device), supersample=1)
            error = (rgb.movedim(-1, 1).unflatten(0, size) - images[rows, None]).square()
            least[rows] = torch.minimum(least[rows], error.mean(dim=(2, 3, 4, 5)))
    return least


def _psnr_over_backgrounds(images: Float[Tensor, "N F 3 H W"], scenes: Scenes) -> float:
    """Mean PSNR in dB against the ground truth of the nearer background."""
    plain = [torch.tensor([colour]).expand(len(scenes), -1) for colour in BACKGROUNDS]
    truth = [render_scenes(replace(scenes, background=colour), images.device) / 2 + 0.5 for colour in plain]
    error = (torch.stack(truth) - images).square().mean(dim=(2, 3, 4, 5)).amin(0)
    return float((-10 * error.log10()).mean())


def _save_grid(images: Float[Tensor, "N F 3 H W"], path: Path) -> None:
    """A PNG: eight single images a row, or one row per scene in two columns."""
    count, frames = images.shape[:2]
    columns = min(count, 8 if frames == 1 else 2)
    images = images[: count // columns * columns]
    rows = images.unflatten(0, (-1, columns)).permute(0, 4, 1, 2, 5, 3)  # row, H, column, F, W, 3
    pixels = (rows.flatten(2, 4).flatten(0, 1) * 255).round().byte().cpu().numpy()
    Image.fromarray(pixels).save(path)
