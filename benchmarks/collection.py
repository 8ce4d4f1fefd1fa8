# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What a collection costs besides its samples: drawing its table, a start with most of it done, packing a shard.

Each number of rows is drawn by the command; shards that are done are stand-ins, manifests of full length without their
tars, since a start reads their names alone. The start is that of `collection make` with the small model and
no time to make any: it reads weights and table, looks for what is left, and ends. One row is what any command costs.

    python -m benchmarks.collection --rows 1 100 10000 100000 --json collection.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import bundle_command, report, run
from benchmarks.measuring import machine
from scripts.collection.folder import Collection, row_name
from scripts.collection.shards import SIDECAR, VOLUME, Member, pack, write_manifest
from scripts.core.files import make_folder

FILES = ["inference.json", "collection_{}.yaml", "demo.yaml"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 100, 10_000, 100_000])
    parser.add_argument("--left", type=float, default=0.01, help="share of the shards that are not done")
    parser.add_argument("--member_bytes", type=int, default=100_000, help="of a stand-in volume of the packed shard")
    parser.add_argument("--packed", type=int, default=1000, help="rows of the packed shard")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args(arguments)
    report(lambda: measured(options), _show, options.json)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [_started(Path(folder) / str(count), count, options.left) for count in options.rows]
        packed = _packed(Path(folder), options.packed, options.member_bytes)
    return {"machine": machine(torch.device("cpu")), "starts": rows, "packing": packed}


def _started(folder: Path, count: int, left: float) -> dict[str, Any]:
    log = make_folder(folder.parent) / f"{folder.name}.log"
    drawn = run(_command("draw", collection_dir=folder, num_rows=count), log)
    collection = Collection(folder)
    done = collection.num_shards - max(1, round(left * collection.num_shards))
    for shard in range(done):
        _stand_in(collection, shard)
    before = {path.name for path in folder.rglob("*")}
    started = run(_command("make", collection_dir=folder, max_minutes=1e-9), log)
    made = {path.name for path in folder.rglob("*")} - before
    assert not [name for name in made if name.endswith(".tar")], "the start has made something"
    return {"rows": count, "shards": collection.num_shards, "done": done, "draw": drawn, "start": started}


def _command(verb: str, **flags: Any) -> list[str]:
    return bundle_command(
        [name.format(verb) for name in FILES], {**flags, "device": "cpu"} if verb == "make" else flags
    )


def _stand_in(collection: Collection, shard: int) -> None:
    rows = collection.rows(collection.indices(shard))
    one = {"bytes": 3_700_000, "sha256": "0" * 64, "offset": 0}
    members = {f"{row['participant_id']}.{ending}": one for row in rows for ending in (SIDECAR, VOLUME)}
    make_folder(collection.shards)
    collection.tar(shard).touch()
    write_manifest(collection.manifest(shard), collection.tar(shard), {"rows": rows, "members": members})


def _packed(folder: Path, count: int, size: int) -> dict[str, Any]:
    members = [Member(f"{row_name(index)}.{VOLUME}", bytes(size)) for index in range(count)]
    began = time.perf_counter()
    stated = pack(folder / "shard.tar", members)
    write_manifest(folder / "shard.json", folder / "shard.tar", {"members": stated})
    return {"rows": count, "bytes": count * size, "seconds": time.perf_counter() - began}


def _show(found: dict[str, Any]) -> None:
    for row in found["starts"]:
        figures = [
            f"{row[what][name]:.1f}" for what in ("draw", "start") for name in ("seconds", "cpu_seconds", "peak_gib")
        ]
        print(
            f"{row['rows']} rows, {row['done']} of {row['shards']} shards done: draw and start in s, s of CPU, GiB",
            *figures,
        )
    packed = found["packing"]
    print(f"packing {packed['rows']} rows: {packed['bytes'] / 1e6 / packed['seconds']:.0f} MB/s")


if __name__ == "__main__":
    main()
