# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Sets of volumes that are compared with each other and share files: a set says nothing of itself."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable

from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.evaluation.measures import Measure
from scripts.evaluation.samples import FLAG, Samples
from scripts.volumes.folders import VolumeFolder

logger = logging.getLogger(__name__)

TRAINING = "training_dir"


def check_overlap(measures: Iterable[Measure], samples: Samples) -> None:
    """Warn of samples that are real volumes, training volumes or another model's samples, byte for byte.

    Args:
        measures: those that are going to be computed: only folders that one of them compares are looked at.
        samples: the models' volumes.

    Raises:
        BundleError: if all samples are training volumes: then there is nothing to search for copies.
    """
    for folder, other in _compared(measures):
        shared = _shared(folder, other)
        if shared == len(folder) and other.flag == TRAINING:
            raise BundleError(
                f"--{FLAG} and --{TRAINING} hold the same volumes ({folder.folder}, {other.folder}): the search for "
                f"copies would compare a set with itself; give a model's samples as --{FLAG}"
            )
        if shared:
            logger.warning(
                f"{shared} of the {len(folder)} volumes in {folder.folder} (--{FLAG}) are also in {other.folder} "
                f"(--{other.flag}), byte for byte: they were copied, not sampled, and what compares the two sets, as "
                "FID, says nothing of a model"
            )
    for (first, features), (second, others) in itertools.combinations(samples.sets.items(), 2):
        shared = _shared(features.folder, others.folder)
        if shared:
            logger.warning(f"the models {first} and {second} share {shared} volumes, byte for byte: is a folder wrong?")


def _compared(measures: Iterable[Measure]) -> list[tuple[VolumeFolder, VolumeFolder]]:
    """Each folder of samples with each other folder that a measure takes beside it, once."""
    found = {}
    for measure in measures:
        folders = [needed for needed in measure.inputs if isinstance(needed, VolumeFolder)]
        for folder, other in itertools.product(folders, folders):
            if folder.flag == FLAG != other.flag:
                found[id(folder), id(other)] = folder, other
    return list(found.values())


def _shared(folder: VolumeFolder, other: VolumeFolder) -> int:
    """How many files of a folder are in the other. Only files of a size that is in both are read."""
    ours, theirs = ({path: path.stat().st_size for path in one.paths} for one in (folder, other))
    sizes = set(ours.values()) & set(theirs.values())
    known = {file_hash(path) for path, size in theirs.items() if size in sizes}
    return sum(file_hash(path) in known for path, size in ours.items() if size in sizes)
