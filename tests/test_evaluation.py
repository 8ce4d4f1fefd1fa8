# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The verb `evaluate`: its metrics against outside implementations, its report, and what it refuses."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import scipy.stats
import torch
from conftest import BASE, ROOT, TINY, RunTiny
from monai.bundle import ConfigParser
from monai.metrics import MultiScaleSSIMMetric, SSIMMetric
from monai.networks.nets import AutoencoderKL
from scipy.ndimage import correlate1d, gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from scripts.compute.kept import Values
from scripts.core import bootstrap
from scripts.core.bootstrap import confidence_interval, difference, summarise
from scripts.core.errors import BundleError, find_bundle_error
from scripts.evaluation.metrics.fid import frechet_distance_of_samples
from scripts.evaluation.metrics.kid import polynomial_mmd
from scripts.evaluation.metrics.ms_ssim import WEIGHTS, ms_ssim_metric, scales_that_fit
from scripts.evaluation.metrics.ssim import SSIM, MultiScaleSSIM
from scripts.evaluation.pairs import random_pairs
from scripts.evaluation.reconstruction import Reconstruction
from scripts.volumes.folders import VolumeFolder

LAS = np.diag([-1.0, 1.0, 1.0, 1.0])

EVALUATE = "configs/evaluate.yaml"
SHAPE = (32, 48, 32)  # the grid of tiny.yaml
RECONSTRUCTED = ["psnr", "ssim", "mae"]
PAIRED = ["ms_ssim", "four_g_r_ssim"]


def volume(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Smooth random intensities that span 0 to 1."""
    smooth = gaussian_filter(np.random.default_rng(seed).random(shape), 2.0)
    return ((smooth - smooth.min()) / np.ptp(smooth)).astype(np.float32)


def batch(array: np.ndarray) -> Tensor:
    """(1, 1, X, Y, Z) float32."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None]


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, LAS), path)
    return path


def folder_of(path: Path, *seeds: int) -> Path:
    for seed in seeds:
        save(path / f"volume_{seed}.nii.gz", volume(seed))
    return path


def ms_ssim(a: np.ndarray, b: np.ndarray, **options: Any) -> float:
    return float(ms_ssim_metric(a.shape, **options)(batch(a), batch(b)))


def run_here(output_dir: Path, **overrides: Any) -> dict[str, Any]:
    """The verb at tiny size in this process: its report."""
    config = ConfigParser(ConfigParser.load_config_files([str(ROOT / file) for file in (BASE, EVALUATE, TINY)]))
    config.update({"output_dir": str(output_dir), "device": "cpu", **overrides})
    try:
        config.get_parsed_content("evaluate")()
    except Exception as error:
        raise find_bundle_error(error) or error from None
    return json.loads((output_dir / "evaluation.json").read_text())["measures"]


def rows_of(output_dir: Path, measure: str, model: str | None = None) -> list[dict[str, Any]]:
    """The figures of one measure in a report."""
    rows = json.loads((output_dir / "evaluation.json").read_text())["rows"]
    return [row for row in rows if row["measure"] == measure and row.get("model") == model]


# Structural similarity


