# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Phantoms: the volumes asked for are those that others count, nothing folds, and one number is one phantom."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import BASE, ROOT, RunHere
from scipy import ndimage
from synthetic_head import FINER, GRID, LEVELS, synthetic_head, synthetic_image, synthetic_labels, write_heads

from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError, find_bundle_error
from scripts.core.tables import read_table
from scripts.phantoms.deformation import cosine_field, smooth_coefficients
from scripts.phantoms.heads import SeedHead, count_volumes, load_head
from scripts.phantoms.looks import aged
from scripts.phantoms.making import Phantoms
from scripts.phantoms.population import RAW, Population
from scripts.phantoms.shapes import PhantomTarget, Pose, Shape, deform
from scripts.tools.phantom_labels import STRUCTURES, label_map
from scripts.volumes.head_size import reference_intracranial_mm3
from scripts.volumes.labels import LABELS
from scripts.volumes.scans import Scan

CONFIG = yaml.safe_load((ROOT / "configs/phantoms.yaml").read_text())
HEADS = ROOT / "models" / "heads"
VENTRICLES = LABELS["lateral_ventricles"]
VOXEL = float(np.prod(np.abs(GRID.spacing)))


@pytest.fixture(scope="module")
def conditions() -> Conditions:
    from monai.bundle import ConfigParser

    entries = dict(ConfigParser.load_config_file(str(ROOT / BASE))["conditions"])
    entries.pop("_target_")
    return Conditions(**entries)


@pytest.fixture(scope="module")
def head() -> SeedHead:
    return synthetic_head()


def maker(conditions: Conditions, *heads: SeedHead, **options: Any) -> Phantoms:
    """Phantoms of synthetic heads with the settings of the configuration."""
    population = Population(conditions, **{**CONFIG["population"], **options})
    settings = (CONFIG["anatomy"], CONFIG["ageing"], CONFIG["looks"])
    return Phantoms(heads, population, reference_intracranial_mm3(), *settings)


def reached(head: SeedHead, ventricles: float, brain: float, random: float = 0.0, scale: float = 1.0) -> Shape:
    extent = [n * abs(s) for n, s in zip(head.grid.shape, head.grid.spacing)]
    modes = smooth_coefficients(3, extent, 70.0, torch.Generator().manual_seed(5))
    velocity = random * cosine_field(modes, head.shares.shape[2:])
    ratio = 0.95 * head.volumes.grey / head.volumes.white
    return deform(
        head, PhantomTarget(ventricles, brain, ratio), Pose((scale, scale, scale), (0.02, -0.03, 0.02)), velocity
    )


@pytest.mark.parametrize(
    ("ventricles", "brain", "random", "scale"),
    [(10e3, 0.80, 0.0, 1.0), (20e3, 0.70, 2.0, 0.95), (45e3, 0.78, 2.0, 1.03), (90e3, 0.65, 1.0, 1.0)],
)
def test_volumes_are_those_asked_for(
    head: SeedHead, ventricles: float, brain: float, random: float, scale: float
) -> None:
    """Counted with NumPy on the labels; the skull's content is the head's, scaled."""
    shape = reached(head, ventricles, brain, random, scale)
    labels, voxel = shape.labels.numpy().astype(int), VOXEL
    counts = {name: voxel * np.count_nonzero(labels == number) for name, number in LABELS.items()}
    assert counts["lateral_ventricles"] == pytest.approx(ventricles, rel=0.02)
    intracranial = voxel * np.count_nonzero(labels >= 2)
    assert (counts["grey"] + counts["white"]) / intracranial == pytest.approx(brain, rel=0.01)
    assert intracranial == pytest.approx(scale**3 * head.volumes.intracranial, rel=0.02)
    wanted = 0.95 * head.volumes.grey / head.volumes.white
    assert counts["grey"] / counts["white"] == pytest.approx(wanted, rel=0.03)
    assert shape.least_jacobian > 0.0
    pieces, number = ndimage.label(labels[0, 0] >= 2)
    assert np.bincount(pieces.ravel())[1:].max() > 0.999 * np.count_nonzero(labels >= 2)


def test_skull_stays_and_nothing_leaves_it() -> None:
    """On a finer grid: a head that is not turned is symmetric, so that voxels change in fours."""
    head = synthetic_head(grid=FINER)
    ratio = head.volumes.grey / head.volumes.white
    still = torch.zeros(1, 3, *head.shares.shape[2:])
    shape = deform(head, PhantomTarget(60e3, 0.7, ratio), Pose(), still)
    before, after = head.labels.numpy(), shape.labels.numpy()
    assert np.array_equal(before == LABELS["scalp_and_skull"], after == LABELS["scalp_and_skull"])
    assert np.array_equal(before == LABELS["outside"], after == LABELS["outside"])
    assert np.mean(before != after) > 0.01


