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
"""How well the volumes of brain structures in the samples follow the volumes that were asked for."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from scripts.bootstrap import Estimate, Summary
from scripts.conditions import Condition, Conditions
from scripts.correlation import correlations, in_words, pearson
from scripts.errors import BundleError
from scripts.measures import Result
from scripts.metrics.features import FeatureSet
from scripts.options import whole_number
from scripts.phantom_heads import LABELS
from scripts.tables import read_table
from scripts.volume_folders import TABLE, VolumeFolder, find_volumes
from scripts.volumes import UNREADABLE

logger = logging.getLogger(__name__)

QUANTITIES = ("ventricular_vol", "brain_vol")
"""The names of the conditions that can be measured."""
VENTRICLES = (4, 5, 43, 44)
"""Left and right lateral and inferior lateral ventricles in FreeSurfer's and SynthSeg's codes."""
TISSUE = (2, 3, 7, 8, 10, 11, 12, 13, 16, 17, 18, 26, 28, 41, 42, 46, 47, 49, 50, 51, 52, 53, 54, 58, 60)
LESIONS_AND_CALLOSUM = (77, 78, 79, 80, 81, 82, 192, 251, 252, 253, 254, 255)
"""These are grey and white matter, cerebellum and brain stem in these codes, without any fluid."""
PARCELS = range(1000, 5003)
"""The codes of cortical parcels and of the white matter below them: brain as well."""
ALWAYS_IN_PHANTOMS = [
    LABELS[name] for name in ("scalp_and_skull", "outer_fluid", "grey", "white", "lateral_ventricles")
]

VENTRICLE_COLUMNS = (
    "left lateral ventricle",
    "left inferior lateral ventricle",
    "right lateral ventricle",
    "right inferior lateral ventricle",
)
FLUID_COLUMNS = (*VENTRICLE_COLUMNS, "3rd ventricle", "4th ventricle", "csf")
INTRACRANIAL = "total intracranial"
CORTEX_PARCEL = re.compile(r"ctx-[lr]h-")
"""SynthSeg's columns of cortical parcels, which are parts of the column of the cortex."""


class Segmentations:
    """Where the volumes of the structures come from.

    Args:
        path: a folder of label maps in FreeSurfer's or SynthSeg's codes, or the `.csv` of volumes that SynthSeg
            writes; None if none was given.
        flag: the command-line flag that gives it, for messages.

    Raises:
        BundleError: if it is neither.
    """

    def __init__(self, path: Any, flag: str = "segmentations") -> None:
        self.flag = flag
        self.path = None if path is None else Path(str(path))
        if self.path is not None and not (self.path.is_dir() or self.path.is_file()):
            raise BundleError(f"--{flag}: there is no folder of label maps and no table {self.path}")

    @property
    def requested(self) -> bool:
        """Whether one was given."""
        return self.path is not None

    def of(self, folder: VolumeFolder) -> Segmentations:
        """Those of one model's volumes: these, where there is one model."""
        return self

    def facts(self) -> dict[str, Any]:
        """Where the numbers come from, for the report."""
        return {"segmentations": str(self.path)}

    def prepare(self) -> None:
        """Nothing: they are there."""

    def names(self) -> list[str] | None:
        """Names of the segmentations that are there; None where a tool is yet to make them."""
        assert self.path is not None
        if self.path.is_file():
            return list(read_synthseg(self.path))
        return [stem(path) for path in find_volumes(self.path, self.flag)]

    def measured(self) -> dict[str, dict[str, float]]:
        """Name of each segmented volume -> the volumes of its structures in mm3, by name of the condition.

        Raises:
            BundleError: if a label map or the table cannot be used.
        """
        assert self.path is not None
        if self.path.is_file():
            return read_synthseg(self.path)
        paths = find_volumes(self.path, self.flag)
        return {stem(path): label_volumes(path) for path in tqdm(paths, "label maps", unit="volume", disable=None)}


def label_volumes(path: Path) -> dict[str, float]:
    """Ventricular and brain volume of a label map in FreeSurfer's, SynthSeg's or the phantoms' codes, in mm3.

    Raises:
        BundleError: if it cannot be read, does not hold whole numbers, or has no ventricle or no brain.
    """
    try:
        image: Any = nib.load(path)
        codes = np.asanyarray(image.dataobj)
        voxel = float(np.prod(image.header.get_zooms()[:3]))
    except UNREADABLE as error:
        raise BundleError(f"cannot read the label map {path}: it is damaged, cut short or no image") from error
    present, counts = np.unique(codes, return_counts=True)
    if not np.isfinite(present).all() or (present != np.rint(present)).any():
        raise BundleError(f"{path} is no label map: it holds other values than whole numbers")
    ventricles, brain = _structures_of(present)
    volumes = {
        "ventricular_vol": voxel * counts[np.isin(present, ventricles)].sum(),
        "brain_vol": voxel * counts[np.isin(present, brain)].sum(),
    }
    for name, volume in volumes.items():
        if not volume:
            raise BundleError(f"{path} has no label of {name}: codes of FreeSurfer or SynthSeg are expected")
    return {name: float(volume) for name, volume in volumes.items()}


