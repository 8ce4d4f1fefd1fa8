# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Conditioned sampling from end to end, with tiny weights of the released format."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BASE, SMALLEST, TINY, RunBundle, RunHere
from PIL import Image
from processes import Finished
from released import configuration

from scripts.core.errors import find_bundle_error
from scripts.core.tables import read_table
from scripts.diffusion.targets import TARGETS
from scripts.sampling import saving
from scripts.volumes.folders import find_volumes

CARD = {"gender": 1.0, "age": 0.7, "ventricular_vol": 0.7, "brain_vol": 0.5}
CONFIGS = [BASE, TINY]
SHAPE = (32, 48, 32)

Sample = Callable[..., Any]


@pytest.fixture
def sample(run_here: RunHere, bundle_copy: Path, output_dir: Path) -> Sample:
    """`sample(**flags)` samples in this process, small, in two steps unless told otherwise, to `output_dir`."""

    def run(**flags: Any) -> Any:
        defaults = {
            "bundle_root": str(bundle_copy),
            "output_dir": str(output_dir),
            "num_inference_steps": 2,
            **SMALLEST,
        }
        return run_here(CONFIGS, **{**defaults, **flags})

    return run


def flags_of(given: dict[str, Any]) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*")) if folder.is_dir() else []


def voxels(folder: Path) -> dict[str, np.ndarray]:
    """The stored integers of each volume in a folder."""
    images: dict[str, Any] = {path.name: nib.load(path) for path in sorted(folder.glob("*.nii.gz"))}
    return {name: np.asarray(image.dataobj.get_unscaled()) for name, image in images.items()}


def sidecars(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def write_table(folder: Path, text: str) -> str:
    (folder / "conditions.tsv").write_text(text)
    return str(folder / "conditions.tsv")


# The command line.


def test_model_cards_command(run_bundle: RunBundle, bundle_copy: Path, output_dir: Path) -> None:
    done = run_bundle(CONFIGS, *flags_of({**CARD, "seed": 7, "output_dir": output_dir}), cwd=bundle_copy)
    assert done.returncode == 0, done.stderr
    stem = "sample_seed-7_000000"
    assert names(output_dir) == [f"{stem}.json", f"{stem}.nii.gz", f"{stem}.png"]
    image: Any = nib.load(output_dir / f"{stem}.nii.gz")
    assert image.shape == SHAPE and image.get_data_dtype() == np.uint8
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 4
    assert np.allclose(image.affine, configuration().get_parsed_content("grid").affine, atol=1e-4)
    data = image.get_fdata()
    assert 0.0 <= data.min() < data.max() <= 1.0
    assert Image.open(output_dir / f"{stem}.png").size[1] > 256
    (stated,) = sidecars(output_dir)
    assert {name: stated["conditions"][name] for name in CARD} == CARD
    assert (stated["sampler"], stated["num_inference_steps"]) == ("ddim", 50)


def test_from_another_folder(run_bundle: RunBundle, bundle_copy: Path, output_dir: Path, tmp_path: Path) -> None:
    flags = {"bundle_root": bundle_copy, "output_dir": output_dir, "num_inference_steps": 2, "seed": 3}
    done = run_bundle(CONFIGS, *flags_of(flags), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(voxels(output_dir)) == 1


def is_one_line(done: Finished) -> bool:
    """Whether a command ended as a user should see an error: one line of it, no traceback, exit code not 0."""
    lines = (done.stdout + done.stderr).splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return done.returncode != 0 and len(errors) == 1 and not any("Traceback" in line for line in lines)


def test_unknown_flag_ends_in_one_line(run_bundle: RunBundle, bundle_copy: Path, output_dir: Path) -> None:
    done = run_bundle(CONFIGS, "--gendr", 1, "--output_dir", output_dir, cwd=bundle_copy)
    assert is_one_line(done), done.stderr
    assert "unknown flag --gendr: did you mean --gender" in done.stderr
    assert names(output_dir) == []


# What is refused, in this process: a subprocess for each would take most of the suite's time.

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"age": "old"}, "--age must be a finite number, got 'old'"),
    ({"age": "nan"}, "--age must be a finite number"),
    ({"age_years": "inf"}, "--age_years must be a finite number"),
    ({"sex": "mle"}, "--sex must be one of female, male, got 'mle'"),
    ({"age": 0.5, "age_years": 63}, "--age and --age_years state the same condition"),
    ({"device": "tpu"}, "--device must be auto, cpu, cuda, cuda:N or mps, got 'tpu'"),
    ({"device": "mps"}, "--device mps: there is no GPU of Apple's"),
    ({"sampler": "x"}, "--sampler must be one of ddim, ddpm, dpm, unipc, flow, midpoint, few, got 'x'"),
    ({"target": "noise"}, "--target must be one of epsilon, sample, velocity, flow, difference, got 'noise'"),
    ({"target": "flow", "sampler": "ddim"}, "give --sampler flow"),
    ({"sampler": "flow"}, "give --sampler ddim, or --target flow"),
    ({"guidance": 2}, "leave out --guidance"),
    ({"num_samples": 0}, "--num_samples must be at least 1"),
    ({"num_samples": "many"}, "--num_samples must be a whole number"),
    ({"batch_size": "x"}, "--batch_size must be a whole number"),
    ({"batch_size": 0}, "--batch_size must be at least 1"),
    ({"seed": -1}, "--seed must be at least 0"),
    ({"seed": 1.5}, "--seed must be a whole number"),
    ({"seed": 2**64}, "--seed must be at most"),
    ({"num_inference_steps": 1001}, "--num_inference_steps 1001 is more than the 1000"),
    ({"amp": "maybe"}, "--amp must be 0, 1, auto, bf16 or fp16"),
    ({"load_old": "maybe"}, "--load_old must be 1 or 0"),
    ({"output_dtype": "float64"}, "--output_dtype must be one of uint8"),
    ({"load_old": 0}, "use --load_old 1"),
    ({"family": "latent_difusion"}, "got 'latent_difusion': did you mean latent_diffusion?"),
]


