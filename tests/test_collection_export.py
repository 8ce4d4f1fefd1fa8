# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What `collection export` writes, read by the tools that it is meant for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import BASE, ROOT, TINY, RunHere, computed_once

from scripts.collection import bids_tree
from scripts.collection.shard_dataset import CollectionDataset
from scripts.core.errors import find_bundle_error
from scripts.core.tables import read_table
from scripts.volumes.datasets import participants
from scripts.volumes.folders import VolumeFolder

EXPORT = "configs/collection_export.yaml"
NAMES = [f"sub-{index:06d}" for index in range(5)]
RAW = ["sex", "age_years", "ventricular_vol_mm3", "brain_vol_mm3"]


def export(run_here: RunHere, collection: Path, folder: Path, **more: Any) -> None:
    run_here([BASE, EXPORT, TINY], collection_dir=str(collection), output_dir=str(folder), **more)


@pytest.fixture(scope="session")
def exported(made_collection: Path, run_here: RunHere, shared_dir: Path) -> Path:
    """All formats, in BIDS parts of at most two people. Tests must not change it."""

    def compute(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bids_tree, "PEOPLE", 2)
            export(run_here, made_collection, folder / "all")

    return computed_once(shared_dir / "exported", compute) / "all"


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)  # type: ignore[attr-defined]


def from_bytes(content: bytes) -> np.ndarray:
    return np.asarray(nib.Nifti1Image.from_bytes(content).dataobj)  # WebDataset has unpacked it


def test_bids_parts_hold_all_people(exported: Path, made_collection: Path) -> None:
    parts = sorted((exported / "bids").glob("part-*"))
    assert [len(list(part.glob("sub-*"))) for part in parts] == [2, 2, 1]
    drawn = read_table(made_collection / "rows.tsv")
    for row, wanted in zip(read_table(exported / "bids" / "participants.tsv"), drawn, strict=True):
        assert {name: row[name] for name in ("participant_id", "sex", "seed")} == {
            name: wanted[name] for name in ("participant_id", "sex", "seed")
        }
        assert float(row["age_years"]) == float(wanted["age_years"]) and (exported / "bids" / row["path"]).is_file()
    own = read_table(parts[0] / "participants.tsv")
    described = json.loads((parts[0] / "participants.json").read_text())
    assert set(own[0]) - {"participant_id"} == set(described)
    assert described["ventricular_vol_mm3"]["Units"] == "mm3"
    assert {row["name"] for row in read_table(parts[0] / "dseg.tsv")} >= {"grey", "lateral_ventricles"}


def test_the_bids_validator_finds_no_error(exported: Path) -> None:
    program = shutil.which("bids-validator-deno", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
    if program is None:
        pytest.skip("bids-validator-deno is not installed")
    part = exported / "bids" / "part-00000"
    done = subprocess.run([program, "--json", str(part)], capture_output=True, text=True, timeout=300)
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_the_set_is_a_dataset_of_the_bundle(exported: Path, conditions: Any, made_collection: Path) -> None:
    rows = participants(str(exported / "bids"), conditions)
    assert [row["participant_id"] for row in rows] == NAMES
    stated = [json.loads(Path(row["image"]).with_suffix("").with_suffix(".json").read_text()) for row in rows]
    for row, sidecar in zip(rows, stated):
        assert conditions.in_both_units(row["condition"]) == sidecar["conditions"]
    folder = VolumeFolder(exported / "bids", "synthetic_dir")
    assert len(folder) == 5 and folder.shape == (16, 32, 16)
    own = CollectionDataset(made_collection)
    for index in range(5):
        assert torch.equal(own[index]["image"], folder[index][0])
        assert own[index]["label"].shape == (1, 16, 32, 16) and own[index]["participant_id"] == NAMES[index]


def test_webdataset_reads_the_shards(exported: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    for folder in (exported / "webdataset", exported / "huggingface" / "data"):
        tars = sorted(map(str, folder.glob("*.tar")))
        samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode())
        assert [sample["__key__"] for sample in samples] == NAMES
        for sample in samples:
            part = next((exported / "bids").glob(f"part-*/{sample['__key__']}/anat"))
            for member, ending in (("nii.gz", "T1w.nii.gz"), ("seg.nii.gz", "dseg.nii.gz")):
                assert np.array_equal(from_bytes(sample[member]), voxels(next(part.glob(f"*_{ending}"))))
            assert sample["json"]["participant_id"] == sample["__key__"]


def test_parquet_is_read_by_pandas(exported: Path, made_collection: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    for path in (exported / "parquet" / "rows.parquet", exported / "huggingface" / "rows.parquet"):
        table = pandas.read_parquet(path)
        drawn = pandas.read_csv(made_collection / "rows.tsv", sep="\t")
        columns = ["participant_id", *RAW, "seed"]
        pandas.testing.assert_frame_equal(table[columns], drawn[columns], check_dtype=False)
        assert table["tries"].tolist() == [1] * 5 and "measured_ventricular_vol_mm3" in table


def test_the_card_and_the_datasheets_say_what_it_is(exported: Path) -> None:
    card = (exported / "huggingface" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["size_categories"] == ["n<1K"] and "synthetic" in front["tags"]
    patterns = [one["data_files"] for one in front["configs"]]
    assert all(list((exported / "huggingface").glob(pattern)) for pattern in patterns)
    for path in exported.glob("*/datasheet.md"):
        assert "must not be used for" in path.read_text() and "44 to 82" in path.read_text()
    assert (exported / "datasheet.md").is_file()


def test_what_is_there_stays_and_what_is_not_complete_is_refused(
    exported: Path, made_collection: Path, run_here: RunHere, tmp_path: Path
) -> None:
    collection = Path(shutil.copytree(made_collection, tmp_path / "set"))
    (collection / "shards" / "shard-00001.json").unlink()
    for given, says in (({}, "1 of 2 shards"), ({"formats": ["zarr"]}, "'zarr' is none of bids")):
        with pytest.raises(Exception) as caught:
            export(run_here, collection, tmp_path / "out", **given)
        assert says in str(find_bundle_error(caught.value))
    export(run_here, collection, tmp_path / "out", formats=["bids"], partial=1)
    first = tmp_path / "out" / "bids" / "part-00000"
    before = first.stat().st_ino
    export(run_here, collection, tmp_path / "out", formats=["bids"], partial=1)
    assert first.stat().st_ino == before and len(list(first.glob("sub-*"))) == 3
    shutil.copy(made_collection / "shards" / "shard-00001.json", collection / "shards")
    export(run_here, collection, tmp_path / "out", formats="bids")
    assert len(list(first.glob("sub-*"))) == 5, "a part that was not complete is written anew"


def test_the_lines_of_the_documentation_run(made_collection: Path) -> None:
    text = (ROOT / "docs" / "collection.md").read_text()
    lines = text.split("```python\n")[1].split("```")[0]
    assert len(lines.splitlines()) <= 5
    space: dict[str, Any] = {}
    exec(lines.replace('"collection"', repr(str(made_collection))), space)
    assert space["batch"]["image"].shape == (2, 1, 16, 32, 16) and len(space["loader"]) == 3
