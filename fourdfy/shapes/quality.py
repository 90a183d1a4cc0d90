"""Sample from the small models and check the samples against the ground truth.

A check compares a sample with a bank of ground-truth renderings at 32 x 32 and asks which entry is
the nearest: is it one of the prompt's own shape, motion, view? N samples of F frames, K candidates.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fourdfy.ops.cameras import orbit_cameras
from fourdfy.priors.mvdream import camera_vectors
from fourdfy.seeds import step_seed
from fourdfy.shapes import store
from fourdfy.shapes.data import EMPTY_TEXT, FRAMES, Scenes, render_scenes, text_row, view_index
from fourdfy.shapes.denoising import predict_velocity, text_table
from fourdfy.shapes.grammar import (
    COLOURS,
    MOMENTS,
    MOTIONS,
    SHAPES,
    START,
    ShapePrompt,
    all_prompts,
    held_out_prompts,
    is_held_out,
    training_prompts,
)
from fourdfy.shapes.models import LATENT_SIZE, build_scheduler
from fourdfy.shapes.world import (
    BACKGROUNDS,
    CAMERA_DISTANCE,
    COLOUR_RGB,
    FOVY_DEG,
    encode_prompts,
    render_codes,
)

logger = logging.getLogger(__name__)

CHECK_SIZE = 32
VIEW_TOLERANCE_DEG = 22.5
SCENES_AT_ONCE = 32
CANDIDATES_AT_ONCE = 4096
GRID_SCENES = 32


def measure(
    part: str,
    out: Path,
    *,
    device: str = "cpu",
    seed: int = 0,
    num_prompts: int = 96,
    steps: int = 30,
    guidance_scale: float = 5.0,
    num_azimuths: int = 24,
) -> dict[str, Any]:
    """Sample, check, write ``OUT/PART.png`` and record the shares of samples that are right.

    The shares are over all prompts and over the held-out ones alone. A sample is "right" if all
    checks that the model admits are: colour and shape always; view for images and groups (which are
    asked for the start of the clip, where the front is known); motion for clips.
    """
    prompts = _choose_prompts(num_prompts)
    scenes = _ask(part, prompts, seed)
    images = sample(part, out, scenes, device=device, seed=seed, steps=steps, guidance_scale=guidance_scale)
    truth = render_scenes(scenes, device) / 2 + 0.5
    small = avg_pool2d(images.flatten(0, 1), images.shape[-1] // CHECK_SIZE).unflatten(0, images.shape[:2])
    background = nearest_background(small)
    checks = {
        "colour": check_colour(small, background, prompts),
        "shape": check_shape(small, background, prompts),
    }
    if part == "video":
        checks["motion"] = check_motion(small, background, prompts, num_azimuths)
    else:
        checks["view"] = check_view(part, small, background, scenes, num_azimuths)
    checks["right"] = torch.stack(list(checks.values())).all(0)
    held_out = torch.tensor([is_held_out(prompt) for prompt in prompts])
    shares = {
        which: {name: round(float(ok[rows].float().mean()), 4) for name, ok in checks.items()}
        for which, rows in (("all", torch.ones_like(held_out)), ("held_out", held_out))
        if rows.any()
    }
    wrong = [f"{p.text}: {', '.join(k for k, ok in checks.items() if not ok[n] and k != 'right')}"
             for n, p in enumerate(prompts) if not checks["right"][n]]  # fmt: skip
    quality: dict[str, Any] = {
        "num_prompts": len(prompts),
        "num_held_out": int(held_out.sum()),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "shares": shares,
        "wrong": wrong,
    }
    if part == "multi_view":
        quality["psnr"] = round(_psnr_over_backgrounds(images, scenes, truth), 2)
    store.update_record(out, part, quality=quality)
    save_grid(images[:GRID_SCENES], out / f"{part}.png")
    logger.info("%s: right shares %s", part, shares)
    return quality


@torch.no_grad()
def sample(
    part: str,
    out: Path,
    scenes: Scenes,
    *,
    device: str = "cpu",
    seed: int = 0,
    steps: int = 30,
    guidance_scale: float = 5.0,
) -> Float[Tensor, "N F 3 H W"]:
    """Images in 0..1 for the texts and cameras of ``scenes``: DDIM, classifier-free guidance."""
    unet, vae = store.load_part(out, part, device), store.load_part(out, "vae", device)
    texts, scheduler = text_table(out, device), build_scheduler()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(step_seed(seed, 0, "samples"))
    frames = FRAMES[part]
    noise = torch.randn(len(scenes), frames, 4, LATENT_SIZE, LATENT_SIZE, generator=generator)
    cameras = None
    if part == "multi_view":
        cameras = camera_vectors(scenes.cameras(device).c2w).unflatten(0, (-1, frames))
    images = []
    for start in range(0, len(scenes), SCENES_AT_ONCE):
        rows = slice(start, start + SCENES_AT_ONCE)
        latents = noise[rows].to(device)
        text = scenes.text[rows].to(device)
        both = texts[torch.cat([torch.full_like(text, EMPTY_TEXT), text])]
        camera = None if cameras is None else cameras[rows].repeat(2, 1, 1)
        for timestep in scheduler.timesteps:
            timesteps = timestep.to(device).expand(len(both))
            velocity = predict_velocity(part, unet, latents.repeat(2, 1, 1, 1, 1), timesteps, both, camera)
            uncond, cond = velocity.chunk(2)
            velocity = uncond + guidance_scale * (cond - uncond)
            latents = scheduler.step(velocity, timestep, latents).prev_sample
        decoded = vae.decode(latents.flatten(0, 1) / vae.config.scaling_factor).sample
        images.append((decoded / 2 + 0.5).clamp(0, 1).unflatten(0, latents.shape[:2]))
    return torch.cat(images)


def nearest_background(images: Float[Tensor, "N F 3 h w"]) -> Int[Tensor, "N"]:
    """Index into BACKGROUNDS, by the median of the upper corners."""
    corners = torch.cat([images[..., :4, :4], images[..., :4, -4:]], dim=-1)
    colour = corners.movedim(2, 1).flatten(2).median(dim=-1).values
    known = torch.tensor(BACKGROUNDS).to(images)
    return (colour[:, None] - known).square().sum(-1).argmin(-1)


def foreground(
    images: Float[Tensor, "N F 3 h w"], background: Int[Tensor, "N"], threshold: float = 0.12
) -> Bool[Tensor, "N F h w"]:
    """Pixels that differ from the plain background."""
    plain = torch.tensor(BACKGROUNDS).to(images)[background][:, None, :, None, None]
    return (images - plain).abs().amax(dim=2) > threshold


def check_colour(
    images: Float[Tensor, "N F 3 h w"], background: Int[Tensor, "N"], prompts: list[ShapePrompt]
) -> Bool[Tensor, "N"]:
    """Whether the median of the body's pixels is nearest to a shade of the prompt's colour."""
    mask = foreground(images, background)
    saturated = images.amax(2) - images.amin(2) > 0.25  # not the front mark
    palette = torch.tensor([COLOUR_RGB[name] for name in COLOURS]).to(images)
    shades = torch.linspace(0.5, 1, 6).to(images)[:, None, None] * palette
    right = []
    for image, body, prompt in zip(images, mask & saturated, prompts, strict=True):
        pixels = image.movedim(1, -1)[body]
        if len(pixels) == 0:
            right.append(False)
            continue
        distance = (pixels.median(dim=0).values - shades).square().sum(-1).amin(0)
        right.append(COLOURS[int(distance.argmin())] == prompt.colour)
    return torch.tensor(right)


def check_shape(
    images: Float[Tensor, "N F 3 h w"], background: Int[Tensor, "N"], prompts: list[ShapePrompt]
) -> Bool[Tensor, "N"]:
    """Whether most frames' silhouettes have their highest IoU with the prompt's shape.

    Candidates are all shapes in the prompt's motion, over moments, azimuths and elevations.
    """
    masks = foreground(images, background).flatten(2).float()
    frames = masks.shape[1]
    right = torch.zeros(len(prompts), dtype=torch.bool)
    for motion in MOTIONS:
        rows = [n for n, prompt in enumerate(prompts) if prompt.motion == motion]
        if not rows:
            continue
        moments = [0.0] if motion == "standing still" else [k / 8 for k in range(8)]
        bank = torch.stack([_silhouettes(shape, motion, moments, images.device) for shape in SHAPES])
        some = masks[rows].flatten(0, 1)
        common = some @ bank.flatten(0, 1).T
        union = some.sum(-1)[:, None] + bank.flatten(0, 1).sum(-1) - common
        best = (common / union.clamp_min(1)).unflatten(1, bank.shape[:2]).amax(-1).argmax(-1)
        wanted = torch.tensor([SHAPES.index(prompts[n].shape) for n in rows]).to(best)
        votes = (best.view(-1, frames) == wanted[:, None]).float().mean(-1)
        right[rows] = (votes > 0.5).cpu()
    return right


def check_view(
    part: str,
    images: Float[Tensor, "N F 3 h w"],
    background: Int[Tensor, "N"],
    scenes: Scenes,
    num_azimuths: int = 24,
) -> Bool[Tensor, "N"]:
    """Whether the nearest ground truth at the start is seen from where the sample should be.

    For groups: from the given cameras, up to a tolerance. For images: from the side that the view
    words name, up to a tolerance at its borders.
    """
    azimuths = torch.arange(num_azimuths) * (360 / num_azimuths)
    turned = scenes.azimuth_deg[:, None] * (part == "multi_view") + azimuths[:, None]
    elevations = scenes.elevation_deg if part == "multi_view" else None
    distance = _distances(
        images, background, scenes.codes[:, None], scenes.times[:, None], turned, elevations
    )
    if part == "multi_view":
        wanted = ((azimuths + 180) % 360 - 180).abs() <= VIEW_TOLERANCE_DEG
    else:
        elevation = scenes.elevation_deg[:, :1].expand(-1, num_azimuths)
        asked = view_index("image", scenes.elevation_deg[:, :1], scenes.azimuth_deg[:, :1])
        sides = azimuths.expand_as(elevation)
        shifts = (-VIEW_TOLERANCE_DEG, 0.0, VIEW_TOLERANCE_DEG)
        wanted = torch.stack([view_index("image", elevation, sides + s) == asked for s in shifts]).any(0)
    # A round object looks the same from all sides that do not show its front: nearly as near counts.
    nearest = distance.masked_fill(~wanted.to(distance.device), torch.inf).amin(-1)
    return (nearest <= 1.1 * distance.amin(-1) + 2e-4).cpu()


def check_motion(
    images: Float[Tensor, "N F 3 h w"],
    background: Int[Tensor, "N"],
    prompts: list[ShapePrompt],
    num_azimuths: int = 24,
) -> Bool[Tensor, "N"]:
    """Whether the nearest clip, over all motions and azimuths, has the prompt's motion."""
    frames = images.shape[1]
    codes = encode_prompts(prompts)[:, None, :].repeat(1, len(MOTIONS), 1)
    codes[..., 2] = torch.arange(len(MOTIONS))
    azimuths = torch.arange(num_azimuths) * (360 / num_azimuths)
    best = []
    for k in range(len(MOTIONS)):
        times = ((torch.arange(frames) + 0.5) / frames).expand(len(prompts), 1, -1)
        turned = azimuths[:, None].expand(len(prompts), -1, frames)
        best.append(_distances(images, background, codes[:, k : k + 1], times, turned, None).amin(-1))
    nearest = torch.stack(best, dim=-1).argmin(-1).cpu()
    return nearest == torch.tensor([MOTIONS.index(prompt.motion) for prompt in prompts])


