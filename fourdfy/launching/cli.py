"""The command line. Nothing heavy is imported until signals are heard."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fourdfy.signals import StopSignals, stop_with_parent
from fourdfy.terminal import log_to_stderr, open_streams, printable_lines, say

EXAMPLES = """examples:
  launch.py --config configs/shapes.yaml --train --prompt "a red cube spinning"
  launch.py --config configs/shapes_stage_1.yaml --train --gpu 0 trainer.max_steps=500
  launch.py --sweep prompts.txt --seeds 0-3 --config configs/shapes.yaml
  launch.py --trial outputs/shapes_stage_3/a_red_cube_spinning --export
  launch.py --trial outputs/shapes_stage_3/a_red_cube_spinning --view
  launch.py --compare outputs/shapes_stage_3/*
  launch.py --study study.yaml
"""

MODES = {
    "train": "train, then render the test views; a recipe runs all its stages and continues where it stopped",
    "validate": "render a trial's validation views",
    "test": "render a trial's test views and videos",
    "export": "export a trial as meshes, an animated GLB, or videos, and as share.html, a page to hand on",
    "evaluate": "judge a trial: motion, consistency, CLIP; for prompts of the shapes world, the ground truth",
    "check": "parse everything and print the plan; loads no weights",
    "fetch": "download (and convert) every model that the config needs; trains nothing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``launch.py``; returns the exit status (2 for a mistake in the arguments or the config, ``IN_USE``
    for a trial that another process is at work on).

    Raises:
        Stopped: a signal ended it; how to continue was logged.
    """
    with StopSignals(lambda: "run the same command again") as stop:
        stop_with_parent()
        return _main(argv, stop)


def _main(argv: Sequence[str] | None, stop: StopSignals) -> int:
    from fourdfy.devices import is_first_rank

    open_streams()
    args = _arguments(argv)
    log_to_stderr()
    # Only ours: numba writes thousands of debug records.
    level = logging.DEBUG if args.verbose else logging.INFO
    logging.getLogger("fourdfy").setLevel(level if is_first_rank() else logging.ERROR)
    if args.typecheck:
        _check_types()

    from fourdfy.config import ConfigError
    from fourdfy.files.atomic import ADVICE, ELSEWHERE, WriteError
    from fourdfy.launching.experiment import trial_arguments
    from fourdfy.launching.run import run
    from fourdfy.launching.trial import IN_USE, InUse

    _quieten_libraries(args.verbose)
    command = ["launch.py", *(sys.argv[1:] if argv is None else argv)]
    try:
        if args.sweep:
            return _sweep(args, stop)
        if args.compare:
            from fourdfy.launching.sharing import compare

            logging.getLogger(__name__).info("written to %s", compare(args.compare, args.out))
            return 0
        if _is_study(args):
            return _study(args, stop)
        config, overrides = args.config, args.overrides
        if args.trial:
            file, go_on = trial_arguments(args.trial)
            config, overrides = [file], [*go_on, *overrides]
        if args.replay:
            from fourdfy.launching.replay import replay

            replay(args.replay, overrides, gpu=args.gpu)
        else:
            given = {"gpu": args.gpu, "out": args.out, "first": args.stages}
            run(args.mode, config, overrides, command=command, stop=stop, **given)
    except ConfigError as error:
        say(f"error: {error}\n")
        return IN_USE if isinstance(error, InUse) else 2
    except FloatingPointError as error:  # training diverged
        say(f"error: {error}\n")
        return 1
    except RuntimeError as error:
        names = {kind.__name__ for kind in type(error).__mro__}
        if not names & {"OutOfMemoryError", "RankError"}:  # torch's, for one: no import
            raise
        say(f"error: {error}\n")
        return 1
    except OSError as error:
        is_told = isinstance(error, WriteError)
        if error.errno not in ADVICE and not is_told:
            raise
        what = str(error) if is_told else f"{error.filename or 'stdout'}: {error.strerror}"
        advice = f"; {ADVICE.get(error.errno or 0, ELSEWHERE)}" if error.filename else ""
        say(f"error: {what}{advice}\n")
        return 1
    return 0


def _sweep(args: argparse.Namespace, stop: StopSignals) -> int:
    from fourdfy.launching.sweeps.command import sweep

    given = {
        "config": args.config and [str(name) for name in args.config],
        "seeds": args.seeds,
        "per_gpu": args.per_gpu,
    }
    given = {key: value for key, value in given.items() if value is not None}
    options = [word for word in ("--verbose", "--typecheck") if getattr(args, word[2:])]
    how = {"mode": args.sweep_mode, "gpu": args.gpu, "options": options, "stop": stop}
    return sweep(args.sweep, given, args.overrides, **how)


def _is_study(args: argparse.Namespace) -> bool:
    return bool(args.study or args.collect or args.study_results)


def _study(args: argparse.Namespace, stop: StopSignals) -> int:
    from fourdfy.launching.studies import collect, make_study, show_results

    if args.study:
        make_study(args.study, args.overrides)
    elif args.collect:
        collect(args.collect, stop)
    else:
        show_results(args.study_results)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with ``--prompt`` as one of the overrides."""
    from fourdfy.config_files import PROMPT, literal_override

    parser = _parser()
    args, unknown = parser.parse_known_intermixed_args(argv)
    if strange := [word for word in unknown if not re.match(r"-+\w+[.=]", word)]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    study = _is_study(args)
    if not (args.config or args.trial or args.replay or args.sweep or args.compare or study):
        sources = "--config --trial --replay --compare --sweep --study --collect --study-results"
        parser.error(f"one of {sources} is required")
    others = (args.mode, args.view, args.sweep, args.stages, args.gpu, args.prompt, unknown)
    if args.compare and (any((*others, args.overrides)) or len(args.compare) < 2):
        parser.error("--compare takes two trials or more, --out, and nothing else")
    if study and any((*others, args.overrides and not args.study)):
        parser.error("--study takes key=value and nothing else, --collect and --study-results not even that")
    if args.sweep and (args.trial or args.replay or args.mode):
        parser.error("--sweep takes no --trial, no --replay and no mode; its jobs are --train")
    if not args.sweep and (args.seeds or args.per_gpu or args.sweep_mode):
        parser.error("--seeds, --per-gpu, --dry-run and --gather are for --sweep")
    if args.stages is not None and (args.mode != "train" or args.stages < 1):
        parser.error("--stages says how many stages of a recipe to --train, from 1")
    if args.view:
        if args.mode not in (None, "train") or args.replay or args.sweep:
            parser.error("--view stands alone, to look at a trial, or beside --train")
        args.overrides += ["viewer.enable=true"] if args.mode else []
        args.mode = args.mode or "view"
    if not (args.sweep or args.compare or study) and (args.mode is None) == (args.replay is None):
        modes = " ".join(f"--{mode}" for mode in (*MODES, "view"))
        parser.error(f"--replay takes no mode; the others need one of {modes}")
    if args.out and not args.compare and args.mode not in ("validate", "test", "export", "evaluate"):
        parser.error("--out says where an evaluation writes; for a run: exp_root_dir=DIR")
    args.overrides = [*unknown, *args.overrides]  # a key=value with dashes is refused with the others
    if args.prompt is not None:
        if both := [word for word in args.overrides if re.match(rf"(stage_\d+\.)?{PROMPT}=", word)]:
            parser.error(f"--prompt and {both[0]!r} both name the prompt; give one of them")
        # It comes first, because words that stand alone are taken to belong to it.
        args.overrides.insert(0, literal_override(PROMPT, args.prompt))
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable_lines(message)}; --help lists what can be typed\n")


def _parser() -> argparse.ArgumentParser:
    from fourdfy.config_files import PROMPT

    parser = _Parser(
        prog="launch.py",
        allow_abbrev=False,  # --seed=3 would be --seeds
        description="fourdfy: text to 4D scenes by hybrid score distillation",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--config", action="append", type=Path, metavar="YAML",
        help="an experiment or a recipe; several are merged left to right",
    )  # fmt: skip
    source.add_argument(
        "--trial", type=Path, metavar="DIR",
        help="the folder of an earlier run, to continue or evaluate; results go into it",
    )  # fmt: skip
    source.add_argument(
        "--replay", type=Path, metavar="FILE",
        help="repeat a step that was not finite, from <trial>/replay.pt, and say what failed first",
    )  # fmt: skip
    source.add_argument(
        "--compare", nargs="+", type=Path, metavar="DIR",
        help="write compare.html: the clips of some trials in step, their settings, scores and curves",
    )  # fmt: skip
    source.add_argument(
        "--study", type=Path, metavar="YAML",
        help="make a user study: a page that compares clips of methods and needs no server (docs/study.md)",
    )  # fmt: skip
    source.add_argument(
        "--collect", type=Path, metavar="DIR",
        help="show a study's page to browsers of this machine, and keep their answers",
    )  # fmt: skip
    source.add_argument(
        "--study-results", type=Path, metavar="DIR", help="what a study's raters preferred: table and plot"
    )
    modes = parser.add_mutually_exclusive_group()
    for mode, text in MODES.items():
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=text)
    parser.add_argument(
        "--view", action="store_true",
        help="look at a trial in the browser; beside --train, while it is trained (docs/viewer.md)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu", default=None, metavar="ID",
        help="cpu, cuda, or the number of a GPU among those that CUDA_VISIBLE_DEVICES leaves visible "
        "(default: the first GPU, else the CPU); several, as in 0,1, train one scene together",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", metavar="TEXT", help=f"the prompt, taken literally (as {PROMPT}=TEXT, but for ${{...}})"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="where results of --validate, --test, --export and --evaluate go instead of the trial's save/, "
        "and that of --compare instead of this folder",
    )  # fmt: skip
    parser.add_argument("--stages", type=int, metavar="N", help="train only the first N stages of a recipe")
    sweep = parser.add_argument_group("sweeps", "runs of all combinations of prompts, seeds and settings")
    sweep.add_argument(
        "--sweep", type=Path, metavar="FILE",
        help="run what a sweep's YAML file says, or, with --config, a text file of prompts; goes on where it "
        "stopped",
    )  # fmt: skip
    sweep.add_argument(
        "--seeds", metavar="0-3", help="the seeds of a sweep, also such as 0,2,5-7 (default: 0)"
    )
    sweep.add_argument(
        "--per-gpu", type=int, metavar="K", help="runs at a time on each visible GPU, or the CPU"
    )
    modes = sweep.add_mutually_exclusive_group()
    for name, text in (
        ("dry-run", "list the jobs, their memory and the time that is left"),
        ("gather", "write results.csv and index.html anew, also while the sweep runs"),
    ):
        modes.add_argument(f"--{name}", dest="sweep_mode", action="store_const", const=name, help=text)
    parser.add_argument("--verbose", action="store_true", help="log more")
    parser.add_argument(
        "--typecheck", action="store_true", help="check tensor shapes and types in every call"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change any key of the config")
    return parser


def _quieten_libraries(verbose: bool) -> None:
    """Silence the libraries' start-up messages, which are of no use to a user; errors still appear."""
    if verbose:
        return
    for name in ("pytorch_lightning", "lightning_fabric", "numba", "httpx", "websockets"):
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=name)


def _check_types() -> None:
    from jaxtyping import install_import_hook

    install_import_hook("fourdfy", "beartype.beartype")


if __name__ == "__main__":
    raise SystemExit(main())
