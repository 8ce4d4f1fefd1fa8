# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Prepared scans from raw ones: checked, rigidly registered, on the bundle grid, scaled to 0..1."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from scripts.atomic import make_folder, write_json
from scripts.conditions import Condition, Conditions
from scripts.errors import BundleError
from scripts.grid import Grid
from scripts.packages import file_hash
from scripts.registration import Registration, blurred, load_template, register, resample, seen_fraction
from scripts.scans import SUFFIXES, load_scan
from scripts.tables import MISSING, read_table, write_table
from scripts.volumes import mid_planes, write_picture, write_volume

logger = logging.getLogger(__name__)

FORMAT = 1
SPACE = "MNI152"
NAME = re.compile(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*")
DEEP_MM = 8.0


@dataclass(frozen=True)
class Settings:
    """What decides how a prepared volume looks. A scan prepared with other settings is prepared again.

    Attributes:
        percentile: of the intensities deep in the brain which becomes `level`.
        level: the value, 0 to 1, that this percentile becomes; what is brighter than 1 is cut.
        enough_similarity: below this the registration is tried from more starts.
        min_similarity: below this after all starts the scan is refused.
        min_seen: below this fraction of the brain inside the field of view the scan is flagged.
        seed: of the registration, above 0.
    """

    percentile: float = 99.8
    level: float = 0.8
    enough_similarity: float = 0.4
    min_similarity: float = 0.25
    min_seen: float = 0.99
    seed: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.percentile <= 100 and 0 < self.level <= 1 and self.seed > 0):
            raise BundleError(
                f"preparation needs a percentile in 0..100, a level in 0..1 and a seed above 0, got "
                f"{self.percentile:g}, {self.level:g} and {self.seed}"
            )


