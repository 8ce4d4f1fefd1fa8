# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How many hard heads are laid on the template: small, turned, stripped, defaced, with lesions, with large ventricles.

The heads are the example scans (`make example-data`) at a coarse step, changed in a known way, and phantoms of them. A
head is found if the registration accepts it and no point of the brain lies farther than 5 mm from where it should: that
is where the scan as it came was prepared to, moved as the head was. It takes some seconds of one core a head.

    python -m benchmarks.hard_heads --kinds plain infarct --heads sub-S1
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigParser
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from scripts.core.paths import CONFIGS, MODELS, ROOT
from scripts.core.programs import errors_in_one_line
from scripts.core.tables import read_table
from scripts.preparation.registration import Template, load_template, resample, thinned
from scripts.preparation.steps import FromDarkest, Record, Register, Reorient, TargetSpace
from scripts.volumes.grid import Grid
from scripts.volumes.scans import Scan, ScanError, load_scan

TEMPLATE = MODELS / "template" / "tpl-MNI152NLin2009cAsym_res-01_T1w.nii.gz"
BRAIN = MODELS / "template" / "tpl-MNI152NLin2009cAsym_res-01_desc-brain_mask.nii.gz"
FOUND_MM = 5.0
LESION_MM = 28.0
LESION_AT = (-38.0, -20.0, 25.0)
"""Of a planted infarct, in the template's millimetres: the left middle cerebral artery's territory."""
VENTRICLES_MM3 = 120000.0
BRAIN_MM3 = 1250000.0


@dataclass(frozen=True)
class Head:
    """A head whose place is known.

    Attributes:
        scan: the head.
        truth: 4 x 4 rigid map from template world to scan world (RAS+, mm).
        inside: labels of what is within the skull in the scan's frame: 0 outside, 2 fluid, 3 and more brain.
        size: of the head over that of the example scan.
    """

    scan: Scan
    truth: np.ndarray
    inside: Scan
    size: float = 1.0

    def at(self, point: Sequence[float]) -> np.ndarray:
        """Where a point of the template lies in the scan, in mm."""
        return self.truth[:3, :3] @ np.asarray(point) * self.size + self.truth[:3, 3]


def _world(scan: Scan) -> np.ndarray:
    """Coordinates in mm of every voxel, (x, y, z, 3)."""
    return np.moveaxis(np.indices(scan.data.shape), 0, -1) @ scan.affine[:3, :3].T + scan.affine[:3, 3]


def _with(head: Head, data: np.ndarray) -> Head:
    return replace(head, scan=Scan(data.astype(np.float32), head.scan.affine))


