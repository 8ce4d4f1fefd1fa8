# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Folders with an owner: nothing is mixed, nested, replaced or removed that is somebody else's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BASE, ROOT, TINY, RunHere
from processes import run_python

from scripts.compute.ownership import MARK, TRADES, OutputFolder, owner_of
from scripts.core.errors import BundleError, find_bundle_error
from scripts.core.verbs import merge, references, verbs
from scripts.volumes.folders import find_volumes
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume

OLD = ROOT / "tests" / "data" / "version_2_0_0"


def folder(path: Path, command: str = "sample", **reads: Any) -> OutputFolder:
    return OutputFolder(path, "output_dir", command, reads)


def filled(output: OutputFolder) -> None:
    """As a command does that makes something."""
    (output.claim() / "made").write_text("a result")
    output.release()


def content(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def claimed(tmp_path: Path) -> OutputFolder:
    """A folder that `sample` has filled."""
    found = folder(tmp_path / "own")
    filled(found)
    return found


def test_every_verb_that_writes_claims_its_folder() -> None:
    for name, files in verbs().items():
        run = str(merge(files)["run"])
        used = set(references(merge(files)["run"])) | set(references(merge(files).get("run_training")))
        assert {"output_folder", "checkpoints"} & used or name == "prepare", name
        assert "claim" in run or "checkpoints" in used or name == "prepare", name


@pytest.mark.parametrize("command", TRADES)
def test_a_folder_is_its_commands_alone(command: str, tmp_path: Path) -> None:
    own = folder(tmp_path / "own", command)
    filled(own)
    filled(own)
    assert owner_of(tmp_path / "own") == command
    for other in TRADES:
        if {command, other} <= {"sample", "figures"} or command == other:
            folder(tmp_path / "own", other).check()
        else:
            with pytest.raises(BundleError, match=f"own holds what `{command}` made"):
                folder(tmp_path / "own", other).check()


@pytest.mark.parametrize(
    ("made", "command"),
    [("dataset", "prepare"), ("latents", "encode_latents"), ("samples", "sample"), ("diffusion", "train")],
)
def test_folders_of_earlier_versions_are_known_by_what_lies_in_them(made: str, command: str, tmp_path: Path) -> None:
    old = Path(shutil.copytree(OLD / made, tmp_path / "old"))
    for packed in old.glob("*.pt.gz"):
        packed.rename(packed.with_suffix(""))
    assert owner_of(old) == command
    before = content(old)
    for other in set(TRADES) - {command, "figures"}:
        with pytest.raises(BundleError, match=f"holds what `{command}` made"):
            folder(old, other).claim()
    assert content(old) == before
    folder(old, command).claim()
    assert json.loads((old / MARK).read_text())["command"] == command


@pytest.mark.parametrize("command", [name for name, trade in TRADES.items() if trade.writes])
def test_what_the_program_did_not_write_is_not_replaced(command: str, tmp_path: Path) -> None:
    for name in TRADES[command].writes:
        (tmp_path / name).write_text("the user's own\n")
        with pytest.raises(BundleError, match=f"holds a {name} that `{command}` has not written"):
            folder(tmp_path, command).claim()
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()
    (tmp_path / "job.log").write_text("a scheduler's\n")
    folder(tmp_path, command).claim()


def test_folders_do_not_lie_in_one_another(claimed: OutputFolder, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="lies in .*own, which `sample` fills"):
        folder(claimed.path / "below", "segment").claim()
    with pytest.raises(BundleError, match="lies around .*own, which `sample` fills"):
        folder(tmp_path, "segment").claim()
    folder(claimed.path / "derivatives" / "mine", "segment").claim()
    for path in (ROOT, ROOT.parent, ROOT / "configs", ROOT / "scripts" / "core"):
        with pytest.raises(BundleError, match="a folder of the bundle itself, or holds it"):
            folder(path).claim()
    assert not (ROOT / MARK).exists()


def test_what_is_written_does_not_mix_with_what_is_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "table.tsv").write_text("participant_id\n1\n")
    (tmp_path / "link").symlink_to(source)
    for path in (source, source / "below", tmp_path, tmp_path / "link", tmp_path / "link" / ".." / "source"):
        with pytest.raises(BundleError, match="--output_dir .* and --input_dir .*source lie in one another"):
            folder(path, input_dir=source).check()
    with pytest.raises(BundleError, match="and --input_table .*table.tsv lie in one another"):
        folder(source, input_table=source / "table.tsv").check()
    with pytest.raises(BundleError, match="and --synthetic_dir"):
        folder(source, synthetic_dir=f"{tmp_path / 'other'},{source}").check()
    with pytest.raises(BundleError, match="and --models"):
        folder(source, models={"a": str(source)}).check()
    folder(source / "derivatives" / "ldm", input_dir=source).check()
    folder(source / "dataset", input_table=source / "table.tsv").check()
    folder(tmp_path / "out", input_dir=source, real_dir=None, input_table="null").check()


