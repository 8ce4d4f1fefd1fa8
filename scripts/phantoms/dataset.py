# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Phantoms as a prepared dataset on disk."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scripts.compute.counting import counted
from scripts.compute.devices import process_rank
from scripts.compute.provenance import dataset_description, header_text, synthetic_facts
from scripts.conditions.conditions import Conditions, flags_or_table
from scripts.core.errors import BundleError
from scripts.core.files import are_whole, fingerprints, make_folder, read_json, replacing, write_json, write_text
from scripts.core.options import whole_number
from scripts.core.tables import read_table, write_table
from scripts.phantoms.making import Phantom, Phantoms
from scripts.phantoms.population import RAW, Covariates, as_raw
from scripts.volumes.nifti import SPACE, mid_planes, read_volume, write_labels, write_picture, write_volume

logger = logging.getLogger(__name__)

FORMAT = 1
TABLE = "participants.tsv"
OF_ALL = {"T1w": {"SpatialReference": SPACE, "SkullStripped": False}, "dseg": {"SpatialReference": SPACE}}
"""What BIDS asks to know of all volumes and label maps, in files that hold for all."""


class PhantomRequests:
    """Which phantoms to make, and which of their covariates are given.

    Args:
        conditions: their flags are read from the configuration that this object stands in.
        num_phantoms: how many; None is 10, or the rows of the table.
        seed: of the run; phantoms are numbered from 0.
        table: path of a table with one phantom a row; what a row leaves out is drawn.

    Raises:
        BundleError: for a bad flag or table, or a table together with flags.
    """

    def __init__(self, conditions: Conditions, num_phantoms: Any, seed: Any, table: str | None) -> None:
        self.seed = whole_number(0 if seed is None else seed, "seed")
        rows = flags_or_table((*conditions.flags(), RAW[-1]), table, "num_phantoms", num_phantoms, default=10)
        if table is None:
            self.fixed = [as_raw(conditions, rows[0])] * len(rows)
        else:
            self.fixed = [as_raw(conditions, row, f" in row {n} of {table}") for n, row in enumerate(rows, start=1)]


