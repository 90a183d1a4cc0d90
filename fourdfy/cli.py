"""The command line. Nothing heavy is imported until the arguments are understood."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from fourdfy.config_files import literal_override

PROMPT = "system.prompt_processor.prompt"

EXAMPLES = """examples:
  launch.py --config configs/shapes.yaml --train --prompt "a red cube spinning"
  launch.py --config configs/shapes_stage_1.yaml --train --gpu 0 trainer.max_steps=500
  launch.py --config <trial>/configs/parsed.yaml --test resume=<trial>/ckpts/last.ckpt
  launch.py --config <trial>/configs/parsed.yaml --export resume=<trial>/ckpts/last.ckpt
"""

MODES = {
    "train": "train, then render the test views; a recipe runs all its stages and goes on where it stopped",
    "validate": "render the validation views of resume=CKPT",
    "test": "render the test views and videos of resume=CKPT",
    "export": "write what opens elsewhere from resume=CKPT: meshes, an animated GLB, or videos",
    "evaluate": "compare resume=CKPT with the ground truth (prompts of the shapes world)",
    "check": "parse everything and print the plan; loads no weights",
    "fetch": "download (and convert) every model that the config needs; trains nothing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``launch.py``; returns the exit status (2 for a mistake in the arguments or the config)."""
    args = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Ours alone: numba's debug records are thousands.
    logging.getLogger("fourdfy").setLevel(logging.DEBUG if args.verbose else logging.INFO)
    device = select_device(args.gpu)
    if args.typecheck:
        _check_types()

    from fourdfy.config import ConfigError
    from fourdfy.run import run

    _quieten_libraries(args.verbose)
    command = ["launch.py", *(sys.argv[1:] if argv is None else argv)]
    try:
        run(args.mode, args.config, args.overrides, device=device, command=command)
    except (ConfigError, FileNotFoundError) as error:  # the latter: a model that is nowhere
        sys.stderr.write(f"error: {error}\n")
        return 2
    except FloatingPointError as error:  # training diverged
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with ``--prompt`` as one of the overrides."""
    parser = _parser()
    args, unknown = parser.parse_known_intermixed_args(argv)
    if strange := [word for word in unknown if not re.match(r"-+\w+[.=]", word)]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    args.overrides = [*unknown, *args.overrides]  # a key=value with dashes is refused with the others
    if args.prompt is not None:
        if both := [word for word in args.overrides if re.match(rf"(stage_\d+\.)?{PROMPT}=", word)]:
            parser.error(f"--prompt and {both[0]!r} both name the prompt; give one of them")
        args.overrides.append(literal_override(PROMPT, args.prompt))
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.py",
        description="fourdfy: text to 4D scenes by hybrid score distillation",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", action="append", type=Path, required=True, metavar="YAML",
        help="an experiment or a recipe; several are merged left to right",
    )  # fmt: skip
    modes = parser.add_mutually_exclusive_group(required=True)
    for mode, text in MODES.items():
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=text)
    parser.add_argument(
        "--gpu", default=None, metavar="ID",
        help="which GPU, or cpu; CUDA_VISIBLE_DEVICES wins (default: the first GPU, else the CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", metavar="TEXT", help=f"what to make, taken literally (as {PROMPT}=TEXT, but for ${{...}})"
    )
    parser.add_argument("--verbose", action="store_true", help="log more")
    parser.add_argument(
        "--typecheck", action="store_true", help="check tensor shapes and types in every call"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change any key of the config")
    return parser


def select_device(gpu: str | None) -> str:
    """Hide the GPUs that were not asked for (before CUDA is touched); "cuda" or "cpu"."""
    if gpu == "cpu":
        return "cpu"
    if gpu is not None:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", gpu)
    import torch

    if torch.cuda.is_available():
        return "cuda"
    logging.getLogger(__name__).info("no GPU found: running on the CPU")
    return "cpu"


def _quieten_libraries(verbose: bool) -> None:
    """Their start-up chatter is of no use to a user; errors still come through."""
    if verbose:
        return
    for name in ("pytorch_lightning", "lightning_fabric", "numba", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=name)


def _check_types() -> None:
    from jaxtyping import install_import_hook

    install_import_hook("fourdfy", "beartype.beartype")
