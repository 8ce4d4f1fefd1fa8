# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Curves of a training, drawn from what it has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import run_python

from scripts.core.errors import BundleError
from scripts.core.tables import write_table
from scripts.tools.curves import draw, losses, validations


def write_run(folder: Path) -> Path:
    """A training of 300 iterations with three validations."""
    lines: list[dict[str, Any]] = [
        {"iteration": n, "losses": {"l1": 1.0 / n}, "rates": {"lr": 1.0}} for n in range(1, 301)
    ]
    lines += [{"iteration": 300, "validation": {"val_psnr": 20.0}}]
    folder.mkdir(exist_ok=True)
    (folder / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"epoch": n, "iteration": 100 * n, "val_psnr": 20 + n, "val_loss_band0": n} for n in (1, 2, 3)]
    write_table(folder / "validation.tsv", rows)
    return folder


def test_losses_are_those_of_the_record(tmp_path: Path) -> None:
    found = losses(write_run(tmp_path))
    assert found.keys() == {"l1"}
    iterations, values = found["l1"]
    assert iterations.tolist() == list(range(1, 301)) and np.array_equal(values, 1.0 / iterations)


def test_line_that_was_cut_short_does_not_count(tmp_path: Path) -> None:
    with open(write_run(tmp_path) / "losses.jsonl", "a") as file:
        file.write('{"iteration": 301, "losses": {"l1"')
    assert losses(tmp_path)["l1"][0].tolist() == list(range(1, 301))


def test_validations_are_those_of_the_table(tmp_path: Path) -> None:
    found = validations(write_run(tmp_path))
    assert {name: values.tolist() for name, (_, values) in found.items()} == {
        "val_psnr": [21.0, 22.0, 23.0],
        "val_loss_band0": [1.0, 2.0, 3.0],
    }
    assert validations(tmp_path / "none") == {}


def test_picture_has_a_panel_for_each(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    done = run_python("-m", "scripts.tools.curves", run, tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape == (208, 960)
    assert all(part.std() > 10 for part in np.split(pixels, 3, axis=1))


def test_folder_without_a_training(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there are no losses in"):
        losses(tmp_path)
    with pytest.raises(BundleError, match="cannot write"):
        draw({"l1": (np.arange(3), np.ones(3))}, {}, tmp_path / "missing" / "x.png")
