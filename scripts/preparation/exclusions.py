# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""A list of scans that a person has found bad, as the quality page writes it."""

from __future__ import annotations

import os
from collections.abc import Iterable

from scripts.core.errors import BundleError
from scripts.core.tables import read_text


class Exclusions:
    """The names in a text file, one a line; what follows `#` is a remark.

    A name is that of one scan (`sub-01_ses-2`) or of a participant (`sub-01`), all of whose scans it means.

    Args:
        path: the file; None excludes nothing.

    Raises:
        BundleError: if the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike | None) -> None:
        self.path = path
        self.remarks: dict[str, str] = {}
        for line in _lines(path) if path is not None else []:
            name, _, remark = line.partition("#")
            if name.strip():
                self.remarks[name.strip()] = remark.strip()

    def reason(self, name: str, participant: str) -> str | None:
        """The remark on a scan that is excluded, `excluded` where there is none; None if it is not excluded.

        Args:
            name: of the scan.
            participant: whose scan it is.
        """
        for entry in (name, participant):
            if entry in self.remarks:
                return self.remarks[entry] or "excluded"
        return None

    def check(self, names: Iterable[str], participants: Iterable[str]) -> None:
        """Raise `BundleError` for an entry that names no scan and no participant: it would exclude nothing."""
        known = {*names, *participants}
        for entry in self.remarks:
            if entry not in known:
                raise BundleError(f"{self.path} excludes '{entry}', but there is no such scan or participant")


def _lines(path: str | os.PathLike) -> list[str]:
    return read_text(path).splitlines()
