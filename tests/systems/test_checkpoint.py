"""Checkpoints are atomic, and files from strangers run no code."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from fourdfy.config import ConfigError
from fourdfy.systems.checkpoint import one_before, read_checkpoint, tensor_bytes, write_checkpoint


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


def test_what_is_saved_is_read_back(tmp_path):
    path = tmp_path / "deep" / "last.ckpt"
    write_checkpoint({"state_dict": {"a": torch.ones(2)}, "global_step": 3}, path)
    assert read_checkpoint(path)["global_step"] == 3


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "last.ckpt", []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(path.exists()))
    write_checkpoint({"state_dict": {"a": torch.ones(2)}, "global_step": 3}, path)
    assert synced[0] is False and path.exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "last.ckpt"
    write_checkpoint({"state_dict": {}, "global_step": 3}, path)
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint({"state_dict": {}, "bad": lambda: 0}, path)
    assert read_checkpoint(path)["global_step"] == 3
    assert list(tmp_path.iterdir()) == [path]


def saved(path, *steps):
    for step in steps:
        write_checkpoint({"state_dict": {"a": torch.full((99,), step)}, "global_step": step}, path)
    return path


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_disk_that_can_t_be_read_is_damage_too(tmp_path, monkeypatch):
    path = saved(tmp_path / "last.ckpt", 1, 2)

    def bad_sector(file):
        if file == path:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fourdfy.systems.checkpoint.check_file", bad_sector)
    assert read_checkpoint(path)["global_step"] == 1


@pytest.mark.parametrize("links", [True, False])
def test_the_last_two_are_kept(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: os.stat("/no hard links"))
    path = saved(tmp_path / "last.ckpt", 1, 2, 3)
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", "last.previous.ckpt"}
    assert [read_checkpoint(file)["global_step"] for file in (one_before(path), path)] == [2, 3]


@pytest.mark.parametrize("harm", [damage, lambda path: os.truncate(path, 99), Path.unlink])
def test_the_one_before_is_used_instead_of_a_damaged_or_missing_one(tmp_path, caplog, harm):
    path = saved(tmp_path / "last.ckpt", 1, 2)
    harm(path)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1
    (said,) = caplog.messages
    assert str(path) in said and said.endswith("; using the one before, last.previous.ckpt")
    damage(one_before(path))
    with pytest.raises(
        ConfigError, match=r"last\.ckpt.*last\.previous\.ckpt is damaged.*to train anew, move "
    ):
        read_checkpoint(path)


def test_there_are_two_good_ones_at_any_time(tmp_path, monkeypatch):
    path, seen = saved(tmp_path / "last.ckpt", 1, 2), []
    replace = Path.replace

    def watched(self, target):
        seen.append([torch.load(file, weights_only=True)["global_step"] for file in (one_before(path), path)])
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    saved(path, 3)
    assert seen == [[1, 2], [1, 3]]


def test_a_damaged_one_never_replaces_the_one_before(tmp_path):
    path = saved(tmp_path / "last.ckpt", 1, 2)
    damage(path)
    saved(path, 3)
    assert [read_checkpoint(file)["global_step"] for file in (one_before(path), path)] == [1, 3]


@pytest.fixture
def room(tmp_path, monkeypatch):
    """How many files the disk holds."""
    room = [9]

    def fsync(_):
        if len({file.stat().st_ino for file in tmp_path.iterdir()}) > room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    return room


def test_a_full_disk_costs_the_one_before_and_never_the_last(tmp_path, room, caplog):
    path, room[0] = saved(tmp_path / "last.ckpt", 1, 2), 2
    saved(path, 3)
    assert read_checkpoint(path)["global_step"] == 3
    assert "no space; deleting last.previous.ckpt" in caplog.text
    room[0] = 1
    with pytest.raises(OSError, match="No space left on device") as full:
        saved(path, 4)
    assert full.value.filename == str(path)
    assert read_checkpoint(path)["global_step"] == 3


def test_a_full_disk_costs_a_damaged_one_rather_than_the_one_before(tmp_path, room):
    path, room[0] = saved(tmp_path / "last.ckpt", 1, 2), 2
    damage(path)
    saved(path, 3)
    assert [read_checkpoint(file)["global_step"] for file in (one_before(path), path)] == [1, 3]


def test_the_size_of_a_checkpoint_is_known_before_it_is_written():
    content = {
        "state_dict": {"a": torch.ones(10)},
        "optimizer": [{"moments": (torch.ones(5).half(), 3)}, "x"],
    }
    assert tensor_bytes(content) == 50


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": Bomb()}, path)
    with pytest.raises(ConfigError, match="no state_dict"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConfigError, match="can't be read"):
        read_checkpoint(path)


def test_a_missing_checkpoint_names_what_is_there(tmp_path):
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ConfigError, match=r"no such checkpoint; there is .*last\.ckpt"):
        read_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(ConfigError, match=r"no such checkpoint$"):
        read_checkpoint(tmp_path / "elsewhere" / "first.ckpt")