class PhantomFolder:
    """The `run` of configs/phantoms.yaml: phantoms written as `scripts.preparation.run` writes scans.

    Under torchrun each process makes its share. A phantom whose sidecar says that it was made by the same settings is
    kept, so that the same command goes on where it was interrupted.

    Args:
        phantoms: the maker.
        conditions: for the words of codes.
        requests: which phantoms.
        output_dir: folder of the dataset.
    """

    def __init__(
        self, phantoms: Phantoms, conditions: Conditions, requests: PhantomRequests, output_dir: str | os.PathLike
    ) -> None:
        self.phantoms, self.conditions, self.requests = phantoms, conditions, requests
        self.folder = make_folder(output_dir)
        self.whole: set[int] = set()

    def run(self) -> None:
        """Make what is missing, then the dataset's table of all that is there.

        Raises:
            BundleError: if a phantom cannot be made; those before it are kept.
        """
        rank, processes = process_rank()
        numbers = range(len(self.requests.fixed))
        for number in counted(numbers[rank::processes], "phantoms", unit="phantom"):
            if self._row(number) is None:
                self._write(number, self.phantoms.make(self.requests.seed, number, self.requests.fixed[number]))
        self._write_table(len(numbers))

    def _write_table(self, total: int) -> None:
        """Whichever process is last finds all sidecars; one that finds more after writing writes again."""
        rows: list[dict[str, Any]] = []
        while True:
            found = [row for row in map(self._row, range(total)) if row is not None]
            if rows and len(found) == len(rows):
                break
            rows = found
            write_table(self.folder / TABLE, rows)
        described = dataset_description("Digital head phantoms with known volumes", "deformed real heads")
        write_json(self.folder / "dataset_description.json", described)
        for ending, facts in OF_ALL.items():
            write_json(self.folder / f"space-{SPACE}_{ending}.json", facts)
        write_text(self.folder / ".bidsignore", "figures\n")
        logger.info(f"{len(rows)} of {total} phantoms are in {self.folder}")

    def _row(self, number: int) -> dict[str, Any] | None:
        """The table's row of a phantom that is there, or None.

        Raises:
            BundleError: if a phantom of other settings has its place.
        """
        sidecar = self.folder / _path(number, "T1w.json")
        known = read_json(sidecar)
        if not isinstance(known.get("row"), Mapping) or "made_by" not in known:
            return None  # there is none, or it is damaged
        if known["made_by"] != self._made_by(number):
            raise BundleError(
                f"{sidecar} is of a phantom made by other settings: choose another --output_dir or --seed"
            )
        if number not in self.whole and not self._is_whole(number, known.get("files")):
            return None
        self.whole.add(number)
        return dict(known["row"])

    def _paths(self, number: int) -> list[Path]:
        """Volume and label map."""
        return [self.folder / _path(number, ending) for ending in ("T1w.nii.gz", "dseg.nii.gz")]

    def _is_whole(self, number: int, files: Any) -> bool:
        if files is None:  # of a version before 2.2.0
            return all(path.is_file() for path in self._paths(number))
        return are_whole(self._paths(number)[0].parent, files)

    def _made_by(self, number: int) -> dict[str, Any]:
        settings = {"format": FORMAT, "seed": self.requests.seed, "number": number, **self.phantoms.settings()}
        return json.loads(json.dumps({**settings, "fixed": self.requests.fixed[number]}))

    def _write(self, number: int, phantom: Phantom) -> None:
        """Volume, labels and picture; the sidecar comes last, so that what has one is complete."""
        path, grid = self.folder / _path(number, "T1w.nii.gz"), self.phantoms.grid
        make_folder(path.parent)
        write_volume(path, phantom.image[0].numpy(), grid, description=header_text("phantom"))
        write_labels(self.folder / _path(number, "dseg.nii.gz"), phantom.labels[0].numpy(), grid)
        figures = make_folder(self.folder / "figures")
        write_picture(figures / f"{_name(number)}.png", picture(phantom.image[0].numpy(), phantom.labels[0].numpy()))
        row = {
            "participant_id": _name(number),
            "path": _path(number, "T1w.nii.gz").as_posix(),
            **self._in_words(phantom.measured),
            "labels": _path(number, "dseg.nii.gz").as_posix(),
            **{f"requested_{name}": round(getattr(phantom.requested, name), 1) for name in RAW[2:]},
            **phantom.facts,
        }
        known = {"made_by": self._made_by(number), "row": row, "files": fingerprints(self._paths(number))}
        write_json(self.folder / _path(number, "T1w.json"), {**known, **synthetic_facts()})

    def _in_words(self, covariates: Covariates) -> dict[str, Any]:
        words = {c.raw: {code: word for word, code in c.codes.items()} for c in self.conditions}
        values = {name: getattr(covariates, name) for name in RAW}
        return {name: words.get(name, {}).get(value, round(value, 3)) for name, value in values.items()}


def picture(image: np.ndarray, labels: np.ndarray, height: int = 256) -> np.ndarray:
    """The mid planes of a volume and below them its labels in grey levels: (2 * height, width) uint8."""
    return np.concatenate([mid_planes(image, height), mid_planes(labels / np.float32(labels.max()), height)])


def contact_sheet(dataset_dir: str | os.PathLike, path: str | os.PathLike | None, columns: int = 3) -> None:
    """A picture of the mid planes of all phantoms of a dataset, in the order of its table; none if `path` is None."""
    if path is None:
        return
    rows = read_table(Path(dataset_dir) / TABLE, ["path"])
    tiles = [mid_planes(read_volume(Path(dataset_dir) / row["path"]), 144) for row in rows]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    sheet = np.concatenate([np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)])
    with replacing(path) as temporary:
        Image.fromarray(sheet).quantize(64).save(temporary, format="PNG", optimize=True)


def _name(number: int) -> str:
    return f"sub-{number:06d}"


def _path(number: int, ending: str) -> Path:
    return Path(_name(number), "anat", f"{_name(number)}_space-{SPACE}_{ending}")
