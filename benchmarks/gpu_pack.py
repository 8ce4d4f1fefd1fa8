# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Packs what `benchmarks.gpu_report` needs besides the repository, for a GPU on a machine that reaches no network.

    python -m benchmarks.gpu_pack

The folder, which git ignores, gets the wheels of the packages that such a machine lacks, in the versions of
requirements.lock, the prepared example heads (`make example-data`), and in float16 the network of the perceptual loss
(`make perceptual-weights`): of both as much as fits --limit_mib together with the files of the repository. Nothing else
has to travel. docs/gpu_queue.md has the command for the other side.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.gpu_report import HEADS, PERCEPTUAL
from scripts.core.errors import BundleError
from scripts.core.files import make_folder, replacing
from scripts.core.paths import ROOT
from scripts.core.programs import errors_in_one_line
from scripts.core.tables import read_table, write_table
from scripts.volumes.datasets import TABLE

MIB = 2**20
PACKAGES = ("monai", "pytorch-ignite", "nibabel", "fire", "termcolor", "monai-generative")
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
WHEELS = "wheels"


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack with command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".gpu", help="what is packed (default .gpu)")
    parser.add_argument("--heads_dir", default="dataset", help="prepared example heads (default dataset)")
    parser.add_argument("--perceptual_path", default=f"models/{PERCEPTUAL}", help="network of the perceptual loss")
    parser.add_argument("--python", default="3.12", help="version of Python there (default 3.12)")
    parser.add_argument("--limit_mib", type=float, default=64.0, help="of the repository's files and the folder")
    options = parser.parse_args(arguments)
    with errors_in_one_line():
        folder = make_folder(options.folder)
        fetch_wheels(folder / WHEELS, options.python)
        room = int(options.limit_mib * MIB) - size_of(travelling()) - size_of(files_in(folder / WHEELS))
        heads = pack_heads(Path(options.heads_dir), folder / HEADS, room)
        room -= size_of(files_in(folder / HEADS))
        perceptual = pack_perceptual(Path(options.perceptual_path), folder / PERCEPTUAL, room)
        packed = size_of(files_in(folder))
    print(f"{heads} heads, {'with' if perceptual else 'without'} the network of the perceptual loss")
    together = (packed + size_of(travelling())) / MIB
    print(f"{packed / MIB:.1f} MiB in {folder}; with the repository's files {together:.1f} of {options.limit_mib:g}")


def fetch_wheels(folder: Path, python: str) -> None:
    """Download the packages' wheels, as pip does for another machine.

    Raises:
        BundleError: if pip does not find one.
    """
    shutil.rmtree(folder, ignore_errors=True)
    target = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    if subprocess.run([*pip, *target, *platforms, *locked()], cwd=ROOT).returncode:
        raise BundleError("pip did not get all wheels: its message is above")


def locked() -> list[str]:
    """`NAME==VERSION` of each package, from requirements.lock.

    Raises:
        BundleError: if it has none of that name.
    """
    lock = (ROOT / "requirements.lock").read_text()
    found = {name: re.search(rf"^{name}==\S+", lock, re.MULTILINE) for name in PACKAGES}
    if lacking := [name for name, match in found.items() if match is None]:
        raise BundleError(f"requirements.lock has no {', '.join(lacking)}")
    return [match[0] for match in found.values() if match is not None]


def travelling() -> list[Path]:
    """The files that git does not ignore, tracked or not, as far as they are there."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def files_in(folder: Path) -> list[Path]:
    """All files of a folder and of those in it."""
    return [path for path in folder.rglob("*") if path.is_file()]


def size_of(files: Iterable[Path]) -> int:
    """Bytes."""
    return sum(path.stat().st_size for path in files)


def pack_heads(dataset: Path, folder: Path, room: int) -> int:
    """Copy the volumes of as many heads as fit, the smallest first, and the table of them; how many.

    Raises:
        BundleError: if none fits, or there are none.
    """
    rows = read_table(dataset / TABLE, ("participant_id", "path"))
    sizes = {row["path"]: (dataset / row["path"]).stat().st_size for row in rows}
    shutil.rmtree(folder, ignore_errors=True)
    chosen: set[str] = set()
    for path in sorted(sizes, key=lambda path: sizes[path]):
        if sum(sizes[one] for one in chosen) + sizes[path] <= room - MIB:  # for the table and what is written there
            chosen.add(path)
            make_folder((folder / path).parent)
            shutil.copyfile(dataset / path, folder / path)
    if not chosen:
        raise BundleError(f"no head of {dataset} fits into {room / MIB:.1f} MiB: move large files away for a while")
    write_table(folder / TABLE, [row for row in rows if row["path"] in chosen])
    return len(chosen)


def pack_perceptual(path: Path, packed: Path, room: int) -> bool:
    """Write the network of the perceptual loss in float16, if it is there and fits; whether it did."""
    packed.unlink(missing_ok=True)
    if not path.is_file() or path.stat().st_size / 2 > room - MIB:
        return False
    with replacing(packed) as temporary:
        save_file({name: tensor.to(torch.float16) for name, tensor in load_file(path).items()}, temporary)
    return True


if __name__ == "__main__":
    main()
