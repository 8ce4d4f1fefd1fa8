# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The verb `inpaint`: what lies in a mask is drawn anew, several times, to fit the rest of a head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from scripts.conditions.changes import targets_of
from scripts.conditions.conditions import Conditions, flags_or_table
from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.core.options import is_absent, whole_number, yes_or_no
from scripts.diffusion.known_regions import KnownRegionSampler
from scripts.editing.answer_files import AnswerFiles
from scripts.editing.counterfactual import OF_SAMPLERS, diffusion_family
from scripts.editing.edit_requests import PreparedHead
from scripts.editing.own_conditions import find_own
from scripts.measuring.segmenter import Segmenter
from scripts.sampling.family import ModelFamily
from scripts.sampling.requests import sample_generator
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_map, write_picture
from scripts.volumes.pictures import signed_picture, signed_strip, strip
from scripts.volumes.placing import read_on_grid

REACH_MM = 8.0
"""How far what is known is continued into what is not, as a Gaussian's standard deviation."""
SHOWN_SD = 0.2


def read_mask(path: Any, grid: Grid) -> np.ndarray:
    """A mask of the grid's shape, bool: what is 1 in its file.

    Raises:
        BundleError: if it is not there, lies on another grid, holds other values than 0 and 1, or is empty or full.
    """
    if is_absent(path):
        raise BundleError("there is nothing to inpaint: give --mask, a volume on the scan's grid that is 1 there")
    values = read_on_grid(str(path), grid, resample=False, mode="nearest")
    if not np.isin(values, (0.0, 1.0)).all():
        raise BundleError(f"{path} is no mask: it holds other values than 0 and 1")
    if not values.any() or values.all():
        what = "everything: nothing is left that the rest could fit" if values.any() else "nothing: it is 0 everywhere"
        raise BundleError(f"the mask {path} covers {what}")
    return values > 0


def continued(values: np.ndarray, missing: np.ndarray, grid: Grid) -> np.ndarray:
    """Values (X, Y, Z) with those that are missing taken from around, the nearer the more, and 0 far away."""
    sigmas = [REACH_MM / abs(step) for step in grid.spacing]
    known = (~missing).astype(np.float32)
    weights = ndimage.gaussian_filter(known, sigmas)
    around = ndimage.gaussian_filter(values * known, sigmas) / np.maximum(weights, 0.05)
    return np.where(missing, around, values).astype(np.float32)


def missing_latents(missing: np.ndarray, shape: Sequence[int]) -> Tensor:
    """Which latents (1, 1, x, y, z) see some of a mask (X, Y, Z): those over it and, of an autoencoder, beside it."""
    image = torch.from_numpy(missing.astype(np.float32))[None, None]
    seen = F.adaptive_max_pool3d(image, tuple(shape))
    return seen if tuple(shape) == missing.shape else F.max_pool3d(seen, 3, stride=1, padding=1)


class InpaintRequest:
    """One head, its mask, and under which conditions how many draws are made.

    Args:
        conditions: their flags are read from the configuration that this object stands in, as values or changes of
            what the head has; what is not given is as the head has it.
        grid: that of the model.
        scan, own, segmenter, measure, missing, resample: see `scripts.editing.edit_requests.EditRequests`.
        mask: path of the mask.
        num_samples: how many draws.
        table: is refused: one head is one command.
        seed: of the first; None is 0.

    Raises:
        BundleError: for a bad flag, scan or mask.
    """

    def __init__(
        self,
        conditions: Conditions,
        grid: Grid,
        scan: Any,
        mask: Any,
        own: Any,
        num_samples: Any,
        table: Any,
        seed: Any,
        segmenter: Callable[[], Segmenter],
        measure: Any = True,
        missing: str = "default",
        resample: Any = False,
    ) -> None:
        if is_absent(scan):
            raise BundleError("there is nothing to inpaint: give --scan, a prepared head")
        if not is_absent(table):
            raise BundleError("--conditions_table has no use here: a mask belongs to one head, which is one command")
        self.conditions, self.grid, self.mask_path = conditions, grid, Path(str(mask))
        self.draws = whole_number(4 if num_samples is None else num_samples, "num_samples", least=1)
        self.seed = whole_number(0 if seed is None else seed, "seed")
        self.mask = read_mask(mask, grid)
        measures = segmenter if yes_or_no(measure, "measure") and conditions else None
        self.head = PreparedHead(Path(str(scan)), grid, measures, yes_or_no(resample, "resample_to_grid"))
        self.head.check()
        stated = {} if is_absent(own) else dict(own)
        self.own = find_own(self.head.path, conditions, stated, lambda: self.head.measured, missing)
        wanted = flags_or_table(conditions.flags(), None, "num_samples")[0]
        targets = targets_of(conditions, wanted, self.own.vector) if wanted else [self.own.vector]
        if len(targets) > 1:
            raise BundleError("one value of each condition, please: --num_samples says how many draws are made")
        self.target = targets[0]


