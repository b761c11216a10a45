from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from qkv.data.files import existing, read_lines, read_table, read_text
from qkv.errors import InputError

ANY_TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_keeps_its_line_ends_but_not_the_byte_order_mark(tmp_path: Path) -> None:
    assert (
        read_text(_write(tmp_path / "a.txt", "\N{ZERO WIDTH NO-BREAK SPACE}one\r\ntwo\n")) == "one\r\ntwo\n"
    )


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    text = "one\N{LINE SEPARATOR}still one\r\n\ntwo\x0bthree\n"
    assert read_lines(_write(tmp_path / "a.txt", text)) == [
        "one\N{LINE SEPARATOR}still one",
        "",
        "two\x0bthree",
    ]
    assert read_lines(_write(tmp_path / "b.txt", "one\ntwo")) == ["one", "two"]


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "erste\nschön\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8: byte 0xf6 in line 2"):
        read_text(path)


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (gzip.compress(b"x", mtime=0), "is compressed: unpack it first"),
        ("schön".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
    ],
)
def test_other_files_than_text_are_told_apart(tmp_path: Path, content: bytes, advice: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=advice):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("content", ["", "\n \n", "\N{ZERO WIDTH NO-BREAK SPACE}"])
def test_empty_files_are_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match="is empty"):
        read_text(_write(tmp_path / "a.txt", content))


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        existing(str(tmp_path / "gone.txt"))
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        read_text(tmp_path)


# ---------------------------------------------------------------- tables


@given(rows=st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=5))
def test_csv_gives_back_any_text(folder: Path, rows: list[tuple[str, str]]) -> None:
    path = folder / "any.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    table = read_table(path, ["text", "label"])
    assert list(zip(table.columns["text"], table.columns["label"], strict=True)) == rows


@given(rows=st.lists(st.tuples(ANY_TEXT, st.integers(-9, 9)), min_size=1, max_size=5))
def test_json_lines_give_back_any_text(folder: Path, rows: list[tuple[str, int]]) -> None:
    lines = [json.dumps({"text": text, "n": n}, ensure_ascii=False) for text, n in rows]
    table = read_table(_write(folder / "any.jsonl", "\n".join([*lines, "", ""])), ["text", "n"])
    assert list(zip(table.columns["text"], table.columns["n"], strict=True)) == rows


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "A.CSV"])
def test_values_of_text_tables_are_not_interpreted(tmp_path: Path, name: str) -> None:
    rows = [["text", "label"], ["NA", "007"], ["null", "1.0"], ["", "true"], ["2020-01-01", "x"]]
    joined = "\n".join(("\t" if "tsv" in name else ",").join(row) for row in rows)
    table = read_table(_write(tmp_path / name, joined), ["text", "label"])
    assert table.columns == {"text": ["NA", "null", "", "2020-01-01"], "label": ["007", "1.0", "true", "x"]}


def test_tsv_knows_no_quotes(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tsv", 'source\ttarget\n"Go," he said\tx\n"open\ty\n')
    assert read_table(path, ["source"]).columns == {"source": ['"Go," he said', '"open']}


def test_long_fields_and_many_rows(tmp_path: Path) -> None:
    long = "word " * 500_000
    path = _write(tmp_path / "a.csv", "text,label\n" + f'"{long}",0\n' + "short,1\n" * 50_000)
    values = read_table(path, ["text"]).columns["text"]
    assert values[0] == long and len(values) == 50_001


def test_parquet_as_hugging_face_writes_it(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["no", "yes"]), "other": Value("int64")}
    )
    data = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0], "other": [5, 6]}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet", ["text", "label", "pair"])
    assert table.columns == {"text": ["a", "b"], "label": [1, 0]}
    assert table.class_names == {"label": ("no", "yes")}
    assert table.present == ("text", "label", "other")
    data.remove_columns("label").to_pandas().to_parquet(tmp_path / "b.parquet")  # by another library
    assert read_table(tmp_path / "b.parquet", ["text"]).columns == {"text": ["a", "b"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\none,1\ntwo\n", "is not a table: line 3: 1 columns, not 2"),
        ("a.csv", 'text,label\n"one,1\ntwo,2\n', "is not a table: line 3: unexpected end of data"),
        ("a.csv", 'text,label\n"one" more,1\n', "is not a table: line 2: ',' expected after '\"'"),
        ("a.csv", "", "is empty"),
        ("a.tsv", "text\tlabel\none\t1\t2\n", "is not a table: line 2: 3 columns, not 2"),
        ("a.csv", "text\nsch\xf6n".encode("latin-1"), "is not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]', "line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}', "is not UTF-8"),
        ("a.parquet", b"PAR1 but not really", "is not a Parquet file that can be read"),
        ("a.parquet", b"", "is not a Parquet file that can be read"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_table(_write(tmp_path / name, content), ["text"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "texts,label\none,1\n", "has no column 'text'; it has texts, label: .* with data.text"),
        ("a.csv", "text,text\none,1\n", r"a\.csv has 2 columns 'text'; rename all but one"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.jsonl", '{"text": "a"}\n{"label": 1}', "row 2 has no value in column 'text'"),
        ("a.jsonl", '{"text": "a"}\n{"text": 5}', "row 2 of column 'text' holds 5, not text"),
    ],
)
def test_columns_that_are_not_texts_are_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    table = read_table(_write(tmp_path / name, content), ["text"])
    with pytest.raises(InputError, match=message):
        table.texts("text", "data.text")


def test_parquet_with_a_column_twice(tmp_path: Path) -> None:
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"]), pyarrow.array([1])]
    table = pyarrow.Table.from_arrays(columns, ["text", "text", "label"])
    parquet.write_table(table, tmp_path / "a.parquet")
    read = read_table(tmp_path / "a.parquet", ["text", "label"])
    assert read.values("label", "data.label") == [1]
    with pytest.raises(InputError, match="has 2 columns 'text'"):
        read.texts("text", "data.text")
