# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The datasheet of a collection, and its card for the Hugging Face Hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from scripts.collection.folder import Collection

SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (float("inf"), "n>1M"))
USES = """\
## What it must not be used for

- No volume shows a person. None is for diagnosis, nor for any decision on people.
- It knows what the model's training data knew: their scanners, ages, ancestry and health. It says nothing of others.
- Conditions are what was asked for, and not what a volume shows: compare them with what is measured.
- Samples can resemble training scans. Before passing it on, look for near copies (`evaluate --training_dir`).
- Finding associations in it finds those of the model and of the law below, and not those of people.
"""


def datasheet(collection: Collection, manifests: Mapping[int, Mapping[str, Any]]) -> str:
    """Markdown that says what a collection is, how it was made, and what it must not be used for.

    Args:
        collection: which.
        manifests: of its shards, for the counts of tries; empty to leave them out.
    """
    drawn, facts = collection.drawn, collection.facts
    parts = [
        "# Synthetic T1-weighted heads\n",
        f"{len(collection)} rows were drawn, in {collection.num_shards} shards. Each is a sample of a generative model "
        "with its conditions, its seed and its checksum. Volumes are on one grid in MNI152 space, intensities 0 to "
        "1.\n",
        USES,
        "## How it was made\n",
        _list({"seed of the table": drawn["seed"], **_plain("law", drawn["law"]), "strata": drawn["strata"] or "none"}),
        "| condition | unit | training range | drawn | outside |\n|---|---|---|---|---|",
        *(_condition(name, words) for name, words in drawn["columns"].items()),
        "",
        _list({key: value for key, value in facts.items() if key not in ("law", "strata", "conditions", "seed")}),
        *_tries(manifests),
    ]
    return "\n".join(parts)


def _plain(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name if key == name else f"{name}: {key}": value for key, value in facts.items()}


def _list(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: `{value}`" for name, value in facts.items()) + "\n"


def _condition(name: str, words: Mapping[str, Any]) -> str:
    if "Levels" in words:
        drawn = ", ".join(f"{word}: {count}" for word, count in words["Levels"].items())
        return f"| {name} | | {', '.join(words['Levels'])} | {drawn} | 0 |"
    ranges = [f"{low:.7g} to {high:.7g}" for low, high in (words["TrainingRange"], words["Drawn"])]
    return f"| {name} | {words['Units']} | {ranges[0]} | {ranges[1]} | {words['Outside']} |"


def _tries(manifests: Mapping[int, Mapping[str, Any]]) -> list[str]:
    rows = [row for manifest in manifests.values() for row in manifest["rows"]]
    if not rows:
        return []
    tries = Counter(row["tries"] for row in rows)
    refused = sum(not row["accepted"] for row in rows)
    lines = [f"- {tries[tried]} rows: sample {tried}" for tried in sorted(tries)]
    return [
        "## Tries\n",
        f"{len(rows)} rows are here. {refused} had all their tries without being accepted.\n",
        *lines,
        "",
    ]


def hub_card(collection: Collection, manifests: Mapping[int, Mapping[str, Any]], table: str) -> str:
    """The datasheet under the front matter that the Hub reads: tags, size, and where the data lie.

    Args:
        collection, manifests: see `datasheet`.
        table: name of the table of rows.
    """
    count = sum(len(manifest["rows"]) for manifest in manifests.values())
    front = {
        "pretty_name": "Synthetic T1-weighted heads",
        "license": "other",
        "tags": ["medical", "mri", "brain", "synthetic", "webdataset"],
        "size_categories": [next(name for most, name in SIZES if count < most)],
        "configs": [
            {"config_name": "volumes", "data_files": "data/*.tar", "default": True},
            {"config_name": "rows", "data_files": table},
        ],
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{datasheet(collection, manifests)}"
