"""Torch files with a checksum of all their bytes, in the comment of the zip archive that such a file is.

Other readers, ``torch.load`` among them, ignore the comment. Files of torch itself have none.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

END, END_BYTES = b"PK\x05\x06", 22
"""The signature of an archive's last record and its length; it ends with 2 bytes: the comment's length."""
COMMENT_BYTES = len(b"crc32:01234567")
"""CRC32 finds every damage of up to 32 bits in a row, and of others all but one in 4 billion."""
BLOCK = 2**20


def save_with_checksum(content: Any, path: Path) -> None:
    """``torch.save`` with a checksum.

    Raises:
        OSError: the file can't be written.
    """
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch hides the file's own error behind this one
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    with path.open("rb+") as file:
        size = file.seek(-2, os.SEEK_END) + 2
        file.write(COMMENT_BYTES.to_bytes(2, "little"))
        file.write(_comment(file, size))


def check_file(path: Path) -> None:
    """Compare all bytes of a file with its checksum, if it has one.

    Raises:
        ValueError: they differ: the file was damaged since it was written.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - END_BYTES - COMMENT_BYTES))
        tail = file.read()
        end = tail.find(END)
        if end < 0 or tail[end + END_BYTES - 2 :] == b"\0\0":
            return
        comment = tail[end + END_BYTES :]
        if comment != _comment(file, size - len(comment)):
            raise ValueError(f"{path} is damaged: its bytes don't match its checksum")


def _comment(file: BinaryIO, count: int) -> bytes:
    """The comment for the first ``count`` bytes, after which the file then stands."""
    file.seek(0)
    checksum = 0
    while block := file.read(min(count, BLOCK)):
        checksum = zlib.crc32(block, checksum)
        count -= len(block)
    return f"crc32:{checksum:08x}".encode()
