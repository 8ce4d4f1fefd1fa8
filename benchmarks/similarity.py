# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What similarities of two volumes cost, beside MONAI's metrics, and beside 4-G-R-SSIM by its formulae in float64.

*Alone* is a pair of which nothing is known; *kept* one whose volumes were compared with others before. Times are the
processor's, the least of `--repeats`, both ways in turn; differences are absolute.

    python -m benchmarks.similarity --volumes dataset/sub-CSI1/anat/*_T1w.nii.gz dataset/sub-S1/anat/*_T1w.nii.gz
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.metrics import MultiScaleSSIMMetric, SSIMMetric
from torch import Tensor

from benchmarks.command import report
from benchmarks.measuring import machine, measure
from scripts.core.errors import BundleError
from scripts.evaluation.metrics.four_g_r_ssim import (
    EDGE,
    K2,
    SMOOTH,
    FourGRSSIM,
    gradient_map,
    pool_regions,
    sum_by_region,
)
from scripts.evaluation.metrics.ms_ssim import ms_ssim_metric
from scripts.evaluation.metrics.ssim import SSIM
from scripts.volumes.nifti import read_volume


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", nargs=2, required=True, help="NIfTI files of 0 to 1, of one shape")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args(arguments)
    report(partial(_compared, options), _print_report, options.json)


def _compared(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    first, second = (torch.from_numpy(read_volume(Path(path)))[None, None].to(device) for path in options.volumes)
    if first.shape != second.shape:
        raise BundleError(
            f"the volumes have shapes {tuple(first.shape[2:])} and {tuple(second.shape[2:])}: use one grid"
        )
    shape = first.shape[2:]
    ours_of_scales = ms_ssim_metric(shape)
    ways: dict[str, tuple[Any, Callable[..., Tensor]]] = {
        "MS-SSIM": (ours_of_scales, MultiScaleSSIMMetric(3, kernel_size=7, weights=ours_of_scales.weights)),
        "SSIM": (SSIM(3, win_size=11), SSIMMetric(3, win_size=11)),
        "4-G-R-SSIM": (FourGRSSIM(shape), four_g_r_ssim_by_formulae),
    }
    with torch.no_grad():
        rows = {name: _row(*way, first, second, options.repeats) for name, way in ways.items()}
    return {"machine": machine(device), "shape": list(shape), "metrics": rows}


def _row(ours: Any, theirs: Callable[..., Tensor], first: Tensor, second: Tensor, repeats: int) -> dict[str, float]:
    described = ours.describe(first), ours.describe(second)
    calls = {
        "theirs": lambda: theirs(first, second).flatten()[0],
        "alone": lambda: torch.tensor(ours.compare(ours.describe(first), ours.describe(second))),
        "kept": lambda: torch.tensor(ours.compare(*described)),
    }
    rounds = [{name: measure(call, first.device) for name, call in calls.items()} for _ in range(repeats)]
    cost = "seconds" if first.is_cuda else "cpu_seconds"
    times = {name: min(getattr(one[name], cost) for one in rounds) for name in calls}
    values = {name: float(rounds[0][name].output) for name in calls}
    return {
        **{f"{name}_s": seconds for name, seconds in times.items()},
        "ratio_alone": times["theirs"] / times["alone"],
        "ratio_kept": times["theirs"] / times["kept"],
        "difference": abs(values["theirs"] - values["kept"]),
    }


def four_g_r_ssim_by_formulae(first: Tensor, second: Tensor) -> Tensor:
    """4-G-R-SSIM as its formulae stand, in float64, with separable windows: what the bundle computed until 2.1.0."""
    maps = [gradient_map(volume.double()) for volume in (first, second)]
    weights = torch.exp(-0.5 * ((torch.arange(11, dtype=torch.float64) - 5) / 1.5) ** 2)
    smooth = partial(_local_mean, window=(weights / weights.sum()).tolist())
    (mean_a, mean_b), constant = map(smooth, maps), K2**2 / 2
    variances = [(smooth(g * g) - mean**2).clamp(min=0.0) for g, mean in zip(maps, (mean_a, mean_b))]
    covariance = smooth(maps[0] * maps[1]) - mean_a * mean_b
    structure = (covariance + constant) / ((variances[0] * variances[1]).sqrt() + constant)
    inner = [g[..., 5:-5, 5:-5, 5:-5] for g in maps]
    indices = []
    for reference, other in ((0, 1), (1, 0)):
        highest = float(maps[reference].max())
        sums = sum_by_region(structure, inner[reference], inner[other], EDGE * highest, SMOOTH * highest)
        indices.append(pool_regions(*sums.tolist()))
    return torch.tensor(indices).mean()


def _local_mean(volume: Tensor, window: Sequence[float]) -> Tensor:
    for axis in (2, 3, 4):
        length = volume.shape[axis] - len(window) + 1
        terms = (volume.narrow(axis, place, length) * weight for place, weight in enumerate(window))
        volume = sum(terms, torch.zeros((), dtype=volume.dtype))
    return volume


def _print_report(found: dict[str, Any]) -> None:
    print(f"{'x'.join(map(str, found['shape']))}, {found['machine']}")
    print(f"{'':12} {'theirs':>9} {'alone':>9} {'kept':>9} {'x alone':>8} {'x kept':>8} {'difference':>11}")
    for name, row in found["metrics"].items():
        times = " ".join(f"{row[f'{which}_s']:7.3f} s" for which in ("theirs", "alone", "kept"))
        print(f"{name:12} {times} {row['ratio_alone']:8.1f} {row['ratio_kept']:8.1f} {row['difference']:11.1e}")


if __name__ == "__main__":
    main()
