# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from scripts.core.errors import BundleError

TEMPORARY = re.compile(r"\.[0-9a-f]{12}-.")
"""How the names begin under which files are written until they are complete."""


def make_folder(path: str | os.PathLike) -> Path:
    """Make a folder and its parents, and check that files can be written in it.

    Raises:
        BundleError: if the folder cannot be made or is not writable.
    """
    folder = Path(str(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BundleError(f"cannot write to the folder {folder}: {error.strerror or error}") from error
    return folder


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        BundleError: if the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}") from error
    return digest.hexdigest()


POINTERS = {
    b"/annex/objects/": "datalad get",
    b".git/annex/objects/": "datalad get",
    b"version https://git-lfs": "git lfs pull --include",
}
"""First bytes of small files that stand in for content which was not fetched -> the command that fetches it."""


def looks_there(path: str | os.PathLike) -> bool:
    """Whether something of that name is there: a file, or a link whose content is not here."""
    return os.path.lexists(path)


def check_content(path: str | os.PathLike) -> None:
    """Refuse what is no file with content: of a dataset that was cloned, large files can be links or pointers alone.

    Raises:
        BundleError: naming the command that fetches the content; for a folder, a pipe or a device; or if nothing of
            that name is there.
    """
    target = Path(path)
    if target.is_file():
        with suppress(OSError), open(target, "rb") as file:
            start = file.read(32)
            command = next((command for pointer, command in POINTERS.items() if start.startswith(pointer)), None)
            if command:
                raise BundleError(f"the content of {target} is not here: fetch it with `{command} {target}`")
    elif target.is_symlink() and not target.exists():
        raise BundleError(
            f"the content of {target} is not here, since it is a link to {os.readlink(target)}, which is not there: "
            f"fetch it, with `datalad get {target}` where the dataset is one of DataLad"
        )
    elif target.exists():
        raise BundleError(f"{target} is a folder, a pipe or a device, not a file")
    else:
        raise BundleError(f"{target} is not there")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`, with the same suffixes, which becomes `path` if the block succeeds.

    The file is flushed to disk before it is renamed, and its folder after. If the block raises, the temporary
    file is removed and whatever stood at `path` before is still there.

    Raises:
        BundleError: if the file cannot be written, for want of room or of permission.
    """
    target = Path(path)
    temporary = target.with_name(f".{uuid.uuid4().hex[:12]}-{target.name}")  # processes of two machines share numbers
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _flush_folder(target.parent)
    except OSError as error:
        raise BundleError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Remove what processes that were killed while they wrote `path` have left beside it."""
    target = Path(path)
    for leftover in target.parent.glob(f".{'[0-9a-f]' * 12}-{glob.escape(target.name)}"):
        leftover.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text under a temporary name and rename it to `path`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as indented JSON under a temporary name and rename it to `path`."""
    write_text(path, json.dumps(content, indent=4, allow_nan=False) + "\n")


def fingerprints(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Name -> size in bytes and SHA-256 of files, for the sidecar that is written after them."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in paths}


def are_whole(folder: Path, files: Any) -> bool:
    """Whether files in a folder are what `fingerprints` has said of them."""
    if not isinstance(files, Mapping) or not all(isinstance(one, Mapping) for one in files.values()):
        return False
    paths = {folder / name: one for name, one in files.items()}
    return all(path.is_file() and path.stat().st_size == one.get("bytes") for path, one in paths.items()) and all(
        file_hash(path) == one.get("sha256") for path, one in paths.items()
    )


def parse_json(text: str) -> Any:
    """What a JSON text of someone else says.

    Raises:
        ValueError: if it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The map in a JSON file; an empty one where there is none, it is damaged, or it holds something else."""
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
