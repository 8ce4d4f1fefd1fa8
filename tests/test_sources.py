# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Which scans of an input are taken, and what its tables say of each."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from preparing import CONDITIONS

from scripts.core.errors import BundleError
from scripts.core.tables import TableRow
from scripts.preparation.covariates import CovariateReader
from scripts.preparation.exclusions import Exclusions
from scripts.preparation.selection import Selection
from scripts.preparation.sources import Source, find_sources

COLUMNS = {"age_years": ["age_years", "age"], "sex": ["sex", "gender"]}
ONE_SESSION = ("", "rec-norm_", "acq-fse_", "part-phase_", "part-mag_", "inv-1_", "space-MNI_", "desc-x_", "run-01_")


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        subject, *between = name.split("_")
        sessions = [part for part in between if part.startswith("ses-")]
        path = folder.joinpath(subject, *sessions, "anat", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    return folder


def ages(folder: Path, **selection: Any) -> dict[str, str]:
    sources = find_sources(folder, None, Selection(**selection))
    assert not any(source.fault for source in sources), sources
    covariates = CovariateReader(CONDITIONS, COLUMNS, None, None, sources)
    return {source.name: covariates.of(source)["age_years"] for source in sources}


@pytest.mark.parametrize("column", ["session_id", "session", "ses"])
@pytest.mark.parametrize("prefix", ["", "ses-"])
def test_a_row_of_a_session_is_of_that_one_alone(column: str, prefix: str, tmp_path: Path) -> None:
    touched(tmp_path, *(f"sub-{s}_ses-{n}_T1w.nii.gz" for s in "ab" for n in (1, 2)))
    rows = [f"participant_id\t{column}\tage", f"sub-a\t{prefix}1\t50", f"b\t{prefix}1\t60", f"sub-b\t{prefix}2\t61"]
    (tmp_path / "participants.tsv").write_text("\n".join(rows) + "\n")
    assert ages(tmp_path) == {"sub-a_ses-1": "50", "sub-a_ses-2": "n/a", "sub-b_ses-1": "60", "sub-b_ses-2": "61"}
    (tmp_path / "sub-a" / "sub-a_sessions.tsv").write_text(f"{column}\tage\n{prefix}2\t52\n")
    assert ages(tmp_path, participants="a")["sub-a_ses-2"] == "52"


def test_rows_of_one_session_that_differ_are_a_fault_and_equal_ones_are_one(tmp_path: Path) -> None:
    touched(tmp_path, "sub-a_T1w.nii.gz", "sub-b_T1w.nii.gz")
    table = tmp_path / "participants.tsv"
    table.write_text("participant_id\tage\nsub-a\t50\nsub-a\t50\nsub-b\t60\nsub-b\t61\n")
    a, b = find_sources(tmp_path, None)
    assert a.fault is None and b.fault is not None and b.fault[0] == "duplicate subject"


def names(folder: Path, **selection: Any) -> set[str]:
    found = find_sources(folder, None, Selection(**selection))
    return {source.name.removeprefix("sub-a_").removesuffix("sub-a") for source in found}


def filtered(folder: Path, **entities: Any) -> dict[str, Any]:
    path = folder / "filter.json"
    path.write_text(json.dumps({"t1w": {"datatype": "anat", "suffix": "T1w", **entities}, "bold": {"task": "rest"}}))
    return {"filter_file": path}


def test_parts_and_derivatives_are_no_scans_and_a_filter_file_chooses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touched(tmp_path, *(f"sub-a_{entity}T1w.nii.gz" for entity in ONE_SESSION), "sub-b_T1w.nii.gz")
    (tmp_path / "participants.tsv").write_text("participant_id\nsub-a\nsub-b\n")
    taken = names(tmp_path, participants=["a"])
    assert taken == {"", "rec-norm", "acq-fse", "part-mag", "run-01"}
    assert "4 T1w images are left out" in caplog.text and "1 sessions have several T1w scans" in caplog.text
    for entities, chosen in (
        ({"acquisition": "fse"}, {"acq-fse"}),
        ({"acquisition": None, "reconstruction": None, "run": None, "part": None}, {""}),
        ({"run": 1}, {"run-01"}),
        ({"run": ["01", None], "acquisition": None, "part": "Query.NONE"}, {"", "rec-norm", "run-01"}),
        ({"space": "Query.ANY"}, {"space-MNI"}),
        ({"part": ["phase", "mag"]}, {"part-phase", "part-mag"}),
    ):
        assert names(tmp_path, participants="sub-a", **filtered(tmp_path, **entities)) == chosen
    for entities, said in (({"colour": 1}, "no entity 'colour'"), ({"suffix": "T2w"}, "suffix of t1w")):
        with pytest.raises(BundleError, match=said):
            names(tmp_path, **filtered(tmp_path, **entities))


def test_labels_choose_people_and_sessions(tmp_path: Path) -> None:
    touched(tmp_path, *(f"sub-{s:02d}_ses-{n}_T1w.nii.gz" for s in (1, 2, 10) for n in (1, 2)))
    (tmp_path / "participants.tsv").write_text("participant_id\nsub-01\nsub-02\nsub-10\n")
    given: dict[str, Any]
    for given, count in (({"participants": (1, "sub-10")}, 4), ({"participants": "01 02", "sessions": "ses-2"}, 2)):
        assert len(find_sources(tmp_path, None, Selection(**given))) == count
    for given, said in (({"participants": "3"}, "no sub-3; there are sub-01"), ({"sessions": 4}, "no ses-4")):
        with pytest.raises(BundleError, match=said):
            find_sources(tmp_path, None, Selection(**given))


def test_what_is_not_here_is_said_and_what_is_of_another_format_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touched(tmp_path, "sub-a_T1w.nii.gz", "sub-b_T1w.NII.GZ", "sub-c_T1w.mgz", "sub-d_T1w.nrrd")
    (tmp_path / "sub-a" / "anat" / "sub-a_run-2_T1w.nii.gz").symlink_to("../../.git/annex/objects/x")
    found = {source.name for source in find_sources(tmp_path, None)}
    assert found == {"sub-a", "sub-a_run-2", "sub-b", "sub-c"} and "1 T1w images are of other formats" in caplog.text
    link = tmp_path / "sub-a" / "sub-a_sessions.tsv"
    for table in (link, tmp_path / "participants.tsv"):
        table.symlink_to(".git/annex/objects/y")
        with pytest.raises(BundleError, match=f"{table.name} is not here.*datalad get"):
            find_sources(tmp_path, None)


def source(name: str, **cells: str) -> Source:
    return Source(f"sub-{name}", "", f"sub-{name}", Path(name), name, TableRow({"participant_id": name, **cells}))


def covariates_of(words: Any = None, **columns: list[str]) -> tuple[list[dict[str, str]], CovariateReader]:
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    sources = [source(str(i), **row) for i, row in enumerate(rows)]
    covariates = CovariateReader(CONDITIONS, COLUMNS, words, {"age_years": [0, 120]}, sources)
    return [covariates.of(one) for one in sources], covariates


def test_no_scan_is_lost_for_its_covariate(caplog: pytest.LogCaptureFixture) -> None:
    told = ["89+", "18-38", "65,5", "620", "sixty", "N/A"]
    found, covariates = covariates_of(age=told, sex=["O", "other", "femal", "F ", "W", "null"])
    assert [row["age_years"] for row in found] == ["89", "n/a", "65.5", "n/a", "n/a", "n/a"]
    assert [row["sex"] for row in found] == ["n/a", "n/a", "n/a", "female", "female", "n/a"]
    with caplog.at_level(logging.WARNING):
        covariates.warn()
    said = caplog.text
    assert all(
        words in said for words in ("'89+'", "bound", "'18-38'", "--words", "no person has", "did you mean female")
    )
    assert said.count("'O'") == 1 and "sex of 2 scans" in said and "'N/A'" not in said


def test_numbers_for_sex_are_not_guessed() -> None:
    assert [row["sex"] for row in covariates_of(sex=["0", "1", "1.0"])[0]] == ["female", "male", "male"]
    assert [row["sex"] for row in covariates_of(sex=["1", "2", "F"])[0]] == ["n/a", "n/a", "female"]
    found, _ = covariates_of(sex=["1", "2", "9"], words={"sex": {1: "male", 2: "female"}})
    assert [row["sex"] for row in found] == ["male", "female", "n/a"]


def test_a_column_that_is_there_twice_is_refused_where_it_is_read(tmp_path: Path) -> None:
    touched(tmp_path, "sub-a_T1w.nii.gz")
    table = tmp_path / "participants.tsv"
    table.write_text("participant_id\tage\tnote\tnote\nsub-a\t50\tx\ty\n")
    assert ages(tmp_path) == {"sub-a": "50"}
    table.write_text("participant_id\tage\tage\nsub-a\t50\t60\n")
    with pytest.raises(BundleError, match="'age' twice"):
        ages(tmp_path)


def test_exclusions_are_read_as_tables_are(tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    path.write_bytes("sub-a # Grüße\r\n\r\nsub-b\r\n".encode("utf-16"))
    assert Exclusions(path).reason("sub-a_ses-1", "sub-a") == "Grüße" and Exclusions(path).reason("x", "sub-b")
    path.unlink()
    path.symlink_to(".git/annex/objects/x")
    with pytest.raises(BundleError, match="datalad get"):
        Exclusions(path)
