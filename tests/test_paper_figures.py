# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Figures of the paper: which samples they ask for, and what is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import BASE, TINY, RunHere
from heads import refused, write_dataset
from PIL import Image
from released import configuration

from scripts.conditions.conditions import Conditions
from scripts.sampling.paper_figures import _label, grid_figure
from scripts.volumes.nifti import read_volume

FIGURES, SIDE = "configs/figures.yaml", "configs/side_by_side.yaml"
ROWS: list[dict[str, float]] = [{"ventricular_vol": -0.5}, {"ventricular_vol_mm3": 89185.34}]
COLUMNS: list[dict[str, float]] = [{"age_years": 63}, {"age": 1.5, "brain_vol": 0.0}]


@pytest.fixture(scope="module")
def figure(bundle_copy: Path, tmp_path_factory: pytest.TempPathFactory, run_here: RunHere) -> Path:
    """A figure of four samples. Tests must not change it."""
    folder = tmp_path_factory.mktemp("figures") / "grid"
    run_here([BASE, FIGURES, TINY], **flags(bundle_copy, folder))
    return folder


def flags(bundle: Path, folder: Path, **more: Any) -> dict[str, Any]:
    common = {"bundle_root": str(bundle), "output_dir": str(folder), "num_inference_steps": 2, "sex": "male"}
    return {**common, "rows": ROWS, "columns": COLUMNS, **more}


def sidecar(folder: Path, index: int) -> dict[str, Any]:
    return json.loads((folder / f"sample_seed-0_{index:06d}.json").read_text())


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def test_cells_are_rows_times_columns(figure: Path) -> None:
    stated = [sidecar(figure, index)["conditions"] for index in range(4)]
    assert not (figure / "sample_seed-0_000004.json").exists()
    assert [c["ventricular_vol"] for c in stated] == pytest.approx([-0.5, -0.5, 0.5, 0.5], abs=1e-5)
    assert [c["age"] for c in stated] == pytest.approx([0.5, 1.5, 0.5, 1.5])
    assert [c["brain_vol"] for c in stated] == pytest.approx([0.5, 0.0, 0.5, 0.0])
    assert {c["gender"] for c in stated} == {1.0}
    assert sidecar(figure, 3)["noise_of_index"] == 0


def test_picture_has_four_cells(figure: Path) -> None:
    picture = pixels(figure / "volumes.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 900
    assert picture.std() > 10 and np.ptp(picture) == 255


def test_cells_share_their_noise(bundle_copy: Path, run_here: RunHere, tmp_path: Path) -> None:
    """Cells of equal conditions are equal volumes."""
    same = flags(bundle_copy, tmp_path, rows=[{}], columns=[{"age": 0.3}, {"age": 0.3}])
    run_here([BASE, FIGURES, TINY], **same)
    a, b = ((tmp_path / f"sample_seed-0_{index:06d}.png").read_bytes() for index in range(2))
    assert a == b


def test_samples_that_are_there_are_kept(figure: Path, bundle_copy: Path, run_here: RunHere) -> None:
    (figure / "volumes.png").unlink()
    before = (figure / "sample_seed-0_000000.nii.gz").stat().st_mtime_ns
    run_here([BASE, FIGURES, TINY], **flags(bundle_copy, figure))
    assert (figure / "sample_seed-0_000000.nii.gz").stat().st_mtime_ns == before
    assert (figure / "volumes.png").is_file()


def test_figures_of_the_paper(bundle_copy: Path, tmp_path: Path) -> None:
    from monai.bundle import ConfigParser

    parser = ConfigParser(ConfigParser.load_config_file(f"{bundle_copy}/{FIGURES}"))
    figures = parser.get_parsed_content("figures")
    assert len(figures["volumes"]["rows"]) * len(figures["volumes"]["columns"]) == 25
    cells = figures["extrapolation"]["columns"]
    assert cells == [{"ventricular_vol": -0.5}, {"ventricular_vol": 1.5}, {"ventricular_vol": 1.9}, {"brain_vol": -0.5}]


def test_labels_have_units_or_words(conditions: Conditions) -> None:
    cell = {"sex": "f", "age": 0.5, "brain_vol_mm3": 1144240, "gender": 0.25}
    labels = [_label({name: value}, conditions, "rows") for name, value in cell.items()]
    expected = ["gender\nfemale (0)", "age\n63 years (0.5)", "brain_vol\n1144 mL (0)", "gender\n0.25 (0.25)"]
    assert labels == expected


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"rows": [{"ventricle": 1.0}]}, "--rows: there is no condition 'ventricle'; there are gender, sex, age"),
        ({"columns": [{"age": "old"}]}, "--age in --columns must be a finite number, got 'old'"),
        ({"columns": 3}, "--columns must be a list such as"),
        ({"rows": []}, "--rows must be a list such as"),
        ({"figure": "violin", "rows": None}, "--figure: there is no 'violin'; there are volumes, extrapolation"),
        ({"rows": [{"age": 0.5}]}, "--rows and --columns state age twice in one cell (age, age_years)"),
        ({"rows": [{"age": 0.5, "age_years": 50}], "columns": [{}]}, "twice in one cell (age, age_years)"),
        ({"num_samples": 2}, "--num_samples does not go with a figure"),
        ({"figure": "../volumes"}, "--figure: '../volumes' cannot be the name of a picture"),
        ({"figure": "sample_seed-0_000000"}, "cannot be the name of a picture"),
        ({"figure": ["volumes"], "rows": None}, "--figure must be one word"),
        ({"figures::volumes::row": [{}], "rows": None}, "map of rows and columns, each a list of cells; it has rows,"),
        ({"figure": "mine", "figures::mine": 3, "rows": None}, "--figures::mine must be a map of rows and columns"),
        ({"age_years": 70}, "--age_years has no effect: all --columns state age; leave it out"),
    ],
)
def test_wrong_cells(
    wrong: dict[str, Any], expected: str, bundle_copy: Path, run_here: RunHere, tmp_path: Path
) -> None:
    given = {name: value for name, value in flags(bundle_copy, tmp_path, **wrong).items() if value is not None}
    assert expected in refused(run_here, [BASE, FIGURES, TINY], **given)


