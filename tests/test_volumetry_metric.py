# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Volumes of structures against what was asked for: label maps, SynthSeg's tables, and the correlations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import scipy.stats
from conftest import BASE, ROOT
from monai.bundle import ConfigParser

from scripts.conditions.conditions import Conditions
from scripts.core import bootstrap
from scripts.core.correlation import correlations, pearson, slope, spearman
from scripts.core.errors import BundleError
from scripts.evaluation.measures import Result
from scripts.evaluation.metrics.features import FeatureNetworks, FeatureSet
from scripts.evaluation.metrics.volumetry import Volumetry
from scripts.evaluation.segmentations import Segmentations, segmentation_of_each
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.head_size import Structures, normalised_brain
from scripts.volumes.labels import label_volumes, read_synthseg

SYNTHSEG = (
    "subject,total intracranial,left cerebral white matter,left cerebral cortex,left lateral ventricle,"
    "left inferior lateral ventricle,3rd ventricle,4th ventricle,brain-stem,csf,right cerebral cortex,"
    "right lateral ventricle,right inferior lateral ventricle,ctx-lh-bankssts,ctx-rh-insula"
)


@pytest.fixture(scope="module")
def conditions() -> Conditions:
    return ConfigParser(ConfigParser.load_config_file(str(ROOT / BASE))).get_parsed_content("conditions")


def save(path: Path, array: np.ndarray, spacing: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([spacing] * 3 + [1.0])), path)
    return path


def labels(ventricles: int, brain: int, codes: tuple[int, int] = (4, 3)) -> np.ndarray:
    """A label map with that many voxels of each."""
    flat = np.zeros(1000, np.int16)
    flat[:ventricles], flat[ventricles : ventricles + brain] = codes
    return flat.reshape(10, 10, 10)


def samples(folder: Path, requested: list[tuple[float, float]]) -> VolumeFolder:
    """Volumes with sidecars as the sampler writes them."""
    for index, (ventricles, brain) in enumerate(requested):
        save(folder / f"sample_seed-1_{index:06d}.nii.gz", np.zeros((4, 4, 4), np.float32))
        stated = {"age": 0.5, "ventricular_vol_mm3": ventricles, "brain_vol_mm3": brain}
        (folder / f"sample_seed-1_{index:06d}.json").write_text(json.dumps({"conditions": stated}))
    return VolumeFolder(folder, "synthetic_dir")


def test_label_maps_are_counted_in_mm3(tmp_path: Path) -> None:
    array = np.zeros((8, 8, 8), np.float32)
    array.flat[:8] = [4, 5, 43, 44, 4, 14, 15, 24]  # third and fourth ventricle and fluid are neither
    array.flat[8:14] = [2, 42, 16, 1002, 3035, 251]
    array.flat[14:17] = [31, 85, 165]  # choroid plexus, optic chiasm, skull
    found = label_volumes(save(tmp_path / "x.nii.gz", array, spacing=2.0))
    assert found == Structures(5 * 8.0, 6 * 8.0, (5 + 6 + 5) * 8.0)
    array[array == 24] = 0
    array.flat[20:400] = 2  # as in FreeSurfer's aseg, next to none of the fluid around the brain is labelled
    assert label_volumes(save(tmp_path / "x.nii.gz", array)).intracranial is None


def test_label_maps_of_phantoms_are_counted_by_their_codes(tmp_path: Path) -> None:
    array = np.zeros((4, 4, 4), np.uint8)
    array.flat[:21] = [1] + 2 * [2] + 3 * [3] + 4 * [4] + 5 * [5] + 6 * [6]
    assert label_volumes(save(tmp_path / "x.nii.gz", array)) == Structures(5.0, 7.0, 20.0)


