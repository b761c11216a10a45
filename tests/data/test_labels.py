"""What tables and CoNLL files say of texts and words, and which task that is."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from qkv.config import DataConfig
from qkv.data import Raw, read, read_held_out
from qkv.data.files import read_conll
from qkv.errors import InputError


def _jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _text(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def _all(location: str, **settings) -> Raw:
    """Read with the same file held out, so that all samples are in their order."""
    return read(DataConfig(path=location, valid=location, **settings), "bert")


# ---------------------------------------------------------------- which task


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "classification"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 0}], "classification"),
        ([{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}], "multi_label"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 0.5}], "regression"),
        ([{"text": "a", "label": "1"}, {"text": "b", "label": "0.5"}], "regression"),
        ([{"text": "a", "label": "1.5"}, {"text": "b", "label": "one"}], "classification"),
        ([{"text": "a", "text_pair": "b"}, {"text": "c", "text_pair": "d"}], "contrastive"),
        ([{"tokens": ["a", "b"], "tags": ["O", "B-X"]}], "tagging"),
    ],
)
def test_the_data_tell_the_task(rows: list[dict], kind: str, tmp_path: Path) -> None:
    raw = _all(_jsonl(tmp_path / "a.jsonl", rows))
    assert raw.kind == kind == raw.train.task
    assert _all(str(tmp_path / "a.jsonl"), task=kind).train == raw.train


def test_a_task_can_be_said(tmp_path: Path) -> None:
    path = _text(tmp_path / "a.csv", 'text,text_pair,label\na,b,1\nc,d,2\ne,f,"2, 1"\ng,h,\n')
    assert _all(path, task="contrastive").train.pairs == list("bdfh")
    sets = _all(path, task="multi_label")
    assert sets.labels == ("1", "2") and sets.train.label_sets == [(0,), (1,), (0, 1), ()]
    assert (
        "Multi-label: each has any number of labels, 1 of them none. 2 labels: 1 (2), 2 (2)."
        in sets.describe()
    )
    whole = _text(tmp_path / "b.csv", "text,label\na,1\nc,2\n")
    values = _all(whole, task="regression")
    assert values.train.values == [1.0, 2.0] and values.labels == ("label",)
    assert "from 1 to 2, on average 1.5" in values.describe()


def test_held_out_data_are_read_as_the_training_data(tmp_path: Path) -> None:
    train = _jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}])
    valid = _jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 2}])
    assert read(DataConfig(path=train, valid=valid), "bert").valid.values == [1.0, 2.0]


def test_a_number_that_no_float_holds_is_named(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0.5}, {"text": "b", "label": 10**400}]
    with pytest.raises(InputError):
        _all(_jsonl(tmp_path / "a.jsonl", rows), task="regression")


def test_labels_that_are_one_number_are_in_one_order(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label} for label in ("01", "1", "001", "0")]
    assert _all(_jsonl(tmp_path / "a.jsonl", rows)).labels == ("0", "001", "01", "1")


@pytest.mark.parametrize("wrapped", ["list", "feature"])
def test_parquet_of_older_libraries_names_the_classes_in_lists(wrapped: str, tmp_path: Path) -> None:
    named = {"names": ["O", "B-X"], "_type": "ClassLabel"}
    tags = [named] if wrapped == "list" else {"feature": named, "length": -1, "_type": "Sequence"}
    messages = [{"role": {"dtype": "string", "_type": "Value"}}]
    columns = {"tokens": [["a", "b"]], "tags": [[0, 1]], "messages": [[{"role": "x"}]]}
    info = {"info": {"features": {"tags": tags, "messages": messages}}}
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps(info)})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert _all(str(tmp_path / "a.parquet")).labels == ("O", "B-X")


def test_parquet_names_the_classes_in_lists(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    named = List(ClassLabel(names=["O", "B-X", "I-X"]))
    features = Features({"tokens": List(Value("string")), "ner_tags": named})
    rows = {"tokens": [["a", "b"], ["c"]], "ner_tags": [[0, 1], [0]]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    raw = _all(str(tmp_path / "a.parquet"), tags="ner_tags")
    assert raw.labels == ("O", "B-X", "I-X")
    assert (raw.train.words, raw.train.tags) == (rows["tokens"], rows["ner_tags"])


# ---------------------------------------------------------------- CoNLL

word = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=5)
sentence = st.lists(st.tuples(word, word), min_size=1, max_size=5)


@given(sentences=st.lists(sentence, min_size=1, max_size=5), tab=st.booleans(), middle=st.booleans())
def test_conll_files_come_back(sentences, tab: bool, middle: bool, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "a.conll"
    between = ("\t" if tab else "  ").join(["", *["x y" if tab else "x"] * middle, ""])
    gap = between if middle else ("\t" if tab else " ")
    path.write_bytes("\n\n".join("\n".join(w + gap + t for w, t in s) for s in sentences).encode())
    if any(w == "-DOCSTART-" for s in sentences for w, _ in s):
        return
    words, tags = read_conll(path)
    assert words == [[w for w, _ in s] for s in sentences]
    assert tags == [[t for _, t in s] for s in sentences]


def test_tagged_sentences(tmp_path: Path) -> None:
    path = _text(tmp_path / "a.conll", "-DOCSTART- O\n\nIn O\nNew B-LOC\r\nYork I-LOC\n\n\nyes O\n")
    raw = _all(path)
    assert raw.labels == ("B-LOC", "I-LOC", "O")
    assert raw.train.words == [["In", "New", "York"], ["yes"]] and raw.train.tags == [[2, 0, 1], [2]]
    assert list(raw.texts()) == ["In New York", "yes"]
    assert raw.describe() == (
        f"2 sentences to train on, 2 sentences held out (all of {path}). Tagging: each of 4 words has a tag. "
        "3 tags: B-LOC (1), I-LOC (1), O (2)."
    )


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a O\nb x B-X\n", r"columns in line 2: 3, in those before it: 2"),
        ("a x O\n\nb B-X\n", r"columns in line 3: 2, in those before it: 3"),
        ("a O\nb\n", r"columns in line 2: 1, in those before it: 2"),
        ("a\tO\n\t\tB-X\n", r"columns in line 2: 1, in those before it: 2"),
        ("a\nb\n", r"has words, but no tags: 'a'"),
        ("a\tx\tO\nb\t\tO\n\tx\tO\n", r"columns in line 3: 2"),
        ("-DOCSTART- O\n", "has no sentences"),
        ("a O\nb O\n", r"every word of .* has the tag 'O'"),
    ],
)
def test_conll_files_that_are_broken(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        _all(_text(tmp_path / "a.conll", content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [{"text": "a", "label": 1.5}, {"text": "b", "label": "high"}],
            {"task": "regression"},
            r"row 2 of column 'label' holds 'high', not a number",
        ),
        ([{"text": "a", "label": float("nan")}], {"task": "regression"}, r"holds nan, not a number"),
        ([{"text": "a", "label": True}], {"task": "regression"}, r"holds True, not a number"),
        ([{"text": "a", "label": 1.5}] * 2, {}, r"every sample of .* has the value 1\.5"),
        ([{"text": "a", "label": []}] * 2, {}, r"no row of .* has a label in column 'label'"),
        (
            [{"text": "a", "label": [0.5]}],
            {},
            r"row 1 of column 'label' holds \[0\.5\], not a list of labels",
        ),
        ([{"text": "a", "label": 3}], {"task": "multi_label"}, r"holds 3, not a list of labels"),
        ([{"text": "a", "label": ["x", ""]}], {}, r"not a list of labels"),
        ([{"tokens": ["a", "b"], "tags": ["O"]}], {}, r"row 1 has 2 words, but 1 tags"),
        ([{"tokens": "a b", "tags": ["O"]}], {}, r"row 1 of column 'tokens' is not a list of words"),
        ([{"tokens": [], "tags": []}], {}, r"row 1 of column 'tokens' is not a list of words"),
        ([{"tokens": ["a"], "tags": [None]}], {}, r"row 1 of column 'tags' is not a list of tags"),
        ([{"text": "a", "label": 1}], {"task": "tagging"}, r"no column 'tokens'.* with data\.tokens"),
        ([{"tokens": ["a"], "ner_tags": ["O"]}], {}, r"no column 'tags'.* with data\.tags"),
        ([{"text": "a", "text_pair": "b", "label": 1}], {"label": "lable"}, "no column 'lable'"),
        ([{"text": "a", "label": 1.0}], {}, "holds 1.0, not a class: .* set data.task to regression"),
        ([{"text": "a", "text_pair": None}], {}, r"row 1 has no value in column 'text_pair'"),
    ],
)
def test_rows_that_cannot_be_learnt(rows: list[dict], settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        _all(_jsonl(tmp_path / "a.jsonl", rows), **settings)
    assert "\n" not in str(error.value)


def test_held_out_data_know_no_other_labels(tmp_path: Path) -> None:
    path = _text(tmp_path / "a.conll", "a B-X\nb O\n")
    with pytest.raises(InputError, match="has the tag 'B-X', which the training data lack: B-Y, O"):
        read_held_out(path, DataConfig(), "bert", ("B-Y", "O"))
    path = _jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": ["x"]}, {"text": "b", "label": ["y"]}])
    with pytest.raises(InputError, match="has the label 'y', which the training data lack: x"):
        read_held_out(path, DataConfig(), "bert", ("x",))
    empty = _jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": []}])
    assert read_held_out(empty, DataConfig(), "bert", ("x",)).label_sets == [()]


def test_tasks_need_their_kind_of_file(tmp_path: Path) -> None:
    documents = _text(tmp_path / "a.txt", "one\n\ntwo\n")
    for task in ("classification", "tagging"):
        with pytest.raises(InputError, match=rf"data\.task {task} needs a table .*a\.txt is none"):
            _all(documents, task=task)
    assert _all(documents, task="contrastive").train.texts == ["one", "two"]
    with pytest.raises(InputError, match=r"data\.task regression needs a table"):
        _all(_text(tmp_path / "a.conll", "a O\nb X\n"), task="regression")
