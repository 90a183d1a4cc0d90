"""Checkpoints: bits flipped, cut, pages of zeros, pickles that call something, archives that swell."""

from __future__ import annotations

import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch

from fourdfy.systems.checkpoint import read_own_checkpoint, write_checkpoint
from tests.reliability.fuzzing import PLANTED, Case

CONTENT = {"global_step": 3, "state_dict": {"w": torch.arange(4000.0), "b": torch.ones(2)}, "rng": b"x" * 300}


def draw(random: Random, place: Path) -> Case:
    file = place / "ckpts" / "last.ckpt"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    kinds = [_whole, _flipped, _flipped, _cut, _zeros, _planted, _planted, _opcodes, _swelling, _other]
    kind = random.choice(kinds)
    kind(random, file, place / PLANTED)
    return Case(kind.__name__, lambda: sorted(read_own_checkpoint(file)))


def _whole(random: Random, file: Path, planted: Path) -> bytearray:
    write_checkpoint(CONTENT, file)
    return bytearray(file.read_bytes())


def _flipped(random: Random, file: Path, planted: Path) -> None:
    content = _whole(random, file, planted)
    for _ in range(random.choice([1, 1, 20])):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def _cut(random: Random, file: Path, planted: Path) -> None:
    content = _whole(random, file, planted)
    file.write_bytes(content[: random.randrange(len(content))])


def _zeros(random: Random, file: Path, planted: Path) -> None:
    content = _whole(random, file, planted)
    at = random.randrange(len(content))
    content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    file.write_bytes(content)


def _planted(random: Random, file: Path, planted: Path) -> None:
    """An object whose unpickling would call something, somewhere in a checkpoint of either format."""
    command = f"open({str(planted)!r}, 'w').close()"
    call = random.choice(
        [
            _Call(os.system, f"touch {planted}"), _Call(eval, command), _Call(exec, command),
            _Call(open, str(planted), "w"), _Call(Path.touch, planted),
        ]
    )  # fmt: skip
    at: dict[str, Any] = {"state_dict": {"w": call}} if random.random() < 0.5 else {"callbacks": [call]}
    torch.save({**CONTENT, **at}, file, _use_new_zipfile_serialization=random.random() < 0.5)
    if random.random() < 0.2:
        file.write_bytes(pickle.dumps({**at, "fourdfy": "1"}))


class _Call:
    def __init__(self, function: Any, *given: Any) -> None:
        self.call = function, given

    def __reduce__(self) -> Any:
        return self.call


def _opcodes(random: Random, file: Path, planted: Path) -> None:
    """A pickle of random instructions, some of which name and call functions."""
    pieces = [
        b"\x80\x02", b"cos\nsystem\n", b"cbuiltins\neval\n", b"(", b"t", b"R", b"}", b"]", b"q\x00",
        b"h\x00", b"0", b"b", b"\x81", b"N", b"K\x01", b"U\x04exit", b"X\x05\x00\x00\x00touch", b"\x93",
        b"i", b"o", b"\x95" + b"\xff" * 8, b"J\xff\xff\xff\x7f", b"T\xff\xff\xff\x7f", b"s", b"u", b"a",
        b"e", b"Q", b"P1\n",
    ]  # fmt: skip
    code = b"\x80\x02" + b"".join(random.choices(pieces, k=random.randint(1, 30))) + b"."
    if random.random() < 0.5:
        file.write_bytes(code)
        return
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("last/data.pkl", code)
        archive.writestr("last/version", "3\n")


def _swelling(random: Random, file: Path, planted: Path) -> None:
    """A zip file whose members are larger than the disk, or are not where it says."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("last/data.pkl", random.choice([bytes(2 * 10**7), b"\x80\x02}."]))
        archive.writestr("last/data/0", bytes(10**7))
        archive.writestr(
            random.choice(["../../evil", "/etc/evil", "last/code/__torch__.py", "last/byteorder"]), "x"
        )


def _other(random: Random, file: Path, planted: Path) -> None:
    kind = random.randrange(4)
    if kind == 0:
        file.write_bytes(random.randbytes(random.choice([0, 1, 100, 10_000])))
    elif kind == 1:
        with tarfile.open(file, "w") as archive:
            archive.add(__file__, "storages")
    elif kind == 2:
        torch.save(
            random.choice([[1], None, {}, {"state_dict": 3}, {"state_dict": {"w": 3}}, torch.ones(3)]), file
        )
    else:
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(file))
