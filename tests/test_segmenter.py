# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The segmenter that ships: what it measures in known heads, what it refuses; and that its training learns and goes on.

The heads are the label maps of models/heads, each label in one grey level, so that volumes are known by counting.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE, ROOT, TINY, RunHere
from heads import refused
from PIL import Image
from safetensors.torch import save_file
from scipy import ndimage
from synthetic_head import GRID, synthetic_image, synthetic_labels
from trained import content, difference

from scripts.compute.kept import Values
from scripts.conditions.conditions import Conditions
from scripts.core.files import file_hash
from scripts.core.tables import read_table, write_table
from scripts.evaluation.segmentations import OwnSegmentations
from scripts.measuring.outlines import COLOURS
from scripts.measuring.segmenter import (
    CLASSES,
    COLUMNS,
    SHIPPED,
    Segmenter,
    brain_volumes,
    load_segmenter,
    network_of,
    shipped_segmenter,
    working_shape,
)
from scripts.measuring.segmenter_training import random_contrast, targets_of, volume_error
from scripts.phantoms.heads import count_volumes
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.grid import Grid
from scripts.volumes.head_size import normalised_brain, reference_intracranial_mm3
from scripts.volumes.labels import LABELS
from scripts.volumes.nifti import read_volume, write_labels, write_volume

TRAIN, SEGMENT, EVALUATE = (f"configs/{name}.yaml" for name in ("train_segmenter", "segment", "evaluate"))
FULL = Grid((160, 224, 160), (-1.0, 1.0, 1.0), (80.48149872, -125.47715759, -60.55375671))
T1W = np.array([0.02, 0.35, 0.12, 0.5, 0.75, 0.12, 0.12, 0.12], np.float32)
INVERTED = np.array([0.02, 0.4, 0.9, 0.6, 0.35, 0.9, 0.9, 0.9], np.float32)
FACTS: dict[str, Any] = {
    "network": "segmenter",
    "classes": list(CLASSES),
    "features": [8, 16, 16],
    "spacing": 2.0,
    "orientation": [-1, 1, 1],
    "percentiles": [0.5, 99.5],
}


shipped = pytest.mark.skipif(not SHIPPED.is_file(), reason="no weights are shipped")


@cache
def head_labels() -> np.ndarray:
    return read_volume(ROOT / "models" / "heads" / "sub-CSI1_dseg.nii.gz", FULL.shape).astype(np.uint8)


def image_of(labels: np.ndarray, levels: np.ndarray = T1W) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0.0, 0.02, labels.shape).astype(np.float32)
    return np.clip(ndimage.gaussian_filter(levels[labels], 0.6) + noise, 0.0, 1.0)


@cache
def measured(case: str) -> tuple[dict[str, float], dict[str, float]]:
    """What is found in a head and what is true, in mm3."""
    labels = head_labels().copy()
    if case == "wide":
        near = ndimage.distance_transform_edt(labels != LABELS["lateral_ventricles"]) <= 4.0
        labels[near & np.isin(labels, (LABELS["grey"], LABELS["white"]))] = LABELS["lateral_ventricles"]
    found = brain_volumes(image_of(labels, INVERTED if case == "inverted" else T1W), FULL)
    true = count_volumes(torch.from_numpy(labels), FULL)
    brain = normalised_brain(true.brain, true.intracranial)
    return found, dict(zip(COLUMNS, (true.ventricles, brain, true.brain, true.intracranial, true.grey, true.white)))


@shipped
@pytest.mark.parametrize("case", ["usual", "wide"])
def test_volumes_of_a_made_up_contrast_are_those_of_a_head(case: str) -> None:
    """One grey level for each tissue is far from what the network has seen: its volumes are near, not exact."""
    found, true = measured(case)
    assert set(found) == set(COLUMNS)
    assert found["brain_mm3"] == pytest.approx(true["brain_mm3"], rel=0.15)
    assert found["intracranial_mm3"] == pytest.approx(true["intracranial_mm3"], rel=0.15)
    normal = found["brain_mm3"] / found["intracranial_mm3"] * reference_intracranial_mm3()
    assert found["brain_vol_mm3"] == pytest.approx(normal)


@shipped
def test_wider_ventricles_measure_more() -> None:
    found, true = (
        measured("wide")[i]["ventricular_vol_mm3"] - measured("usual")[i]["ventricular_vol_mm3"] for i in (0, 1)
    )
    assert true > 5000.0 and found > 0.5 * true


