# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Running the sampler over all requests and keeping what it makes."""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image
from torch.utils.data import DataLoader

from scripts.compute.devices import precision_facts, process_rank
from scripts.compute.ownership import SAMPLES
from scripts.compute.processes import arrive
from scripts.compute.provenance import (
    SHORT,
    bundle_version,
    dataset_description,
    header_text,
    model_in_words,
    synthetic_facts,
)
from scripts.compute.writer import BackgroundWriter, HostCopy
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import are_whole, fingerprints, make_folder, parse_json, read_json, write_json, write_text
from scripts.core.option_types import check_disk
from scripts.core.options import whole_number
from scripts.core.tables import write_table
from scripts.measuring.labelling import LABELLED_BY, MEASURED, Labeller, label_map_of, measured_columns
from scripts.sampling.requests import SampleRequests
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import DTYPES, SPACE, write_picture, write_volume
from scripts.volumes.pictures import captioned_planes

logger = logging.getLogger(__name__)

TABLE = "samples.tsv"
PACKAGES = ("torch", "monai", "numpy", "nibabel")
TF32 = "tf32"  # in sidecars of samples from a GPU, of this version on
ENDINGS, FILES = ("nii.gz", "png"), "files"
PARTICIPANTS, IGNORED = "participants.tsv", "*_T1w.png\n"
SUBJECT = "sub-seed{seed}n{index:06d}"
LAYOUTS = {"flat": SAMPLES + "{seed}_{index:06d}", "bids": f"{SUBJECT}/anat/{SUBJECT}_space-{SPACE}_T1w"}
"""How a sample's files are called, without their endings: beside each other, or as a BIDS derivative."""
NAME, OWN = "Synthetic T1-weighted heads", ("participant_id", "path", "seed")
README = """\
Synthetic T1-weighted heads: the volumes show no person and are not for clinical use.

Each has a sidecar with its conditions, seed, model and the version of the bundle that sampled it.
"""
INCIDENTAL = (
    "versions",
    "request",
    FILES,
    *synthetic_facts(),
    "SpatialReference",
    "SkullStripped",
    MEASURED,
    LABELLED_BY,
)
"""What a sidecar says beside what decides the voxels."""
DARK, LARGEST_BRAIN_ML = 0.05, 2150.0
"""The template's brain takes 1.9 L; the smallest of the example heads, with its skull, 2.6 L brighter than that."""
LEAST_SHARE = 0.01
"""Of the bytes of a volume, what is left of it compressed, at the least."""


