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
