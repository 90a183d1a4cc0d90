import logging
import subprocess
import time
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import text
from PIL import Image

from fourdfy.files import atomic, images, names


def gradient(frames: int = 4, height: int = 16, width: int = 24) -> torch.Tensor:
    """Frames that differ, with every channel a different ramp."""
    ramp = torch.linspace(0, 1, width).expand(frames, height, width)
    rows = torch.linspace(0, 1, height)[None, :, None].expand_as(ramp)
    clock = (torch.arange(frames) / frames)[:, None, None].expand_as(ramp)
    return torch.stack([ramp, rows, clock], dim=-1)


@pytest.fixture
def ffmpeg(monkeypatch, tmp_path_factory):
    """``ffmpeg(script)``: the machine's ffmpeg is this script; "" if it may not be run, None for none."""
    import imageio_ffmpeg

    path = tmp_path_factory.mktemp("bin") / "ffmpeg"

    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    def install(script):
        if script is not None:
            path.write_text(f"#!/bin/sh\nfor out; do :; done; out=${{out#file:}}\n{script}\n")
            path.chmod(0o755 if script else 0o644)
        find = missing if script is None else lambda: str(path)
        monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", find)

    with atomic.losses_noted():
        yield install


# -- pixels --------------------------------------------------------------------------------------


def test_values_are_truncated_not_rounded():
    values = torch.tensor([0.0, 0.4999, 0.999, 1.0, 1.7, -0.2]).view(1, 6, 1).expand(1, 6, 3)
    assert images.to_pixels(values)[0, :, 0].tolist() == [0, 127, 254, 255, 255, 0]


def test_values_that_are_not_finite_are_black():
    values = torch.tensor([float("nan"), float("inf")]).view(1, 2, 1)
    assert images.to_pixels(values).tolist() == [[[0, 0, 0], [0, 0, 0]]]


def test_values_that_carry_a_graph_are_saved_all_the_same():
    assert images.to_pixels(torch.ones(1, 1, 3, requires_grad=True) * 0.5).tolist() == [[[127, 127, 127]]]


def test_images_of_different_heights_do_not_go_side_by_side():
    with pytest.raises(ValueError, match="one height"):
        images.side_by_side([np.zeros((2, 3, 3), np.uint8), np.zeros((4, 3, 3), np.uint8)])


def test_jet_is_blue_green_red():
    colours = images.jet(torch.tensor([[0.0], [0.125], [0.375], [0.5], [0.625], [0.875], [1.0]]))
    assert colours.tolist() == [
        [0, 0, 0.5], [0, 0, 1], [0, 1, 1], [0.5, 1, 0.5], [1, 1, 0], [1, 0, 0], [0.5, 0, 0],
    ]  # fmt: skip


def test_near_is_hot_far_is_cold_and_nothing_is_black():
    depth = torch.tensor([2.0, 3.0, 4.0, 0.0]).view(1, 4, 1)
    near, middle, far, nothing = images.depth_to_jet(depth, 2.0, 4.0)[0].tolist()
    assert near == [127, 0, 0]
    assert middle == [127, 255, 127]
    assert far == [0, 0, 127]
    assert nothing == [0, 0, 0]


def test_the_depth_range_is_of_the_whole_run_and_of_what_was_hit():
    depths = torch.zeros(4, 10, 5, 1)
    depths[:, :5] = torch.arange(1.0, 101.0).view(4, 5, 5, 1)
    assert images.depth_range(list(depths)) == pytest.approx(np.percentile(np.arange(1, 101), [10, 99]))


def test_an_empty_run_has_a_depth_range():
    assert images.depth_range([torch.zeros(2, 2, 1)]) == (0, 1)


# -- names and contents --------------------------------------------------------------------------


def test_a_validation_image_shows_rgb_beside_opacity(tmp_path):
    rgb, opacity = gradient()[1], torch.full((16, 24, 1), 0.5)
    path = images.save_validation(tmp_path, 1000, 0, [rgb, opacity])
    assert path == tmp_path / "it1000-0.png"
    image = imageio.imread(path)
    assert image.shape == (16, 48, 3)
    assert np.array_equal(image[:, :24], images.to_pixels(rgb))
    assert (image[:, 24:] == 127).all()