@dataclass(frozen=True)
class Source:
    """One raw scan of the input table.

    Attributes:
        participant: its participant_id, such as `sub-01`.
        name: the BIDS name without suffix, such as `sub-01_ses-1`.
        path: the NIfTI file.
        row: its row of the table.
    """

    participant: str
    name: str
    path: Path
    row: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Where its results lie in the dataset, such as `sub-01/ses-1/anat`."""
        session = [part for part in self.name.split("_") if part.startswith("ses-")]
        return Path(self.participant, *session, "anat")


class Preparation:
    """The `prepare` verb: raw scans and their table in, a dataset on the bundle grid out.

    Args:
        grid: the grid to resample onto.
        conditions: the covariates to carry over into the dataset's table.
        input_dir: folder of the raw scans.
        input_table: the table of participants; beside it, paths in its `path` column begin.
        dataset_dir: folder to write.
        template, template_brain: the head to register to and its brain mask, in MNI152 mm.
        columns: raw name of a condition -> the column that holds it, or several, of which the first that
            is there is read.
        settings: what decides how a prepared volume looks.
        overwrite: prepare again what is already prepared.

    Raises:
        BundleError: if the input or the settings cannot be used.
    """

    def __init__(
        self,
        grid: Grid,
        conditions: Conditions,
        input_dir: str | os.PathLike | None,
        input_table: str | os.PathLike | None,
        dataset_dir: str | os.PathLike,
        template: str | os.PathLike,
        template_brain: str | os.PathLike,
        columns: Mapping[str, str | Sequence[str]],
        settings: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        if not input_dir and not input_table:
            raise BundleError("nothing to prepare: give --input_dir (a BIDS folder) or --input_table")
        self.table = Path(input_table or Path(str(input_dir)) / "participants.tsv")
        self.input_dir = Path(input_dir or self.table.parent)
        rows = read_table(self.table, ["participant_id"])
        self.sources = [source for row in rows for source in _row_sources(row, self.input_dir, self.table)]
        _check_names(self.sources, self.table)
        self.grid, self.conditions = grid, conditions
        self.columns = _found_columns(columns, conditions, rows[0], self.table)
        self.dataset_dir = make_folder(dataset_dir)
        self.template = load_template(template, template_brain)
        self.settings = _settings(settings)
        self.provenance = {
            "format": FORMAT,
            "template": {"name": Path(template).name, "sha256": file_hash(template)},
            "template_brain": {"name": Path(template_brain).name, "sha256": file_hash(template_brain)},
            "grid": {"shape": list(grid.shape), "affine": grid.affine.tolist()},
            "settings": dataclasses.asdict(self.settings),
        }
        self.overwrite = overwrite

    def run(self) -> None:
        """Prepare every scan of the table, write the dataset's tables, and say at the end which scans failed.

        Raises:
            BundleError: after all good scans are written, if any scan failed.
        """
        prepared, failures = [], []
        for source in tqdm(self.sources, desc="preparing", unit="scan"):
            try:
                prepared.append(self._participant(source))
            except BundleError as error:
                failures.append({"participant_id": source.participant, "path": str(source.path), "reason": str(error)})
                tqdm.write(f"failed: {source.name}: {error}")
        self._write_tables(prepared, failures)
        logger.info(f"{len(prepared)} scans prepared in {self.dataset_dir}")
        if failures:
            raise BundleError(_summary(failures, len(self.sources), self.dataset_dir / "failures.tsv"))

    def _participant(self, source: Source) -> dict[str, Any]:
        """The row of the dataset's table for one scan, prepared unless it already is."""
        if not NAME.fullmatch(source.participant) or not NAME.fullmatch(source.name):
            raise BundleError(f"the name '{source.name}' must be of letters and digits, with - and _ between them")
        covariates = {c.raw: _covariate(c, source, self.columns.get(c.raw)) for c in self.conditions}
        volume = source.folder / f"{source.name}_space-{SPACE}_T1w.nii.gz"
        measured = self._measured(source, volume)
        return {"participant_id": source.participant, "path": volume.as_posix(), **covariates, **measured}

    def _measured(self, source: Source, volume: Path) -> dict[str, Any]:
        sidecar = self.dataset_dir / volume.with_name(volume.name.removesuffix(".nii.gz") + ".json")
        provenance = {"source": source.path.name, "source_sha256": file_hash(source.path), **self.provenance}
        if not self.overwrite and (self.dataset_dir / volume).is_file():
            known = _read_json(sidecar)
            if {key: known.get(key) for key in provenance} == provenance:
                logger.info(f"{source.name} is already prepared")
                return known["measured"]
        sidecar.unlink(missing_ok=True)  # until the volume that it describes is written
        measured, found = self._prepare(source, volume)
        write_json(sidecar, {**provenance, "measured": measured, "template_to_scan_mm": found.rigid.tolist()})
        return measured

    def _prepare(self, source: Source, path: Path) -> tuple[dict[str, Any], Registration]:
        scan, settings = load_scan(source.path), self.settings
        found = register(scan, self.template, settings.seed, settings.enough_similarity)
        if found.similarity < settings.min_similarity:
            raise BundleError(
                f"{source.path}: does not match the template (similarity {found.similarity:.2f}, at least "
                f"{settings.min_similarity:g} needed): is it a T1-weighted head?"
            )
        brain = self.template.brain_on(self.grid.shape, self.grid.affine)
        seen = seen_fraction(scan, found.rigid, brain, self.grid.affine)
        moved = resample(blurred(scan, 1.0), found.rigid, self.grid.shape, self.grid.affine, order=3)
        volume = scale_intensities(moved, brain, self.grid, settings.percentile, settings.level)
        make_folder(self.dataset_dir / path.parent)
        write_volume(self.dataset_dir / path, volume, self.grid)
        figures = make_folder(self.dataset_dir / "figures")
        write_picture(figures / f"{source.name}.png", outlined(volume, brain))
        _warn(source, seen < settings.min_seen, f"{1 - seen:.1%} of the brain is outside its field of view")
        _warn(source, found.tilt > 60, f"it was turned by {found.tilt:.0f} degrees: check its header, left and right")
        flag = "cut" if seen < settings.min_seen else "whole"
        measured = {
            "similarity": round(found.similarity, 4),
            "head_scale": round(found.scale, 4),
            "brain_seen": round(seen, 4),
            "field_of_view": flag,
        }
        return measured, found

    def _write_tables(self, prepared: Sequence[Mapping[str, Any]], failures: Sequence[Mapping[str, Any]]) -> None:
        if prepared:
            write_table(self.dataset_dir / "participants.tsv", prepared)
            write_json(self.dataset_dir / "dataset_description.json", self._description())
        failed = self.dataset_dir / "failures.tsv"
        if failures:
            write_table(failed, failures)
        else:
            failed.unlink(missing_ok=True)

    def _description(self) -> dict[str, Any]:
        return {
            "Name": "T1-weighted heads on the bundle grid",
            "BIDSVersion": "1.9.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "scripts.preparation", "Description": "rigid registration, 1 mm, 0..1"}],
            "SpatialReference": self.provenance["template"],
        }


