"""Meshes are read back with trimesh, and the GLB's raw numbers with pygltflib: neither wrote them."""

import importlib.util
import logging

import numpy as np
import pygltflib
import pytest
import torch
import trimesh

from fourdfy.config import ConfigError, parse_config
from fourdfy.exporters import texture
from fourdfy.exporters.mesh_exporter import MeshExporter
from fourdfy.exporters.surface import Surface
from fourdfy.exporters.texture import rasterize
from tests.exporters.readers import accessor
from tests.exporters.scenes import GREY, RED, SIZE, make_trained


def export(folder, trained=None, **keys):
    cfg = parse_config(MeshExporter.Config, {"animation_frames": 0, "texture_size": 128, **keys})
    return MeshExporter(cfg).export(trained or make_trained(), folder)


def vertex_colors(mesh):
    """sRGB, 0..1, whichever way the file has them."""
    visual = mesh.visual if hasattr(mesh.visual, "vertex_colors") else mesh.visual.to_color()
    return np.asarray(visual.vertex_colors)[:, :3] / 255


@pytest.mark.parametrize(
    ("fmt", "front", "up"), [("glb", 2, 1), ("obj", 2, 1), ("obj-mtl", 2, 1), ("ply", 0, 2)]
)
def test_every_format_holds_the_ball_with_its_front_where_the_format_has_it(tmp_path, fmt, front, up):
    files = export(tmp_path, fmt=fmt, times=[1.0])  # by then higher than wide
    mesh = trimesh.load(files[0], force="mesh", process=False)
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * SIZE**3 * 1.3, rel=0.05)  # and wound outwards
    assert np.argmax(mesh.extents) == up
    if fmt.startswith("obj"):
        assert "\nvn " in files[0].read_text()
    if fmt in ("obj", "ply"):
        colors = vertex_colors(mesh)
        grey = np.abs(colors - GREY).max(1) < 0.1
        assert mesh.vertices[grey][:, front].min() > 0
        assert 0.1 < grey.mean() < 0.5 and (np.abs(colors[mesh.vertices[:, front] < -0.3] - RED) < 0.05).all()


def test_colours_of_vertices_are_linear_and_unlit_in_a_glb(tmp_path):
    (file,) = export(tmp_path, save_texture=False)
    gltf = pygltflib.GLTF2().load(file)
    primitive = gltf.meshes[0].primitives[0]
    positions = accessor(gltf, primitive.attributes.POSITION)
    colors = accessor(gltf, primitive.attributes.COLOR_0)
    assert colors[positions[:, 2].argmax(), 0] == pytest.approx(0.214, abs=0.001)  # of a displayed 0.5
    assert (colors[:, 3] == 1).all()
    assert "KHR_materials_unlit" in gltf.materials[primitive.material].extensions
    assert gltf.accessors[primitive.attributes.POSITION].max == positions.max(0).tolist()
    normals = accessor(gltf, primitive.attributes.NORMAL)
    away = positions / np.linalg.norm(positions, axis=1, keepdims=True)
    assert (normals * away).sum(1).min() > 0.98


@pytest.mark.parametrize(("image", "suffix"), [("jpg", "jpeg"), ("png", "png")])
def test_a_texture_shows_the_scenes_colours_on_the_right_sides(tmp_path, image, suffix):
    files = export(tmp_path, fmt="obj-mtl", texture_format=image)
    assert [file.name for file in files] == ["model.obj", "model.mtl", f"model_kd.{suffix}"]
    assert f"map_Kd model_kd.{suffix}" in files[1].read_text()
    (glb,) = export(tmp_path, texture_format=image)
    for file in (files[0], glb):
        mesh = trimesh.load(file, force="mesh", process=False)
        colors, front = vertex_colors(mesh), mesh.vertices[:, 2]
        assert np.abs(colors[front > 0.4] - GREY).max() < 0.1  # what JPEG costs
        assert np.abs(colors[front < 0.2] - RED).max() < 0.1


def test_without_xatlas_there_are_vertex_colours_and_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(texture, "find_spec", lambda name: None)
    texture.can_unwrap.cache_clear()
    with caplog.at_level(logging.WARNING):
        files = export(tmp_path, fmt="obj-mtl", times=[0.0, 0.5])
    texture.can_unwrap.cache_clear()
    assert [file.name for file in files] == ["model.obj", "model_t0.5.obj"]
    (warning,) = caplog.records
    assert "pip install xatlas" in warning.getMessage()
    assert len(vertex_colors(trimesh.load(files[0], process=False))) > 100


