"""Plant bugs of one line, one at a time, and say which of them the tests notice.

    python benchmarks/mutants.py                           # all of mutants.yaml
    python benchmarks/mutants.py --only systems/ frozen    # those whose file or bug has one of the words
    python benchmarks/mutants.py --auto fourdfy/systems/*.py --count 40 --seed 1
    python benchmarks/mutants.py --auto fourdfy/seeds.py --tests tests/systems

A bug is planted in a copy of the tree, where its tests run until the first one fails. The bug is killed
if one fails, the process dies or time runs out; the exit status is 1 if a bug survives. ``--auto`` makes
bugs itself: it negates a condition, swaps ``and`` and ``or``, moves a comparison or a number by one, leaves
a statement or an argument out. Some of these change nothing that matters, so a survivor has to be read.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("mutants.yaml")
NOT_COPIED = (".git", ".venv", "__pycache__", "outputs", "*.egg-info", ".*_cache", ".hypothesis")
COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    bug: str
    file: str
    old: str
    """Occurs once in the file."""
    new: str
    tests: tuple[str, ...]
    """What pytest is called with."""

    def source(self, tree: Path) -> str:
        """The file's text with the bug in it.

        Raises:
            ValueError: the text to be replaced is not there, or not once.
        """
        text = (tree / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.bug}: {self.old!r} occurs {count} times in {self.file}; expected once")
        return text.replace(self.old, self.new)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    mutants = read_table()
    if args.auto:
        tests = tuple(args.tests) if args.tests else None
        mutants = [made for file in args.auto for made in make_mutants(ROOT, file, tests)]
        mutants = random.Random(args.seed).sample(mutants, min(args.count, len(mutants)))
    elif args.only:
        mutants = [m for m in mutants if any(word in f"{m.file} {m.bug}" for word in args.only)]
    survivors = run(ROOT, mutants, seconds=args.seconds, jobs=args.jobs)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed")
    for mutant in survivors:
        print(f"survived: {mutant.file}: {mutant.bug}")
    return 1 if survivors else 0


def read_table() -> list[Mutant]:
    """The mutants of ``mutants.yaml``: by file, each with its own tests or those of the file."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return [
        Mutant(bug["bug"], file, bug["old"], bug["new"], tuple(bug.get("tests", entry["tests"]).split()))
        for file, entry in table.items()
        for bug in entry["bugs"]
    ]


def run(tree: Path, mutants: Sequence[Mutant], *, seconds: float, jobs: int = 1) -> list[Mutant]:
    """The mutants that survive; each one's fate is printed as soon as it is known.

    Raises:
        ValueError: a mutant does not fit the tree.
        RuntimeError: some mutants' tests fail without them; raised when all others have their fate.
    """
    sources = [mutant.source(tree) for mutant in mutants]
    copies: SimpleQueue[Path] = SimpleQueue()
    sound: dict[tuple[str, ...], bool] = {}

    def survives(mutant: Mutant, source: str) -> bool:
        copy, began = copies.get(), time.perf_counter()
        file = copy / mutant.file
        right = file.read_text(encoding="utf-8")
        try:
            if mutant.tests not in sound:
                sound[mutant.tests] = _passes(copy, mutant.tests, None)
            if not sound[mutant.tests]:
                return False
            file.write_text(source, encoding="utf-8")
            passed = _passes(copy, mutant.tests, seconds)
        finally:
            file.write_text(right, encoding="utf-8")
            copies.put(copy)
        fate, took = "SURVIVED" if passed else "killed", time.perf_counter() - began
        print(f"{fate:8} {took:4.0f} s  {mutant.file}: {mutant.bug}", flush=True)
        return passed

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        for k in range(jobs):
            ignored = shutil.ignore_patterns(*NOT_COPIED)
            copies.put(shutil.copytree(tree, Path(folder, str(k)), ignore=ignored, symlinks=True))
        fates = list(pool.map(survives, mutants, sources))
    if broken := [" ".join(tests) for tests, passed in sound.items() if not passed]:
        raise RuntimeError(f"these tests fail without any bug: {'; '.join(broken)}")
    return [mutant for mutant, passed in zip(mutants, fates, strict=True) if passed]


def _passes(tree: Path, tests: Sequence[str], seconds: float | None) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    # Without bytecode: a file that changes twice within a second may be taken for the one of before.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH")))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout.decode()}{done.stderr.decode()}")
    return done.returncode == 0


# ---------------------------------------------------------------------------------------------
# Mutants that are made


def make_mutants(tree: Path, file: str, tests: tuple[str, ...] | None = None) -> Iterator[Mutant]:
    """All that can be made of a file, each as the whole file's text; tests are those of its folder."""
    right = (tree / file).read_text(encoding="utf-8")
    source = right.encode()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    if tests is None:
        tests = ("/".join(["tests", *Path(file).parts[1:-1]]),)
    for node in _code(ast.parse(right)):
        for part, new in _replacements(node, right):
            begin = starts[part.lineno - 1] + part.col_offset
            end = starts[part.end_lineno - 1] + part.end_col_offset
            wrong = (source[:begin] + new.encode() + source[end:]).decode()
            old, new = (" ".join(text.split()) for text in (source[begin:end].decode(), new))
            yield Mutant(f"line {part.lineno}: {old} -> {new}", file, right, wrong, tests)


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it but annotations and f-strings, which change no result."""
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list") and not isinstance(node, ast.JoinedStr):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _code(child)


def _replacements(node: ast.AST, source: str) -> Iterator[tuple[ast.AST, str]]:
    """A part of the node, and what stands there instead."""

    def text(part: ast.AST) -> str:
        return ast.get_source_segment(source, part) or ""

    match node:
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Raise():
            yield node, "pass"
        case ast.If(ast.Name() | ast.Attribute() | ast.Call() as test):
            yield test, f"not {text(test)}"
        case ast.IfExp(test, body, orelse):
            yield node, f"({text(orelse)} if {text(test)} else {text(body)})"
        case ast.BoolOp(operator, values):
            other = " or " if isinstance(operator, ast.And) else " and "
            yield node, f"({other.join(f'({text(value)})' for value in values)})"
        case ast.Compare(left, [operator], [right]):
            yield node, f"({text(left)} {COMPARISONS[type(operator)]} {text(right)})"
        case ast.UnaryOp(ast.Not(), operand):
            yield node, f"({text(operand)})"
        case ast.Constant(bool(value)):
            yield node, str(not value)
        case ast.Constant(int() | float()):
            yield node, f"({text(node)} + 1)"
        case ast.Call(function, arguments, keywords):
            for left_out in keywords:
                kept = [*arguments, *(keyword for keyword in keywords if keyword is not left_out)]
                yield node, f"{text(function)}({', '.join(map(text, kept))})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="mutants of the table with such a word")
    parser.add_argument("--auto", nargs="+", metavar="FILE", help="make mutants of these files")
    parser.add_argument("--tests", nargs="+", help="for --auto; else those of the file's folder")
    parser.add_argument("--count", type=int, default=20, help="of --auto")
    parser.add_argument("--seed", type=int, default=0, help="of --auto")
    parser.add_argument("--seconds", type=float, default=300, help="that a mutant's tests may take")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time, each in its own copy")
    return parser


if __name__ == "__main__":
    sys.exit(main())
