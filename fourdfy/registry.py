"""Names in a config, and the classes that they stand for.

A config says ``geometry_type: implicit-volume``; ``find("implicit-volume", Geometry)`` gives the
class. Modules are imported when one of their names is first asked for, so ``import fourdfy`` is
cheap. A plugin registers itself with ``@register("my-geometry")``; a config names its module in
``plugins``, or an installed package does in its entry points of the group ``fourdfy.plugins``.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from traceback import extract_tb
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind")
Class = TypeVar("Class", bound=type)

PAIRS = "fourdfy.guidance.pairs"
"""The function that makes a guidance of the name ``PRIOR+DISTILLATION``."""

# Where the project's own components live; a name that is not here must register itself first.
MODULES = {
    "HashGrid": "fourdfy.scenes.nerf.encodings",
    "ProgressiveBandHashGrid": "fourdfy.scenes.nerf.encodings",
    "HashGridSpatialTime": "fourdfy.scenes.nerf.encodings",
    "HashGridSpatialTimeDeform": "fourdfy.scenes.nerf.encodings",
    "Grid": "fourdfy.scenes.nerf.encodings",
    "SphericalHarmonics": "fourdfy.scenes.nerf.encodings",
    "VanillaMLP": "fourdfy.scenes.nerf.mlp",
    "implicit-volume": "fourdfy.scenes.nerf.implicit_volume",
    "no-material": "fourdfy.scenes.nerf.materials",
    "diffuse-with-point-light-material": "fourdfy.scenes.nerf.materials",
    "neural-radiance-material": "fourdfy.scenes.nerf.materials",
    "neural-environment-map-background": "fourdfy.scenes.backgrounds",
    "solid-color-background": "fourdfy.scenes.backgrounds",
    "textured-background": "fourdfy.scenes.backgrounds",
    "nerf-volume-renderer": "fourdfy.scenes.nerf.renderer",
    "mask-nerf-volume-renderer": "fourdfy.scenes.nerf.renderer",
    "stable-nerf-volume-renderer": "fourdfy.scenes.nerf.renderer",
    "stable-diffusion-prompt-processor": "fourdfy.prompts.stable_diffusion",
    "zeroscope-prompt-processor": "fourdfy.prompts.zeroscope",
    "videocrafter-prompt-processor": "fourdfy.prompts.videocrafter",
    "sdxl-prompt-processor": "fourdfy.prompts.sdxl",
    "sd3-prompt-processor": "fourdfy.prompts.sd3",
    "wan-prompt-processor": "fourdfy.prompts.wan",
    "cogvideox-prompt-processor": "fourdfy.prompts.cogvideox",
    "animatediff-prompt-processor": "fourdfy.prompts.animatediff",
    "ltx-prompt-processor": "fourdfy.prompts.ltx",
    "stable-diffusion": "fourdfy.priors.stable_diffusion",
    "sdxl": "fourdfy.priors.sdxl",
    "sd3": "fourdfy.priors.sd3",
    "mvdream": "fourdfy.priors.mvdream",
    "zeroscope": "fourdfy.priors.zeroscope",
    "videocrafter": "fourdfy.priors.videocrafter",
    "wan": "fourdfy.priors.wan",
    "cogvideox": "fourdfy.priors.cogvideox",
    "animatediff": "fourdfy.priors.animatediff",
    "ltx": "fourdfy.priors.ltx",
    "sds": "fourdfy.guidance.score",
    "reconstruction": "fourdfy.guidance.reconstruction",
    "vsd": "fourdfy.guidance.vsd",
    "stable-diffusion-guidance": PAIRS,
    "stable-diffusion-vsd-guidance": PAIRS,
    "sdxl-guidance": PAIRS,
    "sd3-guidance": PAIRS,
    "multiview-diffusion-guidance": PAIRS,
    "zeroscope-guidance": PAIRS,
    "videocrafter-guidance": PAIRS,
    "wan-guidance": PAIRS,
    "cogvideox-guidance": PAIRS,
    "animatediff-guidance": PAIRS,
    "ltx-guidance": PAIRS,
    "mesh-exporter": "fourdfy.exporters.mesh_exporter",
    "video-exporter": "fourdfy.exporters.video_exporter",
    "all-exporter": "fourdfy.exporters.all_exporter",
    "single-multiview-combined-camera-datamodule": "fourdfy.data.datamodule",
    "fourdfy-system": "fourdfy.systems.fourdfy",
    "local": "fourdfy.launching.sweeps.runners",
    "ray": "fourdfy.launching.sweeps.ray_runner",
    "slurm": "fourdfy.launching.sweeps.slurm_runner",
}

ALIASES = {
    "4dfy-single-multiview-combined-camera-datamodule": "single-multiview-combined-camera-datamodule",
    "4dfy-zeroscope-guidance": "zeroscope-guidance",
    "4dfy-zeroscope-prompt-processor": "zeroscope-prompt-processor",
    "mvdream-multiview-diffusion-guidance": "multiview-diffusion-guidance",
    "mvdream-neural-environment-map-background": "neural-environment-map-background",
}
"""The names of the same components in threestudio's extensions for 4D-fy and MVDream."""

