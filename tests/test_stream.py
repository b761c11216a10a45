"""Corpora from file to file: in every format, interrupted and gone on with, broken, and on a full disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from test_cli import fail, qkv, small_disk, succeed
from test_pipelines import TEXTS, classifier, encoder, image, translator

from qkv import batching, output
from qkv.data.corpus import ImageFolder, TextCorpus
from qkv.data.files import read_table
from qkv.errors import InputError
from qkv.files import replace_file
from qkv.output import Output, npy_header
from qkv.pipelines import Encoder

__all__ = ["small_disk"]  # a fixture

CORPUS = [text[:30] for text in TEXTS] * 4


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Untrained models of each kind."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "embed": encoder(),
        "classify": encoder("classification", ("bad", "good")),
        "regression": encoder("regression", ("score",)),
        "tag": encoder("tagging", ("O", "B-X")),
        "translate": translator(),
        "images": classifier(),
    }
    for name, pipeline in made.items():
        pipeline.save_pretrained(folder / name)
    return {name: folder / name for name in made}


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    monkeypatch.setattr(batching, "BATCH_TOKENS", 40)
    monkeypatch.setattr(batching, "WINDOW_CHARACTERS", 300)


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows in the format that the path's suffix says."""
    columns = list(rows[0])
    match path.suffix:
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".txt":
            path.write_text("".join(row[columns[0]] + "\r\n" for row in rows), encoding="utf-8")
        case _:
            end = "\t" if path.suffix == ".tsv" else ","
            quote = str if path.suffix == ".tsv" else (lambda text: f'"{text}"')
            lines = [columns, *([row[c] for c in columns] for row in rows)]
            path.write_text(
                "".join(end.join(map(quote, line)) + "\n" for line in lines), encoding="utf-8-sig"
            )
    return path


# ---------------------------------------------------------------- every format, every command


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet", ".txt"])
def test_a_file_gives_the_vectors_of_its_texts(models, suffix, tmp_path):
    data = write(tmp_path / f"corpus{suffix}", [{"text": text, "other": "x"} for text in CORPUS])
    succeed("embed", models["embed"], "--data", data, "-o", tmp_path / "v.npy")
    found = np.load(tmp_path / "v.npy", mmap_mode="r")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, encoder().embed(CORPUS), atol=1e-5)
    assert sorted(tmp_path.iterdir()) == sorted([data, tmp_path / "v.npy"])
    lines = succeed("embed", models["embed"], "--data", data).splitlines()
    np.testing.assert_allclose([json.loads(line) for line in lines], found, atol=1e-6)


