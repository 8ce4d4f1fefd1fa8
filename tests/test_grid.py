# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The voxel grid: its affine, latent sizes, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import pytest
from released import configuration

from scripts.core.errors import BundleError
from scripts.volumes.grid import Grid

RELEASED_ORIGIN = (96.48149872, -141.47715759, -156.55375671)  # the released saver's, of the uncropped volume
CROP = (16, 16, 96)


@pytest.fixture(scope="module")
def grid() -> Grid:
    return configuration([]).get_parsed_content("grid")


def test_grid_of_the_base_is_the_released_one_with_its_crop(grid: Grid) -> None:
    released = np.diag([-1.0, 1.0, 1.0, 1.0])
    released[:3, 3] = RELEASED_ORIGIN
    assert grid.shape == (160, 224, 160)
    assert np.allclose(grid.affine @ [0, 0, 0, 1], released @ [*CROP, 1])
    assert np.allclose(grid.affine[:3, :3], released[:3, :3])
    assert grid.affine.dtype == np.float64


def test_axes_run_from_right_to_left_back_to_front_and_bottom_to_top(grid: Grid) -> None:
    assert nib.orientations.aff2axcodes(grid.affine) == ("L", "A", "S")


def test_latent_of_the_base_is_the_released_one(grid: Grid) -> None:
    assert grid.latent_shape(8) == (20, 28, 20)
    assert grid.latent_shape(1) == grid.shape


def test_tiny_grid_covers_the_same_brain(grid: Grid) -> None:
    tiny = configuration().get_parsed_content("grid")
    extent = np.abs(np.array(tiny.shape) * tiny.spacing)
    assert np.allclose(extent, np.abs(np.array(grid.shape) * grid.spacing))


def test_grid_that_cannot_be_divided_is_refused(grid: Grid) -> None:
    with pytest.raises(BundleError, match="multiples of 64"):
        grid.latent_shape(64)
    assert grid.latent_shape(8, 4) == (20, 28, 20)
    with pytest.raises(BundleError, match=r"latents \(20, 28, 20\).* multiples of 8: .* of multiples of 64"):
        grid.latent_shape(8, 8)


def test_latents_that_the_unet_cannot_halve_are_refused() -> None:
    config = configuration()
    config["grid"]["shape"] = [32, 24, 32]
    with pytest.raises(RuntimeError) as caught:
        config.get_parsed_content("latent_shape")
    assert isinstance(caught.value.__cause__, BundleError) and "needs multiples of 4" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("shape", "spacing", "origin"),
    [
        ((8, 8), (1, 1, 1), (0, 0, 0)),
        ((8, 8, 8), (1, 1), (0, 0, 0)),
        ((8, 8, 8), (1, 1, 1), (0, 0, 0, 0)),
        ((8, 0, 8), (1, 1, 1), (0, 0, 0)),
        ((8, -8, 8), (1, 1, 1), (0, 0, 0)),
        ((8, 8, 8), (1, 0, 1), (0, 0, 0)),
    ],
)
def test_impossible_grids_are_refused(shape: Sequence[int], spacing: Sequence[float], origin: Sequence[float]) -> None:
    with pytest.raises(BundleError, match="a grid"):
        Grid(shape, spacing, origin)
