# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Feature networks against plain computations on weights of their formats, and the features kept on disk."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from processes import run_ranks
from torch import Tensor

from scripts.core.errors import BundleError
from scripts.evaluation.metrics import highres3dnet, inception
from scripts.evaluation.metrics.features import FeatureNetworks, FeatureSet
from scripts.evaluation.metrics.highres3dnet import HighRes3DNet, HighRes3DNetFeatures, on_landmarks, whitened
from scripts.evaluation.metrics.inception import InceptionFeatures, planes
from scripts.evaluation.metrics.medicalnet import MedicalNet, medicalnet_resnet50, standardised
from scripts.volumes.folders import VolumeFolder

LAS = np.diag([-1.0, 1.0, 1.0, 1.0])

CPU = torch.device("cpu")


def volume(seed: int, shape: tuple[int, int, int] = (20, 28, 24)) -> Tensor:
    return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(seed))


def randomised(network: torch.nn.Module) -> dict[str, Tensor]:
    """A state dict of random weights with which activations keep their scale."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = value
        elif value.ndim > 1:
            state[name] = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        else:
            state[name] = 0.5 + torch.rand(value.shape, generator=generator)
    return state


# MedicalNet


@pytest.fixture(scope="module")
def medicalnet_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file as MedicalNet's authors publish them: saved from a network in DataParallel."""
    path = tmp_path_factory.mktemp("medicalnet") / "resnet_50_23dataset.pth"
    state = {f"module.{name}": value for name, value in randomised(medicalnet_resnet50()).items()}
    torch.save({"state_dict": state}, path)
    yield path
    path.unlink()


