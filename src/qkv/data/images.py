"""Images with a class.

Legend: N images, C channels, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qkv.data.batches import ImageBatch
from qkv.data.dataset import Dataset
from qkv.data.raw import ImageFile
from qkv.images import ImageProcessor

KEEP_BYTES = 2 << 30
"""Data sets whose pixels need no more memory than this are decoded once; larger ones at every use."""


class ImageDataset(Dataset):
    """Images as the processor makes them, and the index of each one's class."""

    def __init__(
        self, files: Sequence[ImageFile], labels: Sequence[int], processor: ImageProcessor, patch_size: int
    ) -> None:
        """Raises InputError for a broken image, which for large data is found only when it is used."""
        self.files = files
        self.labels = np.asarray(labels)
        self.processor = processor
        self.costs = np.full(len(files), (processor.size // patch_size) ** 2)
        size = len(files) * processor.channels * processor.size**2
        self.pixels = self._decode(range(len(files))) if size <= KEEP_BYTES else None  # (all, C, S, S)

    def batch(self, indices: Sequence[int], epoch: int) -> ImageBatch:
        """Normalised images (N, C, S, S) and classes (N,); the same in every epoch."""
        pixels = self._decode(indices) if self.pixels is None else self.pixels[list(indices)]
        return ImageBatch(self.processor.normalize(pixels), torch.from_numpy(self.labels[list(indices)]))

    def _decode(self, indices: Sequence[int]) -> Tensor:
        """uint8 (N, C, S, S)."""
        side = self.processor.size
        pixels = torch.empty(len(indices), self.processor.channels, side, side, dtype=torch.uint8)
        for row, index in enumerate(indices):
            pixels[row] = self.files[index].pixels(self.processor)
        return pixels
