"""A file appears under its name when it is whole."""

import os

import pytest

from fourdfy.files.atomic import whole_file


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
