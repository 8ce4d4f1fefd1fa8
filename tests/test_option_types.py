# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Every option has a type and a range in one table, and paths are taken as they are typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import BASE, ROOT, TINY, RunBundle, RunHere
from processes import run_python

from scripts.core import option_types
from scripts.core.command_help import option_names
from scripts.core.config import _defaults, _values
from scripts.core.errors import BundleError, find_bundle_error
from scripts.core.option_types import OPTIONS, as_typed, check_disk, check_option, check_sizes, type_of
from scripts.core.verbs import additions, condition_flags, merge, verbs


@pytest.mark.parametrize("verb", verbs())
def test_every_option_of_a_verb_has_a_type_and_its_default_is_of_it(verb: str) -> None:
    config = merge(verbs()[verb])
    for name in set(option_names(verb)) - set(condition_flags(config)):
        assert name in OPTIONS or str(config[name])[:1] in "@$", f"{name} is not in scripts/core/option_types.py"
    for overlay in ([], *([path] for path in additions().values())):
        try:
            values = list(_values(merge([*verbs()[verb], *overlay])))
        except BundleError:  # the overlay goes with other verbs
            continue
        for name, value in values:
            check_option(name, value, _defaults().get(name))


WRONG: list[tuple[str, Any]] = [
    ("momentum", 2), ("momentum", 1), ("momentum", "x"), ("cache_rate", 2), ("latent_scale", 0),
    ("latent_scale", "nan"),    ("discriminator_channels", 0), ("discriminator_layers", 20),
    ("initial_log_variance", 1e9), ("lr", 0), ("lr", -1),
    ("resample_to_grid", "x"), ("population::male", 2), ("population::correlation", 2), ("looks::noise", -1),
    ("looks::gamma", 1), ("anatomy::wavelength", 0), ("intracranial_mm3", -1), ("grid::spacing", "nan"),
    ("grid::spacing", [1, 0, 1]), ("grid::spacing", [1, 1]), ("grid::shape", [1.5, 2, 2]), ("grid::origin", "x"),
    ("pair_metrics::ms_ssim::kernel_size", 0), ("pair_metrics::four_g_r_ssim::kernel_sigma", -1), ("batch_size", 0),
    ("batch_size", 1.5), ("batch_size", True), ("batch_size", None), ("num_workers", -1), ("num_workers", 10**9),
    ("num_samples", 10**9), ("latent_versions", 10**15), ("latent_versions", "1e12"), ("resamplings", 1),
    ("plausible::age_years", [1]), ("splits::train", 2), ("steps::darkest::percentile", 101), ("amp", "bf17"),
    ("network_def::num_res_blocks", 0), ("autoencoder_channels", []), ("autoencoder_channels", 64), ("freeze", [1]),
    ("schedules::ddim::beta_end", 1), ("samplers::ddim::eta", -0.1), ("streaming", 3), ("fast", "maybe"),
    ("dataset_dir", ""), ("dataset_dir", " "), ("dataset_dir", 202601), ("dataset_dir", ("a", "b")),
    ("output_dir", "a\0"),    ("real_dir", " "), ("synthetic_dir", ["a", ""]), ("family", ["a"]), ("heads", 3),
    ("evaluator::decollate", "x"),
    ("train::optimizer::betas", "x"), ("metrics::privacy::candidates", 0), ("num_inference_steps", 0), ("seed", -1),
    ("seed", 10**30), ("validation_fraction", 1.1), ("sex_words", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [one for one in WRONG if one[0] != "sex_words"])
def test_what_an_option_may_not_be(name: str, value: Any) -> None:
    with pytest.raises(BundleError, match=f"--{name}") as caught:
        check_option(name, value, _defaults().get(name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", None), ("seed", "null"), ("epoch_length", "none"), ("amp", "bf16"), ("amp", "1"), ("fast", "auto"),
        ("lr", "1e-4"), ("latent_scale", "$@x"), ("grid::shape", "@y"), ("output_dir", Path("x")), ("momentum", 0),
        ("real_dir", None), ("synthetic_dir", {"a": "b"}), ("synthetic_dir", ("a", "b")), ("freeze", []),
        ("freeze", "x"),        ("heads", "sub-1"), ("autoencoder_channels", ["$1", 2]), ("sampler", {"_target_": "x"}),
        ("unheard_of", object()),
    ],
)  # fmt: skip
def test_what_an_option_may_be(name: str, value: Any) -> None:
    check_option(name, value)


def test_patterns_name_what_is_there() -> None:
    known = {name for verb in verbs().values() for name, _ in _values(merge(verb))} | {"reference_intracranial_mm3"}
    for pattern in OPTIONS:
        if "*" in pattern:
            assert any(type_of(name) is OPTIONS[pattern] for name in known), pattern


@pytest.mark.parametrize("text", ["2026_01", "1.10", "1e3", "a,b", "x#y", "0x10", "None", "true", "007", "a b", "[x"])
def test_paths_are_taken_as_typed(text: str) -> None:
    assert as_typed("output_dir", text) == (None if text == "None" else text)
    assert as_typed("run_name", text) in (text, None)
    assert as_typed("lr", text) is None
    assert as_typed("output_dir", f"~/{text}") == str(Path.home() / text)
    assert as_typed("output_dir", "$@run_dir") is None
    assert as_typed("synthetic_dir", "a,b") == "a,b" and as_typed("synthetic_dir", "['a']") is None


def test_sizes_are_compared_with_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(option_types, "physical_memory", lambda: 8 * 2**30)
    training = merge(verbs()["train autoencoder"])
    check_sizes(training)
    check_sizes({**training, "batch_size": 100})
    for batch, more in ((1000, {}), (10**9, {"patch_shape": [32, 32, 32]})):
        with pytest.raises(BundleError, match=f"--batch_size {batch}: .* GiB and this machine has 8 GiB"):
            check_sizes({**training, "batch_size": batch, **more})
    latents = merge(verbs()["train diffusion"])
    check_sizes({**latents, "batch_size": 1000})
    with pytest.raises(BundleError, match="--batch_size"):
        check_sizes({**latents, "batch_size": 10**6})
    with pytest.raises(BundleError, match="--grid::shape"):
        check_sizes({**training, "grid": {"shape": [30000, 30000, 30000]}})
    check_disk(tmp_path / "not" / "there", 1.0, "num_samples", 1)
    with pytest.raises(BundleError, match=r"--num_samples 9 needs at least .* GB in .*there, whose disk has"):
        check_disk(tmp_path / "not" / "there", 1e18, "num_samples", 9)


REFUSED = [
    ([BASE, "configs/train_brain_age.yaml"], {"momentum": 2}, "--momentum must be below 1, got 2"),
    ([BASE, "configs/train_brain_age.yaml"], {"batch_size": 0}, "--batch_size must be at least 1, got 0"),
    ([BASE, "configs/phantoms.yaml"], {"anatomy::amplitudee": 1}, "did you mean --anatomy::amplitude"),
    ([BASE, "configs/phantoms.yaml"], {"looks::noise": -1}, "--looks::noise must be at least 0, got -1"),
    ([BASE, "configs/phantoms.yaml"], {"ventricular_vol_mm3": 0}, "--ventricular_vol_mm3 must be above 0, got 0"),
    ([BASE, "configs/phantoms.yaml"], {"brain_vol_mm3": -5}, "--brain_vol_mm3 must be above 0, got -5"),
    ([BASE, "configs/phantoms.yaml"], {"age_years": 500}, "--age_years must be at most 120, got 500"),
    ([BASE, "configs/evaluate.yaml"], {"pair_metrics::ms_ssim::kernel_size": 0}, "kernel_size must be at least 1"),
    ([BASE], {"grid::spacing": "nan"}, "--grid::spacing must be a list of 3"),
    ([BASE], {"output_dir": " "}, "--output_dir is empty"),
    ([BASE], {"num_samples": 1_000_000_000}, "--num_samples must be at most"),
    ([BASE, "configs/train_diffusion.yaml"], {"batch_size": 1_000_000_000}, "--batch_size 1000000000: its volumes"),
    ([BASE, "configs/train_autoencoder.yaml"], {"discriminator_layers": 16}, "--discriminator_layers 16"),
]  # fmt: skip


@pytest.mark.parametrize(("configs", "flags", "says"), REFUSED)
def test_every_verb_asks_the_table(
    configs: list[str], flags: dict[str, Any], says: str, run_here: RunHere, tmp_path: Path
) -> None:
    with pytest.raises(Exception) as caught:
        run_here(configs, **{"output_dir": str(tmp_path / "out"), "run_dir": str(tmp_path / "run"), **flags})
    assert says in str(find_bundle_error(caught.value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["2026_01", "a,b", "x#y"])
def test_both_command_lines_write_where_they_are_told(name: str, run_bundle: RunBundle, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a file, so that both end there")
    done = run_bundle([BASE, TINY], "--output_dir", name, "--bundle_root", ROOT, cwd=tmp_path)
    says = f"{name}: MONAI reads # as ::" if "#" in name else f"{name} is no folder"
    assert f"error: --output_dir {says}" in done.stderr
    words = ["sample", "--with", "tiny", f"--output_dir={tmp_path / name}"]
    assert says in run_python("-m", "scripts", *words).stderr
