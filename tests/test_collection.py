# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""A collection from its table to its shards: the same bytes whoever makes them, and nothing lost."""

from __future__ import annotations

import json
import logging
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from collecting import draw, flags, make
from conftest import BASE, TINY, RunHere

from scripts.collection.claims import Claims
from scripts.collection.folder import Collection
from scripts.collection.shards import read_manifest
from scripts.core.errors import BundleError, find_bundle_error
from scripts.core.tables import read_table
from scripts.measuring.labelling import Labeller
from scripts.sampling.saving import SampleSaver


@pytest.fixture
def refused(run_here: RunHere, bundle_copy: Path) -> Callable[..., str]:
    """Runs `collection make` and returns the line in which it was refused."""

    def run(folder: Path, **more: Any) -> str:
        with pytest.raises(Exception) as caught:
            make(run_here, bundle_copy, folder, **more)
        return str(find_bundle_error(caught.value))

    return run


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


def test_shards_hold_what_sample_makes_of_the_same_table(
    made_collection: Path, run_here: RunHere, bundle_copy: Path, tmp_path: Path
) -> None:
    given = {**flags(bundle_copy), "conditions_table": str(made_collection / "rows.tsv"), "output_dir": str(tmp_path)}
    run_here([BASE, TINY], **given)
    rows = read_table(made_collection / "rows.tsv")
    for number, shard in enumerate(("shard-00000", "shard-00001")):
        with tarfile.open(made_collection / "shards" / f"{shard}.tar") as tar:
            found = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
            assert {(info.mtime, info.uid, info.uname, info.mode) for info in tar} == {(0, 0, "", 0o644)}
        for index in range(3 * number, min(3 * number + 3, 5)):
            name, seed = f"sub-{index:06d}", rows[index]["seed"]
            own = tmp_path / f"sample_seed-{seed}_{index:06d}.nii.gz"
            assert found[f"{name}.nii.gz"] == own.read_bytes()
            stated, sampled = (
                json.loads(found[f"{name}.json"]),
                json.loads(own.with_suffix("").with_suffix(".json").read_text()),
            )
            for key in set(sampled) - {"files", "request"}:
                assert stated[key] == sampled[key], key
            assert set(stated["files"]) == {f"{name}.nii.gz", f"{name}.seg.nii.gz"}


def test_a_manifest_says_what_its_tar_holds(made_collection: Path) -> None:
    manifest = read_manifest(made_collection / "shards" / "shard-00001.json")
    with tarfile.open(made_collection / "shards" / "shard-00001.tar") as tar:
        assert {info.name: (info.size, info.offset_data) for info in tar} == {
            name: (member["bytes"], member["offset"]) for name, member in manifest["members"].items()
        }
    assert [row["participant_id"] for row in manifest["rows"]] == ["sub-000003", "sub-000004"]
    assert all(row["tries"] == 1 and row["accepted"] for row in manifest["rows"])
    assert manifest["facts"] == json.loads((made_collection / "facts.json").read_text())


def test_what_an_interruption_leaves_is_taken_over_to_the_same_bytes(
    made_collection: Path, run_here: RunHere, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, written = tmp_path / "set", list[int]()
    draw(run_here, folder)
    save = SampleSaver.save

    def failing(self: SampleSaver, *arguments: Any) -> None:
        if len(written) == 4:
            raise BundleError("cannot write: No space left on device")
        written.append(arguments[1])
        save(self, *arguments)

    def counting(self: SampleSaver, *arguments: Any) -> None:
        written.append(arguments[1])
        save(self, *arguments)

    monkeypatch.setattr(SampleSaver, "save", failing)
    with pytest.raises(Exception) as caught:
        make(run_here, bundle_copy, folder, labels=1, batch_size=2)
    assert "No space left" in str(find_bundle_error(caught.value))
    assert sorted(shards(folder)) == ["shard-00000.json", "shard-00000.tar"]
    monkeypatch.setattr(SampleSaver, "save", counting)
    make(run_here, bundle_copy, folder, labels=1)
    assert len(written) == len(set(written)) == 5, "no row is made twice"
    assert shards(folder) == shards(made_collection)
    assert not (folder / "claims").exists() and not any((folder / "work").iterdir())


def test_a_start_after_the_end_makes_nothing(
    made_collection: Path, run_here: RunHere, bundle_copy: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made_collection, tmp_path / "set"))
    for tar in folder.glob("shards/*.tar"):
        tar.unlink()  # a start reads the names of manifests alone
    make(run_here, bundle_copy, folder, labels=1)
    assert not any(folder.glob("shards/*.tar"))


OTHERS = [
    ({"num_inference_steps": 3}, "made with num_inference_steps 2, and this is 3"),
    ({"labels": 0}, "made with labels::sha256"),
    ({"conditions::age::maximum": 90}, "drawn with conditions::age::maximum 82, and this is 90"),
    ({"grid::spacing": [-4.0, 4.0, 4.0]}, "made with grid::affine"),
    ({"autoencoder_path": "other.pt"}, "made with weights::autoencoder::"),
    ({"labels": 0, "accept": {"ventricular_vol_mm3": 0.1}}, "--accept compares what is measured"),
    ({"accept": {"age_years": 0.1}}, "'age_years' is none of what is asked for and measured"),
    ({"accept": {"brain_vol_mm3": 0.1}}, "made with accept"),
]


