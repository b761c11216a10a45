"""Text to token ids and back: tokenizers trained here or brought by a checkpoint.

All of them are `tokenizers` pipelines (normalise, split, model, template, decoder). Only Marian's
folders need a second library, `sentencepiece`, for the step from text to pieces.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qkv.config import Family, TokenizerConfig
from qkv.errors import InputError, need
from qkv.files import json_or_empty, write_json

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

Role = Literal["pad", "unk", "bos", "eos", "cls", "sep", "mask"]
ROLES: tuple[Role, ...] = get_args(Role)

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")
"""A folder with a tokenizer has one of these."""
FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "merges.txt",
    "added_tokens.json",
    "source.spm",
    "target.spm",
    "target_vocab.json",
)
"""Every file of a checkpoint's folder that `Tokenizer.load` may read."""

_CLASSES = (
    *("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"),
    *("GPT2Tokenizer", "OpenAIGPTTokenizer", "PreTrainedTokenizer", "TokenizersBackend"),
)
"""Names that transformers gives to tokenizers which a vocabulary's files are enough for, but for "Fast"."""

END_OF_TEXT = "<|endoftext|>"
_USUAL: dict[Role, tuple[str, ...]] = {
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
    "bos": ("<s>", END_OF_TEXT),
    "eos": ("</s>", END_OF_TEXT),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]",),
}
"""What special tokens are called where no file says so."""


@dataclass(frozen=True)
class Encoding:
    """Token ids and, of the same length, the segment (0 or 1) that each belongs to."""

    ids: list[int]
    segments: list[int]


@dataclass(frozen=True)
class WordEncoding:
    """Token ids of a text that came in words and, for each word, the place of its first token."""

    ids: list[int]
    first: list[int | None]
    """None: no token is left of the word, because it has none or because the text was cut."""


