"""Tokenizers: what they promise for any text, and transformers' own as the independent judge."""

import json
import random
import warnings
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, MarianTokenizer, OpenAIGPTTokenizer

from qkv.config import Family, TokenizerConfig
from qkv.errors import InputError
from qkv.tokenizers import Pieces, Tokenizer, train_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "It wasn't the dog's fault: foxes jump, and dogs don't.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "Voix ambiguë d'un cœur qui au zéphyr préfère les jattes de kiwis.",
] * 4
TEXTS = [*CORPUS[:5], "", " ", "a  b \t\n", "café 日本語 👩‍👩‍👧 \u200d", "unseen Ж words"]
FAMILIES: list[Family] = ["gpt", "bert", "transformer"]


def trained(kind: str, family: Family, lowercase: bool = False, size: int = 400) -> Tokenizer:
    config = TokenizerConfig(kind=kind, vocab_size=size, lowercase=lowercase)  # type: ignore[arg-type]
    return train_tokenizer(config, family, CORPUS)


BYTES = {family: trained("bpe", family) for family in FAMILIES}
ALL = {(kind, family): trained(kind, family) for kind in ("char", "bpe", "wordpiece") for family in FAMILIES}


def streamed(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The pieces of the ids' text as they arrive."""
    pieces = Pieces(tokenizer)
    yield from filter(None, map(pieces.push, ids))
    yield pieces.rest()


# ---------------------------------------------------------------- for any text


@given(st.text())
def test_bytes_come_back_for_any_text(text: str) -> None:
    for tokenizer in BYTES.values():
        assert tokenizer.decode(tokenizer.plain(text)) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_plain_text_are_text(family: Family) -> None:
    tokenizer = BYTES[family]
    text = "a <|endoftext|> b </s> [MASK] <pad>[CLS]"
    ids = tokenizer.plain(text)
    assert tokenizer.decode(ids) == text
    special = {tokenizer.backend.token_to_id(name) for name in tokenizer.special.values()}
    assert not special & set(ids)
    for name in tokenizer.special.values():
        assert tokenizer.backend.token_to_id(name) in tokenizer.encode(f"a{name}b").ids


@given(st.text(alphabet=sorted(set("".join(CORPUS)))))
def test_characters_come_back_one_token_each(text: str) -> None:
    tokenizer = ALL["char", "gpt"]
    ids = tokenizer.plain(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_unseen_characters_are_unknown() -> None:
    tokenizer = ALL["char", "gpt"]
    assert [id == tokenizer.unk_id for id in tokenizer.plain("aЖb")] == [False, True, False]


@given(st.lists(st.integers(0, 399)), st.sampled_from(sorted(ALL)))
def test_streams_join_to_the_decoded_text(ids: list[int], which: tuple[str, Family]) -> None:
    tokenizer = ALL[which]
    ids = [id % tokenizer.vocab_size for id in ids]
    assert "".join(streamed(tokenizer, iter(ids))) == tokenizer.decode(ids)


@given(
    st.text(alphabet=st.characters(exclude_characters="\N{REPLACEMENT CHARACTER}", exclude_categories=["Cs"]))
)
def test_stream_pieces_are_whole_characters(text: str) -> None:
    tokenizer = BYTES["gpt"]
    pieces = list(streamed(tokenizer, tokenizer.plain(text)))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_stream_gives_each_piece_as_soon_as_it_is_whole() -> None:
    tokenizer = BYTES["gpt"]
    taken = []

    def ids():
        for id in tokenizer.plain("ab👧c"):
            taken.append(id)
            yield id

    stream = streamed(tokenizer, ids())
    assert next(stream) + next(stream) == "ab"
    assert tokenizer.decode(taken) == "ab"
    assert next(stream) == "👧"
    assert tokenizer.decode(taken) == "ab👧"


@pytest.mark.parametrize("pair", [None, "an owl [SEP] and more of it", "x"])
def test_shortened_texts_are_transformers(pair: str | None, tmp_path: Path) -> None:
    tokenizer = ALL["wordpiece", "bert"]
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "the quick [MASK] brown fox [SEP] jumps over the lazy dog"
    for limit in range(5, 30):
        expected = theirs(text, pair, truncation=True, max_length=limit)
        found = tokenizer.shortened(limit).encode(text, pair)
        assert (found.ids, found.segments) == (expected["input_ids"], expected["token_type_ids"])
    assert len(tokenizer.encode(text, pair).ids) > 10


# ---------------------------------------------------------------- special tokens and templates


def test_special_tokens_come_first() -> None:
    gpt, bert, transformer = (BYTES[family] for family in FAMILIES)
    assert (gpt.bos_id, gpt.eos_id, gpt.pad_id, gpt.cls_id) == (0, 0, None, None)
    assert (bert.pad_id, bert.unk_id, bert.cls_id, bert.sep_id, bert.mask_id) == (0, 1, 2, 3, 4)
    assert (transformer.pad_id, transformer.eos_id, transformer.unk_id) == (0, 1, None)
    assert ALL["wordpiece", "transformer"].unk_id == 2
    assert [bert.token(id) for id in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert bert.token(9999) == "<9999>"  # a matrix may have more rows than there are tokens


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece"])
def test_templates(kind: str) -> None:
    gpt, bert, transformer = (ALL[kind, family] for family in FAMILIES)
    a, b = "The fox", "the dog"
    assert gpt.encode(a).ids == gpt.plain(a)
    assert transformer.encode(a).ids == [*transformer.plain(a), 1]
    one, two = bert.plain(a), bert.plain(b)
    assert bert.encode(a).ids == [2, *one, 3]
    pair = bert.encode(a, b)
    assert pair.ids == [2, *one, 3, *two, 3]
    assert pair.segments == [0] * (len(one) + 2) + [1] * (len(two) + 1)


@pytest.mark.parametrize("which", sorted(ALL))
def test_a_batch_is_each_text_alone(which: tuple[str, Family]) -> None:
    tokenizer = ALL[which]
    assert tokenizer.plain_batch(TEXTS) == [tokenizer.plain(text) for text in TEXTS]
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    backwards = TEXTS[::-1]
    pairs = [tokenizer.encode(*both) for both in zip(TEXTS, backwards, strict=True)]
    assert tokenizer.encode_batch(TEXTS, backwards) == pairs


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_vocabulary_keeps_its_bound_and_training_repeats(kind: str) -> None:
    first, second = trained(kind, "bert", size=300), trained(kind, "bert", size=300)
    assert first.backend.to_str() == second.backend.to_str()
    assert first.vocab_size <= 300
    assert len(trained(kind, "bert", size=400).plain(CORPUS[0])) <= len(first.plain(CORPUS[0]))


def test_lowercase() -> None:
    for kind in ("char", "bpe", "wordpiece"):
        tokenizer = trained(kind, "gpt", lowercase=True)
        assert tokenizer.decode(tokenizer.plain("THE FOX")) == "the fox"


def test_what_cannot_be_trained() -> None:
    with pytest.raises(InputError, match=r"vocab_size is 100.*257"):
        trained("bpe", "gpt", size=100)
    with pytest.raises(InputError, match="vocab_size is 20"):
        trained("wordpiece", "bert", size=20)
    with pytest.raises(InputError, match="reads no text"):
        trained("bpe", "vit")


def test_half_a_surrogate_pair_is_named() -> None:
    for method in (BYTES["gpt"].encode, BYTES["gpt"].plain):
        with pytest.raises(InputError, match=r"character 1 .*surrogate"):
            method("a\ud800")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("which", sorted(ALL))
def test_saved_folders_open_again_and_in_transformers(which: tuple[str, Family], tmp_path: Path) -> None:
    tokenizer = ALL[which]
    tokenizer.save(tmp_path, context=77)
    again, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.special == tokenizer.special
    assert theirs.model_max_length == 77
    for text in [*TEXTS, f"x{tokenizer.token(0)}y"]:
        expected = tokenizer.encode(text)
        assert again.encode(text) == expected
        assert theirs(text)["input_ids"] == expected.ids
        assert again.plain(text) == tokenizer.plain(text)
        assert theirs.decode(expected.ids, skip_special_tokens=True) == tokenizer.decode(expected.ids)
    assert [theirs.pad_token_id, theirs.eos_token_id, theirs.mask_token_id] == [
        tokenizer.pad_id,
        tokenizer.eos_id,
        tokenizer.mask_id,
    ]
    if which[1] == "bert":
        pair = theirs("The fox", "the dog")
        assert pair["token_type_ids"] == tokenizer.encode("The fox", "the dog").segments


@pytest.mark.parametrize("lowercase", [True, False])
def test_vocab_txt_is_transformers_bert(lowercase: bool, tmp_path: Path) -> None:
    vocab = trained("wordpiece", "bert", lowercase).backend.get_vocab()
    (tmp_path / "vocab.txt").write_text(
        "".join(f"{token}\n" for token in sorted(vocab, key=lambda t: vocab[t]))
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    ours, theirs = Tokenizer.load(tmp_path), BertTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "A [MASK] jumps"]:
        both = theirs(text, "The lazy dog")
        assert ours.encode(text).ids == theirs(text)["input_ids"]
        encoding = ours.encode(text, "The lazy dog")
        assert (encoding.ids, encoding.segments) == (both["input_ids"], both["token_type_ids"])
    assert ours.mask_id == theirs.mask_token_id


@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
def test_a_vocabulary_of_a_tokenizer_that_splits_otherwise_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    (tmp_path / place).write_text(json.dumps({"tokenizer_class": "BertJapaneseTokenizer"}))
    with pytest.raises(InputError, match="is of a BertJapaneseTokenizer, which is not supported"):
        Tokenizer.load(tmp_path)
    (tmp_path / place).write_text(json.dumps({"tokenizer_class": "BertTokenizerFast"}))
    assert Tokenizer.load(tmp_path).vocab_size == 6


def test_files_may_say_that_nothing_was_added(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    said = {"additional_special_tokens": None, "added_tokens_decoder": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert Tokenizer.load(tmp_path).vocab_size == 6


@pytest.mark.parametrize("space", [False, True])
def test_vocab_json_is_transformers_gpt2(space: bool, tmp_path: Path) -> None:
    BYTES["gpt"].backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": space}))
    ours, theirs = Tokenizer.load(tmp_path), GPT2Tokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "one<|endoftext|>two"]:
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    assert ours.eos_id == theirs.eos_token_id == 0


def test_vocab_json_is_transformers_openai_gpt(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.model.save(str(tmp_path))
    ours, theirs = Tokenizer.load(tmp_path), OpenAIGPTTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert "".join(streamed(ours, ids)) == ours.decode(ids)
    assert ours.unk_id == theirs.unk_token_id


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_tokens_beside_a_vocabulary_are_transformers(family: Family, where: str, tmp_path: Path) -> None:
    """Of folders that slow tokenizers saved."""
    backend = trained("wordpiece", "bert").backend if family == "bert" else BYTES["gpt"].backend
    backend.model.save(str(tmp_path))
    size = backend.get_vocab_size()
    special = {"extra_special_tokens": ["[E2]"]}
    if where == "added_tokens.json":
        (tmp_path / where).write_text(json.dumps({"[E2]": size + 1, "Fox[E1]": size}))
    else:
        flags = {"lstrip": False, "rstrip": False, "single_word": False}
        special["added_tokens_decoder"] = {
            str(size): {"content": "Fox[E1]", "normalized": True, "special": False, **flags},
            str(size + 1): {"content": "[E2]", "normalized": False, "special": True, **flags},
        }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    made = BertTokenizer if family == "bert" else GPT2Tokenizer
    ours, theirs = Tokenizer.load(tmp_path), made.from_pretrained(tmp_path)
    for text in (*TEXTS, "the Fox[E1] and[E2]the dog"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids
        assert ours.decode(ids).split() == theirs.decode(ids, skip_special_tokens=True).split()
    assert {size, size + 1} <= set(ours.encode("the Fox[E1] and[E2]the dog").ids)


def test_tokens_beside_a_vocabulary_that_cannot_have_their_ids_are_refused(tmp_path: Path) -> None:
    BYTES["gpt"].backend.model.save(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[E1]": 9999}))
    with pytest.raises(InputError, match=r"adds '\[E1\]' to its vocabulary as id 9999, which would be"):
        Tokenizer.load(tmp_path)


def test_stored_padding_and_truncation_do_not_act(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(BYTES["bert"].backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode(CORPUS[0]) == BYTES["bert"].encode(CORPUS[0])


def test_special_tokens_are_read_from_either_file(tmp_path: Path) -> None:
    BYTES["gpt"].save(tmp_path)
    a, b = BYTES["gpt"].token(50), BYTES["gpt"].token(60)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": a}}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": b}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.pad_id, loaded.bos_id) == (50, 60, 0)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- Marian


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like opus-mt's: two sentencepiece models and a vocabulary in an order of its own."""
    folder = tmp_path_factory.mktemp("marian")
    sides = {"source": CORPUS[:2] + CORPUS[3:4], "target": [CORPUS[2], CORPUS[4]]}
    pieces = []
    for side, texts in sides.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 3),
            model_prefix=str(folder / side),
            vocab_size=200,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
        pieces += [model.id_to_piece(i) for i in range(3, len(model) - 2)]  # two pieces are in no vocabulary
    pieces = sorted(set(pieces))
    random.Random(0).shuffle(pieces)
    vocab = {piece: id for id, piece in enumerate(["</s>", "<unk>", ">>fra<<", *pieces, "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de"}))
    return folder


def test_marian_is_transformers_marian(marian: Path, tmp_path: Path) -> None:
    ours, theirs = Tokenizer.load(marian), MarianTokenizer.from_pretrained(marian)
    assert ours.vocab_size == theirs.vocab_size
    assert (ours.pad_id, ours.eos_id, ours.unk_id) == (
        theirs.pad_token_id,
        theirs.eos_token_id,
        theirs.unk_token_id,
    )
    ours.save(tmp_path, context=512)
    assert ours.definition == Tokenizer.load(tmp_path).definition != ours.target.definition
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reopened = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(reopened, MarianTokenizer)
    for text in [*TEXTS, ">>fra<< The fox", ">>xyz<<fox", ">> dog"]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids
        assert ours.plain(text) == ids[:-1]
        assert Tokenizer.load(tmp_path).encode(text).ids == reopened(text)["input_ids"] == ids
        target_ids = theirs(text_target=text)["input_ids"]
        assert ours.target.encode(text).ids == target_ids
        for some in (ids, target_ids):
            assert ours.decode(some) == theirs.decode(some, skip_special_tokens=True)
            assert "".join(streamed(ours, some)) == ours.decode(some)


@pytest.mark.parametrize("text", [">>fra<< The fox", "a ☃ fox", "  The\u00a0fox ½ "])
def test_each_piece_of_marian_stands_in_what_it_reads(marian: Path, text: str) -> None:
    """A character that the vocabulary lacks is there, too."""
    ours = Tokenizer.load(marian)
    for literal, ids in ((False, ours.encode(text).ids), (True, ours.plain(text))):
        read, places = ours.placed(text, literal)
        assert len(places) == len(ids)
        assert [place is None for place in places] == [id == ours.eos_id for id in ids]
        assert "".join(read[slice(*place)] for place in places if place is not None) == read
        assert len(read.split()) == len(text.split())


def test_other_tokenizers_read_targets_as_sources() -> None:
    assert BYTES["transformer"].target is BYTES["transformer"]


def test_a_second_marian_vocabulary_is_refused(marian: Path, tmp_path: Path) -> None:
    for file in marian.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "target_vocab.json").write_text("{}")
    with pytest.raises(InputError, match=r"target_vocab\.json"):
        Tokenizer.load(tmp_path)


# ---------------------------------------------------------------- words


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    kind=st.sampled_from(["wordpiece", "bpe"]),
)
def test_words_are_spans_of_the_text_without_white_space(text: str, kind: str):
    tokenizer = train_tokenizer(
        TokenizerConfig(kind=kind, vocab_size=400), "bert", ["some words, and don't"] * 3
    )
    spans = tokenizer.word_spans(text)
    assert all(text[a:b] and text[a:b] == text[a:b].strip() for a, b in spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_words_and_their_first_tokens():
    tokenizer = train_tokenizer(
        TokenizerConfig(kind="wordpiece", vocab_size=400), "bert", ["don't see it"] * 3
    )
    text = "  don't\tsee, it"
    assert [text[a:b] for a, b in tokenizer.word_spans(text)] == ["don", "'", "t", "see", ",", "it"]
    (found,) = tokenizer.encode_words([["don't", "\x00", "see"]])
    assert found.ids == tokenizer.encode("don't see").ids
    assert [None if i is None else tokenizer.token(found.ids[i]) for i in found.first] == ["don", None, "see"]
    assert tokenizer.word_begins(["don't see"]) == [[True, True, True, True]]
    assert tokenizer.continues(tokenizer.backend.token_to_id("##o"))
    assert not tokenizer.continues(tokenizer.cls_id)