def test_a_validation_video_is_one_wide_image_and_an_mp4(tmp_path):
    rgb = gradient(frames=3)
    path = images.save_validation_video(tmp_path, 20, 1, [rgb, torch.ones(3, 16, 24, 1)])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["it20-1_video.mp4", "it20-1_video.png"]
    image = imageio.imread(path)
    assert image.shape == (16, 6 * 24, 3)
    assert np.array_equal(image[:, 48:72], images.to_pixels(rgb)[2])
    assert (image[:, 72:] == 255).all()
    assert imageio.get_reader(path.with_suffix(".mp4")).get_meta_data()["fps"] == 16


def test_a_test_is_its_frames_and_a_video_of_them_in_order(tmp_path):
    frames = [torch.full((16, 16, 3), index / 11) for index in range(11)]
    path = images.save_test(tmp_path, 5, frames, kind="test_static")
    assert path == tmp_path / "it5-test_static.mp4"
    assert imageio.imread(tmp_path / "it5-test_static" / "10.png")[0, 0, 0] == int(10 / 11 * 255)
    levels = [float(frame.mean()) for frame in imageio.get_reader(path)]
    assert len(levels) == 11 and levels == sorted(levels)
    assert imageio.get_reader(path).get_meta_data()["fps"] == 15


@pytest.mark.parametrize("size", [(64, 64), (17, 33), (90, 160), (2, 2)])
def test_a_video_is_not_resized_and_odd_sizes_are_made_even(tmp_path, size):
    height, width = size
    frames = images.to_pixels(gradient(5, height, width))
    images.save_video(tmp_path / "clip.mp4", frames, fps=16)
    read = np.stack([*imageio.get_reader(tmp_path / "clip.mp4").iter_data()])
    assert read.shape == (5, height + height % 2, width + width % 2, 3)
    if height > 16:  # lossy, and colour at half resolution
        assert abs(read[:, :height, :width].astype(int) - frames).mean() < 6


def test_a_video_plays_everywhere(tmp_path):
    images.save_video(tmp_path / "clip.mp4", images.to_pixels(gradient()), fps=16)
    about = imageio.get_reader(tmp_path / "clip.mp4").get_meta_data()
    assert about["codec"] == "h264" and about["pix_fmt"].startswith("yuv420p")