def medicalnet_by_hand(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """The public code's ResNet-50, one operation after the other."""

    def normalised(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(
            x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"]
        )

    def bottleneck(x: Tensor, name: str, stride: int, dilation: int) -> Tensor:
        y = F.relu(normalised(F.conv3d(x, w[f"{name}.conv1.weight"]), f"{name}.bn1"))
        y = F.conv3d(y, w[f"{name}.conv2.weight"], stride=stride, padding=dilation, dilation=dilation)
        y = F.relu(normalised(y, f"{name}.bn2"))
        y = normalised(F.conv3d(y, w[f"{name}.conv3.weight"]), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in w:
            x = normalised(F.conv3d(x, w[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
        return F.relu(x + y)

    x = F.relu(normalised(F.conv3d(x, w["conv1.weight"], stride=2, padding=3), "bn1"))
    x = F.max_pool3d(x, 3, stride=2, padding=1)
    for stage, (blocks, stride, dilation) in enumerate(((3, 1, 1), (4, 2, 1), (6, 1, 2), (3, 1, 4)), start=1):
        for block in range(blocks):
            x = bottleneck(x, f"layer{stage}.{block}", stride if block == 0 else 1, dilation)
    return x.mean((0, 2, 3, 4))


@torch.inference_mode()
def test_medicalnet_is_the_public_network(medicalnet_file: Path) -> None:
    weights = torch.load(medicalnet_file, weights_only=True)["state_dict"]
    plain = {name.removeprefix("module."): value for name, value in weights.items()}
    x = volume(1, (44, 36, 40))
    expected = medicalnet_by_hand((x - x.mean()) / x.std(correction=0), plain)
    found = MedicalNet(medicalnet_file).load(CPU)(x)
    assert found.shape == (2048,) and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_medicalnet_does_not_see_brightness_and_contrast(medicalnet_file: Path) -> None:
    extract = MedicalNet(medicalnet_file).load(CPU)
    torch.testing.assert_close(extract(0.2 + 0.5 * volume(2)), extract(volume(2)), rtol=1e-3, atol=1e-4)
    assert standardised(torch.ones(1, 1, 3, 3, 3)).abs().max() == 0.0


def test_medicalnet_without_a_file_says_where_to_get_one() -> None:
    assert not MedicalNet(None).given and MedicalNet("x.pth").given
    for path in (None, "gone.pth"):
        with pytest.raises(BundleError, match="give --medicalnet_path resnet_50_23dataset.pth from https"):
            MedicalNet(path).facts()


WRONG: dict[str, Any] = {
    "holds no weights": [1, 2],
    "holds no weights of MedicalNet's ResNet-50": {"state_dict": {}},
    "is not MedicalNet's ResNet-50 .*[mM]issing": {"state_dict": {"module.conv1.weight": torch.zeros(64, 1, 7, 7, 7)}},
    "is not MedicalNet's ResNet-50": {"conv1.weight": torch.zeros(64, 1, 3, 3, 3)},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_medicalnet_file_is_refused(tmp_path: Path, message: str) -> None:
    torch.save(WRONG[message], tmp_path / "x.pth")
    with pytest.raises(BundleError, match=message):
        MedicalNet(tmp_path / "x.pth").load(CPU)


class Evil:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_medicalnet_file_runs_no_pickle(tmp_path: Path) -> None:
    torch.save({"state_dict": Evil(tmp_path / "pwned")}, tmp_path / "x.pth")
    with pytest.raises(BundleError, match="holds no weights"):
        MedicalNet(tmp_path / "x.pth").load(CPU)
    assert not (tmp_path / "pwned").exists()


# HighRes3DNet


def highres_by_hand(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """The network of Li et al. 2017 under the package's names, one operation after the other."""

    def normalised(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(
            x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"]
        )

    name = "block.0.convolutional_block"
    x = F.relu(normalised(F.conv3d(x, w[f"{name}.1.weight"], padding=1), f"{name}.2"))
    for stage, dilation in ((1, 1), (2, 2), (3, 4)):
        for block in range(3):
            y = x
            for layer in range(2):
                name = f"block.{stage}.dilation_block.{block}.residual_block.{layer}.convolutional_block"
                y = F.relu(normalised(y, f"{name}.0"))
                y = F.conv3d(y, w[f"{name}.3.weight"], padding=dilation, dilation=dilation)
            more = (y.shape[1] - x.shape[1]) // 2
            empty = torch.zeros(1, more, *x.shape[2:])
            x = torch.cat([empty, x, empty], dim=1) + y
    name = "block.4.convolutional_block"
    return F.relu(normalised(F.conv3d(x, w[f"{name}.0.weight"]), f"{name}.1"))


@torch.inference_mode()
def test_highres3dnet_is_the_published_network_s_layers() -> None:
    network = HighRes3DNet().eval()
    weights = randomised(network)
    network.load_state_dict(weights)
    x = volume(3, (12, 10, 14))
    found = network(x)
    assert found.shape == (1, 80, 12, 10, 14)
    torch.testing.assert_close(found, highres_by_hand(x, weights), rtol=1e-3, atol=1e-4)


def test_landmarks_and_whitening() -> None:
    x = volume(4, (30, 30, 30))
    mapped = on_landmarks(x)
    percentiles = torch.tensor([0.01, 0.5, 0.99])
    expected = torch.tensor([0.0, highres3dnet.LANDMARKS[6], 100.0])
    torch.testing.assert_close(mapped.flatten().quantile(percentiles), expected, atol=0.05, rtol=0)
    torch.testing.assert_close(on_landmarks(5.0 + 3.0 * x), mapped, atol=1e-3, rtol=1e-4)
    above = mapped > mapped.mean()
    assert abs(float(whitened(mapped)[above].mean())) < 1e-4
    assert float(whitened(mapped)[above].std(correction=0)) == pytest.approx(1.0, abs=1e-4)


def test_an_empty_volume_stays_finite() -> None:
    empty = torch.zeros(1, 1, 8, 8, 8)
    assert whitened(on_landmarks(empty)).isfinite().all()


@pytest.mark.parametrize("kind", [HighRes3DNetFeatures, InceptionFeatures])
def test_other_files_in_place_of_fetched_networks_are_refused(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "x.pth").write_bytes(b"something else")
    with pytest.raises(BundleError, match="x.pth is not"):
        kind(tmp_path / "x.pth").load(CPU)


# Inception


def test_planes_hold_the_slices_of_each_axis() -> None:
    x = volume(5, (11, 21, 31))
    sagittal, coronal, axial = planes(x, 3)
    assert sagittal.shape == coronal.shape == axial.shape == (3, 3, 299, 299)
    middle = F.interpolate(x[:, :, 5], (299, 299), mode="bilinear")[0, 0]
    torch.testing.assert_close(sagittal[1], ((255 * middle - 128) / 128).expand(3, -1, -1))
    last = F.interpolate(x[:, :, :, :, 24], (299, 299), mode="bilinear")[0, 0]
    torch.testing.assert_close(axial[2, 0], (255 * last - 128) / 128)
    clipped = torch.cat(list(planes(2 * x - 0.5, 2)))
    assert float(clipped.min()) == -1.0 and float(clipped.max()) == 127 / 128


# As published


@pytest.mark.network
@torch.inference_mode()
def test_highres3dnet_is_the_package_s(tmp_path: Path) -> None:
    files = {f"highresnet/{name}.py": tmp_path / "highresnet" / f"{name}.py" for name in ("highresnet", "histogram")}
    highres3dnet.PACKAGE.extract({**files, highres3dnet.MEMBER: tmp_path / "weights.pth"})
    code = f"""
        import sys, numpy as np, torch
        sys.path.insert(0, {str(tmp_path)!r})
        from highresnet.highresnet import HighRes3DNet
        from highresnet.histogram import normalize
        x = np.load({str(tmp_path / "x.npy")!r})
        np.save({str(tmp_path / "mapped.npy")!r}, normalize(x, np.array({list(highres3dnet.LANDMARKS)})))
        network = HighRes3DNet(1, 160, add_dropout_layer=True).eval()
        network.load_state_dict(torch.load({str(tmp_path / "weights.pth")!r}, weights_only=True))
        with torch.no_grad():
            np.save({str(tmp_path / "y.npy")!r}, network.block[:-2](torch.from_numpy(x)[None, None]).numpy())
    """
    x = volume(6, (16, 18, 20))
    x[:, :, :4] = 0.0
    np.save(tmp_path / "x.npy", x[0, 0].numpy())
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    mapped = torch.from_numpy(np.load(tmp_path / "mapped.npy")).float()
    torch.testing.assert_close(on_landmarks(x)[0, 0], mapped, rtol=1e-4, atol=1e-3)
    network = HighRes3DNet().eval()
    weights = torch.load(tmp_path / "weights.pth", weights_only=True)
    network.load_state_dict({k: v for k, v in weights.items() if not k.startswith("block.6.")})
    torch.testing.assert_close(network(x), torch.from_numpy(np.load(tmp_path / "y.npy")), rtol=1e-3, atol=1e-4)
    features = HighRes3DNetFeatures(tmp_path / "weights.pth", shrink=1).load(CPU)(x)
    assert features.shape == (80,) and features.isfinite().all()


@pytest.mark.network
@torch.inference_mode()
def test_inception_is_fetched_and_gives_features(tmp_path: Path) -> None:
    network = InceptionFeatures(tmp_path / "models" / "inception.pt", slices=2)
    features = network.load(CPU)(volume(7))
    assert features.shape == (network.dimension,) == (6144,) and features.isfinite().all()
    assert float(features.min()) >= 0.0 and inception.WEIGHTS_SHA256 in network.facts().values()


# Features on disk


class Counting:
    """Stands in for a network: mean and spread of a volume; remembers what it was asked for."""

    given = False
    dimension = 2

    def __init__(self, version: int = 1, fails_at: int | None = None) -> None:
        self.version, self.fails_at, self.seen = version, fails_at, 0

    def facts(self) -> dict[str, Any]:
        return {"network": "counting", "version": self.version}

    def load(self, device: torch.device) -> Any:
        return self.extract

    def extract(self, x: Tensor) -> Tensor:
        if self.seen == self.fails_at:
            raise KeyboardInterrupt
        self.seen += 1
        return self.version * torch.stack([x.mean(), x.std()])


def folder_of(path: Path, *seeds: int) -> VolumeFolder:
    path.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        nib.save(
            nib.Nifti1Image(volume(seed, (4, 5, 6))[0, 0].numpy(), LAS),
            path / f"{seed}.nii.gz",
        )
    return VolumeFolder(path, "real_dir")


def features_of(folder: VolumeFolder, network: Counting, cache: Path) -> FeatureSet:
    return FeatureSet(folder, FeatureNetworks("counting", {"counting": network}), str(cache))


def test_features_are_computed_once_and_found_again_by_content(tmp_path: Path) -> None:
    first = Counting()
    expected = features_of(folder_of(tmp_path / "a", 1, 2, 3), first, tmp_path / "cache").matrix("counting")
    assert first.seen == 3 and expected.dtype == np.float64
    assert expected[1] == pytest.approx([float(volume(2, (4, 5, 6)).mean()), float(volume(2, (4, 5, 6)).std())])
    (tmp_path / "a" / "2.nii.gz").rename(tmp_path / "a" / "0.nii.gz")
    again = Counting()
    moved = features_of(VolumeFolder(tmp_path / "a", "real_dir"), again, tmp_path / "cache").matrix("counting")
    assert again.seen == 0 and np.array_equal(moved, expected[[1, 0, 2]])


def test_another_network_or_volume_is_computed_anew(tmp_path: Path) -> None:
    features_of(folder_of(tmp_path / "a", 1, 2), Counting(), tmp_path / "cache").extract()
    other, changed = Counting(version=2), Counting()
    features_of(folder_of(tmp_path / "a"), other, tmp_path / "cache").extract()
    nib.save(nib.Nifti1Image(volume(9, (4, 5, 6))[0, 0].numpy(), LAS), tmp_path / "a" / "1.nii.gz")
    features_of(folder_of(tmp_path / "a"), changed, tmp_path / "cache").extract()
    assert (other.seen, changed.seen) == (2, 1)
    facts = sorted(json.loads(path.read_text())["version"] for path in (tmp_path / "cache").glob("*/network.json"))
    assert facts == [1, 2]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", 1, 2, 3, 4)
    with pytest.raises(KeyboardInterrupt):
        features_of(folder, Counting(fails_at=3), tmp_path / "cache").extract()
    rest = Counting()
    features_of(folder, rest, tmp_path / "cache").extract()
    assert rest.seen == 1


def test_damaged_features_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    features = features_of(folder_of(tmp_path / "a", 1), Counting(), tmp_path / "cache")
    whole = features.matrix("counting")
    (file,) = (tmp_path / "cache").glob("*/*.npy")
    for damage in (b"", b"\x93NUMPY", np.zeros(3), whole[0] * np.nan, whole[0] + 1j, np.array(["a", "b"])):
        caplog.clear()
        file.write_bytes(damage) if isinstance(damage, bytes) else np.save(file, damage)
        assert np.array_equal(features.matrix("counting"), whole) and str(file) in caplog.text


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = Counting()
    network.extract = lambda x: torch.tensor([0.0, torch.nan])  # type: ignore[method-assign]
    with pytest.raises(BundleError, match="no finite features of .*1.nii.gz"):
        features_of(folder_of(tmp_path / "a", 1), network, tmp_path / "cache").extract()
    assert not list((tmp_path / "cache").glob("*/*.npy"))


@pytest.mark.parametrize(
    ("names", "chosen"), [(None, []), ("", []), ("b", ["b"]), ("b, a", ["a", "b"]), (("a", "b"), ["a", "b"])]
)
def test_networks_are_chosen_by_name(names: Any, chosen: list[str]) -> None:
    networks = FeatureNetworks(names, {"a": Counting(), "b": Counting()})
    assert list(networks.chosen) == chosen and networks.requested == bool(chosen)


def test_a_network_with_a_flag_of_its_own_is_chosen_by_it(medicalnet_file: Path) -> None:
    networks: dict[str, Any] = {"medicalnet": MedicalNet(medicalnet_file), "counting": Counting()}
    assert list(FeatureNetworks(None, networks).chosen) == ["medicalnet"]


@pytest.mark.parametrize(("names", "message"), [("c", "no network 'c'; there are a, b"), (3, "separated by commas")])
def test_unknown_networks_are_refused(names: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        FeatureNetworks(names, {"a": Counting(), "b": Counting()})


def test_processes_share_the_work(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", 1, 2, 3, 4, 5)
    script = tmp_path / "share.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from pathlib import Path
        from test_feature_networks import Counting, features_of
        from scripts.volumes.folders import VolumeFolder
        work = Path({str(tmp_path)!r})
        network = Counting()
        features = features_of(VolumeFolder(work / "a", "real_dir"), network, work / "cache")
        features.extract()
        assert features.matrix("counting").shape == (5, 2)
        (work / f"seen-{{os.environ['RANK']}}").write_text(str(network.seen))
        """)
    )
    assert all(done.returncode == 0 for done in run_ranks(2, script))
    assert [(tmp_path / f"seen-{rank}").read_text() for rank in (0, 1)] == ["2", "3"]
