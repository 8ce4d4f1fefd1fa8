# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Steps of the preparation that are off unless they are asked for: super-resolution, bias field, skull stripping."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.core.options import is_absent, whole_number, yes_or_no
from scripts.core.programs import find_program, run_program
from scripts.preparation.registration import as_ants_image, deterministic_ants, foreground, thinned
from scripts.preparation.skull_stripping import Stripper, TemplateStripper
from scripts.preparation.steps import Record, TargetSpace, step_settings
from scripts.volumes.scans import Scan, load_scan, write_scan

FIELD_MM = 6.0
ITERATIONS = (40, 30, 20)
SOURCE = "install UniRes 0.3, https://github.com/brudfors/UniRes, and put its command on the PATH"
OWN_OPTIONS = ("--vx", "--dir_out", "--prefix", "--device")


class SuperResolve:
    """Replaces the scan by one of finer, isotropic voxels in the same place.

    Args:
        method: name of one in `methods`; None leaves the scan as it is.
        methods: name -> a callable from `scripts.volumes.scans.Scan` to `Scan`.

    Raises:
        BundleError: if there is no such method.
    """

    def __init__(self, method: Any, methods: Mapping[str, Callable[[Scan], Scan]]) -> None:
        self.method = _chosen(method, methods, "super_resolution")
        self.function = None if self.method is None else methods[self.method]

    def check(self) -> None:
        """Whether the method's program is there, before the first scan."""
        if self.function is not None and hasattr(self.function, "check"):
            self.function.check()

    def __call__(self, record: Record) -> Record:
        """The record with its scan, if the method is on.

        Raises:
            BundleError: if the method fails.
        """
        return record if self.function is None else record.updated(scan=self.function(record.scan))

    def settings(self) -> dict[str, Any]:
        """The method and its own settings."""
        if self.function is None:
            return {"method": None}
        return {"method": self.method, **step_settings(self.function)}


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

    def check(self) -> None:
        """Raise a `BundleError` if the program is not there."""
        find_program(self.command, SOURCE)

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

    def settings(self) -> dict[str, Any]:
        """All that the command is given; without further options as the sidecars always had it."""
        options = {"options": self.options} if self.options else {}
        return {"command": self.command, "device": self.device, "voxel": self.voxel, **options}


class CorrectBiasField:
    """Divides the scan by its bias field, the slow change of brightness that the receiving coils cause.

    See `without_bias_field`.

    Args:
        enabled: whether to.
        seed: of ANTs, above 0.
    """

    def __init__(self, enabled: Any, seed: Any = 1) -> None:
        self.enabled, self.seed = yes_or_no(enabled, "bias_field"), whole_number(seed, "seed", least=1)

    def __call__(self, record: Record) -> Record:
        """The record with its scan corrected, if the step is on."""
        return record.updated(scan=without_bias_field(record.scan, self.seed)) if self.enabled else record


def without_bias_field(scan: Scan, seed: int = 1) -> Scan:
    """The scan divided by its bias field, as N4 estimates it (Tustison et al. 2010).

    The field is fitted to what is brighter than the background of the scan thinned to 6 mm, where it is as smooth as
    before, and interpolated linearly. It is 1 on average (geometrically) in this foreground.

    Args:
        scan: intensities of at least 0 in the head.
        seed: of ANTs, which with one thread makes the result the same each time.
    """
    field = bias_field(scan, seed)
    to_field = np.linalg.inv(field.affine) @ scan.affine
    fine = ndimage.affine_transform(
        field.data, to_field[:3, :3], to_field[:3, 3], scan.data.shape, order=1, mode="nearest"
    )
    return Scan((scan.data / fine).astype(np.float32), scan.affine)


def bias_field(scan: Scan, seed: int = 1) -> Scan:
    """The field by which the true brightness was multiplied, at 6 mm; positive, its geometric mean in the head 1."""
    ants = deterministic_ants(seed)
    coarse = thinned(scan, FIELD_MM)
    inside = foreground(coarse.data)
    positive = Scan(np.maximum(coarse.data, 0.0), coarse.affine)
    found = ants.n4_bias_field_correction(
        as_ants_image(positive),
        mask=as_ants_image(Scan(inside.astype(np.float32), coarse.affine)),
        shrink_factor=1,
        convergence={"iters": list(ITERATIONS), "tol": 1e-5},
        return_bias_field=True,
    ).numpy()
    return Scan((found / np.exp(np.log(found[inside]).mean())).astype(np.float32), coarse.affine)


class StripSkull:
    """Sets all but the brain to 0.

    Args:
        space: the grid.
        stripper: name of one in `strippers`; None leaves the skull on.
        strippers: name -> what makes a `scripts.preparation.skull_stripping.Stripper`; it is called in each process.
        flag: that chooses the stripper, for messages.

    Raises:
        BundleError: if there is no such stripper.
    """

    def __init__(
        self,
        space: TargetSpace,
        stripper: Any,
        strippers: Mapping[str, Callable[[], Stripper]],
        flag: str = "skull_strip",
    ) -> None:
        self.space, self.name = space, _chosen(stripper, strippers, flag)
        self.make = None if self.name is None else strippers[self.name]

    @property
    def is_off(self) -> bool:
        """Whether it leaves volumes as they are."""
        return self.make is None

    def check(self) -> None:
        """Whether the program is there that it needs, before the first scan; see `Stripper.check`."""
        if self.stripper is not None:
            self.stripper.check()

    @cached_property
    def stripper(self) -> Stripper | None:
        """The stripper, made once."""
        return None if self.make is None else self.make()

    def __call__(self, record: Record) -> Record:
        """The record with its volume stripped, if a stripper is chosen.

        Raises:
            BundleError: if the stripper fails or finds no brain.
        """
        if self.stripper is None:
            return record
        brain = self.stripper.mask(record.on_grid(), self.space.grid, record.registered().scale)
        return record.updated(volume=record.on_grid() * brain, skull_stripped=True)

    def settings(self) -> dict[str, Any]:
        """The stripper, and the hash of its weights if it has some."""
        weights = getattr(self.make, "keywords", {}).get("weights")
        there = weights is not None and Path(str(weights)).is_file()
        return {"stripper": self.name, **({"weights_sha256": file_hash(weights)} if there else {})}  # type: ignore[arg-type]


def template_stripper(space: TargetSpace, seed: int = 1) -> Stripper:
    """The stripper that needs nothing but the template."""
    return TemplateStripper(space.template, seed)


def _chosen(name: Any, known: Mapping[str, Any], flag: str) -> str | None:
    if is_absent(name):
        return None
    if str(name) not in known:
        raise BundleError(f"--{flag}: there is no '{name}'; there are {', '.join(known)}")
    return str(name)
