# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/architecture.md, run as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import BASE, ROOT, TINY, RunHere
from preparing import preparation, space, steps, write_bids
from released import configuration, write_weights

from scripts.core.tables import read_table

EXAMPLE = re.compile(r"^```\w+\n# (\w+\.(?:py|yaml))\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples' files in a folder that Python searches."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    found = dict(EXAMPLE.findall(page))
    assert len(found) == page.count("```python") + page.count("```yaml")
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def weights(folder: Path, *overlays: Path) -> dict[str, str]:
    """Flags for random weights of the size that a configuration asks for."""
    write_weights(folder, configuration([TINY, *map(str, overlays)]))
    names = {"autoencoder_path": "tiny_autoencoder.pt", "diffusion_path": "tiny_diffusion.pt"}
    return {flag: str(folder / name) for flag, name in names.items()}


def sampled(folder: Path) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Sidecar and volume of each sample."""
    files = sorted(folder.glob("*.nii.gz"))
    sidecars = [json.loads(Path(str(file).replace(".nii.gz", ".json")).read_text()) for file in files]
    return [(sidecar, np.asarray(nib.load(file).dataobj)) for sidecar, file in zip(sidecars, files)]  # type: ignore[attr-defined]


def test_a_condition(examples: Path, run_here: RunHere) -> None:
    overlay, output = examples / "education.yaml", examples / "output"
    flags: dict[str, Any] = {**weights(examples, overlay), "education_years": 12, "seed": 1, "output_dir": str(output)}
    run_here([BASE, TINY, overlay], num_inference_steps=2, **flags)
    [(sidecar, _)] = sampled(output)
    assert sidecar["conditions"]["education_years"] == pytest.approx(12)
    assert sidecar["conditions"]["education"] == pytest.approx(5 / 13, abs=1e-5)


def test_a_sampler(examples: Path, run_here: RunHere) -> None:
    overlay, given = examples / "renoising.yaml", weights(examples)
    for name in ("one", "two"):
        run_here([BASE, TINY, overlay], **given, seed=1, output_dir=str(examples / name))
    [(sidecar, volume)], [(_, again)] = sampled(examples / "one"), sampled(examples / "two")
    assert sidecar["sampler"] == "renoising" and sidecar["num_inference_steps"] == 4
    assert np.array_equal(volume, again)


def test_a_metric_and_a_family(examples: Path, run_here: RunHere) -> None:
    samples, output = examples / "samples", examples / "evaluation"
    run_here([BASE, TINY, examples / "average.yaml"], num_samples=4, seed=1, output_dir=str(samples))
    made = sampled(samples)
    assert len(made) == 4 and made[0][0]["family"] == "average"
    evaluate: list[str | Path] = [BASE, "configs/evaluate.yaml", TINY, examples / "brightness.yaml"]
    folders = {"synthetic_dir": str(samples), "real_dir": str(examples / "real"), "output_dir": str(output)}
    run_here([BASE, TINY, examples / "average.yaml"], num_samples=3, seed=2, output_dir=folders["real_dir"])
    run_here(evaluate, **folders, num_pairs=2, segment_with="none")
    mean = np.mean([volume.mean() for _, volume in made])
    model, real = read_table(output / "table_1.tsv")
    assert float(model["brightness"]) == pytest.approx(mean, rel=1e-3) and real["brightness"]
    assert "how bright the volumes are" in (output / "evaluation.html").read_text().lower()


def test_a_preparation_step(examples: Path) -> None:
    config = configuration(["configs/prepare.yaml", TINY, str(examples / "gamma.yaml")])
    step = config.get_parsed_content("steps::gamma")
    assert list(config["steps"])[-1] == "gamma" and step.gamma == 0.9
    target = space(examples / "template")
    raw = write_bids(examples / "raw", 1)
    for name, more in (("plain", {}), ("powered", {"gamma": step})):
        preparation(target, examples / name, input_dir=raw, steps={**steps(target), **more}).run()
    [plain], [powered] = (sorted((examples / name).rglob("*T1w.nii.gz")) for name in ("plain", "powered"))
    before, after = (np.asarray(nib.load(path).dataobj) for path in (plain, powered))  # type: ignore[attr-defined]
    assert np.abs(before**0.9 - after).max() < 0.005
