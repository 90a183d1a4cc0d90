"""Guidances made of a prior and a distillation: any pair, and the pairs with their own names.

A config names a pair as ``PRIOR+DISTILLATION``, such as ``zeroscope+vsd``; its keys are those of both.
"""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import Any

from fourdfy.config import file_path
from fourdfy.guidance.base import Guidance
from fourdfy.guidance.distillation import Distillation
from fourdfy.priors.base import Prior
from fourdfy.registry import find, register


def join(pair: str, *fields: tuple[str, Any, Any]) -> type:
    """The guidance of ``PRIOR+DISTILLATION``.

    Args:
        fields: (name, type, default) of config fields that differ from both.

    Raises:
        ValueError: there is no such prior, or no such distillation of one.
    """
    first, _, second = pair.partition("+")
    if not first or not second or "+" in second:
        raise ValueError(f"expected PRIOR+DISTILLATION, such as zeroscope+sds, got {pair!r}")
    prior, distillation = find(first, Prior), find(second, Distillation)
    if issubclass(distillation, Guidance):
        raise ValueError(f"{second!r} has its prior; after {first}+ comes sds, reconstruction or vsd")
    bases = (distillation.Config, prior.Config)
    content = {
        "__doc__": f"{distillation.__name__} of {prior.__name__}.",
        "__module__": __name__,
        "Config": make_dataclass(
            "Config",
            fields,
            bases=bases,
            namespace={"is_video": prior.is_video},
            frozen=True,
            kw_only=True,
        ),
        "prior_class": prior,
        "losses": tuple(
            "sds_video" if name == "sds" and prior.is_video else name for name in distillation.losses
        ),
    }
    return type(f"{prior.__name__}{distillation.__name__}", (distillation, Guidance), content)


for name, pair in {
    "stable-diffusion-guidance": "stable-diffusion+sds",
    "sdxl-guidance": "sdxl+sds",
    "sd3-guidance": "sd3+sds",
    "multiview-diffusion-guidance": "mvdream+reconstruction",
    "zeroscope-guidance": "zeroscope+sds",
    "videocrafter-guidance": "videocrafter+sds",
    "wan-guidance": "wan+sds",
    "cogvideox-guidance": "cogvideox+sds",
    "animatediff-guidance": "animatediff+sds",
    "ltx-guidance": "ltx+sds",
}.items():
    register(name)(join(pair))

SECOND_MODEL = (
    "pretrained_model_name_or_path_lora",
    str | None,
    file_path("stabilityai/stable-diffusion-2-1"),
)
register("stable-diffusion-vsd-guidance")(join("stable-diffusion+vsd", SECOND_MODEL))