class Tokenizer:
    """A `tokenizers` pipeline, `backend`, and the parts that its special tokens play."""

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[Role, str]) -> None:
        backend.no_padding()
        backend.no_truncation()
        known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        backend.add_special_tokens(_added(sorted(set(special.values()) - known)))
        self.backend = backend
        self.special = special

    # ------------------------------------------------------------ vocabulary

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def _id(self, role: Role) -> int | None:
        token = self.special.get(role)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token; None, as for the other roles, if there is none."""
        return self._id("pad")

    @property
    def unk_id(self) -> int | None:
        """Id of the token for what the vocabulary cannot say."""
        return self._id("unk")

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text."""
        return self._id("bos")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text."""
        return self._id("eos")

    @property
    def cls_id(self) -> int | None:
        """Id of BERT's first token."""
        return self._id("cls")

    @property
    def sep_id(self) -> int | None:
        """Id of the token that ends a segment."""
        return self._id("sep")

    @property
    def mask_id(self) -> int | None:
        """Id of the token that hides another."""
        return self._id("mask")

    def lacking(self, family: Family) -> list[Role]:
        """The special tokens that a family's models need and this vocabulary does not have."""
        return [role for role in _SPECIAL[family] if self._id(role) is None]

    def framed(self, text: str, family: Family) -> list[int]:
        """A text's ids as a family learns it: between that family's special tokens, which must be there."""
        before = [self.cls_id] if family == "bert" else []
        behind = {"bert": [self.sep_id], "transformer": [self.eos_id]}.get(family, [])
        return [id for id in (*before, *self.plain(text), *behind) if id is not None]

    def token(self, id: int) -> str:
        """How the vocabulary writes an id; one that it does not have, such as a row that a model's matrix was
        padded with, by its number."""
        token = self.backend.id_to_token(id)
        return f"<{id}>" if token is None else token

    @property
    def definition(self) -> str:
        """All that decides which ids a text becomes, to tell tokenizers apart."""
        return self.backend.to_str()

    # ------------------------------------------------------------ text to ids

    def encode(self, text: str, pair: str | None = None) -> Encoding:
        """As models read it: in its template, and special tokens written in the text are special."""
        return self.encode_batch([text], None if pair is None else [pair])[0]

    def encode_batch(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Encoding]:
        """Each text, or each text and its pair, as `encode` does it. Raises InputError for broken Unicode."""
        inputs = [self._split(text) for text in texts]
        both = inputs if pairs is None else list(zip(inputs, map(self._split, pairs), strict=True))
        found = self.backend.encode_batch_fast(both, is_pretokenized=self._presplit)
        return [Encoding(e.ids, e.type_ids) for e in found]

    def located(self, text: str, pair: str | None = None) -> tokenizers.Encoding:
        """As `encode`, with where in its text each token stands. Raises InputError for broken Unicode."""
        both = (self._split(text), None if pair is None else self._split(pair))
        return self.backend.encode(*both, is_pretokenized=self._presplit)

    def placed(self, text: str, literal: bool = False) -> tuple[str, list[tuple[int, int] | None]]:
        """The text as it is read, and where in it each token of `encode` stands, or of `plain` if literal.

        None: a token that the template adds. Raises InputError for broken Unicode.
        """
        backend = self._literal if literal else self.backend
        found = backend.encode(self._split(text), add_special_tokens=not literal)
        places = zip(found.sequence_ids, found.offsets, strict=True)
        return text, [None if part is None else place for part, place in places]

    def plain(self, text: str) -> list[int]:
        """The text itself: no template, and special tokens written in it are text like any other."""
        return self.plain_batch([text])[0]

    def plain_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as `plain` does it. Raises InputError for broken Unicode."""
        found = self._literal.encode_batch_fast(
            [self._split(text) for text in texts], is_pretokenized=self._presplit, add_special_tokens=False
        )
        return [e.ids for e in found]

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """The backend, blind to special tokens in a text."""
        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        copy.encode_special_tokens = True
        return copy

    def encode_words(self, texts: Sequence[Sequence[str]]) -> list[WordEncoding]:
        """Each text, given as its words, as `encode` does it. Raises InputError for broken Unicode."""
        inputs = [[str(self._split(word)) for word in words] for words in texts]
        found = self.backend.encode_batch(inputs, is_pretokenized=True)
        return [
            WordEncoding(e.ids, _first_places(e.word_ids, len(words)))
            for e, words in zip(found, inputs, strict=True)
        ]

    def word_spans(self, text: str) -> list[tuple[int, int]]:
        """Where the words of a text begin and end, as the pre-tokenizer splits it; white space is none."""
        encoding = self.backend.encode(self._split(text))
        spans: dict[int, tuple[int, int]] = {}
        for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
            if word is not None:
                spans[word] = spans.get(word, (start, end))[0], end
        trimmed = (_trim(text, start, end) for start, end in spans.values())
        return [(start, end) for start, end in trimmed if start < end]

    def continues(self, id: int) -> bool:
        """Whether a token belongs to the word of the one before it.

        Raises InputError for tokenizers other than WordPiece, whose tokens do not tell.
        """
        if not isinstance(self.backend.model, models.WordPiece):
            raise InputError(
                "only WordPiece's tokens tell where words begin: set tokenizer.kind to wordpiece"
            )
        return self.token(id).startswith(self.backend.model.continuing_subword_prefix)

    def word_begins(self, texts: Sequence[str]) -> list[list[bool]]:
        """For each id that `plain_batch` gives, whether a word of the pre-tokenizer begins with it."""
        inputs = [self._split(text) for text in texts]
        found = self._literal.encode_batch(inputs, is_pretokenized=self._presplit, add_special_tokens=False)
        return [
            [word != before for word, before in zip(e.word_ids, [None, *e.word_ids], strict=False)]
            for e in found
        ]

    _presplit = False

    def _split(self, text: str) -> str | list[str]:
        """What the backend is given: the text, or its pieces if `_presplit`."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"character {error.start} of a text is half a surrogate pair: not Unicode"
            ) from None
        return text

    @property
    def target(self) -> Tokenizer:
        """The tokenizer of target texts: this one, unless sources and targets are split differently."""
        return self

    def shortened(self, limit: int) -> Tokenizer:
        """The same tokenizer, but `encode` cuts the ends of texts to `limit` tokens, its template included.

        Of two texts the longer one gives way.
        """
        other = copy.copy(self)
        other.backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        other.backend.enable_truncation(limit)
        return other

    def lowercased(self) -> Tokenizer:
        """The same tokenizer, which first puts texts in lower case."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        return Tokenizer(backend, self.special)

    # ------------------------------------------------------------ ids to text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out."""
        return self.backend.decode(ids, skip_special_tokens=True)

    # ------------------------------------------------------------ files

    def to_json(self) -> Any:
        """What `from_json` makes this tokenizer of."""
        return {"backend": self.backend.to_str(), "special": self.special}

    @staticmethod
    def from_json(value: Any) -> Tokenizer:
        """The tokenizer of which `to_json` gave this."""
        return Tokenizer(tokenizers.Tokenizer.from_str(value["backend"]), value["special"])

    def save(self, folder: str | Path, context: int | None = None) -> None:
        """Write what `load` and transformers' AutoTokenizer open. context: the model's longest sequence."""
        folder = Path(folder)
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        self._save_config(folder, "PreTrainedTokenizerFast", context)

    def _save_config(self, folder: Path, tokenizer_class: str, context: int | None) -> None:
        values: dict[str, Any] = {"tokenizer_class": tokenizer_class, "clean_up_tokenization_spaces": False}
        values |= {f"{role}_token": token for role, token in self.special.items()}
        segments = ["token_type_ids"] if "cls" in self.special else []  # transformers 4 adds them if not told
        values["model_input_names"] = ["input_ids", *segments, "attention_mask"]
        if context is not None:
            values["model_max_length"] = context
        write_json(folder / "tokenizer_config.json", values)

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """A folder's tokenizer. Raises InputError if it has none, or one that cannot be read."""
        folder = Path(folder)
        has = {name for name in FILES if (folder / name).is_file()}
        try:
            if "tokenizer.json" in has:
                text = (folder / "tokenizer.json").read_text(encoding="utf-8")
                backend = tokenizers.Tokenizer.from_str(text)
            elif "vocab.txt" in has:
                backend = _wordpiece_files(folder)
            elif {"vocab.json", "merges.txt"} <= has:
                backend = _bpe_files(folder)
            elif {"vocab.json", "source.spm", "target.spm"} <= has:
                return MarianTokenizer.read(folder)
            else:
                raise InputError(
                    f"{folder} has no tokenizer: neither tokenizer.json, nor vocab.txt, nor vocab.json with "
                    "merges.txt or with source.spm and target.spm"
                )
            if "tokenizer.json" not in has:
                _check_class(folder)
                _add_tokens(backend, folder)
            return Tokenizer(backend, _special(folder, backend))
        except InputError:
            raise
        except Exception as error:  # the libraries' readers raise plain Exception
            raise InputError(f"the tokenizer in {folder} cannot be read: {_one_line(error)}") from None


