"""Images and videos of a trial's ``save`` folder, under the names of threestudio and 4D-fy.

``it{step}-{i}.png``, ``it{step}-{i}_video.png`` and ``.mp4`` (validation);
``it{step}-test/{i}.png`` and ``it{step}-test.mp4``, likewise ``-test_static``, ``-test-normal``,
``-test-normal_static`` and ``-test-depth-jet``; ``it{step}-test-depth/{i}.png``, depth in 16 bit.
A file appears under its name when it is whole, never before.

F frames, H x W pixels. Values are 0..1 floats; pixels are 8 bit where nothing else is said. A depth is
``ops.compositing.expected_depth``: a distance from the camera in scene units, 0 where there is nothing.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from jaxtyping import Float, UInt8, UInt16
from numpy import ndarray
from torch import Tensor

logger = logging.getLogger(__name__)

VALIDATION_FPS = 16
TEST_FPS = 15
DEPTH_PERCENTILES = (10.0, 99.0)
DEPTH_SCALE = 1000
"""Of a 16-bit depth image: its value for one scene unit."""
MAX_TAG_BYTES = 100

Pixels = UInt8[ndarray, "_ _ 3"]
Clip = UInt8[ndarray, "_ _ _ 3"]


# ---------------------------------------------------------------------------------------------
# What a run saves


def save_validation(save_dir: Path, step: int, index: int, images: Sequence[Float[Tensor, "H W _"]]) -> Path:
    """``it{step}-{index}.png``: RGB, normals where there are any, and opacity side by side."""
    path = save_dir / f"it{step}-{index}.png"
    save_image(path, side_by_side([to_pixels(image) for image in images]))
    return path


def save_validation_video(
    save_dir: Path, step: int, index: int, clips: Sequence[Float[Tensor, "F H W _"]]
) -> Path:
    """``it{step}-{index}_video.png``: all RGB frames, then all of the next clip, in one wide image; and
    the RGB frames as ``.mp4``. Gives the path of the image."""
    path = save_dir / f"it{step}-{index}_video.png"
    pixels = [to_pixels(clip) for clip in clips]
    save_image(path, side_by_side([frame for clip in pixels for frame in clip]))
    save_video(path.with_suffix(".mp4"), pixels[0], fps=VALIDATION_FPS)
    return path


def save_test_frame(
    save_dir: Path, step: int, index: int, rgb: Float[Tensor, "H W 3"], *, kind: str = "test"
) -> Path:
    """``it{step}-{kind}/{index}.png``; ``kind`` is "test", "test-normal", "test_static", ..."""
    path = save_dir / f"it{step}-{kind}" / f"{index}.png"
    save_image(path, to_pixels(rgb))
    return path


def save_test_video(save_dir: Path, step: int, *, kind: str = "test") -> Path | None:
    """``it{step}-{kind}.mp4`` from the frames that ``save_test_frame`` wrote, in order of their number.

    None, with one warning, where there is no ffmpeg: the frames are all there is.

    Raises:
        ValueError: there are no frames.
    """
    folder = save_dir / f"it{step}-{kind}"
    numbered = [file for file in folder.glob("*.png") if file.stem.isdecimal()]
    files = sorted(numbered, key=lambda file: int(file.stem))
    if not files:
        raise ValueError(f"{folder} holds no frames; call save_test_frame(..., kind={kind!r}) first")
    path = save_dir / f"it{step}-{kind}.mp4"
    if not _has_ffmpeg():
        return None
    write_mp4(path, (imageio.imread(file) for file in files), fps=TEST_FPS)
    return path


def save_depths(save_dir: Path, step: int, depths: Sequence[Float[Tensor, "H W 1"]]) -> Path | None:
    """``it{step}-test-depth/{i}.png``: 16-bit grey, ``DEPTH_SCALE`` times the depth; 0 is the background.

    ``it{step}-test-depth-jet/{i}.png`` and its mp4 show the same in one colour scale for the whole run.
    """
    near, far = depth_range(depths)
    for index, depth in enumerate(depths):
        values = (depth[..., 0] * DEPTH_SCALE).round().clamp(0, 2**16 - 1)
        save_image(save_dir / f"it{step}-test-depth" / f"{index}.png", values.cpu().numpy().astype(np.uint16))
        save_image(save_dir / f"it{step}-test-depth-jet" / f"{index}.png", depth_to_jet(depth, near, far))
    return save_test_video(save_dir, step, kind="test-depth-jet")


# ---------------------------------------------------------------------------------------------
# Pixels


def to_pixels(values: Float[Tensor, "*F H W C"]) -> UInt8[ndarray, "*F H W 3"]:
    """``value * 255`` truncated to 8 bit, one channel repeated to grey; not finite is black."""
    scaled = values.detach().float().nan_to_num(0, 0, 0).clamp(0, 1) * 255
    pixels = scaled.to(torch.uint8).cpu().numpy()
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def side_by_side(images: Sequence[Pixels]) -> Pixels:
    """Images of one height in one row.

    Raises:
        ValueError: none were given, or heights differ.
    """
    heights = sorted({len(image) for image in images})
    if len(heights) != 1:
        raise ValueError(f"images side by side need one height, got {heights}")
    return np.concatenate(images, axis=1)


def depth_range(depths: Sequence[Float[Tensor, "H W 1"]]) -> tuple[float, float]:
    """Percentiles 10 and 99 of all depths but the background's zeros; (0, 1) where there are none."""
    nonzero = [depth[depth != 0].detach().float().cpu().numpy() for depth in depths]
    values = np.concatenate(nonzero) if nonzero else np.zeros(0)
    if not len(values):
        return 0.0, 1.0
    near, far = np.percentile(values, DEPTH_PERCENTILES)
    return float(near), float(far)


