"""What is in images.

Legend: N images of a batch, C channels, S their side, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar, cast, overload

import torch
from PIL import Image
from torch import Tensor

from qkv import batching
from qkv.batching import in_order
from qkv.errors import InputError
from qkv.models.vit import ViT, ViTOutput
from qkv.pipelines.base import Guess, NumberedError, Pipeline, check_top_k, guesses

ImageLike = Image.Image | str | Path | bytes
"""An image, its path, or its file's bytes."""
AnyImage = TypeVar("AnyImage", bound=ImageLike)


class ImageClassifier(Pipeline[ViT]):
    """Names what is in an image."""

    def __call__(self, images: Tensor) -> ViTOutput:
        """The model on normalised images (N, C, height, width)."""
        return cast(ViTOutput, self.model(images.to(self.device)))

    @overload
    def classify(self, images: ImageLike, top_k: int = 5) -> list[Guess]: ...
    @overload
    def classify(self, images: list[AnyImage], top_k: int = 5) -> list[list[Guess]]: ...
    @overload
    def classify(self, images: Iterator[AnyImage], top_k: int = 5) -> Iterator[list[Guess]]: ...
    def classify(
        self, images: ImageLike | list[AnyImage] | Iterator[AnyImage], top_k: int = 5
    ) -> list[Guess] | list[list[Guess]] | Iterator[list[Guess]]:
        """The likeliest classes of an image, or of each of a list; an image can be a path or a file's bytes.

        Raises InputError for an image that cannot be read, or if the model has no head.
        """
        if isinstance(images, ImageLike):
            return self.classify([images], top_k)[0]
        check_top_k(top_k)
        labels = self.model.config.labels
        if not labels:
            raise InputError("this model has no classification head: fine-tune it first")
        tokens = (self.images.size // self.model.config.patch_size) ** 2 + 1

        def read(window: list[AnyImage], first: int) -> list[Tensor]:
            return [self._pixels(image, first + i) for i, image in enumerate(window)]

        @torch.inference_mode()
        def answers(batch: list[Tensor]) -> list[list[Guess]]:
            logits = self(torch.stack(batch)).logits
            assert logits is not None  # (N, K)
            return guesses(logits.float().softmax(-1), labels.__getitem__, top_k)

        # All cost the same, so a window of one batch is as good as a longer one.
        found = in_order(
            images, read, lambda _: tokens, answers, lambda _: tokens, batching.BATCH_TOKENS - tokens + 1
        )
        return found if isinstance(images, Iterator) else list(found)

    def _pixels(self, image: ImageLike, number: int) -> Tensor:
        """(C, S, S)"""
        try:
            return self.images(image)
        except InputError as error:
            if isinstance(image, str | Path):  # then the error names it
                raise
            raise NumberedError("image", number, f"cannot be used: {error}") from None
