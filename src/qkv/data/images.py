"""Images with a class.

Legend: N images of the batch, M with their partners in mixup and CutMix, C channels, S side in pixels,
K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np
import PIL
import torch
from torch import Tensor

from qkv.data.augment import Augmentation
from qkv.data.batches import ImageBatch, RawImageBatch
from qkv.data.cache import LIMIT_BYTES, NO_CACHE, Cache, Chunks, Columns, fingerprint
from qkv.data.dataset import Dataset, slices
from qkv.data.raw import ImageFile
from qkv.images import ImageProcessor, Region

KEEP_BYTES = 2 << 30
"""Pixels are decoded once if they need no more memory than this, or no more disk than a cache may have;
otherwise at every use."""
PILLOW = f"pillow {PIL.__version__}"
"""What turns files into pixels."""
_DECODED = 256
"""Images decoded before they are written to the cache."""


class ImageDataset(Dataset):
    """Images as the processor makes them, varied where there is an augmentation, and each one's class."""

    def __init__(
        self,
        files: Sequence[ImageFile],
        labels: Sequence[int],
        processor: ImageProcessor,
        patch_size: int,
        cache: Cache = NO_CACHE,
        augmentation: Augmentation | None = None,
    ) -> None:
        """Raises InputError for a broken image, which for large data is found only when it is used."""
        self.files = files
        self.labels = np.asarray(labels)
        self.processor = processor
        self.augmentation = augmentation
        self.costs = np.full(len(files), (processor.size // patch_size) ** 2)
        size = len(files) * processor.channels * processor.size**2
        made_from = _fingerprint(files, processor, by_content=size <= LIMIT_BYTES)
        self.fingerprint = fingerprint("images", made_from, self.labels.tobytes())
        pixels: Columns | None = None
        whole = augmentation is None or augmentation.config.crop_area == 1
        if whole and size <= LIMIT_BYTES:
            decode = cache.get if size <= KEEP_BYTES else cache.keep
            pixels = decode(made_from, PILLOW, self._chunks, "images decoded", len(files))
        self.pixels = None if pixels is None else torch.from_numpy(pixels["pixels"])  # (all, C, S, S)

    def batch(self, indices: Sequence[int], epoch: int) -> ImageBatch | RawImageBatch:
        """Normalised images (N, C, S, S) and classes (N,), the same in every epoch.

        With an augmentation: pixels of which the training device makes that epoch's images, and classes (N,)
        or, where images are mixed, their probabilities (N, K).
        """
        augmentation = self.augmentation
        if augmentation is None:
            return ImageBatch(self.processor.normalize(self._pixels(indices)), self._labels(indices))
        mixes = augmentation.mixes(indices, epoch, len(self))
        indices = [*indices, *(mix.partner for mix in mixes)]  # (M,)
        looks = augmentation.looks(indices, epoch)
        return RawImageBatch(
            self._pixels(indices, [look.region for look in looks]),
            augmentation.labels(self._labels(indices), mixes),
            partial(augmentation.apply, looks=looks, mixes=mixes),
        )

    def _labels(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.labels[list(indices)])

    def _pixels(self, indices: Sequence[int], regions: Sequence[Region | None] = ()) -> Tensor:
        """uint8 (M, C, S, S)."""
        return self._decode(indices, regions) if self.pixels is None else self.pixels[list(indices)]

    def _decode(self, indices: Sequence[int], regions: Sequence[Region | None] = ()) -> Tensor:
        """uint8 (M, C, S, S) of whole images or of their regions."""
        side = self.processor.size
        pixels = torch.empty(len(indices), self.processor.channels, side, side, dtype=torch.uint8)
        for row, index in enumerate(indices):
            pixels[row] = self.files[index].pixels(self.processor, regions[row] if regions else None)
        return pixels

    def _chunks(self) -> Chunks:
        """All images' pixels, some at a time."""
        for some in slices(len(self.files), _DECODED):
            indices = range(len(self.files))[some]
            yield len(indices), {"pixels": self._decode(indices).numpy()}


def _fingerprint(files: Sequence[ImageFile], processor: ImageProcessor, by_content: bool) -> str:
    """Of the files' bytes, which are quicker read than decoded; of too many, only how many bytes each has.

    Names and times are left out: they change when data are copied.
    """
    sha = hashlib.sha256()
    for file in files:
        sha.update(
            hashlib.sha256(file.content()).digest() if by_content else file.size().to_bytes(8, "little")
        )
    return fingerprint("pixels", f"{processor.size} {processor.channels} {processor.resample}", sha.digest())