def test_synthseg_s_tables_are_read(tmp_path: Path) -> None:
    (tmp_path / "vol.csv").write_bytes(
        f"{SYNTHSEG}\r\r\n/in/a_0001.nii.gz,999,10,20,1,2,300,400,5,600,30,4,8,7,7\r\r\nb.mgz".encode()
        + b",999,1,1,1,1,1,1,1,1,1,1,1,1,1\r\n"
    )
    found = read_synthseg(tmp_path / "vol.csv")
    assert found["a_0001"] == Structures(15.0, 65.0, 999.0) and found["b"] == Structures(4.0, 4.0, 999.0)
    (tmp_path / "old.csv").write_text(f"{SYNTHSEG}\na,,10,20,1,2,300,400,5,600,30,4,8,7,7\n")
    assert read_synthseg(tmp_path / "old.csv")["a"] == Structures(15.0, 65.0, 15.0 + 65.0 + 1300.0)


BAD_TABLES = {
    "has no column 'left lateral ventricle'": "subject,total intracranial\na,1\n",
    "two rows of a": f"{SYNTHSEG}\n" + 2 * "a.nii.gz,9,1,1,1,1,1,1,1,1,1,1,1,1,1\n",
    "a volume of a in .* is no number": f"{SYNTHSEG}\na,9,1,1,x,1,1,1,1,1,1,1,1,1,1\n",
    "a volume of a in .* is no number: 'nan'": f"{SYNTHSEG}\na,9,1,1,nan,1,1,1,1,1,1,1,1,1,1\n",
}


@pytest.mark.parametrize("message", BAD_TABLES)
def test_bad_tables_are_refused(tmp_path: Path, message: str) -> None:
    (tmp_path / "vol.csv").write_text(BAD_TABLES[message])
    with pytest.raises(BundleError, match=message):
        read_synthseg(tmp_path / "vol.csv")


BAD_MAPS: dict[str, Any] = {
    "no label map: it holds other values": np.full((3, 3, 3), 0.5, np.float32),
    "no label map: it holds other values ": np.full((3, 3, 3), np.nan, np.float32),
    "no label of ventricular_vol": np.full((3, 3, 3), 3, np.int16),
    "no label of brain_vol": np.full((3, 3, 3), 4, np.int16),
}


@pytest.mark.parametrize("message", BAD_MAPS)
def test_bad_label_maps_are_refused(tmp_path: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message.strip()):
        label_volumes(save(tmp_path / "x.nii.gz", BAD_MAPS[message]))


def test_segmentations_are_told_by_name() -> None:
    volumes = ["s_1", "s_10", "s_1_b"]
    assert segmentation_of_each(volumes, ["s_10", "s_1_synthseg", "s_1_b.seg"]) == {
        "s_10": "s_10",
        "s_1": "s_1_synthseg",
        "s_1_b": "s_1_b.seg",
    }


def without_features(folder: VolumeFolder) -> FeatureSet:
    return FeatureSet(folder, FeatureNetworks(None, {}), "nowhere")


@pytest.mark.parametrize(
    ("segmentations", "message"),
    [
        (["a"], "1 volumes .* no segmentation, b the first"),
        (["a", "b", "c"], "segmentation c belongs to no volume"),
        (["a", "b", "b_seg"], "two segmentations belong to b: b and b_seg"),
        (["a", "bb"], "segmentation bb belongs to no volume"),
    ],
)
def test_what_does_not_match_is_refused(segmentations: list[str], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        segmentation_of_each(["a", "b"], segmentations)


@pytest.mark.parametrize("ties", [False, True])
def test_statistics_are_scipy_s(ties: bool) -> None:
    generator = np.random.default_rng(0)
    x = generator.gamma(2.0, size=50)
    y = 3.0 * x + generator.normal(size=50)
    x, y = (np.round(x), np.round(y)) if ties else (x, y)
    assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, rel=1e-12)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, rel=1e-12)
    assert slope(x, y) == pytest.approx(scipy.stats.linregress(x, y).slope, rel=1e-12)