_CLASSES: dict[str, type] = {}
_SPECS: dict[str, Any] = {}
"""Class -> its module at registration, which differs if the module is imported again."""


def register(name: str) -> Callable[[Class], Class]:
    """Class decorator: make the class known as ``name`` in configs.

    A class replaces its earlier version when its module is reloaded, or its notebook cell runs again.

    Raises:
        ValueError: another class has the name, or it is one of the project's own.
    """

    def wrap(cls: Class) -> Class:
        own, known = MODULES.get(canonical(name)), _CLASSES.get(name)
        if own and own != cls.__module__:
            raise ValueError(f"{name!r} is already registered, in {own}")
        spec = getattr(sys.modules.get(cls.__module__), "__spec__", None)  # None in a notebook
        if known and known is not cls:
            same_place = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
            if not same_place or (spec and spec is _SPECS[name]):
                raise ValueError(
                    f"{name!r} is already registered for {known.__module__}.{known.__qualname__}"
                )
        _CLASSES[name], _SPECS[name] = cls, spec
        return cls

    return wrap


def find(name: str, kind: type[Kind]) -> type[Kind]:
    """The class registered as ``name``, which must be a subclass of ``kind``.

    Raises:
        ValueError: no such name, or a class of another kind; says which names there are.
    """
    name = canonical(name)
    if name not in _CLASSES and name in MODULES:
        import_module(MODULES[name])
    elif "+" in name and name not in _CLASSES:
        register(name)(import_module(PAIRS).join(name))
    cls = _CLASSES.get(name)
    if cls is not None and issubclass(cls, kind):
        return cls
    guess = difflib.get_close_matches(str(name), names(kind), n=1)
    hint = f"did you mean {guess[0]!r}?" if guess else f"expected one of {choices(kind)}"
    if cls is not None:
        raise ValueError(f"{name!r} is a {cls.__name__}, not a {kind.__name__}; {hint}")
    own = " For one of your own, set plugins=MODULE" if guess else ""
    raise ValueError(f"no {kind.__name__} is registered as {name!r}; {hint}{own}")


def choices(kind: type) -> str:
    """What can be typed for a class of this kind, for messages."""
    known = [*names(kind), *getattr(kind, "other_names", ())]
    return ", ".join(known) or f"the {kind.__name__}s of the modules in plugins (there are none yet)"


def names(kind: type) -> list[str]:
    """All registered names of a kind, sorted, without the pairs that were asked for so far."""
    for module in sorted(set(MODULES.values())):
        import_module(module)
    return sorted(name for name, cls in _CLASSES.items() if issubclass(cls, kind) and "+" not in name)


def canonical(name: str) -> str:
    """The name itself, or our name for the same component."""
    return ALIASES.get(name, name)


def import_plugins(modules: Sequence[str], folders: Sequence[Path]) -> list[Path]:
    """Import modules that register components; returns those of the ``folders`` that hold them.

    Folders are searched after everything that is installed, so that no file in them takes its place.

    Raises:
        ValueError: a module can't be imported; includes its error in one line.
    """
    sys.path += [str(folder) for folder in dict.fromkeys(folders) if str(folder) not in sys.path]
    used: list[Path] = []
    for name in modules:
        if not re.fullmatch(r"[\w.]{1,200}", name):
            raise ValueError(f"expected the name of a module, got {name[:100]!r}")
        try:
            import_module(name)
        except Exception as error:  # anything that a stranger's module raises
            hint = f"; write the module's name, {name[:-3]}" if name.endswith(".py") else ""
            looked = f"; looked in {', '.join(map(str, folders))}" if isinstance(error, ImportError) else ""
            missing = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
            if missing:
                looked += "; for another folder, set plugin_path=[DIR]"
            place = "" if missing else _place(error, folders)
            reason = " ".join(f"{type(error).__name__}: {error}{place}".split())
            raise ValueError(f"{name} can't be imported ({reason}){hint or looked}") from error
        package = sys.modules[name.partition(".")[0]]
        places = [Path(place).parent for place in getattr(package, "__path__", [])]
        home = places[0] if places else Path(package.__file__ or "").parent
        used += [folder for folder in folders if folder == home.resolve() and folder not in used]
    return used


def _place(error: Exception, folders: Sequence[Path]) -> str:
    """The line of the file in ``folders`` that fails while it is imported, for messages."""
    for frame in extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if any(map(file.is_relative_to, folders)) and not file.is_relative_to(Path(__file__).parent):
            return f", {file}, line {frame.lineno}"
    return ""


@cache
def import_installed_plugins() -> None:
    """Import what installed packages offer; a broken one causes a warning, since no config asked for it."""
    for entry in entry_points(group="fourdfy.plugins"):
        try:
            entry.load()
        except Exception as error:
            logger.warning("plugin %s (%s) can't be imported: %r", entry.name, entry.value, error)
