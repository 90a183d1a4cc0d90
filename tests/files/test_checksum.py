"""Damage to a torch file is noticed, wherever it is."""

import errno
import random
import zipfile

import pytest
import torch

from fourdfy.files.checksum import check_file, save_with_checksum
from fourdfy.files.safe_load import read_torch_file

CONTENT = {"state_dict": {"a": torch.arange(3000.0), "b": torch.ones(2, 3)}, "global_step": 3}


@pytest.fixture
def file(tmp_path):
    save_with_checksum(CONTENT, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def is_read(file):
    try:
        check_file(file)
        return read_torch_file(file) is not None
    except ValueError:
        return False


def test_torch_and_zip_read_the_file_as_any_other(file):
    assert zipfile.ZipFile(file).testzip() is None
    for mmap in (False, True):
        assert torch.equal(
            torch.load(file, weights_only=True, mmap=mmap)["state_dict"]["a"], torch.arange(3000.0)
        )


def test_files_without_a_checksum_are_read_too(tmp_path):
    for zipped in (True, False):
        torch.save(CONTENT, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        assert is_read(tmp_path / "a.pt")


def test_every_flipped_bit_zeroed_page_and_lost_end_is_noticed(file):
    whole = file.read_bytes()
    assert is_read(file)
    draw = random.Random(0)
    # The end has the records that say where everything is, and the checksum itself.
    places = [draw.randrange(8 * len(whole)) for _ in range(400)] + [
        *range(8 * (len(whole) - 120), 8 * len(whole), 3)
    ]
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        assert not is_read(file), place
    for start in range(0, len(whole), 512):
        file.write_bytes(whole[:start] + bytes(len(whole[start : start + 512])) + whole[start + 512 :])
        assert whole == file.read_bytes() or not is_read(file), start
    for length in (0, *range(1, len(whole), 97), *range(len(whole) - 80, len(whole))):
        file.write_bytes(whole[:length])
        assert not is_read(file), length


def test_an_error_of_the_disk_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr("fourdfy.files.checksum._comment", lambda *_: pytest.fail("it went on"))
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as refused:
            save_with_checksum(CONTENT, tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.errno == errno.EFBIG