def test_intervals_are_scipy_s_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(size=60)
    y = x + generator.normal(size=60)
    theirs = scipy.stats.bootstrap(
        (x, y), pearson, paired=True, vectorized=False, method="percentile", n_resamples=4000, random_state=1
    ).confidence_interval
    found: dict[str, Any] = correlations("v", x, y, 0)
    assert found["pearson"].interval == pytest.approx(tuple(theirs), abs=0.02)
    assert found["slope"].interval[0] < 1.0 < found["slope"].interval[1] and found["pearson"].count == 60
    monkeypatch.setattr(bootstrap, "REPEATS", 300)
    found = correlations("v", x, y, 0)
    repeats = np.random.default_rng(0).integers(60, size=(300, 60))
    for metric, function in (("spearman", scipy.stats.spearmanr), ("slope", scipy.stats.linregress)):
        drawn = [getattr(function(x[i], y[i]), "slope" if metric == "slope" else "statistic") for i in repeats]
        assert found[metric].interval == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=1e-9), metric


def test_a_constant_request_has_no_correlation(caplog: pytest.LogCaptureFixture) -> None:
    found: dict[str, Any] = correlations("v", np.full(9, 0.1), np.arange(9.0), 0)
    assert all(np.isnan(found[s].value) and found[s].interval is None for s in ("pearson", "slope"))
    assert "every volume has the same v" in caplog.text
    measured: dict[str, Any] = correlations("v", np.arange(9.0), np.full(9, 0.1), 0)
    assert np.isnan(measured["spearman"].value) and measured["slope"].value == pytest.approx(0.0, abs=1e-12)
    assert "the same v was found in every volume" in caplog.text


def by_quantity(result: Result) -> dict[tuple[str, str], float]:
    """The figures by quantity and metric."""
    return {(row.quantity, row.metric): row.found.value for row in result.rows}


def test_samples_and_label_maps(tmp_path: Path, conditions: Conditions) -> None:
    requested = [(10.0 * n, 400.0 - 20.0 * n) for n in range(1, 7)]
    folder = samples(tmp_path / "samples", requested)
    for index in range(6):
        array = labels(5 * (index + 1), 300 + index, (44, 17))
        save(tmp_path / "labels" / f"sample_seed-1_{index:06d}_synthseg.nii.gz", array, spacing=2.0)
    result = Volumetry(without_features(folder), Segmentations(tmp_path / "labels"), conditions).compute()
    found = by_quantity(result)
    assert found["ventricular_vol", "pearson"] == pytest.approx(1.0)
    assert found["ventricular_vol", "slope"] == pytest.approx(5 * 8 / 10)
    assert found["brain_vol", "spearman"] == pytest.approx(-1.0)
    assert result.table[2]["ventricular_vol_requested_mm3"] == pytest.approx(30.0)
    assert result.table[2]["ventricular_vol_measured_mm3"] == 15 * 8.0
    assert result.picture is not None and len(result.picture.axes) == 2


def test_prepared_data_and_a_synthseg_table(tmp_path: Path, conditions: Conditions) -> None:
    rows, table = ["participant_id\tpath\tventricular_vol\tbrain_vol_mm3"], [SYNTHSEG]
    for n in range(4):
        save(tmp_path / "data" / "anat" / f"sub-{n}.nii.gz", np.zeros((4, 4, 4), np.float32))
        rows.append(f"{n}\tanat/sub-{n}.nii.gz\t{n / 10}\t{1e6 + n}")
        table.append(f"sub-{n},99,{5 + n},1,{n},1,1,1,1,1,1,1,1,1,1")
    (tmp_path / "data" / "participants.tsv").write_text("\n".join(rows))
    (tmp_path / "vol.csv").write_text("\n".join(table))
    folder = VolumeFolder(tmp_path / "data", "synthetic_dir")
    result = Volumetry(without_features(folder), Segmentations(tmp_path / "vol.csv"), conditions).compute()
    assert result.table[1]["ventricular_vol_requested_mm3"] == pytest.approx(6995.68 + 0.1 * (171375.0 - 6995.68))
    assert by_quantity(result)["brain_vol", "pearson"] == pytest.approx(1.0)
    assert result.table[1]["brain_vol_measured_mm3"] == pytest.approx(normalised_brain(9.0, 99.0))
    assert result.facts["brain_vol"] == "normalised"


