# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What leaves the bundle says that it is synthetic and where it comes from."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import BASE, SMALLEST, TINY, RunHere
from PIL import Image

from scripts.compute.provenance import DESCRIPTION_BYTES, bundle_version, header_text
from scripts.core.tables import read_table
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.nifti import mid_planes, plane_tiles
from scripts.volumes.pictures import captioned_planes

CONDITIONS = {"age": 0.7, "sex": "male"}
VALIDATOR = shutil.which("bids-validator-deno")


@pytest.fixture(scope="module")
def sampled(run_here: RunHere, bundle_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Samples two heads, into a folder of its own for each layout, and again into the same."""
    root = tmp_path_factory.mktemp("labelled")

    def run(layout: str, **flags: Any) -> Path:
        given: Mapping[str, Any] = {
            "num_samples": 2,
            "num_inference_steps": 1,
            "seed": 3,
            **CONDITIONS,
            **SMALLEST,
            **flags,
        }
        run_here([BASE, TINY], bundle_root=str(bundle_copy), output_dir=str(root / layout), layout=layout, **given)
        return root / layout

    return run


@pytest.mark.parametrize("layout", ["flat", "bids"])
def test_samples_say_that_they_are_synthetic(layout: str, sampled: Callable[..., Path]) -> None:
    folder = sampled(layout)
    volumes = sorted(folder.rglob("*.nii.gz"))
    assert len(volumes) == 2
    for volume in volumes:
        header: Any = nib.load(volume).header
        text = bytes(header["descrip"].item()).decode()
        assert "synthetic" in text and bundle_version() in text
        sidecar = json.loads(volume.with_name(volume.name.replace(".nii.gz", ".json")).read_text())
        assert sidecar["synthetic"] is True and sidecar["schema_version"] == 2
        assert sidecar["bundle"]["version"] == bundle_version()
        assert sidecar["weights"]["diffusion"]["sha256"][:8] in text


def test_a_folder_of_samples_is_a_derivative(sampled: Callable[..., Path]) -> None:
    folder = sampled("bids")
    described = json.loads((folder / "dataset_description.json").read_text())
    assert described["DatasetType"] == "derivative" and described["GeneratedBy"][0]["Version"] == bundle_version()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}
    sampled("bids", num_samples=3)
    rows = read_table(folder / "participants.tsv", ["participant_id", "path", "sex", "age_years"])
    assert len(rows) == 3 and len(VolumeFolder(folder, "synthetic_dir").paths) == 3
    assert all((folder / row["path"]).is_file() and (folder / row["participant_id"]).is_dir() for row in rows)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}.items()


@pytest.mark.slow
@pytest.mark.skipif(VALIDATOR is None, reason="needs bids-validator-deno")
def test_the_validator_has_no_errors(sampled: Callable[..., Path]) -> None:
    done = subprocess.run([str(VALIDATOR), str(sampled("bids"))], capture_output=True, text=True)
    assert done.returncode == 0 and "[ERROR]" not in done.stdout + done.stderr


@pytest.mark.parametrize("model", ["", "gan " + "é" * 200])
def test_header_has_room_for_what_it_says(model: str) -> None:
    assert len(header_text(model).encode()) <= DESCRIPTION_BYTES


def test_planes_have_one_scale() -> None:
    """A cube of 8 voxels is as wide as it is high, and as large in each plane."""
    volume = np.zeros((20, 28, 20), np.float32)
    volume[6:14, 10:18, 6:14] = 1.0
    sides = [(int((tile > 127).any(1).sum()), int((tile > 127).any(0).sum())) for tile in plane_tiles(volume, 112)]
    assert {side for pair in sides for side in pair} == {32}
    assert mid_planes(volume, 112).shape == (112, 4 * (28 + 20 + 20))


def test_a_picture_marks_sides_and_has_a_caption(sampled: Callable[..., Path], tmp_path: Path) -> None:
    black = np.zeros((16, 32, 16), np.float32)
    sagittal, coronal, axial = (tile.shape[1] for tile in plane_tiles(black, 256))
    picture = captioned_planes(black, ["sex female " * 40, "synthetic"])
    assert picture[256:].any() and not picture[:256, :sagittal].any()
    for left, width in ((sagittal, coronal), (sagittal + coronal, axial)):
        assert picture[:256, left : left + width // 3].any() and picture[:256, left + 2 * width // 3 :].any()
    for path in sampled("flat").glob("*.png"):
        with Image.open(path) as image:
            assert image.height > 256