@pytest.mark.parametrize("command", ["classify", "regression", "tag", "translate"])
def test_a_file_gives_the_answers_that_the_command_gives_to_its_lines(models, command, tmp_path):
    name = {"regression": "classify"}.get(command, command)
    column = "source" if command == "translate" else "text"
    data = write(tmp_path / "corpus.csv", [{column: text} for text in CORPUS])
    options = ["--num-beams", 1] if command == "translate" else []
    out = tmp_path / ("out.txt" if command == "translate" else "out.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        printed = succeed(name, models[command], *options, text="".join(f"{text}\n" for text in CORPUS))
        assert succeed(name, models[command], *options, "--data", data) == printed
        succeed(name, models[command], *options, "--data", data, "-o", out)
    assert out.read_text(encoding="utf-8") == printed
    assert printed.count("\n") == len(CORPUS)


def test_words_of_a_conll_file_get_a_tag_each(models, tmp_path):
    """As they are there, in whatever columns stand beside them; a file may go on with no line at its end."""
    (tmp_path / "a.conll").write_text("-DOCSTART- O\n\nU.S.\tO\nfox's\tO\n\n\nquick\tB-X\r\nfox\tO")
    out = [
        json.loads(line)
        for line in succeed("tag", models["tag"], "--data", tmp_path / "a.conll").splitlines()
    ]
    assert [[word["word"] for word in line] for line in out] == [["U.S.", "fox's"], ["quick", "fox"]]
    (tmp_path / "words.conll").write_text("U.S.\nfox's\n\nquick\nfox\n")
    succeed("tag", models["tag"], "--data", tmp_path / "words.conll", "-o", tmp_path / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == out
    (tmp_path / "plain.conll").write_text("fox\n\nNew York\n")
    said = fail("tag", models["tag"], "--data", tmp_path / "plain.conll")
    assert "columns in line 3: 2, in those before it: 1" in said
    (tmp_path / "long.conll").write_text("fox\n\n" + "dog\n" * 200)
    assert "sentence 2 of" in fail("tag", models["tag"], "--data", tmp_path / "long.conll")
    said = fail("tag", models["tag"], "--data", tmp_path / "a.conll", "--column", "tokens")
    assert "--column names one of a table" in said


def test_columns_of_other_names_and_pairs(models, tmp_path):
    rows = [{"text": one, "text_pair": other, "b": one} for one, other in pairwise(CORPUS)]
    data = write(tmp_path / "pairs.jsonl", rows)
    wanted = encoder("classification", ("bad", "good")).classify([(r["text"], r["text_pair"]) for r in rows])

    def chances(*options: object) -> list[float]:
        lines = succeed("classify", models["classify"], "--data", data, *options).splitlines()
        return [json.loads(line)[0]["probability"] for line in lines]

    assert chances() == pytest.approx([guesses[0].probability for guesses in wanted], abs=1e-5)
    assert chances("--column", "text", "text_pair") == chances()
    alone = encoder("classification", ("bad", "good")).classify([row["b"] for row in rows])
    assert chances("--column", "b") == pytest.approx([g[0].probability for g in alone], abs=1e-5)
    paired = ["--pair", "fox", "--column", "b", "text"]
    assert "leave one out" in fail("classify", models["classify"], "--data", data, *paired)
    assert "leave one out" in fail("embed", models["embed"], "text", "--data", data)


def test_images_of_a_folder_a_list_and_a_table(models, tmp_path):
    for seed in range(6):
        path = tmp_path / "images" / str(seed % 2) / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image(seed).save(path)
    files = sorted((tmp_path / "images").rglob("*.png"))
    (tmp_path / "list.txt").write_text("".join(f"{file}\n" for file in files))
    rows = [{"image": {"bytes": file.read_bytes(), "path": None}} for file in files]
    write(tmp_path / "images.parquet", rows)
    write(tmp_path / "images.csv", [{"image": str(file)} for file in files])
    named = [{"image": {"bytes": None, "path": str(file)}} for file in files]
    write(tmp_path / "named.parquet", named)
    wanted = succeed("classify", models["images"], *files)
    assert wanted.count("\n") == len(files)
    for data in ("images", "list.txt", "images.parquet", "named.parquet", "images.csv"):
        assert succeed("classify", models["images"], "--data", tmp_path / data) == wanted
    succeed("classify", models["images"], "--data", tmp_path / "images", "-o", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == wanted
    files[3].write_bytes(b"not an image")
    assert str(files[3]) in fail("classify", models["images"], "--data", tmp_path / "images")
    image(0).convert("I;16").save(files[3])
    said = fail("classify", models["images"], "--data", tmp_path / "images")
    assert str(files[3]) in said and "more than 8 bits a channel" in said
    assert "neither an image" in fail(
        "classify", models["images"], "--data", write(tmp_path / "a.jsonl", [{"image": 3}])
    )


def test_a_broken_image_in_a_table_is_named_by_its_row(models, tmp_path):
    image(0).save(tmp_path / "a.png")
    good = {"image": {"bytes": (tmp_path / "a.png").read_bytes()}}
    data = write(tmp_path / "a.parquet", [good] * 5 + [{"image": {"bytes": b"no image"}}])
    said = fail("classify", models["images"], "--data", data)
    assert (
        said == f"qkv: row 6 of {data} cannot be used: an image of 8 bytes is not an image that can be read"
    )


def test_standard_input_to_a_file(models, tmp_path):
    succeed("embed", models["embed"], "-o", tmp_path / "v.npy", text="".join(f"{t}\n" for t in CORPUS))
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), encoder().embed(CORPUS), atol=1e-5)


# ---------------------------------------------------------------- rubbish


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n["b"]\n', "line 3 is not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 3}\n', "row 2 of .*a.jsonl holds 3, not text"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "row 2 has no value in column 'text'"),
        ("a.jsonl", b'{"txt": "a"}\n', "has no column 'text'; it has txt: name the right one with --column"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "row 2 .* half a surrogate pair"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", "line 2 is not JSON"),
        ("a.csv", b"text,x\na,b\nc\n", "is not a table: line 3: 1 columns, not 2"),
        ("a.csv", b"text,text\na,b\n", "has 2 columns 'text'; rename all but one"),
        ("a.txt", b"a\nb\n\xff\n", "is not UTF-8: byte 0xff in line 3"),
        ("a.parquet", b"PAR1 nothing else", "is not a Parquet file that can be read"),
        (
            "a.txt",
            b"fox\n" * 20 + b"dog " * 60 + b"\n",
            "row 21 of .*a.txt has 62 tokens; the limit is 40: .*--truncate",
        ),
    ],
)
def test_what_cannot_be_read_is_named(models, name, content, complaint, tmp_path):
    (tmp_path / name).write_bytes(content)
    said = fail("embed", models["embed"], "--data", tmp_path / name, "-o", tmp_path / "v.npy")
    assert re.search(complaint, said), said
    assert not (tmp_path / "v.npy").exists()