def infarct(head: Head) -> Head:
    """An old infarct, as dark as fluid, of an irregular shape."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(head.scan.data.shape), 2.0)
    radius = LESION_MM * (1.0 + 0.3 * noise / noise.std())
    inside = (np.linalg.norm(_world(head.scan) - head.at(LESION_AT), axis=-1) < radius) & (head.inside.data > 0)
    return _with(head, np.where(inside, 0.3 * np.median(head.scan.data[head.inside.data > 2]), head.scan.data))


def defaced(head: Head) -> Head:
    """All before and below a plane through the brow and the throat is 0."""
    template = (_world(head.scan) - head.truth[:3, 3]) @ head.truth[:3, :3] / head.size
    y, z = template[..., 1], template[..., 2]
    return _with(head, np.where((y - 25.0) - 1.2 * (z + 35.0) > 0.0, 0.0, head.scan.data))


def stripped(head: Head) -> Head:
    """All but the brain is 0."""
    brain = ndimage.binary_closing(head.inside.data > 2, iterations=2)
    return _with(head, np.where(brain, head.scan.data, 0.0))


def scaled(head: Head, factor: float) -> Head:
    """The head of another size."""
    change = np.diag([factor] * 3 + [1.0])
    truth = head.truth.copy()
    truth[:3, 3] *= factor
    scan, inside = (Scan(one.data, change @ one.affine) for one in (head.scan, head.inside))
    return Head(scan, truth, inside, head.size * factor)


def turned(head: Head, *angles: float) -> Head:
    """The head lies otherwise in the scanner: turned by angles in degrees about x, y and z."""
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    scan, inside = (Scan(one.data, motion @ one.affine) for one in (head.scan, head.inside))
    return Head(scan, motion @ head.truth, inside, head.size)


def thick(head: Head, spacing: float) -> Head:
    """Slices of so many mm along z."""
    step = max(1, round(spacing / head.scan.spacing[2]))
    count = head.scan.data.shape[2] // step
    data = head.scan.data[:, :, : count * step].reshape(*head.scan.data.shape[:2], count, step).mean(axis=3)
    affine = head.scan.affine @ np.diag([1.0, 1.0, step, 1.0])
    affine[:3, 3] += head.scan.affine[:3, 2] * (step - 1) / 2.0
    return replace(head, scan=Scan(data, affine))


def _after(*changes: Callable[[Head], Head]) -> Callable[[Head], Head]:
    def change(head: Head) -> Head:
        for one in changes:
            head = one(head)
        return head

    return change


KINDS: dict[str, Callable[[Head], Head]] = {
    "plain": lambda head: head,
    "infarct": infarct,
    "defaced": defaced,
    "infarct, defaced": _after(infarct, defaced),
    "stripped": stripped,
    "size 0.7": partial(scaled, factor=0.7),
    "size 0.8": partial(scaled, factor=0.8),
    "size 0.9": partial(scaled, factor=0.9),
    "size 1.07": partial(scaled, factor=1.07),
    "size 1.15": partial(scaled, factor=1.15),
    "turned by 40": lambda head: turned(head, 25.0, -25.0, 20.0),
    "turned by 90": lambda head: turned(head, 0.0, 0.0, 90.0),
    "thick slices": partial(thick, spacing=6.0),
}
"""What is done to the example scans, by name."""
PHANTOMS: dict[str, Callable[[Head], Head]] = {
    "large ventricles": KINDS["plain"],
    "large ventricles, infarct": infarct,
    "large ventricles, infarct, defaced": KINDS["infarct, defaced"],
    "large ventricles, infarct, size 0.9": _after(infarct, partial(scaled, factor=0.9)),
    "large ventricles, infarct, size 1.07": _after(infarct, partial(scaled, factor=1.07)),
}
"""What is done to phantoms with ventricles of 120 mL."""


def example_heads(names: Sequence[str], spacing: float, options: argparse.Namespace) -> Iterator[tuple[str, Head]]:
    """The example scans at a coarse step, with the place to which they were prepared."""
    for row in read_table(options.dataset_dir / "participants.tsv", ["participant_id", "path"]):
        if names and row["participant_id"] not in names:
            continue
        volume = options.dataset_dir / row["path"]
        sidecar = json.loads(Path(str(volume).replace(".nii.gz", ".json")).read_text())
        scan, truth = load_scan(options.input_dir / sidecar["source"]), np.array(sidecar["template_to_scan_mm"])
        labels = load_scan(MODELS / "heads" / f"{row['participant_id']}_dseg.nii.gz")
        coarse, to_template = thinned(scan, spacing), np.linalg.inv(truth)
        skull, brain = (
            resample(Scan(1.0 * (labels.data >= least), labels.affine), to_template, *_place(coarse), order=1) > 0.5
            for least in (2, 3)
        )
        yield row["participant_id"], Head(coarse, truth, Scan(2.0 * skull + brain, coarse.affine))


def _place(scan: Scan) -> tuple[tuple[int, ...], np.ndarray]:
    return scan.data.shape, scan.affine


def phantom_heads(names: Sequence[str], spacing: float, options: argparse.Namespace) -> Iterator[tuple[str, Head]]:
    """Phantoms of the example heads with large ventricles, as they lie on the template."""
    config = ConfigParser()
    config.read_config([str(CONFIGS / "inference.json"), str(CONFIGS / "phantoms.yaml")])
    still = {"amplitude": 0.0, "wavelength": 70.0, "stretch": 0.0, "tilt": 0.0}
    config.update({"bundle_root": str(ROOT), "heads_dir": str(options.dataset_dir), "anatomy": still, "device": "cpu"})
    grid = config.get_parsed_content("grid")
    shape = [round(n * abs(step) / spacing) for n, step in zip(grid.shape, grid.spacing)]
    coarse = Grid(shape, [np.sign(step) * spacing for step in grid.spacing], grid.origin)
    for name in names or sorted(path.name.removesuffix("_dseg.nii.gz") for path in (MODELS / "heads").glob("*.nii.gz")):
        config.update({"heads": name, "seed_heads::grid": coarse})
        config.parse(True)
        phantoms = config.get_parsed_content("phantoms")
        wanted = {"ventricular_vol_mm3": VENTRICLES_MM3, "brain_vol_mm3": BRAIN_MM3, "age_years": 75.0}
        head = phantoms.heads[0]
        phantom = phantoms.make(1, 0, {**wanted, "intracranial_mm3": head.volumes.intracranial})
        image, labels = phantom.image[0].numpy(), phantom.labels[0].numpy().astype(np.float32)
        ordered = [np.ascontiguousarray(part[::-1]) for part in (image, labels * (labels > 1))]
        affine = coarse.affine @ np.diag([-1.0, 1.0, 1.0, 1.0])
        affine[0, 3] -= (coarse.shape[0] - 1) * spacing
        scan, inside = (Scan(part, affine) for part in ordered)
        yield name, Head(scan, np.eye(4), inside)


def registered(head: Head, template: Template, space: TargetSpace) -> dict[str, Any]:
    """How far from its place a head is laid, in mm within the brain, or why it is refused."""
    start = time.perf_counter()
    record = Record("head", head.scan, head.scan)
    try:
        for step in (Reorient(), FromDarkest(), Register(space)):
            record = step(record)
    except ScanError as error:
        return {"seconds": time.perf_counter() - start, "found": False, "refused": str(error)}
    seconds, found = time.perf_counter() - start, record.registered()
    points = np.argwhere(template.in_brain) @ template.head.affine[:3, :3].T + template.head.affine[:3, 3]
    apart = (points - template.centre) @ (found.rigid - head.truth)[:3, :3].T * head.size
    middle = found.rigid @ np.append(template.centre, 1.0)
    wanted = np.append(head.at(template.centre.tolist()), 1.0)
    distance = float(np.linalg.norm(apart + (middle - wanted)[:3], axis=1).max())
    facts = {"scale": round(found.scale, 4), "similarity": round(found.similarity, 4), "mm": round(distance, 2)}
    return {"seconds": seconds, "found": distance < FOUND_MM, **facts, "rigid": found.rigid.tolist()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line arguments."""
    options = _options(arguments)
    space = TargetSpace(Grid((2, 2, 2), (1, 1, 1), (0, 0, 0)), TEMPLATE, BRAIN)
    fine = load_template(TEMPLATE, BRAIN)
    space.template = template = Template(thinned(fine.head, options.spacing), thinned(fine.brain, options.spacing))
    rows = []
    for sources, kinds in ((example_heads, KINDS), (phantom_heads, PHANTOMS)):
        wanted = [kind for kind in kinds if not options.kinds or kind in options.kinds]
        for name, head in sources(options.heads, options.spacing, options) if wanted else ():
            for kind in tqdm(wanted, name, disable=None):
                rows.append({"head": name, "kind": kind, **registered(kinds[kind](head), template, space)})
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=4) + "\n")
    _tell(rows)