def depth_to_jet(depth: Float[Tensor, "*F H W 1"], near: float, far: float) -> UInt8[ndarray, "*F H W 3"]:
    """Depth clipped to ``near``..``far`` in the JET colour map: near is red, far is blue.

    The background, a depth of exactly zero, is black, which is not in the map.
    """
    closeness = 1 - ((depth - near) / max(far - near, 1e-6)).clamp(0, 1)
    return to_pixels(torch.where(depth == 0, 0.0, jet(closeness)))


def jet(values: Float[Tensor, "*F 1"]) -> Float[Tensor, "*F 3"]:
    """The JET colour map, 0 (dark blue) over 0.5 (green) to 1 (dark red): three shifted trapezoids."""
    peaks = torch.tensor([3.0, 2.0, 1.0]).to(values)
    return (1.5 - (4 * values - peaks).abs()).clamp(0, 1)


# ---------------------------------------------------------------------------------------------
# Files


def save_image(path: Path, pixels: Pixels | UInt16[ndarray, "_ _"]) -> None:
    """Write a PNG: 8-bit colours, or 16-bit grey."""
    encoded = io.BytesIO()
    imageio.imwrite(encoded, pixels, format="png")
    with whole_file(path) as half_written:
        half_written.write_bytes(encoded.getvalue())


def save_clip(path: Path, frames: Clip, *, fps: int) -> Path:
    """Write frames as the suffix of ``path`` says: mp4, gif, webp, or png for a folder of them.

    Gives the file or the folder; for an mp4 without ffmpeg the folder, see ``save_video``.
    """
    if path.suffix == ".png":
        return save_frames(path.with_suffix(""), frames)
    if path.suffix == ".mp4":
        return save_video(path, frames, fps=fps) or path.with_suffix("")
    save_animated_image(path, frames, fps=fps)
    return path


def save_frames(folder: Path, frames: Clip) -> Path:
    """Write ``{i}.png`` and give the folder."""
    for index, frame in enumerate(frames):
        save_image(folder / f"{index}.png", frame)
    return folder


def save_animated_image(path: Path, frames: Clip, *, fps: int) -> None:
    """An endless loop as GIF or WebP. A GIF has one palette for all frames, so that nothing flickers,
    and hundredths of a second between them."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    options: dict[str, Any] = {"duration": 1000 / fps, "quality": 85, "method": 4}
    if path.suffix == ".gif":
        # Chosen from all frames, in one picture.
        palette = Image.fromarray(np.concatenate(frames)).quantize(256, method=Image.Quantize.MEDIANCUT)
        images = [image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images]
        options = {"duration": 10 * max(2, round(100 / fps))}
    with whole_file(path) as half_written:
        images[0].save(half_written, save_all=True, append_images=images[1:], loop=0, **options)


def save_video(path: Path, frames: Clip, *, fps: int) -> Path | None:
    """Write an mp4 and give its path.

    Without ffmpeg: None, one warning, and the frames as ``{i}.png`` in a folder of the video's name.
    """
    if _has_ffmpeg():
        write_mp4(path, frames, fps=fps)
        return path
    save_frames(path.with_suffix(""), frames)
    return None


def write_mp4(path: Path, frames: Iterator[Pixels] | Clip, *, fps: int) -> None:
    """H.264, yuv420p, which every player knows. Needs ffmpeg.

    yuv420p wants even sizes: an odd image repeats its last row or column. Nothing is resized.
    """
    # macro_block_size 1, since imageio's default of 16 resizes to a multiple of 16.
    options = {"codec": "libx264", "pixelformat": "yuv420p", "macro_block_size": 1, "quality": 8}
    with (
        whole_file(path) as half_written,
        # closing: imageio's own context leaves ffmpeg running, and its file open, on an error.
        closing(imageio.get_writer(half_written, format="FFMPEG", fps=fps, **options)) as writer,
    ):
        for frame in frames:
            height, width = frame.shape[:2]
            writer.append_data(np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder (made if missing); renamed to ``path`` on success, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers choose the format by it.
    half_written = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield half_written
        half_written.replace(path)
    finally:
        half_written.unlink(missing_ok=True)


def sanitize_tag(text: str) -> str:
    """A folder name made from a prompt: at most 100 bytes, no separators, no leading dots.

    Spaces become underscores; that alone is no other name, as threestudio's configs do it too. Where
    anything else changes, a hash of the text keeps two prompts from sharing a folder.
    """
    plain = text.replace(" ", "_")
    safe = "".join(
        letter if unicodedata.category(letter)[0] in "LMN" or letter in "_-.,'!+=@()" else "_"
        for letter in unicodedata.normalize("NFC", plain)
    )
    safe = safe.lstrip(".-")
    if safe == plain and safe and not safe.endswith(".") and len(safe.encode()) <= MAX_TAG_BYTES:
        return safe
    digest = hashlib.blake2b(plain.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    kept = safe.encode()[: MAX_TAG_BYTES - len(digest) - 1].decode(errors="ignore")
    return f"{kept.rstrip('.')}-{digest}".lstrip("-")


@cache
def _has_ffmpeg() -> bool:
    """Whether mp4 files can be written; says so once if not."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        logger.warning(
            "ffmpeg is missing, so no videos, only PNG frames; pip install imageio-ffmpeg (%s)", error
        )
        return False
    return True
