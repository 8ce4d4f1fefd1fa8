# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Several models, the HTML report, what is not computed twice, and what is warned of."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import computed_once
from PIL import Image
from test_evaluation import folder_of, rows_of, run_here, save, volume

from scripts.core.bootstrap import summarise
from scripts.core.errors import BundleError
from scripts.evaluation import pairs
from scripts.evaluation.measures import Measure, Result, Row
from scripts.evaluation.metrics.features import FeatureSet
from scripts.evaluation.page import number
from scripts.evaluation.samples import named_folders
from scripts.volumes.folders import VolumeFolder


class Page(HTMLParser):
    """Tags, tables and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def two_models(shared_dir: Path) -> Path:
    """An evaluation of two models by two feature networks; its output folder. Tests must not change it."""
    return computed_once(shared_dir / "two_models", evaluate_two_models) / "output"


def evaluate_two_models(work: Path) -> None:
    seeds = {"a": (1, 2, 3, 4), "b": (5, 6, 7, 8), "real": (11, 12, 13, 14), "training": (21, 22)}
    folders = {name: str(folder_of(work / name, *chosen)) for name, chosen in seeds.items()}
    network = {"_target_": "test_evaluation.Plain"}
    run_here(
        work / "output",
        synthetic_dir=f"{folders['a']},{folders['b']}",
        real_dir=folders["real"],
        training_dir=folders["training"],
        features="one,other",
        feature_networks={"one": network, "other": network},
        num_pairs=3,
    )


def read(table: Path) -> list[dict[str, str]]:
    with open(table, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_table_1_has_a_row_a_model_and_one_of_the_real_volumes(two_models: Path) -> None:
    report = json.loads((two_models / "evaluation.json").read_text())
    rows = {row["model"]: row for row in read(two_models / "table_1.tsv")}
    assert list(rows) == ["a", "b", "real"] == [row["model"] for row in report["table_1"]]
    for model in ("a", "b"):
        fid, similar = (rows_of(two_models, name, model)[0] for name in ("fid", "synthetic_pairs"))
        assert report["measures"][f"fid_{model}"]["model"] == model and rows[model]["volumes"] == "4"
        assert float(rows[model]["FID (one)"]) == fid["value"] and fid["network"] == "one"
        assert float(rows[model]["MS-SSIM"]) == similar["value"] and similar["metric"] == "ms_ssim"
    real = rows_of(two_models, "real_pairs")[1]
    assert float(rows["real"]["4-G-R-SSIM"]) == real["value"] and rows["real"]["volumes"] == "4"
    assert rows["real"]["FID (one), halves"] == rows["a"]["FID (one), floor"] and rows["real"]["FID (one)"] == "n/a"
    assert rows["real"]["FID (one), halves, SD"] == rows["a"]["FID (one), floor, SD"] != "n/a"
    assert {row["model"] for row in read(two_models / "evaluation.tsv")} == {"a", "b", "n/a"}


def test_the_page_needs_no_other_file_and_is_well_formed(two_models: Path) -> None:
    text = (two_models / "evaluation.html").read_text()
    page = Page(text)
    assert page.open == [] and not re.search(r"https?://|<script|<link|url\(", text)
    pictures = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 1 + 2 * 3 + 2  # volumes; histograms of two metrics, regions, closest pairs for each model
    for picture in pictures:
        assert picture.startswith("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))) as image:
            assert image.format == "PNG" and np.ptp(np.asarray(image)) > 100


def test_the_page_says_what_the_report_says(two_models: Path) -> None:
    report = json.loads((two_models / "evaluation.json").read_text())
    page = Page((two_models / "evaluation.html").read_text())
    titles = {"fid": "FID", "kid": "KID"}
    for row in report["rows"]:
        title = f"{titles.get(row['measure'], row['measure'].replace('_', ' '))} {row.get('model', '')}".strip()
        assert [title, row["name"], f"{row['value']:.4g}"] in [shown[:3] for shown in page.rows], row
    assert ["reconstruction", "--reconstruct_dir", ""] in page.rows
    targets = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert targets == [f"#{attrs['id']}" for tag, attrs in page.tags if tag == "h2"] and len(targets) > 5
    row = report["table_1"][0]
    spread = f"<td>{row['FID (one), halves']:.4g}<small>± {row['FID (one), halves, SD']:.4g}</small></td>"
    assert spread in (two_models / "evaluation.html").read_text()
    assert ["num_pairs", "3"] in page.rows and ["torch", report["versions"]["torch"]] in page.rows


def test_pairs_of_two_sets_are_not_called_diverse(two_models: Path) -> None:
    text = (two_models / "evaluation.html").read_text()
    assert text.count(pairs.SAYS_OF_TWO_SETS) == 2, "one section a model"
    assert text.count(pairs.PairSimilarity.says) == 3, "and one of the real volumes"


def test_figures_of_different_networks_share_no_column(two_models: Path) -> None:
    columns = list(read(two_models / "table_1.tsv")[0])
    ends = ("", ", halves", ", halves, SD", ", floor", ", floor, SD")
    assert columns[2:12] == [f"FID ({name}){end}" for name in ("one", "other") for end in ends]
    tables = re.findall(r"<table>.*?</table>", (two_models / "evaluation.html").read_text(), re.S)
    measured = [table for table in tables if "<th>metric</th>" in table]
    assert len([table for table in measured if "(one)" in table]) == len([t for t in measured if "(other)" in t]) > 0
    assert not [table for table in measured if "(one)" in table and "(other)" in table]


class Brightness(Measure):
    """A measure of somebody's own: the mean intensity of samples."""

    says = "How bright samples are."

    def __init__(self, synthetic: FeatureSet) -> None:
        self.folder = synthetic.folder
        self.inputs = [self.folder]

    def compute(self) -> Result:
        table = [{"volume": self.folder.name(i), "mean": float(self.folder[i].mean())} for i in range(len(self.folder))]
        values = np.array([line["mean"] for line in table])
        return Result([Row("mean_intensity", summarise(values, np.arange(len(values)), 0))], {}, table)


