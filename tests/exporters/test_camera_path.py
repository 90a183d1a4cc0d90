import json
import math

import pytest
import torch

from fourdfy.config import ConfigError
from fourdfy.exporters.camera_path import load_cameras, save_cameras
from fourdfy.ops.cameras import cast_rays
from tests.exporters.scenes import make_subject


def test_a_path_is_read_as_it_was_written(tmp_path):
    cameras = make_subject().cameras["test"]
    path = tmp_path / "path.json"
    save_cameras(path, cameras, fps=15, image_pattern="clip/{}.png")
    read = load_cameras(path)
    for name, value in vars(cameras).items():
        assert torch.allclose(torch.as_tensor(getattr(read, name)), torch.as_tensor(value), atol=1e-4), name
    content = json.loads(path.read_text())
    assert content["frames"][5]["file_path"] == "clip/5.png" and content["fps"] == 15
    assert "z up" in content["conventions"]


def test_the_intrinsics_are_those_of_the_rays(tmp_path):
    cameras = make_subject().cameras["test"]
    save_cameras(tmp_path / "path.json", cameras, fps=15)
    content = json.loads((tmp_path / "path.json").read_text())
    frame = content["frames"][2]
    pixel = torch.tensor([5.5, 3.5])  # the centre of column 5, row 3
    x = (pixel[0] - content["cx"]) / frame["fl_x"]
    y = -(pixel[1] - content["cy"]) / frame["fl_y"]
    matrix = torch.tensor(frame["transform_matrix"])
    direction = torch.nn.functional.normalize(matrix[:3, :3] @ torch.stack([x, y, torch.tensor(-1.0)]), dim=0)
    assert torch.allclose(direction, cast_rays(cameras).directions[2, 3, 5], atol=1e-5)
    assert content["camera_angle_y"] == pytest.approx(math.radians(40))


def test_a_path_of_another_program_needs_no_times(tmp_path):
    frames = [{"transform_matrix": torch.eye(4).tolist()}] * 3
    (tmp_path / "path.json").write_text(
        json.dumps({"w": 20, "h": 10, "camera_angle_y": math.radians(60), "frames": frames})
    )
    cameras = load_cameras(tmp_path / "path.json")
    assert cameras.times.tolist() == [0, 0.5, 1]
    assert torch.allclose(cameras.fovy_deg, torch.tensor(60.0)) and cameras.width == 20


@pytest.mark.parametrize(
    "content",
    ["{", '{"frames": []}', '{"w": 2, "h": 2, "fl_y": 3, "frames": []}',
     '{"w": 2, "h": 2, "frames": [{"transform_matrix": [[1]]}]}'],
)  # fmt: skip
def test_what_is_no_path_is_answered_with_what_was_expected(tmp_path, content):
    (tmp_path / "path.json").write_text(content)
    with pytest.raises(ConfigError, match=r"path.json: .*transform_matrix"):
        load_cameras(tmp_path / "path.json")


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such camera path"):
        load_cameras(tmp_path / "none.json")
