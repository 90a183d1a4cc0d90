"""Files that were cut short, lost or changed since, and disks that are full."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from faults.runs import Undisturbed, differences, results, start
from faults.table import Row
from fourdfy.systems.checkpoint import LAST, read_checkpoint
from tests.commands import trial

PAGE = 4096


def half_way(folder: Path, reference: Undisturbed) -> Path:
    """A run that was stopped in its last stage, one step before the end."""
    root = folder / "half_way"
    child = start(reference.command(root), folder / "log.txt")
    for _ in child.phases():
        if child.steps and child.steps[-1] == (reference.stages[-1], 2):
            child.send(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM, child.said()
    return root


def harmed_files(count: int, seed: int, folder: Path, reference: Undisturbed) -> Iterator[Row]:
    """One file of a run that is half way is cut short, emptied or removed, before the run goes on."""
    base, log = half_way(folder, reference), folder / "log.txt"
    kinds: dict[str, list[Path]] = {}
    for path in sorted(base.rglob("*")):
        if path.is_file() and path.name != ".lock":
            kinds.setdefault(path.suffix or path.name, []).append(path.relative_to(base))
    row = Row(f"a file cut short, emptied or removed ({', '.join(kinds)})")
    for number in range(count):
        draws = random.Random(f"{seed}/{number}")
        root = folder / "harmed"
        shutil.copytree(base, root)
        name = draws.choice(kinds[draws.choice([*kinds])])
        harm = draws.choice(["cut", "cut", "empty", "remove"])
        _harm(root / name, harm, draws)
        child = start(reference.command(root), log)
        status, said = child.wait(), child.said()
        told = f"number {number}: {harm} {name}"
        wrong = differences(results(root), reference.results) if status == 0 else []
        if status == 0 and not wrong:
            row.add("went on to the same scenes and pictures")
        elif wrong == [f"/{name}"] and "/save/it2-" in wrong[0]:
            row.add("went on to the same scenes; a picture of an earlier step stayed as it was")
        elif status == 2 and said.splitlines()[-1].startswith("error: ") and Path(name).name in said:
            row.add("refused, with the file's name and what to do")
        else:
            row.add("", [f"{told}: {entry}" for entry in wrong or [f"status {status}: {said[-3000:]}"]])
        shutil.rmtree(root)
    yield row


def _harm(path: Path, harm: str, draws: random.Random) -> None:
    if harm == "remove":
        path.unlink()
    else:
        os.truncate(path, 0 if harm == "empty" else draws.randrange(max(path.stat().st_size, 1)))


def flipped_bits(count: int, seed: int, folder: Path, reference: Undisturbed) -> Iterator[Row]:
    """A bit, a page or the end of ``last.ckpt`` is wrong; nothing of it may be read in silence."""
    logging.getLogger("fourdfy").setLevel(logging.ERROR)
    here = folder / "flipped"
    shutil.copytree(trial(reference.root, reference.stages[0]), here)
    path = here / LAST
    good, content = path.read_bytes(), read_checkpoint(path)
    path.unlink()
    before = read_checkpoint(path)
    for harm, times in (
        ("bit flipped", count),
        ("page zeroed", count // 4),
        ("page of another place", count // 4),
    ):
        row = Row(f"a {harm} in last.ckpt")
        for number in range(times):
            draws, bad = random.Random(f"{seed}/{harm}/{number}"), bytearray(good)
            place = draws.randrange(len(good))
            page = place - place % PAGE
            if harm == "bit flipped":
                bad[place] ^= 1 << draws.randrange(8)
            elif harm == "page zeroed":
                bad[page : page + PAGE] = bytes(len(bad[page : page + PAGE]))
            else:
                other = draws.randrange(len(good) - PAGE)
                bad[page : page + PAGE] = good[other : other + len(bad[page : page + PAGE])]
            path.write_bytes(bad)
            read = read_checkpoint(path)
            if not differences(read, before):
                row.add("noticed, and the one before it read")
            elif bytes(bad) == good and not differences(read, content):
                row.add("was no change")
            else:
                row.add("", [f"number {number} at {place}: read in silence"])
        yield row
    shutil.rmtree(here)


def full_disks(count: int, seed: int, folder: Path, reference: Undisturbed) -> Iterator[Row]:
    """A disk that is full after a random number of bytes; when there is space again, the run goes on.

    Without the right to mount one (root), a limit on the size of a file stands for it.
    """
    base = half_way(folder, reference)
    used, final = _size(base), _size(reference.root)
    disk = Row("a full disk, at random sizes")
    for number in range(count):
        draws, root = random.Random(f"{seed}/{number}"), folder / "disk"
        fresh = number % 3 == 0
        size = draws.randrange(0, final) if fresh else used + draws.randrange(0, final - used)
        root.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={max(size, PAGE) // PAGE * PAGE}", "tmpfs", str(root)],
            check=False,
        )
        if mounted.returncode:
            root.rmdir()
            return
        try:
            if not fresh:
                shutil.copytree(base, root, dirs_exist_ok=True)
            first = start(reference.command(root), folder / "log.txt")
            status, said = first.wait(), first.said()
            subprocess.run(["mount", "-o", "remount,size=1g", str(root)], check=True)
            _judge(disk, f"number {number}, {size} bytes", status, said, root, folder, reference)
        finally:
            subprocess.run(["umount", str(root)], check=True)
            root.rmdir()
    yield disk


def small_files(count: int, seed: int, folder: Path, reference: Undisturbed) -> Iterator[Row]:
    """No file may be larger than a random size (``ulimit -f``); without the limit the run goes on."""
    import resource

    base, row = half_way(folder, reference), Row("a limit on the size of files, at random sizes")
    largest = (trial(base, reference.stages[-1]) / LAST).stat().st_size
    for number in range(count):
        size, root = random.Random(f"{seed}/{number}").randrange(largest), folder / "limited"
        shutil.copytree(base, root)

        def limit(size: int = size) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        first = start(reference.command(root), folder / "limited.txt", limit)
        status, said = first.wait(), first.said()
        _judge(row, f"number {number}, {size} bytes", status, said, root, folder, reference)
        shutil.rmtree(root)
    yield row


def _judge(
    row: Row, told: str, status: int, said: str, root: Path, folder: Path, reference: Undisturbed
) -> None:
    """Count what became of a run without space, and of the same run with space."""
    again = start(reference.command(root), folder / "log.txt")
    wrong = [] if again.wait() == 0 else [f"again: {again.said()[-3000:]}"]
    wrong += differences(results(root), reference.results)
    if status == 0:
        outcome = "ended well, with a warning" if "could not be written" in said else "had enough"
    else:
        outcome = "stopped with one line, and went on"
        if status != 1 or "Traceback" in said or "can't be written: " not in said:
            wrong.append(f"status {status}: {said[-3000:]}")
    row.add(outcome, [f"{told}: {entry}" for entry in wrong])


def _size(root: Path) -> int:
    """Bytes on a disk of whole pages."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in root.rglob("*"))
