# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Which heads are edited, what they have and what they shall have: from flags, or from a table."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scripts.conditions.changes import outside_in_words, targets_of
from scripts.conditions.conditions import Conditions, flags_or_table
from scripts.core.cells import present
from scripts.core.errors import BundleError
from scripts.core.options import is_absent, yes_or_no
from scripts.editing.own_conditions import OwnConditions, find_own, sidecar_of, table_row
from scripts.measuring.contrast import check_t1_weighted
from scripts.measuring.segmenter import Segmenter, brain_volumes
from scripts.preparation.native_space import read_transform
from scripts.sampling.requests import further_columns
from scripts.volumes.datasets import LoadVolumed
from scripts.volumes.grid import Grid
from scripts.volumes.headers import ScanError
from scripts.volumes.placing import check_place
from scripts.volumes.reading import read_header
from scripts.volumes.scans import without_suffix

logger = logging.getLogger(__name__)

UNUSUAL = re.compile(r"[^\w.-]+")
SCAN, NATIVE, OWN = "scan", "native_scan", "own_"


class PreparedHead:
    """A scan on the grid, read and measured when that is first needed.

    Args:
        path: of the volume.
        grid: where it must lie.
        segmenter: makes what measures it and looks at its contrast; None for neither.
        resample: whether a volume of another grid is brought onto it.
    """

    def __init__(
        self, path: Path, grid: Grid, segmenter: Callable[[], Segmenter] | None, resample: bool = False
    ) -> None:
        self.path, self.grid, self.resample, self._segmenter = path, grid, resample, segmenter
        check_place(path, grid, resample)

    @property
    def name(self) -> str:
        """The participant's, or else the file's."""
        file = without_suffix(self.path.name).split("_space-")[0]
        return UNUSUAL.sub("-", table_row(self.path).get("participant_id") or file)

    @cached_property
    def volume(self) -> np.ndarray:
        """(X, Y, Z) float32, 0..1.

        Raises:
            BundleError: if it cannot be read, is constant, or is no prepared volume.
        """
        volume = LoadVolumed("image", self.grid, self.resample)({"image": str(self.path)})["image"][0].numpy()
        if volume.min() == volume.max():
            raise BundleError(f"{self.path} is {volume.min():g} everywhere: there is no head in it")
        return volume.clip(0.0, 1.0)

    @cached_property
    def measured(self) -> dict[str, float]:
        """Volumes by raw name; empty where nothing measures.

        Raises:
            BundleError: if there is no brain.
        """
        return {} if self._segmenter is None else brain_volumes(self.volume, self.grid, self._segmenter())

    def check(self) -> None:
        """Read it, and look at its contrast where something measures.

        Raises:
            BundleError: as `volume`, and for a head of another contrast than T1.
        """
        _ = self.volume
        if self._segmenter is not None:
            check_t1_weighted(self.path)


@dataclass
class EditRequest:
    """One head and what it shall be.

    Attributes:
        head: the scan.
        own: what it has.
        targets: what it shall have: a vector each, more than one for a series.
        native_scan: the raw scan on whose voxels the answer is wanted as well.
        about: what else a table says of it.
    """

    head: PreparedHead
    own: OwnConditions
    targets: list[Tensor]
    native_scan: Path | None = None
    about: dict[str, str] = field(default_factory=dict)


class EditRequests(Sequence[EditRequest]):
    """What is to be edited. All of it is checked before anything is computed.

    Args:
        conditions: their flags are read from the configuration that this object stands in; values may be changes, and
            lists for a series (`scripts.conditions.changes`).
        grid: that of the model.
        scan: path of a prepared scan.
        own: map of what it has, by flag; what is not there is looked up and measured (`own_conditions`).
        native_scan: path of the raw scan that it was prepared from, for the answer in its space.
        table: in place of all these, a table with a column `scan` and any of these: the conditions, each with `own_`
            before it for what the head has, and `native_scan`. Paths are relative to the table.
        segmenter: makes what measures volumes and looks at the contrast.
        measure: whether it does.
        missing: see `scripts.editing.own_conditions.find_own`.
        resample: see `PreparedHead`.

    Raises:
        BundleError: for a bad flag or table, or a scan that cannot be edited; with a table, naming the row.
    """

    def __init__(
        self,
        conditions: Conditions,
        grid: Grid,
        scan: Any,
        own: Any,
        native_scan: Any,
        table: str | None,
        segmenter: Callable[[], Segmenter],
        measure: Any = True,
        missing: str = "default",
        resample: Any = False,
    ) -> None:
        if not conditions:
            raise BundleError("the model has no conditions: there is nothing that an edit could change")
        self.conditions, self.grid, self.missing = conditions, grid, missing
        self.segmenter = segmenter if yes_or_no(measure, "measure") else None
        self.resample = yes_or_no(resample, "resample_to_grid")
        rows = flags_or_table(conditions.flags(), table, SCAN)
        if table is None:
            if is_absent(scan):
                raise BundleError("there is nothing to edit: give --scan, a prepared head, or --conditions_table")
            stated = {} if is_absent(own) else dict(own)
            self.requests = [self._request(Path(str(scan)), stated, rows[0], native_scan)]
        else:
            for flag, value in ((SCAN, scan), ("own", own), (NATIVE, native_scan)):
                if not is_absent(value):
                    raise BundleError(f"--conditions_table has a row for each head: leave out --{flag}")
            if SCAN not in rows[0]:
                raise BundleError(f"the table {table} has no column '{SCAN}': it names the prepared volume of each row")
            self.requests = [self._of_row(row, Path(table), number) for number, row in enumerate(rows, start=1)]

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: Any) -> Any:
        return self.requests[index]

    def _of_row(self, row: Mapping[str, str], table: Path, number: int) -> EditRequest:
        own = {flag: present(row, OWN + flag) for flag in self.conditions.flags() if present(row, OWN + flag)}
        columns = {SCAN, NATIVE, *(OWN + flag for flag in self.conditions.flags())}
        others = {name: cell for name, cell in row.items() if name not in columns}
        about = {name: row[name] for name in further_columns(others, self.conditions, str(table)) if present(row, name)}
        where = f" in row {number} of {table}"
        if not present(row, SCAN):
            raise BundleError(f"the column '{SCAN}' is empty{where}")
        native = present(row, NATIVE)
        path = table.parent / present(row, SCAN)
        return self._request(path, own, row, table.parent / native if native else None, about, where)

    def _request(
        self,
        scan: Path,
        stated: Mapping[str, Any],
        wanted: Mapping[str, Any],
        native: Any,
        about: Mapping[str, str] | None = None,
        where: str = "",
    ) -> EditRequest:
        head = PreparedHead(scan, self.grid, self.segmenter, self.resample)
        native_scan = None if is_absent(native) else Path(str(native))
        if native_scan is not None:
            _check_native(native_scan, scan)
        head.check()
        own = find_own(scan, self.conditions, stated, lambda: head.measured, self.missing)
        targets = targets_of(self.conditions, wanted, own.vector, where)
        for words in dict.fromkeys(word for one in targets for word in outside_in_words(self.conditions, one)):
            logger.warning(f"{words}{where}: the model extrapolates")
        return EditRequest(head, own, targets, native_scan, dict(about or {}))


def _check_native(native: Path, scan: Path) -> None:
    """That an answer for a prepared scan can be carried onto the voxels of its raw one."""
    try:
        read_header(native)
        read_transform(sidecar_of(scan))
    except ScanError as error:
        raise BundleError(f"--{NATIVE}: {error}") from error
