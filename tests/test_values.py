# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Kept numbers: found again, also after a run was killed while writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from monai.metrics import SSIMMetric

from scripts.compute.kept import Values, identity
from scripts.evaluation.measures import settings
from scripts.evaluation.metrics.alignment import Alignment
from scripts.evaluation.metrics.four_g_r_ssim import FourGRSSIM


def test_numbers_are_found_again_exactly(tmp_path: Path) -> None:
    values = Values(tmp_path / "values")
    assert values.get("a", "x", "y") is None and not (tmp_path / "values").exists()
    values.add("a", ["x", "y"], [0.1, 1 / 3, float("inf")])
    for found in (values, Values(tmp_path / "values")):
        assert found.get("a", "x", "y") == (0.1, 1 / 3, float("inf"))
        assert found.get("a", "y", "x") is None and found.get("b", "x", "y") is None


def test_a_line_that_was_cut_short_does_not_count(tmp_path: Path) -> None:
    first = Values(tmp_path)
    first.add("a", ["x"], [0.125])
    file = tmp_path / "rank-0.tsv"
    file.write_bytes(file.read_bytes() + b"a\ty\t0.3")
    again = Values(tmp_path)
    assert again.get("a", "x") == (0.125,) and again.get("a", "y") is None
    again.add("a", ["z"], [0.5])
    assert file.read_text() == "a\tx\t0.125\na\tz\t0.5\n"


def test_numbers_of_all_processes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = Values(tmp_path)
    assert values.get("a", "x") is None
    monkeypatch.setattr("scripts.compute.kept.process_rank", lambda: (3, 4))
    Values(tmp_path).add("a", ["x"], [2.0])
    values.reload()
    assert values.get("a", "x") == (2.0,) and [path.name for path in tmp_path.iterdir()] == ["rank-3.tsv"]


def test_damaged_lines_do_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [b"a\tx\tmany", b"a\ty\t0.5", b"a\tz\tnan", b"\xff\xfe", b"", b"a\tw\t1 2+3j", b"a\tv\t"]
    (tmp_path / "rank-0.tsv").write_bytes(b"\n".join([*lines, b""]))
    values = Values(tmp_path)
    assert values.get("a", "y") == (0.5,) and not any(values.get("a", name) for name in "xzwv")
    assert "6 lines of" in caplog.text and "rank-0.tsv" in caplog.text


def test_another_metric_or_setting_has_another_identity() -> None:
    metric = SSIMMetric(3)
    names = {identity(*given, k=k) for given in (("a", metric), ("b", metric), ("a", Values("x"))) for k in (1, 2)}
    assert len(names) == 6 and identity("a", metric, k=1) == identity("a", SSIMMetric(3), k=1)


def test_this_package_s_metrics_are_known_by_their_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, first = Values(tmp_path), identity("a", Alignment(), k=1)
    values.add(first, ["x"], [1.0])
    assert values.get(identity("a", Alignment(), k=1), "x") == (1.0,)
    monkeypatch.setattr(Alignment, "version", 2, raising=False)
    assert values.get(identity("a", Alignment(), k=1), "x") is None


@pytest.mark.parametrize(
    ("name", "function", "former"),
    [
        ("aligned_ssim", Alignment(), "aligned_ssim-0e40cae7332b"),
        ("four_g_r_ssim", FourGRSSIM((32, 48, 32)), "four_g_r_ssim-afd4d670abb5"),
    ],
)
def test_numbers_that_version_2_0_0_kept_are_found(name: str, function: Any, former: str, tmp_path: Path) -> None:
    facts = function.facts() if isinstance(function, Alignment) else settings({name: function})[name]
    Values(tmp_path).add(former, ["x", "y"], [0.5])
    assert Values(tmp_path).get(identity(name, function, **facts), "x", "y") == (0.5,)
