# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Shards: a tar of the same bytes whoever writes it, and a manifest that seals it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scripts.collection.folder import read_map
from scripts.core.errors import BundleError
from scripts.core.files import file_hash, replacing, write_json

SEAL = "seal"
VOLUME, LABEL_MAP, PICTURE, SIDECAR = "nii.gz", "seg.nii.gz", "png", "json"
"""Endings of a row's members; WebDataset takes what stands before the first dot as the sample's key."""


class Member(NamedTuple):
    """One file of a shard: its name, and its content, or the file that has it."""

    name: str
    content: bytes | Path


def pack(path: Path, members: Iterable[Member]) -> dict[str, dict[str, Any]]:
    """Write a tar in the order of its members, without times, owners or modes of theirs.

    Returns:
        Name -> `bytes`, `sha256` and `offset`, where its content begins in the tar, of each member.

    Raises:
        BundleError: if a member cannot be read, or the tar not be written.
    """
    found: dict[str, dict[str, Any]] = {}
    with replacing(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, source in members:
                content = source.read_bytes() if isinstance(source, Path) else source
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
                found[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        with tarfile.open(temporary) as tar:
            for info in tar:
                found[info.name]["offset"] = info.offset_data
    return found


def write_manifest(path: Path, tar: Path, content: Mapping[str, Any]) -> None:
    """Write a shard's manifest, which makes it done: the tar's size and hash, content, and a seal on all that."""
    stated = {"tar": tar.name, "bytes": tar.stat().st_size, "sha256": file_hash(tar), **content}
    write_json(path, {**stated, SEAL: seal_of(stated)})


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a shard, its seal unbroken.

    Raises:
        BundleError: if it is gone or damaged.
    """
    found = read_map(path)
    if found.pop(SEAL, None) != seal_of(found):
        raise BundleError(
            f"{path} is damaged: its seal does not fit its content; remove it, and the shard is made again"
        )
    return found


def seal_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_member(tar: Path, member: Mapping[str, Any]) -> bytes:
    """The bytes of a member by its entry in a manifest.

    Raises:
        BundleError: if the tar is gone or ends before it.
    """
    try:
        with open(tar, "rb") as file:
            file.seek(member["offset"])
            content = file.read(member["bytes"])
    except OSError as error:
        raise BundleError(f"cannot read {tar}: {error.strerror or error}") from error
    if len(content) != member["bytes"]:
        raise BundleError(f"{tar} is cut short")
    return content
