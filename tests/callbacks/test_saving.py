import logging

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import text
from PIL import Image

from fourdfy.callbacks import saving

torch.set_num_threads(1)


def gradient(frames: int = 4, height: int = 16, width: int = 24) -> torch.Tensor:
    """Frames that differ, with every channel a different ramp."""
    ramp = torch.linspace(0, 1, width).expand(frames, height, width)
    rows = torch.linspace(0, 1, height)[None, :, None].expand_as(ramp)
    clock = (torch.arange(frames) / frames)[:, None, None].expand_as(ramp)
    return torch.stack([ramp, rows, clock], dim=-1)


@pytest.fixture
def no_ffmpeg(monkeypatch):
    """A machine without ffmpeg."""
    import imageio_ffmpeg

    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    saving._has_ffmpeg.cache_clear()
    yield
    saving._has_ffmpeg.cache_clear()


# -- pixels --------------------------------------------------------------------------------------


def test_values_are_truncated_not_rounded():
    values = torch.tensor([0.0, 0.4999, 0.999, 1.0, 1.7, -0.2]).view(1, 6, 1).expand(1, 6, 3)
    assert saving.to_pixels(values)[0, :, 0].tolist() == [0, 127, 254, 255, 255, 0]


def test_values_that_are_not_finite_are_black():
    values = torch.tensor([float("nan"), float("inf")]).view(1, 2, 1)
    assert saving.to_pixels(values).tolist() == [[[0, 0, 0], [0, 0, 0]]]


def test_values_that_carry_a_graph_are_saved_all_the_same():
    assert saving.to_pixels(torch.ones(1, 1, 3, requires_grad=True) * 0.5).tolist() == [[[127, 127, 127]]]


def test_images_of_different_heights_do_not_go_side_by_side():
    with pytest.raises(ValueError, match="one height"):
        saving.side_by_side([np.zeros((2, 3, 3), np.uint8), np.zeros((4, 3, 3), np.uint8)])


def test_jet_is_blue_green_red():
    colours = saving.jet(torch.tensor([[0.0], [0.125], [0.375], [0.5], [0.625], [0.875], [1.0]]))
    assert colours.tolist() == [
        [0, 0, 0.5], [0, 0, 1], [0, 1, 1], [0.5, 1, 0.5], [1, 1, 0], [1, 0, 0], [0.5, 0, 0],
    ]  # fmt: skip


def test_near_is_hot_far_is_cold_and_nothing_is_black():
    depth = torch.tensor([2.0, 3.0, 4.0, 0.0]).view(1, 4, 1)
    near, middle, far, nothing = saving.depth_to_jet(depth, 2.0, 4.0)[0].tolist()
    assert near == [127, 0, 0]
    assert middle == [127, 255, 127]
    assert far == [0, 0, 127]
    assert nothing == [0, 0, 0]


def test_the_depth_range_is_of_the_whole_run_and_of_what_was_hit():
    depths = torch.zeros(4, 10, 5, 1)
    depths[:, :5] = torch.arange(1.0, 101.0).view(4, 5, 5, 1)
    assert saving.depth_range(list(depths)) == pytest.approx(np.percentile(np.arange(1, 101), [10, 99]))


def test_an_empty_run_has_a_depth_range():
    assert saving.depth_range([torch.zeros(2, 2, 1)]) == (0, 1)


# -- names and contents --------------------------------------------------------------------------


def test_a_validation_image_shows_rgb_beside_opacity(tmp_path):
    rgb, opacity = gradient()[1], torch.full((16, 24, 1), 0.5)
    path = saving.save_validation(tmp_path, 1000, 0, [rgb, opacity])
    assert path == tmp_path / "it1000-0.png"
    image = imageio.imread(path)
    assert image.shape == (16, 48, 3)
    assert np.array_equal(image[:, :24], saving.to_pixels(rgb))
    assert (image[:, 24:] == 127).all()


def test_a_validation_video_is_one_wide_image_and_an_mp4(tmp_path):
    rgb = gradient(frames=3)
    path = saving.save_validation_video(tmp_path, 20, 1, [rgb, torch.ones(3, 16, 24, 1)])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["it20-1_video.mp4", "it20-1_video.png"]
    image = imageio.imread(path)
    assert image.shape == (16, 6 * 24, 3)
    assert np.array_equal(image[:, 48:72], saving.to_pixels(rgb)[2])
    assert (image[:, 72:] == 255).all()
    assert imageio.get_reader(path.with_suffix(".mp4")).get_meta_data()["fps"] == 16


def test_a_test_video_has_its_frames_in_numerical_order(tmp_path):
    for index in [10, 9, 2, 1, 0]:
        saving.save_test_frame(tmp_path, 5, index, torch.full((16, 16, 3), index / 10), kind="test_static")
    path = saving.save_test_video(tmp_path, 5, kind="test_static")
    assert path == tmp_path / "it5-test_static.mp4"
    assert (tmp_path / "it5-test_static" / "10.png").exists()
    levels = [float(frame.mean()) for frame in imageio.get_reader(path)]
    assert len(levels) == 5 and levels == sorted(levels)
    assert imageio.get_reader(path).get_meta_data()["fps"] == 15


def test_a_test_video_without_frames_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="holds no frames"):
        saving.save_test_video(tmp_path, 5)


def test_depth_frames_share_one_scale(tmp_path):
    near, far = torch.full((8, 8, 1), 2.0), torch.full((8, 8, 1), 4.0)
    path = saving.save_depths(tmp_path, 7, [near, far])
    assert path == tmp_path / "it7-test-depth-jet.mp4"
    hot, cold = (imageio.imread(tmp_path / "it7-test-depth-jet" / f"{k}.png") for k in range(2))
    assert hot[0, 0].argmax() == 0 and cold[0, 0].argmax() == 2


