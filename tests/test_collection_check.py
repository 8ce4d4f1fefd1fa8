# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What `collection check` finds: each fault that is planted, by name, and none where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from collecting import check, repack, reseal
from conftest import RunHere

from scripts.core.errors import find_bundle_error


def tar(folder: Path, shard: int = 0) -> Path:
    return folder / "shards" / f"shard-{shard:05d}.tar"


def manifest(folder: Path, shard: int = 0) -> Path:
    return tar(folder, shard).with_suffix(".json")


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def swap(one: str, other: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        members[one], members[other] = members[other], members[one]

    return change


def restate(name: str, **stated: dict[str, Any]) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        found = json.loads(members[name])
        members[name] = json.dumps(
            {**found, **{k: {**found[k], **v} if isinstance(v, dict) else v for k, v in stated.items()}}
        ).encode()

    return change


def set_cell(row: int, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["rows"][row].update({name: value})


def other_maps(members: dict[str, bytes]) -> None:
    """The label maps of two rows exchanged by somebody who makes the sidecars fit."""
    names = [f"sub-00000{row}.seg.nii.gz" for row in (0, 1)]
    stated = [json.loads(members[f"sub-00000{row}.json"])["files"] for row in (0, 1)]
    swap(*names)(members)
    for row in (0, 1):
        files = {**stated[row], names[row]: stated[1 - row][names[1 - row]]}
        restate(f"sub-00000{row}.json", files=files)(members)


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a flipped byte in a tar": (lambda f: flip(tar(f)), "damaged tar", "shard-00000.tar"),
    "a flipped byte in a manifest": (lambda f: flip(manifest(f)), "damaged manifest", "shard-00000.json"),
    "a tar cut short": (
        lambda f: tar(f).write_bytes(tar(f).read_bytes()[:-512]),
        "tar of another size",
        "shard-00000.tar",
    ),
    "a tar that is gone": (lambda f: tar(f, 1).unlink(), "missing tar", "shard-00001.tar"),
    "a shard that is gone": (lambda f: manifest(f, 1).unlink(), "missing shard", "shard-00001"),
    "a shard of another collection": (
        lambda f: shutil.copy(tar(f), tar(f, 7)) and shutil.copy(manifest(f), manifest(f, 7)),
        "foreign file",
        "shard-00007.json",
    ),
    "a shard in the place of another": (
        lambda f: shutil.copy(tar(f), tar(f, 1)) and shutil.copy(manifest(f), manifest(f, 1)),
        "foreign shard",
        "shard-00001.json",
    ),
    "a doubled row": (
        lambda f: reseal(manifest(f), lambda c: c["rows"].append(c["rows"][0])),
        "doubled row",
        "sub-000000",
    ),
    "a missing row": (lambda f: reseal(manifest(f), lambda c: c["rows"].pop()), "missing row", "sub-000002"),
    "a member that is lacking": (
        lambda f: repack(tar(f), lambda m: m.pop("sub-000001.nii.gz")),
        "volume of another row",
        "sub-000001.nii.gz",
    ),
    "a shard of other weights": (
        lambda f: reseal(manifest(f, 1), lambda c: c["facts"]["weights"]["diffusion"].update(sha256="0" * 64)),
        "other facts",
        "shard-00001.json",
    ),
    "a row of other weights": (
        lambda f: repack(tar(f), restate("sub-000001.json", weights={"diffusion": {"sha256": "0"}})),
        "sidecar of other facts",
        "sub-000001",
    ),
    "a row of another law": (
        lambda f: repack(tar(f), restate("sub-000001.json", conditions={"age_years": 99.0})),
        "row of another law",
        "sub-000001",
    ),
    "a manifest of another law": (
        lambda f: reseal(manifest(f), set_cell(1, "age_years", "99")),
        "row of another law",
        "sub-000001",
    ),
    "a row of another seed": (
        lambda f: reseal(manifest(f), set_cell(2, "seed", 7)),
        "row of another seed",
        "sub-000002",
    ),
    "a label map of another volume": (
        lambda f: repack(tar(f), swap("sub-000000.seg.nii.gz", "sub-000001.seg.nii.gz")),
        "label map of another row",
        "sub-000000.seg.nii.gz",
    ),
    "a copy": (
        lambda f: repack(tar(f), lambda m: m.update({"sub-000001.nii.gz": m["sub-000000.nii.gz"]})),
        "copy",
        "sub-000001",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_name(
    fault: str, made_collection: Path, run_here: RunHere, bundle_copy: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made_collection, tmp_path / "set"))
    plant, kind, where = FAULTS[fault]
    plant(folder)
    with pytest.raises(Exception) as caught:
        check(run_here, bundle_copy, folder, remake=0)
    assert "fault" in str(find_bundle_error(caught.value))
    found = json.loads((folder / "check.json").read_text())["faults"]
    assert (kind, where) in {(one["kind"], one["where"]) for one in found}, found
    assert where in (folder / "check.html").read_text()


def test_a_whole_collection_has_no_fault_and_its_rows_are_what_is_made_anew(
    made_collection: Path, run_here: RunHere, bundle_copy: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made_collection, tmp_path / "set"))
    check(run_here, bundle_copy, folder, remake=2)
    stated = json.loads((folder / "check.json").read_text())
    assert (stated["rows_made"], stated["made_anew"], stated["faults"]) == (5, 2, []) and stated["tries"] == {"1": 5}
    assert not list(folder.glob(".check-*"))
    repack(tar(folder), other_maps)
    with pytest.raises(Exception) as caught:
        check(run_here, bundle_copy, folder, remake=5)
    assert "sub-000000.seg.nii.gz: differs from the one that is made anew" in str(find_bundle_error(caught.value))
    for changed, says in (
        ({"remake": 1, "num_inference_steps": 3}, "was made with num_inference_steps 2"),
        ({"remake": 0, "conditions::age::maximum": 90}, "was drawn with conditions::age::maximum 82"),
    ):
        with pytest.raises(Exception) as caught:
            check(run_here, bundle_copy, folder, **changed)
        assert says in str(find_bundle_error(caught.value))