@pytest.mark.parametrize("wrong", ["zeros", "huge", "no skull"])
def test_volumes_of_no_head_are_said_and_not_counted(
    wrong: str, tmp_path: Path, conditions: Conditions, caplog: pytest.LogCaptureFixture
) -> None:
    """As a value of a table is refused that no person has; here the others are still compared."""
    folder = samples(tmp_path / "samples", [(20000.0 + n, 1.2e6 + n) for n in range(4)])
    cells = {n: ["1500000", f"{1e6 + n}", "1", f"{20000 + n}"] for n in range(4)}
    bad = {"zeros": ["0"] * 4, "huge": ["3e9", "2e9", "1", "1e9"], "no skull": ["900000", "1e6", "1", "2e4"]}
    cells[2] = bad[wrong]
    lines = [",".join([f"sample_seed-1_{n:06d}", *row, *"0000000000"]) for n, row in cells.items()]
    (tmp_path / "vol.csv").write_text("\n".join([SYNTHSEG, *lines]))
    limits = {"ventricular_vol_mm3": [1000, 500000], "brain_vol_mm3": [300000, 2500000]}
    segmentations = Segmentations(tmp_path / "vol.csv")
    result = Volumetry(without_features(folder), segmentations, conditions, plausible=limits).compute()
    assert result.table[2]["brain_vol_measured_mm3"] is None and "sample_seed-1_000002" in caplog.text
    assert result.facts["impossible brain_vol"] == 1 and by_quantity(result)["brain_vol", "pearson"] > 0.999


def test_what_was_asked_for_must_be_known(tmp_path: Path, conditions: Conditions) -> None:
    folder = samples(tmp_path / "samples", [(1.0, 2.0)] * 3)
    for path in (tmp_path / "samples").glob("*.nii.gz"):
        save(tmp_path / "labels" / path.name, labels(3, 4))
    segmentations = Segmentations(tmp_path / "labels")
    sidecar = tmp_path / "samples" / "sample_seed-1_000001.json"
    for content, message in (
        ("{}", "does not state the conditions"),
        ('{"conditions": [0.5, 0.5]}', "does not state the conditions"),
        ('{"conditions": "rest"}', "does not state the conditions"),
        ('{"conditions": {"ventricular_vol": 0.5}}', "has no value of brain_vol_mm3"),
        ('{"conditions": {"ventricular_vol": "x", "brain_vol": 1}}', "finite number"),
    ):
        sidecar.write_text(content)
        with pytest.raises(BundleError, match=message):
            Volumetry(without_features(folder), segmentations, conditions).compute()
    sidecar.unlink()
    with pytest.raises(BundleError, match="no sample_seed-1_000001.json and no row in participants.tsv"):
        Volumetry(without_features(folder), segmentations, conditions).compute()


def test_two_volumes_are_too_few(tmp_path: Path, conditions: Conditions) -> None:
    folder = samples(tmp_path / "samples", [(1.0, 2.0)] * 2)
    for path in (tmp_path / "samples").glob("*.nii.gz"):
        save(tmp_path / "labels" / path.name, labels(3, 4))
    with pytest.raises(BundleError, match="2 volumes are too few"):
        Volumetry(without_features(folder), Segmentations(tmp_path / "labels"), conditions).compute()


def test_segmentations_that_are_not_there_are_refused(tmp_path: Path) -> None:
    assert not Segmentations(None).requested
    with pytest.raises(BundleError, match="--segmentations: there is no folder of label maps and no table .*gone"):
        Segmentations(tmp_path / "gone")
