# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Running segmentation tools, with scripts in their place."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, RunHere
from heads import refused

from scripts.compute.kept import Values
from scripts.conditions.conditions import Conditions
from scripts.evaluation.metrics.features import FeatureNetworks
from scripts.evaluation.samples import Samples
from scripts.evaluation.segmentations import OwnSegmentations, Segmentations, SegmentedNow, chosen_segmentations
from scripts.measuring.tools import Samseg, SynthSeg
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.head_size import normalised_brain

SYNTHSEG = """#!/usr/bin/env python3
import sys, pathlib
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
output = pathlib.Path(options["--o"])
lines = ["subject,left lateral ventricle,left inferior lateral ventricle,right lateral ventricle,"
         "right inferior lateral ventricle,left cerebral cortex,csf"]
for path in sorted(pathlib.Path(options["--i"]).iterdir()):
    stem = path.name.removesuffix(".nii.gz")
    (output / f"{stem}_synthseg.nii.gz").write_bytes(path.read_bytes())
    lines.append(f"{stem},{10000 * int(stem[-1]) + 1},1,2,3,1000000,300000")
pathlib.Path(options["--vol"]).write_text("\\n".join(lines) + "\\n")
(output / "runs").open("a").write("run\\n")
"""
SAMSEG = """#!/usr/bin/env python3
import os, sys, pathlib, shutil
assert "PYTHONPATH" not in os.environ
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
source = pathlib.Path(options["--input"])
if source.name.endswith(os.environ.get("STUB_FAILS", "nothing")):
    print("working")
    print("no memory", file=sys.stderr)
    sys.exit(3)
shutil.copy(source.with_name(source.name.removesuffix(".nii.gz") + ".codes"), options["--output"] + "/seg.mgz")
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


VOXELS = np.diag([20.0, 20.0, 20.0, 1.0])


def codes(number: int) -> np.ndarray:
    array = np.zeros((10, 10, 10), np.int16)
    array.flat[: 10 * number] = 4
    array.flat[500:700] = 3
    return array


@pytest.fixture
def folder(tmp_path: Path) -> VolumeFolder:
    """Four samples, which are their own label maps: in NIfTI for one stub, in MGH for the other."""
    samples = tmp_path / "samples"
    samples.mkdir()
    for number in range(1, 5):
        for ending, kind in (("nii.gz", nib.Nifti1Image), ("mgz", nib.MGHImage)):
            nib.save(kind(codes(number), VOXELS), samples / f"sample_{number}.{ending}")
        (samples / f"sample_{number}.mgz").rename(samples / f"sample_{number}.codes")
        stated = {"ventricular_vol_mm3": 9 * number, "brain_vol_mm3": 190 + number}
        (samples / f"sample_{number}.json").write_text(json.dumps({"conditions": stated}))
    return VolumeFolder(samples, "synthetic_dir")


def test_synthseg_runs_once_for_all_volumes(folder: VolumeFolder, tmp_path: Path) -> None:
    output = tmp_path / "labels"
    command = str(program(tmp_path / "bin" / "mri_synthseg", SYNTHSEG))
    found = SegmentedNow(SynthSeg(command), folder, output).measured()
    assert found["sample_3"] == {"ventricular_vol": 30007.0, "brain_vol": pytest.approx(normalised_brain(1e6, 1330007))}
    again = SegmentedNow(SynthSeg(command), folder, output).measured()
    assert again == found and (output / "runs").read_text() == "run\n"
    assert not list(output.glob(".volumes-*"))


def test_interrupted_synthseg_segments_what_is_left(folder: VolumeFolder, tmp_path: Path) -> None:
    output = tmp_path / "labels"
    runner = SegmentedNow(SynthSeg(str(program(tmp_path / "mri_synthseg", SYNTHSEG))), folder, output)
    runner.prepare()
    (output / "sample_1_synthseg.nii.gz").unlink()
    damaged = output / "sample_2_synthseg.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:100])
    found = runner.measured()
    assert len((output / "synthseg_volumes.csv").read_text().splitlines()) == 3, "the second run had two volumes"
    assert found["sample_4"] == {"ventricular_vol": 40 * 8000.0, "brain_vol": 200 * 8000.0}, "from the label maps"


def test_samseg_goes_on_after_a_failure(folder: VolumeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "labels"
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("STUB_FAILS", "3.nii.gz")
    runner = SegmentedNow(Samseg(str(program(tmp_path / "run_samseg", SAMSEG))), folder, output)
    assert "samseg failed with exit status 3: no memory. All of it:" in refused(runner.measured)
    first = output / "sample_1_samseg.nii.gz"
    written = first.stat().st_mtime_ns
    monkeypatch.delenv("STUB_FAILS")
    assert runner.measured()["sample_3"] == {"ventricular_vol": 30 * 8000.0, "brain_vol": 200 * 8000.0}
    assert first.stat().st_mtime_ns == written, "what was segmented stays"
    assert np.array_equal(np.asanyarray(nib.load(first).dataobj), codes(1))
    later = time.time() + 60
    os.utime(folder.paths[0], (later, later))
    runner.prepare()
    assert first.stat().st_mtime_ns != written, "its volume is newer"


@pytest.mark.parametrize(
    ("segmenter", "expected"),
    [
        (SynthSeg("mri_synthseg-is-not-here"), "install FreeSurfer 7.4 or later"),
        (Samseg("run_samseg-is-not-here"), "`make samseg` installs it"),
    ],
)
def test_missing_programs(segmenter: Any, expected: str, folder: VolumeFolder, tmp_path: Path) -> None:
    line = refused(SegmentedNow(segmenter, folder, tmp_path / "labels").prepare)
    assert "there is no program" in line and expected in line


def test_choice_of_segmentations(folder: VolumeFolder, tmp_path: Path) -> None:
    tools = {"synthseg": SynthSeg("mri_synthseg"), "samseg": Samseg("run_samseg")}
    output = str(tmp_path / "labels")

    def samples(*folders: Path | None) -> Samples:
        return Samples(list(map(str, folders)), FeatureNetworks(None, {}), output, Values(output))

    def segmentations(path: Any, way: Any, tools: Any, samples: Samples, output: str) -> Segmentations:
        own = OwnSegmentations(lambda: pytest.fail("nothing is measured yet"), Values(output), Conditions())
        return chosen_segmentations(path, way, tools, samples, output, own)

    other = Path(shutil.copytree(folder.paths[0].parent, tmp_path / "other"))
    one, two = samples(folder.folder), samples(folder.folder, other)
    assert type(segmentations(None, None, tools, one, output)) is Segmentations
    assert segmentations(None, "samseg", tools, one, output).requested
    assert "give one of them" in refused(segmentations, tmp_path, "samseg", tools, one, output)
    assert "there are own, synthseg, samseg" in refused(segmentations, None, "fast", tools, one, output)
    both = segmentations(None, "samseg", tools, two, output)
    assert [both.of(f.folder).path for f in two.sets.values()] == [tmp_path / "labels" / name for name in two.sets]
    for given in (str(folder.paths[0]), {"samples": tmp_path / "samples"}, f"{tmp_path},{tmp_path},{tmp_path}"):
        assert "one for each model: samples, other" in refused(segmentations, given, None, tools, two, output)
    inside = str(tmp_path / "samples" / "labels")
    assert "would be taken for volumes" in refused(segmentations, None, "samseg", tools, one, inside)


def test_evaluation_segments_and_correlates(
    folder: VolumeFolder, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin" / "mri_synthseg", SYNTHSEG)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    flags: dict[str, Any] = {
        "synthetic_dir": str(folder.folder),
        "segment_with": "synthseg",
        "output_dir": str(tmp_path / "report"),
    }
    flags |= {"num_pairs": 1, "pair_metrics": {}}
    run_here([ROOT / "configs/inference.json", "configs/evaluate.yaml"], **flags)
    evaluation = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    report = evaluation["measures"]["volumetry"]
    found = {(row["quantity"], row["metric"]): row["value"] for row in evaluation["rows"]}
    assert found["ventricular_vol", "pearson"] == pytest.approx(1.0)
    assert report["segmentations"] == str(tmp_path / "report" / "segmentations")


def test_evaluation_of_several_models(folder: VolumeFolder, tmp_path: Path, run_here: RunHere) -> None:
    """One model does as it was asked, the other the opposite; their samples and label maps have the same names."""
    contrary = tmp_path / "contrary"
    shutil.copytree(folder.paths[0].parent, contrary)
    for number in range(1, 5):
        asked = {"ventricular_vol_mm3": 50 - 9 * number, "brain_vol_mm3": 190}
        (contrary / f"sample_{number}.json").write_text(json.dumps({"conditions": asked}))
        for model in ("obedient", "contrary"):
            (tmp_path / "maps" / model).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder.paths[number - 1], tmp_path / "maps" / model)
    flags: dict[str, Any] = {
        "synthetic_dir": {"obedient": str(folder.folder), "contrary": str(contrary)},
        "segmentations": str(tmp_path / "maps"),
        "output_dir": str(tmp_path / "report"),
        "num_pairs": 1,
        "pair_metrics": {},
    }
    run_here([ROOT / "configs/inference.json", "configs/evaluate.yaml"], **flags)
    report = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    expected = {"obedient": 1.0, "contrary": -1.0}
    rows = {row["model"]: row for row in report["table_1"]}
    assert list(rows) == list(expected)
    for model, r in expected.items():
        assert rows[model]["Pearson's r of ventricular volume"] == pytest.approx(r) and rows[model]["volumes"] == 4
        assert (tmp_path / "report" / f"volumetry_{model}.png").is_file()
