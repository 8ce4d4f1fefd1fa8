# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What every answer leaves in a folder: a volume, its sidecar, a row of the table; and what a rerun keeps of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scripts.compute.devices import process_rank
from scripts.compute.provenance import header_text, model_in_words, synthetic_facts
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import are_whole, fingerprints, make_folder, read_json, write_json
from scripts.core.tables import write_table
from scripts.editing.own_conditions import sidecar_of
from scripts.sampling.saving import FILES, PACKAGES
from scripts.volumes.datasets import TABLE
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import DTYPES, SPACE, write_volume

logger = logging.getLogger(__name__)

SYNTHETIC = "Made by a model, and no scan of anybody. Not for diagnosis, and no forecast of what becomes of a person."
REQUEST = "request"


class AnswerFiles:
    """A folder of answers: a dataset, whose table the other commands read.

    Args:
        output_dir: the folder; made when the first answer is written.
        conditions: those of the model.
        grid: where all volumes lie.
        dtype: of volumes on disk; see `scripts.volumes.nifti.write_volume`.

    Raises:
        BundleError: for a dtype that does not exist, or several processes, which would all do the same.
    """

    def __init__(self, output_dir: str, conditions: Conditions, grid: Grid, dtype: str = "uint8") -> None:
        if dtype not in DTYPES:
            raise BundleError(f"--output_dtype must be one of {', '.join(DTYPES)}, got '{dtype}'")
        if process_rank()[1] > 1:
            raise BundleError("a head is edited in one process: leave out torchrun, and give parts of a table each")
        self.folder, self.conditions, self.grid, self.dtype = Path(output_dir), conditions, grid, dtype
        self.rows: list[dict[str, Any]] = []

    def settings(self) -> dict[str, Any]:
        """What of it decides a file, as plain data."""
        return {"dtype": self.dtype, "grid": {"shape": list(self.grid.shape), "affine": self.grid.affine.tolist()}}

    def is_done(self, stem: str, wanted: Mapping[str, Any]) -> bool:
        """Whether all files of a request are there and whole.

        Args:
            stem: how its files' names begin.
            wanted: all that decides its answers, as plain data.

        Raises:
            BundleError: if files of another request have these names.
        """
        known = read_json(self._record(stem))
        if not known:
            return False
        if known.get(REQUEST) != wanted:
            raise BundleError(
                f"{self._record(stem)} is of another request, or of other settings: choose another --output_dir"
            )
        whole = are_whole(self.folder, known.get(FILES))
        if whole:
            logger.info(f"{stem} is in {self.folder} already and is kept")
        else:
            logger.warning(f"a file of {stem} is damaged or gone: it is made again")
        return whole

    def finish(self, stem: str, wanted: Mapping[str, Any], paths: Iterable[Path]) -> None:
        """Note that all files of a request are written."""
        write_json(self._record(stem), {REQUEST: wanted, FILES: fingerprints(paths)})

    def volume_of(self, name: str) -> Path:
        """Where the volume of an answer lies."""
        return self.folder / f"{name}_space-{SPACE}_T1w.nii.gz"

    def write(
        self, name: str, volume: np.ndarray, condition: Tensor, stated: Mapping[str, Any], beside: Sequence[Path] = ()
    ) -> list[Path]:
        """Write the volume of an answer, (X, Y, Z), and then its sidecar, which knows the files `beside` it; all paths.

        Args:
            name: of the answer.
            volume: 0..1.
            condition: what it was made under, (conditions,).
            stated: what else the sidecar says.
            beside: further files of the answer, written already.
        """
        make_folder(self.folder)
        path = self.volume_of(name)
        write_volume(path, volume, self.grid, self.dtype, header_text(model_in_words(stated)))
        words = {**synthetic_facts(), "note": SYNTHETIC, "conditions": self.conditions.in_both_units(condition)}
        versions = {"versions": {package: version(package) for package in PACKAGES}}
        files = [path, *beside]
        write_json(sidecar_of(path), {**words, **stated, **versions, FILES: fingerprints(files)})
        logger.info(f"wrote {path} and its .json")
        return [*files, sidecar_of(path)]

    def add_row(self, name: str, condition: Tensor, about: Mapping[str, Any]) -> None:
        """Write the table with one more answer."""
        stated = self.conditions.in_both_units(condition)
        values = {c.raw: stated[c.raw] for c in self.conditions}
        self.rows.append({"participant_id": name, "path": self.volume_of(name).name, **values, **about})
        write_table(self.folder / TABLE, self.rows)

    def _record(self, stem: str) -> Path:
        return self.folder / f"{stem}_{REQUEST}.json"
