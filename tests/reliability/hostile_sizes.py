"""Numbers beyond any use, for any key that is a number, and sizes that are so together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from fourdfy.launching.experiment import load_experiment
from fourdfy.launching.plan import check_run
from tests.commands import CONFIGS
from tests.reliability.fuzzing import Case

FILES = ("shapes_stage_1.yaml", "shapes_stage_2.yaml", "shapes_stage_3.yaml")
VALUES = (
    "1000000000",
    "1000000",
    "100000",
    "1000000000000000000000",
    "2147483648",
    "-1000000000",
    "1e300",
    "0",
    "4096",
)
TOGETHER = {
    **{f"data.single_view.{key}": 8192 for key in ("width", "height", "width_vid", "height_vid")},
    **{f"data.single_view.{key}": 1024 for key in ("batch_size", "num_frames", "eval_batch_size")},
    **{f"data.single_view.{key}": 8192 for key in ("eval_width", "eval_height")},
    **{f"data.single_view.{key}": 100 for key in ("num_frames_factor", "num_test_loop_factor")},
    "data.single_view.num_test_loop_static": 360,
    "data.multi_view.batch_size": 1024,
    "data.multi_view.width": 8192,
    "data.multi_view.height": 8192,
    "system.renderer.num_samples_per_ray": 16384,
    "system.renderer.grid_resolution": 254,
    "system.geometry.n_feature_dims": 256,
    "system.geometry.mlp_network_config.n_neurons": 4096,
    "system.geometry.mlp_network_config.n_hidden_layers": 32,
    "system.geometry.pos_encoding_config.n_levels": 32,
    "system.geometry.pos_encoding_config.n_features_per_level": 8,
    "system.geometry.pos_encoding_config.log2_hashmap_size": 24,
}
"""The largest values that each key may have by itself."""
PROMPT = "system.prompt_processor.prompt=a red cube bouncing"


@cache
def _numbers(file: str) -> list[str]:
    """The dotted keys of all numbers in a config and its defaults, and of some that are lists of them."""
    cfg = load_experiment([CONFIGS / file], [PROMPT]).cfg
    return sorted(key for key, value in _leaves(cfg) if type(value) in (int, float))


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    fields = value if isinstance(value, Mapping) else getattr(value, "__dataclass_fields__", None)
    if fields is None:
        yield key, value
        return
    for name in fields:
        inner = value[name] if isinstance(value, Mapping) else getattr(value, name)
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))


def draw(random: Random, place: Path) -> Case:
    file = random.choice(FILES)
    if random.random() < 0.5:
        keys = random.sample(_numbers(file), random.choice([1, 1, 2]))
        words = [f"{key}={random.choice(VALUES)}" for key in keys]
    else:
        words = [f"{key}={TOGETHER[key]}" for key in random.sample(sorted(TOGETHER), random.randint(2, 8))]

    def read() -> None:
        logging.disable()
        try:
            experiment = load_experiment([CONFIGS / file], [PROMPT, *words])
            check_run([experiment], "cpu")
            data = experiment.build_data()
            next(iter(data.train_dataloader(0)), None)
            next(iter(data.test_dataloader()), None)
        finally:
            logging.disable(logging.NOTSET)

    return Case(" ".join((file, *words)), read)
