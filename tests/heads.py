# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Prepared datasets of made-up heads, and the one line in which a call ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.core.errors import find_bundle_error
from scripts.core.tables import write_table
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume

ROWS: list[dict[str, object]] = [
    {"sex": "female", "age_years": 50, "ventricular_vol_mm3": 20000, "brain_vol_mm3": 1400000},
    {"sex": "male", "age_years": 60, "ventricular_vol_mm3": 30000, "brain_vol_mm3": 1500000},
    {"sex": "female", "age_years": 70, "ventricular_vol_mm3": 40000, "brain_vol_mm3": 1300000},
    {"sex": "male", "age_years": 80, "ventricular_vol_mm3": 50000, "brain_vol_mm3": 1600000},
]


def head(grid: Grid, seed: int) -> Tensor:
    """A bright ellipsoid with a dark one inside, (X, Y, Z)."""
    axes = [torch.linspace(-1, 1, n) for n in grid.shape]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
    head = 0.7 * (radius < 0.8) - 0.5 * (radius < 0.2 + 0.05 * seed)
    return (head + 0.02 * torch.randn(grid.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def write_dataset(folder: Path, grid: Grid, rows: list[dict[str, object]] = ROWS) -> Path:
    """A prepared dataset of as many heads as rows."""
    table = []
    for number, row in enumerate(rows):
        path = Path(f"sub-{number}") / "anat" / f"sub-{number}_T1w.nii.gz"
        (folder / path.parent).mkdir(parents=True)
        write_volume(folder / path, head(grid, number).numpy(), grid)
        table.append({"participant_id": f"sub-{number}", "path": path, **row})
    write_table(folder / "participants.tsv", table)
    return folder


def refused(call: Callable[..., Any], *given: Any, **flags: Any) -> str:
    """The one line that a call ends in."""
    with pytest.raises(Exception) as caught:
        call(*given, **flags)
    error = find_bundle_error(caught.value)
    assert error is not None, caught.value
    return str(error)
