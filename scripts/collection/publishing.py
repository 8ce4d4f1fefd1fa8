# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The verb `collection export`: a collection as others read it."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.collection.bids_tree import write_bids
from scripts.collection.datasheet import datasheet, hub_card
from scripts.collection.folder import IDENTIFIER, Collection, shard_name
from scripts.collection.shards import VOLUME, read_manifest
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import make_folder, replacing, write_text
from scripts.core.options import yes_or_no
from scripts.measuring.segmenter import COLUMNS

logger = logging.getLogger(__name__)

DATASHEET, TABLE = "datasheet.md", "rows.parquet"


class FinishedShards(NamedTuple):
    """What is exported: a collection, the manifests of its shards that are done, its conditions, and what BIDS asks."""

    collection: Collection
    manifests: dict[int, dict[str, Any]]
    conditions: Conditions
    skull_stripped: bool

    def rows(self) -> Iterator[dict[str, Any]]:
        """Flat rows: cells as numbers or words, seed, tries, measured volumes, and where the volume lies."""
        for shard, manifest in self.manifests.items():
            for row in manifest["rows"]:
                yield _flat(row, shard, manifest["members"], self.conditions)


def _flat(row: Mapping[str, Any], shard: int, members: Mapping[str, Any], conditions: Conditions) -> dict[str, Any]:
    stated = {c.raw: row[c.raw] if c.codes else float(row[c.raw]) for c in conditions}
    measured = row.get("measured", {}) or dict.fromkeys(COLUMNS)
    volume = f"{row[IDENTIFIER]}.{VOLUME}"
    return {
        IDENTIFIER: row[IDENTIFIER],
        **stated,
        "seed": row["seed"],
        "tries": row["tries"],
        "accepted": row["accepted"],
        **({f"measured_{name}": value for name, value in measured.items()} if "measured" in row else {}),
        "shard": shard_name(shard),
        "volume": volume,
        "bytes": members[volume]["bytes"],
        "sha256": members[volume]["sha256"],
    }


def write_webdataset(source: FinishedShards, folder: Path) -> None:
    """The shards as they are, linked where the file system can, else copied; WebDataset reads them."""
    for shard in source.manifests:
        _link(source.collection.tar(shard), make_folder(folder) / f"{shard_name(shard)}.tar")


def write_parquet(source: FinishedShards, folder: Path) -> None:
    """One Parquet table of all rows.

    Raises:
        BundleError: if pyarrow is not installed.
    """
    arrow, parquet = _needed("pyarrow"), _needed("pyarrow.parquet")
    rows = list(source.rows())
    with replacing(make_folder(folder) / TABLE) as temporary:
        parquet.write_table(arrow.Table.from_pylist(rows), temporary)


def write_huggingface(source: FinishedShards, folder: Path) -> None:
    """The layout of a dataset on the Hugging Face Hub: a card, shards in `data/`, and the table."""
    write_webdataset(source, folder / "data")
    write_parquet(source, folder)
    write_text(folder / "README.md", hub_card(source.collection, source.manifests, TABLE))


def write_bids_parts(source: FinishedShards, folder: Path) -> None:
    """See `scripts.collection.bids_tree.write_bids`."""
    write_bids(source.collection, source.manifests, source.rows(), folder, source.skull_stripped)


FORMATS: Mapping[str, Callable[[FinishedShards, Path], None]] = {
    "bids": write_bids_parts,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "huggingface": write_huggingface,
}


class Publication:
    """Writes a collection in some formats, each into a folder of its name, with a datasheet.

    Args:
        collection: which; `collection check` should have found no fault.
        conditions: of the model.
        output_dir: where to write.
        formats: of `FORMATS`.
        partial: whether a collection that is not complete is exported.
        skull_stripped: whether the volumes show brains without skull and face, as BIDS wants to be told.

    Raises:
        BundleError: for another format.
    """

    def __init__(
        self,
        collection: Collection,
        conditions: Conditions,
        output_dir: Any,
        formats: Sequence[str],
        partial: Any = False,
        skull_stripped: Any = False,
    ) -> None:
        names = [formats] if isinstance(formats, str) else list(formats)
        for name in names:
            if name not in FORMATS:
                raise BundleError(f"--formats: '{name}' is none of {', '.join(FORMATS)}")
        self.collection, self.conditions, self.folder, self.formats = (
            collection,
            conditions,
            Path(str(output_dir)),
            names,
        )
        self.partial = yes_or_no(partial, "partial")
        self.skull_stripped = yes_or_no(skull_stripped, "skull_stripped")

    def run(self) -> None:
        """Write what is not there yet.

        Raises:
            BundleError: if shards are missing, a manifest is damaged, or a file cannot be written.
        """
        missing = self.collection.missing()
        if missing and not self.partial:
            raise BundleError(
                f"{len(missing)} of {self.collection.num_shards} shards of {self.collection.path} are not made yet: "
                "make them, or give --partial 1"
            )
        manifests = {shard: read_manifest(self.collection.manifest(shard)) for shard in sorted(self.collection.done())}
        self.collection.check_conditions(self.conditions)
        source = FinishedShards(self.collection, manifests, self.conditions, self.skull_stripped)
        for name in self.formats:
            FORMATS[name](source, make_folder(self.folder / name))
            write_text(self.folder / name / DATASHEET, datasheet(self.collection, manifests))
            logger.info(f"wrote {self.folder / name}")
        write_text(self.folder / DATASHEET, datasheet(self.collection, manifests))


def _link(source: Path, target: Path) -> None:
    there, here = target.stat() if target.is_file() else None, source.stat()
    if there is not None and (there.st_size, int(there.st_mtime)) == (here.st_size, int(here.st_mtime)):
        return
    try:
        target.unlink(missing_ok=True)
        os.link(source, target)
    except OSError:
        with replacing(target) as temporary:
            shutil.copy2(source, temporary)


def _needed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BundleError(
            f"the package {name} is not installed: pip install pyarrow (the bundle's extra `collection`)"
        ) from error