@shipped
def test_left_and_right_are_treated_alike() -> None:
    image = synthetic_image(synthetic_labels())
    segmenter = shipped_segmenter()
    shares, mirrored = segmenter.shares(image, GRID), segmenter.shares(np.ascontiguousarray(image[::-1]), GRID)
    assert torch.allclose(mirrored.flip(1), shares, atol=1e-4)
    assert torch.allclose(shares.sum(0), torch.ones(shares.shape[1:]), atol=1e-4)
    other_way = Grid(GRID.shape, [abs(side) for side in GRID.spacing], GRID.origin)
    assert torch.allclose(segmenter.shares(np.ascontiguousarray(image[::-1]), other_way), shares, atol=1e-4)
    labels, mirror = segmenter.labels(shares, GRID), segmenter.labels(mirrored, GRID)
    sides = {2: 41, 41: 2, 3: 42, 42: 3, 4: 43, 43: 4}
    assert labels.shape == GRID.shape and {2, 41} <= set(np.unique(labels))
    assert (np.vectorize(lambda code: sides.get(code, code))(mirror[::-1]) == labels).mean() > 0.999
    left = np.argwhere(labels == 2)[:, 0]
    assert left.min() >= GRID.shape[0] // 2, "x runs from right to left on this grid"


@shipped
def test_brightness_and_scale_of_intensities_do_not_matter() -> None:
    image = synthetic_image(synthetic_labels())
    plain, scaled = brain_volumes(image, GRID), brain_volumes(image * 0.3 + 0.1, GRID)
    assert scaled == pytest.approx(plain, rel=1e-3)


class Airy(torch.nn.Module):
    """Finds nothing but what is outside."""

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(1, len(CLASSES), *volumes.shape[2:])
        logits[:, 0] = 100.0
        return logits


def empty() -> Segmenter:
    return Segmenter(Airy(), {"spacing": 2.0})


def test_unfit_volumes_are_refused() -> None:
    image = synthetic_image(synthetic_labels())
    told = f"has shape {(1, *image[1:].shape)}, its grid {(1, *GRID.shape)}"
    assert told in refused(brain_volumes, image[1:], GRID, empty())
    image[5, 5, 5] = np.nan
    assert "holds NaN" in refused(brain_volumes, image, GRID, empty())
    assert "finds no brain" in refused(brain_volumes, np.zeros(GRID.shape, np.float32), GRID, empty())


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    assert "no weights of a segmenter at" in refused(load_segmenter, tmp_path / "gone.safetensors")
    assert "is of no segmenter (it is of the network 'autoencoder')" in refused(
        load_segmenter, ROOT / "models" / "demo" / "autoencoder.safetensors"
    )
    state = network_of(FACTS).state_dict()
    for change, message in (
        ({"classes": ["outside", "brain"]}, "is of another segmenter: its classes are"),
        ({"percentiles": [0, 100]}, "its percentiles are [0, 100]"),
        ({"network": "brain_age"}, "it is of the network 'brain_age'"),
        ({"features": [8, 24, 16]}, "is of another model"),
    ):
        save_file(state, tmp_path / "other.safetensors", {"facts": json.dumps({**FACTS, **change})})
        assert message in refused(load_segmenter, tmp_path / "other.safetensors"), change
    save_file(state, tmp_path / "own.safetensors", {"facts": json.dumps(FACTS)})
    assert load_segmenter(tmp_path / "own.safetensors").spacing == 2.0


def test_working_grid_covers_the_volume() -> None:
    assert working_shape(FULL, 2.0) == (80, 112, 80)
    assert working_shape(GRID, 2.0) == (84, 114, 84)


# Training.


def test_random_contrasts_keep_the_anatomy() -> None:
    labels = torch.from_numpy(synthetic_labels())
    shares = torch.stack([labels == LABELS[name] for name in CLASSES[1:]]).float()
    image = torch.from_numpy(synthetic_image(synthetic_labels()))[None]
    torch.manual_seed(0)
    drawn = [random_contrast(image, shares) for _ in range(8)]
    assert all(one.shape == image.shape and 0.0 <= one.min() and one.max() <= 1.0 for one in drawn)
    means = torch.tensor(
        [[float(one[0][labels == LABELS[name]].mean()) for name in ("grey", "white")] for one in drawn]
    )
    assert means.std(dim=0).min() > 0.1, "contrasts differ"
    assert 0 < int((means[:, 0] > means[:, 1]).sum()) < 8, "grey is brighter in some"
    within = [float(one[0][labels == LABELS["white"]].std()) for one in drawn]
    assert max(within) < 0.1, "a tissue keeps one level"
    targets = targets_of(shares[None])
    assert torch.allclose(targets.sum(1), torch.ones(1, *GRID.shape)) and torch.equal(targets[:, 1:], shares[None])