@pytest.mark.parametrize("path", ["", "  ", "\t"])
def test_an_unset_variable_is_no_folder(path: str) -> None:
    with pytest.raises(BundleError, match="--output_dir is empty"):
        OutputFolder(path, "output_dir", "sample")


def test_what_cannot_be_taken_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is no folder"):
        folder(tmp_path / "file").claim()
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    with pytest.raises(BundleError, match="cannot lock --output_dir"):
        folder(tmp_path / "locked").claim()
    (tmp_path / "marked").mkdir()
    for damaged in ("[]", "null", "{", "[" * 100_000, '{"command": [], "reads": 3, "settings": 1}'):
        (tmp_path / "marked" / MARK).write_text(damaged)
        folder(tmp_path / "marked").claim()


def test_where_nothing_was_made_nothing_is_left(tmp_path: Path) -> None:
    code = "from scripts.compute.ownership import OutputFolder\nOutputFolder({!r}, 'output_dir', 'sample').claim()"
    assert run_python("-c", f"{code.format(str(tmp_path / 'a'))}\nraise SystemExit(3)").returncode == 3
    (tmp_path / "b").mkdir()
    folder(tmp_path / "b").claim()
    folder(tmp_path / "b").release()
    assert list(tmp_path.rglob("*")) == [tmp_path / "b"], "a folder that was there stays"


def test_a_file_in_the_place_of_a_folder_is_one_line(claimed: OutputFolder) -> None:
    (claimed.path / "figures").write_text("x")
    with pytest.raises(BundleError, match="figures is no folder"):
        claimed.claim()


def test_two_commands_do_not_fill_one_folder_at_once(claimed: OutputFolder) -> None:
    code = "from scripts.compute.ownership import OutputFolder\nOutputFolder({!r}, 'output_dir', 'sample'{}).claim()"
    other, part = (code.format(str(claimed.path), more) for more in ("", ", part=(1, 2)"))
    claimed.claim()
    for words in (other, part):
        done = run_python("-c", words)
        assert done.returncode and "another `sample` is at work in" in done.stderr
    claimed.release()
    assert run_python("-c", other).returncode == 0
    shared = OutputFolder(claimed.path, "output_dir", "sample", part=(1, 2))
    shared.claim()
    assert run_python("-c", part.replace("(1, 2)", "(2, 2)")).returncode == 0
    for words in (other, part, part.replace("(1, 2)", "(3, 3)")):
        assert "is at work in" in run_python("-c", words).stderr
    shared.release()


