"""glTF 2.0 in its binary form (Khronos, ISO/IEC 12113): JSON that points into one buffer.

Files are y-up and right-handed, metres, seconds; a viewer looks at the side that faces +z. Colours of
vertices are linear, those of textures sRGB. Materials are unlit, the colours final, unless ``lit``.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from numpy import ndarray

COMPONENTS = {"float32": 5126, "uint16": 5123, "uint32": 5125}
KINDS = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}
ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER = 34962, 34963
CLAMP_TO_EDGE = 33071


class Glb:
    """A file under construction. What is added is referred to by the index that ``add`` returns.

    Args:
        name: name of the scene and root node; all other names start with it.
        lit: the viewer's lights shade the materials.
    """

    def __init__(self, name: str, *, lit: bool = False) -> None:
        self.name, self.lit = name, lit
        self._json: dict[str, Any] = {"asset": {"version": "2.0", "generator": "fourdfy"}, "scene": 0}
        if not lit:
            self._json["extensionsUsed"] = ["KHR_materials_unlit"]
        self._binary = bytearray()

    def add(self, kind: str, **entry: Any) -> int:
        """Append to one of the file's lists ("nodes", "meshes", ...)."""
        entries = self._json.setdefault(kind, [])
        entries.append(entry)
        return len(entries) - 1

    def add_array(
        self, values: ndarray, *, target: int | None = None, normalized: bool = False, bounds: bool = False
    ) -> int:
        """An accessor of numbers or of vectors (``[n]``, ``[n, 2..4]``).

        Args:
            target: what a GPU uses it for; None for animations.
            normalized: integers stand for 0..1.
            bounds: also write the least and the greatest values, which positions and key times need.
        """
        values = np.ascontiguousarray(values)
        view = self._add_view(values.tobytes(), **({"target": target} if target else {}))
        entry: dict[str, Any] = {
            "bufferView": view,
            "componentType": COMPONENTS[values.dtype.name],
            "count": len(values),
            "type": KINDS[values.shape[1] if values.ndim > 1 else 1],
        }
        if normalized:
            entry["normalized"] = True
        if bounds:
            entry["min"] = np.atleast_1d(values.min(axis=0)).tolist()
            entry["max"] = np.atleast_1d(values.max(axis=0)).tolist()
        return self.add("accessors", **entry)

    def add_material(self, image: bytes | None = None, mime_type: str = "image/png") -> int:
        """A matte material: white, to be multiplied by the vertex colours, or an image."""
        surface: dict[str, Any] = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
        if image is not None:
            source = self.add("images", bufferView=self._add_view(image), mimeType=mime_type)
            sampler = self.add("samplers", wrapS=CLAMP_TO_EDGE, wrapT=CLAMP_TO_EDGE)
            surface["baseColorTexture"] = {"index": self.add("textures", source=source, sampler=sampler)}
        unlit: dict[str, Any] = {} if self.lit else {"extensions": {"KHR_materials_unlit": {}}}
        return self.add("materials", name=self.name, pbrMetallicRoughness=surface, **unlit)

    def add_scene(self, nodes: list[int]) -> None:
        """The scene, of one root node above ``nodes``."""
        self.add("scenes", name=self.name, nodes=[self.add("nodes", name=self.name, children=nodes)])

    def to_bytes(self) -> bytes:
        """The whole file."""
        text = json.dumps(
            {**self._json, "buffers": [{"byteLength": len(self._binary)}]}, separators=(",", ":")
        )
        chunks = _chunk(b"JSON", text.encode(), b" ") + _chunk(b"BIN\0", bytes(self._binary), b"\0")
        return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks

    def _add_view(self, data: bytes, **entry: Any) -> int:
        offset = len(self._binary)
        self._binary += data + b"\0" * (-len(data) % 4)  # every component type is aligned then
        return self.add("bufferViews", buffer=0, byteOffset=offset, byteLength=len(data), **entry)


def _chunk(kind: bytes, data: bytes, padding: bytes) -> bytes:
    data += padding * (-len(data) % 4)
    return struct.pack("<I4s", len(data), kind) + data


def linear_from_srgb(values: ndarray) -> ndarray:
    """IEC 61966-2-1: from displayed values 0..1 to linear light 0..1."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