class Inpainter:
    """Draws what lies in a mask.

    Args:
        family: the model.
        grid: where volumes lie.
        steps, resamplings: see `scripts.diffusion.known_regions.KnownRegionSampler`.
        device: where to compute.

    Raises:
        BundleError: for a family that has no way back from volumes, or a number out of range.
    """

    def __init__(
        self, family: ModelFamily, grid: Grid, steps: Any = 25, resamplings: Any = 4, device: torch.device | str = "cpu"
    ) -> None:
        self.family, self.grid, self.device = diffusion_family(family), grid, torch.device(device)
        self.sampler = KnownRegionSampler(self.family.sampler.schedule, steps, resamplings)

    def facts(self) -> dict[str, Any]:
        """What decides a draw besides head, mask, conditions and seed, as plain data."""
        model = {name: value for name, value in self.family.facts().items() if name not in OF_SAMPLERS}
        how = {"steps": len(self.sampler.timesteps), "resamplings": self.sampler.resamplings}
        return {**model, "inpainting": {"method": "RePaint", **how}}

    def __call__(self, scan: np.ndarray, mask: np.ndarray, condition: Tensor, seeds: Sequence[int]) -> list[np.ndarray]:
        """A head for each seed, (X, Y, Z), 0..1; outside of the mask it is the scan.

        Args:
            scan: prepared, (X, Y, Z); what it has in the mask is not looked at.
            mask: bool, (X, Y, Z).
            condition: (conditions,).
            seeds: of the draws.
        """
        filled = torch.from_numpy(continued(scan, mask, self.grid))[None, None].to(self.device)
        known = self.family.encode(filled)
        missing = missing_latents(mask, known.shape[2:]).to(self.device)
        denoise = self.family.denoiser(condition[None].to(self.device))
        drawn = [self.sampler.sample(denoise, known, missing, [sample_generator(seed, 0)]) for seed in seeds]
        self.family.release()
        return [self._composed(scan, mask, self.family.decode(one)[0, 0].float().cpu().numpy()) for one in drawn]

    def _composed(self, scan: np.ndarray, mask: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """The draw in the mask, moved by what the rest is off at the border, and the scan around it."""
        return (drawn + continued(scan - drawn, mask, self.grid)).clip(0.0, 1.0).astype(np.float32)


class InpaintFolder:
    """Writes the draws, their mean and standard deviation, and a picture.

    Args:
        inpainter: draws.
        request: what is asked.
        output_dir, dtype: see `scripts.editing.answer_files.AnswerFiles`.
    """

    def __init__(self, inpainter: Inpainter, request: InpaintRequest, output_dir: str, dtype: str = "uint8") -> None:
        self.inpainter, self.request = inpainter, request
        self.files = AnswerFiles(output_dir, request.conditions, request.grid, dtype)

    def run(self) -> None:
        """Draw and write what is not there yet.

        Raises:
            BundleError: if what another request made has one of the names, or a file cannot be written.
        """
        request, stem = self.request, f"{self.request.head.name}_inpaint"
        seeds = [request.seed + number for number in range(request.draws)]
        names = [f"{stem}-seed-{seed}" for seed in seeds]
        wanted = self._wanted(seeds)
        if not self.files.is_done(stem, wanted):
            drawn = self.inpainter(request.head.volume, request.mask, request.target, seeds)
            self.files.finish(stem, wanted, self._write(stem, names, drawn, wanted))
        for name, seed in zip(names, seeds, strict=True):
            self.files.add_row(name, request.target, {"scan": str(request.head.path), "seed": seed})

    def _wanted(self, seeds: Sequence[int]) -> dict[str, Any]:
        request = self.request
        return {
            "scan": str(request.head.path),
            "scan_sha256": file_hash(request.head.path),
            "mask": str(request.mask_path),
            "mask_sha256": file_hash(request.mask_path),
            "target": request.conditions.in_both_units(request.target),
            "own_conditions_from": request.own.sources,
            "seeds": list(seeds),
            **self.files.settings(),
            **self.inpainter.facts(),
        }

    def _write(
        self, stem: str, names: Sequence[str], drawn: Sequence[np.ndarray], wanted: Mapping[str, Any]
    ) -> list[Path]:
        stated, paths = {key: value for key, value in wanted.items() if key not in ("seeds", "target")}, []
        for name, seed, volume in zip(names, wanted["seeds"], drawn, strict=True):
            paths += self.files.write(name, volume, self.request.target, {**stated, "seed": seed})
        mean, sd = np.mean(drawn, axis=0), np.std(drawn, axis=0)
        maps = {self.files.folder / f"{stem}_{what}.nii.gz": values for what, values in (("mean", mean), ("sd", sd))}
        for path, values in maps.items():
            write_map(path, values, self.request.grid)
        picture = self.files.folder / f"{stem}.png"
        write_picture(picture, self._picture(drawn, sd))
        return [*paths, *maps, picture]

    def _picture(self, drawn: Sequence[np.ndarray], sd: np.ndarray) -> np.ndarray:
        scan, mask = self.request.head.volume, self.request.mask
        rows = [("the scan", strip(scan), 0.0), ("what is drawn anew: black", strip(np.where(mask, 0.0, scan)), 0.0)]
        rows += [(f"draw {number}: made by a model", strip(one), 0.0) for number, one in enumerate(drawn[:3], start=1)]
        spread = f"standard deviation of {len(drawn)} draws, 0 to {SHOWN_SD}"
        return signed_picture([*rows, (spread, signed_strip(sd, SHOWN_SD), SHOWN_SD)])
