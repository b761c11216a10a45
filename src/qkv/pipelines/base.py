"""What all pipelines have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, Self, TypeVar, cast

import torch
from torch import Tensor

from qkv import hub
from qkv.attention import Tappable
from qkv.config import InferencePrecision
from qkv.errors import InputError
from qkv.hub import Checkpoint
from qkv.images import ImageProcessor
from qkv.models.bert import Bert
from qkv.models.gpt import GPT
from qkv.models.transformer import Transformer
from qkv.models.vit import ViT
from qkv.tokenizers import Tokenizer
from qkv.unread import Unread

if TYPE_CHECKING:
    from qkv.fast import Road

M = TypeVar("M", bound=Transformer | Bert | GPT | ViT)


class Guess(NamedTuple):
    """One possible answer and how probable the model finds it."""

    name: str
    probability: float


class NumberedError(InputError):
    """One of many inputs cannot be used."""

    def __init__(self, kind: Literal["text", "image"], number: int, said: str) -> None:
        """number: of the input among those given, from 0; said: what is wrong with it, and what to do."""
        super().__init__(f"{kind} {number} {said}")
        self.number = number
        self.said = said


class Pipeline(Generic[M]):
    """A model with what prepares its input. Calling it is calling the model, on its device."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.model: M = cast(M, checkpoint.model.to(device).eval())
        self.road: Road | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises InputError if it has none."""
        if self.checkpoint.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer: it works on ids, not on text")
        return self.checkpoint.tokenizer

    @property
    def images(self) -> ImageProcessor:
        """The checkpoint's image settings. Raises InputError if it has none."""
        if self.checkpoint.images is None:
            raise InputError(
                "this checkpoint has no preprocessor_config.json: how are images to be prepared?"
            )
        return self.checkpoint.images

    def attentions(self) -> dict[str, list[Tappable]]:
        """The model's attention modules, so that `qkv.record` takes a pipeline."""
        return self.model.attentions()

    def optimize(
        self, precision: InferencePrecision | Literal["auto"] = "auto", unread: Unread | None = None
    ) -> Self:
        """Make the model answer faster, as `qkv.fast.optimize` says; returns the pipeline itself."""
        from qkv.fast import optimize  # not needed to answer

        self.road = optimize(self.model, precision, unread)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the checkpoint as a Hugging Face folder. Raises InputError if it cannot be written."""
        if self.road is not None:
            raise InputError("an optimized model has no weights to save: load it anew, then save it")
        hub.save(folder, self.checkpoint)


def guesses(chances: Tensor, name: Callable[[int], str], top_k: int) -> list[list[Guess]]:
    """Each row of probabilities (N, K) as its likeliest answers, by their names."""
    best = chances.topk(min(top_k, chances.shape[1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[Guess(name(k), p) for k, p in zip(*row, strict=True)] for row in rows]


def check_top_k(top_k: int) -> None:
    """Raise InputError for fewer than one."""
    if top_k < 1:
        raise InputError(f"top_k is {top_k}; it must be at least 1")


def warn(message: str) -> None:
    """Tell the user something about the call that is being made."""
    warnings.warn(message, stacklevel=3)
