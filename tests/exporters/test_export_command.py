"""``launch.py --export`` and ``--test``, with a scene that was never trained: the ball it starts from."""

import pytest
import torch

from fourdfy.launching.experiment import load_experiment
from fourdfy.systems.checkpoint import write_checkpoint
from fourdfy.types import StepContext
from tests.commands import CONFIGS, TINY, launch, trial

SMALL = (
    "seed=1",
    "system.geometry.isosurface_resolution=24",
    "system.geometry.density_blob_scale=20",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As another experiment, of another name, left it at step 12."""
    folder = tmp_path_factory.mktemp("other")
    overrides = [*TINY, *SMALL, "name=another"]
    system = load_experiment([CONFIGS / "shapes_stage_3.yaml"], overrides).build_system()
    with torch.no_grad():
        system.scene.before_step(StepContext(0, torch.Generator().manual_seed(0)), dynamic=True)
    path = folder / "scene.ckpt"
    write_checkpoint({"state_dict": system.state_dict(), "global_step": 12}, path)
    return path


def files_of(root):
    return {
        str(path.relative_to(root / "shapes_stage_3" / "tiny" / "save"))
        for path in root.rglob("*")
        if path.is_file() and "save" in path.parts
    }


def test_one_command_writes_the_mesh_and_the_clip(checkpoint, tmp_path):
    given = ("system.exporter.animation_frames=3", "system.exporter.animation_resolution=16")
    given += ("system.exporter.texture_size=64", f"resume={checkpoint}")
    assert launch("shapes_stage_3.yaml", "export", tmp_path, *SMALL, *given) == 0
    names = ("model.glb", "model_animated.glb", "share.html")
    assert files_of(tmp_path) == {f"it12-export/{name}" for name in names}


def test_videos_are_another_exporter(checkpoint, tmp_path):
    given = ("system.exporter_type=video-exporter", "system.exporter.trajectory=val_video")
    assert launch("shapes_stage_3.yaml", "export", tmp_path, *SMALL, f"resume={checkpoint}", *given) == 0
    names = [f"it12-export/val_video{end}.{fmt}" for end in ("", "_depth") for fmt in ("mp4", "gif", "webp")]
    beside = ("val_video_depth.npz", "val_video_transforms.json", "share.html")
    assert files_of(tmp_path) == {*names, *(f"it12-export/{name}" for name in beside)}


def test_any_checkpoint_that_fits_is_tested(checkpoint, tmp_path):
    assert launch("shapes_stage_3.yaml", "test", tmp_path, *SMALL, f"resume={checkpoint}") == 0
    assert {"it12-test.mp4", "it12-test_static.mp4", "it12-test-depth-jet.mp4"} <= files_of(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "system.geometry.isosurface_threshold=1e6",
            "system.geometry.isosurface_threshold=1000000: no surface at time 0,",
        ),
        (
            "system.exporter.ftm=ply",
            "system.exporter.ftm (in the command line): unknown key; did you",
        ),
        ("system.exporter_type=mash-exporter", "did you mean 'mesh-exporter'?"),
    ],
)
def test_a_mistake_ends_with_one_error(checkpoint, tmp_path, capsys, override, message):
    given = (f"resume={checkpoint}", "system.exporter.animation_frames=2", override)
    assert launch("shapes_stage_3.yaml", "export", tmp_path, *SMALL, *given) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.glb"))


def test_a_folder_that_can_not_be_written_is_one_error(checkpoint, tmp_path, capsys):
    folder = trial(tmp_path, "shapes_stage_3") / "save" / "it12-export"
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    given = ("system.exporter.animation_frames=0", "system.exporter.save_texture=false")
    assert launch("shapes_stage_3.yaml", "export", tmp_path, *SMALL, f"resume={checkpoint}", *given) == 2
    said = capsys.readouterr().err
    assert "it12-export is a file where a folder is needed; results can go elsewhere: --out DIR\n" in said