def reference_ssim(a: np.ndarray, b: np.ndarray, side: int) -> tuple[float, float]:
    """Mean SSIM and mean contrast-structure of Wang et al. 2004 with a Gaussian window, in float64."""
    kernel = np.exp(-0.5 * (np.arange(side) - side // 2) ** 2 / 1.5**2)
    inner = (slice(side // 2, -(side // 2)),) * 3

    def mean(x: np.ndarray) -> np.ndarray:
        for axis in range(3):
            x = correlate1d(x, kernel / kernel.sum(), axis)
        return x[inner]

    mean_a, mean_b, mean_ab = mean(a), mean(b), mean(a * b)
    spread = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    structure = (2 * (mean_ab - mean_a * mean_b) + 0.03**2) / (spread + 0.03**2)
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return float((luminance * structure).mean()), float(structure.mean())


def reference_ms_ssim(a: np.ndarray, b: np.ndarray, weights: list[float]) -> float:
    a, b, product = a.astype(float), b.astype(float), 1.0
    for weight in weights[:-1]:
        product *= max(reference_ssim(a, b, 7)[1], 0.0) ** weight
        a, b = halved(a), halved(b)
    return product * max(reference_ssim(a, b, 7)[0], 0.0) ** weights[-1]


def halved(x: np.ndarray) -> np.ndarray:
    x = x[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean(axis=(1, 3, 5))


def related(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    a = volume(seed, shape)
    return a, np.clip(0.8 * a + 0.2 * volume(seed + 1, shape), 0, 1)


def test_the_reference_is_scikit_image_s_ssim() -> None:
    a, b = related(1, SHAPE)
    theirs = structural_similarity(a, b, data_range=1.0, gaussian_weights=True, use_sample_covariance=False)
    assert reference_ssim(a.astype(float), b.astype(float), 11)[0] == pytest.approx(theirs, rel=1e-5)


def test_ssim_is_scikit_image_s() -> None:
    a, b = related(1, (40, 30, 27))
    theirs = structural_similarity(
        a.astype(float), b.astype(float), data_range=1.0, gaussian_weights=True, use_sample_covariance=False
    )
    assert float(SSIM(spatial_dims=3, win_size=11)(batch(a), batch(b))) == pytest.approx(theirs, abs=1e-6)


def test_one_scale_with_a_uniform_window_is_scikit_image_s_ssim() -> None:
    a, b = related(2, (9, 12, 10))
    theirs = structural_similarity(a, b, data_range=1.0, win_size=7, use_sample_covariance=False)
    assert ms_ssim(a, b, kernel_type="uniform") == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("shape", [(9, 12, 10), (15, 22, 17), (32, 48, 33), (64, 70, 66)])
def test_ms_ssim_is_the_reference_s_on_as_many_scales_as_fit(shape: tuple[int, ...]) -> None:
    a, b = related(3, shape)
    metric = ms_ssim_metric(shape)
    assert float(metric(batch(a), batch(b))) == pytest.approx(reference_ms_ssim(a, b, list(metric.weights)), rel=1e-3)


OPTIONS: list[dict[str, Any]] = [{}, {"kernel_type": "uniform"}, {"k1": 0.05, "k2": 0.1, "data_range": 2.0}]


@pytest.mark.parametrize("options", OPTIONS)
def test_similarities_are_monai_s(options: dict[str, Any]) -> None:
    a, b = (torch.cat([batch(x), batch(y)]) for x, y in (related(6, (40, 71, 66)), related(8, (40, 71, 66))))
    for ours, theirs, more in (
        (
            MultiScaleSSIM,
            MultiScaleSSIMMetric,
            {"kernel_size": (7, 5, 3), "weights": (0.3, 0.5), "kernel_sigma": (1.5, 1.0, 0.7)},
        ),
        (SSIM, SSIMMetric, {"win_size": 11}),
    ):
        settings = {"spatial_dims": 3, **more, **options}
        torch.testing.assert_close(
            ours(**settings)(a, b), theirs(**settings)(a, b), atol=3e-5, rtol=0
        )  # MONAI's own error


def test_similarities_refuse_what_they_do_not_measure() -> None:
    metric = SSIM(spatial_dims=3, win_size=7)
    for first, second in ((torch.zeros(1, 2, 8, 8, 8),) * 2, (torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 9))):
        with pytest.raises(ValueError, match="shape"):
            metric(first, second)
    with pytest.raises(ValueError, match="does not fit"):
        metric(*(torch.zeros(1, 1, 6, 8, 8),) * 2)


def test_released_size_has_all_five_scales_with_wang_s_weights() -> None:
    assert tuple(ms_ssim_metric((160, 224, 160)).weights) == WEIGHTS


@pytest.mark.parametrize("size", [7, 13, 14, 27, 28, 62, 63])
def test_one_scale_more_than_chosen_does_not_fit_in_monai(size: int) -> None:
    scales = scales_that_fit(size, 7, 5)
    cube = batch(volume(0, (size, size, size)))
    weights = ms_ssim_metric((size, size, size)).weights
    assert len(weights) == scales and sum(weights) == pytest.approx(1.0, abs=1e-3)
    assert float(ms_ssim_metric((size, size, size))(cube, cube)) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises((RuntimeError, ValueError)):
        MultiScaleSSIMMetric(3, kernel_size=7, weights=WEIGHTS[: scales + 1])(cube, cube)


def test_volumes_smaller_than_the_window_are_refused() -> None:
    with pytest.raises(BundleError, match=r"\(6, 20, 20\).*7 voxels"):
        ms_ssim_metric((6, 20, 20))


def test_similarity_is_one_with_itself_and_symmetric() -> None:
    a, b = volume(4), volume(5)
    assert ms_ssim(a, a) == pytest.approx(1.0, abs=1e-6)
    assert ms_ssim(a, b) == pytest.approx(ms_ssim(b, a), rel=1e-6)


@pytest.mark.parametrize("damage", ["noise", "blur"])
def test_similarity_falls_as_damage_grows(damage: str) -> None:
    a, noise = volume(6), np.random.default_rng(0).standard_normal(SHAPE)
    levels = (0.0, 0.02, 0.05, 0.1, 0.2) if damage == "noise" else (0.0, 0.5, 1.0, 2.0, 4.0)
    damaged = [a + level * noise if damage == "noise" else gaussian_filter(a, level) for level in levels]
    values = [ms_ssim(a, b) for b in damaged]
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


# Pairs


def test_asking_for_more_pairs_than_there_are_gives_each_once() -> None:
    for size in (2, 3, 5, 8):
        assert sorted(map(tuple, random_pairs([size], 1000, 0))) == [*itertools.combinations(range(size), 2)]
    for sizes in ([2, 3], [4, 4], [6, 9], [1, 3]):
        assert sorted(map(tuple, random_pairs(sizes, 1000, 0))) == [*itertools.product(*map(range, sizes))]


@pytest.mark.parametrize("sizes", [[200], [201], [200, 150]])
def test_a_pair_needs_one_volume_that_the_pair_before_had_not(sizes: list[int]) -> None:
    pairs = random_pairs(sizes, 1000, 0) + [0, 1000 if len(sizes) == 2 else 0]
    new = [len({*pair} - {*before}) for before, pair in itertools.pairwise(pairs.tolist())]
    assert np.mean(new) < 1.05
    counts = np.unique(pairs[:, 0] if len(sizes) == 2 else pairs, return_counts=True)[1]
    assert len(counts) == sizes[0] and np.ptp(counts) <= 6


@pytest.mark.parametrize("sizes", [[200], [100_000], [300, 40]])
def test_pairs_are_distinct_in_range_and_follow_from_the_seed(sizes: list[int]) -> None:
    pairs = random_pairs(sizes, 1000, 7)
    assert pairs.shape == (1000, 2) and len(np.unique(pairs, axis=0)) == 1000
    assert (pairs >= 0).all() and (pairs < [sizes[0], sizes[-1]]).all()
    assert len(sizes) == 2 or (pairs[:, 0] < pairs[:, 1]).all()
    assert (pairs == random_pairs(sizes, 1000, 7)).all()
    assert (pairs != random_pairs(sizes, 1000, 8)).any()


def test_all_pairs_are_equally_likely() -> None:
    drawn = [tuple(pair) for seed in range(600) for pair in random_pairs([4], 2, seed).tolist()]
    counts = [drawn.count(pair) for pair in itertools.combinations(range(4), 2)]
    assert sum(counts) == 1200 and scipy.stats.chisquare(counts).pvalue > 1e-4


# Confidence intervals


def test_interval_of_single_volumes_is_scipy_s_percentile_bootstrap() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=60)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=9999, random_state=1
    ).confidence_interval
    assert confidence_interval(values, np.arange(60), 0) == pytest.approx(tuple(theirs), abs=0.03)
    generator = np.random.default_rng(0)
    means = [values[generator.integers(60, size=60)].mean() for _ in range(2000)]
    assert confidence_interval(values, np.arange(60), 0) == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-12)


@pytest.fixture
def fewer_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bootstrap: a coverage needs many intervals, each of which may be rougher."""
    monkeypatch.setattr(bootstrap, "REPEATS", 250)


def test_interval_of_pairs_covers_the_true_mean(fewer_repeats: None) -> None:
    # Pairs |a - b| of standard normal numbers have the mean 2 / sqrt(pi).
    members = random_pairs([25], 300, 0)
    hits = 0
    for trial in range(40):
        numbers = np.random.default_rng(trial).standard_normal(25)
        found = confidence_interval(np.abs(numbers[members[:, 0]] - numbers[members[:, 1]]), members, trial)
        low, high = found or (0.0, 0.0)
        hits += low <= 2 / np.sqrt(np.pi) <= high
    assert hits >= 30  # a bootstrap over pairs reaches about 18


def test_interval_follows_from_the_seed() -> None:
    values = np.random.default_rng(0).random(20)
    assert confidence_interval(values, np.arange(20), 3) == confidence_interval(values, np.arange(20), 3)
    assert confidence_interval(values, np.arange(20), 3) != confidence_interval(values, np.arange(20), 4)


def test_interval_of_a_difference_of_means_covers_the_true_one(fewer_repeats: None) -> None:
    hits = 0
    for trial in range(30):
        generator = np.random.default_rng(trial)
        sets = [generator.normal(mean, scale, size=40) for mean, scale in ((1.0, 1.0), (0.0, 3.0))]
        found, target = (summarise(values, np.arange(40), trial) for values in sets)
        low, high = difference(found, target).interval or (0.0, 0.0)
        hits += low <= 1.0 <= high
    assert hits >= 24


def test_too_few_values_have_no_interval() -> None:
    assert summarise(np.array([0.5]), np.array([[0, 1]]), 0).standard_deviation is None
    assert summarise(np.array([0.5, 0.6]), np.arange(2), 0).interval is None


# Reconstruction


class Noisy(nn.Module):
    """Stands in for an autoencoder: gives its input back with the same noise each time."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.noise = level * torch.randn(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0))

    def reconstruct(self, volumes: Tensor) -> Tensor:
        return volumes + self.noise


class Changed(nn.Module):
    """Stands in for an autoencoder that does not fit."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def reconstruct(self, volumes: Tensor) -> Tensor:
        return self.output


def reconstruction(folder: Path, autoencoder: nn.Module) -> Reconstruction:
    """The measure with the metrics of the base."""
    config = ConfigParser(ConfigParser.load_config_file(str(ROOT / BASE)))
    metrics = config.get_parsed_content("reconstruction_metrics")
    return Reconstruction(VolumeFolder(folder, "reconstruct_dir"), autoencoder, metrics, Values(folder / "values"))


def test_reconstruction_metrics_are_numpy_s_and_scikit_image_s(tmp_path: Path) -> None:
    network = Noisy(0.03)
    rows = reconstruction(folder_of(tmp_path, 1, 2), network).compute().table
    for seed, row in zip((1, 2), rows):
        original, copy = volume(seed), volume(seed) + network.noise[0, 0].numpy()
        options: dict[str, Any] = {"gaussian_weights": True, "use_sample_covariance": False}
        assert row["volume"] == f"volume_{seed}.nii.gz"
        assert row["mae"] == pytest.approx(np.abs(original - copy).mean(), rel=1e-5)
        assert row["psnr"] == pytest.approx(peak_signal_noise_ratio(original, copy, data_range=1.0), rel=1e-5)
        assert row["ssim"] == pytest.approx(structural_similarity(original, copy, data_range=1.0, **options), rel=1e-4)


def test_a_perfect_reconstruction(tmp_path: Path) -> None:
    rows = reconstruction(folder_of(tmp_path, 1, 2, 3), Noisy(0.0)).compute().rows
    found = {row.metric: row.found for row in rows}
    assert found["mae"].value == 0.0
    assert found["ssim"].value == pytest.approx(1.0, abs=1e-6)
    assert found["psnr"].value == float("inf") and found["psnr"].interval is None


@pytest.mark.parametrize(
    ("output", "message"),
    [(torch.zeros(1, 1, 8, 8, 8), "give volumes on the bundle's grid"), (torch.full((1, 1, *SHAPE), torch.nan), "NaN")],
)
def test_an_autoencoder_that_does_not_fit_is_refused(tmp_path: Path, output: Tensor, message: str) -> None:
    with pytest.raises(BundleError, match=rf"volume_1\.nii\.gz.*{message}|{message}.*volume_1\.nii\.gz"):
        reconstruction(folder_of(tmp_path, 1), Changed(output)).compute()


# Folders


def test_a_prepared_dataset_is_what_its_table_lists(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 1, 2, 3)
    (tmp_path / "participants.tsv").write_text("participant_id\tpath\na\timages/volume_3.nii.gz\n")
    folder = VolumeFolder(tmp_path, "real_dir")
    assert [folder.name(0)] == ["images/volume_3.nii.gz"] and len(folder) == 1
    assert np.allclose(folder[0][0, 0], volume(3))


def test_folders_are_searched_below_and_hidden_files_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path / "b" / "c" / "x.nii", volume(1))
    save(tmp_path / "a.nii.gz", volume(2))
    save(tmp_path / ".1234-half.nii.gz", volume(3))
    (tmp_path / "a.json").write_text("{}")
    assert [path.name for path in VolumeFolder(tmp_path, "real_dir").paths] == ["a.nii.gz", "x.nii"]


def test_scaled_integers_are_read_as_intensities(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.rint(volume(1) * 255).astype(np.uint8), LAS)
    image.header.set_slope_inter(1 / 255, 0)
    nib.save(image, tmp_path / "x.nii.gz")
    folder = VolumeFolder(tmp_path, "real_dir")
    assert np.allclose(folder[0][0, 0], volume(1), atol=0.5 / 255 + 1e-6)
    assert folder.summary()["intensities_read"] == pytest.approx([0.0, 1.0])


def test_intensities_outside_0_to_1_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"{name}.nii.gz", 200 * volume(1))
    folder = VolumeFolder(tmp_path, "real_dir")
    assert len([folder[0], folder[1], folder[0]]) == 3
    assert [record.message for record in caplog.records if "ranges from 0 to 200" in record.message] == [
        f"{tmp_path / 'a.nii.gz'} ranges from 0 to 200: the measures are meant for intensities of 0 to 1, "
        "and take these as they are"
    ]


def test_empty_volumes_are_told_also_when_all_is_known_already(tmp_path: Path) -> None:
    """4-G-R-SSIM of an empty volume with any other is 1."""
    for name in ("x", "y"):
        save(folder_of(tmp_path / "volumes", 1) / f"{name}.nii.gz", np.zeros(SHAPE, np.float32))
    for _ in range(2):
        found = run_here(tmp_path / "output", synthetic_dir=str(tmp_path / "volumes"))
        assert found["synthetic_pairs"]["synthetic_dir"]["constant_volumes"] == 2
        warnings = json.loads((tmp_path / "output" / "evaluation.json").read_text())["warnings"]
        (told,) = (text.partition(":")[0] for text in warnings if "everywhere" in text)
        assert re.fullmatch(rf"{tmp_path / 'volumes'}/[xy].nii.gz is 0 everywhere, so it shows no head", told)


def truncated(path: Path) -> None:
    save(path, volume(9))
    path.write_bytes(path.read_bytes()[:-2000])


def with_nan(path: Path) -> None:
    array = volume(9)
    array[3, 4, 5] = np.nan
    save(path, array)


def wider(path: Path) -> None:
    nib.save(nib.Nifti1Image(volume(9), np.diag([-1.0, 1.0, 2.0, 1.0])), path)


def moved(path: Path) -> None:
    affine = LAS.copy()
    affine[2, 3] = 40.0
    nib.save(nib.Nifti1Image(volume(9), affine), path)


BAD_FILES: dict[str, Any] = {
    "zzz.nii.gz has voxels of 1 x 1 x 2 mm, but .* of 1 x 1 x 1 mm": wider,
    "zzz.nii.gz .*shape": lambda path: save(path, volume(9, (32, 48, 40))),
    "zzz.nii.gz .*not 3D": lambda path: save(path, np.stack([volume(9)] * 2, axis=3)),
    "zzz.nii.gz lies elsewhere than .*volume_1.*resample_volumes": moved,
    "zzz.nii.gz.*holds NaN": with_nan,
    r"ms_ssim of .*volume_1.*zzz\.nii\.gz is nan: their intensities": lambda path: save(path, 1e25 * volume(9)),
    "zzz.nii.gz cannot be read: it is truncated or damaged": truncated,
    "zzz.nii.gz cannot be read: it is": lambda path: path.write_bytes(gzip.compress(b"no image")),
}


@pytest.mark.parametrize("message", BAD_FILES)
@pytest.mark.parametrize("flag", ["synthetic_dir", "real_dir"])
def test_bad_volumes_are_refused_and_nothing_is_written(tmp_path: Path, message: str, flag: str) -> None:
    BAD_FILES[message](folder_of(tmp_path / "volumes", 1) / "zzz.nii.gz")
    with pytest.raises(BundleError, match=message):
        run_here(tmp_path / "output", **{flag: str(tmp_path / "volumes")})
    assert not [path for path in (tmp_path / "output").glob("[!.]*") if path.name != "values"]


BAD_REQUESTS: dict[str, dict[str, Any]] = {
    "--real_dir: there is no folder .*gone": {"real_dir": "gone"},
    "--real_dir: the folder .*empty holds no": {"real_dir": "empty"},
    r"row 1 of .*participants\.tsv names .*gone\.nii\.gz": {"synthetic_dir": "listed"},
    "--synthetic_dir: .*one holds one volume": {"synthetic_dir": "one"},
    r"volume_1\.nii\.gz has shape \(32, 48, 32\).*x\.nii\.gz has \(40, 40, 40\)": {
        "synthetic_dir": "larger",
        "real_dir": "two",
    },
    r"volume .*x\.nii\.gz has shape \(40, 40, 40\), but .*volume_1\.nii\.gz has \(32, 48, 32\)": {
        "synthetic_dir": ["two", "larger"],
    },
    "--num_pairs must be at least 1": {"synthetic_dir": "two", "num_pairs": 0},
    "--features: there is no network 'lenet'; there are medicalnet, highres3dnet, inception": {
        "synthetic_dir": "two",
        "features": "lenet",
    },
    "--resamplings must be at least 2": {"synthetic_dir": "two", "resamplings": 1},
    "--segmentations: there is no folder of label maps": {"synthetic_dir": "two", "segmentations": "gone"},
    "--seed must be a whole number": {"synthetic_dir": "two", "seed": "many"},
    "--metrics::mine {'a': 1}: an entry of metrics is an object": {"synthetic_dir": "two", "metrics::mine": {"a": 1}},
    "--segmenter_path: there are no weights of a segmenter at gone.pt": {
        "synthetic_dir": "two",
        "segmenter_path": "gone.pt",
    },
    "--metrics has no entries": {"synthetic_dir": "two", "metrics": {}},
    "--metrics::mine is a Values, which is no Measure": {
        "synthetic_dir": "two",
        "metrics::mine": {"_target_": "scripts.compute.kept.Values", "folder": "x"},
    },
    "--feature_networks::mine is a Values, which has no 'given'": {
        "synthetic_dir": "two",
        "feature_networks::mine": {"_target_": "scripts.compute.kept.Values", "folder": "x"},
    },
    "--metrics::synthetic_pairs::target: there is no 'real_pair'; there are reconstruction,": {
        "synthetic_dir": "two",
        "metrics::synthetic_pairs::target": "real_pair",
    },
    "--metrics::fid cannot be made with these options: .*'resamplngs'": {
        "synthetic_dir": "two",
        "metrics::fid::resamplngs": 3,
    },
    "--metrics::fidd 3: an entry of metrics is an object.* reconstruction, synthetic_pairs,": {
        "synthetic_dir": "two",
        "metrics::fidd": 3,
    },
    "--pair_metrics::ms_sim 3: .*are ms_ssim, four_g_r_ssim: is the name": {
        "synthetic_dir": "two",
        "pair_metrics::ms_sim": 3,
    },
    "--feature_networks::inceptoin None: .*medicalnet, highres3dnet, inception:": {
        "synthetic_dir": "two",
        "feature_networks::inceptoin": None,
    },
    "--reconstruction_metrics::pnsr 1: .*psnr, ssim, mae": {"real_dir": "two", "reconstruction_metrics::pnsr": 1},
    "no weights of the autoencoder": {"reconstruct_dir": "one"},
    "give --real_dir FOLDER or --reconstruct_dir FOLDER or --synthetic_dir FOLDER": {},
}


def within(folder: Path, names: str | list[str]) -> str | list[str]:
    return str(folder / names) if isinstance(names, str) else [str(folder / name) for name in names]


@pytest.mark.parametrize("message", BAD_REQUESTS)
def test_bad_requests_are_refused_and_nothing_is_written(tmp_path: Path, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "participants.tsv").write_text("participant_id\tpath\na\tgone.nii.gz\n")
    folder_of(tmp_path / "one", 1)
    folder_of(tmp_path / "two", 1, 2)
    for name in ("x", "y"):
        save(tmp_path / "larger" / f"{name}.nii.gz", volume(1, (40, 40, 40)))
    given = {k: within(tmp_path, v) if k.endswith("_dir") else v for k, v in BAD_REQUESTS[message].items()}
    with pytest.raises(BundleError, match=message):
        run_here(tmp_path / "output", autoencoder_path=str(tmp_path / "nowhere.pt"), **given)
    assert not list((tmp_path / "output").glob("[!.]*"))


@pytest.mark.parametrize("flag", ["synthetic_dir", "real_dir", "reconstruct_dir", "training_dir"])
def test_an_empty_flag_is_not_the_working_directory(tmp_path: Path, flag: str) -> None:
    with pytest.raises(BundleError, match=f"--{flag} is empty: give a folder, or leave it out"):
        run_here(tmp_path / "output", **{"synthetic_dir": str(folder_of(tmp_path / "two", 1, 2)), flag: ""})


# The verb


def test_what_cannot_be_used_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    flags = with_features(tmp_path)
    flags["feature_networks"]["medicalnet"] = {
        "_target_": "scripts.evaluation.metrics.medicalnet.MedicalNet",
        "path": None,
    }
    page = tmp_path / "page.pth"
    page.write_text("<!DOCTYPE html>")
    save(tmp_path / "maps" / "of_nobody.nii.gz", volume(1))
    with pytest.raises(BundleError, match="page.pth holds no weights of MedicalNet's"):
        run_here(tmp_path / "output", **flags, **{"feature_networks::medicalnet::path": str(page)})
    with pytest.raises(BundleError, match="what was asked for of .* is not known"):
        run_here(tmp_path / "output", **with_features(tmp_path), segmentations=str(tmp_path / "maps"))
    assert not list((tmp_path / "output").rglob("[!.]*.*"))


def test_pairs_need_no_weights_and_follow_from_the_seed(tmp_path: Path) -> None:
    given = {"synthetic_dir": str(folder_of(tmp_path / "volumes", *range(6))), "num_pairs": 4}
    first, again, other = (run_here(tmp_path / f"{n}", seed=seed, **given) for n, seed in enumerate((1, 1, 2)))
    assert first == again != other
    assert first["synthetic_pairs"]["pairs"] == 4
    assert first["real_pairs"] == {"status": "not requested", "missing": ["--real_dir"]}
    assert first["reconstruction"] == {"status": "not requested", "missing": ["--reconstruct_dir"]}


def test_samples_that_are_real_or_training_volumes_are_told(tmp_path: Path) -> None:
    flags = with_features(tmp_path)
    copied = Path(flags["real_dir"]) / "volume_5.nii.gz"
    Path(flags["synthetic_dir"], "copy.nii.gz").write_bytes(copied.read_bytes())
    flags["synthetic_dir"] = {"a": flags["synthetic_dir"], "b": flags["real_dir"]}
    run_here(tmp_path / "output", **{**flags, "training_dir": None})
    warnings = json.loads((tmp_path / "output" / "evaluation.json").read_text())["warnings"]
    for text in ("1 of the 6 volumes in .*synthetic_dir.* are also in", "5 of the 5 volumes in .*real_dir.*byte for"):
        assert [line for line in warnings if re.match(text, line)], text
    assert "the models a and b share 1 volumes, byte for byte: is a folder wrong?" in warnings
    with pytest.raises(BundleError, match="--synthetic_dir and --training_dir hold the same volumes"):
        run_here(tmp_path / "other", **{**flags, "training_dir": flags["real_dir"], "real_dir": flags["training_dir"]})
    assert not list((tmp_path / "other").glob("[!.]*"))


FEW = {"synthetic_dir": (1, 2), "real_dir": (3, 4), "training_dir": (5,)}


def test_an_evaluation_leaves_no_tables_of_an_earlier_one(tmp_path: Path) -> None:
    flags, folder = with_features(tmp_path), tmp_path / "output"
    fewer = {flag: str(folder_of(tmp_path / f"few_{flag}", *seeds)) for flag, seeds in FEW.items()}
    run_here(folder, **{**flags, **fewer}, **{"metrics::privacy::candidates": 1})
    (folder / "notes.tsv").write_text("mine")
    assert {"privacy.tsv", "privacy.png", "real_pairs.tsv", "table_1.tsv"} <= {
        path.name for path in folder.glob("[!.]*")
    }
    run_here(folder, synthetic_dir=flags["synthetic_dir"], num_pairs=1)
    kept = ["evaluation.html", "evaluation.json", "evaluation.tsv", "synthetic_pairs.tsv", "table_1.tsv"]
    assert sorted(path.name for path in folder.glob("[!.]*")) == sorted([*kept, "features", "notes.tsv", "values"])
    (folder / "evaluation.json").write_text("[")
    run_here(folder, synthetic_dir=flags["synthetic_dir"], num_pairs=1)
    assert (folder / "notes.tsv").read_text() == "mine"


def test_a_failure_while_drawing_leaves_the_earlier_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder_of(tmp_path / "volumes", 1, 2) / r"$\frac$.nii.gz", volume(3))
    flags: dict[str, Any] = {"synthetic_dir": str(tmp_path / "volumes"), "num_pairs": 1}
    run_here(tmp_path / "output", **flags)
    before = {path: path.read_bytes() for path in (tmp_path / "output").glob("*.*")}

    def fail(*args: Any) -> bytes:
        raise BundleError("no picture")

    monkeypatch.setattr("scripts.evaluation.page.volumes_picture", fail)
    with pytest.raises(BundleError, match="no picture"):
        run_here(tmp_path / "output", **flags, seed=1)
    assert {path: path.read_bytes() for path in (tmp_path / "output").glob("*.*")} == before


class Plain:
    """Stands in for a feature network: mean and spread of a volume."""

    given = False
    dimension = 2

    def facts(self) -> dict[str, Any]:
        return {"network": "plain"}

    def load(self, device: torch.device) -> Any:
        return lambda volume: torch.stack([volume.mean(), volume.std()])


def with_features(tmp_path: Path) -> dict[str, Any]:
    """Flags for all measures of features."""
    flags = ("synthetic_dir", "real_dir", "training_dir")
    folders = {flag: str(folder_of(tmp_path / flag, *range(5 * n, 5 * n + 5))) for n, flag in enumerate(flags)}
    networks = {"plain": {"_target_": "test_evaluation.Plain"}}
    return {**folders, "features": "plain", "feature_networks": networks, "num_pairs": 1}


def test_measures_of_features_are_reported_under_their_network(tmp_path: Path) -> None:
    measures = run_here(tmp_path / "output", **with_features(tmp_path))
    features = np.array([[volume(seed).mean(), volume(seed).std()] for seed in range(10)], dtype=np.float64)
    for name, function in (("fid", frechet_distance_of_samples), ("kid", polynomial_mmd)):
        found = measures[name]
        rows = rows_of(tmp_path / "output", name)
        assert [(row["metric"], row["network"]) for row in rows] == [(name, "plain")] * 3
        assert [row["kind"] for row in rows] == ["all", "halves", "floor"]
        assert rows[1]["target"] == rows[2]["value"] and rows[0]["name"] == f"{name.upper()} (plain)"
        expected = function(features[:5], features[5:])
        assert rows[0]["value"] == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert found["networks"] == {"plain": {"network": "plain"}} and found["volumes_per_half"] == 2
    distances, similarities = ("synthetic", "held_out", "ratio", "close"), ("synthetic", "held_out", "close")
    expected_rows = [*(("distance", kind) for kind in distances), *(("ssim", kind) for kind in similarities)]
    assert [(row["metric"], row["kind"]) for row in rows_of(tmp_path / "output", "privacy")] == expected_rows
    rows = read(tmp_path / "output" / "privacy.tsv")
    assert len(rows) == 5 and {row["nearest"] for row in rows} <= {f"volume_{n}.nii.gz" for n in range(10, 15)}
    assert len(list((tmp_path / "output" / "features").glob("plain-*/*.npy"))) == 15


def test_only_the_first_process_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = with_features(tmp_path)
    monkeypatch.setattr("scripts.evaluation.run.process_rank", lambda: (1, 2))
    with pytest.raises(FileNotFoundError):
        run_here(tmp_path / "output", **flags)
    assert sorted(path.name for path in (tmp_path / "output").glob("[!.]*")) == ["features", "values"]


def test_medicalnet_needs_its_file(tmp_path: Path) -> None:
    flags = {**with_features(tmp_path), "features": "medicalnet"}
    del flags["feature_networks"]
    for path in (None, str(tmp_path / "gone.pth")):
        with pytest.raises(BundleError, match="give --medicalnet_path resnet_50_23dataset.pth from https"):
            run_here(tmp_path / "output", **flags, medicalnet_path=path)
    assert not list((tmp_path / "output").glob("[!.]*"))


def test_evaluate_from_the_command_line(tmp_path: Path, tiny: RunTiny, output_dir: Path) -> None:
    synthetic, real = folder_of(tmp_path / "synthetic", 1, 2, 3), folder_of(tmp_path / "real", 4, 5, 6)
    weights = tmp_path / "autoencoder.pt"
    network = tiny_autoencoder()
    torch.save(network.state_dict(), weights)
    flags = ("--synthetic_dir", synthetic, "--real_dir", real, "--reconstruct_dir", real)
    done = tiny([EVALUATE], *flags, "--autoencoder_path", weights, "--load_old", 0, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    reports = [f"evaluation.{suffix}" for suffix in ("html", "json", "tsv")]
    tables = [f"{name}.tsv" for name in ("real_pairs", "reconstruction", "synthetic_pairs", "synthetic_real_pairs")]
    names = [*reports, *tables, "reconstruction.png", "regions.png", "regions.tsv", "table_1.tsv", "values"]
    assert sorted(path.name for path in output_dir.glob("[!.]*")) == sorted(names)

    measures = json.loads((output_dir / "evaluation.json").read_text())["measures"]
    pairs = measures["synthetic_pairs"]
    expected = [ms_ssim(volume(a), volume(b)) for a, b in itertools.combinations((1, 2, 3), 2)]
    ms_ssim_row, found = rows_of(output_dir, "synthetic_pairs")
    assert (ms_ssim_row["name"], found["name"]) == ("MS-SSIM", "4-G-R-SSIM")
    assert ms_ssim_row["value"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert ms_ssim_row["standard_deviation"] == pytest.approx(np.std(expected, ddof=1), rel=1e-4)
    assert pairs["settings"]["ms_ssim"]["kernel_size"] == [7, 7, 7] and pairs["settings"]["ms_ssim"]["data_range"] == 1
    assert pairs["settings"]["ms_ssim"]["weights"] == pytest.approx([w / sum(WEIGHTS[:3]) for w in WEIGHTS[:3]])
    assert pairs["synthetic_dir"]["volumes"] == 3 and pairs["synthetic_dir"]["shape"] == list(SHAPE)
    assert measures["synthetic_real_pairs"]["pairs"] == 9
    target = rows_of(output_dir, "real_pairs")[1]["value"]
    assert found["target"] == target and found["distance"] == pytest.approx(found["value"] - target)
    assert found["distance_low"] <= found["distance"] <= found["distance_high"]

    with torch.no_grad():
        copies = [network.decode(network.encode(batch(volume(seed)))[0])[0, 0].numpy() for seed in (4, 5, 6)]
    errors = [np.abs(volume(seed) - copy).mean() for seed, copy in zip((4, 5, 6), copies)]
    rows = read(output_dir / "reconstruction.tsv")
    assert [float(row["mae"]) for row in rows] == pytest.approx(errors, rel=1e-4)

    table = {(row["measure"], row["metric"]): row for row in read(output_dir / "evaluation.tsv")}
    pair_names = [(f"{name}_pairs", metric) for name in ("synthetic", "real", "synthetic_real") for metric in PAIRED]
    not_requested = {name: row["status"] for (name, metric), row in table.items() if metric == "n/a"}
    without = {"fid", "kid", "privacy", "volumetry", "brain_age"}
    without |= {"tissue_age", "obedience", "condition_effects", "reidentification"}
    assert not_requested == dict.fromkeys(without, "not requested")
    computed = {key: row for key, row in table.items() if key[0] not in (*not_requested, "regions")}
    assert list(computed) == [*(("reconstruction", name) for name in RECONSTRUCTED), *pair_names]
    for (measure, metric), row in computed.items():
        (expected_row,) = [one for one in rows_of(output_dir, measure) if one["metric"] == metric]
        values = {k: v for k, v in row.items() if k != "status" and v != "n/a"}
        assert values == {name: str(value) for name, value in expected_row.items()}
        assert float(row["confidence_low"]) <= float(row["value"]) <= float(row["confidence_high"])


def tiny_autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    config = ConfigParser(ConfigParser.load_config_files([str(ROOT / file) for file in (BASE, TINY)]))
    return config.get_parsed_content("autoencoder_def").eval()


def read(table: Path) -> list[dict[str, str]]:
    with open(table, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_the_command_line_says_in_one_line_what_to_give(tiny: RunTiny, output_dir: Path) -> None:
    done = tiny([EVALUATE])
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "there is nothing to evaluate: give --real_dir FOLDER" in done.stderr.strip().splitlines()[-1]
    assert not output_dir.exists()