def scale_intensities(image: np.ndarray, brain: np.ndarray, grid: Grid, percentile: float, level: float) -> np.ndarray:
    """Intensities 0..1, the same tissue at nearly the same value in every head.

    0 is the image's minimum. `level` is a high percentile deep in the brain (at least 8 mm inside the
    template's), which is white matter: fat and vessels, whose brightness varies with the protocol, have no say,
    and what of them exceeds 1 is cut.

    Args:
        image: shape of the grid, any unit.
        brain: boolean, same shape.
        grid: for its voxel size.
        percentile: 0..100, of the voxels deep in the brain.
        level: the value that this percentile becomes, up to 1.

    Returns:
        Float32 array of the same shape.

    Raises:
        BundleError: if the deep brain is no brighter than the minimum.
    """
    deep = ndimage.distance_transform_edt(brain, sampling=np.abs(grid.spacing)) > DEEP_MM
    low, high = float(image.min()), float(np.percentile(image[deep], percentile))
    if high <= low:
        raise BundleError("is dark where the template has its brain: is it a T1-weighted head?")
    return np.clip((image - low) * (level / (high - low)), 0.0, 1.0).astype(np.float32)


def outlined(volume: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """The mid planes of a volume with the template's brain outlined in red: (height, width, 3) uint8."""
    inside = mid_planes(brain.astype(np.float32), 448) > 127
    picture = np.repeat(mid_planes(volume, 448)[..., None], 3, axis=2)
    picture[inside ^ ndimage.binary_erosion(inside)] = (255, 40, 40)
    return picture


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _found_columns(
    columns: Mapping[str, str | Sequence[str]], conditions: Conditions, header: Mapping[str, str], table: Path
) -> dict[str, str]:
    """Raw name of a condition -> the column of the table that holds it, for those that it has."""
    found = {}
    for name in columns:
        if name not in [c.raw for c in conditions]:
            raise BundleError(f"columns names '{name}', but the conditions are {', '.join(c.raw for c in conditions)}")
    for c in conditions:
        wanted = columns.get(c.raw, c.raw)
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        present = [name for name in names if name in header]
        if present:
            found[c.raw] = present[0]
        else:
            logger.warning(f"{table} has no column {' or '.join(names)}: {c.raw} will be {MISSING}")
    return found


def _covariate(condition: Condition, source: Source, column: str | None) -> str:
    value = source.row.get(column, MISSING) if column else MISSING
    if value.strip() in ("", MISSING):
        return MISSING
    raw = condition.denormalise(condition.parse(condition.raw, value, f" of {source.name}"))
    words = {code: word for word, code in condition.codes.items()}
    if words and raw not in words:
        raise BundleError(f"{column} of {source.name} must be one of {', '.join(condition.codes)}, got '{value}'")
    return words.get(raw, f"{raw:.10g}")


def _settings(settings: Mapping[str, Any]) -> Settings:
    names = [field.name for field in dataclasses.fields(Settings)]
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise BundleError(f"preparation has no setting '{unknown[0]}': it has {', '.join(names)}")
    return Settings(**settings)


def _check_names(sources: Sequence[Source], table: Path) -> None:
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise BundleError(f"{name} is there twice in {table}: tell a person's scans apart in a column session_id")


def _row_sources(row: Mapping[str, str], folder: Path, table: Path) -> Iterator[Source]:
    participant = row["participant_id"]
    path = row.get("path", MISSING)
    if path not in ("", MISSING):
        yield Source(participant, _named(participant, row), table.parent / path, row)
        return
    found = sorted(
        file
        for pattern in ("anat", "ses-*/anat")
        for file in (folder / participant).glob(f"{pattern}/*_T1w.nii*")
        if file.name.endswith(SUFFIXES)
    )
    for file in found:
        yield Source(participant, file.name.split("_T1w.nii")[0], file, row)
    if not found:
        yield Source(participant, participant, folder / participant / "anat" / f"{participant}_T1w.nii.gz", row)


def _named(participant: str, row: Mapping[str, str]) -> str:
    session = row.get("session_id", MISSING)
    return participant if session in ("", MISSING) else f"{participant}_{session}"


def _warn(source: Source, condition: bool, message: str) -> None:
    if condition:
        tqdm.write(f"warning: {source.name}: {message}")


def _summary(failures: Sequence[Mapping[str, Any]], total: int, table: Path) -> str:
    names = ", ".join(str(failure["participant_id"]) for failure in failures[:5])
    more = f" and {len(failures) - 5} more" if len(failures) > 5 else ""
    return f"{len(failures)} of {total} scans failed: {names}{more}; see {table}"
