# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Reports of other commands as the page shows them: with a viewer for the volumes behind their pictures."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.core.errors import BundleError
from scripts.core.files import check_content
from scripts.preparation.quality_page import FIGURES, scan_name
from scripts.preparation.quality_page import PAGE as QUALITY
from scripts.serving.gallery import OpenedFolder
from scripts.volumes.reading import has_suffix

EVALUATION = "evaluation.html"
VIEWER = (
    '<link rel="icon" href="data:,"><script src="/static/niivue.umd.js" defer></script>'
    '<script type="module" src="/static/report.js"></script>'
)
VOLUMES = re.compile(r'data-volumes="([^"]*)"')


@dataclass(frozen=True)
class ServedReport:
    """A page in a folder, and the volumes that its pictures are of.

    Attributes:
        name: in addresses.
        title: of the link to it.
        path: of the page.
        volumes: what the page calls a volume -> its file.
    """

    name: str
    title: str
    path: Path
    volumes: Mapping[str, Path]

    @property
    def figures(self) -> Path:
        """The folder of the pictures that are not in the page itself; need not be there."""
        return self.path.parent / FIGURES

    def content(self) -> str:
        """The page, with the viewer.

        Raises:
            BundleError: if it is gone.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot read {self.path}: {error}") from error
        return text.replace("</head>", f"{VIEWER}</head>", 1)

    def volume(self, key: str) -> Path:
        """The file of a volume.

        Raises:
            BundleError: if the page has none of that name, or its content is not here.
        """
        if key not in self.volumes:
            raise BundleError(f"{self.path} has no volume of that name")
        check_content(self.volumes[key])
        return self.volumes[key]


def find_reports(dataset: OpenedFolder, evaluation: Path) -> Iterator[ServedReport]:
    """The quality page of a dataset and the report of an evaluation, where they are."""
    if dataset.folder is not None and (dataset.folder / QUALITY).is_file():
        volumes = {scan_name(str(path)): path for path in dataset.paths}
        yield ServedReport("quality", "Quality of the scans", dataset.folder / QUALITY, volumes)
    if (evaluation / EVALUATION).is_file():
        page = evaluation / EVALUATION
        yield ServedReport(
            "evaluation", "Evaluation", page, _pictured(page.read_text(encoding="utf-8", errors="replace"))
        )


def _pictured(page: str) -> dict[str, Path]:
    """Row -> volume of the evaluation's picture of volumes."""
    found = VOLUMES.search(page)
    try:
        paths: Any = json.loads(html.unescape(found[1])) if found else []
    except ValueError:
        paths = []
    volumes = [Path(path) for path in paths if isinstance(path, str)] if isinstance(paths, list) else []
    return {str(n): path for n, path in enumerate(volumes) if has_suffix(path)}