def test_values_outside_the_training_range_are_told(
    bundle_copy: Path, run_here: RunHere, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_here([BASE, FIGURES, TINY], **flags(bundle_copy, tmp_path, rows=[{}], columns=[{"age": 2.5}, {"age": 0.5}]))
    told = [text for text in caplog.messages if "outside the training range" in text]
    assert len(told) == 1 and told[0].startswith("--age 2.5 in --columns is outside the training range (44 to 82 years")


def test_damaged_samples_of_an_earlier_run_are_told(bundle_copy: Path, run_here: RunHere, tmp_path: Path) -> None:
    given = flags(bundle_copy, tmp_path, rows=[{}], columns=[{"age": 0.3}])
    run_here([BASE, FIGURES, TINY], **given)
    volume, sidecar = (tmp_path / f"sample_seed-0_000000.{ending}" for ending in ("nii.gz", "json"))
    volume.write_bytes(volume.read_bytes()[:-500])
    run_here([BASE, FIGURES, TINY], **given)
    assert len(read_volume(volume)) > 0, "a damaged volume is sampled again"
    for text in ("[", "[1]"):
        sidecar.write_text(text)
        assert str(sidecar) in refused(run_here, [BASE, FIGURES, TINY], **given)
    sidecar.unlink()
    run_here([BASE, FIGURES, TINY], **given)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == sorted(
        ["volumes.png", volume.name, sidecar.name, "sample_seed-0_000000.png"]
    )


def test_models_side_by_side(run_here: RunHere, tmp_path: Path) -> None:
    grid = configuration().get_parsed_content("grid")
    folders = {name: str(write_dataset(tmp_path / name, grid)) for name in ("LDM", "real")}
    run_here([BASE, SIDE, TINY], models=folders, count=2, output_dir=str(tmp_path / "figures"))
    picture = pixels(tmp_path / "figures" / "models.png")
    assert picture.std() > 10 and picture.shape[1] > picture.shape[0]
    wrong = {"models": folders, "count": 9, "output_dir": str(tmp_path / "figures")}
    assert "--models: LDM has 4 volumes" in refused(run_here, [BASE, SIDE, TINY], **wrong)
    assert "--models must map names to folders" in refused(run_here, [BASE, SIDE, TINY])
    missing = {**wrong, "models": {"LDM": str(tmp_path / "none")}}
    assert "there is no folder" in refused(run_here, [BASE, SIDE, TINY], **missing)
    for none in (None, [folders["real"]]):
        wrong = {**wrong, "models": {"LDM": none}}
        assert "--models: LDM must have one folder, got" in refused(run_here, [BASE, SIDE, TINY], **wrong)


def test_names_are_no_formulae_and_a_folder_given_twice_is_told(
    run_here: RunHere, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(write_dataset(tmp_path / "real", configuration().get_parsed_content("grid")))
    names = {r"<b>$\frac$": folder, "again": folder}
    run_here([BASE, SIDE, TINY], models=names, count=1, output_dir=str(tmp_path / "out"))
    assert (tmp_path / "out" / "models.png").is_file()
    assert [text for text in caplog.messages if r"<b>$\frac$ and again are one folder" in text]
    assert not [text for text in caplog.messages if "axes in another order" in text]


def test_models_whose_axes_run_elsewhere_are_turned_and_told(
    run_here: RunHere, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    volume = np.random.default_rng(1).random((16, 18, 20), np.float32)
    for name, data, side in (("to the left", volume, -1.0), ("to the right", volume[::-1], 1.0)):
        (tmp_path / name).mkdir()
        nib.save(nib.Nifti1Image(data, np.diag([side, 1.0, 1.0, 1.0])), tmp_path / name / "x.nii")
        models = {"model": str(tmp_path / name)}
        assert "axes in another order" not in caplog.text
        run_here([BASE, SIDE, TINY], models=models, count=1, output_dir=str(tmp_path / f"{name} out"))
    assert "1 of 1 volumes of --models have axes in another order" in caplog.text
    assert f"{tmp_path / 'to the right' / 'x.nii'} the first: they are turned" in caplog.text
    drawn, turned = (pixels(tmp_path / f"{name} out" / "models.png") for name in ("to the left", "to the right"))
    assert drawn.std() > 10 and np.array_equal(drawn, turned)


def test_size_follows_the_number_of_cells() -> None:
    strip = np.full((192, 600), 100, np.uint8)
    small = grid_figure([[strip]], ["a"], ["b"]).get_size_inches()
    large = grid_figure([[strip] * 3] * 2, ["a", "a"], ["b"] * 3).get_size_inches()
    assert large[0] > 2 * small[0] and large[1] > 1.5 * small[1]
    assert grid_figure([[strip]], ["a" * 60], ["b"]).get_size_inches()[0] > small[0] + 2, "names take no pictures' room"
