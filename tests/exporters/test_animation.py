import numpy as np
import pygltflib
import pytest
import torch
import trimesh

from fourdfy.config import parse_config
from fourdfy.exporters.animation import deforms, follow
from fourdfy.exporters.mesh_exporter import MeshExporter
from fourdfy.exporters.mesh_files import y_up
from fourdfy.exporters.surface import extract_surface
from tests.exporters.readers import accessor
from tests.exporters.scenes import MovedBall, auto, make_trained, moved

FRAMES, SECONDS = 5, 2.0


@pytest.fixture(scope="module", params=[True, False], ids=["deformed", "added"])
def exported(request, tmp_path_factory):
    """(whether the field deforms, the GLB as pygltflib reads it, its path)"""
    cfg = parse_config(
        MeshExporter.Config,
        {
            "times": [],
            "clip_seconds": SECONDS,
            "animation_frames": FRAMES,
            "animation_resolution": 32,
            "smoothing": 0,
            "save_texture": False,
        },
    )
    folder = tmp_path_factory.mktemp("export")
    (file,) = MeshExporter(cfg).export(make_trained(deforms=request.param), folder)
    return request.param, pygltflib.GLTF2().load(file), file


def shown(gltf, index):
    """Positions on screen at key ``index`` of the animation, by the rules of glTF."""
    (animation,) = gltf.animations
    pieces = []
    for channel in animation.channels:
        sampler, node = animation.samplers[channel.sampler], gltf.nodes[channel.target.node]
        values = accessor(gltf, sampler.output)
        (primitive,) = gltf.meshes[node.mesh].primitives
        positions = accessor(gltf, primitive.attributes.POSITION)
        if channel.target.path == "weights":
            weights = values.reshape(-1, len(primitive.targets))[index]
            for weight, target in zip(weights, primitive.targets, strict=True):
                positions = positions + weight * accessor(gltf, target["POSITION"])
        elif not values[index].any():
            continue
        pieces.append(positions[np.unique(accessor(gltf, primitive.indices))])
    return np.concatenate(pieces)


def truth(time):
    """The box of the analytic ball at a time, in glTF's axes."""
    points = torch.nn.functional.normalize(torch.randn(20000, 3, generator=torch.Generator().manual_seed(0)))
    places = y_up(moved(0.8 * points, torch.full((20000, 1), time)))
    return places.min(0), places.max(0)


def test_every_moment_shows_the_ball_where_it_is(exported):
    _, gltf, _ = exported
    for index, time in enumerate(np.arange(FRAMES) / FRAMES):
        places = shown(gltf, index)
        low, high = truth(float(time))
        assert np.abs(places.min(0) - low).max() < 0.06 and np.abs(places.max(0) - high).max() < 0.06


def test_the_clip_has_its_length_and_its_kind_of_motion(exported):
    deformed, gltf, _ = exported
    (animation,) = gltf.animations
    keys = accessor(gltf, animation.samplers[0].input)
    assert keys[0] == 0 and keys[-1] == SECONDS == gltf.accessors[animation.samplers[0].input].max[0]
    assert (np.diff(keys) > 0).all()
    assert {s.interpolation for s in animation.samplers} == {"LINEAR" if deformed else "STEP"}
    if deformed:
        assert len(gltf.meshes) == 1 and len(keys) == FRAMES + 1  # the last is the end of the last moment
        (primitive,) = gltf.meshes[0].primitives
        weights = accessor(gltf, animation.samplers[0].output).reshape(FRAMES + 1, FRAMES)
        assert np.array_equal(weights, np.eye(FRAMES + 1)[:, 1:])
        assert len(primitive.targets) == len(gltf.meshes[0].weights) == FRAMES
    else:
        scales = np.stack([accessor(gltf, sampler.output) for sampler in animation.samplers])
        assert (scales.sum(0) == 1).all()  # one mesh at a time, in each axis
        shown = [node.scale for node in gltf.nodes if node.mesh is not None]
        assert shown == [[1, 1, 1]] + [[0, 0, 0]] * (FRAMES - 1)
        assert np.allclose(np.diff(keys), SECONDS / FRAMES)  # no moment is held at the loop


