# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.tools.release`: a wheel, the Model Zoo's zip and a folder for Hugging Face, tried, with checksums.

Run it in a clone. All three hold the bundle as it is in the last commit, with the models that ship; each is tried by
sampling with it from an empty folder, outside of the clone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml

from scripts.compute.provenance import bundle_version
from scripts.core.errors import BundleError
from scripts.core.files import file_hash, make_folder, replacing, write_text
from scripts.core.paths import ROOT
from scripts.core.programs import errors_in_one_line

ZOO = "brain_image_synthesis_latent_diffusion_model"
BUNDLE = ("LICENSE", "README.md", "configs", "docs", "large_files.yml", "metadata.json", "models", "scripts")
SUMS = "SHA256SUMS"
FRONT = {
    "license": "apache-2.0",
    "library_name": "monai",
    "pipeline_tag": "unconditional-image-generation",
    "tags": ["monai", "medical", "brain", "mri", "latent-diffusion", "synthetic-data"],
}
SAMPLE = ["sample", "--with", "demo", "--seed", "1", "--num_inference_steps", "2", "--output_dir", "tried"]


def last_commit(folder: Path, names: Sequence[str] = ()) -> None:
    """Unpack files of the last commit, all or those named, into a folder.

    Raises:
        BundleError: where this is no clone.
    """
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", "HEAD", *names]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise BundleError(f"a release is made in a clone: {done.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def build_wheel(target: Path) -> Path:
    """The wheel, by setuptools; where that is not installed, pip fetches it."""
    with tempfile.TemporaryDirectory() as folder:
        last_commit(Path(folder))
        _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", target, "."], Path(folder))
    return next(target.glob("*.whl"))


def build_zip(target: Path) -> Path:
    """The bundle as the Model Zoo packs it: one folder, of the bundle's name, with `configs/metadata.json`."""
    path = target / f"{ZOO}_v{bundle_version()}.zip"
    with tempfile.TemporaryDirectory() as folder:
        last_commit(Path(folder), BUNDLE)
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:  # links are followed: a zip has none that all programs unpack
                archive.write(file, Path(ZOO, file.relative_to(folder)))
    return path


def build_hub_folder(target: Path) -> Path:
    """The bundle as a repository of Hugging Face, its README the model card."""
    folder = target / f"{ZOO}_hub"
    shutil.rmtree(folder, ignore_errors=True)
    last_commit(make_folder(folder), BUNDLE)
    write_text(folder / "README.md", model_card((folder / "docs" / "README.md").read_text(encoding="utf-8")))
    write_text(
        folder / ".gitattributes", "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.nii.gz filter=lfs -text\n"
    )
    return folder


def model_card(overview: str) -> str:
    """The model overview with the front matter that the hub reads, and links from the top folder."""
    linked = overview.replace("](", "](docs/").replace("](docs/http", "](http").replace("](docs/#", "](#")
    front = yaml.safe_dump({**FRONT, "version": bundle_version()}, sort_keys=False)
    use = (
        "Intended use: research on methods, such as augmentation, phantoms for software, and privacy. Not for clinical "
        "use: a synthetic volume shows no person. The weights here are those of the small model (docs/demo_model.md)."
    )
    return f"---\n{front}---\n\n{use}\n\n{linked}"


def try_wheel(wheel: Path, folder: Path) -> None:
    """Sample with an installed wheel, in an environment that has what this one has, without the clone."""
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    _run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    site = _run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    Path(site, "all.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install: list[str | os.PathLike] = [
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        str(wheel),
    ]
    _run([sys.executable, "-m", "pip", "--python", python, *install], folder)
    _run([python, "-m", "brain_ldm", *SAMPLE], folder)


def try_zip(path: Path, folder: Path) -> None:
    """Sample with MONAI's own command in the unpacked zip."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    try_folder(folder / ZOO, folder)


def try_folder(bundle: Path, folder: Path) -> None:
    """Sample with MONAI's own command and a bundle in a folder, from another."""
    files = [str(bundle / "configs" / name) for name in ("inference.json", "demo.yaml")]
    flags = ["--config_file", str(files), "--bundle_root", str(bundle), "--seed", "1", "--num_inference_steps", "2"]
    _run([sys.executable, "-m", "monai.bundle", "run", *flags, "--output_dir", str(folder / "tried")], folder)


def _run(command: Sequence[str | os.PathLike], folder: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(word) for word in command], cwd=folder, env=clean, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no words").splitlines()[-1]
        raise BundleError(f"`{' '.join(str(word) for word in command[:6])} ...` failed: {said}")
    return done.stdout


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path, Path], None]]] = {
    "wheel": (build_wheel, try_wheel),
    "zip": (build_zip, try_zip),
    "hub": (build_hub_folder, try_folder),
}


def release(target: Path, kinds: Sequence[str] = tuple(KINDS)) -> dict[str, Any]:
    """Build and try, then write the checksums of all that was built.

    Raises:
        BundleError: if something cannot be built, or does not sample.
    """
    built = {}
    for kind in kinds:
        build, attempt = KINDS[kind]
        built[kind] = build(make_folder(target))
        with tempfile.TemporaryDirectory() as folder:
            attempt(built[kind].resolve(), Path(folder))
            if not list(Path(folder, "tried").glob("*.nii.gz")):
                raise BundleError(f"{built[kind]} samples nothing")
        print(f"{built[kind]}: tried")
    files = sorted(path for path in target.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{file_hash(path)}  {path.relative_to(target).as_posix()}\n" for path in files]
    write_text(target / SUMS, "".join(lines))
    return built


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts release", description=str(__doc__).split(": ", 1)[1])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "dist", help="where they go")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=tuple(KINDS))
    flags = parser.parse_args()
    release(flags.output_dir, flags.kinds)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
