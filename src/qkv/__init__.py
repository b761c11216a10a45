"""Four Transformers, one attention: encoder-decoder, BERT, GPT and ViT from raw data to a used model.

`import qkv` imports nothing else; each public name brings its module when it is first used.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkv.config import BertConfig, GPTConfig, TransformerConfig, ViTConfig
    from qkv.decode import Decoding
    from qkv.engine import Engine
    from qkv.errors import InputError
    from qkv.explanations.explainer import explain
    from qkv.explanations.explanation import Explanation
    from qkv.models import PRESETS, build
    from qkv.pipelines import Encoder, ImageClassifier, TextGenerator, Translator, from_pretrained
    from qkv.ragged import Layout, Ragged, pack
    from qkv.recording import record
    from qkv.search import Request

_HOMES = {
    "qkv.config": ("BertConfig", "GPTConfig", "TransformerConfig", "ViTConfig"),
    "qkv.decode": ("Decoding",),
    "qkv.engine": ("Engine",),
    "qkv.errors": ("InputError",),
    "qkv.explanations.explainer": ("explain",),
    "qkv.explanations.explanation": ("Explanation",),
    "qkv.models": ("PRESETS", "build"),
    "qkv.pipelines": ("Encoder", "ImageClassifier", "TextGenerator", "Translator", "from_pretrained"),
    "qkv.ragged": ("Layout", "Ragged", "pack"),
    "qkv.recording": ("record",),
    "qkv.search": ("Request",),
}

__all__ = [
    "PRESETS",
    "BertConfig",
    "Decoding",
    "Encoder",
    "Engine",
    "Explanation",
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
    "explain",
    "from_pretrained",
    "pack",
    "record",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            with _without_collecting():
                return getattr(import_module(module), name)
    raise AttributeError(f"module 'qkv' has no attribute {name!r}")


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Garbage is not looked for, now or soon after, among what is made: importing torch makes half a million
    objects that stay, and looking through them would take a tenth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()  # all that is there counts as old,
            gc.unfreeze()  # so that only a full collection comes back to it
        if enabled:
            gc.enable()


def __dir__() -> list[str]:
    return __all__