def _tell(rows: Sequence[dict[str, Any]]) -> None:
    found, all_of = Counter(row["kind"] for row in rows if row["found"]), Counter(row["kind"] for row in rows)
    for kind, count in all_of.items():
        wrong = sum(row["kind"] == kind and not row["found"] and "refused" not in row for row in rows)
        seconds = np.median([row["seconds"] for row in rows if row["kind"] == kind])
        print(f"{kind}: {found[kind]} of {count} found, {wrong} laid wrongly, {seconds:.1f} s each")
    print(f"together: {found.total()} of {len(rows)}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hard_heads", description=__doc__.split("\n")[0])
    parser.add_argument("--heads", nargs="*", default=[], help="which of the example heads (default all)")
    parser.add_argument("--kinds", nargs="*", default=[], help=f"of {', '.join([*KINDS, *PHANTOMS])} (default all)")
    parser.add_argument("--spacing", type=float, default=3.0, help="step in mm of heads and template (default 3)")
    parser.add_argument("--input_dir", type=Path, default=ROOT / "data" / "example", help="the raw example scans")
    parser.add_argument("--dataset_dir", type=Path, default=ROOT / "dataset", help="the prepared example scans")
    parser.add_argument("--json", type=Path, help="where to write the figures, one by one")
    options = parser.parse_args(arguments)
    unknown = [kind for kind in options.kinds if kind not in {**KINDS, **PHANTOMS}]
    if unknown:
        parser.error(f"there is no kind '{unknown[0]}'")
    return options


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.ERROR)
    with errors_in_one_line():
        main()