class Pieces:
    """The text of ids as they arrive, in pieces of which none splits a character.

    A piece's bytes can lack the end of a character, which `decode` shows as U+FFFD; such a piece waits for
    the next id. Text is decoded after the previous piece, because a first token can lose its space.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """before: ids of the text that the pieces go on from."""
        self._tokenizer = tokenizer
        self._window = list(before)  # the ids of the previous piece, then those of the coming one
        self._shown = len(before)  # how many of the window's ids are in pieces already given

    def push(self, id: int) -> str:
        """The piece that one more id completes; empty: none yet."""
        self._window.append(id)
        piece = self.rest()
        if not piece or piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._window, self._shown = self._window[self._shown :], len(self._window) - self._shown
        return piece

    def rest(self) -> str:
        """What has not been in a piece yet."""
        decode = self._tokenizer.decode
        return decode(self._window)[len(decode(self._window[: self._shown])) :]


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """A part of a text without white space at its ends."""
    part = text[start:end]
    return end - len(part.lstrip()), start + len(part.rstrip())


def _first_places(words: Sequence[int | None], count: int) -> list[int | None]:
    """The first place of each of so many words."""
    first: list[int | None] = [None] * count
    for place, word in enumerate(words):
        if word is not None and first[word] is None:
            first[word] = place
    return first


def _added(names: Iterable[str], with_space: str = "") -> list[AddedToken]:
    """Special tokens: found in a text before it is normalised, and left out when ids are decoded.

    with_space: the one that takes the white space before it.
    """
    return [AddedToken(name, special=True, normalized=False, lstrip=name == with_space) for name in names]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_class(folder: Path) -> None:
    """Raise InputError if a folder's vocabulary is of a tokenizer that splits texts in another way."""
    for name in ("tokenizer_config.json", "config.json"):
        said = json_or_empty(folder / name)
        known = str(said.get("tokenizer_class") or "").removesuffix("Fast")
        if known and known not in _CLASSES:
            raise InputError(
                f"{folder} is of a {known}, which is not supported without a tokenizer.json; there are "
                f"{', '.join(_CLASSES)}"
            )


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path) -> None:
    """Put those beside a vocabulary that a folder's files say were added to it, with the ids that they say.

    Raises InputError for other ids than those that follow the vocabulary's.
    """
    said = json_or_empty(folder / "special_tokens_map.json") | json_or_empty(folder / "tokenizer_config.json")
    more = said.get("extra_special_tokens") or said.get("additional_special_tokens") or []
    named = more.values() if isinstance(more, dict) else more
    special = {token["content"] if isinstance(token, dict) else token for token in named}
    found = {
        id: AddedToken(name, special=name in special, normalized=name not in special)
        for name, id in json_or_empty(folder / "added_tokens.json").items()
    }
    for id, flags in (said.get("added_tokens_decoder") or {}).items():
        found[int(id)] = AddedToken(**{key: value for key, value in flags.items() if key != "__type"})
    for id, token in sorted(found.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != id:
            raise InputError(
                f"{folder} adds {token.content!r} to its vocabulary as id {id}, which would be "
                f"{backend.token_to_id(token.content)} here"
            )
    added = {token.content for token in found.values()}
    backend.add_special_tokens(_added(sorted(special.intersection(backend.get_vocab()) - added)))


def _special(folder: Path, backend: tokenizers.Tokenizer) -> dict[Role, str]:
    """Which token plays which part: as the folder's files say, otherwise by the usual names."""
    said = json_or_empty(folder / "special_tokens_map.json") | json_or_empty(folder / "tokenizer_config.json")
    found: dict[Role, str] = {}
    for role in ROLES:
        token = said.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        for name in _USUAL[role] if content is None else (content,):
            if backend.token_to_id(name) is not None:
                found[role] = name
                break
    return found


# ---------------------------------------------------------------- the kinds of pipeline


def _wordpiece(
    model: models.WordPiece, lowercase: bool, chinese: bool = True, accents: bool | None = None
) -> tokenizers.Tokenizer:
    """BERT's pipeline but for the template. accents: strip them; None: only if lowercase."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese, strip_accents=accents, lowercase=lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _byte_level(
    model: models.BPE, lowercase: bool = False, prefix_space: bool = False
) -> tokenizers.Tokenizer:
    """GPT-2's pipeline: every text is bytes, and every byte is in the vocabulary.

    prefix_space: put a space before a text that begins without one.
    """
    backend = tokenizers.Tokenizer(model)
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def _characters(vocab: dict[str, int], unk: str, lowercase: bool) -> tokenizers.Tokenizer:
    """One token a code point."""
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=unk))
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def _template(backend: tokenizers.Tokenizer, family: Family) -> None:
    """What a family's models read around a text."""
    templates: dict[Family, tuple[str, str]] = {
        "bert": ("[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"),
        "transformer": ("$A </s>", "$A $B </s>"),
    }
    if family in templates:
        single, pair = templates[family]
        names = [name for name in ("[CLS]", "[SEP]", "</s>") if name in single]
        backend.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(name, backend.token_to_id(name)) for name in names]
        )


