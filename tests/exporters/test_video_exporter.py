import json

import imageio.v2 as imageio
import numpy as np
import pytest

from fourdfy.config import ConfigError, parse_config
from fourdfy.exporters.camera_path import save_cameras
from fourdfy.exporters.video_exporter import VideoExporter
from tests.exporters.scenes import make_subject


def export(folder, **keys):
    return VideoExporter(parse_config(VideoExporter.Config, keys)).export(make_subject(), folder)


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
    assert [file.name for file in files] == ["test", "test_depth", "test_transforms.json"]
    depth = imageio.imread(tmp_path / "test_depth" / "3.png")
    assert depth[0, 0].argmax() == 0 and depth[0, -1].argmax() == 2


def test_a_path_of_the_users_is_followed(tmp_path):
    save_cameras(tmp_path / "mine.json", make_subject().cameras["test"][2:4], fps=3)
    (video, _) = export(
        tmp_path / "out", trajectory=str(tmp_path / "mine.json"), formats=["gif"], depth=False
    )
    assert video.name == "mine.gif"
    assert imageio.get_reader(video).get_length() == 2


def test_an_unknown_trajectory_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"trajectory='orbit': expected test, val_video or a .json file"):
        export(tmp_path, trajectory="orbit")