def test_mistakes_about_files_are_one_line(models, tmp_path):
    data = write(tmp_path / "a.txt", [{"text": "fox"}])
    assert "cannot read" in fail("embed", models["embed"], "--data", tmp_path / "no.txt")
    assert "cannot read" in fail("embed", models["embed"], "--data", tmp_path)
    assert "writes .npy files" in fail("embed", models["embed"], "--data", data, "-o", tmp_path / "a.txt")
    same = ["--data", data, "-o", data]
    assert "is the input itself" in fail("translate", models["translate"], *same)
    for given in (["a text"], ["--data", data]):
        said = fail("translate", models["translate"], *given, "--column", "text")
        assert "--column names one of a table: give that (.csv, .tsv, .jsonl, .parquet) with --data" in said
    (tmp_path / "v.npy").mkdir()
    assert "v.npy is a folder" in fail("embed", models["embed"], "--data", data, "-o", tmp_path / "v.npy")
    assert not [*tmp_path.glob("*.part")]
    later = write(tmp_path / "later.jsonl", [{"text": "a"}, {"text": "b", "text_pair": "c"}])
    said = fail("classify", models["classify"], "--data", later)
    assert re.search("row 2 of .*later.jsonl has a column 'text_pair', which the first row has not", said)
    assert "or pairs in two" in fail("classify", models["classify"], "--data", later, "--column", *"abc")
    assert "are in one column" in fail("classify", models["images"], "--data", later, "--column", *"ab")
    (tmp_path / "photos").mkdir()
    image(0).save(tmp_path / "photos" / "a.png")
    inside = ["--data", tmp_path / "photos", "-o", tmp_path / "photos" / "out.jsonl"]
    assert "is in the folder that is read" in fail("classify", models["images"], *inside)
    assert data.read_text() == "fox\n"
    (tmp_path / "long.txt").write_text("fox\n" + "dog " * 60 + "\n")
    with pytest.warns(UserWarning, match="1 of 2 texts were longer"):
        succeed("embed", models["embed"], "--data", tmp_path / "long.txt", "--truncate")


# ---------------------------------------------------------------- interrupted


def interrupt(monkeypatch, after: int, what: BaseException) -> None:
    """End the work in a later batch."""
    usual, count = Encoder._vectors, 0

    def vectors(self, encodings):
        nonlocal count
        count += 1
        if count > after:
            raise what
        return usual(self, encodings)

    monkeypatch.setattr(Encoder, "_vectors", vectors)


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write(tmp_path / "corpus.jsonl", [{"text": text} for text in CORPUS])


def test_an_interrupted_command_goes_on_where_it_stopped(models, corpus, tmp_path, monkeypatch):
    command = ["embed", models["embed"], "--data", corpus, "-o", tmp_path / "v.npy"]
    with monkeypatch.context() as patch:
        interrupt(patch, 3, KeyboardInterrupt())
        code, _, said = qkv(*command)
    kept = json.loads((tmp_path / "v.npy.part.json").read_text())["rows"]
    assert code == 130 and not (tmp_path / "v.npy").exists()
    assert 0 < kept < len(CORPUS)
    assert f"{kept} answers are kept in {tmp_path / 'v.npy.part'}" in said
    asked = []
    usual = Encoder._vectors
    monkeypatch.setattr(Encoder, "_vectors", lambda self, e: asked.extend(e) or usual(self, e))
    _, _, said = qkv(*command)
    assert f"Going on behind {kept} answers" in said
    assert len(asked) == len(CORPUS) - kept
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), encoder().embed(CORPUS), atol=1e-5)
    assert sorted(tmp_path.iterdir()) == sorted([corpus, tmp_path / "v.npy"])


