# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables: what comes back, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripts.core.errors import BundleError
from scripts.core.tables import read_table, write_table


def table(folder: Path, text: str | bytes, name: str = "x.tsv") -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def refused(path: Path, *required: str) -> str:
    with pytest.raises(BundleError) as caught:
        read_table(path, required)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": "a", "age": 61.5, "note": "two words, and a comma"},
        {"id": "b", "age": None},
    ]
    write_table(tmp_path / "x.tsv", rows)
    assert (tmp_path / "x.tsv").read_text().splitlines()[0] == "id\tage\tnote"
    read = read_table(tmp_path / "x.tsv")
    assert read == [
        {"id": "a", "age": "61.5", "note": "two words, and a comma"},
        {"id": "b", "age": "n/a", "note": "n/a"},
    ]


@pytest.mark.parametrize(
    "text",
    [
        "id\tage\n1\t60\n2\t70\n",
        "id\tage\r\n1\t60\r\n2\t70",
        "\ufeffid\tage\n1\t60\n2\t70\n",
        "id \t age\n\n1\t 60\n2\t70 \n\n",
    ],
    ids=["plain", "windows", "byte order mark", "blanks"],
)
def test_line_endings_marks_and_blanks_do_not_matter(text: str, tmp_path: Path) -> None:
    assert read_table(table(tmp_path, text), ["id"]) == [{"id": "1", "age": "60"}, {"id": "2", "age": "70"}]


def test_commas_separate_in_csv_alone(tmp_path: Path) -> None:
    assert read_table(table(tmp_path, 'id,note\n1,"a, b"\n', "x.CSV")) == [{"id": "1", "note": "a, b"}]
    assert read_table(table(tmp_path, "id\tnote\n1\ta,b\n")) == [{"id": "1", "note": "a,b"}]


def test_row_order_is_kept(tmp_path: Path) -> None:
    rows = [{"n": str(n)} for n in (3, 1, 2)]
    write_table(tmp_path / "x.tsv", rows)
    assert read_table(tmp_path / "x.tsv") == rows


def test_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    told = refused(table(tmp_path, "id\tage\n1\t60\n"), "id", "path")
    assert "no column 'path'" in told and "id, age" in told


@pytest.mark.parametrize("text", ["", "\n\n", "id\tage\n", "id\tage\n\n \t \n"])
def test_table_without_rows(text: str, tmp_path: Path) -> None:
    assert "has no rows" in refused(table(tmp_path, text))


@pytest.mark.parametrize(("line", "cells"), [("2", 1), ("2\t70\tx", 3)])
def test_ragged_row_is_named(line: str, cells: int, tmp_path: Path) -> None:
    told = refused(table(tmp_path, f"id\tage\n1\t60\n{line}\n"))
    assert told.startswith("row 2 of") and f"has {cells} cells where the header has 2" in told


def test_column_that_is_there_twice(tmp_path: Path) -> None:
    path = table(tmp_path, "age\tid\tage\tnote\tnote\n1\t2\t3\tx\tx\n")
    (row,) = read_table(path, ["id", "note"])
    assert row == {"id": "2", "note": "x"} and "'age' twice" in refused(path, "age")
    for needed in (
        lambda: row.get("age"),
        lambda: row["age"],
        lambda: "age" in row,
        lambda: row.updated({}).get("age"),
    ):
        with pytest.raises(BundleError, match="'age' twice"):
            needed()


def test_what_is_no_table(tmp_path: Path) -> None:
    assert "cannot read" in refused(tmp_path / "missing.tsv")
    assert "cannot read" in refused(tmp_path)
    assert "no text" in refused(table(tmp_path, b"id\tage\n1\t\x00\n"))
    os.mkfifo(tmp_path / "pipe.tsv")
    assert "pipe" in refused(tmp_path / "pipe.tsv") and "device" in refused(Path("/dev/zero"))
    (tmp_path / "annexed.tsv").symlink_to(".git/annex/objects/gone")
    (tmp_path / "pointer.tsv").write_text("/annex/objects/MD5E-s1--x.tsv\n")
    for name in ("annexed", "pointer"):
        assert "datalad get" in refused(tmp_path / f"{name}.tsv")
    refused(table(tmp_path, "x" * 200000 + "\n" + "y" * 200000))


def test_stray_quotation_mark_is_text(tmp_path: Path) -> None:
    read = read_table(table(tmp_path, 'id\tnote\n1\t"a\n2\tb\n3\t5" lesion\n'))
    assert [row["note"] for row in read] == ['"a', "b", '5" lesion']
    write_table(tmp_path / "again.tsv", read)
    assert read_table(tmp_path / "again.tsv") == read


def test_unclosed_quotation_in_csv_swallows_no_rows(tmp_path: Path) -> None:
    assert "cannot read" in refused(table(tmp_path, 'id,note\n1,"a\n2,b\n', "x.csv"))


def test_empty_cell_is_written_as_missing(tmp_path: Path) -> None:
    write_table(tmp_path / "x.tsv", [{"note": ""}])
    assert read_table(tmp_path / "x.tsv") == [{"note": "n/a"}]


def test_tabs_and_line_ends_in_a_cell_become_blanks(tmp_path: Path) -> None:
    write_table(tmp_path / "x.tsv", [{"id": 1, "note": "a\tb\nc"}])
    assert read_table(tmp_path / "x.tsv") == [{"id": "1", "note": "a b c"}]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("id,note\n1,Jürgen\n", "x.tsv"),
        ("id;note\n1;Jürgen\n", "x.csv"),
        ("id\tnote\n1\tJürgen\n", "x.csv"),
        ('"id"\t"note"\n"1"\t"Jürgen"\n', "x.tsv"),
        ("id\tnote\r1\tJürgen\r", "x.tsv"),
        ("id\tnote\n1\tJürgen\n".encode("utf-16"), "x.tsv"),
        ("id\tnote\n1\tJürgen\n".encode("cp1252"), "x.tsv"),
    ],
)
def test_tables_as_other_programs_write_them(content: str | bytes, name: str, tmp_path: Path) -> None:
    assert read_table(table(tmp_path, content, name), ["id"]) == [{"id": "1", "note": "Jürgen"}]


def test_a_quoted_tab_is_a_part_of_its_cell(tmp_path: Path) -> None:
    assert read_table(table(tmp_path, 'id\tnote\n1\t"a\tb"\n')) == [{"id": "1", "note": "a\tb"}]


def test_what_would_steer_a_terminal_is_written_out(tmp_path: Path) -> None:
    told = refused(table(tmp_path, "id\t\x1b[31mage\n1\t2\n"), "path")
    assert "\x1b" not in told and "\\x1b[31mage" in told
