"""Running the real command line in tests, at toy size, with the priors that ship."""

from pathlib import Path

from fourdfy.launching.cli import main

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"

TINY = (
    "use_timestamp=false",
    "tag=tiny",
    "trainer.max_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=0",
    "data.single_view.width=16",
    "data.single_view.height=16",
    "data.single_view.eval_width=8",
    "data.single_view.eval_height=8",
    "data.single_view.n_test_views=2",
    "data.single_view.num_frames_factor=1",
    "data.single_view.width_vid=16",
    "data.single_view.height_vid=16",
    "data.multi_view.width=16",
    "data.multi_view.height=16",
    "system.geometry.pos_encoding_config.n_levels=2",
    "system.geometry.pos_encoding_config.time_encoding_config.n_levels=2",
    "system.renderer.num_samples_per_ray=16",
    "system.renderer.eval_samples_per_ray=16",
    "evaluation.size=24",
    "evaluation.views=6",
    "evaluation.frames=3",
    "system.prompt_processor.prompt=a red cube bouncing",
)


def launch(config: str | Path, mode: str, root: Path, *overrides: str) -> int:
    """``launch.py --config CONFIG --MODE`` on the CPU; gives the exit status."""
    path = CONFIGS / config if isinstance(config, str) else config
    given = [f"exp_root_dir={root}", *TINY, *overrides]
    return main(["--config", str(path), f"--{mode}", "--gpu", "cpu", *given])


def trial(root: Path, name: str) -> Path:
    """The folder of a trial started with ``TINY``."""
    return root / name / "tiny"