def test_ventricles_grow_around_themselves(head: SeedHead) -> None:
    """A larger request gives more, around the same place, and does not tear them apart."""
    grown = [reached(head, v, 0.72).labels.numpy()[0, 0] == VENTRICLES for v in (12e3, 25e3, 50e3)]
    assert [VOXEL * g.sum() for g in grown] == pytest.approx([12e3, 25e3, 50e3], rel=0.02)
    for small, large in zip(grown, grown[1:]):
        assert np.mean(large[small]) > 0.97
    assert ndimage.label(grown[-1])[1] <= 2 + ndimage.label(head.labels.numpy()[0, 0] == VENTRICLES)[1]


def test_ears_end_at_the_field_of_view_and_the_neck_goes_on(head: SeedHead) -> None:
    """A head that is smaller or turned shows what was beyond the field of view of its scan: air beside, neck below."""
    labels, skin = head.labels.clone(), LABELS["scalp_and_skull"]
    labels[:, :, 0, 21:25, 14:17] = skin
    labels[:, :, :, :, 0] = skin
    wanted = PhantomTarget(20e3, 0.7, head.volumes.grey / head.volumes.white)
    still = torch.zeros(1, 3, *head.shares.shape[2:])
    pose = Pose((0.8, 0.8, 0.8), (0.1, 0.0, 0.0))
    small = deform(dataclasses.replace(head, labels=labels), wanted, pose, still).labels[0, 0]
    assert (small[:2] == LABELS["outside"]).all()
    assert (small[10:-10, 10:-10, 0] == skin).float().mean() > 0.4


def test_what_does_not_fit_is_refused(head: SeedHead) -> None:
    with pytest.raises(BundleError, match=r"do not fit into a skull of \d+ mL"):
        reached(head, 170e3, 0.9)


def test_one_number_is_one_phantom(conditions: Conditions, head: SeedHead) -> None:
    """Whatever was made before it, and by which object."""
    first, again = (maker(conditions, head, synthetic_head("sub-small", 0.95)) for _ in range(2))
    phantoms = [first.make(3, number) for number in range(3)]
    twin, other = again.make(3, 2), again.make(4, 2)
    assert torch.equal(phantoms[2].image, twin.image) and torch.equal(phantoms[2].labels, twin.labels)
    assert phantoms[2].measured == twin.measured and phantoms[2].facts == twin.facts
    assert not torch.equal(twin.image, other.image)
    assert len({p.measured.ventricular_vol_mm3 for p in phantoms}) == 3
    for phantom in phantoms:
        requested, measured = phantom.requested, phantom.measured
        assert measured.ventricular_vol_mm3 == pytest.approx(requested.ventricular_vol_mm3, rel=0.02)
        assert measured.brain_vol_mm3 == pytest.approx(requested.brain_vol_mm3, rel=0.02)
        counted = count_volumes(phantom.labels, GRID).ventricles
        assert measured.ventricular_vol_mm3 == pytest.approx(counted, rel=1e-4)
        assert 0.0 <= float(phantom.image.min()) and float(phantom.image.max()) <= 1.0


def test_age_and_sex_do_what_they_should(conditions: Conditions, head: SeedHead) -> None:
    phantoms = maker(conditions, head)
    same = {"ventricular_vol_mm3": 20e3, "brain_vol_mm3": 1.4e6, "intracranial_mm3": head.volumes.intracranial}
    young, old = (phantoms.make(0, 0, {**same, "age_years": age, "sex": 0.0}) for age in (45.0, 80.0))
    ratio = [p.facts["grey_mm3"] / p.facts["white_mm3"] for p in (young, old)]
    assert ratio[1] / ratio[0] == pytest.approx(np.exp(-0.0024 * 35.0), rel=0.02)

    def contrast(phantom: Any) -> float:
        inside = [ndimage.binary_erosion(phantom.labels[0] == LABELS[name]) for name in ("grey", "white")]
        grey, white = (float(phantom.image[0].numpy()[mask].mean()) for mask in inside)
        return white - grey

    assert 0.8 < contrast(old) / contrast(young) < 0.95
    women, men = ([phantoms.covariates(0, n, {"sex": s}).intracranial_mm3 for n in range(50)] for s in (0.0, 1.0))
    assert (np.mean(men) / np.mean(women)) ** (1 / 3) == pytest.approx(1.036, abs=0.005)
    large, small = (phantoms.make(0, 1, {"intracranial_mm3": f * head.volumes.intracranial}) for f in (1.05, 0.85))
    assert large.measured.intracranial_mm3 / small.measured.intracranial_mm3 == pytest.approx(1.05 / 0.85, rel=0.02)


