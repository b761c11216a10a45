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
from qkv.data.dataset import Dataset, Ids, slices
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
        augmentation, rows = self.augmentation, np.asarray(indices, np.int64)
        if augmentation is None:
            return ImageBatch(self.processor.normalize(self._pixels(rows)), self._labels(rows))
        looks, mixes = augmentation.draw(epoch, len(self))
        if mixes is not None:
            mixes = mixes.take(rows)
            rows = np.concatenate([rows, mixes.partners])  # (M,)
        looks = looks.take(rows)
        return RawImageBatch(
            self._pixels(rows, looks.regions),
            augmentation.labels(self._labels(rows), mixes),
            partial(augmentation.apply, looks=looks, mixes=mixes),
        )

    def _labels(self, rows: Ids) -> Tensor:
        return torch.from_numpy(self.labels[rows])

    def _pixels(self, rows: Ids, regions: np.ndarray | None = None) -> Tensor:
        """uint8 (M, C, S, S)."""
        if self.pixels is None:
            return self._decode(rows.tolist(), regions)
        return self.pixels.index_select(0, torch.from_numpy(rows))  # many times as fast as pixels[rows]

    def _decode(self, indices: Sequence[int], regions: np.ndarray | None = None) -> Tensor:
        """uint8 (M, C, S, S) of whole images or of their regions (M, 4)."""
        side = self.processor.size
        pixels = torch.empty(len(indices), self.processor.channels, side, side, dtype=torch.uint8)
        for row, index in enumerate(indices):
            region = None if regions is None else Region(*regions[row])
            pixels[row] = self.files[index].pixels(self.processor, region)
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
