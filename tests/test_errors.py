# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import BASE, ROOT, TINY, RunBundle
from monai.bundle import ConfigParser
from processes import run_python
from torch._utils import ExceptionWrapper

from scripts.core.errors import BundleError, find_bundle_error
from scripts.preparation.registration import deterministic_ants
from scripts.preparation.sources import find_sources


def in_a_worker(error: Exception) -> ExceptionWrapper:
    """What the process of a data loader sends of an error, as PyTorch makes it there."""
    try:
        try:
            raise OSError("no such file")
        except OSError as cause:
            raise error from cause
    except Exception:
        return ExceptionWrapper(sys.exc_info(), "in DataLoader worker process 0")


@pytest.mark.parametrize("module", ["scripts.errors", "scripts.core.errors", "errors"])
def test_an_error_of_a_loader_s_process_is_found_wherever_its_class_lives(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BundleError, "__module__", module)
    with pytest.raises(BundleError) as caught:
        in_a_worker(BundleError("cannot read sub-1.nii.gz: restore it")).reraise()
    assert f"{module}.BundleError" in str(caught.value)
    assert str(find_bundle_error(caught.value)) == "cannot read sub-1.nii.gz: restore it"


def test_another_error_of_a_loader_s_process_is_none() -> None:
    with pytest.raises(ValueError) as caught:
        in_a_worker(ValueError("BundleError: no")).reraise()
    assert find_bundle_error(caught.value) is None


def test_sampling_training_and_phantoms_do_without_the_packages_of_the_preparation() -> None:
    overlays = ["train_autoencoder", "encode_latents", "train_diffusion", "train_segmenter", "train_brain_age"]
    files = [BASE, *(f"configs/{name}.yaml" for name in (*overlays, "phantoms", "evaluate"))]
    modules = {
        target.rpartition(".")[0]
        for file in files
        for target in targets(ConfigParser.load_config_file(str(ROOT / file)))
    }
    code = f"import importlib, sys\nfor name in {sorted(modules)}: importlib.import_module(name)\n"
    done = run_python("-c", f"{code}sys.exit(bool(sys.modules.keys() & {{'ants', 'ancpbids'}}))")
    assert len(modules) > 30 and done.returncode == 0


def targets(content: object) -> set[str]:
    """The classes and functions of this package that a configuration names."""
    entries = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    own = content.get("_target_", "") if isinstance(content, dict) else ""
    return {name for entry in entries for name in targets(entry)} | ({own} if own.startswith("scripts.") else set())


def test_a_package_of_the_preparation_that_lacks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ants", None)
    monkeypatch.setitem(sys.modules, "ancpbids", None)
    with pytest.raises(BundleError, match="pip install antspyx"):
        deterministic_ants(1)
    with pytest.raises(BundleError, match="pip install ancpbids"):
        find_sources(tmp_path, None)


def test_an_id_that_there_is_not_is_named_in_one_line() -> None:
    done = run_python("-m", "scripts", "sample", "--with", "tiny", "--run_id", "nope")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: the configuration has no nope" in done.stderr


def test_a_component_that_cannot_be_built_is_told_with_its_own_reason(run_bundle: RunBundle, output_dir: Path) -> None:
    done = run_bundle([BASE, TINY], "--output_dir", output_dir, "--network_def::num_res_block", 1)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot build DiffusionModelUNet" in done.stderr and "'num_res_block'" in done.stderr
