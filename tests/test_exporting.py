# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Exported networks: onnxruntime gives the volumes that PyTorch gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BASE, ROOT, TINY, RunHere, computed_once
from monai.bundle import ckpt_export
from released import configuration, write_weights

from scripts.core.errors import find_bundle_error

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

EXPORT, EXPORTED = "configs/export.yaml", "configs/exported.yaml"
SMALL: dict[str, Any] = {  # of one level each: most of the time goes into taking the graphs apart
    "network_def::channels": [8],
    "network_def::attention_levels": [True],
    "network_def::num_head_channels": [8],
    "network_def::norm_num_groups": 4,
}
SCALE = 1.7
FLAGS = {"num_inference_steps": 3, "seed": 5, "output_dtype": "float32", "age": 0.9}


@pytest.fixture(scope="module")
def bundle(shared_dir: Path, run_here: RunHere) -> Path:
    """A bundle with weights that have a latent scale, exported in both formats. Tests must not change it."""
    return computed_once(shared_dir / "exporting", lambda folder: export_both(folder, run_here))


def export_both(folder: Path, run_here: RunHere) -> None:
    (folder / "models").mkdir()
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    write_weights(folder / "models", configuration(**SMALL))
    weights = folder / "models" / "tiny_diffusion.pt"
    facts = {"latent_scale": SCALE, "condition_dropout": 0.1}
    torch.save({"diffusion": torch.load(weights, weights_only=True), "facts": facts}, weights)
    run_here([BASE, TINY, EXPORT], bundle_root=str(folder), formats="onnx,pt2", **SMALL)


def voxels(folder: Path) -> list[np.ndarray]:
    images: list[Any] = [nib.load(path) for path in sorted(folder.glob("*.nii.gz"))]
    return [image.get_fdata() for image in images]


def test_volumes_are_those_of_the_networks(bundle: Path, run_here: RunHere, tmp_path: Path) -> None:
    flags = {"bundle_root": str(bundle), **FLAGS, "sampler": "unipc", "guidance": 2.0}
    run_here([BASE, TINY], output_dir=str(tmp_path / "torch"), **SMALL, **flags)
    run_here([BASE, TINY, EXPORTED], output_dir=str(tmp_path / "onnx"), **flags)
    expected, found = voxels(tmp_path / "torch"), voxels(tmp_path / "onnx")
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected):
        assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()
    sidecar = json.loads(next((tmp_path / "onnx").glob("*.json")).read_text())
    assert sidecar["latent_scale"] == SCALE and sidecar["weights"]["diffusion"]["file"] == "diffusion.onnx"


def test_pt2_files_hold_the_same_networks(bundle: Path) -> None:
    record = json.loads((bundle / "exported" / "export.json").read_text())
    generator = torch.Generator().manual_seed(0)
    for name, inputs in record["inputs"].items():
        given = {key: torch.rand(3, *shape[1:], generator=generator) for key, shape in inputs.items()}
        with torch.no_grad():
            expected = torch.export.load(bundle / "exported" / f"{name}.pt2").module()(**given)
        session = onnxruntime.InferenceSession(bundle / "exported" / f"{name}.onnx")
        (found,) = session.run(None, {key: tensor.numpy() for key, tensor in given.items()})
        assert np.abs(found - expected.numpy()).max() < 1e-4 * float(expected.abs().max())


def test_record_says_what_a_program_needs(bundle: Path) -> None:
    record = json.loads((bundle / "exported" / "export.json").read_text())
    assert record["inputs"]["diffusion"] == {
        "x": ["batch", 7, 8, 12, 8],
        "timesteps": ["batch"],
        "context": ["batch", 1, 4],
    }
    assert record["inputs"]["decoder"] == {"latent": ["batch", 3, 8, 12, 8]}
    assert record["facts"]["target"] == "epsilon" and list(record["facts"]["conditions"])[1] == "age"
    files = {"decoder.onnx", "decoder.pt2", "diffusion.onnx", "diffusion.pt2", "export.json"}
    assert {path.name for path in (bundle / "exported").glob("[!.]*")} == files


@pytest.mark.parametrize(
    ("change", "flags", "told"),
    [
        ("export.json", {}, "export the networks with configs/export.yaml"),
        ("decoder.onnx", {}, "export the networks with configs/export.yaml"),
        (None, {"conditions::age::maximum": 90}, "was trained with age (age_years, 44 to 82 years)"),
        (None, {"target": "velocity"}, "give --target epsilon"),
        (None, {"export_dir": "nowhere"}, "there is no nowhere/export.json"),
    ],
)
def test_exports_that_do_not_fit(
    change: str | None, flags: dict[str, Any], told: str, bundle: Path, run_here: RunHere, tmp_path: Path
) -> None:
    shutil.copytree(bundle / "exported", tmp_path / "exported")
    if change:
        (tmp_path / "exported" / change).unlink()
    folders = {"export_dir": str(tmp_path / "exported"), "output_dir": str(tmp_path / "out")}
    given = {"bundle_root": str(bundle), **folders, **flags}
    with pytest.raises(Exception) as caught:
        run_here([BASE, TINY, EXPORTED], **given)
    assert told in str(find_bundle_error(caught.value))


def test_damaged_files(bundle: Path, run_here: RunHere, tmp_path: Path) -> None:
    shutil.copytree(bundle / "exported", tmp_path / "exported")
    for name, told in (("decoder.onnx", "onnxruntime cannot read"), ("export.json", "is damaged: export")):
        (tmp_path / "exported" / name).write_bytes(b"x")
        with pytest.raises(Exception) as caught:
            run_here([BASE, TINY, EXPORTED], bundle_root=str(bundle), export_dir=str(tmp_path / "exported"))
        assert told in str(find_bundle_error(caught.value))


def test_unknown_format(bundle: Path, run_here: RunHere, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:
        run_here([BASE, TINY, EXPORT], bundle_root=str(bundle), export_dir=str(tmp_path), formats="ts", **SMALL)
    assert "--formats must be among onnx, pt2, got 'ts'" in str(find_bundle_error(caught.value))
    assert list(tmp_path.glob("[!.]*")) == []


def test_monais_own_command_exports_the_decoder(bundle: Path, tmp_path: Path) -> None:
    files = {"ckpt_file": bundle / "models" / "tiny_autoencoder.pt", "meta_file": ROOT / "configs" / "metadata.json"}
    ckpt_export(
        net_id="decoder",
        filepath=str(tmp_path / "decoder.ts"),
        config_file=[str(ROOT / name) for name in (BASE, TINY)],
        use_trace=True,
        input_shape=[1, 3, 8, 12, 8],
        **{name: str(path) for name, path in files.items()},
    )
    latent = torch.rand(1, 3, 8, 12, 8, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(bundle / "exported" / "decoder.onnx")
    (scaled,) = session.run(None, {"latent": SCALE * latent.numpy()})
    with torch.no_grad():
        found = torch.jit.load(tmp_path / "decoder.ts")(latent).numpy()
    assert np.abs(found - scaled).max() < 1e-4 * np.abs(scaled).max()
