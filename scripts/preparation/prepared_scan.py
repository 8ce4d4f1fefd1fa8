# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""One scan prepared: its steps, its files, and the record of how they were made."""

from __future__ import annotations

import errno
import json
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from scripts.core.errors import BundleError
from scripts.core.files import file_hash, make_folder, remove_leftovers, replacing, write_json, write_text
from scripts.preparation.quality_page import FIGURES
from scripts.preparation.quality_pictures import QualityPictures
from scripts.preparation.registration import LPS, resample
from scripts.preparation.sources import Source
from scripts.preparation.steps import NoMatchError, Record, Step, TargetSpace, recognised, step_identity
from scripts.volumes.nifti import MNI152, SPACE, write_volume
from scripts.volumes.scans import Scan, ScanError, read_scan

logger = logging.getLogger(__name__)

FORMAT = 2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
PREPARED, KEPT, FAILED = "prepared", "kept", "failed"


@dataclass(frozen=True)
class Outcome:
    """What became of one scan.

    Attributes:
        state: `prepared`, `kept` where it already was, or `failed`.
        reason, message: of a failure, in a few words to count it by, and in full.
        warnings: what the user should look at.
        no_room: whether its files could not be written for want of room, which ends the run.
    """

    state: str
    reason: str = ""
    message: str = ""
    warnings: tuple[str, ...] = ()
    no_room: bool = False


@dataclass(frozen=True)
class Work:
    """One scan to prepare, and the raw names of the conditions that no table states of it."""

    source: Source
    lacking: tuple[str, ...] = ()


class PreparedFiles:
    """Names of the files of one prepared scan."""

    def __init__(self, dataset_dir: Path, source: Source) -> None:
        stem = dataset_dir / source.folder / f"{source.name}_space-{SPACE}"
        self.volume = Path(f"{stem}_T1w.nii.gz")
        self.sidecar = Path(f"{stem}_T1w.json")
        self.labels = Path(f"{stem}_dseg.nii.gz")
        self.transform = dataset_dir / source.folder / f"{source.name}_from-T1w_to-{SPACE}_mode-image_xfm.txt"
        self.picture = dataset_dir / FIGURES / f"{source.name}.jpg"
        self.failure = dataset_dir / "logs" / f"{source.name}.json"


class ScanPreparer:
    """Prepares one scan at a time, independently of all others; the same scan gives the same bytes.

    The sidecar is written last, so that what has one is complete.

    Args:
        space: the template and the grid.
        steps: name -> step, in their order.
        dataset_dir: folder to write.
        overwrite: prepare again what is already prepared.
    """

    def __init__(self, space: TargetSpace, steps: Mapping[str, Step], dataset_dir: Path, overwrite: bool) -> None:
        self.space, self.steps = space, dict(steps)
        self.dataset_dir, self.overwrite = dataset_dir, overwrite
        self.measures = {raw for step in self.steps.values() for raw in getattr(step, "measures", ())}
        settings = {name: step_identity(step) for name, step in self.steps.items()}
        self.recipe: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **space.facts, "steps": settings}))

    @cached_property
    def pictures(self) -> QualityPictures:
        """What draws scans with the template's outline, made once in each process."""
        return QualityPictures(self.space.template)

    def __call__(self, work: Work) -> Outcome:
        """Prepare one scan, unless it already is; what goes wrong is written into `logs/` and returned."""
        files = PreparedFiles(self.dataset_dir, work.source)
        try:
            if not self.overwrite and self._is_done(work, files):
                outcome = Outcome(KEPT)
            else:
                outcome = Outcome(PREPARED, warnings=self._prepare(work, files))
            files.failure.unlink(missing_ok=True)
        except Exception as error:  # one scan must not end the others
            outcome = _failure(error)
            self._show(error)
            write_failure(files, work.source, outcome, "" if isinstance(error, BundleError) else traceback.format_exc())
        return outcome

    def _show(self, error: Exception) -> None:
        """Draw where the search ended of a scan that matches nowhere, for the quality page."""
        if isinstance(error, NoMatchError):
            record, found, grid = error.record, error.record.registered(), self.space.grid
            volume = resample(record.scan, found.rigid, grid.shape, grid.affine, order=1)
            bright = max(float(np.percentile(volume, 99.5)), 1e-6)
            with suppress(BundleError, OSError):
                figures = self.dataset_dir / FIGURES
                self.pictures.write(figures, record.name, np.clip(volume / bright, 0.0, 1.0), grid, found.scale)

    def known(self, files: PreparedFiles, lacking: Sequence[str]) -> dict[str, Any] | None:
        """The sidecar of a scan that these very steps have prepared, in this order; None if there is none."""
        known = read_json(files.sidecar)
        made_by, steps = self._made_by(lacking), recognised(known.get("steps"))
        alike = {**{key: known.get(key) for key in made_by}, "steps": steps} == made_by
        same = alike and list(steps) == list(made_by["steps"])
        there = all(path.is_file() for path in (files.volume, files.transform, files.picture))
        return known if same and there else None

    def _made_by(self, lacking: Sequence[str]) -> dict[str, Any]:
        """The recipe, and which of the conditions that no table states it is to measure."""
        return {**self.recipe, "lacking": [raw for raw in lacking if raw in self.measures]}

    def _is_done(self, work: Work, files: PreparedFiles) -> bool:
        known = self.known(files, work.lacking)
        return known is not None and all(known.get(key) == value for key, value in self._read(work).items())

    def _read(self, work: Work) -> dict[str, str]:
        """The hash of each file that is read of this scan, by its name in the sidecar; empty where there is none."""
        source = work.source
        further = {
            f"{name}_sha256": step.reads(source.name, source.path, source.row, work.lacking)
            for name, step in self.steps.items()
            if hasattr(step, "reads")
        }
        return {key: _hash(path) for key, path in {"source_sha256": source.path, **further}.items()}

    def _prepare(self, work: Work, files: PreparedFiles) -> tuple[str, ...]:
        source, hashes = work.source, self._read(work)
        scan = read_scan(source.path)
        record = Record(source.name, scan, scan, work.lacking, source.row, source.path)
        for step in self.steps.values():
            record = step(record)
        files.sidecar.unlink(missing_ok=True)  # until the volume that it describes is written
        self._write(record, files)
        origin = {"source": source.origin, **hashes}
        write_json(files.sidecar, {**_bids(record), **origin, **self._made_by(work.lacking), **_results(record)})
        return record.warnings

    def _write(self, record: Record, files: PreparedFiles) -> None:
        make_folder(files.volume.parent)
        for path in (files.volume, files.sidecar, files.labels, files.transform):
            remove_leftovers(path)
        write_volume(files.volume, record.on_grid(), self.space.grid)
        if record.labels is not None:
            write_labels(files.labels, record.labels)
        found = record.registered()
        self.pictures.write(self.dataset_dir / FIGURES, record.name, record.on_grid(), self.space.grid, found.scale)
        write_text(files.transform, itk_transform(found.rigid))