def _wordpiece_files(folder: Path) -> tokenizers.Tokenizer:
    """BERT's vocab.txt, one token a line."""
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    said = json_or_empty(folder / "tokenizer_config.json")
    backend = _wordpiece(
        models.WordPiece({token: id for id, token in enumerate(lines)}, unk_token="[UNK]"),
        lowercase=said.get("do_lower_case", True),
        chinese=said.get("tokenize_chinese_chars", True),
        accents=said.get("strip_accents"),
    )
    _template(backend, "bert")
    return backend


def _bpe_files(folder: Path) -> tokenizers.Tokenizer:
    """vocab.json and merges.txt of GPT-2, or of GPT-1, whose tokens mark the end of a word."""
    vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    if not any(token.endswith("</w>") for token in vocab):
        said = json_or_empty(folder / "tokenizer_config.json")
        return _byte_level(models.BPE(vocab, merges), prefix_space=bool(said.get("add_prefix_space")))
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    return backend


# ---------------------------------------------------------------- Marian


class MarianTokenizer(Tokenizer):
    """One vocabulary, but sources and targets are cut into its pieces by two sentencepiece models."""

    _presplit = True

    def __init__(
        self, vocab: dict[str, int], source: SentencePieceProcessor, target: SentencePieceProcessor
    ) -> None:
        backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        _template(backend, "transformer")
        super().__init__(backend, {role: t for role, t in _MARIAN_SPECIAL.items() if t in vocab})
        self.vocab = vocab
        self.source_model, self.target_model = source, target
        self._model = source

    @staticmethod
    def read(folder: Path) -> MarianTokenizer:
        """vocab.json, source.spm and target.spm of a folder."""
        need("Marian's tokenizer", "marian", "sentencepiece")
        from sentencepiece import SentencePieceProcessor

        if (folder / "target_vocab.json").is_file():
            raise InputError(f"{folder} has a second vocabulary, target_vocab.json; it must share one")
        source = SentencePieceProcessor(model_file=str(folder / "source.spm"))
        target = SentencePieceProcessor(model_file=str(folder / "target.spm"))
        return MarianTokenizer(json_or_empty(folder / "vocab.json"), source, target)

    @property
    def target(self) -> Tokenizer:
        """The same vocabulary with the model that cuts targets."""
        other = copy.copy(self)
        other._model = self.target_model
        return other

    @property
    def definition(self) -> str:
        """All that decides which ids a text becomes, to tell tokenizers apart."""
        return self.backend.to_str() + hashlib.sha256(self._model.serialized_model_proto()).hexdigest()

    def placed(self, text: str, literal: bool = False) -> tuple[str, list[tuple[int, int] | None]]:
        """As every tokenizer's; the text is what the model's normalisation leaves of it."""
        pieces = [piece.replace("▁", " ") for piece in self._split(text)]
        ends = list(accumulate(map(len, pieces), initial=0))
        return "".join(pieces), [*pairwise(ends), *[None] * (not literal)]

    def _split(self, text: str) -> list[str]:
        super()._split(text)
        code = re.match(r">>.*?<<", text, re.DOTALL)  # the language to translate to, as in >>fra<<
        start = code.end() if code else 0
        pieces: list[str] = self._model.encode(text[start:], out_type=str)
        return [text[:start], *pieces] if start else pieces

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out."""
        left_out = {self._id(role) for role in self.special}
        known = (self.backend.id_to_token(id) for id in ids if id not in left_out)
        pieces = [piece for piece in known if piece is not None]
        text: str = self._model.decode_pieces(pieces)
        return text.replace("▁", " ").strip()

    def save(self, folder: str | Path, context: int | None = None) -> None:
        """Write what `load` and transformers' AutoTokenizer open. context: the model's longest sequence."""
        folder = Path(folder)
        write_json(folder / "vocab.json", self.vocab)
        (folder / "source.spm").write_bytes(self.source_model.serialized_model_proto())
        (folder / "target.spm").write_bytes(self.target_model.serialized_model_proto())
        self._save_config(folder, "MarianTokenizer", context)


_MARIAN_SPECIAL: dict[Role, str] = {"pad": "<pad>", "unk": "<unk>", "eos": "</s>"}


# ---------------------------------------------------------------- training


_SPECIAL: dict[Family, dict[Role, str]] = {
    "transformer": {"pad": "<pad>", "eos": "</s>"},
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "gpt": {"bos": END_OF_TEXT, "eos": END_OF_TEXT},
}
"""What each family needs; these come first in the vocabulary, in this order."""


def train_tokenizer(config: TokenizerConfig, family: Family, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of that kind, with the family's special tokens and template, from training texts.

    Raises InputError if the vocabulary size cannot hold the alphabet, or for a family without text.
    """
    if family not in _SPECIAL:
        raise InputError(f"the {family} family reads no text; it needs no tokenizer")
    special = dict(_SPECIAL[family])
    if config.kind != "bpe":  # bytes leave nothing unknown
        special.setdefault("unk", "<unk>")
    first = list(dict.fromkeys(special.values()))
    if config.kind == "char":
        backend = _train_characters(config, special["unk"], first, texts)
    elif config.kind == "bpe":
        backend = _train_byte_level(config, first, texts)
    else:
        backend = _train_wordpiece(config, special["unk"], first, list(texts))
    _template(backend, family)
    tokenizer = Tokenizer(backend, special)
    if config.kind != "char" and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"tokenizer.vocab_size is {config.vocab_size}, but special tokens and alphabet are already "
            f"{tokenizer.vocab_size}; give at least that many"
        )
    return tokenizer


