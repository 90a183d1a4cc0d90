"""What evaluation renders, as files."""

from pathlib import Path

import imageio.v2 as imageio
import pytest
import torch

from fourdfy.callbacks.curves import Curves
from fourdfy.callbacks.renders import SaveRenders
from fourdfy.data.datamodule import chunks
from fourdfy.files import atomic
from fourdfy.files.evaluations import RECORD, TEST, VALIDATION, is_evaluated
from fourdfy.files.images import to_pixels
from fourdfy.ops.cameras import orbit_cameras
from tests.renders import render_output
from tests.runs import new_run

OPACITY = torch.tensor([0.6, 1.0, 0.3, 0.0]).view(1, 1, 4, 1)
"""A near thing that lets light through, a far thing that does not, fog, and nothing."""
DISTANCE = torch.tensor([2.0, 4.0, 1.0, 0.0]).view(1, 1, 4, 1)
NORMAL = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.2, 0.1, 0.1], [0.0, 0.0, 0.0]]).view(1, 1, 4, 3)


def written(folder, splits, normal=None, *, trained=False, curves=None):
    """The ``save`` folder after one evaluation of two frames for each split, perhaps after training."""
    callback, run = SaveRenders(folder, curves, trained=trained), new_run(3, folder=folder.parent)
    outputs = render_output(
        OPACITY.expand(2, -1, -1, -1),
        comp_rgb=OPACITY.expand(2, -1, -1, 3),
        comp_normal=None if normal is None else normal.expand(2, -1, -1, -1),
        depth=(OPACITY * DISTANCE).expand(2, -1, -1, -1),
    )
    cameras = orbit_cameras(
        torch.zeros(2), torch.zeros(2), distance=3.0, fovy_deg=40.0, times=torch.zeros(2), height=1, width=4
    )
    for end in (callback.after_validation, callback.after_test):
        for split in splits:
            (batch,) = chunks(split, cameras, 2)
            callback.after_frames(run, batch, outputs, done=1, total=1)
        end(run)
    return folder


@pytest.fixture(scope="module")
def shaded(tmp_path_factory):
    """Of a scene with normals."""
    splits = ("val", "val_video", "test", "test_static")
    return written(tmp_path_factory.mktemp("save"), splits, NORMAL)


def test_depth_images_show_how_far_things_are_whatever_their_opacity(shaded):
    near, far, fog, nothing = imageio.imread(shaded / "it3-test-depth-jet" / "1.png")[0].tolist()
    assert near == [127, 0, 0]
    assert far == [0, 0, 127]
    assert fog == nothing == [0, 0, 0]


def test_depth_for_tools_is_in_thousandths_of_a_scene_unit(shaded):
    depth = imageio.imread(shaded / "it3-test-depth" / "1.png")
    assert depth.dtype == "uint16"
    assert depth.tolist() == [[2000, 4000, 0, 0]]


def test_normals_are_shown_where_there_are_some(shaded, tmp_path):
    assert (shaded / "it3-test-normal.mp4").exists() and (shaded / "it3-test-normal_static.mp4").exists()
    image = imageio.imread(shaded / "it3-test-normal" / "1.png")
    assert image.tolist() == to_pixels(NORMAL[0]).tolist()
    assert imageio.imread(shaded / "it3-0.png")[:, 4:8].tolist() == image.tolist()
    assert imageio.imread(shaded / "it3-0_video.png")[:, 8:12].tolist() == image.tolist()

    plain = written(tmp_path, ("val", "val_video", "test"))
    assert not list(plain.glob("*normal*"))
    assert imageio.imread(plain / "it3-0.png").shape == (1, 8, 3)


def test_frames_show_the_scene_over_its_background(shaded):
    for name in ("it3-test/0.png", "it3-test_static/1.png"):
        assert imageio.imread(shaded / name).tolist() == to_pixels(OPACITY[0]).tolist()


def test_curves_show_pictures_at_the_last_step_that_was_trained(tmp_path):
    """Steps count from 0. At the next one, a resumed run would drop them."""
    logged = []
    curves = object.__new__(Curves)
    curves.images = lambda name, frames, step: logged.append((name, len(frames), step))
    written(tmp_path, ("val", "val_video", "test"), curves=curves)
    assert logged == [("val/0", 1, 2), ("val/1", 1, 2), ("val/video", 2, 2), ("test/video", 2, 2)]


def test_an_evaluation_is_complete_as_long_as_its_files_have_their_sizes(tmp_path):
    splits, save = ("val", "val_video", "test", "test_static"), tmp_path / "save"
    files = {VALIDATION: ["it3-0.png", "it3-0_video.mp4"], TEST: ["it3-test_static.mp4", "it3-test/1.png"]}
    for names, some in files.items():
        for file in some:
            for harm in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])):
                written(save, splits)
                assert is_evaluated(tmp_path, names.format(3)) and not is_evaluated(tmp_path, names.format(4))
                harm(save / file)
                assert not is_evaluated(tmp_path, names.format(3))
    for torn in ("", "[]", '{"it3-test*": 1}'):
        (tmp_path / RECORD).write_text(torn)
        assert not is_evaluated(tmp_path, TEST.format(3))


def test_pictures_that_can_not_be_written_cost_a_trained_scene_one_warning_each(tmp_path, caplog):
    (tmp_path / "save").write_text("a file where the folder should be")
    splits = ("val", "val_video", "test", "test_static")
    with atomic.losses_noted() as missing:
        for _ in range(2):
            written(tmp_path / "save", splits, trained=True)
    of_validation, of_test = (record.getMessage() for record in caplog.records)
    assert of_validation.startswith("validation images could not be written; the run continues (")
    assert f"{tmp_path / 'save'} is a file where a folder is needed" in of_test
    assert "--test renders them again" in of_test
    assert len(missing) == 2


def test_pictures_that_were_asked_for_and_can_not_be_written_are_an_error(tmp_path):
    (tmp_path / "save").write_text("a file where the folder should be")
    with pytest.raises(atomic.WriteError, match=r"it3-test/0.png can't be written: .*save is a file where"):
        written(tmp_path / "save", ("test",))