def test_a_command_that_failed_before_its_first_answer_is_in_nobodys_way(models, corpus, tmp_path):
    out = tmp_path / "v.npy"
    command = ["embed", models["embed"], "--data", corpus, "-o", out]
    assert "has no column 'body'" in fail(*command, "--column", "body")
    succeed(*command)
    assert np.load(out).shape == (len(CORPUS), 32)


def test_what_is_kept_belongs_to_one_input_and_one_model(models, corpus, tmp_path, monkeypatch):
    out = tmp_path / "v.npy"
    with monkeypatch.context() as patch:
        interrupt(patch, 3, KeyboardInterrupt())
        qkv("embed", models["embed"], "--data", corpus, "-o", out)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = write(tmp_path / "other.jsonl", [{"text": text} for text in CORPUS])
    changed = encoder()
    with torch.no_grad():
        changed.model.tokens.weight[0, 0] += 1
    changed.save_pretrained(tmp_path / "changed")
    for arguments in (
        [models["tag"], "--data", corpus],
        [tmp_path / "changed", "--data", corpus],
        [models["embed"], "--data", corpus, "--precision", "bf16"],
        [models["embed"], "--data", other],
    ):
        assert "was made of another input" in fail("embed", *arguments, "-o", out)
    assert "was made of another input" in fail("embed", models["embed"], "fox", "-o", out)
    assert before == {path: path.read_bytes() for path in before}
    (tmp_path / "v.npy.part").unlink()
    succeed("embed", models["embed"], "fox", "-o", out)
    assert np.load(out).shape == (1, 32)


def test_a_kill_loses_only_what_was_not_yet_noted(models, corpus, tmp_path):
    program = (
        "import os, signal, sys; from qkv import batching, cli, output; from qkv.pipelines import Encoder\n"
        "batching.BATCH_TOKENS, batching.WINDOW_CHARACTERS, output.SAVE_SECONDS = 40, 300, 0\n"
        "usual, left = Encoder._vectors, [4]\n"
        "def vectors(self, encodings):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return usual(self, encodings)\n"
        "Encoder._vectors = vectors\n"
        "cli.main()"
    )
    command = ["embed", models["embed"], "--data", corpus, "-o", tmp_path / "v.npy"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == -signal.SIGKILL
    kept = json.loads((tmp_path / "v.npy.part.json").read_text())
    assert 0 < kept["rows"] < len(CORPUS)
    with (tmp_path / "v.npy.part").open("ab") as file:
        file.write(b"half a row")
    succeed(*command)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), encoder().embed(CORPUS), atol=1e-5)


def test_without_a_file_to_read_again_nothing_is_left(models, tmp_path, monkeypatch):
    interrupt(monkeypatch, 2, KeyboardInterrupt())
    lines = "".join(f"{text}\n" for text in CORPUS)
    code, _, _ = qkv("embed", models["embed"], "-o", tmp_path / "v.npy", text=lines)
    assert code == 130 and list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_it_took_and_the_work_goes_on_with_room(models, small_disk, tmp_path):
    data = write(tmp_path / "corpus.txt", [{"text": text} for text in CORPUS * 30])
    filler = small_disk / "filler"
    command = ["embed", models["embed"], "--data", data, "-o", small_disk / "v.npy"]
    filler.write_bytes(bytes(260_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "SAVE_SECONDS", 0)
        assert "cannot write" in (said := fail(*command)) and "the disk is full" in said
    kept = json.loads((small_disk / "v.npy.part.json").read_text())["rows"]
    assert 0 < kept < 30 * len(CORPUS)
    filler.unlink()
    _, _, said = qkv(*command)
    assert f"Going on behind {kept} answers" in said
    np.testing.assert_allclose(np.load(small_disk / "v.npy"), encoder().embed(CORPUS * 30), atol=1e-5)


def test_an_interrupt_within_a_write_leaves_no_half_row(tmp_path):
    class Torn:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, row):
            self.file.write(row)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Output(tmp_path / "out", made_from="x") as out:
        out.write(b"one\n")
        out.file = Torn(out.file)
        out.write(b"two\n")
    with Output(tmp_path / "out", made_from="x") as out:
        assert out.done == 1
        out.write(b"two\n")
    assert (tmp_path / "out").read_bytes() == b"one\ntwo\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_only_one_process_writes_a_file(tmp_path):
    with Output(tmp_path / "out.txt") as first:
        first.write(b"a\n")
        with pytest.raises(ValueError, match=r"another process is writing .*out\.txt\.part"):
            Output(tmp_path / "out.txt").__enter__()
    assert (tmp_path / "out.txt").read_bytes() == b"a\n"


