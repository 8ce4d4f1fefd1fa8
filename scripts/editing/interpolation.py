# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The verb `interpolate`: heads on the way from one head or seed to another, along a sphere of noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scripts.conditions.conditions import Conditions, flags_or_table
from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.core.options import is_absent, whole_number, yes_or_no
from scripts.editing.answer_files import AnswerFiles
from scripts.editing.counterfactual import Editor
from scripts.editing.edit_folder import FRAME_SECONDS
from scripts.editing.edit_requests import PreparedHead
from scripts.editing.own_conditions import find_own
from scripts.measuring.segmenter import Segmenter
from scripts.sampling.requests import sample_generator
from scripts.volumes.grid import Grid
from scripts.volumes.pictures import strip, write_film

WHAT = "interpolate between two of what? Give --scans \"['a.nii.gz','b.nii.gz']\", or --seeds \"[1,2]\", one of both"


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985) of two noises of one shape; where they are parallel, the straight one."""
    cosine = torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0).clamp(-1.0, 1.0)
    angle = float(torch.arccos(cosine))
    if np.sin(angle) < 1e-4:
        return torch.lerp(first, second, share)
    return (np.sin((1.0 - share) * angle) * first + np.sin(share * angle) * second) / float(np.sin(angle))


class End(NamedTuple):
    """One end of a series: a head, or a seed.

    Attributes:
        name: in words.
        condition: (conditions,).
        head: None for a seed.
        seed: None for a head.
    """

    name: str
    condition: Tensor
    head: PreparedHead | None = None
    seed: int | None = None


class InterpolationRequest:
    """Two ends, and how many volumes there are with both.

    Args:
        conditions: of the model; of two seeds, their flags are read from the configuration, one value for both ends.
        grid: that of the model.
        scans: paths of two prepared heads, or None.
        seeds: two seeds, in place of them.
        frames: how many, at least 2.
        table: is refused: a series is one command.
        segmenter, measure, missing, resample: see `scripts.editing.edit_requests.EditRequests`.

    Raises:
        BundleError: unless there are two of either, or for a scan that cannot be used.
    """

    def __init__(
        self,
        conditions: Conditions,
        grid: Grid,
        scans: Any,
        seeds: Any,
        frames: Any,
        table: Any,
        segmenter: Callable[[], Segmenter],
        measure: Any = True,
        missing: str = "default",
        resample: Any = False,
    ) -> None:
        self.conditions, self.grid = conditions, grid
        self.frames = whole_number(frames, "frames", least=2)
        measures = segmenter if yes_or_no(measure, "measure") and conditions else None
        if not is_absent(table):
            raise BundleError("--conditions_table has no use here: a series is one command")
        given = flags_or_table(conditions.flags(), None, "frames")[0]
        if is_absent(scans) == is_absent(seeds):
            raise BundleError(WHAT)
        if is_absent(scans):
            condition = conditions.from_request(given)
            numbers = [whole_number(seed, "seeds") for seed in _two(seeds, "seeds")]
            self.ends = [End(f"seed-{seed}", condition, seed=seed) for seed in numbers]
            return
        for flag in given:
            raise BundleError(f"--{flag}: two heads have conditions of their own: leave it out, or give --seeds")
        heads = [
            PreparedHead(Path(str(path)), grid, measures, yes_or_no(resample, "resample_to_grid"))
            for path in _two(scans, "scans")
        ]
        owns = [self._own(head, missing) for head in heads]
        self.ends = [End(head.name, own, head) for head, own in zip(heads, owns, strict=True)]

    def _own(self, head: PreparedHead, missing: str) -> Tensor:
        head.check()
        return find_own(head.path, self.conditions, {}, lambda: head.measured, missing).vector


def _two(values: Any, flag: str) -> Sequence[Any]:
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        raise BundleError(f"--{flag} must be a list of two, got {values!r}")
    return values


class InterpolationFolder:
    """Writes the series, and its film.

    Args:
        editor: carries heads to their noise, and noise to heads.
        request: the ends.
        output_dir, dtype: see `scripts.editing.answer_files.AnswerFiles`.
    """

    def __init__(self, editor: Editor, request: InterpolationRequest, output_dir: str, dtype: str = "uint8") -> None:
        self.editor, self.request = editor, request
        self.files = AnswerFiles(output_dir, request.conditions, request.grid, dtype)

    def run(self) -> None:
        """Make the series, unless it is there.

        Raises:
            BundleError: if what another request made has one of the names, or a file cannot be written.
        """
        first, second = self.request.ends
        stem = f"{first.name}_to_{second.name}"
        shares = np.linspace(0.0, 1.0, self.request.frames).tolist()
        names = [f"{stem}-{number:02d}" for number in range(len(shares))]
        conditions = [torch.lerp(first.condition, second.condition, share) for share in shares]
        wanted = {"ends": [self._stated(end) for end in self.request.ends], "frames": len(shares)}
        wanted |= {**self.files.settings(), **self.editor.facts}
        if not self.files.is_done(stem, wanted):
            noises = [self._noise(end) for end in self.request.ends]
            clean = [
                self.editor.to_clean(slerp(noises[0], noises[1], share), condition[None].to(noises[0])).latent
                for share, condition in zip(shares, conditions, strict=True)
            ]
            volumes = [volume.clip(0.0, 1.0) for volume in self.editor.decode(clean)]
            paths: list[Path] = []
            for name, volume, condition, share in zip(names, volumes, conditions, shares, strict=True):
                paths += self.files.write(name, volume, condition, {"share": share, **wanted})
            film = self.files.folder / f"{stem}.gif"
            write_film(film, [strip(v) for v in volumes], [f"synthetic: {s:.2f}" for s in shares], FRAME_SECONDS)
            self.files.finish(stem, wanted, [*paths, film])
        for name, condition, share in zip(names, conditions, shares, strict=True):
            self.files.add_row(name, condition, {"share": round(share, 4)})

    def _stated(self, end: End) -> dict[str, Any]:
        words = {"conditions": self.request.conditions.in_both_units(end.condition)}
        if end.head is None:
            return {"seed": end.seed, **words}
        return {"scan": str(end.head.path), "scan_sha256": file_hash(end.head.path), **words}

    def _noise(self, end: End) -> Tensor:
        """Where the way back begins, (1, C, x, y, z): of a seed, what its first sample begins with."""
        if end.head is None:
            generator = sample_generator(int(end.seed or 0), 0)
            return torch.randn((1, *self.editor.family.noise_shape), generator=generator).to(self.editor.device)
        clean = self.editor.encode(end.head.volume)
        return self.editor.to_noise(clean, end.condition[None].to(clean)).latent
