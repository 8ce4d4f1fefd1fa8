# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The verb `edit`: what an editor answers to requests, with what changed, pictures and films."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scripts.compute.provenance import header_text, model_in_words
from scripts.core.files import file_hash, make_folder
from scripts.editing.answer_files import AnswerFiles
from scripts.editing.changed_regions import apparent_growth
from scripts.editing.counterfactual import Answers, Editor
from scripts.editing.edit_requests import EditRequest, EditRequests
from scripts.editing.own_conditions import sidecar_of
from scripts.preparation.native_space import carry_back
from scripts.volumes.nifti import write_map, write_picture, write_volume
from scripts.volumes.pictures import signed_picture, signed_strip, strip, write_film

logger = logging.getLogger(__name__)

SHOWN_DIFFERENCE, SHOWN_GROWTH = 0.2, 0.3
FRAME_SECONDS = 0.5


class EditFolder:
    """Writes what an editor answers; what is there of the same request already is kept.

    Args:
        editor: answers.
        requests: what is asked.
        output_dir, dtype: see `scripts.editing.answer_files.AnswerFiles`.

    Raises:
        BundleError: for a dtype that does not exist.
    """

    def __init__(self, editor: Editor, requests: EditRequests, output_dir: str, dtype: str = "uint8") -> None:
        self.editor, self.requests = editor, requests
        self.conditions, self.grid = requests.conditions, requests.grid
        self.files = AnswerFiles(output_dir, self.conditions, self.grid, dtype)

    def run(self) -> None:
        """Edit what is asked and not there yet, and write the table of all.

        Raises:
            BundleError: if an edit of another request has the name of one of these, or a file cannot be written.
        """
        for number, request in enumerate(self.requests):
            stem, wanted = f"{request.head.name}_edit-{number:03d}", self._wanted(request)
            if not self.files.is_done(stem, wanted):
                answers = self.editor(request.head.volume, request.own.vector, request.targets)
                self.files.finish(stem, wanted, self._write(stem, request, answers, wanted))
            for name, target in _names(stem, request):
                self.files.add_row(name, target, {"scan": str(request.head.path), **request.about})
        logger.info(f"{len(self.files.rows)} edited volumes are in {self.files.folder}")

    def _wanted(self, request: EditRequest) -> dict[str, Any]:
        """What decides the answers to a request, as plain data."""
        return {
            "scan": str(request.head.path),
            "scan_sha256": file_hash(request.head.path),
            "own_conditions": self.conditions.in_both_units(request.own.vector),
            "own_conditions_from": request.own.sources,
            "targets": [self.conditions.in_both_units(target) for target in request.targets],
            "native_scan": None if request.native_scan is None else str(request.native_scan),
            **self.files.settings(),
            **self.editor.facts,
        }

    def _write(self, stem: str, request: EditRequest, answers: Answers, wanted: Mapping[str, Any]) -> list[Path]:
        """All files of a request."""
        scan, folder = request.head.volume, make_folder(self.files.folder)
        reconstruction = folder / f"{stem}_reconstruction.nii.gz"
        words = header_text(model_in_words(wanted))
        write_volume(reconstruction, answers.reconstruction.clip(0.0, 1.0), self.grid, self.files.dtype, words)
        stated = {key: value for key, value in wanted.items() if key != "targets"}
        floor = errors_of(scan, answers.reconstruction)
        stated |= {"reconstruction": reconstruction.name, "reconstruction_error": floor, "inverted": answers.facts}
        paths = [reconstruction]
        for (name, target), answer in zip(_names(stem, request), answers.edited, strict=True):
            difference, picture = folder / f"{name}_difference.nii.gz", folder / f"{name}.png"
            write_map(difference, answer.volume - scan, self.grid)
            write_picture(picture, self._picture(scan, answers.reconstruction, answer.volume))
            changed = {"changed_share": round(float(answer.mask.mean()), 5)}
            paths += self.files.write(name, answer.volume, target, {**stated, **changed}, [difference, picture])
            paths += self._native(name, request)
        return [*paths, *self._film(stem, request, answers)]

    def _native(self, name: str, request: EditRequest) -> list[Path]:
        if request.native_scan is None:
            return []
        output = self.files.folder / f"{name}_space-native_T1w.nii.gz"
        carry_back(self.files.volume_of(name), request.native_scan, sidecar_of(request.head.path), output)
        return [output]

    def _picture(self, scan: np.ndarray, reconstruction: np.ndarray, edited: np.ndarray) -> np.ndarray:
        difference = signed_strip(edited - scan, SHOWN_DIFFERENCE)
        growth = signed_strip(apparent_growth(scan, edited, self.grid), SHOWN_GROWTH)
        return signed_picture(
            [
                ("the scan", strip(scan), 0.0),
                ("its reconstruction, without an edit", strip(reconstruction), 0.0),
                ("edited: made by a model", strip(edited), 0.0),
                (f"edited minus scan, -{SHOWN_DIFFERENCE} to {SHOWN_DIFFERENCE}", difference, SHOWN_DIFFERENCE),
                (f"apparent growth (logarithm), -{SHOWN_GROWTH} to {SHOWN_GROWTH}", growth, SHOWN_GROWTH),
            ]
        )

    def _film(self, stem: str, request: EditRequest, answers: Answers) -> list[Path]:
        if len(answers.edited) < 2:
            return []
        path = self.files.folder / f"{stem}.gif"
        labels = [self._label(request, answer.condition) for answer in answers.edited]
        write_film(path, [strip(answer.volume) for answer in answers.edited], labels, FRAME_SECONDS)
        return [path]

    def _label(self, request: EditRequest, target: Tensor) -> str:
        """What of a target changes along a series, in words."""
        moving = [len({float(one[place]) for one in request.targets}) > 1 for place in range(len(self.conditions))]
        values = zip(self.conditions, target.tolist(), moving, strict=True)
        said = [f"{c.raw} {c.describe(c.denormalise(value))}" for c, value, moves in values if moves]
        return f"synthetic: {', '.join(said)}"


def _names(stem: str, request: EditRequest) -> list[tuple[str, Tensor]]:
    """The name of each answer to a request, and its target."""
    if len(request.targets) == 1:
        return [(stem, request.targets[0])]
    return [(f"{stem}-{step:02d}", target) for step, target in enumerate(request.targets)]


def errors_of(scan: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Mean absolute and root mean square difference of two volumes."""
    gap = (other.astype(np.float64) - scan).ravel()
    return {"mae": round(float(np.abs(gap).mean()), 6), "rmse": round(float(np.sqrt((gap**2).mean())), 6)}
