"""One coloured mesh as a file: GLB, OBJ (with MTL and image) or PLY.

The scene is z-up with its front at +x. GLB and OBJ are written as y-up with the front at +z,
as programs read them; PLY does not define axes and keeps the scene's.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from fourdfy.exporters.gltf import ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER, Glb, linear_from_srgb
from fourdfy.exporters.surface import Surface
from fourdfy.files.atomic import write_whole
from fourdfy.files.images import to_pixels

Format = Literal["glb", "obj-mtl", "obj", "ply"]
ImageFormat = Literal["jpg", "png"]


@dataclass(frozen=True, kw_only=True)
class ColoredMesh:
    """A surface with a colour for each vertex, or an image that ``uvs`` point into."""

    surface: Surface
    colors: Float[Tensor, "V 3"] | None = None
    """As displayed (sRGB), 0..1."""
    uvs: Float[Tensor, "V 2"] | None = None
    """Texture coordinates, from the image's upper left corner."""
    texture: UInt8[ndarray, "S S 3"] | None = None


def write_mesh(
    folder: Path,
    name: str,
    mesh: ColoredMesh,
    fmt: Format,
    *,
    title: str,
    normals: bool,
    lit: bool,
    image_format: ImageFormat,
) -> list[Path]:
    """``{name}.glb``, ``.ply`` or ``.obj``; with an image also ``.mtl`` and ``{name}_kd.jpeg`` (``.png``).
    ``title`` and ``lit``: what ``Glb`` takes."""
    if fmt == "glb":
        glb = Glb(title, lit=lit)
        files = {f"{name}.glb": mesh_glb(glb, mesh, normals=normals, image_format=image_format)}
    elif fmt == "ply":
        exported = _trimesh(mesh, mesh.surface.positions).export(file_type="ply", vertex_normal=normals)
        files = {f"{name}.ply": exported}
    else:
        files = _obj_files(name, mesh, normals, image_format)
    for file, content in files.items():
        write_whole(folder / file, content)
    return [folder / file for file in files]


def mesh_glb(glb: Glb, mesh: ColoredMesh, *, normals: bool, image_format: ImageFormat) -> bytes:
    """The file of one mesh."""
    primitive = add_primitive(glb, mesh, add_material(glb, mesh, image_format), normals=normals)
    shape = glb.add("meshes", name=f"{glb.name} mesh", primitives=[primitive])
    glb.add_scene([glb.add("nodes", name=f"{glb.name} mesh", mesh=shape)])
    return glb.to_bytes()


def add_material(glb: Glb, mesh: ColoredMesh, image_format: ImageFormat) -> int:
    """The material that ``add_primitive`` of this mesh needs; meshes with vertex colours can share one."""
    if mesh.texture is None:
        return glb.add_material()
    mime_type = {"jpg": "image/jpeg", "png": "image/png"}[image_format]
    return glb.add_material(encode_image(mesh.texture, image_format), mime_type)


def add_primitive(glb: Glb, mesh: ColoredMesh, material: int, *, normals: bool = False) -> dict[str, Any]:
    """The mesh's arrays in the file, as glTF's ``primitive``."""

    def vertices(values: ndarray, **options: bool) -> int:
        return glb.add_array(values, target=ARRAY_BUFFER, **options)

    attributes = {"POSITION": vertices(y_up(mesh.surface.positions), bounds=True)}
    if normals or glb.lit:
        attributes["NORMAL"] = vertices(y_up(mesh.surface.normals))
    if mesh.texture is not None and mesh.uvs is not None:
        attributes["TEXCOORD_0"] = vertices(_array(mesh.uvs))
    elif mesh.colors is not None:
        # 16 bits, since 8 bits of linear light are too coarse for dark colours; RGBA, to stay aligned.
        light = linear_from_srgb(_array(mesh.colors).clip(0, 1))
        rgba = np.concatenate([light, np.ones_like(light[:, :1])], axis=1)
        attributes["COLOR_0"] = vertices((rgba * 65535).round().astype(np.uint16), normalized=True)
    faces = _array(mesh.surface.faces)
    # The largest number of a type is reserved.
    small = len(mesh.surface.positions) < 65535
    indices = faces.reshape(-1).astype(np.uint16 if small else np.uint32)
    return {
        "attributes": attributes,
        "indices": glb.add_array(indices, target=ELEMENT_ARRAY_BUFFER),
        "material": material,
    }


def y_up(values: Float[Tensor, "V 3"]) -> ndarray:
    """Convert the scene's axes (z up, front +x) to glTF's (y up, front +z); also for displacements."""
    return _array(values[:, [1, 2, 0]])


def encode_image(pixels: UInt8[ndarray, "S S 3"], image_format: ImageFormat) -> bytes:
    """PNG, or JPEG at a quality without visible blocks."""
    from PIL import Image

    encoded = io.BytesIO()
    options = {"format": "PNG"} if image_format == "png" else {"format": "JPEG", "quality": 95}
    Image.fromarray(pixels).save(encoded, **options)
    return encoded.getvalue()


def _obj_files(name: str, mesh: ColoredMesh, normals: bool, image_format: ImageFormat) -> dict[str, bytes]:
    from PIL import Image
    from trimesh.exchange.obj import export_obj
    from trimesh.visual import TextureVisuals
    from trimesh.visual.material import SimpleMaterial

    model = _trimesh(mesh, mesh.surface.positions[:, [1, 2, 0]])
    options = {"include_normals": normals, "header": "fourdfy"}
    if mesh.texture is None or mesh.uvs is None:
        return {f"{name}.obj": export_obj(model, **options).encode()}
    image = Image.fromarray(mesh.texture)
    image.format = "PNG" if image_format == "png" else "JPEG"  # trimesh names the file by it
    white, black = [255, 255, 255], [0, 0, 0]
    material = SimpleMaterial(image, diffuse=white, ambient=white, specular=black, name=f"{name}_kd")
    from_below = torch.stack([mesh.uvs[:, 0], 1 - mesh.uvs[:, 1]], dim=-1)
    model.visual = TextureVisuals(uv=_array(from_below), material=material)
    text, beside = export_obj(model, return_texture=True, mtl_name=f"{name}.mtl", **options)
    files = {f"{name}.obj": text.encode(), f"{name}.mtl": beside.pop(f"{name}.mtl")}
    return files | {file: encode_image(mesh.texture, image_format) for file in beside}


def _trimesh(mesh: ColoredMesh, positions: Float[Tensor, "V 3"]) -> Any:
    import trimesh

    return trimesh.Trimesh(
        _array(positions),
        _array(mesh.surface.faces),
        vertex_normals=_array(mesh.surface.normals),
        vertex_colors=None if mesh.colors is None else to_pixels(mesh.colors[:, None])[:, 0],
        process=False,
    )


def _array(values: Tensor) -> ndarray:
    return values.detach().cpu().numpy()
