"""Four Transformers, one attention: encoder-decoder, BERT, GPT and ViT from raw data to a used model.

`import qkv` imports nothing else; each public name brings its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkv.attention import record
    from qkv.config import BertConfig, GPTConfig, TransformerConfig, ViTConfig
    from qkv.decode import Decoding
    from qkv.engine import Engine
    from qkv.errors import InputError
    from qkv.models import PRESETS, build
    from qkv.pipelines import Encoder, ImageClassifier, TextGenerator, Translator, from_pretrained
    from qkv.ragged import Layout, Ragged, pack
    from qkv.search import Request

_HOMES = {
    "qkv.attention": ("record",),
    "qkv.config": ("BertConfig", "GPTConfig", "TransformerConfig", "ViTConfig"),
    "qkv.decode": ("Decoding",),
    "qkv.engine": ("Engine",),
    "qkv.errors": ("InputError",),
    "qkv.models": ("PRESETS", "build"),
    "qkv.pipelines": ("Encoder", "ImageClassifier", "TextGenerator", "Translator", "from_pretrained"),
    "qkv.ragged": ("Layout", "Ragged", "pack"),
    "qkv.search": ("Request",),
}

__all__ = [
    "PRESETS",
    "BertConfig",
    "Decoding",
    "Encoder",
    "Engine",
    "GPTConfig",
    "ImageClassifier",
    "InputError",
    "Layout",
    "Ragged",
    "Request",
    "TextGenerator",
    "TransformerConfig",
    "Translator",
    "ViTConfig",
    "build",
    "from_pretrained",
    "pack",
    "record",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'qkv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
