# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""A rerun of the preparation keeps what was there: each step's result by that step's own settings."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparing import CONDITIONS, contents, preparation, save, space, steps, write_bids
from stand_ins import KnownPose

from scripts.core.errors import BundleError
from scripts.core.tables import read_table
from scripts.preparation.covariate_volumes import MeasureVolumes, VolumeMethod
from scripts.preparation.optional_steps import StripSkull
from scripts.preparation.skull_stripping import CommandStripper
from scripts.preparation.steps import Record, TargetSpace
from scripts.volumes.labels import by_stem
from scripts.volumes.nifti import as_stored
from scripts.volumes.scans import Scan

RAW = ("ventricular_vol_mm3", "brain_vol_mm3")


@dataclass(frozen=True)
class Pose(KnownPose):
    """A registration that counts."""

    def __call__(self, record: Record) -> Record:
        calls.append(f"register {record.name}")
        return super().__call__(record)


class Mean(VolumeMethod):
    """A way to volumes that depends on every voxel, and counts."""

    def __init__(self, factor: float = 1000.0) -> None:
        self.factor = factor

    def measure(self, record: Record, space: TargetSpace) -> tuple[dict[str, float], Scan | None]:
        calls.append(f"measure {record.name}")
        mean = float(as_stored(record.on_grid()).mean(dtype=np.float64)) * self.factor * record.registered().scale
        return {"ventricular_vol": mean, "brain_vol": 2.0 * mean}, None

    def settings(self) -> dict[str, Any]:
        return {"factor": self.factor}


calls: list[str] = []


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetSpace:
    return space(tmp_path_factory.mktemp("space"))


class Prepares:
    """`prepares(way=None, **options)` prepares, and returns the table and what was done."""

    def __init__(self, target: TargetSpace, raw: Path, dataset: Path) -> None:
        self.target, self.raw, self.dataset = target, raw, dataset

    def __call__(
        self, way: str | None = None, factor: float = 1e5, more: Mapping[str, Any] | None = None, **options: Any
    ) -> tuple[list[dict[str, str]], list[str]]:
        calls.clear()
        measure = MeasureVolumes(self.target, CONDITIONS, way, None, {"mean": Mean(factor)})
        chain = {**steps(self.target), "register": Pose(0.9123456), "volumes": measure, **(more or {})}
        preparation(self.target, self.dataset, input_dir=self.raw, steps=chain, **options).run()
        return [*read_table(self.dataset / "participants.tsv")], sorted(calls)


@pytest.fixture
def prepares(target: TargetSpace, tmp_path: Path) -> Prepares:
    return Prepares(target, write_bids(tmp_path / "raw", 3), tmp_path / "dataset")


NAMES = [f"sub-{i:02d}" for i in range(3)]
MEASURED, REGISTERED = [f"measure {name}" for name in NAMES], [f"register {name}" for name in NAMES]


def test_a_measurement_added_later_costs_itself_alone(
    prepares: Prepares, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    assert prepares()[1] == REGISTERED
    before = {path: data for path, data in contents(prepares.dataset).items() if path.endswith((".gz", ".jpg", ".txt"))}
    caplog.set_level(logging.INFO)
    table, done = prepares("mean")
    assert done == MEASURED and "of 3 prepared scans the volumes alone are measured" in caplog.text
    assert before.items() <= contents(prepares.dataset).items()
    assert prepares("mean") == (table, [])
    at_once = Prepares(prepares.target, prepares.raw, tmp_path / "other")
    assert at_once("mean")[0] == table, "the same as measured at once"
    assert prepares("mean", factor=2e5)[1] == MEASURED


def test_what_was_measured_stays_where_nothing_is_to_be_measured(prepares: Prepares, tmp_path: Path) -> None:
    table, _ = prepares("mean")
    assert {row[name] for row in table for name in RAW}.isdisjoint({"n/a"})
    (tmp_path / "list.txt").write_text("sub-01  # moved\n")
    for assemble in (1, 0):
        kept, done = prepares(exclude=tmp_path / "list.txt", assemble=assemble)
        assert done == [] and [row["participant_id"] for row in kept] == ["sub-00", "sub-02"]
        assert all(row[name] == old[name] for row, old in zip(kept, table[::2]) for name in RAW)
        page = (prepares.dataset / "quality.html").read_text()
        assert all(name in page for name in NAMES), "excluded scans stay on the page"
    assert prepares()[0] == table


def test_values_of_a_table_come_before_measured_ones(prepares: Prepares, tmp_path: Path) -> None:
    prepares("mean")
    table = tmp_path / "raw" / "participants.tsv"
    table.write_text("participant_id\tbrain_vol_mm3\nsub-00\t1234567\nsub-01\tn/a\nsub-02\t1222222\n")
    rows, done = prepares("mean")
    assert [row["brain_vol_mm3"] for row in rows][::2] == ["1234567", "1222222"] and done == []


def test_other_settings_are_said_first_and_tables_alone_refused(
    prepares: Prepares, caplog: pytest.LogCaptureFixture
) -> None:
    prepares("mean")
    before = contents(prepares.dataset)
    changed = {"register": Pose(0.8)}
    with pytest.raises(BundleError, match=r"no scan in .* was prepared by these settings \(3 with other step register"):
        prepares("mean", more=changed, assemble=1)
    assert contents(prepares.dataset) == before
    assert prepares("mean", more=changed)[1] == MEASURED + REGISTERED
    assert "3 with other step register: they are prepared again" in caplog.text


@pytest.mark.parametrize("damage", ["volume", "sidecar"])
def test_what_is_damaged_is_prepared_again_before_it_is_measured(damage: str, prepares: Prepares) -> None:
    prepares()
    path = prepares.dataset / "sub-01/anat/sub-01_space-MNI152_T1w.nii.gz"
    if damage == "volume":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        sidecar = path.with_name("sub-01_space-MNI152_T1w.json")
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "measured": [], "template_to_scan_mm": "x"}))
    assert prepares("mean")[1] == sorted([*MEASURED, "register sub-01"])


