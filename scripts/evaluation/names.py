# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What measures, metrics and networks are called where people read them."""

from __future__ import annotations

from scripts.evaluation.measures import Row

NAMES = {
    "fid": "FID",
    "kid": "KID",
    "ms_ssim": "MS-SSIM",
    "four_g_r_ssim": "4-G-R-SSIM",
    "ssim": "SSIM",
    "psnr": "PSNR",
    "mae": "MAE",
    "pearson": "Pearson's r",
    "spearman": "Spearman's r",
    "medicalnet": "MedicalNet",
    "highres3dnet": "HighRes3DNet",
    "inception": "Inception",
    "cohens_d": "Cohen's d",
    "similar_regions": "share of regions with |d| < 0.2",
    "region_distance": "Wasserstein distance of regions",
    "reidentification": "re-identification",
    "copies_found": "planted copies found",
    "auc": "area under the curve",
    "tissue_age": "age by tissue",
    "brain_vol": "brain volume",
    "ventricular_vol": "ventricular volume",
}
"""Name in the configuration and in results -> name as it is written; others have blanks for underscores."""


def written(name: str) -> str:
    """A name as it is written."""
    return NAMES.get(name, name.replace("_", " "))


def row_name(row: Row) -> str:
    """The name of a figure, such as `FID (HighRes3DNet), halves` or `Pearson's r of brain volume`."""
    network = f" ({written(row.network)})" if row.network else ""
    quantity = f" of {written(row.quantity)}" if row.quantity else ""
    kind = f", {written(row.kind)}" if row.kind not in ("", "all") else ""
    return f"{written(row.metric)}{network}{quantity}{kind}"