def refused(sample: Sample, folder: Path, /, **flags: Any) -> str:
    """The one line that a run ends in; it leaves no file."""
    with pytest.raises(Exception) as caught:
        sample(**flags)
    error = find_bundle_error(caught.value)
    assert error is not None, caught.value
    assert "\n" not in str(error)
    assert names(folder) == []
    return str(error)


@pytest.mark.parametrize(("flags", "told"), REFUSED, ids=[" ".join(map(str, f.items())) for f, _ in REFUSED])
def test_bad_flags(flags: dict[str, Any], told: str, sample: Sample, output_dir: Path) -> None:
    assert told in refused(sample, output_dir, **flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_gpu_that_is_not_there(device: str, sample: Sample, output_dir: Path) -> None:
    assert "use --device cpu" in refused(sample, output_dir, device=device)


def test_output_folder_that_cannot_be_written(sample: Sample, output_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    told = refused(sample, output_dir, output_dir=str(tmp_path / "file" / "below"))
    assert "cannot write to the folder" in told
    assert (tmp_path / "file").read_text() == "x"


def test_missing_weights_name_both_ways_out(sample: Sample, output_dir: Path, tmp_path: Path) -> None:
    told = refused(sample, output_dir, bundle_root=str(tmp_path), **CARD)
    assert "-m scripts weights" in told and "demo.yaml" in told


def test_weights_of_the_other_network(sample: Sample, bundle_copy: Path, output_dir: Path) -> None:
    autoencoder, diffusion = (str(bundle_copy / "models" / f"tiny_{name}.pt") for name in ("autoencoder", "diffusion"))
    assert "is of another model" in refused(sample, output_dir, diffusion_path=autoencoder)
    assert "is of another model" in refused(sample, output_dir, autoencoder_path=diffusion)


def test_weights_that_were_cut_short(sample: Sample, bundle_copy: Path, output_dir: Path, tmp_path: Path) -> None:
    content = (bundle_copy / "models" / "tiny_diffusion.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(content[: len(content) // 2])
    assert "cut short" in refused(sample, output_dir, diffusion_path=str(tmp_path / "model.pt"))


HEADER = "sex\tage_years\tventricular_vol\tbrain_vol_mm3\n"
ROWS = "male\t70\t0.2\t1500000\nf\t50\t0.9\t1200000\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            HEADER.replace("age_years", "age_year") + ROWS,
            "no column 'age_years' or 'age' (did you mean its column 'age_year'?)",
        ),
        (HEADER + ROWS.replace("\t50\t", "\told\t"), "--age_years in row 2 of"),
        (
            HEADER.replace("sex", "ventricular_volume\tsex") + "1\tf\t50\t0.9\t1200000\n",
            "did you mean 'ventricular_vol",
        ),
        (HEADER.replace("sex", "Sampler\tsex") + "ddim\tf\t50\t0.9\t1200000\n", "--sampler is of the whole run"),
        (HEADER.replace("sex", "seed\tsex") + "-1\tf\t50\t0.9\t1200000\n", "at least 0, got -1 in row 1 of"),
        (HEADER.replace("age_years", "sex") + ROWS, "'sex' twice"),
        (HEADER + ROWS.replace("\t50", ""), "row 2 of"),
        (HEADER, "has no rows"),
        ("", "has no rows"),
    ],
    ids=["column", "cell", "near name", "flag", "seed", "twice", "ragged", "header alone", "empty"],
)
def test_bad_tables(text: str, told: str, sample: Sample, output_dir: Path, tmp_path: Path) -> None:
    assert told in refused(sample, output_dir, conditions_table=write_table(tmp_path, text))