def test_a_stripped_volume_is_not_measured(prepares: Prepares, target: TargetSpace) -> None:
    class Nothing:
        def check(self) -> None: ...

        def mask(self, volume: np.ndarray, grid: Any, scale: float) -> np.ndarray:
            return volume > 0.3

    more = {"strip": StripSkull(target, "nothing", {"nothing": Nothing})}  # type: ignore[dict-item]
    prepares(more=more)
    table, done = prepares("mean", more=more)
    assert done == MEASURED + REGISTERED


def test_the_split_is_over_what_is_prepared(prepares: Prepares) -> None:
    """Whoever of three fails, the others have a validation subject."""
    for failing in NAMES:
        path = prepares.raw / failing / "anat" / f"{failing}_T1w.nii.gz"
        whole = path.read_bytes()
        save(path, np.zeros((20, 28, 20), np.int16))
        with pytest.raises(BundleError, match=f"1 of 3 scans failed.*{failing}"):
            prepares(splits={"train": 0.999, "validation": 0.001, "test": 0.0})
        rows = read_table(prepares.dataset / "participants.tsv")
        assert sorted(row["split"] for row in rows) == ["train", "validation"]
        path.write_bytes(whole)


def test_the_only_subject_for_validation_is_not_an_excluded_one(prepares: Prepares, tmp_path: Path) -> None:
    division = {"train": 0.999, "validation": 0.001, "test": 0.0}
    for name in NAMES:
        (tmp_path / "list.txt").write_text(name)
        rows, _ = prepares(splits=division, exclude=tmp_path / "list.txt")
        assert sorted(row["split"] for row in rows) == ["train", "validation"]


def test_programs_are_looked_for_before_the_first_scan(prepares: Prepares, target: TargetSpace) -> None:
    tool = {"bet": lambda: CommandStripper("not-there-bet", ["{image}"], source="pip install it")}
    with pytest.raises(BundleError, match="not-there-bet: pip install it"):
        prepares(more={"strip": StripSkull(target, "bet", tool)})
    assert calls == [] and not prepares.dataset.exists()


def test_two_label_maps_of_one_name_are_both_named(tmp_path: Path) -> None:
    paths = [tmp_path / one / "sub-1_dseg.nii.gz" for one in ("a", "b")]
    with pytest.raises(BundleError, match=r"--segmentations: .*a/sub-1_dseg.nii.gz and .*b/sub-1_dseg.nii.gz"):
        by_stem(paths, "segmentations")
    assert by_stem(paths[:1], "segmentations") == {"sub-1_dseg": paths[0]}


def test_the_raw_table_is_never_removed(target: TargetSpace, tmp_path: Path) -> None:
    raw = write_bids(tmp_path / "raw", 1)
    save(raw / "sub-00/anat/sub-00_T1w.nii.gz", np.zeros((20, 28, 20), np.int16))
    before = contents(raw)
    for more in ({"input_dir": raw}, {"input_table": raw / "participants.tsv", "input_dir": raw}):
        with pytest.raises(BundleError, match="lie in one another"):
            preparation(target, raw, **more).run()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "participants.tsv").write_text("the user's\n")
    with pytest.raises(BundleError, match="participants.tsv that `prepare` has not written"):
        preparation(target, elsewhere, input_dir=raw).run()
    assert contents(raw) == before and contents(elsewhere) == {"participants.tsv": b"the user's\n"}
