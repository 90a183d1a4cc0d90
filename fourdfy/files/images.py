"""Images and videos of a trial's ``save`` folder, under the names of threestudio and 4D-fy.

``it{step}-{i}.png``, ``it{step}-{i}_video.png`` and ``.mp4`` (validation);
``it{step}-test/{i}.png`` and ``it{step}-test.mp4``, likewise ``-test_static``, ``-test-normal``,
``-test-normal_static`` and ``-test-depth-jet``; ``it{step}-test-depth/{i}.png``, depth in 16 bit.
A file appears under its name only when it is complete.

F frames, H x W pixels. Values are 0..1 floats; pixels are 8 bit unless stated otherwise. A depth is
``ops.compositing.expected_depth``: a distance from the camera in scene units, 0 where there is nothing.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8, UInt16
from numpy import ndarray
from torch import Tensor

from fourdfy.files.atomic import is_lost, lost, whole_file, write_whole

VALIDATION_FPS = 16
TEST_FPS = 15
DEPTH_PERCENTILES = (10.0, 99.0)
DEPTH_SCALE = 1000
"""The value of a 16-bit depth image that stands for one scene unit."""

BT709 = (
    "scale=out_color_matrix=bt709:out_range=tv,"
    "setparams=color_primaries=bt709:color_trc=bt709:colorspace=bt709:range=tv"
)
"""Without these, ffmpeg silently converts by BT.601, while players assume BT.709 for HD."""
ENCODERS = {
    ".mp4": ["-c:v", "libx264", "-crf", "10", "-movflags", "+faststart"],
    ".webm": ["-c:v", "libvpx-vp9", "-crf", "15", "-b:v", "0"],
}
SIGNATURES = {".mp4": (4, b"ftyp"), ".webm": (0, b"\x1aE\xdf\xa3")}
"""The offset and bytes by which such a file is recognised."""
ENCODER_SECONDS, ENCODER_SECONDS_PER_FRAME = 30.0, 1.0
"""Seconds after which an encoder counts as hung; a hundred times what a video needs."""
ALL_VIDEOS = "videos from here on"
"""What is lost for the rest of a run once an encoder has hung."""
MAX_GIF_FPS = 50.0
"""Browsers slow down GIFs that are faster."""

Pixels = UInt8[ndarray, "_ _ C"]
Clip = UInt8[ndarray, "_ _ _ C"]
"""C is 3, or 4 with opacity."""


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
    the RGB frames as ``.mp4``. Returns the path of the image."""
    path = save_dir / f"it{step}-{index}_video.png"
    pixels = [to_pixels(clip) for clip in clips]
    save_image(path, side_by_side([frame for clip in pixels for frame in clip]))
    save_video(path.with_suffix(".mp4"), pixels[0], fps=VALIDATION_FPS)
    return path


def save_test(
    save_dir: Path, step: int, images: Sequence[Float[Tensor, "H W _"]], *, kind: str = "test"
) -> Path | None:
    """``it{step}-{kind}/{i}.png`` and ``it{step}-{kind}.mp4``; ``kind`` is "test", "test-normal", ...

    Returns the video's path, or None, with a warning, if it can't be encoded.
    """
    return _save_frames_and_video(save_dir / f"it{step}-{kind}", to_pixels(torch.stack([*images])))


def save_depths(save_dir: Path, step: int, depths: Sequence[Float[Tensor, "H W 1"]]) -> Path | None:
    """``it{step}-test-depth/{i}.png``: 16-bit grey, ``DEPTH_SCALE`` times the depth; 0 is the background.

    ``it{step}-test-depth-jet/{i}.png`` and its mp4 show the same in one colour scale for the whole run.
    """
    values = (torch.stack([*depths])[..., 0] * DEPTH_SCALE).round().clamp(0, 2**16 - 1)
    save_frames(save_dir / f"it{step}-test-depth", values.cpu().numpy().astype(np.uint16))
    frames = depth_to_jet(torch.stack([*depths]), *depth_range(depths))
    return _save_frames_and_video(save_dir / f"it{step}-test-depth-jet", frames)


def _save_frames_and_video(folder: Path, frames: Clip) -> Path | None:
    save_frames(folder, frames)
    video = folder.with_name(f"{folder.name}.mp4")
    return video if _encoded(video, frames, TEST_FPS) else None


# ---------------------------------------------------------------------------------------------
# Pixels


def to_pixels(values: Float[Tensor, "*F H W C"]) -> UInt8[ndarray, "*F H W _"]:
    """``value * 255`` truncated to 8 bit; one channel becomes grey, and non-finite values black."""
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
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    write_whole(path, encoded.getvalue())


def save_clip(path: Path, frames: Clip, *, fps: float | int) -> Path:
    """Write frames as the suffix of ``path`` says: mp4, webm, gif, webp, or png for a folder of them.

    Every one of them lasts ``len(frames) / fps`` seconds, to the nearest tick of its clock. Returns the
    file or the folder; for a video that can't be encoded, the folder (see ``save_video``).
    """
    if path.suffix == ".png":
        return save_frames(path.with_suffix(""), frames)
    if path.suffix in ENCODERS:
        return save_video(path, frames, fps=fps) or path.with_suffix("")
    save_animated_image(path, frames, fps=fps)
    return path


