"""Folders of sentence-transformers: an encoder, and how its hidden states become one vector a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qkv.errors import InputError
from qkv.files import blame, read_json
from qkv.hub.folder import MODULES, PROMPTS, SENTENCE

Pooling = Literal["mean", "cls"]

_FLAGS: dict[Pooling, str] = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}


@dataclass(frozen=True)
class Found:
    """What a folder says about its encoder."""

    folder: Path
    """Where the encoder itself is."""
    pooling: Pooling | None = None
    normalize: bool = False
    max_tokens: int | None = None
    lowercase: bool = False
    """Whether texts are put in lower case before the tokenizer sees them."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What may be put before a text, by purpose."""


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
        for name in modules:
            if name not in ("Transformer", "Pooling", "Normalize"):
                raise InputError(f"module {name}; supported are Transformer, Pooling, Normalize")
        if "Transformer" not in modules or "Pooling" not in modules:
            raise InputError("it must name a Transformer and a Pooling")
    encoder = modules["Transformer"]
    said = read_json(encoder / SENTENCE) if (encoder / SENTENCE).is_file() else {}
    with blame(encoder / SENTENCE):
        lowercase = bool(said.get("do_lower_case"))
    return Found(
        encoder,
        _pooling(modules["Pooling"]),
        "Normalize" in modules,
        _max_tokens(encoder),
        lowercase,
        _prompts(folder / PROMPTS),
    )


def _prompts(path: Path) -> Mapping[str, str]:
    """The prompts of a folder, of which none is put before every text."""
    said = read_json(path) if path.is_file() else {}
    with blame(path):
        prompts: dict[str, str] = dict(said.get("prompts") or {})
        if prompts.get(said.get("default_prompt_name") or ""):
            raise InputError(
                f"default_prompt_name is {said['default_prompt_name']!r}, but no prompt is put before a text "
                "here: make it null, and write the prompt into the texts"
            )
    return prompts


def _max_tokens(folder: Path) -> int | None:
    """Tokens of a text that the encoder is given, as sentence-transformers finds the number."""
    for name, key in ((SENTENCE, "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        values = read_json(folder / name) if (folder / name).is_file() else {}
        with blame(folder / name):
            if values.get(key) is not None:
                return int(values[key])
    return None


def _pooling(folder: Path) -> Pooling:
    """The one mode of pooling that a folder's config.json switches on."""
    values: dict[str, Any] = read_json(folder / "config.json")
    with blame(folder / "config.json"):
        modes = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
        if (mode := values.get("pooling_mode")) is not None:
            modes.append(_FLAGS.get(mode, mode))
        for pooling, flag in _FLAGS.items():
            if modes == [flag]:
                return pooling
        raise InputError(f"it pools by {' and '.join(modes) or 'nothing'}; supported are mean and cls alone")


def write(
    folder: Path, dim: int, pooling: Pooling, normalize: bool, max_tokens: int, prompts: Mapping[str, str]
) -> None:
    """Say beside a saved encoder, whose states have that dimension, how they are pooled."""
    names = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
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
    flags = {flag: mode == pooling for mode, flag in _FLAGS.items()}
    files = {
        MODULES: modules,
        SENTENCE: {"max_seq_length": max_tokens, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": dim, **flags},
    }
    if normalize:
        files["2_Normalize/config.json"] = {}
    if prompts:
        files[PROMPTS] = {"prompts": dict(prompts), "default_prompt_name": None}
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")
