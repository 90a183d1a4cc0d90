"""Keys of the original's config files that have no effect here; they are accepted with a warning."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from fourdfy.config import init_fields, walk
from fourdfy.config_files import join

logger = logging.getLogger(__name__)

_DESCRIBED = "the model's description comes with its checkpoint"
_EVALUATED = "evaluation views are data.single_view's"
_GRID = "otype Grid has all its levels from the start"

NO_EFFECT: dict[str, tuple[str, Any]] = {
    "n_gpus": ("a run uses one GPU", 1),
    "data.multi_view.n_val_views": (_EVALUATED, None),
    "data.multi_view.n_test_views": (_EVALUATED, None),
    "data.multi_view.eval_height": (_EVALUATED, None),
    "data.multi_view.eval_width": (_EVALUATED, None),
    "data.multi_view.eval_batch_size": (_EVALUATED, None),
    "data.multi_view.eval_elevation_deg": (_EVALUATED, None),
    "data.multi_view.eval_camera_distance": (_EVALUATED, None),
    "data.multi_view.eval_fovy_deg": (_EVALUATED, None),
    "system.geometry.isosurface": ("a mesh is made when one is exported", True),
    "system.geometry.isosurface_method": ("meshes are made by marching cubes", "mt"),
    "system.geometry.isosurface_coarse_to_fine": ("the whole grid is sampled", True),
    "system.geometry.isosurface_deformable_grid": ("the grid is regular", False),
    "system.*_encoding_config.num_frames": ("a grid over time has no frames", None),
    "system.*.time_encoding_config.start_level": (_GRID, None),
    "system.*.time_encoding_config.start_step": (_GRID, None),
    "system.*.time_encoding_config.update_steps": (_GRID, None),
    "system.background.share_aug": ("all frames of a call share the colour", True),
    "system.prompt_processor*.spawn": ("the text encoder is freed without a process of its own", True),
    "system.prompt_processor_video.config": (_DESCRIBED, None),
    "system.guidance*.cache_dir": ("HF_HOME says where hub models are kept", None),
    "system.guidance_video.config": (_DESCRIBED, None),
    "system.guidance_video.width_vid": (
        "width is the prior's, data.single_view.width_vid the rendering's",
        None,
    ),
    "system.guidance_video.height_vid": (
        "height is the prior's, data.single_view.height_vid the rendering's",
        None,
    ),
    "system.exporter*.context_type": ("textures are baked without a graphics context", "gl"),
    "system.exporter*.save_video": ("video-exporter renders videos", False),
    "system.stage": ("the losses' weights say what is on", None),
    "system.prob_multi_view": ("data.prob_multi_view is read", None),
    "system.prob_single_view_video": ("data.single_view.prob_single_view_video is read", None),
    "system.simultan": ("data.single_view.simultan is read", None),
    "trainer.enable_progress_bar": ("the progress line is always written", True),
    "trainer.inference_mode": ("evaluation never builds a graph", False),
    "trainer.strategy": ("a run uses one device", "auto"),
    "checkpoint.save_last": ("the last checkpoint is always kept, to go on from", True),
}
"""Pattern of the dotted key -> what replaces it, or why nothing does; and the value that causes no warning.
A key that the component at its place declares is that component's own."""


def without_effect_dropped(schema: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's plain ``values`` without the keys of ``NO_EFFECT``; one warning names those that are set.

    Args:
        schema: the dataclass that the values are parsed into.
    """
    kept = copy.deepcopy(dict(values))
    lines = []
    for path, owner, node in walk(schema, kept):
        for name in [key for key in node if key not in init_fields(owner)]:
            key = join(path, str(name))
            if found := next(
                (what for pattern, what in NO_EFFECT.items() if fnmatchcase(key, pattern)), None
            ):
                reason, silent = found
                if node.pop(name) != silent:
                    lines.append(f"  {key}: {reason}")
    if lines:
        logger.warning("these keys of the config have no effect:\n%s", "\n".join(lines))
    return kept