def phantoms(folder: Path) -> Path:
    """Four small heads with label maps, the last held out."""
    rows = []
    for index, swell in enumerate((1.0, 0.95, 0.9, 0.97)):
        labels = synthetic_labels(swell=swell)
        image, label_map = f"sub-{index}_T1w.nii.gz", f"sub-{index}_dseg.nii.gz"
        folder.mkdir(exist_ok=True)
        write_volume(folder / image, synthetic_image(labels), GRID)
        write_labels(folder / label_map, labels, GRID)
        split = "validation" if index == 3 else "train"
        rows.append({"participant_id": f"sub-{index}", "path": image, "labels": label_map, "split": split})
    write_table(folder / "participants.tsv", rows)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms(tmp_path_factory.mktemp("phantoms") / "dataset")


def test_volume_error_is_the_mean_relative_one() -> None:
    labels = torch.zeros((1, 8, 8, 8), dtype=torch.long)
    labels[0, :4], labels[0, 4:6, :4] = CLASSES.index("grey"), CLASSES.index("lateral_ventricles")
    true = torch.nn.functional.one_hot(labels, len(CLASSES)).movedim(-1, 1).float()
    assert volume_error(true, true) == 0.0
    found = true.clone()
    found[:, CLASSES.index("lateral_ventricles")] *= 1.1
    found[:, CLASSES.index("grey")] *= 0.8
    inside = (0.8 * 256 + 1.1 * 64) / (256 + 64)
    expected = (abs(np.log(1.1)) + abs(np.log(0.8)) + abs(np.log(inside))) / 3.0
    assert volume_error(found, true).item() == pytest.approx(expected, rel=1e-5)
    without = true.clone()
    without[:, CLASSES.index("lateral_ventricles")] = 0.0
    assert volume_error(found, without).isfinite(), "a head without ventricles"


def test_resumed_training_ends_in_the_same_weights(dataset: Path, tmp_path: Path, run_here: RunHere) -> None:
    common: dict[str, Any] = {"dataset_dir": str(dataset), "seed": 1, "epoch_length": 6, "max_epochs": 2}
    common |= {"checkpoint_every": 3, "keep_checkpoints": 9, "lr_warm_up": 2, "lr": 1e-2, "validate_every": 1}
    run_here([BASE, TRAIN, TINY], run_dir=str(tmp_path / "whole"), **common)
    run_here([BASE, TRAIN, TINY], run_dir=str(tmp_path / "parts"), **common)
    for path in (tmp_path / "parts").glob("*.pt"):
        if path.name != "checkpoint_iteration=3.pt":
            path.unlink()
    run_here([BASE, TRAIN, TINY], run_dir=str(tmp_path / "parts"), **common)
    whole, parts = (content(tmp_path / name / "checkpoint_iteration=12.pt") for name in ("whole", "parts"))
    for name in ("segmenter", "optimisation", "trainer"):
        assert difference(whole[name], parts[name]) == 0.0, name
    assert whole["facts"] == parts["facts"]
    rows = read_table(tmp_path / "whole" / "validation.tsv")
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    assert {"val_own_ventricles_bias", "val_random_brain_sd"} <= rows[0].keys()
    assert load_segmenter(tmp_path / "whole" / "segmenter.pt").spacing == 5.0


def test_training_needs_label_maps(dataset: Path, tmp_path: Path, run_here: RunHere) -> None:
    rows = read_table(dataset / "participants.tsv")
    other = phantoms(tmp_path / "other")
    write_table(other / "participants.tsv", [{k: v for k, v in row.items() if k != "labels"} for row in rows])
    flags = {"dataset_dir": str(other), "run_dir": str(tmp_path / "run")}
    assert "participant sub-0 in" in refused(run_here, [BASE, TRAIN, TINY], **flags)
    write_table(other / "participants.tsv", rows)
    write_labels(other / "sub-0_dseg.nii.gz", synthetic_labels() * 30, GRID)
    assert "holds other labels than those of phantoms" in refused(
        run_here, [BASE, TRAIN, TINY], **{**flags, "batch_size": 3, "validate_every": 0}
    )


# The verbs, with a small network of random weights.


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "segmenter.safetensors"
    facts = {**FACTS, "spacing": 6.0}
    torch.manual_seed(0)
    save_file(network_of(facts).state_dict(), path, {"facts": json.dumps(facts)})
    return path


