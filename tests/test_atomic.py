# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Writing files: all or nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import NoReturn

import pytest

from scripts.core.errors import BundleError
from scripts.core.files import make_folder, replacing, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "volume.nii.gz"
    with replacing(target) as temporary:
        temporary.write_bytes(b"12")
        assert not target.exists()
        assert temporary.parent == tmp_path and temporary.name.endswith("volume.nii.gz")
    assert target.read_bytes() == b"12"
    assert names(tmp_path) == ["volume.nii.gz"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("failure", [ValueError("damaged"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(before: str | None, failure: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    if before is not None:
        target.write_text(before)
    with pytest.raises(type(failure)), replacing(target) as temporary:
        temporary.write_text("half")
        raise failure
    assert names(tmp_path) == ([] if before is None else ["x.txt"])
    assert before is None or target.read_text() == before


def full(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "x.txt", "old")
    monkeypatch.setattr(os, operation, full)
    with pytest.raises(BundleError, match=r"cannot write .*x\.txt: No space left on device"):
        write_text(tmp_path / "x.txt", "new")
    assert names(tmp_path) == ["x.txt"] and (tmp_path / "x.txt").read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_while_writing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No space left"), replacing(tmp_path / "x.txt") as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("x" * 100000)
    assert names(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot write"):
        write_text(tmp_path / "missing" / "x.txt", "x")


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    with pytest.raises(BundleError, match="cannot write"):
        write_text(tmp_path / "file" / "x.txt", "x")
    with pytest.raises(BundleError, match="cannot write to the folder"):
        make_folder(tmp_path / "file")
    with pytest.raises(BundleError, match="cannot write to the folder"):
        make_folder(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "x"


def test_folders_are_made_with_their_parents_and_left_empty(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert make_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert names(tmp_path / "a" / "b") == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BundleError, match="Permission denied"):
        make_folder(tmp_path)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1, 2.5, "ä"]})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"a": [1, 2.5, "ä"]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert names(tmp_path) == ["x.json"] and "2.5" in (tmp_path / "x.json").read_text(encoding="utf-8")