def test_everything_carries_the_prompt_below_one_root(exported):
    _, gltf, _ = exported
    (scene,) = gltf.scenes
    (root,) = scene.nodes
    assert gltf.nodes[root].name == scene.name == gltf.animations[0].name == "a_ball"
    parts = [node for node in gltf.nodes if node.mesh is not None]
    assert [gltf.nodes.index(node) for node in parts] == gltf.nodes[root].children
    assert all(part.name.startswith("a_ball ") for part in [*parts, *gltf.meshes])
    assert len({node.name for node in gltf.nodes}) == len(gltf.nodes)


def test_a_viewer_frames_the_whole_clip(exported):
    """At rest only the first moment has a size; two loose vertices span the rest."""
    _, gltf, _ = exported
    (primitive,) = gltf.meshes[gltf.nodes[0].mesh].primitives
    box = gltf.accessors[primitive.attributes.POSITION]
    every = np.concatenate([shown(gltf, index) for index in range(FRAMES + 1)])
    assert np.allclose(box.min, every.min(0), atol=1e-6) and np.allclose(box.max, every.max(0), atol=1e-6)


def test_another_reader_agrees_about_the_first_moment(exported):
    _, gltf, file = exported
    scene = trimesh.load(file)
    mesh = next(iter(scene.geometry.values()))
    (primitive,) = gltf.meshes[0].primitives
    assert len(mesh.faces) == len(accessor(gltf, primitive.indices)) // 3
    low, _ = truth(0.0)
    assert np.abs(mesh.vertices[mesh.faces.reshape(-1)].min(0) - low).max() < 0.06
    assert mesh.volume > 0


class Passing(MovedBall):
    """There in the middle of the clip alone."""

    def density(self, positions, times, *, step):
        there = ((times > 0.3) & (times < 0.7)).float()[:, 0]
        return super().density(positions, times, step=step) * there


@pytest.mark.parametrize("deformed", [False, True])
def test_a_moment_with_nothing_to_see_is_an_empty_key(tmp_path, caplog, deformed):
    trained = make_trained(geometry=Passing(deforms=deformed))
    keys = {"animation_frames": 4, "animation_resolution": 16, "save_texture": False}
    files = MeshExporter(parse_config(MeshExporter.Config, keys)).export(trained, tmp_path)
    assert [file.name for file in files] == ["model_animated.glb"]  # time 0 has no mesh
    gltf = pygltflib.GLTF2().load(files[0])
    (channel,) = gltf.animations[0].channels  # of the moment at 0.5
    scales = accessor(gltf, gltf.animations[0].samplers[channel.sampler].output)
    assert scales[:, 0].tolist() == [0, 0, 1, 0, 0]
    assert gltf.nodes[channel.target.node].scale == [1, 1, 1]  # at rest a viewer has something to show
    assert "nothing is visible at time 0.25" in caplog.text


@pytest.mark.parametrize("deformed", [False, True])
def test_a_lit_clip_has_normals_at_every_moment(tmp_path, deformed):
    keys = {"animation_frames": 2, "animation_resolution": 24, "save_texture": False, "times": []}
    cfg = parse_config(MeshExporter.Config, {**keys, "lit": True})
    (file,) = MeshExporter(cfg).export(make_trained(deforms=deformed), tmp_path)
    gltf = pygltflib.GLTF2().load(file)
    assert not gltf.extensionsUsed and not gltf.materials[0].extensions
    for mesh in gltf.meshes:
        (primitive,) = mesh.primitives
        normals = [accessor(gltf, primitive.attributes.NORMAL)]
        normals += [normals[0] + accessor(gltf, target["NORMAL"]) for target in primitive.targets]
        used = np.unique(accessor(gltf, primitive.indices))
        for values in normals:
            assert np.allclose(np.linalg.norm(values[used], axis=1), 1, atol=1e-5)
    if deformed:
        assert np.abs(normals[1] - normals[0]).max() > 0.15  # the ball is stretched and twisted


def test_vertices_are_followed_through_a_known_deformation():
    trained = make_trained(geometry=auto(MovedBall, deforms=True))
    assert deforms(trained) and not deforms(make_trained(deforms=False))
    surface = extract_surface(trained, 0.0, resolution=24)
    times = torch.linspace(0, 1, 5).tolist()
    tracks = follow(trained, surface.positions, times)
    assert tracks.residuals.max() <= 2e-4  # the tolerance, at this radius
    for time, places in zip(times, tracks.positions, strict=True):
        wanted = moved(surface.positions, torch.full_like(surface.positions[:, :1], time))
        assert (places - wanted).norm(dim=-1).max() < 5e-4
    assert (tracks.positions[-1] - tracks.positions[0]).norm(dim=-1).max() > 0.4