def test_segmenting_a_folder_goes_on_where_it_was(
    dataset: Path, weights: Path, tmp_path: Path, run_here: RunHere
) -> None:
    output = tmp_path / "maps"
    flags: dict[str, Any] = {"volumes_dir": str(dataset), "output_dir": str(output), "segmenter_path": str(weights)}
    run_here([BASE, SEGMENT], **flags)
    assert read_table(output / "volumes.tsv")[0]["ventricular_vol_mm3"] == "n/a"  # of untrained weights: 700 mL
    flags["plausible"] = {"age_years": [0, 120]}
    run_here([BASE, SEGMENT], **flags)
    rows = {row["volume"]: row for row in read_table(output / "volumes.tsv")}
    assert len(rows) == 4 and {*COLUMNS, "third_ventricle_mm3"} <= rows["sub-0_T1w.nii.gz"].keys()
    label_map = output / "sub-0_T1w_dseg.nii.gz"
    image = read_volume(dataset / "sub-0_T1w.nii.gz")
    segmenter = load_segmenter(weights)
    assert np.array_equal(read_volume(label_map), segmenter.labels(segmenter.shares(image, GRID), GRID))
    found = brain_volumes(image, GRID, segmenter)
    assert {name: float(rows["sub-0_T1w.nii.gz"][name]) for name in found} == pytest.approx(found, abs=0.1)
    picture = np.asarray(Image.open(output / "figures" / "sub-0_T1w.png"))
    assert picture.shape[0] == 288 and (picture == COLOURS["intracranial"]).all(-1).any()
    written = {path.name: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}
    (output / "sub-1_T1w_dseg.nii.gz").unlink()
    run_here([BASE, SEGMENT], **flags)
    again = {path.name: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}
    assert [name for name in written if again[name] != written[name]] == ["sub-1_T1w_dseg.nii.gz"]
    assert {row["volume"]: row for row in read_table(output / "volumes.tsv")} == rows
    inside = {"volumes_dir": str(dataset), "output_dir": str(dataset / "maps")}
    assert "give another" in refused(run_here, [BASE, SEGMENT], **inside)
    assert "give --volumes_dir FOLDER" in refused(run_here, [BASE, SEGMENT], output_dir=str(output))


def test_first_process_does_not_wait_again_for_others_that_have_ended(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, values = VolumeFolder(phantoms(tmp_path / "samples"), "synthetic_dir"), Values(tmp_path / "values")
    own = OwnSegmentations(lambda: load_segmenter(weights), values, Conditions(), weights, folder)
    own.prepare()
    monkeypatch.setattr("scripts.compute.kept.wait_for_all_processes", None)
    assert own.measured().keys() == set(own.names())


def test_evaluation_measures_with_it_by_default(
    dataset: Path, weights: Path, tmp_path: Path, run_here: RunHere
) -> None:
    rows = read_table(dataset / "participants.tsv")
    samples = phantoms(tmp_path / "samples")
    common: dict[str, Any] = {"synthetic_dir": str(samples), "output_dir": str(tmp_path / "report")}
    common |= {"pair_metrics": {}, "num_pairs": 1, "segmenter_path": str(weights)}
    run_here([BASE, EVALUATE], **common)
    report = json.loads((tmp_path / "report" / "evaluation.json").read_text())["measures"]["volumetry"]
    assert report["status"] == "not requested", "what was asked for is not known"
    for number, row in enumerate(rows):
        row |= {"ventricular_vol_mm3": str(20000 + number), "brain_vol_mm3": str(1400000 + number)}
    write_table(samples / "participants.tsv", rows)
    run_here([BASE, EVALUATE], **common)
    report = json.loads((tmp_path / "report" / "evaluation.json").read_text())["measures"]["volumetry"]
    assert report["segmentations"] == "own" and report["weights_sha256"] == file_hash(weights)
    single = read_table(tmp_path / "report" / "volumetry.tsv")
    image = read_volume(samples / "sub-2_T1w.nii.gz")
    expected = brain_volumes(image, GRID, load_segmenter(weights))["brain_vol_mm3"]
    assert float(single[2]["brain_vol_measured_mm3"]) == pytest.approx(expected, rel=1e-4)
    run_here([BASE, EVALUATE], **{**common, "segment_with": "none", "output_dir": str(tmp_path / "without")})
    report = json.loads((tmp_path / "without" / "evaluation.json").read_text())["measures"]["volumetry"]
    assert report["status"] == "not requested"
    assert "there are own, synthseg, samseg" in refused(
        run_here, [BASE, EVALUATE], **{**common, "segment_with": "fast"}
    )