def test_a_new_metric_is_one_entry_and_reaches_table_1_and_the_page(tmp_path: Path) -> None:
    folders = [str(folder_of(tmp_path / name, *seeds)) for name, seeds in (("a", (1, 2, 3)), ("b", (4, 5, 6)))]
    entry = {"_target_": "test_evaluation_report.Brightness", "_mode_": "callable"}
    run_here(tmp_path / "output", synthetic_dir=folders, num_pairs=1, **{"metrics::brightness": entry})
    expected = {
        "a": np.mean([volume(s).mean() for s in (1, 2, 3)]),
        "b": np.mean([volume(s).mean() for s in (4, 5, 6)]),
    }
    table = {line["model"]: line for line in read(tmp_path / "output" / "table_1.tsv")}
    page = Page((tmp_path / "output" / "evaluation.html").read_text())
    for model, value in expected.items():
        (row,) = rows_of(tmp_path / "output", "brightness", model)
        assert row["value"] == pytest.approx(value, rel=1e-5) and row["confidence_low"] < value < row["confidence_high"]
        assert float(table[model]["mean intensity"]) == row["value"]
        assert float(table[model]["mean intensity, low"]) == row["confidence_low"]
        assert [f"brightness {model}", "mean intensity", f"{row['value']:.4g}"] in [shown[:3] for shown in page.rows]
        assert len(read(tmp_path / "output" / f"brightness_{model}.tsv")) == 3
    assert any("mean intensity" in row for row in page.rows if "model" in row), "a column of the table of models"


def test_names_and_warnings_are_escaped_and_told(tmp_path: Path) -> None:
    synthetic = folder_of(tmp_path / "<b>odd", 1, 2)
    save(synthetic / "x.nii.gz", 3 * volume(3))
    run_here(tmp_path / "output", synthetic_dir=str(synthetic))
    text = (tmp_path / "output" / "evaluation.html").read_text()
    assert "<b>" not in text and "&lt;b&gt;odd" in text and "ranges from 0 to 3" in text
    report = json.loads((tmp_path / "output" / "evaluation.json").read_text())
    assert len([line for line in report["warnings"] if "ranges from 0 to 3" in line]) == 1
    assert report["measures"]["synthetic_pairs"]["synthetic_dir"]["volumes_outside_0_to_1"] == 1


def test_what_is_not_defined_or_not_measured_says_why(tmp_path: Path) -> None:
    run_here(tmp_path / "output", synthetic_dir=str(folder_of(tmp_path / "volumes", 1, 2, 3)))
    entry = json.loads((tmp_path / "output" / "evaluation.json").read_text())["measures"]["volumetry"]
    assert entry["missing"] == ["--segmentations"] and "what was asked for of" in entry["why"][0]
    rows = Page((tmp_path / "output" / "evaluation.html").read_text()).rows
    assert ["volumetry", "--segmentations", entry["why"][0]] in rows
    assert number(float("inf")) == "inf" and number(float("nan")) == "not defined"


def test_warnings_about_folders_are_in_the_report(tmp_path: Path) -> None:
    synthetic, real = folder_of(tmp_path / "synthetic", 1, 2), folder_of(tmp_path / "real", 3, 4)
    flipped = np.diag([1.0, 1.0, 1.0, 1.0])
    flipped[0, 3] = 1 - volume(3).shape[0]  # to the right from where the others end: the same place
    for seed in (3, 4):
        nib.save(nib.Nifti1Image(volume(seed)[::-1], flipped), real / f"volume_{seed}.nii.gz")
    (real / "participants.tsv").write_text("path\nvolume_3.nii.gz\nvolume_4.nii.gz\n")
    save(real / "more.nii.gz", volume(6))
    run_here(tmp_path / "output", synthetic_dir=str(synthetic), real_dir=str(real))
    report = json.loads((tmp_path / "output" / "evaluation.json").read_text())
    warnings = report["warnings"]
    assert [text for text in warnings if "has no row for 1 of the volumes" in text and "more.nii.gz" in text]
    (told,) = (text for text in warnings if "axes in another order or direction" in text)
    assert "2 of 2 volumes of --real_dir" in told and "volume_3.nii.gz the first: they are turned" in told
    turned = VolumeFolder(real, "real_dir")
    assert all(np.array_equal(turned[i][0, 0].numpy(), volume(seed)) for i, seed in enumerate((3, 4)))
    assert report["measures"]["real_pairs"]["real_dir"]["turned_or_resampled_volumes"] == 2