def save_frames(folder: Path, frames: Clip | UInt16[ndarray, "F _ _"]) -> Path:
    """Write ``{i}.png``, in the place of all that are there, and return the folder."""
    for index, frame in enumerate(frames):
        save_image(folder / f"{index}.png", frame)
    for file in folder.glob("*.png"):
        if file.stem.isdecimal() and int(file.stem) >= len(frames):
            file.unlink()
    return folder


def save_animated_image(path: Path, frames: Clip, *, fps: float | int) -> None:
    """An endless loop as GIF or WebP. A GIF has one palette for all frames, so that nothing flickers, no
    opacity, and at most ``MAX_GIF_FPS``; frames beyond that are left out."""
    from PIL import Image

    if path.suffix == ".gif":
        shown = _resampled(frames[..., :3], fps, MAX_GIF_FPS)
        # Chosen from all frames, in one picture.
        palette = Image.fromarray(np.concatenate(shown)).quantize(256, method=Image.Quantize.MEDIANCUT)
        images = [
            Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
            for frame in shown
        ]
        options: dict[str, Any] = {"duration": _durations(len(shown), min(fps, MAX_GIF_FPS), tick=10)}
    else:
        images = [Image.fromarray(frame) for frame in frames]
        options = {"duration": _durations(len(frames), fps, tick=1), "quality": 85, "method": 4}
    with whole_file(path) as half_written:
        images[0].save(half_written, save_all=True, append_images=images[1:], loop=0, **options)


def _resampled(frames: Clip, fps: float | int, most: float) -> Clip:
    """The frames shown at the ticks of a clock of ``most`` Hz, if ``fps`` is above that; else all."""
    if fps <= most:
        return frames
    return frames[(np.arange(max(1, round(len(frames) * most / fps))) * fps / most).astype(int)]


def _durations(count: int, fps: float | int, *, tick: int) -> list[int]:
    """Milliseconds for each frame, in whole ticks, that never drift from the clip's time."""
    return np.diff(np.round(np.arange(count + 1) * 1000 / (fps * tick)) * tick).astype(int).tolist()


class EncoderError(Exception):
    """The video encoder is missing, failed, hung, or wrote something else."""


class EncoderHungError(EncoderError):
    """It did not end in time, and would take that time again."""


def save_video(path: Path, frames: Clip, *, fps: float | int) -> Path | None:
    """Write an mp4 or webm and return its path.

    If it can't be encoded, return None, warn, and write the frames as ``{i}.png`` into a folder of the
    video's name.
    """
    if _encoded(path, frames, fps):
        return path
    save_frames(path.with_suffix(""), frames)
    return None


def _encoded(path: Path, frames: Clip, fps: float | int) -> bool:
    if is_lost(ALL_VIDEOS):
        return False
    try:
        write_video(path, frames, fps=fps)
    except EncoderError as error:
        what = ALL_VIDEOS if isinstance(error, EncoderHungError) else "videos"
        lost(what, f"{error}; there are PNG frames instead")
        return False
    return True


def write_video(path: Path, frames: Clip, *, fps: float | int) -> None:
    """``.mp4``: H.264, yuv420p, its index in front, which every player knows. ``.webm``: VP9 with opacity,
    where the frames have it. Both are converted to BT.709 and tagged as such.

    yuv420p requires even sizes: an odd image repeats its last row or column. Nothing is resized.

    Raises:
        EncoderError: the encoder wrote no such file.
    """
    height, width, channels = frames.shape[1:]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    stored = "yuva420p" if channels == 4 and path.suffix == ".webm" else "yuv420p"
    at, signature = SIGNATURES[path.suffix]
    seconds = ENCODER_SECONDS + ENCODER_SECONDS_PER_FRAME * len(frames)
    with whole_file(path) as half_written:
        command = [
            _ffmpeg(), "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", {3: "rgb24", 4: "rgba"}[channels],
            "-s", f"{even.shape[2]}x{even.shape[1]}", "-framerate", f"{fps}", "-i", "-",
            "-vf", BT709, *ENCODERS[path.suffix], "-pix_fmt", stored, f"file:{half_written}",
        ]  # fmt: skip
        try:
            status, said = _run(command, even.data.cast("B"), seconds)
        except subprocess.TimeoutExpired as error:
            raise EncoderHungError(f"ffmpeg did not finish within {seconds:g} s") from error
        except OSError as error:
            raise EncoderError(f"ffmpeg does not start: {error}; check IMAGEIO_FFMPEG_EXE") from error
        if status:
            lines = said.decode(errors="replace").strip().splitlines() or ["it did not say why"]
            raise EncoderError(f"ffmpeg failed with status {status}: {lines[0]}")
        if not half_written.is_file() or not half_written.read_bytes().startswith(signature, at):
            raise EncoderError(f"what ffmpeg wrote is not a valid {path.suffix[1:]} file")


def _run(command: Sequence[str], given: Any, seconds: float | int) -> tuple[int, bytes]:
    """Exit status and stderr of a command; if it takes longer, it and all that it started are killed."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, process_group=0
    ) as process:
        try:
            _, said = process.communicate(given, timeout=seconds)
        except BaseException:
            process.kill()
            if hasattr(os, "killpg"):  # not on Windows
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said


def _ffmpeg() -> str:
    """The encoder's path."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise EncoderError(f"ffmpeg is missing; pip install imageio-ffmpeg ({error})") from error
