# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The verb `export`: the networks as files that run without this bundle, and what a program needs to use them."""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from scripts.core.errors import BundleError
from scripts.core.files import make_folder, write_json
from scripts.sampling.family import ModelFamily, Part

logger = logging.getLogger(__name__)

RECORD = "export.json"


def export_networks(family: ModelFamily, export_dir: str, formats: Any = "onnx") -> None:
    """Write a family's networks in float32, for any batch size, and `export.json`, which comes last.

    Args:
        family: see its `export`; a `pt2` file runs on the device that its networks are on.
        export_dir: where to write.
        formats: `onnx`, `pt2` (torch.export's), or both, separated by commas.

    Raises:
        BundleError: for a family that cannot be exported, an unknown format or a package that it lacks, or a folder
            that cannot be written.
    """
    writers = _writers(formats)
    parts, record = family.export()
    folder = make_folder(export_dir)
    (folder / RECORD).unlink(missing_ok=True)
    for part in parts:
        program = exported_program(part)
        for ending, write in writers.items():
            _write_files(folder, f"{part.name}.{ending}", write, part, program)
    inputs = {part.name: {name: ["batch", *t.shape[1:]] for name, t in part.inputs.items()} for part in parts}
    write_json(folder / RECORD, {**record, "inputs": inputs})


def exported_program(part: Part) -> ExportedProgram:
    """The network as a graph of PyTorch's operators that takes batches of any size."""
    batch = Dim("batch", min=1, max=1024)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(
            part.network, (), part.inputs, dynamic_shapes={name: {0: batch} for name in part.inputs}
        )


def _write_onnx(part: Part, program: ExportedProgram, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx = torch.onnx.export(
            program,
            (),
            kwargs=part.inputs,
            dynamo=True,
            verbose=False,
            input_names=list(part.inputs),
            output_names=[part.output],
        )
    assert onnx is not None
    onnx.save(path)  # above 2 GB, the weights go into a file of their own beside it


def _write_pt2(part: Part, program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


Writer = Callable[[Part, ExportedProgram, Path], None]
FORMATS: dict[str, Writer] = {"onnx": _write_onnx, "pt2": _write_pt2}
PACKAGES = {"onnx": ("onnx", "onnxscript"), "pt2": ()}


def _writers(formats: Any) -> dict[str, Writer]:
    names = list(formats) if isinstance(formats, Sequence) and not isinstance(formats, str) else str(formats).split(",")
    found = {}
    for name in (str(name).strip() for name in names):
        if name not in FORMATS:
            raise BundleError(f"--formats must be among {', '.join(FORMATS)}, got '{name}'")
        for package in PACKAGES[name]:
            needed_package(package)
        found[name] = FORMATS[name]
    return found


def needed_package(name: str) -> Any:
    """A module of the bundle's extra `export`.

    Raises:
        BundleError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = "pip install onnx onnxscript onnxruntime"
        raise BundleError(f"the package {name} is not installed: {wanted} (the bundle's extra `export`)") from error


def _write_files(folder: Path, name: str, write: Writer, part: Part, program: ExportedProgram) -> None:
    # A file refers to that of its weights by name, so that it cannot be written under a temporary one.
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as aside:
            write(part, program, Path(aside) / name)
            for file in sorted(Path(aside).iterdir(), reverse=True):  # the weights before what refers to them
                os.replace(file, folder / file.name)
    except OSError as error:
        raise BundleError(f"cannot write {folder / name}: {error.strerror or error}") from error
    logger.info(f"wrote {folder / name}")
