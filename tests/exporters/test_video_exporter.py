import json
from dataclasses import replace

import imageio.v2 as imageio
import numpy as np
import pygltflib
import pytest
import torch
from PIL import Image

from fourdfy.config import ConfigError, parse_config
from fourdfy.exporters.all_exporter import AllExporter
from fourdfy.exporters.camera_path import save_cameras
from fourdfy.exporters.video_exporter import VideoExporter
from fourdfy.ops.cameras import orbit_cameras
from tests.exporters.scenes import make_trained


def export(folder, **keys):
    return VideoExporter(parse_config(VideoExporter.Config, keys)).export(make_trained(), folder)


def test_all_formats_hold_all_frames_in_order(tmp_path):
    files = export(tmp_path, formats=["mp4", "gif", "webp", "png"], depth=False, frames_at_once=4)
    assert [file.name for file in files] == [
        "test.mp4", "test.gif", "test.webp", "test", "test_transforms.json",
    ]  # fmt: skip
    frames = np.stack([imageio.imread(tmp_path / "test" / f"{k}.png") for k in range(6)])
    assert (frames.mean((1, 2, 3)) == [0, 51, 102, 153, 204, 255]).all()  # brightness is time
    for file in files[:3]:
        read = np.stack([*imageio.get_reader(file).iter_data()])[..., :3]
        assert np.abs(read.astype(int) - frames).mean() < 3, file.name
    images = [frame["file_path"] for frame in json.loads(files[-1].read_text())["frames"]]
    assert images == [f"test/{k}.png" for k in range(6)] and (tmp_path / images[5]).exists()


def test_depth_is_near_red_and_far_blue(tmp_path):
    files = export(tmp_path, formats=["png"])
    assert [file.name for file in files] == [
        "test", "test_depth", "test_depth.npz", "test_transforms.json",
    ]  # fmt: skip
    depth = imageio.imread(tmp_path / "test_depth" / "3.png")
    assert depth[0, 0].argmax() == 0 and depth[0, -1].argmax() == 2
    numbers = np.load(tmp_path / "test_depth.npz")["depth"]
    assert numbers.shape == (6, 12, 16) and numbers.dtype == np.float32
    assert numbers[3, 0] == pytest.approx(np.linspace(2, 4, 16))  # scene units, whatever the opacity


def test_a_path_of_the_users_is_followed(tmp_path):
    save_cameras(tmp_path / "mine.json", make_trained().cameras["test"][2:4], fps=3)
    (video, _) = export(
        tmp_path / "out", trajectory=str(tmp_path / "mine.json"), formats=["gif"], depth=False
    )
    assert video.name == "mine.gif"
    assert imageio.get_reader(video).get_length() == 2
    assert seconds_of(video) == pytest.approx(2 / 3, abs=0.01)  # the file's own fps


def test_fewer_frames_leave_none_of_those_before(tmp_path):
    export(tmp_path, formats=["png"], depth=False)
    save_cameras(tmp_path / "test.json", make_trained().cameras["test"][:2], fps=3)
    export(tmp_path, trajectory=str(tmp_path / "test.json"), formats=["png"], depth=False)
    assert sorted(file.name for file in (tmp_path / "test").iterdir()) == ["0.png", "1.png"]


def test_a_path_may_run_backwards_and_have_any_name(tmp_path):
    cameras = make_trained().cameras["test"]
    save_cameras(tmp_path / "a{b}.json", replace(cameras, times=cameras.times.flip(0)), fps=3)
    given = {"trajectory": str(tmp_path / "a{b}.json"), "clip_seconds": 1, "depth": False}
    files = export(tmp_path / "out", formats=["gif", "png"], **given)
    assert seconds_of(files[0]) == pytest.approx(6 / 5, abs=0.02)  # 6 frames, 5 steps in a second
    assert files[1] == tmp_path / "out" / "a{b}" and len([*files[1].iterdir()]) == 6


def test_opacity_stays_where_a_video_can_not_be_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr("fourdfy.files.images._encoded", lambda *args: False)
    files = export(tmp_path, formats=["png", "mp4"], alpha=True, depth=False)
    assert imageio.imread(tmp_path / "test" / "5.png").shape == (12, 16, 4)
    assert [file.name for file in files] == ["test", "test_transforms.json"]


def seconds_of(file):
    if file.suffix == ".mp4":
        return imageio.get_reader(file).get_meta_data()["duration"]
    if file.suffix == ".glb":
        gltf = pygltflib.GLTF2().load(file)
        return gltf.accessors[gltf.animations[0].samplers[0].input].max[0]
    with Image.open(file) as image:
        durations = []
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
        return sum(durations) / 1000


def looped(frames):
    """A clip of so many frames, each moment once."""
    azimuth, times = torch.zeros(frames), torch.arange(frames) / frames
    return orbit_cameras(azimuth, azimuth, distance=3.0, fovy_deg=40.0, times=times, height=4, width=4)


@pytest.mark.parametrize("given", [{}, {"clip_seconds": 1.3}])
@pytest.mark.parametrize("clip", ["val_video", "test"])
def test_a_clip_lasts_as_long_in_every_file(tmp_path, given, clip):
    """The test sequence shows it twice, in fewer frames than the validation video."""
    trained = make_trained()
    cameras = {"val_video": looped(16), "test": looped(14)[torch.arange(28) % 14]}
    trained = replace(trained, cameras=cameras)
    mesh = {"times": [], "animation_frames": 3, "animation_resolution": 16, "save_texture": False}
    keys = {"mesh": mesh, "video": {"trajectory": clip, "depth": False}, **given}
    files = AllExporter(parse_config(AllExporter.Config, keys)).export(trained, tmp_path)
    assert [file.name for file in files] == [
        "model_animated.glb", f"{clip}.mp4", f"{clip}.gif", f"{clip}.webp", f"{clip}_transforms.json",
    ]  # fmt: skip
    animation, *videos = (seconds_of(file) for file in files[:4])
    assert animation == pytest.approx(given.get("clip_seconds", 1.0))  # 16 frames at 16 in a second
    clips = len(cameras[clip]) / (14 if clip == "test" else 16)
    assert videos == [pytest.approx(clips * animation, abs=0.011)] * 3


def test_meshes_and_videos_have_their_own_settings():
    keys = {"mesh": {"fmt": "ply"}, "video_type": None}
    cfg = parse_config(AllExporter.Config, keys)
    assert cfg.mesh.fmt == "ply" and cfg.video is None
    with pytest.raises(ConfigError, match=r"mesh.formats: unknown key"):
        parse_config(AllExporter.Config, {"mesh": {"formats": ["mp4"]}})


def test_without_the_background_there_is_opacity_where_the_format_has_it(tmp_path):
    files = export(tmp_path, formats=["png", "webp", "gif"], alpha=True, depth=False)
    frame = imageio.imread(tmp_path / "test" / "5.png")
    assert frame.shape == (12, 16, 4)
    assert (frame == [255, 255, 255, 204]).all()  # white, seen through opacity 0.8
    with Image.open(files[1]) as image:
        assert image.mode == "RGBA" and np.asarray(image)[0, 0, 3] == 204
    assert imageio.get_reader(files[2]).get_data(5)[0, 0, 0] == 255  # over the background


def test_an_unknown_trajectory_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"trajectory='orbit': expected test, val_video or a .json file"):
        export(tmp_path, trajectory="orbit")
