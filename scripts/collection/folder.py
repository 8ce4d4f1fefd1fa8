# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The folder of a collection: its table of rows, its facts, its shards, and what a start reads of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import file_hash, parse_json, write_json
from scripts.core.tables import read_text

ROWS, DRAWN, FACTS = "rows.tsv", "rows.json", "facts.json"
SHARDS, CLAIMS, WORK = "shards", "claims", "work"
MANIFEST = re.compile(r"shard-(\d{5,})\.json")
IDENTIFIER = "participant_id"
SEPARATOR = "::"
INCIDENTAL = ("tf32",)
"""Facts that count only where both sides state them: a CPU has no TF32."""


def row_name(index: int) -> str:
    """The name of a row, from 0: its `participant_id`, and what its files' names begin with."""
    return f"sub-{index:06d}"


def shard_name(shard: int) -> str:
    """The name of a shard, from 0, without the ending of a file."""
    return f"shard-{shard:05d}"


class Collection:
    """A folder with the table of all rows (`rows.tsv`, described by `rows.json`), and the shards that are made of it.

    A shard is a tar and a manifest in `shards/`. The manifest is written last: a shard that has one is done.

    Args:
        path: the folder; need not be there yet.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(str(path))
        self.shards = self.path / SHARDS

    @property
    def is_drawn(self) -> bool:
        """Whether there is a table of rows."""
        return (self.path / DRAWN).is_file()

    @cached_property
    def drawn(self) -> dict[str, Any]:
        """What is known of the table: its law, seed, number of rows, rows a shard, conditions, hash.

        Raises:
            BundleError: if there is none, or it is damaged.
        """
        if not self.is_drawn:
            raise BundleError(
                f"--collection_dir {self.path} has no table of rows: draw one first (`python -m scripts "
                "collection draw`)"
            )
        return read_map(self.path / DRAWN)

    def __len__(self) -> int:
        return int(self.drawn["rows"])

    @property
    def num_shards(self) -> int:
        """How many shards the rows make."""
        return -(-len(self) // self.rows_per_shard)

    @property
    def rows_per_shard(self) -> int:
        """Rows of each shard; the last one may have fewer."""
        return int(self.drawn["rows_per_shard"])

    def indices(self, shard: int) -> range:
        """The numbers of a shard's rows."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, len(self)))

    def rows(self, indices: Iterable[int]) -> list[dict[str, str]]:
        """Rows of the table, from column to text.

        Raises:
            BundleError: if the table is not the one that was drawn.
        """
        header, lines = self._lines
        return [dict(zip(header, lines[index].split("\t"), strict=True)) for index in indices]

    @cached_property
    def _lines(self) -> tuple[list[str], list[str]]:
        path = self.path / ROWS
        if file_hash(path) != self.drawn["sha256"]:
            raise BundleError(f"{path} is not the table that was drawn: its hash is not that of {DRAWN}; draw it anew")
        header, *lines = read_text(path, "table").splitlines()
        return header.split("\t"), lines

    def check_conditions(self, conditions: Conditions) -> None:
        """Refuse a model whose conditions, or their ranges, are not those of the table.

        Raises:
            BundleError: naming the first that differs.
        """
        own = {"conditions": conditions.as_dict()}
        refuse_other_facts({"conditions": self.drawn["conditions"]}, own, self.path, "drawn")

    def done(self) -> set[int]:
        """Shards that are done, by the names of their manifests."""
        if not self.shards.is_dir():
            return set()
        return {int(found[1]) for entry in os.scandir(self.shards) if (found := MANIFEST.fullmatch(entry.name))}

    def missing(self) -> list[int]:
        """Shards that are not done."""
        done = self.done()
        return [shard for shard in range(self.num_shards) if shard not in done]

    def tar(self, shard: int) -> Path:
        """Where a shard's volumes are."""
        return self.shards / f"{shard_name(shard)}.tar"

    def manifest(self, shard: int) -> Path:
        """Where a shard's manifest is."""
        return self.shards / f"{shard_name(shard)}.json"

    def work(self, shard: int) -> Path:
        """Where a shard's volumes are made: who takes it over goes on there."""
        return self.path / WORK / shard_name(shard)

    @property
    def facts(self) -> dict[str, Any]:
        """What all shards have in common; empty before the first is made."""
        path = self.path / FACTS
        return read_map(path) if path.is_file() else {}

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """State what all shards have in common."""
        write_json(self.path / FACTS, facts)


def read_map(path: Path) -> dict[str, Any]:
    """The map in a JSON file.

    Raises:
        BundleError: if there is none, or it is damaged.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is damaged or gone ({error})") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} is damaged: it holds no map")
    return content


def other_facts(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, found and wanted value of each fact that differs, parts of maps with `::`; None for one that is lacking."""
    one, other = dict(_leaves(found)), dict(_leaves(wanted))
    for name in dict.fromkeys([*one, *other]):
        both = name in one and name in other
        if one.get(name) != other.get(name) and (both or name not in INCIDENTAL):
            yield name, one.get(name), other.get(name)


def refuse_other_facts(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path, verb: str) -> None:
    """Refuse to go on with other facts than those of a folder.

    Raises:
        BundleError: naming the first fact that differs.
    """
    for name, was, now in other_facts(found, wanted):
        raise BundleError(
            f"--collection_dir {where} was {verb} with {name} {_short(was)}, and this is {_short(now)}: give what was "
            "given then, or another folder"
        )


def _leaves(facts: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}{SEPARATOR}")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
