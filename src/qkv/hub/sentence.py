"""Folders of sentence-transformers: an encoder, and how its hidden states become one vector a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from qkv.config import BertConfig
from qkv.errors import InputError
from qkv.files import blame, json_or_empty, read_json, write_json
from qkv.hub.folder import MODULES, PROMPTS, SENTENCE
from qkv.ragged import Ragged

Mode = Literal["mean", "cls"]

_FLAGS: dict[Mode, str] = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}


@dataclass(frozen=True)
class Pooling:
    """How an encoder's states become one vector of a text."""

    mode: Mode = "mean"
    """The mean over a text's tokens, or its first token's state."""
    normalize: bool = False
    """Whether vectors are scaled to length 1."""
    max_tokens: int | None = None
    """How many tokens of a text a vector is of; None: as many as the model reads."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What its users put before a text, by purpose; kept for them, and put before none here."""
    include_prompt: bool = True
    """Whether its users' vectors are of the prompt too; kept for them."""
    similarity: str | None = None
    """How its users compare vectors, in the words of sentence-transformers; kept for them, unused here."""

    def vectors(self, hidden: Ragged) -> Tensor:
        """hidden (T, D) -> float32 (N, D)."""
        pooled = (hidden.first() if self.mode == "cls" else hidden.mean()).float()
        return F.normalize(pooled) if self.normalize else pooled


CONTRASTIVE = Pooling(normalize=True)
"""What contrastive learning compares texts by."""


def check_contrastive(pooling: Pooling | None, source: str) -> None:
    """Raise InputError for a checkpoint that makes other vectors than contrastive learning compares."""
    if pooling is not None and pooling.mode != CONTRASTIVE.mode:
        raise InputError(
            f"contrastive learning compares means of texts, but {source} makes vectors of their first "
            "tokens: name another checkpoint"
        )


@dataclass(frozen=True)
class Found:
    """What a folder says about its encoder."""

    folder: Path
    """Where the encoder itself is."""
    pooling: Pooling | None = None
    """None: it is not a folder of sentence-transformers."""
    lowercase: bool = False
    """Whether texts are put in lower case before the tokenizer sees them."""


def read(folder: Path) -> Found:
    """What modules.json says; a folder without that file holds just a model.

    Raises InputError for a module that is not supported, or files that are malformed.
    """
    path = folder / MODULES
    if not path.is_file():
        return Found(folder)
    listed = read_json(path)
    with blame(path):
        modules = {str(module["type"]).rpartition(".")[2]: folder / module["path"] for module in listed}
    encoder = modules.get("Transformer", folder)
    said = json_or_empty(encoder / SENTENCE)
    with blame(encoder / SENTENCE):
        lowercase = bool(said.get("do_lower_case"))
        classifies = said.get("transformer_task") == "sequence-classification"  # a CrossEncoder
    if classifies and tuple(modules) == ("Transformer",):
        return Found(encoder, lowercase=lowercase)
    if tuple(modules) not in (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize")):
        raise InputError(
            f"{path}: modules {', '.join(modules)}; supported are Transformer, Pooling and perhaps "
            "Normalize, in this order"
        )
    if normalizes := "Normalize" in modules:
        _check_normalize(modules["Normalize"] / "config.json")
    prompts, similarity = _for_users(folder / PROMPTS)
    mode, include_prompt = _mode(modules["Pooling"])
    tokens = _max_tokens(encoder)
    pooling = Pooling(mode, normalizes, tokens, prompts, include_prompt, similarity)
    return Found(encoder, pooling, lowercase)


def _check_normalize(path: Path) -> None:
    """Raise InputError if anything but a text's vector is scaled."""
    said = json_or_empty(path)
    with blame(path):
        for key in ("module_input_name", "module_output_name"):
            if said.get(key) not in (None, "sentence_embedding"):
                raise InputError(f"{key} is {said[key]!r}; only sentence_embedding is supported")


def _for_users(path: Path) -> tuple[Mapping[str, str], str | None]:
    """What a folder says to its users: prompts, of which none is put before every text, and a similarity."""
    said = json_or_empty(path)
    with blame(path):
        prompts: dict[str, str] = dict(said.get("prompts") or {})
        if prompts.get(said.get("default_prompt_name") or ""):
            raise InputError(
                f"default_prompt_name is {said['default_prompt_name']!r}, but no prompt is put before a text "
                "here: make it null, and write the prompt into the texts"
            )
        if said.get("truncate_dim") is not None:
            raise InputError(f"truncate_dim is {said['truncate_dim']}; only whole vectors are supported")
        similarity: str | None = said.get("similarity_fn_name")
    return prompts, similarity


def _max_tokens(folder: Path) -> int | None:
    """Tokens of a text that the encoder is given, as sentence-transformers finds the number."""
    for name, key in ((SENTENCE, "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        values = json_or_empty(folder / name)
        with blame(folder / name):
            if values.get(key) is not None:
                return int(values[key])
    return None


def _mode(folder: Path) -> tuple[Mode, bool]:
    """The one mode of pooling that a folder's config.json switches on, and whether prompts are pooled too."""
    values: dict[str, Any] = read_json(folder / "config.json")
    with blame(folder / "config.json"):
        modes = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
        if (mode := values.get("pooling_mode")) is not None:
            modes.append(_FLAGS.get(mode, mode))
        for known, flag in _FLAGS.items():
            if modes == [flag]:
                return known, bool(values.get("include_prompt", True))
        raise InputError(f"it pools by {' and '.join(modes) or 'nothing'}; supported are mean and cls alone")


def write(folder: Path, pooling: Pooling, config: BertConfig) -> None:
    """Say beside a saved encoder how its states are pooled."""
    names = ["Transformer", "Pooling", *(["Normalize"] if pooling.normalize else [])]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{name}" if i else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(names)
    ]
    for module in modules[1:]:
        (folder / str(module["path"])).mkdir()
    flags = {flag: mode == pooling.mode for mode, flag in _FLAGS.items()}
    files = {
        MODULES: modules,
        SENTENCE: {"max_seq_length": pooling.max_tokens or config.context, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.dim,
            **flags,
            "include_prompt": pooling.include_prompt,
        },
    }
    if pooling.normalize:
        files["2_Normalize/config.json"] = {}
    if pooling.prompts or pooling.similarity:
        prompts = {"prompts": dict(pooling.prompts), "default_prompt_name": None}
        files[PROMPTS] = prompts | {"similarity_fn_name": pooling.similarity}
    for name, values in files.items():
        write_json(folder / name, values)