def test_contrast_alone_moves_only_grey_matter() -> None:
    labels = torch.as_tensor(synthetic_labels())
    image = torch.as_tensor(synthetic_image(labels.numpy()))
    images = torch.stack([image, (labels == LABELS["grey"]).float()])[None]
    halved = aged(images, (LEVELS[3], LEVELS[4]), 0.5)[0, 0]
    assert torch.equal(halved[labels != LABELS["grey"]], image[labels != LABELS["grey"]])
    assert torch.allclose(halved[labels == LABELS["grey"]], torch.tensor((LEVELS[3] + LEVELS[4]) / 2))


def test_population_is_shaped_like_the_cohort(conditions: Conditions, head: SeedHead) -> None:
    phantoms = maker(conditions, head)
    drawn = [phantoms.covariates(1, n) for n in range(1500)]
    sex, age, ventricles, brain, _ = (np.array([getattr(d, name) for d in drawn]) for name in RAW)
    for condition in conditions:
        values = [getattr(d, condition.raw) for d in drawn]
        assert condition.minimum <= min(values) and max(values) <= condition.maximum
    assert 0.3 < np.corrcoef(age, np.log(ventricles))[0, 1] < 0.6
    assert -0.65 < np.corrcoef(age, brain)[0, 1] < -0.35
    assert np.corrcoef(ventricles, brain)[0, 1] < -0.25
    assert np.median(ventricles[sex == 1]) > np.median(ventricles[sex == 0])
    assert np.median(ventricles) == pytest.approx(34600, rel=0.05)
    apart = [maker(conditions, head, independent=1).covariates(1, n) for n in range(1500)]
    table = np.array([dataclasses.astuple(d)[:4] for d in apart])
    assert np.abs(np.corrcoef(table.T) - np.eye(4)).max() < 0.1
    assert np.allclose(table[:, 2].mean(), (6995.68 + 171375.0) / 2, rtol=0.05)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_heads(tmp_path_factory.mktemp("heads"))