def test_a_threshold_that_nothing_reaches_is_answered_with_the_densities_and_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"isosurface_threshold=30.0: no surface .* to 8;.* auto") as error:
        export(tmp_path, make_trained(peak=8.0))
    assert "system.geometry." in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_scene_that_does_not_move_has_no_animation(tmp_path):
    frames = {"animation_frames": 2, "animation_resolution": 20, "save_texture": False}
    still = export(tmp_path, make_trained(dynamic=False), **frames)
    assert [file.name for file in still] == ["model.glb"]
    moving = export(tmp_path, **frames)
    assert [file.name for file in moving] == ["model_animated.glb", "model.glb"]


def test_a_mesh_of_another_time_leaves_that_of_the_start_alone(tmp_path):
    (start,) = export(tmp_path, fmt="ply")
    before = start.read_bytes()
    (middle,) = export(tmp_path, fmt="ply", times=[0.5])
    assert middle.name == "model_t0.5.ply" and start.read_bytes() == before


def test_a_glb_is_named_after_the_prompt(tmp_path):
    gltf = pygltflib.GLTF2().load(export(tmp_path, save_texture=False)[0])
    (root,) = gltf.scenes[0].nodes
    (child,) = gltf.nodes[root].children
    assert gltf.nodes[root].name == gltf.scenes[0].name == gltf.materials[0].name == "a_ball"
    assert gltf.nodes[child].name == gltf.meshes[0].name == "a_ball mesh"


def test_a_lit_material_has_normals_and_no_extension(tmp_path):
    gltf = pygltflib.GLTF2().load(export(tmp_path, save_texture=False, lit=True, save_normal=False)[0])
    assert not gltf.extensionsUsed and not gltf.materials[0].extensions
    assert gltf.materials[0].pbrMetallicRoughness.metallicFactor == 0
    assert gltf.meshes[0].primitives[0].attributes.NORMAL is not None


def test_colours_of_vertices_stay_as_sharp_with_fewer_triangles(tmp_path):
    fine = trimesh.load(export(tmp_path, fmt="ply", max_faces=10**6)[0])
    few = trimesh.load(export(tmp_path, fmt="ply", max_faces=1000)[0])
    assert len(few.faces) < 0.55 * len(fine.faces) and few.is_watertight
    assert few.volume == pytest.approx(fine.volume, rel=0.01)
    # The colour changes where x is 0.3; no triangle there is longer than those of the grid.
    colors = vertex_colors(few)[few.faces]
    edge = np.ptp(colors, axis=1).max(-1) > 0.1
    lengths = np.linalg.norm(np.diff(few.vertices[few.faces[edge]], axis=1), axis=-1)
    assert edge.sum() > 50 and lengths.max() < 1.5 * fine.edges_unique_length.max()


def test_a_rasterised_triangle_covers_the_texels_whose_centres_it_holds():
    uvs = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    texels, owners, barycentric = rasterize(uvs, torch.tensor([[0, 1, 2], [1, 3, 2]]), 5)
    assert sorted(set(texels.tolist())) == list(range(25))
    assert set(texels[owners == 0].tolist()) == {r * 5 + c for r in range(5) for c in range(5) if r + c <= 4}
    corners = torch.tensor([[0, 1, 2], [1, 3, 2]])[owners]
    centres = (uvs[corners] * barycentric[..., None]).sum(1)
    assert torch.allclose(centres, torch.stack([texels % 5, texels // 5], dim=-1) / 5 + 0.1, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("xatlas") is None, reason="needs xatlas")
def test_an_option_that_xatlas_does_not_have_is_named():
    ball = trimesh.creation.icosphere(1)
    surface = Surface(
        positions=torch.tensor(ball.vertices).float(),
        faces=torch.tensor(ball.faces),
        normals=torch.tensor(ball.vertices).float(),
    )
    assert texture.unwrap(surface, 64, {"max_iterations": 2}, {}).uvs.max() <= 1
    with pytest.raises(ConfigError, match=r"xatlas_pack_options.paddin: unknown; xatlas has .*padding"):
        texture.unwrap(surface, 64, {}, {"paddin": 2})


@pytest.mark.parametrize(
    "keys",
    [{"times": [1.5]}, {"animation_frames": 1}, {"save_name": "../model"}, {"fmt": "stl"}, {"max_faces": 0}],
)
def test_what_cannot_be_meant_is_refused(keys):
    with pytest.raises(ConfigError, match=next(iter(keys))):
        parse_config(MeshExporter.Config, keys)
