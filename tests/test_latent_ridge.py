# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What latents know: a condition that is in them is told, one that is not is at its floor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from heads import refused

from scripts.core.tables import write_table
from scripts.tools import latent_ridge


def latents(folder: Path, number: int = 40) -> Path:
    """Latents whose first channel is as bright as the age says; sex is drawn beside them."""
    generator = np.random.default_rng(0)
    ages, sexes = generator.uniform(44, 82, number), generator.choice(["female", "male"], number)
    posteriors = np.ones((number, 2, 3, 4, 5, 4), np.float32)
    posteriors[:, 0] = generator.standard_normal(posteriors[:, 0].shape)
    posteriors[:, 0, 0] += (ages / 10)[:, None, None, None]
    np.save(folder / "posteriors.npy", posteriors)
    rows = [
        {"participant_id": f"sub-{i}", "path": f"{i}.nii.gz", "version": 0, "row": i, "sex": sexes[i], "age_years": age}
        for i, age in enumerate(ages)
    ]
    write_table(folder / "participants.tsv", rows)
    return folder


def test_what_is_in_the_latents_is_told_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latent_ridge.main(["--latents_dir", str(latents(tmp_path)), "--permutations", "5"])
    header, *lines = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    found = {line[0]: dict(zip(header, line)) for line in lines}
    assert set(found) == {"sex", "age_years"}
    age, sex = found["age_years"], found["sex"]
    assert float(age["r"]) > 0.9 > float(age["floor"]) and float(age["r_low"]) > float(age["floor"])
    assert float(sex["r_low"]) < 0.35
    assert int(age["scans"]) == 40


def test_too_few_scans_and_no_folder(tmp_path: Path) -> None:
    assert "no sex or age_years" in refused(latent_ridge.table, latents(tmp_path, 5))
    assert "encode_latents" in refused(latent_ridge.table, tmp_path / "none")
