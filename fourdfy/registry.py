"""Names in a config, and the classes they stand for.

A config says ``geometry_type: implicit-volume``; ``find("implicit-volume", Geometry)`` gives the
class. Modules are imported when one of their names is first asked for, so ``import fourdfy`` is
cheap. A plugin registers itself with ``@register("my-geometry")`` in any module it imports.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module

# Where the project's own components live; a name that is not here must register itself first.
MODULES = {
    "HashGrid": "fourdfy.fields.encodings",
    "ProgressiveBandHashGrid": "fourdfy.fields.encodings",
    "HashGridSpatialTime": "fourdfy.fields.encodings",
    "HashGridSpatialTimeDeform": "fourdfy.fields.encodings",
    "Grid": "fourdfy.fields.encodings",
    "SphericalHarmonics": "fourdfy.fields.encodings",
    "VanillaMLP": "fourdfy.fields.mlp",
    "implicit-volume": "fourdfy.fields.implicit_volume",
    "no-material": "fourdfy.fields.materials",
    "diffuse-with-point-light-material": "fourdfy.fields.materials",
    "neural-environment-map-background": "fourdfy.fields.backgrounds",
    "solid-color-background": "fourdfy.fields.backgrounds",
    "nerf-volume-renderer": "fourdfy.renderers.nerf",
    "mask-nerf-volume-renderer": "fourdfy.renderers.masked",
    "stable-nerf-volume-renderer": "fourdfy.renderers.interleaved",
    "stable-diffusion-prompt-processor": "fourdfy.prompts.stable_diffusion",
    "zeroscope-prompt-processor": "fourdfy.prompts.zeroscope",
    "videocrafter-prompt-processor": "fourdfy.prompts.videocrafter",
    "stable-diffusion-guidance": "fourdfy.guidance.stable_diffusion",
    "stable-diffusion-vsd-guidance": "fourdfy.guidance.stable_diffusion_vsd",
    "multiview-diffusion-guidance": "fourdfy.guidance.multiview",
    "zeroscope-guidance": "fourdfy.guidance.zeroscope",
    "videocrafter-guidance": "fourdfy.guidance.videocrafter",
    "mesh-exporter": "fourdfy.exporters.mesh_exporter",
    "video-exporter": "fourdfy.exporters.video_exporter",
    "single-multiview-combined-camera-datamodule": "fourdfy.data.datamodule",
    "fourdfy-system": "fourdfy.systems.fourdfy",
}

ALIASES = {
    "4dfy-single-multiview-combined-camera-datamodule": "single-multiview-combined-camera-datamodule",
    "4dfy-zeroscope-guidance": "zeroscope-guidance",
    "4dfy-zeroscope-prompt-processor": "zeroscope-prompt-processor",
    "mvdream-multiview-diffusion-guidance": "multiview-diffusion-guidance",
    "mvdream-neural-environment-map-background": "neural-environment-map-background",
}
"""What threestudio's extensions for 4D-fy and MVDream call the same components."""

_CLASSES: dict[str, type] = {}


def register(name: str) -> Callable[[type], type]:
    """Class decorator: make the class known as ``name`` in configs.

    Raises:
        ValueError: another class has the name, or it is one of the project's own.
    """

    def wrap(cls: type) -> type:
        own, known = MODULES.get(ALIASES.get(name, name)), _CLASSES.get(name)
        if own and own != cls.__module__:
            raise ValueError(f"{name!r} is already registered, in {own}")
        if known and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{name!r} is already registered for {known.__module__}.{known.__qualname__}")
        _CLASSES[name] = cls
        return cls

    return wrap


def find(name: str, kind: type) -> type:
    """The class registered as ``name``, which must be a subclass of ``kind``.

    Raises:
        ValueError: no such name, or a class of another kind; says which names there are.
    """
    name = ALIASES.get(name, name)
    if name not in _CLASSES and name in MODULES:
        import_module(MODULES[name])
    cls = _CLASSES.get(name)
    if cls is not None and issubclass(cls, kind):
        return cls
    if cls is not None:
        raise ValueError(f"{name!r} is a {cls.__name__}, not a {kind.__name__}")
    guess = difflib.get_close_matches(str(name), names(kind), n=1)
    hint = f"did you mean {guess[0]!r}?" if guess else f"known: {', '.join(names(kind))}"
    raise ValueError(f"no {kind.__name__} is registered as {name!r}; {hint}")


def names(kind: type) -> list[str]:
    """All registered names of a kind, sorted."""
    for module in sorted(set(MODULES.values())):
        import_module(module)
    return sorted(name for name, cls in _CLASSES.items() if issubclass(cls, kind))