@pytest.mark.parametrize("size", [(64, 64), (17, 33), (90, 160), (2, 2)])
def test_a_video_is_not_resized_and_odd_sizes_are_made_even(tmp_path, size):
    height, width = size
    frames = saving.to_pixels(gradient(5, height, width))
    saving.save_video(tmp_path / "clip.mp4", frames, fps=16)
    read = np.stack([*imageio.get_reader(tmp_path / "clip.mp4").iter_data()])
    assert read.shape == (5, height + height % 2, width + width % 2, 3)
    if height > 16:  # lossy, and colour at half resolution
        assert abs(read[:, :height, :width].astype(int) - frames).mean() < 6


def test_a_video_plays_everywhere(tmp_path):
    saving.save_video(tmp_path / "clip.mp4", saving.to_pixels(gradient()), fps=16)
    about = imageio.get_reader(tmp_path / "clip.mp4").get_meta_data()
    assert about["codec"] == "h264" and about["pix_fmt"].startswith("yuv420p")


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animated_image_loops_at_the_speed_of_the_clip(tmp_path, suffix):
    frames = saving.to_pixels(gradient(5, 32, 48))
    path = saving.save_clip(tmp_path / f"clip.{suffix}", frames, fps=20)
    with Image.open(path) as image:
        assert image.n_frames == 5 and image.info["loop"] == 0
        for index, frame in enumerate(frames):
            image.seek(index)
            image.load()
            assert image.info["duration"] == 50  # milliseconds
            shown = np.asarray(image.convert("RGB")).astype(int)
            assert np.abs(shown - frame).mean() < 20  # 256 colours for all of the gradient, dithered
    assert list(tmp_path.iterdir()) == [path]


def test_the_frames_of_a_gif_share_one_palette(tmp_path):
    path = saving.save_clip(tmp_path / "clip.gif", saving.to_pixels(gradient(4, 32, 48)), fps=10)
    frames = np.stack([*imageio.get_reader(path).iter_data()])[..., :3]
    assert 100 < len(np.unique(frames.reshape(-1, 3), axis=0)) <= 256
    assert len(np.unique(frames[0].reshape(-1, 3), axis=0)) < 100  # the others' colours are the rest


def test_a_clip_as_png_is_a_folder_of_its_frames(tmp_path, no_ffmpeg):
    frames = saving.to_pixels(gradient(3))
    for suffix in ("png", "mp4"):  # the latter for want of ffmpeg
        folder = saving.save_clip(tmp_path / f"{suffix}_clip.{suffix}", frames, fps=10)
        assert folder == tmp_path / f"{suffix}_clip"
        assert np.array_equal(imageio.imread(folder / "2.png"), frames[2])


def test_without_ffmpeg_there_are_frames_and_one_warning(tmp_path, no_ffmpeg, caplog):
    frames = saving.to_pixels(gradient(3))
    with caplog.at_level(logging.WARNING):
        assert saving.save_video(tmp_path / "clip.mp4", frames, fps=16) is None
        assert saving.save_video(tmp_path / "other.mp4", frames, fps=16) is None
        saving.save_test_frame(tmp_path, 1, 0, gradient()[0])
        assert saving.save_test_video(tmp_path, 1) is None
    (warning,) = caplog.records
    assert "pip install imageio-ffmpeg" in warning.getMessage()
    written = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    folders = ("clip", "other")
    assert written == sorted([f"{f}/{k}.png" for f in folders for k in range(3)] + ["it1-test/0.png"])


# -- whole files ---------------------------------------------------------------------------------


def test_a_video_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the old one")

    def frames():
        yield np.zeros((16, 16, 3), np.uint8)
        assert path.read_bytes() == b"the old one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saving.write_mp4(path, frames(), fps=16)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_an_image_that_can_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    saving.save_image(path, np.zeros((2, 2, 3), np.uint8))
    before = path.read_bytes()
    monkeypatch.setattr(saving.Path, "replace", _no_space)
    with pytest.raises(OSError, match="no space"):
        saving.save_image(path, np.ones((2, 2, 3), np.uint8))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _no_space(*args):
    raise OSError("no space")


# -- tags ----------------------------------------------------------------------------------------


def test_a_plain_prompt_is_its_own_tag():
    assert saving.sanitize_tag("a red cube, standing still") == "a_red_cube,_standing_still"
    assert saving.sanitize_tag("ein kühner Würfel") == "ein_kühner_Würfel"
    assert saving.sanitize_tag("नीला घन") == "नीला_घन"


@given(text())
def test_a_tag_is_a_safe_folder_name(prompt):
    tag = saving.sanitize_tag(prompt)
    assert 0 < len(tag.encode()) <= 100
    assert not set(tag) & set('/\\:*?"<>|\0\n\t ')
    assert not tag.startswith((".", "-")) and not tag.endswith(".")
    assert saving.sanitize_tag(tag) == tag


@given(text(), text())
def test_two_prompts_share_a_tag_only_if_they_differ_in_spaces_and_underscores(one, other):
    same = one.replace(" ", "_") == other.replace(" ", "_")
    assert (saving.sanitize_tag(one) == saving.sanitize_tag(other)) == same


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "..", ".", "", "/", "a/b", "C:\\x", "-rf", "\ud800", "a" * 300]
)
def test_a_changed_prompt_carries_a_hash(prompt):
    tag = saving.sanitize_tag(prompt)
    assert tag != prompt and len(tag.rsplit("-", 1)[-1]) == 8
    assert "/" not in tag and not tag.startswith(".")


def test_long_prompts_that_differ_at_the_end_have_different_tags():
    assert saving.sanitize_tag("ü" * 99 + "a") != saving.sanitize_tag("ü" * 99 + "b")