@pytest.mark.parametrize("flag", [{"age": 0.5}, {"sex": "male"}, {"num_samples": 2}])
def test_table_together_with_flags(flag: dict[str, Any], sample: Sample, output_dir: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path, HEADER + ROWS)
    told = refused(sample, output_dir, conditions_table=table, **flag)
    assert f"leave out --{next(iter(flag))}" in told


def test_table_that_is_not_there(sample: Sample, output_dir: Path) -> None:
    assert "is not there" in refused(sample, output_dir, conditions_table="missing.tsv")


# What is sampled.


def test_raw_units_are_the_normalised_ones(sample: Sample, tmp_path: Path) -> None:
    raw = {"sex": "male", "age_years": 63, "ventricular_vol_mm3": 89185.34, "brain_vol_mm3": 1144240}
    sample(seed=1, output_dir=str(tmp_path / "raw"), **raw)
    normalised = {"gender": 1, "age": 0.5, "ventricular_vol": 0.5, "brain_vol": 0.0}
    sample(seed=1, output_dir=str(tmp_path / "normalised"), **normalised)
    assert equal(voxels(tmp_path / "raw"), voxels(tmp_path / "normalised"))
    (stated,) = sidecars(tmp_path / "raw")
    conditions = dict(stated["conditions"])
    assert conditions.pop("sex") == raw.pop("sex")
    assert conditions == pytest.approx({**raw, **normalised}, rel=1e-6)


def test_conditions_matter(sample: Sample, tmp_path: Path) -> None:
    for age in (0, 1):
        sample(seed=1, output_dir=str(tmp_path / str(age)), gender=1, age=age, ventricular_vol=0, brain_vol=1)
    assert not equal(voxels(tmp_path / "0"), voxels(tmp_path / "1"))