def _structures_of(present: np.ndarray) -> tuple[list[int], list[int]]:
    """The codes of ventricles and brain in a label map with these codes.

    Phantoms have codes of 1 to 7 alone; maps of FreeSurfer and SynthSeg have those of the right hemisphere, above 40.
    """
    if np.isin(ALWAYS_IN_PHANTOMS, present).all() and present.max() <= max(LABELS.values()):
        return [LABELS["lateral_ventricles"]], [LABELS["grey"], LABELS["white"]]
    return list(VENTRICLES), [*TISSUE, *LESIONS_AND_CALLOSUM, *PARCELS]


def read_synthseg(path: Path) -> dict[str, dict[str, float]]:
    """Ventricular and brain volumes out of a table of volumes (mm3) by SynthSeg (Billot et al. 2023).

    Brain is every structure but fluid; the intracranial volume and the cortical parcels, which are parts of the
    cortex, are left out.

    Raises:
        BundleError: if a column is missing, a volume is no number, or a subject has two rows.
    """
    found: dict[str, dict[str, float]] = {}
    for row in read_table(path, ["subject", *VENTRICLE_COLUMNS]):
        name = stem(Path(row["subject"]))
        if name in found:
            raise BundleError(f"the table {path} has two rows of {name}")
        found[name] = _structures({k: v for k, v in row.items() if k != "subject"}, f"{name} in {path}")
    return found


def _structures(row: Mapping[str, str], where: str) -> dict[str, float]:
    try:
        volumes = {name.lower(): float(value) for name, value in row.items() if value}
    except ValueError as error:
        raise BundleError(f"a volume of {where} is no number: {error}") from error
    if not np.isfinite(list(volumes.values())).all():
        raise BundleError(f"a volume of {where} is NaN or infinite")
    brain = [
        volume
        for name, volume in volumes.items()
        if name not in (*FLUID_COLUMNS, INTRACRANIAL) and not CORTEX_PARCEL.match(name)
    ]
    return {"ventricular_vol": sum(volumes[name] for name in VENTRICLE_COLUMNS), "brain_vol": sum(brain)}


def stem(path: Path) -> str:
    """The name of a file without its folder, `.nii`, `.nii.gz`, `.mgz` or `.mgh`."""
    return re.sub(r"\.(nii\.gz|nii|mgz|mgh)$", "", path.name)


def requested_volumes(folder: VolumeFolder, conditions: Conditions) -> dict[str, dict[str, float]]:
    """What was asked for, in raw units: name of the volume -> name of the condition -> value.

    It stands in each volume's sidecar (`.json`), or in the row of `participants.tsv` whose `path` is the volume.

    Raises:
        BundleError: if a volume has neither, two volumes share a name, or a value is no number.
    """
    names = [stem(path) for path in folder.paths]
    for name in names:
        if names.count(name) > 1:
            raise BundleError(f"two volumes in {folder.folder} are called {name}: segmentations are told by name")
    rows = table_rows(folder)
    return {name: _stated(path, rows.get(path), conditions) for name, path in zip(names, folder.paths)}


def table_rows(folder: VolumeFolder) -> dict[Path, dict[str, str]]:
    """The rows of a folder's `participants.tsv` by the volumes that they name; none where there is no such table."""
    assert folder.folder is not None
    table = folder.folder / TABLE
    rows = read_table(table) if table.is_file() else []
    return {folder.folder / row["path"]: row for row in rows if "path" in row}


def stated_conditions(path: Path, row: Mapping[str, str] | None) -> Mapping[str, Any] | None:
    """What a volume's sidecar says of its conditions, else its row; None if it has neither.

    Raises:
        BundleError: if the sidecar says nothing of them, and there is no row.
    """
    sidecar = path.with_name(f"{stem(path)}.json")
    if not sidecar.is_file():
        return row
    try:
        stated = dict(json.loads(sidecar.read_text(encoding="utf-8"))["conditions"])
    except (ValueError, KeyError, TypeError) as error:
        if row is not None:
            return row
        raise BundleError(f"{sidecar} does not state the conditions of {path.name}") from error
    return stated


def _stated(path: Path, row: Mapping[str, str] | None, conditions: Conditions) -> dict[str, float]:
    stated = stated_conditions(path, row)
    if stated is None:
        name = f"{stem(path)}.json"
        raise BundleError(f"what was asked for of {path} is not known: it has no {name} and no row in {TABLE}")
    return {c.name: _raw(c, stated, path) for c in conditions if c.name in QUANTITIES}


def _raw(condition: Condition, stated: Mapping[str, Any], path: Path) -> float:
    for flag in (condition.raw, condition.name):
        if stated.get(flag) not in (None, "", "n/a"):
            return condition.denormalise(condition.parse(flag, stated[flag], f" of {path}"))
    raise BundleError(f"{path} has no value of {condition.raw}")


