# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Collections of few and tiny volumes."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import BASE, SMALLEST, TINY, RunHere

from scripts.collection.shards import SEAL, Member, pack, seal_of
from scripts.core.files import file_hash

DRAW, MAKE, CHECK = (f"configs/collection_{verb}.yaml" for verb in ("draw", "make", "check"))


def flags(bundle: Path) -> dict[str, Any]:
    """What samples quickly."""
    return {"bundle_root": str(bundle), "num_inference_steps": 2, "batch_size": 1, **SMALLEST}


def draw(run_here: RunHere, folder: Path, **more: Any) -> None:
    """Draw five rows, for two shards."""
    run_here([BASE, DRAW, TINY], collection_dir=str(folder), **{"num_rows": 5, "rows_per_shard": 3, **more})


def make(run_here: RunHere, bundle: Path, folder: Path, **more: Any) -> None:
    """Make its shards."""
    run_here([BASE, MAKE, TINY], collection_dir=str(folder), **{**flags(bundle), **more})


def check(run_here: RunHere, bundle: Path, folder: Path, **more: Any) -> None:
    """Check a collection with labels."""
    run_here([BASE, CHECK, TINY], collection_dir=str(folder), labels=1, **{**flags(bundle), **more})


def reseal(manifest: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as somebody does who knows how it is sealed."""
    content = json.loads(manifest.read_text())
    change(content)
    content.pop(SEAL)
    manifest.write_text(json.dumps({**content, SEAL: seal_of(content)}))


def repack(shard: Path, change: Callable[[dict[str, bytes]], object]) -> None:
    """Change what a tar holds, and write the manifest that fits it."""
    with tarfile.open(shard) as tar:
        found = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    change(found)
    members = pack(shard, [Member(name, content) for name, content in found.items()])
    stated = {"members": members, "bytes": shard.stat().st_size, "sha256": file_hash(shard)}
    reseal(shard.with_suffix(".json"), lambda content: content.update(stated))
