# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Obedience: which samples are asked for, and slopes of what conditions move, also where a model ignores one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heads import refused

from scripts.compute.kept import Values
from scripts.conditions.conditions import Conditions
from scripts.evaluation.obedience import Obedience, slope_over_heads
from scripts.measuring.segmenter import INTRACRANIAL
from scripts.sampling.moved_requests import MovedRequests
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume

GRID = Grid((2, 2, 8), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
CONDITIONS = Conditions(
    gender={"raw": "sex", "unit": "", "minimum": 0, "maximum": 1, "codes": {"female": 0, "male": 1}},
    ventricular_vol={"raw": "ventricular_vol_mm3", "unit": "mm3", "minimum": 10000, "maximum": 60000},
    brain_vol={"raw": "brain_vol_mm3", "unit": "mm3", "minimum": 1100000, "maximum": 1600000},
)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> MovedRequests:
    monkeypatch.setattr("scripts.conditions.conditions.current_config", dict)
    return MovedRequests(CONDITIONS, num_heads=3, levels=[0.0, 0.5, 1.0], seed=4)


def test_each_head_has_its_noise_and_one_condition_moved_at_a_time(moved: MovedRequests) -> None:
    assert len(moved) == 3 * (1 + 1 + 2 + 2 + 1)
    for head in range(3):
        rows = [moved[i] for i in range(7 * head, 7 * head + 7)]
        assert {(row["seed"], row["noise"]) for row in rows} == {(4, head)}
        base, *others, back = [row["condition"] for row in rows]
        assert torch.equal(base, back) and base[0] in (0.0, 1.0)
        assert [int((other != base).sum()) for other in others] == [1] * 5
    assert moved.request_of(8) == {"noise_of_index": 1} and moved.request_of(0) == {}


def test_what_cannot_be_moved_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.conditions.conditions.current_config", dict)
    assert "--num_samples does not go" in refused(MovedRequests, CONDITIONS, unused={"num_samples": 3})
    assert "no conditions" in refused(MovedRequests, Conditions())
    assert "--num_heads" in refused(MovedRequests, CONDITIONS, num_heads=0)


def test_slope_is_that_of_least_squares_through_each_head() -> None:
    generator = np.random.default_rng(0)
    pairs = [
        np.stack([x := generator.uniform(-1, 1, 3), 0.7 * x + 0.1 * generator.standard_normal(3)], 1) for _ in range(8)
    ]
    x, y = np.concatenate(pairs).T
    slope, r = slope_over_heads(pairs, seed=0)
    assert slope.value == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
    assert r.value == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert slope.interval and slope.interval[0] < 0.7 < slope.interval[1]
    nothing, _ = slope_over_heads([np.empty((0, 2))], seed=0)
    assert np.isnan(nothing.value) and nothing.count == 0


class Written:
    """In the place of the segmenter: ventricles and white matter, in two litres, are written into the first voxels."""

    sha256, amp, spacing = "0" * 64, False, 1.0

    def shares(self, volume: torch.Tensor, grid: Grid) -> torch.Tensor:
        shares = torch.zeros(1 + len(INTRACRANIAL), *volume.shape[1:])
        shares[0, 0, 0, :2] = volume[0, 0, 0, :2]
        return shares

    def volumes(self, shares: torch.Tensor, grid: Grid) -> dict[str, float]:
        ventricles, white = (shares[0, 0, 0, :2].double() * 2e6).tolist()
        fluid = 1.7e6 - ventricles - white
        return dict(zip(INTRACRANIAL, (fluid, 0.0, white, ventricles, 0.0, 0.0)))


class Of:
    def __init__(self, folder: VolumeFolder) -> None:
        self.folder = folder


def sampled(folder: Path, moved: MovedRequests, obeys: dict[str, float]) -> VolumeFolder:
    """Heads that follow their conditions as much as `obeys` says, with an error of the head's own."""
    folder.mkdir()
    for index in range(len(moved)):
        row = moved[index]
        error = np.random.default_rng(row["noise"]).normal(0, 0.02, 2)
        values = dict(zip((c.name for c in CONDITIONS), row["condition"].tolist()))
        ventricles = 0.01 + 0.05 * (obeys["ventricular_vol"] * values["ventricular_vol"] + error[0] + 0.3)
        brain = 1.1 + 0.5 * (obeys["brain_vol"] * values["brain_vol"] + obeys["gender"] * values["gender"] + error[1])
        head = np.zeros(GRID.shape, np.float32)
        head[:, 0, :2] = ventricles / 2, brain / 2
        stem = folder / f"sample_seed-4_{index:06d}"
        write_volume(f"{stem}.nii.gz", head, GRID, "float32")
        about = {"seed": 4, "index": index, "conditions": CONDITIONS.in_both_units(row["condition"])}
        Path(f"{stem}.json").write_text(json.dumps({**about, **moved.request_of(index)}))
    return VolumeFolder(str(folder), "synthetic_dir")


def measured(tmp_path: Path, samples: VolumeFolder) -> Obedience:
    features: Any = Of(samples)
    segmenter: Any = Written
    training, real = (VolumeFolder(None, flag) for flag in ("training_dir", "real_dir"))
    return Obedience(features, training, real, segmenter, Values(tmp_path / "values"), CONDITIONS)


def test_what_a_condition_moves_is_found_and_what_it_leaves(tmp_path: Path, moved: MovedRequests) -> None:
    samples = sampled(tmp_path / "samples", moved, {"ventricular_vol": 0.8, "brain_vol": 0.0, "gender": 0.2})
    one = measured(tmp_path, samples)
    assert not one.missing_flags()
    found = one.compute()
    slopes = {(row.quantity, row.kind): row.found for row in found.rows if row.metric == "slope"}
    assert slopes["ventricular_vol", "ventricular_vol moved"].value == pytest.approx(0.8, abs=0.01)
    assert slopes["brain_vol", "brain_vol moved"].value == pytest.approx(0.0, abs=0.01), "ignored, and found so"
    assert slopes["ventricular_vol", "gender moved"].value == pytest.approx(0.0, abs=0.01)
    assert slopes["brain_vol", "gender moved"].value > 0.15
    [back] = [row.found for row in found.rows if row.metric == "return"]
    assert (back.value, back.count) == (0.0, 3)
    assert found.picture is not None


def test_a_head_that_does_not_come_back_is_found(tmp_path: Path, moved: MovedRequests) -> None:
    samples = sampled(tmp_path / "samples", moved, {"ventricular_vol": 1.0, "brain_vol": 1.0, "gender": 0.0})
    head = np.full(GRID.shape, 0.5, np.float32)
    write_volume(samples.paths[6], head, GRID, "float32")
    [back] = [row.found for row in measured(tmp_path, samples).compute().rows if row.metric == "return"]
    assert back.value > 0.05


def test_samples_of_noises_of_their_own_say_why_not(tmp_path: Path, moved: MovedRequests) -> None:
    samples = sampled(tmp_path / "samples", moved, {"ventricular_vol": 1.0, "brain_vol": 1.0, "gender": 0.0})
    for path in samples.paths[1:]:
        path.with_name(path.name.replace(".nii.gz", ".json")).unlink()
    one = measured(tmp_path, samples)
    assert one.missing_flags() == ["synthetic_dir"] and "share their noise" in one.inputs[1].why_not
