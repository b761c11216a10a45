from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import qkv.data.files
import qkv.data.raw
from qkv.config import (
    BertConfig,
    DataConfig,
    Family,
    GPTConfig,
    RunConfig,
    TokenizerConfig,
    TransformerConfig,
    ViTConfig,
)
from qkv.data import Raw, prepare, read, read_held_out
from qkv.data.batches import ImageBatch, LabelledBatch, LanguageBatch, MaskedBatch, PairBatch
from qkv.data.summary import summarize
from qkv.errors import InputError
from qkv.images import ImageProcessor
from qkv.tokenizers import Tokenizer, train_tokenizer


def _write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def _png(size: tuple[int, int] = (8, 8), mode: str = "L", shade: int = 100) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, shade if mode == "L" else (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def _digits(folder: Path, count: int = 10) -> str:
    """Grey 8x8 images of the classes 0, 2 and 10."""
    for label in ("0", "2", "10"):
        for i in range(count):
            _write(folder / label / f"{i}.png", _png(shade=int(label) + i))
    return str(folder)


def _tokenizer(raw: Raw, family: Family) -> Tokenizer:
    kind = "wordpiece" if family == "bert" else "bpe"
    return train_tokenizer(TokenizerConfig(kind=kind, vocab_size=400), family, raw.texts())  # type: ignore[arg-type]


# ---------------------------------------------------------------- running text


def test_one_text_is_cut_at_the_share_of_its_characters(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(1001))
    raw = read(DataConfig(path=_write(tmp_path / "a.txt", text)), "gpt")
    assert raw.kind == "text" and raw.labels == ()
    assert raw.train.texts == [text[:900]] and raw.valid.texts == [text[900:]]
    assert "".join(raw.texts()) == text[:900]
    assert (
        raw.describe()
        == "900 characters in 1 document to train on, 101 characters in 1 document held out (the last 10 %)."
    )


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), fraction=st.floats(0.05, 0.95))
def test_cutting_loses_nothing(
    lengths: list[int], fraction: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    for i, length in enumerate(lengths):
        _write(folder / "deep" / f"{i}.txt", chr(97 + i) * length)
    data = DataConfig(path=str(folder), valid_fraction=fraction)
    if int(sum(lengths) * (1 - fraction)) == 0:
        with pytest.raises(InputError, match="too little text"):
            read(data, "gpt")
        return
    raw = read(data, "gpt")
    joined = "".join(raw.train.texts + raw.valid.texts)
    assert joined == "".join(chr(97 + i) * length for i, length in enumerate(lengths))
    assert sum(map(len, raw.train.texts)) == int(sum(lengths) * (1 - fraction))


def test_documents_for_bert_are_separated_by_blank_lines(tmp_path: Path) -> None:
    text = "\n\none a\none b\r\n \t\r\n\r\ntwo a\n\n\nthree\nthree b\n\nfour\nfour\n\nfive\nfive"
    raw = read(DataConfig(path=_write(tmp_path / "a.txt", text), valid_fraction=0.3), "bert")
    assert raw.train.texts == ["one a\none b", "two a", "three\nthree b"]
    assert raw.valid.texts == ["four\nfour", "five\nfive"]
    data = DataConfig(path=str(tmp_path / "a.txt"), valid=_write(tmp_path / "b.txt", "x\ny\n\nz"))
    raw = read(data, "bert")
    assert len(raw.train) == 5 and raw.valid.texts == ["x\ny", "z"]
    assert raw.describe().endswith(f"held out (all of {tmp_path / 'b.txt'}).")


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "notes.md", ".cache/d.txt", "sub/.git/e.txt", ".f.txt"):
        _write(tmp_path / name, f"{name} " * 10)
    raw = read(DataConfig(path=str(tmp_path), valid_fraction=0.01), "gpt")
    assert [text[:5] for text in raw.train.texts] == ["a.txt", "b.txt", "sub/c"]


