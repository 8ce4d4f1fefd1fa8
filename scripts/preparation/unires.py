# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Super-resolution of a scan by UniRes, where its command is installed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.core.errors import BundleError
from scripts.core.programs import find_program, run_program
from scripts.volumes.scans import Scan, load_scan, write_scan

SOURCE = "install UniRes 0.3, https://github.com/brudfors/UniRes, and put its command on the PATH"
OWN_OPTIONS = ("--vx", "--dir_out", "--prefix", "--device")


class UniRes:
    """The command `unires` (Brudfors et al. 2018, 2019), which denoises a scan and brings it to isotropic voxels.

    The scan stays where it is: UniRes fits nothing to its atlas here, and the registration to the template comes
    after it. (Its `--common_output` aligns to the atlas of NITorch, but does not tell by what motion, and in 0.3
    the command drops `--atlas_rigid`, so that it would change the head's size.)

    Args:
        command: name of the program, or its path.
        device: `cuda` or `cpu`, as UniRes understands it; it takes the CPU where there is no GPU.
        voxel: side of the voxels that it writes, in mm.
        options: further options of the command, such as `--reg_scl 10`.

    Raises:
        BundleError: if an option is one that is set here, or the voxel is not positive.
    """

    def __init__(
        self, command: str = "unires", device: str = "cuda", voxel: float = 1.0, options: Sequence[str] = ()
    ) -> None:
        taken = [option for option in options if str(option).split("=")[0] in (*OWN_OPTIONS, "--common_output")]
        if taken:
            raise BundleError(f"unires: the option {taken[0]} cannot be given: it is set by the preparation")
        if voxel <= 0:
            raise BundleError(f"unires: the voxel must be larger than 0 mm, got {voxel:g}")
        self.command, self.device, self.voxel = command, device, float(voxel)
        self.options = [str(option) for option in options]

    def __call__(self, scan: Scan) -> Scan:
        """The scan at isotropic voxels, in the same world millimetres.

        Raises:
            BundleError: if the program is not there, fails, or writes no scan.
        """
        program = find_program(self.command, SOURCE)
        with tempfile.TemporaryDirectory(prefix="unires-") as folder:
            raw = write_scan(Path(folder) / "scan.nii.gz", scan)
            settings = ["--vx", f"{self.voxel:g}", "--dir_out", folder, "--prefix", "u_", "--device", self.device]
            found = Path(folder) / f"u_{raw.name}"
            run_program([program, *settings, *self.options, str(raw)], found)
            return load_scan(found)
