"""``evaluation``: what a finished scene is judged by, and from where."""

from __future__ import annotations

from dataclasses import dataclass

from fourdfy.config import file_path
from fourdfy.config_files import ConfigError

# Each import registers metrics.
from fourdfy.evaluation import consistency, likeness, motion  # noqa: F401
from fourdfy.evaluation.registry import METRICS, Metric
from fourdfy.evaluation.views import Protocol


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Protocol):
    """``evaluation``: how ``--evaluate`` judges a scene. docs/evaluation.md explains the metrics."""

    after_training: bool = False
    """Judge each stage when its test views are rendered, as ``--evaluate`` does; ``--fetch`` then includes
    the networks."""
    metrics: list[str] | None = None
    """Names of metrics; null: all that apply. Those that need CLIP or X-CLIP are then left out where the
    prompt has a ground truth, or where there is none."""
    clip: str = file_path("openai/clip-vit-base-patch32")
    """Folder or hub id of the CLIP model."""
    xclip: str = file_path("microsoft/xclip-base-patch32")
    """Folder or hub id of the X-CLIP model."""
    captions: str = file_path("sweeps/benchmark.yaml")
    """The prompts among which ``clip_r_precision`` looks for the scene's own: a sweep's file, or a text file
    with one in each line."""

    def __post_init__(self) -> None:
        for name in self.metrics or ():
            if name not in self.measurable():
                known = ", ".join(sorted(self.measurable()))
                raise ValueError(f"metrics: no metric {name!r} that can be asked for; expected {known}")

    @staticmethod
    def measurable() -> dict[str, Metric]:
        """The metrics that need nothing but a scene."""
        return {name: entry for name, entry in METRICS.items() if entry.measure}

    def chosen(self, prompt: str | None, learned: bool) -> list[Metric]:
        """The metrics of a scene whose prompt has a ground truth, or none.

        Raises:
            ConfigError: one that was asked for compares with a prompt, and there is none.
        """
        known = self.measurable()
        if self.metrics is None:
            return [entry for entry in known.values() if not entry.needs or (prompt and not learned)]
        chosen = [known[name] for name in self.metrics]
        if textual := [] if prompt else [entry.name for entry in chosen if entry.needs]:
            raise ConfigError(
                f"evaluation.metrics: {textual[0]} needs a prompt, and this scene has none; leave it out"
            )
        return chosen

    def models(self, prompt: str | None, learned: bool) -> dict[str, str]:
        """Part -> name of each network that these metrics need; see ``chosen``."""
        needed = {part for entry in self.chosen(prompt, learned) for part in entry.needs}
        return {part: getattr(self, part) for part in sorted(needed)}