def matched(volumes: Sequence[str], segmentations: Sequence[str], folder: str = "--synthetic_dir") -> dict[str, str]:
    """Name of each volume -> name of its segmentation: the same, or that with more after a `_`, `-` or `.`.

    Args:
        volumes, segmentations: their names.
        folder: of the volumes, for messages.

    Raises:
        BundleError: if a volume has none or several, or a segmentation belongs to no volume.
    """
    found: dict[str, str] = {}
    for segmentation in segmentations:
        owners = [v for v in volumes if segmentation == v or segmentation.startswith((f"{v}_", f"{v}-", f"{v}."))]
        if not owners:
            raise BundleError(f"the segmentation {segmentation} belongs to no volume of {folder}")
        owner = max(owners, key=len)
        if owner in found:
            raise BundleError(f"two segmentations belong to {owner}: {found[owner]} and {segmentation}")
        found[owner] = segmentation
    lacking = [volume for volume in volumes if volume not in found]
    if lacking:
        raise BundleError(f"{len(lacking)} volumes of {folder} have no segmentation, {lacking[0]} the first")
    return found


class Volumetry:
    """Pearson's and Spearman's r and the slope of measured on requested volumes, with bootstrap intervals.

    Args:
        synthetic: the samples, with their sidecars or their table.
        segmentations: of these, or of several models.
        conditions: which are known; those called `ventricular_vol` and `brain_vol` are measured.
        seed: of the bootstrap.
    """

    says = (
        "Whether samples have the ventricular and brain volumes that were asked for: correlation and slope of what a "
        "segmentation measures on what was requested (the paper's Figure 3, left)."
    )
    pitfall = (
        "r rises with the range of what was asked for, and does not notice a constant factor or offset: look at the "
        "slope too. A segmentation can fail on samples that are no brains."
    )
    shows = "Measured against requested volumes, one point a sample; the line is that of equal volumes."

    def __init__(
        self, synthetic: FeatureSet, segmentations: Segmentations, conditions: Conditions, seed: Any = 0
    ) -> None:
        self.synthetic = synthetic.folder
        self.segmentations, self.conditions = segmentations.of(self.synthetic), conditions
        self.inputs = [self.synthetic, self.segmentations]
        self.seed = whole_number(seed, "seed")

    def check(self) -> None:
        """Raise a `BundleError` if volumes, segmentations and requests do not belong together, or are too few."""
        requested, names = requested_volumes(self.synthetic, self.conditions), self.segmentations.names()
        if names is not None:
            self._matched(requested, names)

    def _matched(self, requested: Iterable[str], names: Iterable[str]) -> dict[str, str]:
        pairs = matched(list(requested), list(names), f"--{self.synthetic.flag} {self.synthetic.folder}")
        if len(pairs) < 3:
            raise BundleError(f"--{self.synthetic.flag}: {len(pairs)} volumes are too few for a correlation")
        return pairs

    def prepare(self) -> None:
        """Let a tool segment what is to be segmented; under torchrun, each process its share."""
        self.segmentations.prepare()

    def compute(self) -> Result:
        """Measure and compare.

        Raises:
            BundleError: if volumes, segmentations and requests do not belong together, or are fewer than three.
        """
        rows = self._compared()
        names = [c.name for c in self.conditions if c.name in QUANTITIES]
        summaries: dict[str, Summary | Estimate] = {}
        for name in names:
            requested = np.array([row[f"{name}_requested_mm3"] for row in rows])
            measured = np.array([row[f"{name}_measured_mm3"] for row in rows])
            summaries.update(correlations(name, requested, measured, self.seed))
        facts = {
            **self.segmentations.facts(),
            "volumes": len(rows),
            "seed": self.seed,
            self.synthetic.flag: str(self.synthetic.folder),
        }
        return Result(summaries, facts, rows, scatter(rows, names))

    def _compared(self) -> list[dict[str, Any]]:
        requested = requested_volumes(self.synthetic, self.conditions)
        measured = self.segmentations.measured()
        pairs = self._matched(requested, measured)
        rows = []
        for name, wanted in requested.items():
            row: dict[str, Any] = {"volume": name, "segmentation": pairs[name]}
            for quantity, value in wanted.items():
                row[f"{quantity}_requested_mm3"] = value
                row[f"{quantity}_measured_mm3"] = measured[pairs[name]][quantity]
            rows.append(row)
        return rows


def scatter(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """Measured against requested volumes in mL, one panel a quantity, with the line of identity."""
    figure = Figure(figsize=(4.5 * len(names), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        x, y = (np.array([row[f"{name}_{kind}_mm3"] for row in rows]) / 1000 for kind in ("requested", "measured"))
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axes.plot(ends, ends, color="0.7", linewidth=1)
        axes.scatter(x, y, s=8)
        axes.set_xlabel(f"{name} requested (mL)")
        axes.set_ylabel("measured (mL)")
        axes.set_title(in_words(pearson(x, y)), fontsize=9)
    return figure
