# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The verb `collection check`: what is damaged, missing, doubled, foreign or not what would be made anew."""

from __future__ import annotations

import hashlib
import json
import logging
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from scripts.collection.drawing import seed_of_try
from scripts.collection.folder import FACTS, IDENTIFIER, MANIFEST, Collection, other_facts, row_name, shard_name
from scripts.collection.making import MadeRow, ShardMaker
from scripts.collection.shards import LABEL_MAP, SIDECAR, VOLUME, read_manifest, read_member
from scripts.conditions.conditions import Conditions
from scripts.core.config import choose
from scripts.core.errors import BundleError
from scripts.core.files import file_hash, parse_json, write_json, write_text
from scripts.core.options import number, whole_number
from scripts.core.pages import render
from scripts.sampling.requests import SEED
from scripts.sampling.saving import FILES
from scripts.volumes.nifti import read_volume

logger = logging.getLogger(__name__)

REPORT, PAGE = "check.json", "check.html"
BLOCK = 1 << 22


class Fault(NamedTuple):
    """What is wrong: its kind, the file or row, and what to know of it."""

    kind: str
    where: str
    says: str


class CollectionCheck:
    """Reads a collection whole, compares all that it states, and makes a few rows anew.

    Args:
        collection: which.
        conditions: of the model.
        maker: what makes rows anew: a name for `scripts.core.config.choose`, built only if it is needed.
        entry: where the maker stands in the configuration.
        remake: how many rows are made anew, drawn at random; 0 needs no weights.
        tolerance: largest difference of an intensity, 0 to 1, where another kind of machine makes other bits.
        seed: of the rows that are drawn; None for 0.
    """

    def __init__(
        self,
        collection: Collection,
        conditions: Conditions,
        maker: str = "shards",
        entry: str = "@makers::{name}",
        remake: Any = 3,
        tolerance: Any = 0.02,
        seed: Any = None,
    ) -> None:
        self.collection, self.conditions = collection, conditions
        self._maker = maker, entry
        self.remake = whole_number(remake, "remake")
        self.tolerance = number(tolerance, "tolerance", 0.0, 1.0)
        self.seed = whole_number(0 if seed is None else seed, "seed")
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        self._shard_of: dict[str, int] = {}
        self._row_of: dict[str, str] = {}
        self.tries: dict[int, int] = {}

    def run(self) -> None:
        """Check, and write `check.json` and the page `check.html` into the collection's folder.

        Raises:
            BundleError: if there is a fault, after all were looked for.
        """
        self.collection.check_conditions(self.conditions)
        self.collection.rows([])  # a table that is not the drawn one ends it: nothing could be compared
        self.faults += self._of_folder()
        for shard in tqdm(sorted(self.collection.done()), "checking", unit="shard", disable=None):
            if shard < self.collection.num_shards:
                self.faults += self._of_shard(shard)
        if self.remake:
            self.faults += self._of_remade()
        self._report()
        if self.faults:
            first = self.faults[0]
            raise BundleError(
                f"{len(self.faults)} faults in {self.collection.path}: {first.where}: {first.says}"
                f"{' (the first)' * (len(self.faults) > 1)}; all are in {self.collection.path / PAGE}"
            )
        logger.info(f"no fault in {len(self._shard_of)} rows: {self.collection.path / PAGE}")

    # The folder.

    def _of_folder(self) -> Iterator[Fault]:
        for shard in self.collection.missing():
            yield Fault(
                "missing shard",
                shard_name(shard),
                f"has no manifest: its {len(self.collection.indices(shard))} rows are not made",
            )
        known = {self.collection.tar(shard).name for shard in range(self.collection.num_shards)}
        for path in sorted(self.collection.shards.glob("*")) if self.collection.shards.is_dir() else []:
            found = MANIFEST.fullmatch(path.name)
            own = path.name in known or (found is not None and int(found[1]) < self.collection.num_shards)
            if not own and not path.name.startswith("."):
                yield Fault("foreign file", path.name, "is no shard of this collection")

    # One shard.

    def _of_shard(self, shard: int) -> Iterator[Fault]:
        path, tar = self.collection.manifest(shard), self.collection.tar(shard)
        try:
            manifest = read_manifest(path)
        except BundleError as error:
            yield Fault("damaged manifest", path.name, str(error))
            return
        for name, found, wanted in other_facts(manifest.get("facts", {}), self.collection.facts):
            yield Fault("other facts", path.name, f"was made with {name} {found}, the collection with {wanted}")
        yield from self._of_rows(shard, manifest.get("rows", []), path.name)
        if manifest.get("tar") != tar.name:
            yield Fault("foreign shard", path.name, f"is the manifest of {manifest.get('tar')}")
        elif not tar.is_file():
            yield Fault("missing tar", tar.name, "is not there")
        elif tar.stat().st_size != manifest["bytes"]:
            yield Fault(
                "tar of another size", tar.name, f"has {tar.stat().st_size} bytes instead of {manifest['bytes']}"
            )
        else:
            yield from self._of_tar(tar, manifest)

    def _of_rows(self, shard: int, rows: Sequence[Mapping[str, Any]], where: str) -> Iterator[Fault]:
        wanted = {row[IDENTIFIER]: row for row in self.collection.rows(self.collection.indices(shard))}
        for row in rows:
            name, cells = str(row.get(IDENTIFIER)), wanted.pop(str(row.get(IDENTIFIER)), None)
            if name in self._shard_of:
                yield Fault(
                    "doubled row", name, f"is in {where} and in {shard_name(self._shard_of[name])}, or twice in one"
                )
            elif cells is None:
                yield Fault("foreign row", name, f"is in {where}, and does not belong there")
            else:
                self._shard_of[name] = shard
                self.tries[row["tries"]] = self.tries.get(row["tries"], 0) + 1
                yield from self._of_row(name, row, cells)
        for name in wanted:
            yield Fault("missing row", name, f"is not in {where}")

    def _of_row(self, name: str, row: Mapping[str, Any], cells: Mapping[str, str]) -> Iterator[Fault]:
        for column in cells.keys() - {SEED}:
            if row.get(column) != cells[column]:
                yield Fault(
                    "row of another law", name, f"has {column} {row.get(column)}, and was drawn with {cells[column]}"
                )
        if row.get(SEED) != seed_of_try(int(cells[SEED]), row["tries"] - 1):
            yield Fault(
                "row of another seed", name, f"has the seed {row.get(SEED)}, which is not of its try {row['tries']}"
            )

    def _of_tar(self, tar: Path, manifest: Mapping[str, Any]) -> Iterator[Fault]:
        if file_hash(tar) != manifest["sha256"]:
            yield Fault("damaged tar", tar.name, "has another hash than its manifest states")
        stated, hashes = manifest["members"], {}
        sidecars: dict[str, Any] = {}
        try:
            with tarfile.open(tar) as opened:
                for info in opened:
                    if info.name in hashes:
                        yield Fault("doubled member", info.name, f"is twice in {tar.name}")
                    content = opened.extractfile(info)
                    hashes[info.name] = _hash(content)
                    if info.name.endswith(f".{SIDECAR}"):
                        sidecars[info.name] = parse_json(
                            read_member(tar, {"offset": info.offset_data, "bytes": info.size}).decode()
                        )
        except (tarfile.TarError, OSError, ValueError) as error:
            yield Fault("damaged tar", tar.name, f"cannot be read: {error}")
        for name in dict.fromkeys([*stated, *hashes]):
            if stated.get(name, {}).get("sha256") != hashes.get(name):
                what = (
                    "is not there"
                    if name not in hashes
                    else "is not in the manifest"
                    if name not in stated
                    else "is not what the manifest states"
                )
                yield Fault("damaged member", name, f"{what}, in {tar.name}")
        for row in manifest["rows"]:
            yield from self._of_sidecar(row, sidecars.get(f"{row[IDENTIFIER]}.{SIDECAR}"), hashes)

    def _of_sidecar(self, row: Mapping[str, Any], sidecar: Any, hashes: Mapping[str, str]) -> Iterator[Fault]:
        name = row[IDENTIFIER]
        if not isinstance(sidecar, dict):
            yield Fault("missing sidecar", name, "has no sidecar")
            return
        for file, stated in sidecar.get(FILES, {}).items():
            if hashes.get(file) != stated["sha256"]:
                kind = "label map" if file.endswith(LABEL_MAP) else "volume" if file.endswith(VOLUME) else "file"
                yield Fault(
                    f"{kind} of another row", file, f"is not the one that the sidecar of {name} was written for"
                )
        wanted = {
            IDENTIFIER: name,
            SEED: row[SEED],
            **{key: self.collection.facts.get(key) for key in ("weights", "grid", "dtype")},
        }
        for key, found, expected in other_facts({key: sidecar.get(key) for key in wanted}, wanted):
            yield Fault("sidecar of other facts", name, f"states {key} {found} instead of {expected}")
        asked = self.conditions.in_both_units(self.conditions.from_request(row, f" of {name}", warn=False))
        for key, found, expected in other_facts(sidecar.get("conditions", {}), asked):
            yield Fault("row of another law", name, f"was sampled with {key} {found}, and drawn with {expected}")
        volume = hashes.get(f"{name}.{VOLUME}", "")
        if volume and self._row_of.setdefault(volume, name) != name:
            yield Fault("copy", name, f"has the very volume of {self._row_of[volume]}")

    # Rows made anew.

    def _of_remade(self) -> Iterator[Fault]:
        names = sorted(self._shard_of)
        if not names:
            return
        maker: ShardMaker = choose(*self._maker, "maker")
        others = list(other_facts(self.collection.facts, maker.facts()))
        for name, found, wanted in others:
            yield Fault(
                "other facts", FACTS, f"the collection was made with {name} {found}, and this would be {wanted}"
            )
        if others:
            return
        count = min(self.remake, len(names))
        chosen = sorted(np.random.default_rng(self.seed).choice(len(names), count, replace=False).tolist())
        indices = [int(names[number].removeprefix("sub-")) for number in chosen]
        with tempfile.TemporaryDirectory(dir=self.collection.path, prefix=".check-") as folder:
            for row in maker.samples(indices, Path(folder)):
                yield from self._of_anew(row, maker, Path(folder))

    def _of_anew(self, row: MadeRow, maker: ShardMaker, folder: Path) -> Iterator[Fault]:
        name = row_name(row.number)
        shard = self._shard_of[name]
        members = read_manifest(self.collection.manifest(shard))["members"]
        for member in maker.members(row):
            if member.name not in members:
                yield Fault("not what is made anew", member.name, "is lacking")
            elif not isinstance(member.content, bytes):
                kept = read_member(self.collection.tar(shard), members[member.name])
                if kept != member.content.read_bytes():
                    yield from self._of_difference(member.name, kept, member.content, folder)

    def _of_difference(self, name: str, kept: bytes, made: Path, folder: Path) -> Iterator[Fault]:
        if not name.endswith(f".{VOLUME}") or name.endswith(f".{LABEL_MAP}"):
            yield Fault("not what is made anew", name, "differs from the one that is made anew")
            return
        path = folder / "kept.nii.gz"
        path.write_bytes(kept)
        try:
            difference = float(np.abs(read_volume(path) - read_volume(made)).max())
        except BundleError as error:
            yield Fault("not what is made anew", name, str(error))
            return
        if difference > self.tolerance:
            yield Fault(
                "not what is made anew", name, f"differs by up to {difference:.3g} from the one that is made anew"
            )
        else:
            self.notes.append(f"{name} differs by up to {difference:.3g} from the one that is made anew")

    # The page.

    def _report(self) -> None:
        content: dict[str, Any] = {
            "collection": str(self.collection.path),
            "rows": len(self.collection),
            "rows_made": len(self._shard_of),
            "shards": self.collection.num_shards,
            "made_anew": min(self.remake, len(self._shard_of)),
            "tries": {str(tried): self.tries[tried] for tried in sorted(self.tries)},
            "faults": [fault._asdict() for fault in self.faults],
            "notes": self.notes,
        }
        write_json(self.collection.path / REPORT, content)
        write_text(
            self.collection.path / PAGE,
            render("collection.html", **content, facts=json.dumps(self.collection.facts, indent=1)),
        )


def _hash(content: Any) -> str:
    digest = hashlib.sha256()
    while content is not None and (block := content.read(BLOCK)):
        digest.update(block)
    return digest.hexdigest()
