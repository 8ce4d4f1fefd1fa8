# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""A collection as BIDS derivatives of at most a thousand people each, and as a dataset of the bundle."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from scripts.collection.datasheet import datasheet
from scripts.collection.folder import IDENTIFIER, Collection
from scripts.collection.shards import LABEL_MAP, SIDECAR, VOLUME, read_member
from scripts.compute.provenance import dataset_description, model_in_words
from scripts.core.errors import BundleError
from scripts.core.files import write_json
from scripts.core.tables import read_table, write_table
from scripts.measuring.segmenter import CODES
from scripts.sampling.saving import NAME
from scripts.volumes.nifti import SPACE

PEOPLE = 1000
"""Of a part: file systems and tools are slow with more folders in one."""
ENDINGS = {VOLUME: "T1w.nii.gz", SIDECAR: "T1w.json", LABEL_MAP: "dseg.nii.gz"}
REFERENCE = {"SpatialReference": SPACE}
"""In the sidecars that all volumes, and all label maps, of a part inherit."""


def write_bids(
    collection: Collection,
    manifests: Mapping[int, Mapping[str, Any]],
    rows: Iterable[Mapping[str, Any]],
    folder: Path,
    skull_stripped: bool,
) -> None:
    """Write the parts that are not there yet, and `participants.tsv` of all, with paths, for the bundle's own commands.

    Args:
        collection: whose tars are read.
        manifests: of its shards that are done.
        rows: see `scripts.collection.publishing.FinishedShards.rows`.
        folder: where to write.
        skull_stripped: whether the volumes show brains without skull and face.

    Raises:
        BundleError: if a tar is damaged, or a file cannot be written.
    """
    listed: list[dict[str, Any]] = []
    shards = _places(manifests)
    for part, people in groupby(rows, key=lambda row: int(row[IDENTIFIER].removeprefix("sub-")) // PEOPLE):
        name, own = f"part-{part:05d}", [*people]
        if not _is_there(folder / name, own):
            _write_part(collection, own, shards, folder / name, skull_stripped)
        listed += [{**_participant(row), "path": f"{name}/{volume_path(row[IDENTIFIER])}"} for row in own]
    write_table(folder / "participants.tsv", listed)


def _is_there(folder: Path, rows: list[Mapping[str, Any]]) -> bool:
    """Whether a part has been written, with these people and no others."""
    table = folder / "participants.tsv"
    return table.is_file() and [row[IDENTIFIER] for row in read_table(table)] == [row[IDENTIFIER] for row in rows]


def volume_path(name: str) -> str:
    """Where the volume of a person lies in a part."""
    return f"{name}/anat/{name}_space-{SPACE}_{ENDINGS[VOLUME]}"


def _places(manifests: Mapping[int, Mapping[str, Any]]) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """Member -> its shard, and its entry there."""
    return {name: (shard, one) for shard, manifest in manifests.items() for name, one in manifest["members"].items()}


def _write_part(
    collection: Collection,
    rows: list[Mapping[str, Any]],
    places: Mapping[str, Any],
    folder: Path,
    skull_stripped: bool,
) -> None:
    """Under another name first: a part that is there is whole."""
    aside = folder.with_name(f".making-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for row in rows:
            for path, member in _files(row[IDENTIFIER], places):
                shard, entry = places[member]
                (aside / path).parent.mkdir(parents=True, exist_ok=True)
                (aside / path).write_bytes(read_member(collection.tar(shard), entry))
        write_table(aside / "participants.tsv", [_participant(row) for row in rows])
        write_json(aside / "participants.json", _columns(collection, rows))
        write_json(aside / "dataset_description.json", dataset_description(NAME, model_in_words(collection.facts)))
        write_json(aside / f"space-{SPACE}_T1w.json", {"SkullStripped": skull_stripped, **REFERENCE})
        if any(f"{row[IDENTIFIER]}.{LABEL_MAP}" in places for row in rows):
            write_json(aside / f"space-{SPACE}_dseg.json", {"Manual": False, **REFERENCE})
            write_table(aside / "dseg.tsv", _labels())
        (aside / "README.md").write_text(datasheet(collection, {}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except OSError as error:
        raise BundleError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _files(name: str, places: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Path in the part, and member, of each file of a person."""
    for ending, suffix in ENDINGS.items():
        if f"{name}.{ending}" in places:
            yield f"{name}/anat/{name}_space-{SPACE}_{suffix}", f"{name}.{ending}"


def _participant(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("shard", "volume", "bytes", "sha256")}


def _columns(collection: Collection, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """What `participants.json` says of the columns."""
    described: dict[str, Any] = {}
    for name, words in collection.drawn["columns"].items():
        levels = {word: "" for word in words.get("Levels", {})}
        described[name] = {"Description": f"{words['Description']}, as it was asked for"}
        described[name] |= {"Units": words["Units"]} if "Units" in words else {}
        described[name] |= {"Levels": levels} if levels else {}
    described["seed"] = {"Description": "seed of the sample"}
    described["tries"] = {"Description": "which sample of the row this is: others before it were not accepted"}
    described["accepted"] = {"Description": "whether the sample fulfils the rule of acceptance"}
    for name in rows[0]:
        if name.startswith("measured_"):
            described[name] = {"Description": f"{name.removeprefix('measured_')} by the segmenter", "Units": "mm3"}
    return described


def _labels() -> list[dict[str, Any]]:
    named = {code: name for name, codes in CODES.items() for code in codes}
    return [{"index": code, "name": named[code]} for code in sorted(named)]