def test_a_table_of_texts_for_gpt(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", "".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(10)))
    raw = read(DataConfig(path=path, text="body"), "gpt")
    assert raw.train.texts + raw.valid.texts == [f"text {i}" for i in range(10)]


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_too_little_text_is_refused(tmp_path: Path, family: Family) -> None:
    with pytest.raises(InputError, match="too little text to hold out 10 %"):
        read(DataConfig(path=_write(tmp_path / "a.txt", "x")), family)


@pytest.mark.parametrize("fraction", [0.07, 0.5])
def test_files_too_large_for_memory_train_as_if_they_were_not(
    fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "a.txt", "\ufeffé one\ntwo €\n\n" * 9)
    _write(tmp_path / "b.txt", "three 🙂 four\r\n" * 20)
    data = DataConfig(path=str(tmp_path), valid_fraction=fraction)
    small = read(data, "gpt")
    monkeypatch.setattr(qkv.data.raw, "IN_MEMORY_BYTES", 10)
    monkeypatch.setattr(qkv.data.files, "_PART_BYTES", 7)
    large = read(data, "gpt")
    assert not large.train.texts and large.train.files and large.describe() == small.describe()
    for some, others in ((small.train, large.train), (small.valid, large.valid)):
        assert some.texts == ["".join(file.parts()) for file in others.files]
        assert len(some) == len(others)
    assert "".join(large.texts()) == "".join(small.texts())
    tokenizer = _tokenizer(small, "gpt")
    assert _tokenizer(large, "gpt").definition == tokenizer.definition
    config = RunConfig(model=GPTConfig(vocab_size=tokenizer.vocab_size, context=8))
    for one, two in zip(
        prepare(small, config, tokenizer, None), prepare(large, config, tokenizer, None), strict=True
    ):
        assert one.fingerprint == two.fingerprint and one.size_in_bytes == two.size_in_bytes
        indices = range(len(one))
        assert one.batch(indices, 1).ids.values.tolist() == two.batch(indices, 1).ids.values.tolist()  # type: ignore[attr-defined]
    summary = summarize(large, *prepare(large, config, tokenizer, None))
    assert (summary.leaked, summary.train.repeated) == (None, None)


def test_large_files_that_are_no_text_are_refused_as_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {
        "empty.txt": b" \n" * 40,
        "latin.txt": b"good\ngood\nb\xe4d\n" * 9,
        "cut.txt": b"good\n" * 9 + b"\xe2\x82",
    }
    for name, content in broken.items():
        path = tmp_path / name
        path.write_bytes(content)
        said = []
        for limit, part in ((1000, 1), (10, 4), (10, 7)):
            monkeypatch.setattr(qkv.data.raw, "IN_MEMORY_BYTES", limit)
            monkeypatch.setattr(qkv.data.files, "_PART_BYTES", part)
            with pytest.raises(InputError) as error:
                read(DataConfig(path=str(path)), "gpt")
            said.append(str(error.value))
        assert len(set(said)) == 1 and str(path) in said[0]


# ---------------------------------------------------------------- labelled texts


def _sentiment(path: Path, count: int = 30, labels: tuple[str, ...] = ("good", "bad")) -> str:
    rows = [f'"film {i}, {labels[i % len(labels)]}",{labels[i % len(labels)]}' for i in range(count)]
    return _write(path, "\n".join(["text,label", *rows]))


def test_labelled_texts_are_split_at_random_the_same_way_every_time(tmp_path: Path) -> None:
    data = DataConfig(path=_sentiment(tmp_path / "a.csv"), valid_fraction=0.2)
    raw = read(data, "bert")
    assert raw == read(data, "bert")
    assert raw.kind == "classification" and raw.labels == ("bad", "good")
    assert len(raw.train) == 24 and len(raw.valid) == 6
    rows = raw.train.texts + raw.valid.texts
    assert len(set(rows)) == 30 and raw.valid.texts != [f"film {i}" for i in range(24, 30)]
    for samples in (raw.train, raw.valid):
        assert samples.pairs == []
        for text, label in zip(samples.texts, samples.labels, strict=True):
            assert text.endswith(raw.labels[label])
    assert "24 labelled texts to train on, 6 labelled texts held out (a random 20 %)" in raw.describe()
    assert (
        f"2 labels: bad ({raw.train.labels.count(0)}), good ({raw.train.labels.count(1)})." in raw.describe()
    )


def test_pairs_of_texts_and_numbers_as_labels(tmp_path: Path) -> None:
    rows = [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": (2, 10, 1)[i % 3]} for i in range(12)]
    path = _write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    raw = read(DataConfig(path=path, text="premise", text_pair="hypothesis"), "bert")
    assert raw.labels == ("1", "2", "10")
    for text, pair, label in zip(raw.train.texts, raw.train.pairs, raw.train.labels, strict=True):
        i = int(text[1:])
        assert pair == f"h{i}" and raw.labels[label] == str((2, 10, 1)[i % 3])
    assert set(raw.texts()) == {*raw.train.texts, *raw.train.pairs}
    assert "Each has a second text." in raw.describe()


def test_parquet_names_its_classes(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos", "unused"])})
    data = Dataset.from_dict({"text": list("abcdef"), "label": [1, 0] * 3}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    raw = read(DataConfig(path=str(tmp_path / "a.parquet"), valid=str(tmp_path / "a.parquet")), "bert")
    assert raw.labels == ("neg", "pos", "unused")
    assert raw.train.labels == raw.valid.labels == [1, 0] * 3
    strange = Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    strange.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(InputError, match="numbers outside its 3 class names"):
        read_held_out(str(tmp_path / "b.parquet"), DataConfig(), "bert", raw.labels)


def test_held_out_samples_get_the_training_labels(tmp_path: Path) -> None:
    held_out = _write(tmp_path / "b.csv", "text,label\nfine,good\n")
    samples = read_held_out(held_out, DataConfig(), "bert", ("bad", "good"))
    assert samples.labels == [1]
    with pytest.raises(InputError, match=r"has the label 'good', which the training data lack: 0, 1"):
        read_held_out(held_out, DataConfig(), "bert", ("0", "1"))


def test_labelled_texts_that_cannot_train_are_refused(tmp_path: Path) -> None:
    train = _sentiment(tmp_path / "a.csv")
    valid = _sentiment(tmp_path / "b.csv", labels=("good", "bad", "mixed"))
    with pytest.raises(InputError, match="has the label 'mixed', which the training data lack: bad, good"):
        read(DataConfig(path=train, valid=valid), "bert")
    with pytest.raises(InputError, match=r"every sample of .* has the label 'good'"):
        read(DataConfig(path=_sentiment(tmp_path / "c.csv", labels=("good",))), "bert")
    with pytest.raises(InputError, match=r"no column 'label'; it has text: .* data\.label"):
        read(DataConfig(path=_write(tmp_path / "d.csv", "text\na\nb\n")), "bert")
    pairs = _write(tmp_path / "pairs.csv", "text,text_pair,label\na,b,good\nc,d,bad\n")
    for one, other in ((pairs, train), (train, pairs)):
        with pytest.raises(InputError, match=r"pairs\.csv has second texts, but .*a\.csv has none"):
            read(DataConfig(path=one, valid=other), "bert")
    half = _write(tmp_path / "half.jsonl", '{"text": "a", "label": 1}\n{"text": "\\ud83d", "label": 0}')
    with pytest.raises(InputError, match=r"row 2 of column 'text' has half a surrogate pair"):
        read(DataConfig(path=half), "bert")
    with pytest.raises(InputError, match=r"no column 'other'.* data\.text_pair"):
        read(DataConfig(path=train, text_pair="other"), "bert")
    with pytest.raises(InputError, match=r"row 2 of column 'label' holds 0\.5, not a class"):
        read(
            DataConfig(
                path=_write(tmp_path / "e.jsonl", '{"text": "a", "label": 1}\n{"text": "a", "label": 0.5}'),
                task="classification",
            ),
            "bert",
        )
    with pytest.raises(InputError, match=r"row 1 of column 'label' holds '', not a class"):
        read(DataConfig(path=_write(tmp_path / "f.csv", "text,label\na,\nb,1\n")), "bert")
    with pytest.raises(InputError, match=r"data.task classification needs a table .*g.txt is none"):
        read(DataConfig(path=train, valid=_write(tmp_path / "g.txt", "a\nb\n\nc\nd")), "bert")
    with pytest.raises(InputError, match="has 1 sample"):
        read(DataConfig(path=_write(tmp_path / "h.csv", "source,target\na,b\n")), "transformer")


# ---------------------------------------------------------------- sentence pairs


def test_aligned_files(tmp_path: Path) -> None:
    english = _write(tmp_path / "a.en", "".join(f"{i} dogs\N{LINE SEPARATOR}\n" for i in range(20)))
    german = _write(tmp_path / "a.de", "\r\n".join(f"{i} Hunde" for i in range(20)))
    data = DataConfig(path=f"{english},{german}", valid=f"{english}, {german}")
    raw = read(data, "transformer")
    assert raw.kind == "pairs" and raw.labels == ()
    assert raw.train == raw.valid
    assert raw.train.texts[3] == "3 dogs\N{LINE SEPARATOR}" and raw.train.pairs[3] == "3 Hunde"
    split = read(DataConfig(path=f"{english},{german}"), "transformer")
    assert (len(split.train), len(split.valid)) == (18, 2)
    pairs = zip(split.train.texts + split.valid.texts, split.train.pairs + split.valid.pairs, strict=True)
    assert all(source.split()[0] == target.split()[0] for source, target in pairs)


def test_tables_of_pairs(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tsv", "en\tde\n" + "".join(f"{i} dogs\t{i} Hunde\n" for i in range(10)))
    raw = read(DataConfig(path=path, source="en", target="de"), "transformer")
    assert sorted(raw.train.pairs + raw.valid.pairs) == [f"{i} Hunde" for i in range(10)]
    assert len(list(raw.texts())) == 18


def test_pairs_that_cannot_train_are_refused(tmp_path: Path) -> None:
    english, german = _write(tmp_path / "a.en", "one\ntwo\n"), _write(tmp_path / "a.de", "eins\n")
    with pytest.raises(InputError, match=r"a\.en has 2 lines, but .*a\.de 1"):
        read(DataConfig(path=f"{english},{german}"), "transformer")
    with pytest.raises(InputError, match="neither two aligned files"):
        read(DataConfig(path=english), "transformer")
    with pytest.raises(InputError, match="no such file or folder"):
        read(DataConfig(path=f"{english},{tmp_path / 'gone.de'}"), "transformer")
    with pytest.raises(InputError, match="no column 'target'; it has source"):
        read(DataConfig(path=_write(tmp_path / "a.csv", "source\na\n")), "transformer")


# ---------------------------------------------------------------- images


def test_a_folder_of_grey_digits(tmp_path: Path) -> None:
    path = Path(_digits(tmp_path))
    _write(path / ".cache" / "huggingface" / "a.json", "{}")
    _write(path / ".ipynb_checkpoints" / "0.png", _png())
    raw = read(DataConfig(path=str(path)), "vit")
    assert raw.kind == "images" and raw.labels == ("0", "2", "10")
    assert (raw.image_size, raw.channels) == (8, 1)
    assert (len(raw.train), len(raw.valid)) == (27, 3)
    for image, label in zip(raw.train.images, raw.train.labels, strict=True):
        assert Path(image.name).parent.name == raw.labels[label]
    assert "Most are grey, their shorter side 8 pixels." in raw.describe()


def test_the_most_common_size_and_colours_of_images(tmp_path: Path) -> None:
    for i in range(5):
        _write(tmp_path / "cat" / f"{i}.png", _png((40, 30), "RGB"))
    _write(tmp_path / "dog" / "1.png", _png((8, 8)))
    _write(tmp_path / "dog" / ".hidden", "not an image")
    raw = read(DataConfig(path=str(tmp_path), valid=str(tmp_path)), "vit")
    assert (raw.image_size, raw.channels) == (30, 3)


def test_parquet_of_images_as_hugging_face_writes_it(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": _png((16, 16), "RGB", shade), "path": None} for shade in range(10)]
    Dataset.from_dict({"img": images, "label": [0, 1] * 5}, features=features).to_parquet(
        tmp_path / "a.parquet"
    )
    raw = read(DataConfig(path=str(tmp_path / "a.parquet"), image="img"), "vit")
    assert raw.labels == ("cat", "dog") and (raw.image_size, raw.channels) == (16, 3)
    processor = ImageProcessor(16, (0.0,) * 3, (1.0,) * 3)
    shades = {int(image.pixels(processor)[0, 0, 0]) for image in raw.train.images + raw.valid.images}
    assert shades == set(range(10))


def test_images_that_cannot_train_are_refused(tmp_path: Path) -> None:
    digits = _digits(tmp_path / "digits")
    with pytest.raises(InputError, match="must hold one folder a class"):
        read(DataConfig(path=str(tmp_path / "digits" / "0")), "vit")
    with pytest.raises(InputError, match="must hold one folder a class"):
        read(DataConfig(path=str(tmp_path)), "vit")
    with pytest.raises(InputError, match="neither a folder of images"):
        read(DataConfig(path=_write(tmp_path / "a.csv", "image,label\n")), "vit")
    with pytest.raises(InputError, match="has the label '7', which the training data lack: 0, 2, 10"):
        _write(tmp_path / "more" / "7" / "1.png", _png())
        read(DataConfig(path=digits, valid=str(tmp_path / "more")), "vit")
    broken = _write(tmp_path / "digits" / "0" / "broken.png", _png()[:20])
    with pytest.raises(InputError, match=r"broken\.png is broken") as caught:
        _ = read(DataConfig(path=digits, valid=digits), "vit").image_size
    assert broken in str(caught.value)
    from datasets import Dataset

    Dataset.from_dict({"image": ["a.png"], "label": [0]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(InputError, match="row 1 of column 'image' holds no image file's bytes"):
        read(DataConfig(path=str(tmp_path / "b.parquet")), "vit")


# ---------------------------------------------------------------- everything


def test_missing_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.path"):
        read(DataConfig(), "gpt")
    families: tuple[Family, ...] = ("gpt", "bert", "vit")
    for family in families:
        with pytest.raises(InputError, match=r"no such file or folder: .*gone"):
            read(DataConfig(path=str(tmp_path / "gone")), family)
    _write(tmp_path / "upper" / "A.TXT", "one")
    _write(tmp_path / "upper" / "b.txt", "two")
    assert len(qkv.data.raw._text_files(tmp_path / "upper")) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.txt files"):
        read(DataConfig(path=str(tmp_path / "empty")), "gpt")


def test_every_family_gets_its_batches(tmp_path: Path) -> None:
    song = _write(tmp_path / "a.txt", "\n\n".join(f"verse {i}\nline {i}\nend" for i in range(40)))
    lines = _write(tmp_path / "b.txt", "\n".join(f"line {i}" for i in range(40)))
    films, digits = _sentiment(tmp_path / "a.csv"), _digits(tmp_path / "digits")
    small = {"dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8}
    vit = ViTConfig(**small, image_size=8, patch_size=2, channels=1, labels=("0", "2", "10"))  # type: ignore[arg-type]
    bert = BertConfig(**small, context=32)  # type: ignore[arg-type]
    classes = BertConfig(**small, context=32, head="classification", labels=("bad", "good"))  # type: ignore[arg-type]
    cases = [
        (song, GPTConfig(**small, context=16), LanguageBatch),  # type: ignore[arg-type]
        (song, bert, MaskedBatch),
        (films, classes, LabelledBatch),
        (f"{lines},{lines}", TransformerConfig(**small, context=32), PairBatch),  # type: ignore[arg-type]
        (digits, vit, ImageBatch),
    ]
    for path, model, batch_type in cases:
        data = DataConfig(path=path)
        raw = read(data, model.family)
        tokenizer = None if model.family == "vit" else _tokenizer(raw, model.family)
        images = ImageProcessor(8, (0.5,), (0.5,)) if model.family == "vit" else None
        for dataset in prepare(raw, RunConfig(model=model, data=data), tokenizer, images):
            assert isinstance(dataset.batch(range(len(dataset)), 0).to("cpu"), batch_type)
            assert len(dataset) > 0
            assert (dataset.size_in_bytes > 0) == (model.family == "gpt")


def test_a_checkpoint_that_cannot_read_the_data_is_refused(tmp_path: Path) -> None:
    song, digits = _write(tmp_path / "a.txt", "la " * 99), _digits(tmp_path / "digits")
    gpt = RunConfig(model=GPTConfig(), data=DataConfig(path=song))
    with pytest.raises(InputError, match="has no tokenizer"):
        prepare(read(gpt.data, "gpt"), gpt, None, None)
    vit = RunConfig(model=ViTConfig(labels=("0", "2", "10")), data=DataConfig(path=digits))
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json"):
        prepare(read(vit.data, "vit"), vit, None, None)


def test_labels_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    data = DataConfig(path=_sentiment(tmp_path / "a.csv"))
    raw = read(data, "bert")
    config = RunConfig(model=BertConfig(head="classification", labels=("good", "bad")), data=data)
    with pytest.raises(InputError, match="the data have the labels bad, good, but the model good, bad"):
        prepare(raw, config, _tokenizer(raw, "bert"), None)
