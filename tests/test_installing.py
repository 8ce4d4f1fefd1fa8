# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle installed: what its wheel holds, its command from any folder, and the command line of BIDS Apps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from scripts.core import paths
from scripts.tools.bids_app import commands

SOURCES = ("LICENSE", "README.md", "large_files.yml", "metadata.json", "pyproject.toml", "setup.py")
FOLDERS = ("brain_ldm", "configs", "docs", "models", "scripts")


def test_the_command_of_an_installed_bundle_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths.as_called("`python -m scripts sample`") == "`python -m scripts sample`"
    monkeypatch.setattr(paths, "INSTALLED", True)
    assert paths.as_called("`python -m scripts sample`") == "`brain-ldm sample`"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            "in out participant --participant-label 01 sub-02 --n-cpus 2",
            ["prepare --input_dir in --dataset_dir out --participant_label 01,sub-02 --num_workers 2"],
        ),
        (
            "in out participant --session_label 1 --bids-filter-file f.json --skip-bids-validation --bias_field 1",
            [
                "prepare --input_dir in --dataset_dir out --session_label 1 --bids_filter_file f.json --num_workers 0 "
                "--bias_field 1"
            ],
        ),
        ("in out group", ["prepare --input_dir in --dataset_dir out --num_workers 0 --assemble 1"]),
        (
            "in out group --synthetic-dir a,b -- --with tiny",
            [
                "prepare --input_dir in --dataset_dir out --num_workers 0 --assemble 1",
                "evaluate --synthetic_dir a,b --real_dir out --output_dir out/derivatives/evaluation --with tiny",
            ],
        ),
    ],
)
def test_the_line_of_a_bids_app(line: str, wanted: list[str]) -> None:
    assert [" ".join(command) for command in commands(line.split())] == wanted


@pytest.mark.parametrize("line", ["in out", "in out people", "in out group --n-cpus many"])
def test_a_bad_line_of_a_bids_app_ends_with_2(line: str) -> None:
    with pytest.raises(SystemExit) as caught:
        commands(line.split())
    assert caught.value.code == 2


@pytest.mark.slow
def test_a_wheel_installs_one_package_and_works_from_any_folder(tmp_path: Path) -> None:
    """In a venv that has this environment's packages, but not this repository."""
    source, empty = tmp_path / "source", tmp_path / "empty"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pt"))
    for name in SOURCES:
        shutil.copy(ROOT / name, source / name)
    pip: list[str | os.PathLike] = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."], cwd=source, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        assert {name.split("/")[0] for name in opened.namelist() if ".dist-info" not in name} == {"brain_ldm"}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    (site / "all.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install: list[str | os.PathLike] = ["install", "-q", "--no-deps", "--no-index", "--ignore-installed", wheel]
    subprocess.run([*pip, "--python", python, *install], check=True)
    before = {path for path in site.rglob("*") if path.suffix != ".pyc" and path.name != "__pycache__"}
    empty.mkdir()
    command = [str(tmp_path / "venv" / "bin" / "brain-ldm"), "sample", "--with", "demo", "--seed", "1"]
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--num_inference_steps", "1"], cwd=empty, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert (empty / "output" / "sample_seed-1_000000.nii.gz").is_file()
    assert before == {path for path in site.rglob("*") if path.suffix != ".pyc" and path.name != "__pycache__"}
    done = subprocess.run(["sh", "-c", f"{command[0]} sampel"], cwd=empty, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no verb 'sampel'" in done.stderr