@pytest.mark.parametrize(("changed", "says"), OTHERS)
def test_a_folder_of_other_facts_is_refused_by_the_fact(
    changed: dict[str, Any],
    says: str,
    made_collection: Path,
    refused: Callable[..., str],
    bundle_copy: Path,
    tmp_path: Path,
) -> None:
    if "autoencoder_path" in changed:
        import torch

        weights = torch.load(bundle_copy / "models" / "tiny_autoencoder.pt", weights_only=True, map_location="cpu")
        torch.save({name: value + 0.01 for name, value in weights.items()}, tmp_path / "other.pt")
        changed = {"autoencoder_path": str(tmp_path / "other.pt")}
    folder = Path(shutil.copytree(made_collection, tmp_path / "set"))
    assert says in refused(folder, **{"labels": 1, **changed})
    assert shards(folder) == shards(made_collection)


def test_making_needs_a_table(refused: Callable[..., str], tmp_path: Path, run_here: RunHere) -> None:
    assert "draw one first" in refused(tmp_path / "nothing")
    draw(run_here, tmp_path / "set")
    with open(tmp_path / "set" / "rows.tsv", "a") as table:
        table.write("sub-000005\tmale\t60\t50000\t1400000\t1\n")
    assert "is not the table that was drawn" in refused(tmp_path / "set")


def test_rows_are_drawn_anew_until_they_are_accepted_and_tries_are_counted(
    run_here: RunHere, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(self: Labeller, stem: str) -> dict[str, float] | None:
        Path(f"{stem}_dseg.nii.gz").write_bytes(Path(f"{stem}.nii.gz").read_bytes())
        position = int(stem[-6:])
        tried = calls.setdefault(position, [])
        tried.append(stem)
        return {"ventricular_vol_mm3": wanted[position]} if len(tried) > position else None

    calls: dict[int, list[str]] = {}
    draw(run_here, tmp_path / "set", num_rows=3)
    wanted = [1.05 * float(row["ventricular_vol_mm3"]) for row in Collection(tmp_path / "set").rows(range(3))]
    monkeypatch.setattr(Labeller, "label", measured)
    make(run_here, bundle_copy, tmp_path / "set", labels=1, accept={"ventricular_vol_mm3": 0.1}, max_tries=2)
    rows = read_manifest(tmp_path / "set" / "shards" / "shard-00000.json")["rows"]
    assert [(row["tries"], row["accepted"]) for row in rows] == [(1, True), (2, True), (2, False)]
    seeds = [int(row["seed"]) for row in Collection(tmp_path / "set").rows(range(3))]
    assert [row["seed"] == seed for row, seed in zip(rows, seeds)] == [True, False, False]


def test_a_dry_run_makes_nothing_and_says_how_long(
    run_here: RunHere, bundle_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw(run_here, tmp_path / "set")
    with caplog.at_level(logging.INFO):
        make(run_here, bundle_copy, tmp_path / "set", dry_run=1, dry_rows=2, workers=2)
    assert "5 rows in 2 shards are left" in caplog.text and "hours of 2 (1 shards each)" in caplog.text
    assert not Collection(tmp_path / "set").facts and not any((tmp_path / "set" / "work").iterdir())
    assert not list((tmp_path / "set").glob(".dry-*"))


def test_torchrun_is_refused(
    refused: Callable[..., str], run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(run_here, tmp_path / "set")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in refused(tmp_path / "set")


def test_a_part_is_one_processs_until_that_is_gone_or_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Claims(tmp_path, 60.0), Claims(tmp_path, 0.2)
    lease = one.take("part")
    assert lease is not None and lease.holds() and other.take("part") is None and other.take("free") is not None
    time.sleep(0.3)
    taken = other.take("part")  # it was not touched while the other looked
    assert taken is not None and taken.holds() and not lease.holds()
    lease.release()
    assert taken.holds(), "who has lost a part does not release it for the other"
    taken.release()
    gone = one.take("part")
    assert gone is not None
    stated = json.loads((tmp_path / "part").read_text())
    (tmp_path / "part").write_text(json.dumps({**stated, "process": 2**22 + 1}))
    assert Claims(tmp_path, 600.0).take("part") is not None, "a process of this machine that is gone"
    gone.release()


def test_a_lease_that_lives_is_not_taken_over(tmp_path: Path) -> None:
    lease = Claims(tmp_path, 0.5).take("part")
    waiting = Claims(tmp_path, 0.5)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        assert waiting.take("part") is None
        time.sleep(0.1)
    assert lease is not None and lease.holds()
    lease.release()
    assert waiting.take("part") is not None
