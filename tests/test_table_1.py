# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark that trains a model of each family alike and writes Table 1, at tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from heads import write_dataset
from processes import run_python
from released import configuration

from benchmarks import table_1
from scripts.core.tables import read_table
from scripts.diffusion.targets import TARGETS


def test_rows_are_the_papers_and_each_target() -> None:
    rows = table_1.models()
    assert list(rows)[:4] == ["LSGAN", "VAE-GAN", "LDM-DDPM-1000", "LDM-DDIM-50"]
    assert {name for name in rows if name.startswith("pixel-")} == {f"pixel-{target}" for target in TARGETS}
    families = configuration()["families"]
    assert {model.family for model in rows.values()} <= families.keys()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--models", "LSGAM"], "there is no 'LSGAM'"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--train_dir", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_made(flags: list[str], told: str, tmp_path: Path) -> None:
    done = run_python("-m", "benchmarks.table_1", "--folder", tmp_path / "out", *flags)
    assert done.returncode != 0 and told in done.stderr and "Traceback" not in done.stderr


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}


@pytest.mark.slow
def test_all_rows_at_tiny_size_and_again(tmp_path: Path) -> None:
    """A table, a picture and a report; the same command again makes nothing anew."""
    grid: Any = configuration([table_1.GRID]).get_parsed_content("grid")
    people = [
        {"sex": sex, "age_years": 50 + n, "ventricular_vol_mm3": 30000, "brain_vol_mm3": 1.4e6}
        for n, sex in enumerate(["female", "male", "female", "male"])
    ]
    given = [f"--{name}_dir={write_dataset(tmp_path / name, grid, people)}" for name in ("train", "held_out")]
    words = ["--minutes", 0.02, "--held_out", 3, "--num_pairs", 3, "--steps", 2, "--folder", tmp_path / "table", *given]
    models = ["--models", "LSGAN", "LDM-DDIM-50", "pixel-flow"]
    done = run_python("-m", "benchmarks.table_1", *words, *models)
    assert done.returncode == 0, done.stderr
    rows = {next(iter(row.values())): row for row in read_table(tmp_path / "table" / "table_1.tsv")}
    for name in models[1:]:
        assert float(rows[name]["MS-SSIM"]) > 0 and int(rows[name]["iterations"]) > 0
        assert float(rows[name]["peak GiB"]) > 0
        assert len(list((tmp_path / "table" / "samples" / name).glob("*.nii.gz"))) >= 3
    assert (tmp_path / "table" / "heads" / "models.png").is_file()
    assert "pixel-flow" in json.dumps(json.loads((tmp_path / "table" / "evaluation" / "evaluation.json").read_text()))
    before = tree(tmp_path / "table")
    again = run_python("-m", "benchmarks.table_1", *words, *models)
    assert again.returncode == 0 and tree(tmp_path / "table") == before
