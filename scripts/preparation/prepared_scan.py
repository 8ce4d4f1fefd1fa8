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
from scripts.core.files import file_hash, make_folder, read_json, remove_leftovers, replacing, write_json, write_text
from scripts.preparation.quality_page import FIGURES
from scripts.preparation.quality_pictures import QualityPictures
from scripts.preparation.registration import LPS, Registration, itk_frame, resample
from scripts.preparation.sources import Source
from scripts.preparation.steps import NoMatchError, Record, Step, TargetSpace, recognised, step_identity
from scripts.volumes.nifti import MNI152, SPACE, read_volume, write_volume
from scripts.volumes.scans import Scan, ScanError, read_scan

logger = logging.getLogger(__name__)

FORMAT = 2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
PREPARED, MEASURED, KEPT, FAILED = "prepared", "measured", "kept", "failed"


@dataclass(frozen=True)
class Outcome:
    """What became of one scan.

    Attributes:
        state: `prepared`, `measured` where that alone was lacking, `kept` where it already was, or `failed`.
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
        self.measuring = [name for name, step in self.steps.items() if hasattr(step, "measures")]
        self.measures = {raw for step in self.steps.values() for raw in getattr(step, "measures", ())}
        settings = {name: step_identity(step) for name, step in self.steps.items()}
        self.recipe: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **space.facts, "steps": settings}))

    @cached_property
    def pictures(self) -> QualityPictures:
        """What draws scans with the template's outline, made once in each process."""
        return QualityPictures(self.space.template)

    def __call__(self, work: Work) -> Outcome:
        """Prepare one scan, or what of it is not there yet; what goes wrong is written into `logs/` and returned."""
        files = PreparedFiles(self.dataset_dir, work.source)
        try:
            outcome = self._completed(work, files)
            files.failure.unlink(missing_ok=True)
        except Exception as error:  # one scan must not end the others
            outcome = _failure(error)
            self._show(error)
            write_failure(files, work.source, outcome, "" if isinstance(error, BundleError) else traceback.format_exc())
        return outcome

    def _completed(self, work: Work, files: PreparedFiles) -> Outcome:
        known, hashes = read_json(files.sidecar), self._read(work)
        same = known.get("source_sha256") == hashes["source_sha256"]
        if self.overwrite or not same or self.differing(files, known):
            return Outcome(PREPARED, warnings=self._prepare(work, files))
        asked = [f"{name}_sha256" for name in self.measuring if self._is_on(name) and f"{name}_sha256" in hashes]
        if self.is_measured(known, work.lacking) and all(known.get(key) == hashes[key] for key in asked):
            return Outcome(KEPT)
        record = self._prepared(work, files, known)
        if record is None:
            return Outcome(PREPARED, warnings=self._prepare(work, files))
        return Outcome(MEASURED, warnings=self._measure(record, work, files, known))

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
        """The sidecar of a scan that these very steps have prepared, in this order; None if there is none.

        What it measured counts where a measurement is asked for; where none is, that of an earlier run stays.
        """
        known = read_json(files.sidecar)
        return known if not self.differing(files, known) and self.is_measured(known, lacking) else None

    def differing(self, files: PreparedFiles, known: Mapping[str, Any]) -> list[str]:
        """What a prepared volume was made with otherwise than now, in words; empty if it is there and the same.

        Args:
            files: of the scan.
            known: its sidecar.
        """
        if not known or not all(path.is_file() for path in (files.volume, files.transform, files.picture)):
            return ["files that are not there"]
        steps, now = recognised(known.get("steps")), self.recipe["steps"]
        facts = [key for key, value in self.recipe.items() if key != "steps" and known.get(key) != value]
        other = [name for name in now if name not in self.measuring and steps.get(name) != now[name]]
        order = [] if list(steps) == list(now) or other else ["the order of the steps"]
        return [*facts, *(f"step {name}" for name in other), *order]

    def is_measured(self, known: Mapping[str, Any], lacking: Sequence[str]) -> bool:
        """Whether a sidecar has the measurements that are asked for."""
        steps, covariates = recognised(known.get("steps")), known.get("covariates", {})
        return all(
            not (wanted := [raw for raw in lacking if raw in getattr(self.steps[name], "measures", ())])
            or (steps.get(name) == self.recipe["steps"][name] and set(wanted) <= set(covariates))
            for name in self.measuring
        )

    def _is_on(self, name: str) -> bool:
        return bool(getattr(self.steps[name], "measures", ()))

    def _made_by(self, lacking: Sequence[str]) -> dict[str, Any]:
        """The recipe, and which of the conditions that no table states it is to measure."""
        return {**self.recipe, "lacking": [raw for raw in lacking if raw in self.measures]}

    def _read(self, work: Work) -> dict[str, str]:
        """The hash of each file that is read of this scan, by its name in the sidecar; empty where there is none."""
        source = work.source
        further = {
            f"{name}_sha256": step.reads(source.name, source.path, source.row, work.lacking)
            for name, step in self.steps.items()
            if hasattr(step, "reads")
        }
        return {key: _hash(path) for key, path in {"source_sha256": source.path, **further}.items()}

    def _prepared(self, work: Work, files: PreparedFiles, known: Mapping[str, Any]) -> Record | None:
        """The record of a scan whose volume is there, as the measuring steps take it; None where that cannot be."""
        names = list(self.steps)
        after = names[min(names.index(name) for name in self.measuring) :]
        if not all(name in self.measuring or getattr(self.steps[name], "is_off", False) for name in after):
            return None  # a later step has changed the volume since
        columns = {column for name in self.measuring for column in getattr(self.steps[name], "columns", {})}
        try:
            volume = read_volume(files.volume, self.space.grid.shape)
            measured = {name: value for name, value in known["measured"].items() if name not in columns}
            rigid = np.array(known["template_to_scan_mm"], float).reshape(4, 4)
            scale = known["scale"] if "scale" in known else measured["head_scale"]  # before 2.2.0, rounded
            found = Registration(rigid, float(scale), float(measured["similarity"]))
        except (BundleError, AttributeError, KeyError, TypeError, ValueError):
            return None
        source, scan = work.source, Scan(volume, self.space.grid.affine)
        record = Record(source.name, scan, scan, work.lacking, source.row, source.path, found, volume)
        return record.updated(measured=measured)

    def _measure(self, record: Record, work: Work, files: PreparedFiles, known: Mapping[str, Any]) -> tuple[str, ...]:
        """Take the measurements anew, and nothing else."""
        for name in self.measuring:
            record = self.steps[name](record)
        if record.labels is not None:
            remove_leftovers(files.labels)
            write_labels(files.labels, record.labels)
        results = {"measured": dict(record.measured), "covariates": dict(record.covariates)}
        write_json(files.sidecar, {**known, **self._read(work), **self._made_by(work.lacking), **results})
        return record.warnings

    def _prepare(self, work: Work, files: PreparedFiles) -> tuple[str, ...]:
        source, hashes = work.source, self._read(work)
        scan = read_scan(source.path)
        record = Record(source.name, scan, scan, work.lacking, source.row, source.path, warnings=_doubts(scan))
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
        write_text(files.transform, itk_transform(itk_frame(record.raw, record.original) @ found.rigid))


def _doubts(scan: Scan) -> tuple[str, ...]:
    return tuple(f"the file {finding}" for finding in scan.findings)


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
        "scale": record.registered().scale,
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