class SampleSaver:
    """Handler that writes each sampled volume: NIfTI, JSON sidecar and a picture of the three mid planes.

    The sidecar comes last, with size and hash of the others, so that it tells whether they are whole. Other threads
    compress and write, while the device samples the next batch: `finish` waits for them.

    Args:
        output_dir: folder to write to.
        grid: where the voxels lie.
        conditions: to state them in both units.
        facts: what the sidecar says of the model; see `scripts.sampling.family.ModelFamily.facts`.
        dtype: of the voxels on disk; see `scripts.volumes.nifti.write_volume`.
        write_threads: how many volumes are written at the same time; 0 writes before the next batch is sampled.
        device: where they are sampled.
        layout: one of `LAYOUTS`.
        labeller: makes a label map of each, whose measured volumes stand in the sidecar; None for none.

    Raises:
        BundleError: if the folder is not writable, dtype or layout not known, or the number of threads not whole.
    """

    def __init__(
        self,
        output_dir: str,
        grid: Grid,
        conditions: Conditions,
        facts: Mapping[str, Any],
        dtype: str = "uint8",
        write_threads: Any = 0,
        device: torch.device | str = "cpu",
        layout: str = "flat",
        labeller: Labeller | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise BundleError(f"--output_dtype must be one of {', '.join(DTYPES)}, got '{dtype}'")
        if layout not in LAYOUTS:
            raise BundleError(f"--layout must be {' or '.join(LAYOUTS)}, got '{layout}'")
        self.layout, self.folder = layout, make_folder(output_dir)
        self.grid = grid
        self.conditions = conditions
        self.labeller = labeller
        self.writer = BackgroundWriter(write_threads)
        self.requests: SampleRequests | None = None
        self.facts = {**facts, **precision_facts(torch.device(device)), "dtype": dtype}
        self.facts["grid"] = {"shape": list(grid.shape), "affine": grid.affine.tolist()}

    def attach(self, engine: Engine) -> None:
        """Save after every batch of a MONAI evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self.finish)

    def __call__(self, engine: Engine) -> None:
        """Have the batch saved that the engine has just sampled.

        Raises:
            BundleError: if a volume of an earlier batch could not be written.
        """
        batch, volumes = engine.state.batch, engine.state.output["pred"]
        for position, volume in enumerate(volumes):
            request = {key: values[position] for key, values in batch.items()}
            self.writer.submit(
                self._save_copied,
                HostCopy(volume[0]),
                int(request["seed"]),
                int(request["index"]),
                request["condition"],
            )

    def finish(self) -> None:
        """Wait until all that was sampled is written.

        Raises:
            BundleError: if a volume could not be written.
        """
        self.writer.finish()

    def _save_copied(self, volume: HostCopy, seed: int, index: int, vector: torch.Tensor) -> None:
        self.save(volume.wait().numpy(), seed, index, vector)

    def save(self, volume: Any, seed: int, index: int, vector: torch.Tensor) -> None:
        """Write one volume of the grid's shape with its sidecar and picture, and its label map where one is made."""
        stem = self.stem(seed, index)
        if self.layout != "flat":
            make_folder(Path(stem).parent)
        description = header_text(model_in_words(self.facts))
        write_volume(f"{stem}.nii.gz", volume, self.grid, self.facts["dtype"], description)
        write_picture(f"{stem}.png", captioned_planes(volume, self._caption(vector)))
        labelled = self._labelled(stem)
        files = fingerprints(self._files(stem))
        of_bids = {} if self.layout == "flat" else bids_facts(volume, self.grid)
        write_json(f"{stem}.json", {**self._sidecar(seed, index, vector), **labelled, **of_bids, FILES: files})
        logger.info(f"wrote {stem}.nii.gz, its .json and its .png")

    def _files(self, stem: str) -> list[Path]:
        """The files of a sample but its sidecar."""
        labels = [] if self.labeller is None else [label_map_of(stem)]
        return [*(Path(f"{stem}.{ending}") for ending in ENDINGS), *labels]

    def _labelled(self, stem: str) -> dict[str, Any]:
        """What the sidecar says of a label map, which is written; nothing where none is asked for."""
        if self.labeller is None:
            return {}
        return {MEASURED: self.labeller.label(stem), LABELLED_BY: self.labeller.facts()}

    def is_done(self, seed: int, index: int, vector: torch.Tensor) -> bool:
        """Whether this very sample is there already, whole.

        Raises:
            BundleError: if another one has its name: it would be lost. Also if its sidecar is damaged.
        """
        stem = self.stem(seed, index)
        sidecar, files = Path(f"{stem}.json"), [Path(f"{stem}.{ending}") for ending in ENDINGS]
        if not (files[0].exists() and sidecar.exists()):
            return False
        found = _read_sidecar(sidecar)
        if not _same_sample(found, self._sidecar(seed, index, vector), [c.name for c in self.conditions]):
            raise BundleError(
                f"{sidecar} is of a sample made with other settings: choose another --output_dir or --seed"
            )
        whole = (
            are_whole(sidecar.parent, found[FILES])
            if FILES in found
            else all(_is_readable(path) for path in files if path.exists())
        )
        if whole and self.labeller is not None and found.get(LABELLED_BY) != self.labeller.facts():
            return False  # it has no label map, or that of another segmenter
        if not whole:
            logger.warning(f"the sample of {sidecar} is damaged, or a part of it is gone: it is made again")
        return whole

    def stem(self, seed: int, index: int) -> str:
        """Path of a sample's files without their endings."""
        return str(self.folder / LAYOUTS[self.layout].format(seed=seed, index=index))

    def _caption(self, vector: torch.Tensor) -> list[str]:
        said = zip(self.conditions, vector.tolist(), strict=True)
        stated = [f"{c.raw if c.codes else c.name} {c.describe(c.denormalise(value))}" for c, value in said]
        model = f"synthetic, {SHORT} {bundle_version()}, {model_in_words(self.facts)}"
        return [", ".join(stated), model] if stated else [model]

    def _sidecar(self, seed: int, index: int, vector: torch.Tensor) -> dict[str, Any]:
        return {
            "conditions": self.conditions.in_both_units(vector),
            "seed": seed,
            "index": index,
            **self.facts,
            **(self.requests.request_of(index) if self.requests else {}),
            "versions": {package: version(package) for package in PACKAGES},
            **synthetic_facts(),
        }


def bids_facts(volume: np.ndarray, grid: Grid) -> dict[str, Any]:
    """What BIDS asks of the sidecar of a volume in a template's space; a skull is told by how much is not dark."""
    bright = np.count_nonzero(volume > DARK) * abs(np.linalg.det(grid.affine[:3, :3])) / 1000.0
    return {"SpatialReference": SPACE, "SkullStripped": bool(bright < LARGEST_BRAIN_ML)}


def _read_sidecar(sidecar: Path) -> Mapping[str, Any]:
    try:
        found = parse_json(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{sidecar} is damaged ({error}): remove it, and its sample is made again") from error
    return found if isinstance(found, Mapping) else {}


def _same_sample(found: Mapping[str, Any], wanted: Mapping[str, Any], names: Sequence[str] = ()) -> bool:
    """Whether a sidecar is of the wanted sample: by all that decides its voxels, whichever version wrote it.

    Args:
        found, wanted: sidecars.
        names: of the conditions, normalised.
    """
    found, wanted = _decisive(found, names), _decisive(wanted, names)
    compared = found.keys() | wanted.keys()
    if not (TF32 in found and TF32 in wanted):
        compared -= {TF32}
    return all(key in found and key in wanted and found[key] == wanted[key] for key in compared)


def _decisive(sidecar: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    stated = sidecar.get("conditions")
    values = {name: stated.get(name) for name in names} if isinstance(stated, Mapping) else None
    return {**{k: v for k, v in sidecar.items() if k not in INCIDENTAL}, "conditions": values}


def _is_readable(path: Path) -> bool:
    """Whether a file of a version that noted no hashes can be read to its end, its checksums included."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else Image.open(path) as file:
            while isinstance(file, gzip.GzipFile) and file.read(1 << 22):
                pass
            if isinstance(file, Image.Image):
                file.load()
        return path.stat().st_size > 0
    except (OSError, EOFError, ValueError, SyntaxError, zlib.error):
        return False


def sample_all(evaluator: Engine, requests: SampleRequests, saver: SampleSaver) -> None:
    """Sample what is requested and not there yet; under torchrun, each process its share.

    What was sampled before an interruption or an error is still written.

    Raises:
        BundleError: if a sample of other settings stands where one of these would be written, or one cannot be written.
    """
    requests.start()
    least = len(requests) * LEAST_SHARE * np.prod(saver.grid.shape, dtype=float)
    check_disk(saver.folder, least, "num_samples", len(requests))
    saver.requests = requests
    if requests.fixed_seed is None and None in requests.own_seeds:
        logger.info(f"seed {requests.seed}: give --seed {requests.seed} to sample the same volumes again")
    for raw in requests.unknown_codes():
        logger.info(f"--{raw} is not given: it is drawn from the seed, for each sample; its sidecar says which")
    done = [i for i in requests.rows if saver.is_done(requests.seed_of(i), i, requests.vectors[i])]
    if done:
        logger.info(f"{len(done)} of {len(requests)} samples are in {saver.folder} already and are kept")
    rank, processes = process_rank()
    # Shared out before what is done is left out: processes that look at the folder at other times still agree.
    requests.rows = [i for i in requests.rows[rank::processes] if i not in set(done)]
    if requests.rows:
        evaluator.state.epoch_length = len(evaluator.data_loader)
        try:
            evaluator.run()
        finally:
            saver.finish()
    if saver.labeller is not None:
        arrive(f"labelled {saver.folder}")  # the table has what all processes have measured
    if any(requests.about) or saver.labeller is not None:
        _write_table(requests, saver)
    if saver.layout == "bids":
        write_derivative(saver)


def write_derivative(saver: SampleSaver) -> None:
    """What makes a folder of samples a BIDS derivative: its description, and `participants.tsv` of all that are there.

    Each of several processes does so when it has sampled its share; the last of them finds all.
    """
    rows = []
    for sidecar in sorted(saver.folder.glob("sub-*/anat/*_T1w.json")):
        stated, volume = read_json(sidecar), sidecar.with_suffix(".nii.gz").relative_to(saver.folder)
        asked = {f"requested_{name}" if name in OWN else name: v for name, v in stated.get("request", {}).items()}
        named = {"participant_id": volume.parts[0], "path": volume.as_posix(), "seed": stated.get("seed")}
        conditions = stated.get("conditions", {})
        asked_for = {c.raw: conditions.get(c.raw) for c in saver.conditions}
        rows.append({**named, **asked_for, **asked, **_labels_of(sidecar, stated, saver.folder)})
    write_text(saver.folder / ".bidsignore", IGNORED)
    if not (saver.folder / "README").exists():
        write_text(saver.folder / "README", README)
    write_json(saver.folder / "dataset_description.json", dataset_description(NAME, model_in_words(saver.facts)))
    about = {"path": "the volume, from the folder of the dataset", "seed": "of the sample's noise"}
    described = {name: {"Description": words} for name, words in about.items()}
    write_json(saver.folder / "participants.json", {**described, **{c.raw: c.described() for c in saver.conditions}})
    write_table(saver.folder / PARTICIPANTS, rows)


def _labels_of(sidecar: Path, stated: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Label map and measured volumes of a sample, where it has them, as columns."""
    if LABELLED_BY not in stated:
        return {}
    labels = label_map_of(str(sidecar.with_suffix(""))).relative_to(folder).as_posix()
    return {"labels": labels, **measured_columns(stated.get(MEASURED))}


def _write_table(requests: SampleRequests, saver: SampleSaver) -> None:
    """The table of samples that were measured, or asked for by a table with more than conditions.

    The first process writes it.
    """
    if process_rank()[0] != 0:
        return
    rows = []
    for index, (vector, about) in enumerate(zip(requests.vectors, requests.about, strict=True)):
        seed, stated = requests.seed_of(index), saver.conditions.in_both_units(vector)
        stem = Path(saver.stem(seed, index))
        path = stem.with_name(f"{stem.name}.nii.gz").relative_to(saver.folder).as_posix()
        measured = {} if saver.labeller is None else measured_columns(read_json(f"{stem}.json").get(MEASURED))
        asked = {c.raw: stated[c.raw] for c in saver.conditions}
        rows.append({"path": path, "seed": seed, **asked, **about, **measured})
    write_table(saver.folder / TABLE, rows)


def loader(requests: SampleRequests, batch_size: Any) -> DataLoader:
    """Batches of requests, in their order.

    Raises:
        BundleError: unless `batch_size` is a whole number above 0.
    """
    most = max(1, len(requests))  # PyTorch's loader lays out a list of the size that it is given
    return DataLoader(requests, batch_size=min(most, whole_number(batch_size, "batch_size", least=1)))
