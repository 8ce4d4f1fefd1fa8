# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Curves of a training, drawn from what it has written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run_python
from torch.utils.tensorboard import SummaryWriter

from scripts.curves import draw, losses, validations
from scripts.errors import BundleError
from scripts.tables import write_table


def write_run(folder: Path) -> Path:
    """A training of 300 iterations that was stopped after 200 and went on from 150."""
    for first, last, offset in ((1, 200, 0.0), (151, 300, 0.5)):
        with SummaryWriter(str(folder)) as writer:
            for step in range(first, last + 1):
                writer.add_scalar("l1", 1.0 / step + offset, step)
                writer.add_scalar("val_psnr", 20.0, step)
    rows = [{"epoch": n, "iteration": 100 * n, "val_psnr": 20 + n, "val_loss_band0": n} for n in (1, 2, 3)]
    write_table(folder / "validation.tsv", rows)
    return folder


def test_iterations_that_were_done_again_count_once(tmp_path: Path) -> None:
    found = losses(write_run(tmp_path))
    assert found.keys() == {"l1"}
    iterations, values = found["l1"]
    assert iterations.tolist() == list(range(1, 301))
    expected = 1.0 / iterations + 0.5 * (iterations > 150)
    assert np.allclose(values, expected, atol=1e-6)


def test_order_of_the_files_names_does_not_count(tmp_path: Path) -> None:
    expected = losses(write_run(tmp_path))["l1"]
    earlier, later = sorted(tmp_path.glob("events*"), key=lambda path: path.stat().st_mtime_ns)
    earlier.rename(tmp_path / "events.out.tfevents.1.host.1.9")
    later.rename(tmp_path / "events.out.tfevents.1.host.1.10")
    found = losses(tmp_path)["l1"]
    assert np.array_equal(found, expected)


def test_iterations_that_were_not_done_again_are_left_out(tmp_path: Path) -> None:
    for first, last in ((1, 20), (11, 15)):
        with SummaryWriter(str(tmp_path)) as writer:
            for step in range(first, last + 1):
                writer.add_scalar("l1", 1.0, step)
    assert losses(tmp_path)["l1"][0].tolist() == list(range(1, 16))


def test_validations_are_those_of_the_table(tmp_path: Path) -> None:
    found = validations(write_run(tmp_path))
    assert {name: values.tolist() for name, (_, values) in found.items()} == {
        "val_psnr": [21.0, 22.0, 23.0],
        "val_loss_band0": [1.0, 2.0, 3.0],
    }
    assert validations(tmp_path / "none") == {}


def test_picture_has_a_panel_for_each(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    done = run_python("-m", "scripts.curves", run, tmp_path / "x.png")
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
