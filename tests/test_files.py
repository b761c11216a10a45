"""Files are whole or not there, and errors say which file and why in one line."""

import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qkv.errors import InputError
from qkv.files import blame, cache_folder, read_json, reason, replace_file


def test_a_failed_write_keeps_the_file_before_it_and_says_so_only_then(tmp_path: Path) -> None:
    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    with pytest.raises(InputError, match=rf"cannot write {path}: the disk is full \(No space left.*\)$"):
        replace_file(path, full)
    assert list(tmp_path.iterdir()) == []
    replace_file(path, lambda temporary: temporary.write_text("first"))
    with pytest.raises(InputError, match=r"the disk is full .*; the last complete file is kept$"):
        replace_file(path, full)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EACCES, "Permission denied", "name"), "Permission denied"),
        (OSError("no\nnumber"), "no number"),
        (SafetensorError("Error: I/O error: No space left on device (os error 28)"), "the disk is full (No "),
        (SafetensorError("Error: something else"), "Error: something else"),
    ],
)
def test_reasons(error: OSError, said: str) -> None:
    assert reason(error).startswith(said)
    assert "\n" not in reason(error)


@pytest.mark.parametrize("content", [b"", b"[", b"\xff", b"NaN}"])
def test_what_is_not_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").mkdir()
    with pytest.raises(InputError, match=r"b\.json cannot be read"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '{"a": 3}', '{"a": []}', '{"a": ["x"]}'])
def test_what_is_malformed_is_named(content: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.json is malformed"), blame(tmp_path / "a.json"):
        int(json.loads(content)["a"][0])
    with pytest.raises(InputError, match=r"a\.json: too short"), blame(tmp_path / "a.json"):
        raise InputError("too short")


def test_the_cache_folder_is_looked_up_when_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("QKV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "qkv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "qkv"