def _train_characters(
    config: TokenizerConfig, unk: str, first: list[str], texts: Iterable[str]
) -> tokenizers.Tokenizer:
    """First the tokens `first`, then every code point that occurs."""
    seen: set[str] = set()
    for text in texts:
        seen.update(normalizers.Lowercase().normalize_str(text) if config.lowercase else text)
    vocab = {token: id for id, token in enumerate(first + sorted(seen))}
    return _characters(vocab, unk, config.lowercase)


def _train_byte_level(
    config: TokenizerConfig, first: list[str], texts: Iterable[str]
) -> tokenizers.Tokenizer:
    """First the tokens `first`, then all bytes, then merges (Sennrich et al. 2016, algorithm 1)."""
    backend = _byte_level(models.BPE(), config.lowercase)
    mask = _SPECIAL["bert"]["mask"]  # in place of a word with its space, which is part of its first token
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=_added(first, with_space=mask),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _train_wordpiece(
    config: TokenizerConfig, unk: str, first: list[str], texts: list[str]
) -> tokenizers.Tokenizer:
    """First the tokens `first`, then characters that begin words and that continue them, then merges."""
    backend = _wordpiece(models.WordPiece(unk_token=unk), config.lowercase)
    words: set[str] = set()
    for text in texts:
        words.update(backend.normalizer.normalize_str(text).split())
    parts = [part for word in words for part, _ in backend.pre_tokenizer.pre_tokenize_str(word)]
    begin, continuing = {c for part in parts for c in part}, {c for part in parts for c in part[1:]}
    # The trainer numbers continuing characters as it meets them in a hash table, and breaks ties by
    # number: naming them in order beforehand makes training repeatable. A fresh model forgets that
    # they were named as special tokens.
    alphabet = sorted(begin) + [f"##{c}" for c in sorted(continuing)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size, special_tokens=_added(first + alphabet), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    vocab = backend.get_vocab(with_added_tokens=True)
    return _wordpiece(models.WordPiece(vocab, unk_token=unk), config.lowercase)
