"""Writing is all or nothing."""

import os

import pytest

from tinyvit.files import write_atomically


def test_writes_bytes_and_text(tmp_path):
    write_atomically(tmp_path / "a", b"\x00\x01")
    write_atomically(tmp_path / "b", "é")
    assert (tmp_path / "a").read_bytes() == b"\x00\x01"
    assert (tmp_path / "b").read_text(encoding="utf-8") == "é"


def test_a_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomically(path, "old")

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_the_bytes_are_on_the_disk_before_they_take_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "a", "new")
    assert order == ["fsync", "replace"]
