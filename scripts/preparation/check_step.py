# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The step that looks at a prepared scan: all of the head seen, upright, its sides plain, its header in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from scripts.preparation.checks import described, field_of_view, header_findings, pose
from scripts.preparation.steps import Record, TargetSpace


@dataclass(frozen=True)
class CheckScan:
    """Says how much of the head the scan shows, whether it lies upright, and what makes left and right doubtful.

    Args:
        space: the template and the grid.
        min_brain: a scan that shows less of the brain than this fraction is flagged as `cut`.
        min_vault: one that shows less of what is around the brain, as `skull cut`.
    """

    space: TargetSpace
    min_brain: float = 0.99
    min_vault: float = 0.98

    columns: ClassVar[Mapping[str, str]] = {
        "brain_seen": "fraction of the brain inside the scan's field of view",
        "vault_seen": "the same of the brain and the 12 mm around it, above the base of the skull",
        "field_of_view": "`cut` where a part of the brain is missing, `skull cut` of what is around it, else `whole`",
        "orientation": "`upright`, or `turned` where the template fits better after a quarter or half turn",
        "sides": "`usual`, or `doubtful` where the mirrored template fits clearly better",
        "sides_score": "correlation with the template less that with its mirror image",
        "header": "what makes left and right, or the position, doubtful in the file's header; `none` if nothing does",
    }

    def __call__(self, record: Record) -> Record:
        """The record with its columns, and a warning for each finding."""
        found, template, grid = record.registered(), self.space.template, self.space.grid
        view = field_of_view(record.original, found, template)
        lies = pose(record.on_grid(), grid.affine, found.scale, template)
        findings = header_findings(record.raw) if record.raw.is_file() else []
        flag = view.flag(self.min_brain, self.min_vault)
        record = record.warned(flag == "cut", f"{1 - view.brain:.1%} of the brain is outside its field of view")
        record = record.warned(flag == "skull cut", f"{1 - view.vault:.1%} of the skull's vault is outside its view")
        record = record.warned(not lies.is_upright, "the template fits better when it is turned: look at its picture")
        record = record.warned(lies.sides_are_doubtful, "the mirrored template fits better: check left and right")
        for finding in findings:
            record = record.warned(True, f"its header {finding}")
        return record.with_measured(
            brain_seen=round(view.brain, 4),
            vault_seen=round(view.vault, 4),
            field_of_view=flag,
            orientation="upright" if lies.is_upright else "turned",
            sides="doubtful" if lies.sides_are_doubtful else "usual",
            sides_score=round(lies.sides, 4),
            header=described(findings),
        )