def save_grid(images: Float[Tensor, "N F 3 H W"], path: Path) -> None:
    """A PNG: eight single images a row, or one row per scene in two columns."""
    from PIL import Image

    count, frames = images.shape[:2]
    columns = min(count, 8 if frames == 1 else 2)
    images = images[: count // columns * columns]
    rows = images.unflatten(0, (-1, columns)).permute(0, 4, 1, 2, 5, 3)  # row, H, column, F, W, 3
    pixels = (rows.flatten(2, 4).flatten(0, 1) * 255).round().byte().cpu().numpy()
    Image.fromarray(pixels).save(path)


def _choose_prompts(count: int) -> list[ShapePrompt]:
    """A third held out (as far as there are enough), spread evenly over the grammar."""
    held_out, known = held_out_prompts(), training_prompts()
    num_held_out = min(len(held_out), max(1, count // 3))
    picked = [held_out[k * len(held_out) // num_held_out] for k in range(num_held_out)]
    rest = max(0, count - num_held_out)
    return picked + [known[k * len(known) // rest % len(known)] for k in range(rest)]


def _ask(part: str, prompts: list[ShapePrompt], seed: int) -> Scenes:
    """What the model is asked for: views in turn; images and groups at the start of the clip."""
    count, frames = len(prompts), FRAMES[part]
    generator = torch.Generator().manual_seed(step_seed(seed, 0, "ask"))
    index = torch.tensor([all_prompts().index(prompt) for prompt in prompts])
    elevation = torch.full((count, frames), 15.0)
    if part == "multi_view":
        first = 360 * torch.rand(count, 1, generator=generator)
        azimuth = first + 90 * torch.arange(frames)
    else:
        sides = torch.tensor([0.0, 90.0, 180.0, 270.0])
        azimuth = sides[torch.arange(count) % 4][:, None].expand(-1, frames)
    times = torch.zeros(count, frames)
    moment = torch.full((count,), 1 + MOMENTS.index(START))
    view = torch.zeros(count, dtype=torch.long)
    if part == "video":
        times = ((torch.arange(frames) + 0.5) / frames).expand(count, -1)
        moment = torch.zeros_like(moment)
    if part != "multi_view":
        view = 1 + view_index(part, elevation[:, 0], azimuth[:, 0])
    return Scenes(
        codes=encode_prompts(prompts),
        times=times,
        azimuth_deg=azimuth,
        elevation_deg=elevation,
        background=torch.tensor(BACKGROUNDS)[torch.zeros(count, dtype=torch.long)],
        text=text_row(index, moment, view),
    )


def _silhouettes(shape: str, motion: str, moments: list[float], device: torch.device) -> Float[Tensor, "K P"]:
    """Opacity over 0.5 for moments x 12 azimuths x 4 elevations."""
    grid = torch.cartesian_prod(
        torch.tensor(moments), torch.arange(12) * 30.0, torch.tensor([0.0, 10.0, 20.0, 30.0])
    ).to(device)
    cameras = orbit_cameras(
        grid[:, 2], grid[:, 1], distance=CAMERA_DISTANCE, fovy_deg=FOVY_DEG, times=grid[:, 0],
        height=CHECK_SIZE, width=CHECK_SIZE,
    )  # fmt: skip
    codes = encode_prompts([ShapePrompt(COLOURS[0], shape, motion)]).expand(len(grid), -1)
    _, opacity = render_codes(codes, cameras, torch.zeros(3), supersample=1)
    return (opacity > 0.5).float().flatten(1)


def _distances(
    images: Float[Tensor, "N F 3 h w"],
    background: Int[Tensor, "N"],
    codes: Int[Tensor, "N 1 3"],
    times: Float[Tensor, "N 1 F"],
    azimuth_deg: Float[Tensor, "N K F"],
    elevation_deg: Float[Tensor, "N F"] | None,
) -> Float[Tensor, "N K"]:
    """Mean squared differences to ground truth over K azimuths, the least over elevations if open."""
    elevations = [elevation_deg]
    if elevation_deg is None:
        elevations = [torch.full(times[:, 0].shape, degrees) for degrees in (5.0, 15.0, 25.0)]
    azimuth_deg = azimuth_deg.expand(len(images), -1, images.shape[1])
    count, candidates, frames = azimuth_deg.shape
    at_once = max(1, CANDIDATES_AT_ONCE // (candidates * frames))
    plain = torch.tensor(BACKGROUNDS)[background.cpu()]
    least = torch.full((count, candidates), torch.inf, device=images.device)
    for elevation in elevations:
        for start in range(0, count, at_once):
            rows = slice(start, min(count, start + at_once))
            size = (rows.stop - start, candidates, frames)
            cameras = orbit_cameras(
                elevation[rows, None].expand(size).flatten().to(images.device),
                azimuth_deg[rows].flatten().to(images.device),
                distance=CAMERA_DISTANCE, fovy_deg=FOVY_DEG,
                times=times[rows].expand(size).flatten().to(images.device),
                height=CHECK_SIZE, width=CHECK_SIZE,
            )  # fmt: skip
            flat_codes = codes[rows, :, None].expand(*size, 3).flatten(0, 2)
            flat_plain = plain[rows, None, None].expand(*size, 3).flatten(0, 2).to(images.device)
            rgb, _ = render_codes(flat_codes, cameras, flat_plain, supersample=1)
            error = (rgb.movedim(-1, 1).unflatten(0, size) - images[rows, None]).square()
            least[rows] = torch.minimum(least[rows], error.mean(dim=(2, 3, 4, 5)))
    return least


def _psnr_over_backgrounds(
    images: Float[Tensor, "N F 3 H W"], scenes: Scenes, truth: Float[Tensor, "N F 3 H W"]
) -> float:
    """Mean PSNR in dB against the ground truth of the nearer background."""
    other = replace(scenes, background=torch.tensor(BACKGROUNDS)[torch.ones(len(scenes), dtype=torch.long)])
    both = torch.stack([truth, render_scenes(other, images.device) / 2 + 0.5])
    error = (both - images).square().mean(dim=(2, 3, 4, 5)).amin(0)
    return float((-10 * error.log10()).mean())
