# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What the page has made, and what was opened beside it: files under names that no request chooses."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.compute.ownership import DERIVATIVES, SAMPLES
from scripts.core.errors import BundleError
from scripts.core.files import check_content, make_folder, read_json, write_json
from scripts.core.tables import read_table
from scripts.volumes.folders import find_volumes
from scripts.volumes.scans import without_suffix

REQUEST = "request.json"
ENTRY = re.compile(r"[0-9a-f]{12}")
FILES = {
    "volume.nii.gz": f"sample/{SAMPLES}*.nii.gz",
    "sidecar.json": f"sample/{SAMPLES}*.json",
    "picture.png": f"sample/{SAMPLES}*.png",
    "labels.nii.gz": "labels/*_dseg.nii.gz",
}
"""Name in the page's addresses -> where the file of an entry lies in its folder."""
VOLUMES_TABLE = "labels/volumes.tsv"


class Gallery:
    """The samples of the page, a folder each, named by what they are of: the same request is the same entry.

    Args:
        folder: of the page, which its command has claimed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute() / DERIVATIVES

    def add(self, request: Mapping[str, Any], words: Sequence[str]) -> tuple[str, list[str]]:
        """Note a request, and where its sample goes.

        Args:
            request: what was asked for, as the page shows it.
            words: the command's, without the folder.

        Returns:
            The entry's name, and the words with the folder.
        """
        name = hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:12]
        make_folder(self.folder / name)
        if not (self.folder / name / REQUEST).is_file():
            write_json(self.folder / name / REQUEST, {**request, "words": list(words)})
        return name, [*words, "--output_dir", str(self.folder / name / "sample")]

    def labelling(self, name: str, check: bool = True) -> list[str]:
        """The words of the command that segments an entry's volume.

        Raises:
            BundleError: if it is to be checked, and there is none.
        """
        if check:
            self.path(name, "volume.nii.gz")
        folder = self.folder / name
        return ["segment", "--volumes_dir", str(folder / "sample"), "--output_dir", str(folder / "labels")]

    def path(self, name: str, file: str) -> Path:
        """A file of an entry, one of `FILES`.

        Raises:
            BundleError: if there is no such entry or file.
        """
        found = sorted((self.folder / name).glob(FILES[file])) if file in FILES and ENTRY.fullmatch(name) else []
        found = [path for path in found if path.resolve().is_relative_to(self.folder.resolve())]
        if not found:
            raise BundleError(f"the gallery has no {file} of {name}")
        return found[0]

    def entries(self) -> list[dict[str, Any]]:
        """All whose sample is complete, the newest first."""
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        found = [self._entry(folder) for folder in folders if ENTRY.fullmatch(folder.name)]
        return sorted((one for one in found if one), key=lambda one: (-one["made"], one["name"]))

    def _entry(self, folder: Path) -> dict[str, Any] | None:
        try:
            sidecar = self.path(folder.name, "sidecar.json")
            request, stated, made = read_json(folder / REQUEST), read_json(sidecar), sidecar.stat().st_mtime
        except (BundleError, OSError):
            return None
        table = folder / VOLUMES_TABLE
        rows = read_table(table) if table.is_file() else []
        return {
            "name": folder.name,
            "made": made,
            "request": {key: value for key, value in request.items() if key != "words"},
            "command": written(request.get("words", [])),
            "conditions": stated.get("conditions", {}),
            "seed": stated.get("seed"),
            "sampler": stated.get("sampler"),
            "volumes": {key: value for row in rows for key, value in row.items() if key != "volume"},
            "has_labels": any(folder.glob(FILES["labels.nii.gz"])),
        }


def written(words: Sequence[str]) -> str:
    """A command line as one types it."""
    return shlex.join(["python", "-m", "scripts", *words])


class OpenedFolder:
    """Volumes that were there before: a prepared dataset, or a folder of NIfTI and MGH files.

    Args:
        folder: None for none.
        flag: that gave it.

    Raises:
        BundleError: if it is missing, or holds no volume.
    """

    def __init__(self, folder: str | Path | None, flag: str) -> None:
        self.folder = None if folder is None else Path(str(folder)).absolute()
        self.paths = [] if self.folder is None else find_volumes(self.folder, flag)

    def names(self) -> list[str]:
        """Of the volumes, in their order, within the folder."""
        return [without_suffix(path.relative_to(self.folder).as_posix()) for path in self.paths if self.folder]

    def path(self, number: int) -> Path:
        """The file of a volume.

        Raises:
            BundleError: if there is none of that number, or its content is not here.
        """
        if not 0 <= number < len(self.paths):
            raise BundleError(f"there is no volume number {number}")
        check_content(self.paths[number])
        return self.paths[number]