def test_a_part_that_became_shorter_is_no_part(tmp_path):
    with pytest.raises(KeyboardInterrupt), Output(tmp_path / "out", made_from="x") as out:
        out.write(b"row\n")
        raise KeyboardInterrupt
    (tmp_path / "out.part").write_bytes(b"r")
    with pytest.raises(ValueError, match="has become shorter: delete it"):
        Output(tmp_path / "out", made_from="x").__enter__()
    replace_file(tmp_path / "out.part.json", lambda path: path.write_text("{"))
    with pytest.raises(ValueError, match="not valid JSON"):
        Output(tmp_path / "out", made_from="x").__enter__()


def test_npy_headers_of_any_number_of_rows_are_as_long():
    assert len({len(npy_header(rows, 384)) for rows in (0, 1, 10**6, 10**12)}) == 1


def test_a_part_of_someone_else_stays(tmp_path):
    (tmp_path / "out.txt.part").write_text("theirs")
    with pytest.raises(ValueError, match=r"out\.txt\.part is in the way"):
        Output(tmp_path / "out.txt").__enter__()
    assert (tmp_path / "out.txt.part").read_text() == "theirs"


def test_what_a_killed_process_left_of_work_that_cannot_go_on_is_begun_anew(tmp_path):
    killed = Output(tmp_path / "out.txt")
    killed.__enter__().write(b"half")
    killed.file.flush()
    killed._open.close()
    with Output(tmp_path / "out.txt") as out:
        out.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]
    assert (tmp_path / "out.txt").read_bytes() == b"whole"


def test_other_images_of_the_same_names_are_another_input(tmp_path):
    image(0).save(tmp_path / "a.png")
    before = ImageFolder(tmp_path).identity()
    assert ImageFolder(tmp_path).identity() == before
    image(1).resize((9, 9)).save(tmp_path / "a.png")
    assert ImageFolder(tmp_path).identity() != before


def test_a_pipe_cannot_be_read_again(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert TextCorpus(tmp_path / "pipe", []).identity() is None


@pytest.mark.parametrize("name", ["pipe.csv", "pipe.tsv", "pipe.jsonl", "pipe"])
def test_a_pipe_is_read_whatever_it_is_called(tmp_path, name):
    """Nobody knows how long its values will be."""
    os.mkfifo(tmp_path / name)
    rows = [json.dumps({"text": text}) if "jsonl" in name else text for text in ("one text", "two")]
    lines = rows if name in ("pipe", "pipe.jsonl") else ["text", *rows]
    writer = subprocess.Popen(["sh", "-c", 'printf "%s\\n" "$@" > "$0"', tmp_path / name, *lines])
    corpus = TextCorpus(tmp_path / name, ["text"])
    assert corpus.total is None
    assert list(corpus) == [("one text",), ("two",)]
    assert writer.wait() == 0


def test_an_empty_text_of_a_lone_column_is_a_row(tmp_path):
    """A .tsv file has no quotes to show that something is there."""
    (tmp_path / "a.tsv").write_text("text\none\n\ntwo\n")
    assert list(TextCorpus(tmp_path / "a.tsv", ["text"])) == [("one",), ("",), ("two",)]
    (tmp_path / "a.csv").write_text('text\none\n\n""\ntwo\n')
    assert list(TextCorpus(tmp_path / "a.csv", ["text"])) == [("one",), ("",), ("two",)]


def test_strings_of_a_table_that_are_not_utf8_are_named(tmp_path):
    values = pyarrow.array([b"good", b"\xff\xfe"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet is not a Parquet file that can be read: 'utf-8'"):
        list(TextCorpus(tmp_path / "a.parquet", ["text"]))
    with pytest.raises(InputError, match=r"a\.parquet is not a Parquet file that can be read: 'utf-8'"):
        read_table(tmp_path / "a.parquet", ["text"])
