# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Which rows are held out, and the augmentations that flags switch off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heads import ROWS, refused, write_dataset
from monai.bundle import ConfigParser
from released import configuration

from scripts.core.errors import BundleError
from scripts.core.tables import MISSING
from scripts.volumes.datasets import check_headers, participants, split
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume


def rows(*ids: str, words: dict[str, str] | None = None) -> list[dict[str, Any]]:
    return [{"image": number, "participant_id": i, "split": (words or {}).get(i, "")} for number, i in enumerate(ids)]


def subjects(number: int) -> list[dict[str, Any]]:
    return rows(*(f"sub-{n:05d}" for n in range(number)))


def ids(found: list[dict[str, Any]]) -> set[str]:
    return {row["participant_id"] for row in found}


def test_hashed_share_of_subjects() -> None:
    given = subjects(4000)
    train, validation = split(given, "train"), split(given, "validation")
    assert sorted(row["image"] for row in train + validation) == list(range(4000))
    assert len(validation) == pytest.approx(200, abs=60)
    assert split(given, "test") == []
    assert ids(split(given, "validation", 0.1)) > ids(validation)
    assert ids(split(given, "validation", seed=1)) != ids(validation)
    assert split(given[::-1], "validation") == validation[::-1]


def test_more_subjects_move_no_one() -> None:
    few, many = subjects(500), subjects(4000)
    assert ids(split(few, "validation")) == ids(split(many, "validation")) & ids(few)


def test_scans_of_a_subject_stay_together() -> None:
    given = [row for row in subjects(100) for _ in range(3)] + rows(*(f"sub-{n:05d}_ses-2" for n in range(100)))
    train, validation = (ids(split(given, name, 0.3)) for name in ("train", "validation"))
    assert {i.split("_")[0] for i in train}.isdisjoint(i.split("_")[0] for i in validation)
    assert len(validation) > 20 and all(f"{i}_ses-2" in validation for i in validation if "_" not in i)


@pytest.mark.parametrize(("number", "fraction", "held_out"), [(1, 0.05, 0), (2, 0.0, 0), (2, 1e-6, 1), (9, 1e-6, 1)])
def test_someone_is_held_out_where_there_are_two(number: int, fraction: float, held_out: int) -> None:
    assert len(split(subjects(number), "validation", fraction)) == held_out
    assert len(split(subjects(number), "train", fraction)) == number - held_out


def test_the_table_says_who_is_held_out() -> None:
    words = {"a": "train", "b": "test", "c": "validation", "d": "train"}
    given = rows("a", "b", "c", "d", "c", words=words)
    for name in ("train", "validation", "test"):
        assert ids(split(given, name, 0.9)) == {i for i, word in words.items() if word == name}
    assert len(split(given, "validation")) == 2


def refused_split(given: list[dict[str, Any]], name: str = "train", fraction: Any = 0.05) -> str:
    with pytest.raises(BundleError) as caught:
        split(given, name, fraction)
    return str(caught.value)


def test_splits_that_are_refused() -> None:
    two = [*rows("a", "b", words={"a": "train", "b": "train"}), *rows("a_ses-2", words={"a_ses-2": "test"})]
    assert "participant a is in two splits, train and test" in refused_split(two)
    assert "has the split 'training'" in refused_split(rows("a", words={"a": "training"}))
    assert f"participant b has the split '{MISSING}'" in refused_split(rows("a", "b", words={"a": "train"}))
    assert "nothing to train on" in refused_split([])
    assert "nothing to train on" in refused_split(rows("a", words={"a": "test"}), "test")
    assert "not 'eval'" in refused_split(subjects(2), "eval")
    assert "nothing to train on" in refused_split(subjects(2), fraction=1)
    for fraction in (1.5, -0.1, "many", float("nan")):
        assert "--validation_fraction must be from 0 to 1" in refused_split(subjects(2), fraction=fraction)


