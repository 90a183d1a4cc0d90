import json
import math

import pytest
import torch

from fourdfy.config import ConfigError
from fourdfy.exporters.camera_path import load_cameras, save_cameras
from fourdfy.ops.cameras import cast_rays
from tests.exporters.scenes import make_trained


def test_a_path_is_read_as_it_was_written(tmp_path):
    cameras = make_trained().cameras["test"]
    path = tmp_path / "path.json"
    save_cameras(path, cameras, fps=15, images="clip")
    read, fps = load_cameras(path)
    assert fps == 15
    for name, value in vars(cameras).items():
        assert torch.allclose(torch.as_tensor(getattr(read, name)), torch.as_tensor(value), atol=1e-4), name
    content = json.loads(path.read_text())
    assert content["frames"][5]["file_path"] == "clip/5.png" and content["fps"] == 15
    assert "z up" in content["conventions"]


def test_the_intrinsics_are_those_of_the_rays(tmp_path):
    cameras = make_trained().cameras["test"]
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
    cameras, fps = load_cameras(tmp_path / "path.json")
    assert fps is None
    assert cameras.times.tolist() == [0, 0.5, 1]
    assert torch.allclose(cameras.fovy_deg, torch.tensor(60.0)) and cameras.width == 20


def test_an_angle_across_is_enough(tmp_path, caplog):
    frames = [{"transform_matrix": torch.eye(4).tolist()}]
    content = {"w": 20, "h": 10, "camera_angle_x": math.radians(60), "frames": frames}
    (tmp_path / "path.json").write_text(json.dumps(content))
    cameras, _ = load_cameras(tmp_path / "path.json")
    expected = 2 * math.degrees(math.atan(0.5 * math.tan(math.radians(30))))
    assert cameras.fovy_deg.item() == pytest.approx(expected, abs=1e-4) and not caplog.text


def test_what_a_lens_does_is_ignored_with_a_warning(tmp_path, caplog):
    frames = [{"transform_matrix": torch.eye(4).tolist()}]
    content = {"w": 20, "h": 10, "fl_x": 20, "fl_y": 10, "cx": 10.2, "cy": 8, "k1": 0.5, "frames": frames}
    (tmp_path / "path.json").write_text(json.dumps(content))
    load_cameras(tmp_path / "path.json")
    assert "path.json: cy, fl_x, k1 ignored: pixels are square here, and centred" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 1e6}, r"fps 1e\+06; expected 0\.1 to 240"),
        (
            {"camera_model": "OPENCV_FISHEYE"},
            "camera_model 'OPENCV_FISHEYE'; expected one of OPENCV, PINHOLE",
        ),
        ({"frames": [{"transform_matrix": torch.zeros(4, 4).tolist()}]}, "no rotation"),
        (
            {"frames": [{"transform_matrix": torch.diag(torch.tensor([1.0, 1, -1, 1])).tolist()}]},
            "no rotation",
        ),
    ],
)
def test_what_can_t_be_filmed_is_refused(tmp_path, change, message):
    content = {"w": 8, "h": 8, "fl_y": 9, "fps": 24, "camera_model": "PINHOLE"}
    content |= {"frames": [{"transform_matrix": torch.eye(4).tolist()}]}
    path = tmp_path / "path.json"
    path.write_text(json.dumps(content))
    assert load_cameras(path)[1] == 24
    path.write_text(json.dumps(content | change))
    with pytest.raises(ConfigError, match=rf"path\.json: .*{message}"):
        load_cameras(path)


@pytest.mark.parametrize(
    "content",
    ['{"w": 2, "h": 2, "fl_y": 3, "frames": ["a"]}', '{"w": 2, "h": Infinity, "fl_y": 3, "frames": [1]}',
     "{", '{"frames": []}', '{"w": 2, "h": 2, "fl_y": 3, "frames": []}',
     '{"w": 2, "h": 2, "frames": [{"transform_matrix": [[1]]}]}', "[]",
     '{"camera_path": [], "render_width": 2, "render_height": 2}'],
)  # fmt: skip
def test_what_is_no_path_is_answered_with_what_was_expected(tmp_path, content):
    (tmp_path / "path.json").write_text(content)
    with pytest.raises(ConfigError, match=r"(?s)path\.json: .*transform_matrix"):
        load_cameras(tmp_path / "path.json")


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such camera path"):
        load_cameras(tmp_path / "none.json")


VIEWER = {
    "camera_type": "perspective", "render_width": 40, "render_height": 20, "fps": 24, "seconds": 2,
    "keyframes": [{"matrix": "ignored"}], "smoothness_value": 0.5, "is_cycle": False, "crop": None,
}  # fmt: skip


def viewer_path(path, cameras, **changes):
    """What Nerfstudio's viewer writes for these cameras."""
    frames = [
        {"camera_to_world": c2w.flatten().tolist(), "fov": float(fov), "aspect": 2.0}
        for c2w, fov in zip(cameras.c2w, cameras.fovy_deg, strict=True)
    ]
    path.write_text(json.dumps({**VIEWER, "camera_path": frames} | changes))
    return path


def test_a_path_of_nerfstudios_viewer_is_read(tmp_path):
    given = make_trained().cameras["test"]
    cameras, fps = load_cameras(viewer_path(tmp_path / "camera_path.json", given))
    assert torch.allclose(cameras.c2w, given.c2w) and torch.allclose(cameras.fovy_deg, given.fovy_deg)
    assert (cameras.width, cameras.height, fps) == (40, 20, 24)
    assert torch.allclose(cameras.times, torch.linspace(0, 1, 6))
    assert torch.allclose(cameras.azimuth_deg, given.azimuth_deg, atol=1e-3)


def test_a_viewers_path_may_say_its_times_and_only_how_long_it_lasts(tmp_path):
    given = make_trained().cameras["test"]
    path = viewer_path(tmp_path / "camera_path.json", given)
    content = json.loads(path.read_text())
    del content["fps"]
    for frame in content["camera_path"]:
        frame["render_time"] = 0.25
    path.write_text(json.dumps(content))
    cameras, fps = load_cameras(path)
    assert fps == 3 and (cameras.times == 0.25).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"camera_type": "fisheye"}, "only perspective"), ({"render_height": 10**9}, "1000000000 pixels"),
     ({"fps": 0}, "fps 0"), ({"camera_path": [{"camera_to_world": [1] * 16, "fov": 200}]}, "fields of view"),
     ({"camera_path": [{"camera_to_world": [float("nan")] * 16, "fov": 20}]}, "not finite"),
     ({"camera_path": [{"camera_to_world": [1] * 16, "fov": 20, "render_time": 2}]}, "times outside"),
     ({"camera_path": [{"camera_to_world": [1] * 12, "fov": 20}]}, "camera_path.json: not a camera path")],
)  # fmt: skip
def test_a_viewers_path_that_can_not_be_rendered_says_why(tmp_path, changes, message):
    path = viewer_path(tmp_path / "camera_path.json", make_trained().cameras["test"], **changes)
    with pytest.raises(ConfigError, match=message):
        load_cameras(path)