def test_a_video_is_in_the_colours_that_its_tags_say(tmp_path):
    """Red by BT.709 in limited range: Y = 16 + 219 * 0.2126, and so on; by BT.601, Y would be 81."""
    red = np.zeros((3, 16, 16, 3), np.uint8)
    red[..., 0] = 255
    for name in ("clip.mp4", "clip.webm"):
        images.save_video(tmp_path / name, red, fps=16)
        tags, planes = decode(tmp_path / name)
        y, u, v = (planes[at] for at in (0, 16 * 16, 16 * 16 * 5 // 4))
        assert np.abs(np.array([y, u, v]) - [62.6, 102.3, 240]).max() < 2, name
        assert "(tv, bt709, progressive)" in tags, name


def test_an_mp4_begins_with_its_index(tmp_path):
    """So that a page plays it before all of it is there."""
    images.save_video(tmp_path / "clip.mp4", images.to_pixels(gradient()), fps=16)
    content = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_a_webm_keeps_opacity(tmp_path):
    frames = np.concatenate([images.to_pixels(gradient()), np.zeros((4, 16, 24, 1), np.uint8)], axis=-1)
    frames[..., 3] = 10 * np.arange(24)
    images.save_video(tmp_path / "clip.webm", frames, fps=16)
    _, planes = decode(tmp_path / "clip.webm", "-c:v", "libvpx-vp9", pixel_format="yuva420p")
    opacity = planes[: 16 * 24 * 5 // 2][-16 * 24 :].reshape(16, 24)
    assert np.abs(opacity.astype(int) - 10 * np.arange(24)).max() < 8


def decode(path, *options, pixel_format="yuv420p"):
    """What ffmpeg says of a video's stream, and the bytes of its planes."""
    ffmpeg = images._ffmpeg()
    about = subprocess.run([ffmpeg, "-i", path], capture_output=True, text=True).stderr
    raw = ["-f", "rawvideo", "-pix_fmt", pixel_format, "-"]
    planes = subprocess.run([ffmpeg, "-v", "error", *options, "-i", path, *raw], capture_output=True).stdout
    return next(line for line in about.splitlines() if "Video:" in line), np.frombuffer(planes, np.uint8)


@pytest.mark.parametrize("fps", [15, 15.5, 24, 60])
def test_every_format_lasts_as_long_as_the_clip(tmp_path, fps):
    frames = images.to_pixels(gradient(31, 16, 16))
    for suffix, tick in (("gif", 0.01), ("webp", 0.001), ("mp4", 0.001)):
        path = images.save_clip(tmp_path / f"clip.{suffix}", frames, fps=fps)
        if suffix == "mp4":
            seconds = imageio.get_reader(path).get_meta_data()["duration"]  # to a hundredth
        else:
            with Image.open(path) as image:
                assert image.info["loop"] == 0
                durations = [duration_of(image, index) for index in range(image.n_frames)]
            assert min(durations) >= 0.02 if suffix == "gif" else True  # else browsers take 0.1
            seconds = sum(durations)
        assert seconds == pytest.approx(31 / fps, abs=max(tick, 0.01)), suffix


def duration_of(image, index):
    image.seek(index)
    image.load()
    return image.info["duration"] / 1000


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animated_image_shows_the_frames(tmp_path, suffix):
    frames = images.to_pixels(gradient(5, 32, 48))
    path = images.save_clip(tmp_path / f"clip.{suffix}", frames, fps=20)
    with Image.open(path) as image:
        assert image.n_frames == 5
        for index, frame in enumerate(frames):
            assert duration_of(image, index) == 0.05
            shown = np.asarray(image.convert("RGB")).astype(int)
            assert np.abs(shown - frame).mean() < 20  # 256 colours for all of the gradient, dithered
    assert list(tmp_path.iterdir()) == [path]


def test_a_gif_of_one_frame_of_a_fast_clip_shows_it(tmp_path):
    images.save_animated_image(tmp_path / "clip.gif", images.to_pixels(gradient(1)), fps=240)
    assert imageio.get_reader(tmp_path / "clip.gif").get_length() == 1


def test_the_frames_of_a_gif_share_one_palette(tmp_path):
    path = images.save_clip(tmp_path / "clip.gif", images.to_pixels(gradient(4, 32, 48)), fps=10)
    frames = np.stack([*imageio.get_reader(path).iter_data()])[..., :3]
    assert 100 < len(np.unique(frames.reshape(-1, 3), axis=0)) <= 256
    assert len(np.unique(frames[0].reshape(-1, 3), axis=0)) < 100  # the others' colours are the rest


def test_a_clip_as_png_is_a_folder_of_its_frames(tmp_path, ffmpeg):
    frames = images.to_pixels(gradient(3))
    ffmpeg(None)
    for suffix in ("png", "mp4"):  # the latter for want of ffmpeg
        folder = images.save_clip(tmp_path / f"{suffix}_clip.{suffix}", frames, fps=10)
        assert folder == tmp_path / f"{suffix}_clip"
        assert np.array_equal(imageio.imread(folder / "2.png"), frames[2])


BROKEN = {
    "missing": (None, "pip install imageio-ffmpeg"),
    "without libx264": ("echo \"Unknown encoder 'libx264'\" >&2; exit 8", "Unknown encoder 'libx264'"),
    "dies": ("head -c 100 >/dev/null; kill -9 $$", "status -9"),
    "does not start": ("", "does not start"),
    "hangs": ("exec sleep 60", "did not finish within 0.3 s"),
    "writes nothing": ("cat >/dev/null", "not a valid mp4"),
    "writes an empty file": ('cat >/dev/null; : >"$out"', "not a valid mp4"),
    "writes rubbish": ('cat >/dev/null; echo rubbish >"$out"', "not a valid mp4"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_without_a_working_encoder_there_are_frames_and_one_warning(
    tmp_path, ffmpeg, monkeypatch, caplog, how
):
    script, said = BROKEN[how]
    ffmpeg(script)
    monkeypatch.setattr(images, "ENCODER_SECONDS", 0.3 if how == "hangs" else 30)
    monkeypatch.setattr(images, "ENCODER_SECONDS_PER_FRAME", 0)
    frames = images.to_pixels(gradient(3, 160, 160))  # more than a pipe holds
    with caplog.at_level(logging.WARNING):
        assert images.save_video(tmp_path / "clip.mp4", frames, fps=16) is None
        assert images.save_test(tmp_path, 1, [gradient()[0]]) is None
    (warning,) = caplog.records
    assert said in warning.getMessage() and "PNG frames instead" in warning.getMessage()
    written = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert written == [*(f"clip/{k}.png" for k in range(3)), "it1-test/0.png"]


def test_what_an_encoder_has_started_ends_with_it(tmp_path, ffmpeg, monkeypatch):
    ffmpeg(f"sleep 60 & echo $! >{tmp_path}/child; wait")
    monkeypatch.setattr(images, "ENCODER_SECONDS", 0.3)
    monkeypatch.setattr(images, "ENCODER_SECONDS_PER_FRAME", 0)
    began = time.monotonic()
    assert images.save_video(tmp_path / "clip.mp4", images.to_pixels(gradient(2)), fps=16) is None
    while is_running((tmp_path / "child").read_text().strip()):  # a signal needs a moment
        assert time.monotonic() - began < 30
        time.sleep(0.01)


def is_running(pid):
    try:
        return Path("/proc", pid, "stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_encoder_that_hangs_costs_its_limit_once_in_a_run(tmp_path, ffmpeg, monkeypatch):
    ffmpeg(f"echo >>{tmp_path}/started; exec sleep 60")
    monkeypatch.setattr(images, "ENCODER_SECONDS", 0.2)
    monkeypatch.setattr(images, "ENCODER_SECONDS_PER_FRAME", 0)
    frames = images.to_pixels(gradient(2))
    for name in ("a.mp4", "b.webm"):
        assert images.save_video(tmp_path / name, frames, fps=16) is None
    assert (tmp_path / "started").read_text() == "\n"
    assert {path.parent.name for path in tmp_path.rglob("1.png")} == {"a", "b"}
    with atomic.losses_noted():  # another run
        images.save_video(tmp_path / "c.mp4", frames, fps=16)
    assert (tmp_path / "started").read_text() == "\n\n"


# -- whole files ---------------------------------------------------------------------------------


def test_a_video_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path, ffmpeg):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the old one")
    ffmpeg('echo half >"$out"; exit 1')
    with pytest.raises(images.EncoderError):
        images.write_video(path, np.zeros((2, 16, 16, 3), np.uint8), fps=16)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_an_image_that_can_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    images.save_image(path, np.zeros((2, 2, 3), np.uint8))
    before = path.read_bytes()
    monkeypatch.setattr(images.Path, "replace", _no_space)
    with pytest.raises(atomic.WriteError, match=r"image.png can't be written: no space; the file of before"):
        images.save_image(path, np.ones((2, 2, 3), np.uint8))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _no_space(*args):
    raise OSError("no space")


# -- tags ----------------------------------------------------------------------------------------


def test_a_plain_prompt_is_its_own_tag():
    assert names.sanitize_tag("a red cube, standing still") == "a_red_cube,_standing_still"
    assert names.sanitize_tag("ein kühner Würfel") == "ein_kühner_Würfel"
    assert names.sanitize_tag("नीला घन") == "नीला_घन"


@given(text())
def test_a_tag_is_a_safe_folder_name(prompt):
    tag = names.sanitize_tag(prompt)
    assert 0 < len(tag.encode()) <= 100
    assert not set(tag) & set('/\\:*?"<>|\0\n\t ')
    assert not tag.startswith((".", "-")) and not tag.endswith(".")
    assert names.sanitize_tag(tag) == tag


@given(text(), text())
def test_two_prompts_share_a_tag_only_if_they_differ_in_spaces_and_underscores(one, other):
    same = one.replace(" ", "_") == other.replace(" ", "_")
    assert (names.sanitize_tag(one) == names.sanitize_tag(other)) == same


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "..", ".", "", "/", "a/b", "C:\\x", "-rf", "\ud800", "a" * 300]
)
def test_a_changed_prompt_carries_a_hash(prompt):
    tag = names.sanitize_tag(prompt)
    assert tag != prompt and len(tag.rsplit("-", 1)[-1]) == 8
    assert "/" not in tag and not tag.startswith(".")


def test_long_prompts_that_differ_at_the_end_have_different_tags():
    assert names.sanitize_tag("ü" * 99 + "a") != names.sanitize_tag("ü" * 99 + "b")
