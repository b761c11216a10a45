"""Folders of sentence-transformers: an encoder, and how its hidden states become one vector a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from qkv.config import BertConfig
from qkv.errors import InputError
from qkv.hub.folder import MODULES, SENTENCE, read_json

Pooling = Literal["mean", "cls"]

_FLAGS: dict[Pooling, str] = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}


def read(folder: Path) -> tuple[Path, Pooling | None, bool]:
    """Where the encoder is, how its states are pooled, and whether vectors are normalised.

    A folder without modules.json has no pooling. Raises InputError for a module that is not supported.
    """
    if not (folder / MODULES).is_file():
        return folder, None, False
    modules = {str(m["type"]).rpartition(".")[2]: folder / m["path"] for m in read_json(folder / MODULES)}
    for name in modules:
        if name not in ("Transformer", "Pooling", "Normalize"):
            raise InputError(f"{folder} has the module {name}; supported are Transformer, Pooling, Normalize")
    if "Transformer" not in modules or "Pooling" not in modules:
        raise InputError(f"{folder / MODULES} must name a Transformer and a Pooling")
    return modules["Transformer"], _pooling(modules["Pooling"]), "Normalize" in modules


def _pooling(folder: Path) -> Pooling:
    """The one mode of pooling that a folder's config.json switches on."""
    values: dict[str, Any] = read_json(folder / "config.json")
    modes = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    modes += [_FLAGS.get(values["pooling_mode"], values["pooling_mode"])] if "pooling_mode" in values else []
    for pooling, flag in _FLAGS.items():
        if modes == [flag]:
            return pooling
    raise InputError(
        f"{folder} pools by {' and '.join(modes) or 'nothing'}; supported are mean and cls alone"
    )


def write(folder: Path, config: BertConfig, pooling: Pooling, normalize: bool) -> None:
    """Say beside a saved encoder how its states are pooled."""
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
        SENTENCE: {"max_seq_length": config.context, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": config.dim, **flags},
    }
    if normalize:
        files["2_Normalize/config.json"] = {}
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")