def test_extrapolation_warns_and_samples(sample: Sample, output_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    sample(seed=1, ventricular_vol=1.9, brain_vol=-0.5)
    warnings = [record.message for record in caplog.records if record.name == "scripts.conditions.conditions"]
    assert ["--ventricular_vol 1.9" in warnings[0], "6995.68 to 171375 mm3" in warnings[0]] == [True, True]
    assert "--brain_vol -0.5" in warnings[1]
    assert len(voxels(output_dir)) == 1


def with_facts(bundle: Path, folder: Path, **facts: Any) -> str:
    """The tiny diffusion weights as a training checkpoint that states these facts."""
    state = torch.load(bundle / "models" / "tiny_diffusion.pt", weights_only=True)
    torch.save({"diffusion": state, "facts": facts}, folder / "diffusion.pt")
    return str(folder / "diffusion.pt")


WAYS: list[dict[str, Any]] = [
    {"sampler": "ddim"},
    {"sampler": "ddpm"},
    {"sampler": "unipc"},
    {"target": "flow", "guidance": 2.5},
]


@pytest.mark.parametrize("way", WAYS, ids=["ddim", "ddpm", "unipc", "flow with guidance"])
def test_a_sample_does_not_depend_on_the_batch_size(
    way: dict[str, Any], sample: Sample, bundle_copy: Path, tmp_path: Path
) -> None:
    weights = with_facts(bundle_copy, tmp_path, condition_dropout=0.1)
    folders = [tmp_path / str(size) for size in (1, 2)]
    flags = {**way, "seed": 5, "num_samples": 3, "num_inference_steps": 3, "diffusion_path": weights}
    for size, folder in enumerate(folders, start=1):
        sample(batch_size=size, output_dir=str(folder), **flags)
    one, two = map(voxels, folders)
    assert equal(one, two)
    volumes = list(one.values())
    assert len(volumes) == 3 and not np.array_equal(volumes[0], volumes[1])


def test_samplers_and_steps_differ(sample: Sample, tmp_path: Path) -> None:
    ways = [("ddim", 2), ("ddpm", 2), ("ddim", 4)]
    for sampler, steps in ways:
        folder = str(tmp_path / f"{sampler}{steps}")
        sample(seed=5, sampler=sampler, num_inference_steps=steps, output_dir=folder)
    first, second, third = (voxels(tmp_path / f"{sampler}{steps}") for sampler, steps in ways)
    assert not equal(first, second) and not equal(first, third)
    (stated,) = sidecars(tmp_path / "ddpm2")
    assert (stated["sampler"], stated["num_inference_steps"]) == ("ddpm", 2)


def test_targets_differ_and_are_stated(sample: Sample, tmp_path: Path) -> None:
    for target in TARGETS:
        sample(seed=5, target=target, output_dir=str(tmp_path / target))
    volumes = [voxels(tmp_path / target) for target in TARGETS]
    assert not any(equal(a, b) for i, a in enumerate(volumes) for b in volumes[:i])
    stated = [sidecars(tmp_path / target)[0] for target in TARGETS]
    assert [s["target"] for s in stated] == list(TARGETS)
    assert [s["sampler"] for s in stated] == ["ddim", "ddim", "ddim", "flow", "ddim"]


def test_weights_of_another_target(sample: Sample, bundle_copy: Path, output_dir: Path, tmp_path: Path) -> None:
    weights = with_facts(bundle_copy, tmp_path, target="flow", schedule={"num_train_timesteps": 1000})
    assert "give --target flow" in refused(sample, output_dir, diffusion_path=weights)
    told = refused(
        sample, output_dir, diffusion_path=weights, target="flow", **{"schedules::flow::num_train_timesteps": 500}
    )
    assert "give --schedules::flow::num_train_timesteps as in its training" in told
    sample(diffusion_path=weights, target="flow")
    assert len(voxels(output_dir)) == 1


def test_guidance_changes_a_sample_and_is_stated(sample: Sample, bundle_copy: Path, tmp_path: Path) -> None:
    flags = {"seed": 5, "age": 0.9, "diffusion_path": with_facts(bundle_copy, tmp_path, condition_dropout=0.1)}
    for guidance in (None, 1, 3.0):
        sample(guidance=guidance, output_dir=str(tmp_path / str(guidance)), **flags)
    plain, one, three = (voxels(tmp_path / str(guidance)) for guidance in (None, 1, 3.0))
    assert equal(plain, one) and not equal(plain, three)
    assert [sidecars(tmp_path / str(g))[0]["guidance"] for g in (None, 1, 3.0)] == [None, 1.0, 3.0]


def test_the_first_samples_of_a_seed_are_the_same_in_a_longer_run(sample: Sample, tmp_path: Path) -> None:
    sample(seed=5, num_samples=2, output_dir=str(tmp_path / "short"))
    sample(seed=5, num_samples=3, output_dir=str(tmp_path / "long"))
    short, long = voxels(tmp_path / "short"), voxels(tmp_path / "long")
    assert len(short) == 2 and equal(short, {name: long[name] for name in short})


def test_without_a_seed_every_run_is_new(sample: Sample, output_dir: Path) -> None:
    workflow = sample()
    workflow.run()
    sample()
    volumes = list(voxels(output_dir).values())
    assert len(volumes) == 3
    assert not any(np.array_equal(a, b) for a, b in zip(volumes, [*volumes[1:], volumes[0]]))


def test_table_samples_one_volume_a_row(sample: Sample, output_dir: Path, tmp_path: Path) -> None:
    sample(seed=2, conditions_table=write_table(tmp_path, HEADER + ROWS))
    first, second = (stated["conditions"] for stated in sidecars(output_dir))
    assert (first["sex"], first["age_years"], first["ventricular_vol"]) == ("male", 70, 0.2)
    assert (second["sex"], second["age_years"], second["brain_vol_mm3"]) == ("female", 50, 1200000)
    assert len(voxels(output_dir)) == 2


def test_row_of_a_table_is_the_sample_of_its_flags(sample: Sample, output_dir: Path, tmp_path: Path) -> None:
    sample(seed=2, conditions_table=write_table(tmp_path, HEADER + ROWS))
    flags = {"sex": "male", "age_years": 70, "ventricular_vol": 0.2, "brain_vol_mm3": 1500000}
    sample(seed=2, output_dir=str(tmp_path / "flags"), **flags)
    alone, (first, *_) = voxels(tmp_path / "flags"), voxels(output_dir).items()
    assert equal(alone, dict([first]))


@pytest.mark.parametrize(
    ("there", "wanted", "same"),
    [(True, False, False), (False, False, True), (None, False, True), (True, None, True), (None, None, True)],
)
def test_samples_of_another_float32_are_others(there: Any, wanted: Any, same: bool) -> None:
    """None: of a CPU, or of a GPU before sidecars said it."""
    mine, other = ({"seed": 1} if tf32 is None else {"seed": 1, "tf32": tf32} for tf32 in (wanted, there))
    found = {**other, "versions": {"torch": "1"}}
    assert saving._same_sample(found, {**mine, "versions": {"torch": "2"}}) is same
    assert not saving._same_sample(found, {**mine, "seed": 2})


def test_what_a_table_says_besides_its_conditions(
    sample: Sample, output_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A seed of its own, whose first sample it is; who it is of; nothing of some conditions."""
    caplog.set_level(logging.INFO)
    rows = "male\t70\t0.2\t1500000\t5\ta\t12\t\t\nNA\t\tnull\tn/a\t\tb\t\t\t\nNA\t\tnull\tn/a\t7\tc\t9\t\t\n"
    header = HEADER.replace("\n", "\tseed\tparticipant_id\teducation_years\trequested_brain_vol_mm3\tstages\n")
    for _ in range(2):  # the second finds all of them there
        sample(seed=2, conditions_table=write_table(tmp_path, header + rows))
    one, two, three = sorted(sidecars(output_dir), key=lambda stated: stated["index"])
    assert [stated["seed"] for stated in (one, two, three)] == [5, 2, 7]
    assert (
        one["request"] == {"participant_id": "a", "education_years": "12"} and two["request"]["participant_id"] == "b"
    )
    assert "noise_of_index" not in one and three["noise_of_index"] == 0
    for stated in (two["conditions"], three["conditions"]):
        assert stated["sex"] in ("female", "male") and stated["age"] == stated["brain_vol"] == 0.5
    assert "--sex is not given" in caplog.text
    table = read_table(output_dir / "samples.tsv")
    assert [row["participant_id"] for row in table] == ["a", "b", "c"] and table[1]["education_years"] == "n/a"
    assert {row["path"] for row in table} == set(voxels(output_dir))
    flags = {"sex": "male", "age_years": 70, "ventricular_vol": 0.2, "brain_vol_mm3": 1500000}
    sample(seed=5, output_dir=str(tmp_path / "flags"), **flags)
    assert np.array_equal(
        voxels(tmp_path / "flags")["sample_seed-5_000000.nii.gz"],
        next(iter(array for name, array in voxels(output_dir).items() if name.startswith("sample_seed-5_"))),
    )


def test_sidecar_says_how_the_sample_was_made(sample: Sample, bundle_copy: Path, output_dir: Path) -> None:
    sample(seed=9, num_samples=2, **CARD)
    first, second = sidecars(output_dir)
    assert (first["seed"], first["index"], second["index"]) == (9, 0, 1)
    assert first["conditions"]["age_years"] == pytest.approx(70.6) and first["conditions"]["sex"] == "male"
    assert (first["sampler"], first["num_inference_steps"], first["amp"]) == ("ddim", 2, False)
    assert first["latent_scale"] == 1.0 and first["dtype"] == "uint8"
    assert first["weights"]["diffusion"]["file"] == "tiny_diffusion.pt"
    assert len(first["weights"]["autoencoder"]["sha256"]) == 64
    assert (
        first["versions"]["torch"] == torch.__version__.split("+")[0] or first["versions"]["torch"] == torch.__version__
    )
    assert str(bundle_copy) not in json.dumps(first)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_other_types_of_voxels(dtype: str, sample: Sample, output_dir: Path, tmp_path: Path) -> None:
    sample(seed=1, output_dtype=dtype)
    sample(seed=1, output_dir=str(tmp_path / "uint8"))
    image: Any = nib.load(output_dir / "sample_seed-1_000000.nii.gz")
    assert image.get_data_dtype() == dtype
    (coarse,) = voxels(tmp_path / "uint8").values()
    assert 0.0 <= image.get_fdata().min() and image.get_fdata().max() <= 1.0
    assert np.abs(image.get_fdata() - coarse / 255).max() < 0.0021


def test_mixed_precision_is_close(sample: Sample, output_dir: Path, tmp_path: Path) -> None:
    sample(seed=1, amp=1)
    sample(seed=1, output_dir=str(tmp_path / "float32"))
    (rough,), (exact,) = voxels(output_dir).values(), voxels(tmp_path / "float32").values()
    assert not np.array_equal(rough, exact)
    assert np.corrcoef(rough.ravel(), exact.ravel())[0, 1] > 0.99
    assert sidecars(output_dir)[0]["amp"] == "bf16"


# Running again.


def test_the_same_command_keeps_what_is_there(
    sample: Sample, output_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sample(seed=4, num_samples=2)
    before = {path: path.stat().st_mtime_ns for path in output_dir.glob("[!.]*")}
    with caplog.at_level("INFO"):
        sample(seed=4, num_samples=2)
    assert {path: path.stat().st_mtime_ns for path in output_dir.glob("[!.]*")} == before
    assert any("2 of 2 samples" in record.message and "already" in record.message for record in caplog.records)


def test_an_interrupted_run_is_completed(sample: Sample, output_dir: Path, tmp_path: Path) -> None:
    sample(seed=4, num_samples=3)
    whole = voxels(output_dir)
    (output_dir / "sample_seed-4_000001.json").unlink()
    (output_dir / "sample_seed-4_000002.nii.gz").unlink()
    sample(seed=4, num_samples=3)
    assert equal(voxels(output_dir), whole)
    assert len(names(output_dir)) == 9


@pytest.mark.parametrize(
    "other", [{"age": 0.9}, {"num_inference_steps": 3}, {"sampler": "ddpm"}, {"output_dtype": "int16"}]
)
def test_a_sample_of_other_settings_is_not_overwritten(
    other: dict[str, Any], sample: Sample, output_dir: Path, tmp_path: Path
) -> None:
    sample(seed=4)
    kept = tmp_path / "kept"
    shutil.copytree(output_dir, kept)
    with pytest.raises(Exception) as caught:
        sample(**{"seed": 4, **other})
    assert "other settings: choose another --output_dir or --seed" in str(find_bundle_error(caught.value))
    assert names(output_dir) == names(kept)
    assert equal(voxels(output_dir), voxels(kept))


# Several processes.


def test_processes_share_the_samples_of_one_run(
    sample: Sample, output_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(seed=6, num_samples=3, output_dir=str(tmp_path / "alone"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        before = set(voxels(output_dir))
        sample(seed=6, num_samples=3)
        shares.append(len(set(voxels(output_dir)) - before))
    assert sum(shares) == 3 and min(shares) >= 1
    assert equal(voxels(output_dir), voxels(tmp_path / "alone"))


def test_processes_need_a_common_seed(sample: Sample, output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "give --seed" in refused(sample, output_dir, num_samples=3)


# Label maps.


def test_labels_lie_beside_the_samples(sample: Sample, output_dir: Path, run_here: RunHere, tmp_path: Path) -> None:
    sample(seed=5)
    bare = voxels(output_dir)
    sample(seed=5, labels=1)  # makes the label map that lacks
    stem, endings = "sample_seed-5_000000", (".json", ".nii.gz", ".png", "_dseg.nii.gz")
    assert names(output_dir) == [*(f"{stem}{ending}" for ending in endings), saving.TABLE]
    assert np.array_equal(voxels(output_dir)[f"{stem}.nii.gz"], bare[f"{stem}.nii.gz"])
    segmented = tmp_path / "segmented"
    flags = {"volumes_dir": str(output_dir), "output_dir": str(segmented), **SMALLEST}
    run_here([BASE, "configs/segment.yaml", TINY], **flags)
    assert sorted(path.name for path in segmented.glob("*.nii.gz")) == [f"{stem}_dseg.nii.gz"]  # no sample, the map
    assert np.array_equal(voxels(segmented)[f"{stem}_dseg.nii.gz"], voxels(output_dir)[f"{stem}_dseg.nii.gz"])
    (stated,), (row,) = sidecars(output_dir), read_table(segmented / "volumes.tsv")
    measured = stated["measured"]
    assert {name: float(row[name]) for name in measured} == pytest.approx(measured, abs=0.2)
    (table,) = read_table(output_dir / saving.TABLE)
    assert float(table["measured_brain_mm3"]) == measured["brain_mm3"] and table["sex"] in ("female", "male")


def test_labels_in_a_bids_derivative(sample: Sample, output_dir: Path) -> None:
    sample(seed=5, labels=1, layout="bids")
    (row,) = read_table(output_dir / "participants.tsv")
    head = "sub-seed5n000000/anat/sub-seed5n000000_space-MNI152"
    assert (row["path"], row["labels"]) == (f"{head}_T1w.nii.gz", f"{head}_dseg.nii.gz")
    assert (output_dir / row["labels"]).is_file() and float(row["measured_brain_mm3"]) > 0
    assert find_volumes(output_dir, "synthetic_dir") == [output_dir / row["path"]]