@pytest.fixture
def overrides(heads: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    grid = {"grid#shape": list(GRID.shape), "grid#spacing": list(GRID.spacing), "grid#origin": list(GRID.origin)}
    folders = {"heads_dir": str(heads[0]), "labels_dir": str(heads[1]), "output_dir": str(tmp_path / "out")}
    return {**grid, **folders, "seed": 1}


def contents(folder: Path) -> dict[str, bytes]:
    """The voxels of every volume and the bytes of the table."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.suffix in (".gz", ".tsv")}
    return {n: gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for n, p in files.items()}


CONFIGS = [BASE, "configs/phantoms.yaml"]


def test_a_dataset_is_written_and_the_table_is_right(
    run_here: RunHere, overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Volumes counted with nibabel and NumPy on the files; then the same by two processes, one after the other."""
    sheet = tmp_path / "sheet.png"
    run_here(CONFIGS, **overrides, num_phantoms=2, ventricular_vol_mm3=30000, sex="male", contact_sheet=str(sheet))
    dataset = tmp_path / "out"
    rows = read_table(dataset / "participants.tsv")
    assert [row["participant_id"] for row in rows] == ["sub-000000", "sub-000001"] and sheet.is_file()
    for row in rows:
        scan, labels = nib.load(dataset / row["path"]), nib.load(dataset / row["labels"])
        assert np.allclose(scan.affine, GRID.affine) and np.allclose(labels.affine, GRID.affine)
        assert scan.get_data_dtype() == labels.get_data_dtype() == np.uint8
        found = np.asarray(labels.dataobj)
        counted = abs(np.linalg.det(labels.affine)) * np.count_nonzero(found == VENTRICLES)
        assert counted == pytest.approx(30000, rel=0.02)
        assert counted == pytest.approx(float(row["ventricular_vol_mm3"]), rel=1e-4)
        brain = np.isin(found, (3, 4)).sum() / np.isin(found, range(2, 8)).sum() * reference_intracranial_mm3()
        assert brain == pytest.approx(float(row["brain_vol_mm3"]), rel=1e-4)
        assert brain == pytest.approx(float(row["requested_brain_vol_mm3"]), rel=0.02)
        assert row["sex"] == "male" and float(row["least_jacobian"]) > 0
    sheets = (dataset / f"space-MNI152_{kind}.json" for kind in ("T1w", "dseg"))
    assert all(json.loads(path.read_text())["SpatialReference"] == "MNI152" for path in sheets)
    before = contents(dataset)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        shared = {**overrides, "output_dir": str(tmp_path / "shared")}
        run_here(CONFIGS, **shared, num_phantoms=2, ventricular_vol_mm3=30000, sex="male")
    assert contents(tmp_path / "shared") == before


def test_the_same_command_goes_on(
    run_here: RunHere, overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = Phantoms.make

    def counted(self: Phantoms, seed: int, number: int, fixed: Any = None) -> Any:
        made.append(number)
        return make(self, seed, number, fixed)

    monkeypatch.setattr(Phantoms, "make", counted)
    table = tmp_path / "wanted.tsv"
    table.write_text("ventricular_vol_mm3\tsex\n15000\tF\n20000\tn/a\n")
    run_here(CONFIGS, **overrides, conditions_table=str(table))
    (tmp_path / "out/sub-000001/anat/sub-000001_space-MNI152_T1w.json").unlink()
    run_here(CONFIGS, **overrides, conditions_table=str(table))
    assert made == [0, 1, 1]
    rows = read_table(tmp_path / "out/participants.tsv")
    assert rows[0]["sex"] == "female"
    assert [float(r["ventricular_vol_mm3"]) for r in rows] == pytest.approx([15000, 20000], rel=0.02)
    with pytest.raises(Exception) as caught:
        run_here(CONFIGS, **{**overrides, "seed": 2}, conditions_table=str(table))
    assert "made by other settings" in str(find_bundle_error(caught.value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": "sub-nobody"}, "there is no seed head 'sub-nobody'"),
        ({"heads_dir": "/nowhere"}, "run `make example-data` first"),
        ({"labels_dir": "/nowhere"}, "no label maps of seed heads in /nowhere"),
        ({"num_phantoms": 0}, "--num_phantoms must be at least 1"),
        ({"ventricular_vol_mm3": 170000, "brain_vol_mm3": 1750000}, "phantom 0 of seed 1 cannot be made"),
        ({"num_phantom": 2}, "did you mean --num_phantoms"),
        ({"independent": "perhaps"}, "--independent must be 1 or 0"),
    ],
)
def test_bad_requests_are_one_line(
    run_here: RunHere, overrides: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception) as caught:
        run_here(CONFIGS, **{**overrides, **changes})
    assert message in str(find_bundle_error(caught.value))


def test_label_maps_of_the_wrong_kind_are_refused(heads: tuple[Path, Path], tmp_path: Path) -> None:
    wrong = nib.Nifti1Image(np.full(GRID.shape, 9, np.uint8), GRID.affine)
    nib.save(wrong, tmp_path / "sub-round_dseg.nii.gz")
    with pytest.raises(BundleError, match="other labels than 0 to 7"):
        load_head("sub-round", heads[0], tmp_path, GRID)
    nib.save(nib.Nifti1Image(np.full(GRID.shape, 4, np.uint8), GRID.affine), tmp_path / "sub-round_dseg.nii.gz")
    with pytest.raises(BundleError, match="lacks the lateral ventricles"):
        load_head("sub-round", heads[0], tmp_path, GRID)


def test_shipped_label_maps_are_heads() -> None:
    """Nested as they should be, with volumes of healthy young adults."""
    paths = sorted(HEADS.glob("*_dseg.nii.gz"))
    assert len(paths) == 5
    for path in paths:
        assert path.stat().st_size < 300_000
        labels = np.asarray(nib.load(path).dataobj)
        counts = np.bincount(labels.ravel(), minlength=8) / 1000.0
        assert labels.shape == (160, 224, 160) and len(counts) == 8
        assert 8 < counts[5] < 20 and 0.5 < counts[6] < 2 and 1 < counts[7] < 4
        assert 1350 < counts[2:].sum() < 1700 and 0.75 < counts[3:5].sum() / counts[2:].sum() < 0.8
        beside = ndimage.binary_dilation(labels == VENTRICLES) & (labels < 2)
        outer = ndimage.binary_dilation(np.isin(labels, (3, 4))) & (labels == 0)
        assert not beside.any() and outer.sum() < 1000


@pytest.mark.slow
def test_labels_come_out_of_maps_of_tissues() -> None:
    """The rules that make a label map, on a head whose labels are known, at 1 mm."""
    from scripts.volumes.grid import Grid

    grid = Grid((150, 190, 150), (1.0, 1.0, 1.0), (-75.0, -95.0, -75.0))
    known = synthetic_labels(grid)
    maps = {name: (known == LABELS[name]).astype(np.float32) for name in ("grey", "white", *list(STRUCTURES)[:3])}
    maps["fluid"] = np.isin(known, (2, 5, 6, 7)).astype(np.float32)
    maps["brain"] = np.isin(known, range(2, 8)).astype(np.float32)
    maps["deep_grey"] = np.zeros_like(maps["grey"])
    found = label_map(Scan(synthetic_image(known), grid.affine), maps)
    for number in range(2, 8):
        a, b = found == number, known == number
        assert 2.0 * (a & b).sum() / (a.sum() + b.sum()) > 0.9, number
    assert np.mean((found >= 1) == (known >= 1)) > 0.99