def _hash(path: Path | None) -> str:
    if path is None or not path.is_file():
        return ""
    try:
        return file_hash(path)
    except OSError as error:
        raise ScanError("unreadable", f"{path}: cannot be read: {error.strerror or error}") from error


def _bids(record: Record) -> dict[str, Any]:
    return {"SkullStripped": record.skull_stripped, "SpatialReference": SPACE}


def _results(record: Record) -> dict[str, Any]:
    return {
        "measured": dict(record.measured),
        "covariates": dict(record.covariates),
        "warnings": list(record.warnings),
        "template_to_scan_mm": record.registered().rigid.tolist(),
    }


def _failure(error: Exception) -> Outcome:
    message = str(error) or type(error).__name__
    if _no_room(error):
        return Outcome(FAILED, "no room on the disk", message, no_room=True)
    if isinstance(error, ScanError):
        return Outcome(FAILED, error.reason, message)
    if isinstance(error, BundleError):
        return Outcome(FAILED, "other", message)
    return Outcome(FAILED, f"unexpected {type(error).__name__}", message.strip().split("\n")[0])


def _no_room(error: BaseException) -> bool:
    return any(isinstance(one, OSError) and one.errno in NO_ROOM for one in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def write_failure(files: PreparedFiles, source: Source, outcome: Outcome, trace: str = "") -> None:
    """Note a failure in `logs/`, where the tables are made from; without room, it is lost, and tried again anyway."""
    noted = {
        "participant_id": source.participant,
        "path": str(source.path),
        "reason": outcome.reason,
        "message": outcome.message,
        "traceback": trace.splitlines(),
    }
    with suppress(BundleError):
        make_folder(files.failure.parent)
        write_json(files.failure, noted)


def write_labels(path: Path, labels: Scan) -> None:
    """Write a label map as int16 NIfTI."""
    image = nib.Nifti1Image(labels.data.astype(np.int16), labels.affine)
    image.set_sform(labels.affine, MNI152)
    image.set_qform(labels.affine, MNI152)
    with replacing(path) as temporary:
        nib.save(image, temporary)


def itk_transform(rigid: np.ndarray) -> str:
    """A transform file of ITK as text, which ANTs, ITK-SNAP and 3D Slicer read (LPS millimetres).

    As ITK has it, the file of a transform of images from A to B maps points of B to points of A.

    Args:
        rigid: 4 x 4 matrix from template world to scan world (RAS+, mm).
    """
    matrix = LPS @ rigid @ LPS
    parameters = " ".join(repr(float(number)) for number in (*matrix[:3, :3].ravel(), *matrix[:3, 3]))
    lines = (
        "#Insight Transform File V1.0",
        "#Transform 0",
        "Transform: AffineTransform_double_3_3",
        f"Parameters: {parameters}",
        "FixedParameters: 0 0 0",
    )
    return "\n".join(lines) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file; an empty one where there is none, or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