def test_a_folder_whose_volumes_lie_elsewhere_is_refused_by_name(tmp_path: Path) -> None:
    synthetic, real = folder_of(tmp_path / "synthetic", 1), tmp_path / "real"
    real.mkdir()
    nib.save(nib.Nifti1Image(volume(3), np.diag([1.0, 1.0, 1.0, 1.0])), real / "a.nii.gz")
    with pytest.raises(BundleError, match="real/a.nii.gz lies elsewhere than .*volume_1.nii.gz: .*--resample_volumes"):
        VolumeFolder(synthetic, "synthetic_dir").check_same_grid(VolumeFolder(real, "real_dir"))


def test_label_maps_that_a_table_names_are_no_left_out_volumes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder_of(tmp_path, 1, 2)
    (tmp_path / "participants.tsv").write_text("path\tlabels\nvolume_1.nii.gz\tvolume_2.nii.gz\n")
    assert len(VolumeFolder(tmp_path, "real_dir")) == 1 and not caplog.records


def test_nothing_is_measured_twice_and_the_report_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic = folder_of(tmp_path / "volumes", 1, 2, 3)
    save(synthetic / "x.nii.gz", 2 * volume(4))
    given: dict[str, Any] = {"synthetic_dir": str(synthetic), "value_dir": str(tmp_path / "values")}
    with monkeypatch.context() as patch:
        compare = pairs.PairSimilarity._compare
        done: list[tuple[int, int]] = []

        def interrupted(self: Any, a: int, b: int) -> None:
            if len(done) == 4:
                raise KeyboardInterrupt
            compare(self, a, b)
            done.append((a, b))

        patch.setattr(pairs.PairSimilarity, "_compare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_here(tmp_path / "first", **given)
    kept = (tmp_path / "values" / "rank-0.tsv").read_text()
    finished = run_here(tmp_path / "second", **given)
    text = (tmp_path / "values" / "rank-0.tsv").read_text()
    assert text.startswith(kept) and len(text.splitlines()) == 6 * 2 + 4
    monkeypatch.setattr(pairs.PairSimilarity, "_compare", None)
    assert run_here(tmp_path / "third", **given) == finished
    report = json.loads((tmp_path / "third" / "evaluation.json").read_text())
    assert any("ranges from 0 to 2" in line for line in report["warnings"])


def test_processes_share_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"synthetic_dir": str(folder_of(tmp_path / "volumes", 1, 2, 3))}
    values = tmp_path / "output" / "values"
    for rank in (1, 0):
        for module in ("compute.kept", "evaluation.run"):
            monkeypatch.setattr(f"scripts.{module}.process_rank", lambda rank=rank: (rank, 2))
        if rank:
            with pytest.raises(FileNotFoundError):
                run_here(tmp_path / "output", **given)
        else:
            assert run_here(tmp_path / "output", **given)["synthetic_pairs"]["pairs"] == 3
    lines = {n: [x for x in (values / f"rank-{n}.tsv").read_text().splitlines() if "range" not in x] for n in (0, 1)}
    assert sorted(map(len, lines.values())) == [2, 4] and len(set(lines[0] + lines[1])) == 6


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (None, {"": None}),
        ("a", {"": "a"}),
        ("x/a, x/b", {"a": "x/a", "b": "x/b"}),
        (("x/a", "b"), {"a": "x/a", "b": "b"}),
        ({"ldm": "x", "gan": "y"}, {"ldm": "x", "gan": "y"}),
    ],
)
def test_models_are_named_after_their_folders(given: Any, named: dict[str, Any]) -> None:
    assert named_folders(given) == named


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("x/a,y/a", "two folders are called a: name them with a map"),
        ({"real": "x"}, "'real' cannot"),
        ({"a/b": 1}, ""),
        ({"..": "x"}, "not dots"),
        ({"a": None}, "the model a has no folder"),
    ],
)
def test_unfit_names_are_refused(given: Any, message: str) -> None:
    with pytest.raises(BundleError, match=f"--synthetic_dir: .*{message}"):
        named_folders(given)


def test_files_without_a_row_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_of(tmp_path, 1, 2, 3)
    (tmp_path / "participants.tsv").write_text("participant_id\tpath\na\tvolume_2.nii.gz\n")
    assert len(VolumeFolder(tmp_path, "real_dir")) == 1
    assert "has no row for 2 of the volumes" in caplog.text and "volume_1.nii.gz the first: left out" in caplog.text
    (tmp_path / "participants.tsv").write_text("participant_id\tpath\na\tvolume_2.nii.gz\nb\tvolume_2.nii.gz\n")
    with pytest.raises(BundleError, match="volume_2.nii.gz in two rows"):
        VolumeFolder(tmp_path, "real_dir")
