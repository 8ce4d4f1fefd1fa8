# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Many scans: in processes and parts, stopped and continued, failing one by one; and the dataset that comes of it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from preparing import (
    CONDITIONS,
    GRID,
    contents,
    head,
    preparation,
    save,
    space,
    steps,
    write_bids,
)
from stand_ins import FailsOn, KilledOn, KnownPose, LostOn

from scripts.compute.ownership import LOCK, MARK
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import make_folder, replacing, write_json
from scripts.core.tables import read_table, write_table
from scripts.preparation.optional_steps import CorrectBiasField, StripSkull, SuperResolve
from scripts.preparation.registration import write_ants_map
from scripts.preparation.skull_stripping import Stripper
from scripts.preparation.steps import Record, TargetSpace
from scripts.volumes.datasets import participants, split
from scripts.volumes.grid import Grid
from scripts.volumes.scans import Scan

NUMBER = 6
AGES = [45, 50, 60, 70, 75, 81]
KNOWN = {"age": AGES, "sex": ["F", "m", "Female", "MALE", "0", "1"]}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetSpace:
    return space(tmp_path_factory.mktemp("space"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bids(tmp_path_factory.mktemp("raw"), NUMBER, KNOWN)


@pytest.fixture(scope="module")
def prepared(target: TargetSpace, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All heads, prepared in one process."""
    folder = tmp_path_factory.mktemp("prepared")
    preparation(target, folder, input_dir=raw).run()
    return folder


Prepare = Callable[..., Path]


@pytest.fixture
def prepare(target: TargetSpace, tmp_path: Path) -> Prepare:
    def run(**options: Any) -> Path:
        preparation(target, tmp_path / "dataset", **options).run()
        return tmp_path / "dataset"

    return run


def failures(folder: Path) -> dict[str, str]:
    return {row["participant_id"]: row["reason"] for row in read_table(folder / "failures.tsv")}


def test_bytes_do_not_depend_on_processes_or_parts(prepare: Prepare, raw: Path, prepared: Path, tmp_path: Path) -> None:
    for part in ("2/2", "1/2"):
        prepare(input_dir=raw, shard=part)
        assert (tmp_path / "dataset" / "participants.tsv").is_file() == (part == "1/2")
    assert contents(tmp_path / "dataset") == contents(prepared)
    (tmp_path / "dataset").rename(tmp_path / "parts")
    assert contents(prepare(input_dir=raw, num_workers=2)) == contents(prepared)


def test_torchrun_shares_the_scans_out(
    prepare: Prepare, raw: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        folder = prepare(input_dir=raw)
    assert contents(folder) == contents(prepared)
    with pytest.raises(BundleError, match="use one of them"):
        prepare(input_dir=raw, shard="1/2")


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "1/0", "a/b", "-1/2"])
def test_a_part_that_is_none_is_refused(prepare: Prepare, raw: Path, shard: str) -> None:
    with pytest.raises(BundleError, match="--shard must be like 3/20"):
        prepare(input_dir=raw, shard=shard)


def test_a_process_that_dies_costs_its_scan_alone(
    prepare: Prepare, target: TargetSpace, raw: Path, prepared: Path, tmp_path: Path
) -> None:
    message = r"1 of 6 scans failed: 1 its process died \(sub-01\); see .*failures\.tsv"
    with pytest.raises(BundleError, match=message):
        prepare(input_dir=raw, num_workers=1, steps=steps(target, killer=KilledOn("sub-01")))
    table = read_table(tmp_path / "dataset" / "failures.tsv")
    assert "signal SIGKILL" in table[0]["message"] and len(table) == 1
    kept = read_table(tmp_path / "dataset" / "participants.tsv")
    assert [row["participant_id"] for row in kept] == [f"sub-{i:02d}" for i in (0, 2, 3, 4, 5)]
    assert not list((tmp_path / "dataset").rglob("sub-01*T1w*"))


def test_a_refused_scan_shows_where_its_search_ended(
    prepare: Prepare, target: TargetSpace, raw: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=r"1 of 6 scans failed: 1 no match \(sub-02\)"):
        prepare(input_dir=raw, steps=steps(target, lost=LostOn("sub-02")))
    page = (tmp_path / "dataset" / "quality.html").read_text()
    assert "similarity 0.21 at 1.16" in page and "T1-weighted" in page
    assert 'src="figures/thumbnails/sub-02.jpg"' in page
    assert (tmp_path / "dataset/figures/thumbnails/sub-02.jpg").is_file()


def test_a_stripped_scan_is_said_and_not_mixed_in_silence(
    prepare: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image, brain = head(swell=0.9)
    write_bids(tmp_path / "raw", 2)
    save(tmp_path / "raw/sub-01/anat/sub-01_T1w.nii.gz", 1000 * image * brain)
    folder = prepare(input_dir=tmp_path / "raw")
    rows = {row["participant_id"]: row for row in read_table(folder / "participants.tsv")}
    assert {name: row["skull"] for name, row in rows.items()} == {"sub-00": "on", "sub-01": "stripped"}
    for name, row in rows.items():
        sidecar = json.loads((folder / row["path"].replace(".nii.gz", ".json")).read_text())
        assert sidecar["SkullStripped"] is (name == "sub-01")
        assert row["largest_voxel_mm"] == "8.0" and row["air"] == "dark"
    assert "1 of 2 scans are skull-stripped, sub-01 the first" in caplog.text


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Even when it is killed while they are at work."""
    (tmp_path / "sleeper.py").write_text(
        f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from scripts.compute.pool import results
def task(folder):
    Path(folder, f"{{os.getpid()}}.pid").touch()
    time.sleep(3600)
if __name__ == "__main__":
    list(results(task, [{str(tmp_path)!r}], 1, None))
"""
    )
    process = subprocess.Popen([sys.executable, str(tmp_path / "sleeper.py")])
    worker = int(_waited_for(lambda: next(tmp_path.glob("*.pid"), None)).stem)
    process.kill()
    process.wait()
    assert _waited_for(lambda: not _is_alive(worker))


def _waited_for(condition: Callable[[], Any], seconds: float = 300.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def _is_alive(process: int) -> bool:
    """Whether there is such a process that is more than an entry which nobody has asked for yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_mistake_in_the_code_costs_one_scan_and_is_noted(
    prepare: Prepare, target: TargetSpace, raw: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="1 unexpected ZeroDivisionError"):
        prepare(input_dir=raw, steps=steps(target, fault=FailsOn("sub-03")))
    noted = json.loads((tmp_path / "dataset" / "logs" / "sub-03.json").read_text())
    assert any("stand_ins.py" in line for line in noted["traceback"])
    prepare(input_dir=raw)
    assert not (tmp_path / "dataset" / "failures.tsv").exists() and not list((tmp_path / "dataset" / "logs").iterdir())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    plain = KnownPose.__call__

    def call(self: KnownPose, record: Record) -> Record:
        calls.append(record.name)
        return plain(self, record)

    monkeypatch.setattr(KnownPose, "__call__", call)
    return calls


def test_only_what_is_missing_or_changed_is_done(
    prepare: Prepare, target: TargetSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, calls = write_bids(tmp_path / "raw", 3, {"age": [50, 60, 70]}), counted(monkeypatch)
    dataset = prepare(input_dir=raw)
    first = contents(dataset)
    assert calls == ["sub-00", "sub-01", "sub-02"]
    prepare(input_dir=raw)
    assert len(calls) == 3 and contents(dataset) == first
    image, _ = head(swell=0.8)
    save(raw / "sub-01/anat/sub-01_T1w.nii.gz", image)
    (dataset / "sub-02/anat/sub-02_space-MNI152_T1w.nii.gz").unlink()
    prepare(input_dir=raw)
    assert calls[3:] == ["sub-01", "sub-02"] and contents(dataset) != first
    (raw / "participants.tsv").write_text((raw / "participants.tsv").read_text().replace("70", "71"))
    prepare(input_dir=raw)
    assert len(calls) == 5 and read_table(dataset / "participants.tsv")[2]["age_years"] == "71"
    write_table(raw / "participants.tsv", [{"participant_id": f"sub-0{i}", "sex": "F"} for i in range(3)])
    prepare(input_dir=raw)
    assert len(calls) == 5 and read_table(dataset / "participants.tsv")[2]["age_years"] == "n/a"
    prepare(input_dir=raw, steps={**steps(target), "register": KnownPose(1.1)})
    assert len(calls) == 8
    prepare(input_dir=raw, steps={**steps(target), "register": KnownPose(1.1)}, overwrite=1)
    assert len(calls) == 11
    (dataset / "figures/sub-00.jpg").unlink()
    (dataset / "sub-01/anat/sub-01_from-T1w_to-MNI152_mode-image_xfm.txt").unlink()
    prepare(input_dir=raw, steps={**steps(target), "register": KnownPose(1.1)})
    assert calls[11:] == ["sub-00", "sub-01"] and (dataset / "figures/sub-00.jpg").is_file()


def test_nothing_is_lost_when_the_disk_is_full(
    prepare: Prepare, raw: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, written = nib.save, []

    def save_until_full(image: Any, path: Any) -> None:
        written.append(path)
        if len(written) > 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, os.strerror(28))
        plain(image, path)

    monkeypatch.setattr("scripts.volumes.nifti.nib.save", save_until_full)
    with pytest.raises(BundleError, match=r"No space left on device: make room; what is prepared is kept"):
        prepare(input_dir=raw)
    assert len(written) == 4
    dataset = tmp_path / "dataset"
    assert not [path for path in dataset.rglob(".*") if path.is_file() and path.name not in (MARK, LOCK)]
    left = {path: data for path, data in contents(dataset).items() if path.startswith("sub-")}
    assert left and left.items() <= contents(prepared).items()
    monkeypatch.setattr("scripts.volumes.nifti.nib.save", plain)
    assert contents(prepare(input_dir=raw)) == contents(prepared)


def test_what_was_prepared_and_then_goes_bad_is_named(prepare: Prepare, tmp_path: Path) -> None:
    """A source that vanishes or is damaged later fails by its own reason; it comes back when the file does."""
    raw = write_bids(tmp_path / "raw", 2, {"age": [50, 60]})
    before = contents(prepare(input_dir=raw))
    scan = raw / "sub-01/anat/sub-01_T1w.nii.gz"
    whole = scan.read_bytes()
    scan.write_bytes(whole[:-20])
    with pytest.raises(BundleError, match=r"1 of 2 scans failed: 1 truncated \(sub-01\)"):
        prepare(input_dir=raw)
    scan.rename(tmp_path / "away")
    rows = [{"participant_id": f"0{i}", "path": f"raw/sub-0{i}/anat/sub-0{i}_T1w.nii.gz"} for i in range(2)]
    write_table(tmp_path / "table.tsv", rows)
    with pytest.raises(BundleError, match=r"1 of 2 scans failed: 1 missing file \(sub-01\)"):
        prepare(input_table=tmp_path / "table.tsv")
    scan.write_bytes(whole)
    again = contents(prepare(input_dir=raw))
    assert again == before


def test_what_a_killed_process_left_half_written_is_removed(prepare: Prepare, tmp_path: Path) -> None:
    raw, folder = write_bids(tmp_path / "raw", 1), make_folder(tmp_path / "dataset/sub-00/anat")
    half = replacing(folder / "sub-00_space-MNI152_T1w.nii.gz")
    half.__enter__().write_bytes(b"half")  # and never left
    (folder / ".0123456789ab-other.nii.gz").write_bytes(b"of another scan")
    assert len(list(folder.iterdir())) == 2
    prepare(input_dir=raw)
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_under_torchrun_a_failure_does_not_end_the_others(raw: Path, prepared: Path, tmp_path: Path) -> None:
    """The first process fails at once, the second has slow scans: all of them are prepared before either ends."""
    script = tmp_path / "work.py"
    script.write_text(
        f"""
import sys, time
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from preparing import preparation, space, steps
from scripts.core.errors import BundleError
from stand_ins import FailsOn, KnownPose
def slow(record):
    time.sleep(0.0 if record.name in ("sub-00", "sub-02", "sub-04") else 1.0)
    return record
target = space(Path({str(tmp_path)!r}) / ("space" + sys.argv[1]))
chain = steps(target, fault=FailsOn("sub-00"), slow=slow)
try:
    preparation(target, Path({str(tmp_path / "dataset")!r}), input_dir={str(raw)!r}, steps=chain).run()
except BundleError as error:
    sys.exit(f"error: {{error}}")
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), "x"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert ran.returncode != 0 and "1 of 6 scans failed: 1 unexpected ZeroDivisionError (sub-00)" in ran.stderr
    rows = read_table(tmp_path / "dataset/participants.tsv")
    assert [row["participant_id"] for row in rows] == [f"sub-0{i}" for i in range(1, 6)]
    assert failures(tmp_path / "dataset") == {"sub-00": "unexpected ZeroDivisionError"}


def test_every_fault_is_named_and_counted(prepare: Prepare, tmp_path: Path) -> None:
    image, _ = head()
    good = save(tmp_path / "good.nii.gz", image).read_bytes()
    (tmp_path / "text.nii.gz").write_text("no image")
    (tmp_path / "cut.nii.gz").write_bytes(good[: len(good) // 2])
    save(tmp_path / "four.nii.gz", np.stack([image, image], axis=3))
    save(tmp_path / "flat.nii.gz", image[:, :, 0])
    save(tmp_path / "zero.nii.gz", 0 * image)
    save(tmp_path / "nan.nii.gz", np.where(image > 0.5, np.nan, image))
    save(tmp_path / "far.nii.gz", image, np.diag([50.0, 50.0, 50.0, 1.0]))
    rows = [
        ("good", "good", 60, "F", ""),
        ("gone", "gone", 60, "F", "missing file"),
        ("text", "text", 60, "F", "unreadable"),
        ("cut", "cut", 60, "F", "truncated"),
        ("four", "four", 60, "F", "not 3D"),
        ("flat", "flat", 60, "F", "not 3D"),
        ("zero", "zero", 60, "F", "constant"),
        ("nan", "nan", 60, "F", "NaN or infinity"),
        ("far", "far", 60, "F", "impossible spacing"),
        ("twice", "good", 60, "F", "duplicate subject"),
        ("twice", "good", 60, "F", "duplicate subject"),
        ("../up", "good", 60, "F", "impossible name"),
    ]
    table = [{"participant_id": n, "path": f"{p}.nii.gz", "age": a, "sex": s} for n, p, a, s, _ in rows]
    write_table(tmp_path / "table.tsv", table)
    with pytest.raises(BundleError, match="11 of 12 scans failed: 2 not 3D, 2 duplicate subject, 1 ") as caught:
        prepare(input_table=tmp_path / "table.tsv")
    assert str(caught.value).endswith("failures.tsv")
    found = read_table(tmp_path / "dataset" / "failures.tsv")
    assert [(row["participant_id"], row["reason"]) for row in found] == [(f"sub-{n}", r) for n, *_, r in rows if r]
    assert [row["participant_id"] for row in read_table(tmp_path / "dataset" / "participants.tsv")] == ["sub-good"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"age_years": "Age"}}, r"no column Age \(did you mean 'age'\?\)"),
        ({"columns": {"age_yeers": "age"}}, "columns names 'age_yeers'"),
        ({"words": {"sexx": {}}}, "words names 'sexx'"),
        ({"splits": {"train": 0.5, "validation": 0.1, "test": 0.1}}, "0.7 together"),
        ({"splits": {"train": 1.0}}, "train, validation, test"),
        ({"input_table": "train trian"}, "has 'trian' for sub-01: use train, validation, test"),
        ({"num_workers": -1}, "num_workers"),
        ({"input_dir": None}, "nothing to prepare"),
        ({"input_dir": "nowhere"}, "no folder nowhere"),
    ],
)
def test_bad_requests_are_refused(
    prepare: Prepare, raw: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if "input_table" in options:
        rows = [{"participant_id": f"0{i}", "split": word} for i, word in enumerate(options["input_table"].split())]
        write_table(tmp_path / "table.tsv", rows)
        options = {"input_table": tmp_path / "table.tsv"}
    with pytest.raises(BundleError, match=message):
        prepare(**{"input_dir": raw, **options})


def test_a_person_is_in_one_split(prepare: Prepare, raw: Path, tmp_path: Path) -> None:
    path = str(raw / "sub-00/anat/sub-00_T1w.nii.gz")
    rows = [{"participant_id": "9", "session_id": i, "path": path, "split": s} for i, s in enumerate(("train", "test"))]
    write_table(tmp_path / "table.tsv", rows)
    with pytest.raises(BundleError, match="has sub-9 both in train and in test"):
        prepare(input_table=tmp_path / "table.tsv")


def test_an_empty_set_is_refused(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "table.tsv").write_text("participant_id\tpath\n")
    with pytest.raises(BundleError, match="has no rows"):
        prepare(input_table=tmp_path / "table.tsv")
    (tmp_path / "raw").mkdir()
    with pytest.raises(BundleError, match="holds no scan sub-"):
        prepare(input_dir=tmp_path / "raw")


def test_the_dataset_is_a_bids_derivative_that_training_takes(prepared: Path, raw: Path) -> None:
    rows = read_table(prepared / "participants.tsv")
    assert [row["sex"] for row in rows] == ["female", "male"] * 3
    assert [float(row["age_years"]) for row in rows] == AGES
    assert {row["ventricular_vol_mm3"] for row in rows} == {"n/a"}
    assert set(json.loads((prepared / "participants.json").read_text())) == set(rows[0]) - {"participant_id"}
    described = json.loads((prepared / "dataset_description.json").read_text())
    assert described["DatasetType"] == "derivative" and described["SourceDatasets"][0]["URL"] == raw.as_uri()
    assert described["GeneratedBy"][0]["Version"]
    sidecar = json.loads((prepared / rows[0]["path"].replace(".nii.gz", ".json")).read_text())
    assert sidecar["SkullStripped"] is False and sidecar["source"] == "sub-00/anat/sub-00_T1w.nii.gz"
    assert sidecar["steps"]["scale"] == {"version": 1, "percentile": 99.8, "level": 0.8}
    known = participants(str(prepared), CONDITIONS, missing="default")
    parts = {name: [row["participant_id"] for row in split(known, name)] for name in ("train", "validation", "test")}
    assert sorted(sum(parts.values(), [])) == [row["participant_id"] for row in rows]
    assert parts["train"] and parts["validation"]


def test_more_subjects_move_none(prepare: Prepare, prepared: Path, tmp_path: Path) -> None:
    raw = write_bids(tmp_path / "raw", NUMBER + 3)
    now = {row["participant_id"]: row["split"] for row in read_table(prepare(input_dir=raw) / "participants.tsv")}
    before = {row["participant_id"]: row["split"] for row in read_table(prepared / "participants.tsv")}
    assert before.items() <= now.items()


def test_the_transform_file_says_what_the_sidecar_says(prepared: Path, tmp_path: Path) -> None:
    ants = pytest.importorskip("ants")
    from scripts.preparation.prepared_scan import itk_transform

    pose = np.eye(4)
    pose[:3] = [[0.8, -0.6, 0, 5], [0.6, 0.8, 0, -7], [0, 0, 1, 11.25]]
    (tmp_path / "x.txt").write_text(itk_transform(pose))
    ours, theirs = (
        ants.read_transform(str(tmp_path / "x.txt")),
        ants.read_transform(write_ants_map(pose, tmp_path / "x.mat")),
    )
    point = [10.0, 20.0, -30.0]
    assert ours.apply_to_point(point) == pytest.approx(theirs.apply_to_point(point), abs=1e-4)
    assert [-ours.apply_to_point([-10, -20, 30])[0]] == pytest.approx([(pose @ [10, 20, 30, 1])[0]])
    sidecar = json.loads((prepared / "sub-00/anat/sub-00_space-MNI152_T1w.json").read_text())
    assert sidecar["template_to_scan_mm"] == np.eye(4).tolist()
    written = prepared / "sub-00/anat/sub-00_from-T1w_to-MNI152_mode-image_xfm.txt"
    assert written.read_text() == itk_transform(np.eye(4))


@pytest.mark.parametrize("codes", [(2, 1), (1, 1)])
def test_the_transform_and_what_is_carried_back_hold_in_itk(
    codes: tuple[int, int], prepare: Prepare, tmp_path: Path
) -> None:
    """ITK takes the qform where the sform's code is not that of a scanner; the bundle takes the sform."""
    ants = pytest.importorskip("ants")
    from scipy.spatial.transform import Rotation

    from scripts.preparation.native_space import carry_back

    image, _ = head()
    tilted = GRID.affine.copy()
    tilted[:3, :3] = Rotation.from_euler("x", 20, degrees=True).as_matrix() @ tilted[:3, :3]
    raw = nib.Nifti1Image(image, GRID.affine)
    raw.set_sform(GRID.affine, codes[0])
    raw.set_qform(tilted, codes[1])
    nib.save(raw, tmp_path / "raw.nii.gz")
    write_table(tmp_path / "x.tsv", [{"participant_id": "one", "path": "raw.nii.gz", "hand": "left"}])
    dataset = prepare(input_table=tmp_path / "x.tsv")
    (row,) = read_table(dataset / "participants.tsv")
    assert "20 degrees" in row["header"] and row["hand"] == "left"
    volume, (transform,) = dataset / row["path"], (dataset / "sub-one" / "anat").glob("*_xfm.txt")
    fixed, moving = ants.image_read(str(volume)), ants.image_read(str(tmp_path / "raw.nii.gz"))
    moved = ants.apply_transforms(fixed, moving, [str(transform)]).numpy()
    assert np.corrcoef(moved.ravel(), fixed.numpy().ravel())[0, 1] > 0.97
    carry_back(volume, tmp_path / "raw.nii.gz", volume.with_name(volume.name[:-7] + ".json"), tmp_path / "back.nii.gz")
    back = ants.image_read(str(tmp_path / "back.nii.gz"))
    assert np.allclose(back.direction, moving.direction, atol=1e-5) and np.allclose(
        back.origin, moving.origin, atol=1e-3
    )
    assert np.corrcoef(back.numpy().ravel(), image.ravel())[0, 1] > 0.97


def test_sessions_have_their_own_ages(prepare: Prepare, tmp_path: Path) -> None:
    image, _ = head()
    for session in ("ses-1", "ses-2"):
        save(tmp_path / f"raw/sub-1/{session}/anat/sub-1_{session}_T1w.nii.gz", image)
    save(tmp_path / "raw/derivatives/x/sub-1/anat/sub-1_T1w.nii.gz", image)
    (tmp_path / "raw/sub-1/sub-1_sessions.tsv").write_text("session_id\tage\nses-1\tn/a\nses-2\t63\n")
    (tmp_path / "raw/participants.tsv").write_text("participant_id\tage\tsex\nsub-1\t61\tM\n")
    rows = read_table(prepare(input_dir=tmp_path / "raw") / "participants.tsv")
    assert [(r["session_id"], r["age_years"], r["sex"]) for r in rows] == [
        ("ses-1", "61", "male"),
        ("ses-2", "63", "male"),
    ]
    assert rows[1]["path"] == "sub-1/ses-2/anat/sub-1_ses-2_space-MNI152_T1w.nii.gz"
    assert rows[0]["split"] == rows[1]["split"]


def test_people_without_a_table_and_tables_without_people(
    prepare: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = write_bids(tmp_path / "raw", 2)
    (raw / "participants.tsv").write_text("participant_id\nsub-01\nsub-77\n")
    with caplog.at_level(logging.WARNING), pytest.raises(BundleError, match=r"1 missing file \(sub-77\)"):
        prepare(input_dir=raw)
    assert "1 subjects" in caplog.text and "sub-00 ..." in caplog.text
    (raw / "participants.tsv").unlink()
    assert len(read_table(prepare(input_dir=raw) / "participants.tsv")) == 2
    (raw / "participants.tsv").write_text("participant_id\tage\n01\t50\n")
    known = read_table(prepare(input_dir=raw) / "participants.tsv")
    assert [(row["participant_id"], row["age_years"]) for row in known] == [("sub-01", "50")]


def test_words_of_a_table_are_translated(prepare: Prepare, tmp_path: Path) -> None:
    raw = write_bids(tmp_path / "raw", 2, {"Gender": [1, 2], "AgeAtScan": [50, 51.5]})
    columns = {"sex": "Gender", "age_years": "AgeAtScan"}
    rows = read_table(
        prepare(input_dir=raw, columns=columns, words={"sex": {1: "male", 2: "female"}}) / "participants.tsv"
    )
    assert [(row["sex"], row["age_years"]) for row in rows] == [("male", "50"), ("female", "51.5")]


def test_another_order_of_the_steps_prepares_again_and_one_of_settings_does_not(
    prepare: Prepare, target: TargetSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, calls = write_bids(tmp_path / "raw", 1), counted(monkeypatch)
    dataset = prepare(input_dir=raw)
    sidecar = dataset / "sub-00/anat/sub-00_space-MNI152_T1w.json"
    written = json.loads(sidecar.read_text())
    old = {name: dict(reversed(step.items())) for name, step in written["steps"].items()}
    old["check"]["step"] = "scripts.check_step.CheckScan"  # as version 2.0.0 wrote it
    del old["check"]["version"]
    write_json(sidecar, {**dict(reversed(written.items())), "steps": old})
    prepare(input_dir=raw)
    assert len(calls) == 1
    moved = steps(target)
    moved = {"register": moved.pop("register"), **moved}
    prepare(input_dir=raw, steps=moved)
    assert len(calls) == 2 and list(json.loads(sidecar.read_text())["steps"]) == list(moved)
    prepare(input_dir=raw, steps=moved)
    assert len(calls) == 2
    prepare(input_dir=raw)
    assert len(calls) == 3


class TopHalf(Stripper):
    def mask(self, volume: np.ndarray, grid: Grid, scale: float = 1.0) -> np.ndarray:
        half = np.zeros(grid.shape, bool)
        half[:, :, grid.shape[2] // 2 :] = True
        return half


def test_steps_that_are_off_do_nothing_and_stand_in_the_sidecar(
    prepare: Prepare, target: TargetSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_bids(tmp_path / "raw", 1)

    def run(**flags: Any) -> tuple[np.ndarray, dict[str, Any]]:
        chain = steps(
            target,
            super_resolve=SuperResolve(flags.get("method"), {"double": lambda s: Scan(2 * s.data, s.affine)}),
            bias_field=CorrectBiasField(flags.get("bias_field", 0)),
        )
        chain["strip"] = StripSkull(target, flags.get("stripper"), {"half": TopHalf})
        folder = prepare(input_dir=raw, steps=chain) / "sub-00/anat"
        sidecar = json.loads((folder / "sub-00_space-MNI152_T1w.json").read_text())
        return nib.load(folder / "sub-00_space-MNI152_T1w.nii.gz").get_fdata(), sidecar

    monkeypatch.setattr(
        "scripts.preparation.optional_steps.without_bias_field", lambda s, seed: Scan(s.data**2, s.affine)
    )
    plain, sidecar = run()
    assert sidecar["steps"]["bias_field"]["enabled"] is False and sidecar["steps"]["strip"]["stripper"] is None
    assert np.abs(run(method="double")[0] - plain).max() < 1.5 / 255
    corrected, sidecar = run(bias_field="yes")
    assert np.abs(corrected - plain).max() > 0.05 and sidecar["steps"]["bias_field"]["enabled"] is True
    stripped, sidecar = run(stripper="half")
    assert sidecar["SkullStripped"] is True and not stripped[:, :, :10].any()
    assert np.array_equal(stripped[:, :, 10:], plain[:, :, 10:])
    for wrong in ({"method": "sharp"}, {"stripper": "knife"}):
        with pytest.raises(BundleError, match="there is no '(sharp|knife)'; there are (double|half)"):
            run(**wrong)


def test_excluded_scans_leave_the_table_and_stay_on_the_page(prepare: Prepare, raw: Path, tmp_path: Path) -> None:
    dataset = prepare(input_dir=raw)
    (tmp_path / "list.txt").write_text("sub-02  # moved\n")
    prepare(input_dir=raw, exclude=tmp_path / "list.txt", assemble=1)
    assert "sub-02" not in {row["participant_id"] for row in read_table(dataset / "participants.tsv")}
    assert (dataset / "sub-02/anat/sub-02_space-MNI152_T1w.nii.gz").is_file()
    page = (dataset / "quality.html").read_text()
    assert page.count('"name":"sub-') == NUMBER and "moved" in page
    (tmp_path / "list.txt").write_text("sub-99\n")
    with pytest.raises(BundleError, match="sub-99"):
        prepare(input_dir=raw, exclude=tmp_path / "list.txt", assemble=1)
    (tmp_path / "list.txt").write_text("".join(f"sub-{i:02d}\n" for i in range(NUMBER)))
    prepare(input_dir=raw, exclude=tmp_path / "list.txt", assemble=1)
    assert not (dataset / "participants.tsv").exists()


def test_tables_of_what_is_there_so_far(
    prepare: Prepare, raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(input_dir=raw, shard="1/2")
    dataset = prepare(input_dir=raw, assemble=1)
    assert len(read_table(dataset / "participants.tsv")) == 3
    assert "3 scans are not prepared yet, sub-01 the first" in caplog.text


def test_ranges_are_learned_from_the_training_split(
    prepare: Prepare, raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from scripts.conditions.ranges import check_learned_ranges

    dataset = prepare(input_dir=raw, learn_ranges=1)
    ages = [float(r["age_years"]) for r in read_table(dataset / "participants.tsv") if r["split"] == "train"]
    learned = json.loads((dataset / "conditions.json").read_text())
    assert learned == {"conditions::age::minimum": min(ages), "conditions::age::maximum": max(ages)}
    assert "ventricular_vol_mm3 has fewer than two values" in caplog.text
    with pytest.raises(BundleError, match=r"the m..imum of age_years .* add '.*conditions\.json' to the end"):
        check_learned_ranges(dataset, CONDITIONS)
    entries = {c.name: {"raw": c.raw, "unit": c.unit, "minimum": c.minimum, "maximum": c.maximum} for c in CONDITIONS}
    entries["age"] |= {"minimum": min(ages), "maximum": max(ages)}
    check_learned_ranges(dataset, Conditions(**entries))
    prepare(input_dir=raw)
    assert not (dataset / "conditions.json").exists()


def test_any_affine_dtype_and_scaling_gives_the_same_head(prepare: Prepare, prepared: Path, tmp_path: Path) -> None:
    """The head of sub-00 in other axes, as MGH, with a slope, in doubles, and cut with its background far from 0."""
    image, _ = head(swell=0.9)
    image = np.rint(1000 * image)
    plain = nib.Nifti1Image(image.astype(np.float64), GRID.affine)
    turned = plain.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    save(tmp_path / "turned.nii", np.asarray(turned.dataobj).astype(np.uint16), turned.affine)
    nib.save(nib.MGHImage(np.asarray(turned.dataobj).astype(np.float32), turned.affine), tmp_path / "turned.mgz")
    scaled = nib.Nifti1Image(image.astype(np.int16), GRID.affine)
    scaled.header.set_slope_inter(0.01, 3)
    nib.save(scaled, tmp_path / "scaled.nii.gz")
    save(tmp_path / "double.nii.gz", image.astype(np.float64)[..., None])
    save(tmp_path / "below.nii.gz", _far_off(image - 1000)[2:-2], GRID.affine @ _shifted(2))
    save(tmp_path / "above.nii.gz", (image + 300)[2:-2].astype(np.int16), GRID.affine @ _shifted(2))
    names = ("turned.nii", "turned.mgz", "scaled.nii.gz", "double.nii.gz", "below.nii.gz", "above.nii.gz")
    write_table(tmp_path / "x.csv", [{"participant_id": n.replace(".", ""), "path": n} for n in names])
    (tmp_path / "x.csv").write_text((tmp_path / "x.csv").read_text().replace("\t", ","))
    dataset = prepare(input_table=tmp_path / "x.csv")
    wanted = nib.load(prepared / "sub-00/anat/sub-00_space-MNI152_T1w.nii.gz").get_fdata()
    for row in read_table(dataset / "participants.tsv"):
        assert np.abs(nib.load(dataset / row["path"]).get_fdata() - wanted).max() < 1.5 / 255, row["path"]


def _far_off(image: np.ndarray) -> np.ndarray:
    """With one voxel of a value that no tissue has."""
    image = image.astype(np.float32)
    image[3, 3, 3] = -32768
    return image


def _shifted(voxels: int) -> np.ndarray:
    matrix = np.eye(4)
    matrix[0, 3] = voxels
    return matrix


def test_an_oblique_scan_lies_where_its_header_says(prepare: Prepare, tmp_path: Path, prepared: Path) -> None:
    from scipy.ndimage import affine_transform
    from scipy.spatial.transform import Rotation

    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (20, -10, 25), degrees=True).as_matrix() @ np.diag([4.0, 4.0, 5.0])
    shape = (60, 60, 50)
    affine[:3, 3] = np.array([0, -15, 15]) - affine[:3, :3] @ (np.array(shape) - 1) / 2
    image, _ = head(swell=0.9)
    onto = np.linalg.inv(GRID.affine) @ affine
    save(tmp_path / "oblique.nii.gz", affine_transform(image, onto[:3, :3], onto[:3, 3], shape, order=1), affine)
    write_table(tmp_path / "x.tsv", [{"participant_id": "one", "path": "oblique.nii.gz"}])
    dataset = prepare(input_table=tmp_path / "x.tsv")
    got = nib.load(dataset / read_table(dataset / "participants.tsv")[0]["path"]).get_fdata()
    wanted = nib.load(prepared / "sub-00/anat/sub-00_space-MNI152_T1w.nii.gz").get_fdata()
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > 0.95
    assert np.corrcoef(got[:, ::-1].ravel(), wanted.ravel())[0, 1] < 0.9
