# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""A collection for PyTorch, read from its shards as they are."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from scripts.collection.folder import IDENTIFIER, Collection
from scripts.collection.shards import LABEL_MAP, VOLUME, read_manifest, read_member
from scripts.volumes.nifti import read_volume
from scripts.volumes.reading import read_codes


class CollectionDataset(Dataset):
    """The rows of the shards that are done: each is read from its tar when it is asked for.

    Args:
        path: the collection's folder.

    Attributes:
        rows: what the manifests say of each: cells, seed, tries, measured volumes.

    Raises:
        BundleError: if there is no collection, or a manifest is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.collection = Collection(path)
        manifests = [
            (shard, read_manifest(self.collection.manifest(shard))) for shard in sorted(self.collection.done())
        ]
        self.rows = [row for _, manifest in manifests for row in manifest["rows"]]
        self._shards = [shard for shard, manifest in manifests for _ in manifest["rows"]]
        self._members = {name: one for _, manifest in manifests for name, one in manifest["members"].items()}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row, as PyTorch's loader makes batches of it; `rows` has all that is known of it.

        Returns:
            `image`, float32 (1, X, Y, Z) of 0 to 1; `label`, uint8 (1, X, Y, Z), where there are labels;
            `participant_id`, and the conditions by their raw names, numbers or words.

        Raises:
            BundleError: if the tar is gone or damaged.
        """
        shard, row = self._shards[index], self.rows[index]
        name = row[IDENTIFIER]
        columns = self.collection.drawn["columns"].items()
        found = {
            IDENTIFIER: name,
            **{raw: row[raw] if "Levels" in words else float(row[raw]) for raw, words in columns},
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "volume.nii.gz"
            path.write_bytes(read_member(self.collection.tar(shard), self._members[f"{name}.{VOLUME}"]))
            found["image"] = torch.from_numpy(read_volume(path))[None]
            if entry := self._members.get(f"{name}.{LABEL_MAP}"):
                path.write_bytes(read_member(self.collection.tar(shard), entry))
                found["label"] = torch.from_numpy(read_codes(path)[0].astype(np.uint8))[None]
        return found