def test_leftovers_are_cleared_and_links_are_not_followed(claimed: OutputFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    kept = elsewhere / ".0123456789ab-x.png"
    kept.write_text("x")
    (claimed.path / "figures").mkdir()
    left = [claimed.path / ".0123456789ab-a.nii.gz", claimed.path / "figures" / ".ba9876543210-b.png"]
    for path in left:
        path.write_bytes(b"half")
    (claimed.path / "link").symlink_to(elsewhere)
    (claimed.path / ".bidsignore").write_text("x")
    claimed.claim()
    claimed.release()
    assert not any(path.exists() for path in left)
    assert kept.exists() and (claimed.path / ".bidsignore").exists()


def test_a_rerun_says_what_differs_and_refuses_other_inputs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = OutputFolder(tmp_path / "out", "output_dir", "segment", {"volumes_dir": tmp_path / "a"}, ["volumes_dir"])
    filled(first)
    mark = json.loads((tmp_path / "out" / MARK).read_text())
    (tmp_path / "out" / MARK).write_text(json.dumps({**mark, "settings": {"amp": "bf16", "segmenter_path": "x"}}))
    other = OutputFolder(tmp_path / "out", "output_dir", "segment", {"volumes_dir": tmp_path / "b"}, ["volumes_dir"])
    with pytest.raises(BundleError, match="holds what `segment` made of .*a: give another --output_dir"):
        other.claim()
    (tmp_path / "a").rename(tmp_path / "moved")
    OutputFolder(
        tmp_path / "out", "output_dir", "segment", {"volumes_dir": tmp_path / "moved"}, ["volumes_dir"]
    ).check()


def test_samples_are_taken_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid, warned = Grid((4, 4, 4), (-1.0, 1.0, 1.0), (0.0, 0.0, 0.0)), list[str]()
    names = ["sample_seed-1_000000.nii.gz", "segmentations/sample_seed-1_000000_dseg.nii.gz", "mine.nii.gz"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_volume(tmp_path / name, np.zeros((4, 4, 4)), grid)
    assert len(find_volumes(tmp_path, "synthetic_dir", warned.append)) == 3 and not warned
    (tmp_path / "sample_seed-1_000000.json").write_text("{}")
    assert find_volumes(tmp_path, "synthetic_dir", warned.append) == [tmp_path / names[0]]
    assert len(warned) == 1 and "mine.nii.gz the first: left out" in warned[0]


REFUSED: list[tuple[str, dict[str, str], str]] = [
    ("encode_latents", {"dataset_dir": "{0}/dataset", "latents_dir": "{0}/dataset"}, "lie in one another"),
    ("phantoms", {"heads_dir": "{0}/dataset", "output_dir": "{0}/dataset"}, "lie in one another"),
    ("prepare", {"input_dir": "{0}/raw", "dataset_dir": "{0}/raw"}, "lie in one another"),
    ("prepare", {"input_table": "{0}/raw/participants.tsv", "dataset_dir": "{0}/raw"}, "lie in one another"),
    ("segment", {"volumes_dir": "{0}/dataset", "output_dir": "{0}/samples"}, "holds what `sample` made"),
    ("evaluate", {"synthetic_dir": "{0}/samples", "output_dir": "{0}/samples"}, "lie in one another"),
    ("train_diffusion", {"latents_dir": "{0}/latents", "run_dir": "{0}/latents"}, "lie in one another"),
    ("train_autoencoder", {"dataset_dir": "{0}/dataset", "run_dir": "{0}/samples"}, "holds what `sample` made"),
    ("side_by_side", {"models": "{{'a': '{0}/samples'}}", "output_dir": "{0}/dataset"}, "holds what `prepare` made"),
    ("export", {"export_dir": "{0}/samples"}, "holds what `sample` made"),
    ("figures", {"output_dir": "{0}/dataset"}, "holds what `prepare` made"),
]


@pytest.mark.parametrize(("stem", "flags", "says"), REFUSED)
def test_no_verb_writes_into_another_ones_folder(
    stem: str, flags: dict[str, str], says: str, run_here: RunHere, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(OLD, tmp_path / "old"))
    before = content(old)
    given = {name: value.format(old) for name, value in flags.items()}
    given = {name: eval(value) if value.startswith("{") else value for name, value in given.items()}
    with pytest.raises(Exception) as caught:
        run_here([BASE, f"configs/{stem}.yaml", TINY, old / "small.yaml"], perceptual_weight=0, load_old=0, **given)
    assert says in str(find_bundle_error(caught.value))
    assert content(old) == before
