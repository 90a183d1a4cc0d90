"""A file appears under its name when it is whole; an error says why not, and what is safe."""

import errno
import os
import shutil
import subprocess
import sys

import pytest

from fourdfy.files import atomic
from fourdfy.files.atomic import (
    WriteError,
    by_product,
    check_writable,
    losses_noted,
    remove_leftovers,
    whole_file,
)


def test_what_fails_leaves_the_file_of_before_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as half_written:
        half_written.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]


def test_writers_side_by_side_do_not_meet(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as one, whole_file(path) as other:
        assert one != other and one.suffix == ".txt"
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("sync", [False, True])
def test_synced_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch, sync):
    path, synced = tmp_path / "a.bin", []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_size, path.exists())))
    with whole_file(path, sync=sync) as half_written:
        half_written.write_bytes(b"123")
    assert synced == ([(3, False)] if sync else [])


# -- errors --------------------------------------------------------------------------------------


def full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def nearly_full(monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)


def test_a_full_disk_says_how_much_is_needed_and_free_and_what_is_safe(tmp_path, nearly_full):
    path = tmp_path / "a.bin"
    no_space = "can't be written: No space left on device (5.00 MB needed, 2.00 MB free)"
    with pytest.raises(WriteError) as new, whole_file(path, size=5_000_000):
        raise full()
    assert str(new.value) == f"{path} {no_space}"
    path.touch()
    with pytest.raises(WriteError) as again, whole_file(path, size=5_000_000):
        raise full()
    assert str(again.value) == f"{path} {no_space}; the file of before is unchanged"


@pytest.mark.parametrize("below", ["", "b", "b/c"])
def test_a_file_where_a_folder_should_be_is_named(tmp_path, below):
    (tmp_path / "a").touch()
    with pytest.raises(WriteError, match=f"{tmp_path}/a is a file where a folder is needed$"):
        check_writable(tmp_path / "a" / below)


def test_a_folder_without_room_is_refused_before_it_is_needed(tmp_path, nearly_full):
    check_writable(tmp_path, 2_000_000)
    with pytest.raises(WriteError, match=r"\(2.00 MB needed, 2.00 MB free\)"):
        check_writable(tmp_path, 2_000_001)
    assert not list(tmp_path.iterdir())


# -- by-products ---------------------------------------------------------------------------------


def test_a_by_product_is_warned_of_once_in_each_run_and_noted(caplog):
    for _ in range(2):
        with losses_noted() as missing:
            for reason in ("one", "other"):
                with by_product("curves"):
                    raise RuntimeError(reason)
            assert missing == {"curves": "RuntimeError: one"}
    said = "curves could not be written; the run continues (RuntimeError: one)"
    assert [record.getMessage() for record in caplog.records] == [said] * 2


# -- leftovers -----------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from fourdfy.files.atomic import whole_file
with whole_file(Path(sys.argv[1])) as half_written:
    half_written.write_text("half")
    os._exit(9)
"""


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_stays(tmp_path, monkeypatch):
    path = tmp_path / "ckpts" / "last.ckpt"
    subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    (left,) = path.parent.iterdir()
    assert left.name.startswith(".last.") and left.suffix == ".ckpt"
    (tmp_path / ".mine.tmp").touch()
    older = path.with_name(".last.ckpt.123.tmp")  # as earlier versions named theirs
    older.touch()
    os.utime(older, (0, 0))
    with whole_file(path) as half_written:
        half_written.write_text("whole")
        remove_leftovers(tmp_path)
        assert not left.exists()
    # In a container, the process of before may have had the same number.
    mine = path.with_name(half_written.name)
    mine.touch()
    monkeypatch.setattr(atomic, "PROCESS", "00000000")
    of_a_fork = path.with_name(f".last.{atomic.HOST}-999999999-00000000-0.tmp.ckpt")
    of_a_fork.touch()
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / ".mine.tmp", path.parent, path]


def test_a_writer_on_another_machine_is_left_alone_as_long_as_it_may_live(tmp_path, monkeypatch):
    with whole_file(tmp_path / "a.png") as half_written:
        half_written.touch()
        monkeypatch.setattr(atomic, "HOST", "00000000")
        monkeypatch.setattr(atomic, "PROCESS", "00000000")
        remove_leftovers(tmp_path)
        assert half_written.exists()
        os.utime(half_written, (0, 0))
        remove_leftovers(tmp_path)
        assert not half_written.exists()
        half_written.touch()