def test_headers_are_looked_at_before_a_training(tmp_path: Path) -> None:
    grid = Grid((6, 8, 4), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    found: list[dict[str, Any]] = [{"image": str(tmp_path / f"{name}.nii.gz")} for name in "abc"]
    for row in found:
        write_volume(row["image"], np.zeros(grid.shape), grid)
    check_headers(found, grid)
    other = Grid((6, 8, 5), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    assert f"{found[0]['image']} has shape (6, 8, 4), not (6, 8, 5)" in refused(check_headers, found, other)
    check_headers(found[:2], other, resample=True)
    Path(found[1]["image"]).write_bytes(b"no volume")
    assert f"{found[1]['image']} cannot be read" in refused(check_headers, found, grid, resample=True)


def test_split_comes_from_the_table(tmp_path: Path) -> None:
    config = configuration()
    grid, conditions = config.get_parsed_content("grid"), config.get_parsed_content("conditions")
    words = ["validation", "train", "train", "test"]
    write_dataset(tmp_path / "a", grid, [{**row, "split": word} for row, word in zip(ROWS, words)])
    assert ids(split(participants(str(tmp_path / "a"), conditions), "validation")) == {"sub-0"}
    write_dataset(tmp_path / "b", grid, [{**row, "split": MISSING} for row in ROWS])
    assert {row["split"] for row in participants(str(tmp_path / "b"), conditions)} == {""}


def augmentation(name: str, **flags: Any) -> ConfigParser:
    return configuration([f"configs/{name}.yaml", "configs/tiny.yaml"], **flags)


@pytest.mark.parametrize("flag", ["flip", "affine", "intensity_shift", "gamma"])
def test_each_augmentation_has_its_flag(flag: str) -> None:
    volume = torch.rand(1, 32, 48, 32, generator=torch.Generator().manual_seed(0))
    off = dict.fromkeys(["flip", "affine", "intensity_shift", "gamma"], 0)

    def augmented(**flags: float) -> torch.Tensor:
        config = augmentation("train_autoencoder", **flags)
        sample: Any = {"image": volume}
        for name in ("spatial_augmentation", "intensity_augmentation"):
            sample = config.get_parsed_content(name).set_random_state(0)(sample)
        return torch.as_tensor(sample["image"])

    assert torch.equal(augmented(**off), volume)
    changed = augmented(**{**off, flag: 1})
    assert not torch.equal(changed, volume) and 0.0 <= changed.min() and changed.max() <= 1.0
    assert torch.equal(changed, volume.flip(1)) is (flag == "flip")


@pytest.mark.parametrize("value", [1.5, -1, "often", None])
@pytest.mark.parametrize("overlay", ["train_autoencoder", "encode_latents"])
def test_an_augmentation_needs_a_probability(overlay: str, value: Any) -> None:
    for flag, name in (("flip", "spatial_augmentation"), ("affine", "spatial_augmentation")):
        config = augmentation(overlay, **{flag: value})
        told = refused(config.get_parsed_content, name if overlay == "train_autoencoder" else "augmentation")
        assert told == f"--{flag} must be from 0 to 1, got '{value}'"


@pytest.mark.parametrize(
    ("overlay", "name"), [("train_autoencoder", "spatial_augmentation"), ("encode_latents", "augmentation")]
)
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_volumes_are_shifted_along_every_axis(overlay: str, name: str, axis: int) -> None:
    """MONAI takes a single number for the range of the first axis alone."""
    transform = augmentation(overlay, flip=0, affine=1).get_parsed_content(name)
    ramp = torch.linspace(0, 1, 32).reshape([-1 if k == axis else 1 for k in range(4)]).expand(1, 32, 32, 32)
    moved = torch.as_tensor(transform.set_random_state(0)({"image": ramp.contiguous()})["image"])
    inside = (slice(None), *3 * [slice(8, 24)])
    voxels = (moved - ramp)[inside].abs() * 31
    assert 0.01 < voxels.max() < 1.5
