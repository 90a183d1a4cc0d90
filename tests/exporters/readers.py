"""What a GLB's accessors hold, by pygltflib and the specification's table of types."""

import numpy as np

TYPES = {5123: np.uint16, 5125: np.uint32, 5126: np.float32}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}


def accessor(gltf, index):
    """As floats 0..1 where integers are normalised."""
    entry = gltf.accessors[index]
    view = gltf.bufferViews[entry.bufferView]
    kind, width = TYPES[entry.componentType], WIDTHS[entry.type]
    assert view.byteOffset % 4 == 0 and view.byteLength == entry.count * width * np.dtype(kind).itemsize
    values = np.frombuffer(gltf.binary_blob(), kind, entry.count * width, view.byteOffset)
    values = values if width == 1 else values.reshape(-1, width)
    return values / 65535 if entry.normalized else values
