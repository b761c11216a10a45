"""Training images varied at random: crop, flip, RandAugment, erasing, mixup and CutMix.

What happens to a sample, the partner that it is mixed with included, depends on (seed, epoch, index) and on
how many samples there are: not on its batch, on how a step is divided, or on the number of devices. It is
drawn on the CPU, for all samples of an epoch at once. The pixels are worked on where training is, many images
at a time. Whatever an image does not cover, or loses by erasing, has the mean colour: 0 once normalised.

Legend: N samples, M images (those of the samples and, behind them, of their partners), C channels, S side in
pixels, R operations of RandAugment, K classes. A box is its left, top, right and bottom edge in whole pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.config import AugmentConfig
from qkv.data.dataset import Ids
from qkv.errors import InputError, need
from qkv.images import ImageProcessor, edges

CROP_RATIOS = 3 / 4, 4 / 3
"""Width / height of the parts of photos (Szegedy et al. 2015, 6)."""
ERASED_AREAS, ERASED_RATIOS = (0.02, 0.4), (0.3, 1 / 0.3)
"""Share of the image, and width / height, of what is erased (Zhong et al. 2020)."""


@dataclass(frozen=True, eq=False)
class Draws:
    """Arrays with a row for each image or sample; None: nothing of the kind was drawn."""

    def take(self, rows: Ids) -> Self:
        """The draws of some, in that order."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: a if a is None else a[rows] for name, a in arrays.items()})


@dataclass(frozen=True, eq=False)
class Looks(Draws):
    """How images look in one epoch."""

    regions: np.ndarray | None
    """(M, 4): the values of the Region of the file's image to take; None: all of it."""
    shifts: np.ndarray
    """(M, 2): where in the padded image its new left and top edges are."""
    mirrored: np.ndarray
    """(M,) bool: whether left and right change places."""
    operations: np.ndarray
    """(M, R): RandAugment's, first to last, as places in OPERATIONS."""
    strengths: np.ndarray
    """(M, R) float32 from -1 to 1: AutoAugment's full range one way or the other."""
    erased: np.ndarray
    """(M, 4): the box that is erased; without an area if nothing is."""


@dataclass(frozen=True, eq=False)
class Mixes(Draws):
    """What becomes of samples: outside the box its own image, inside a blend with its partner's."""

    partners: np.ndarray
    """(N,): index of the sample to mix with."""
    boxes: np.ndarray
    """(N, 4)"""
    own: np.ndarray
    """(N,) float32: share of its own image inside the box."""

    def shares(self, side: int) -> Tensor:
        """(N,): share of its own image, and so of its own label, in all."""
        left, top, right, bottom = torch.from_numpy(self.boxes).unbind(1)
        return 1 - (1 - torch.from_numpy(self.own)) * (right - left) * (bottom - top) / side**2


class Augmentation:
    """Draws what happens to samples, and does it to their pixels."""

    def __init__(self, config: AugmentConfig, processor: ImageProcessor, classes: int, seed: int) -> None:
        """Raises InputError if kornia is needed and missing, or the padding is wider than the images."""
        self.config = config
        self.processor = processor
        self.classes = classes
        self.seed = seed
        self.draw = lru_cache(maxsize=1)(self._draw)  # epochs come one after the other: the last is kept
        if config.randaugment:
            kornia_enhance()
        if config.crop_padding >= processor.size:
            raise InputError(
                f"augment.crop_padding is {config.crop_padding}; the images have only {processor.size} pixels"
            )

    def labels(self, labels: Tensor, mixes: Mixes | None) -> Tensor:
        """Classes (M,) -> the same if nothing is mixed, otherwise probabilities of classes (N, K)."""
        if mixes is None:
            return labels
        own = mixes.shares(self.processor.size)  # (N,)
        shares = torch.stack([own, 1 - own], 1)  # (N, 2)
        return torch.zeros(len(own), self.classes).scatter_add(1, labels.view(2, -1).T, shares)

    def apply(self, pixels: Tensor, looks: Looks, mixes: Mixes | None) -> Tensor:
        """uint8 (M, C, S, S) on any device -> normalised float32 (N, C, S, S)."""
        config, colour = self.config, self.processor.mean
        if config.crop_padding or config.flip:
            pixels = crop_and_flip(pixels, looks.shifts, looks.mirrored, config.crop_padding, colour)
        if config.randaugment:
            pixels = rand_augment(pixels, looks.operations, looks.strengths, colour)
        images = self.processor.normalize(pixels)
        if config.erasing:
            images = images.masked_fill(inside(looks.erased, images), 0.0)
        return images if mixes is None else mix(images, mixes)

    def _draw(self, epoch: int, samples: int) -> tuple[Looks, Mixes | None]:
        """How every one of that many samples looks in that epoch, and what it is mixed with, if it is."""
        rng = np.random.default_rng((self.seed, epoch, 1))  # without the 1, the Sampler's
        looks = self._looks(rng, samples)
        return looks, self._mixes(rng, samples) if self.config.mixup or self.config.cutmix else None

    def _looks(self, rng: np.random.Generator, N: int) -> Looks:
        config, strength = self.config, self.config.magnitude / 10
        cropped, each = config.crop_area < 1, (N, config.randaugment)
        erased, where = np.zeros((N, 4), np.int64), np.flatnonzero(rng.random(N) < config.erasing)
        erased[where] = self._boxes(_draw_regions(rng, len(where), ERASED_AREAS, ERASED_RATIOS))
        return Looks(
            regions=_draw_regions(rng, N, (config.crop_area, 1.0), CROP_RATIOS) if cropped else None,
            shifts=rng.integers(2 * config.crop_padding + 1, size=(N, 2)),
            mirrored=config.flip & (rng.random(N) < 0.5),
            operations=rng.integers(len(OPERATIONS), size=each),
            strengths=rng.choice(np.array([-strength, strength], np.float32), each),
            erased=erased,
        )

    def _mixes(self, rng: np.random.Generator, N: int) -> Mixes:
        """Zhang et al. 2018, 2, or Yun et al. 2019, equations 1 and 2, with the box wholly in the image.

        A partner is drawn from all samples, as Zhang et al. define it, and not from the batch, as their code
        does: so batches of any division agree, at the price of twice as many images to prepare.
        """
        config, side = self.config, self.processor.size
        cut = rng.random(N) < (0.5 if config.mixup and config.cutmix else float(config.cutmix > 0))
        alphas = np.where(cut, config.cutmix, config.mixup)
        shares = rng.beta(alphas, alphas)  # (N,)
        regions = np.stack([1 - shares, np.ones(N), *rng.random((2, N))], -1)  # (N, 4)
        return Mixes(
            partners=rng.integers(N, size=N),
            boxes=np.where(cut[:, None], self._boxes(regions), (0, 0, side, side)),
            own=np.where(cut, 0.0, shares).astype(np.float32),
        )

    def _boxes(self, regions: np.ndarray) -> np.ndarray:
        """Values of Regions (N, 4) -> their boxes (N, 4)."""
        return edges(regions, self.processor.size, self.processor.size).round().astype(np.int64)


def _draw_regions(
    rng: np.random.Generator, N: int, areas: tuple[float, float], ratios: tuple[float, float]
) -> np.ndarray:
    """Values of Regions (N, 4): area uniform, ratio uniform in its logarithm, place uniform."""
    low, high = np.log(ratios)
    return np.stack([rng.uniform(*areas, N), np.exp(rng.uniform(low, high, N)), *rng.random((2, N))], -1)


def _on(device: torch.device, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


# ---------------------------------------------------------------- places


def crop_and_flip(
    pixels: Tensor, shifts: np.ndarray, mirrored: np.ndarray, padding: int, colour: Sequence[float]
) -> Tensor:
    """Pad with the colour (C shares of 255), cut at shifts (M, 2) from left and top, mirror where (M,) says.

    uint8 (M, C, S, S) -> uint8 (M, C, S, S).
    """
    M, C, S, _ = pixels.shape
    width = S + 2 * padding
    left, top = _on(pixels.device, shifts)[:, :, None].unbind(1)  # (M, 1) each
    fill = torch.tensor(colour).mul(255).round().to(pixels, non_blocking=True)
    padded = fill.view(1, C, 1, 1).repeat(M, 1, width, width)
    padded[:, :, padding : padding + S, padding : padding + S] = pixels
    line = torch.arange(S, device=pixels.device)
    columns = left + torch.where(_on(pixels.device, mirrored)[:, None], S - 1 - line, line)  # (M, S)
    rows = top + line  # (M, S)
    cells = rows[:, :, None] * width + columns[:, None]  # (M, S, S)
    cells = cells.flatten(1)[:, None].expand(-1, C, -1)  # (M, C, S * S)
    return padded.flatten(2).gather(2, cells).view_as(pixels)


def inside(boxes: np.ndarray, images: Tensor) -> Tensor:
    """Which pixels of images (M, C, S, S) are inside each one's box (M, 4): (M, 1, S, S) bool."""
    line = torch.arange(images.shape[-1], device=images.device)  # (S,)
    left, top, right, bottom = _on(images.device, boxes)[:, :, None].unbind(1)  # (M, 1) each
    rows = (top <= line) & (line < bottom)  # (M, S)
    columns = (left <= line) & (line < right)
    return (rows[:, :, None] & columns[:, None])[:, None]


def mix(images: Tensor, mixes: Mixes) -> Tensor:
    """Images of N samples and of their partners (2N, C, S, S) -> (N, C, S, S)."""
    own, other = images.chunk(2)
    blend = _on(images.device, mixes.own).view(-1, 1, 1, 1)
    share = torch.where(inside(mixes.boxes, own), blend, 1.0)  # (N, 1, S, S)
    return torch.lerp(other, own, share)


# ---------------------------------------------------------------- RandAugment

AFFINE: Mapping[str, Callable[[np.ndarray], tuple[Any, ...]]] = {
    "rotate": lambda s: (np.cos(_TURN * s), -np.sin(_TURN * s), 0, np.sin(_TURN * s), np.cos(_TURN * s), 0),
    "shear_x": lambda s: (1, 0.3 * s, 0, 0, 1, 0),
    "shear_y": lambda s: (1, 0, 0, 0.3 * s, 1, 0),
    "translate_x": lambda s: (1, 0, s * _TRANSLATION, 0, 1, 0),
    "translate_y": lambda s: (1, 0, 0, 0, 1, s * _TRANSLATION),
}
"""Where a pixel's colour comes from, by strengths (m,) from -1 to 1: the rows of 2 x 3 matrices for
coordinates from -1 to 1. The ranges are those of AutoAugment (Cubuk et al. 2019, table 6)."""

COLOURS: Mapping[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "identity": lambda enhance, x, s: x,
    "autocontrast": lambda enhance, x, s: enhance.normalize_min_max(x),
    "equalize": lambda enhance, x, s: enhance.equalize(x),
    "solarize": lambda enhance, x, s: enhance.solarize(x, 256 / 255 * (1 - s.abs())),
    "posterize": lambda enhance, x, s: enhance.posterize(x, (8 - 4 * s.abs()).round().int()),
    "color": lambda enhance, x, s: enhance.adjust_saturation_with_gray_subtraction(x, 1 + 0.9 * s),
    "contrast": lambda enhance, x, s: enhance.adjust_contrast_with_mean_subtraction(x, 1 + 0.9 * s),
    "brightness": lambda enhance, x, s: enhance.adjust_brightness_accumulative(x, 1 + 0.9 * s),
    "sharpness": lambda enhance, x, s: enhance.sharpness(x, 1 + 0.9 * s),
}
"""By kornia.enhance, from values from 0 to 1 (m, C, S, S) and strengths from -1 to 1 (m,) to such values.
The sign of a strength means nothing to operations that go one way only."""

OPERATIONS: tuple[str, ...] = (*COLOURS, *AFFINE)
"""The fourteen of Cubuk et al. 2020, figure 2."""

_TRANSLATION = 2 * 150 / 331
"""AutoAugment's 150 of 331 pixels; an image is 2 wide."""
_TURN: float = math.radians(30)


def kornia_enhance() -> Any:
    """kornia's module of colour operations. Raises InputError if it is not installed."""
    need("augment.randaugment", "vision", "kornia")
    from kornia import enhance

    return enhance


def rand_augment(
    pixels: Tensor, operations: np.ndarray, strengths: np.ndarray, colour: Sequence[float]
) -> Tensor:
    """R operations on each image, first to last (Cubuk et al. 2020): places in OPERATIONS, strengths (M, R).

    Images with the same operation are worked on together, and those with any affine one in one warp, which
    shows the colour (C values from 0 to 1) outside an image.

    Values from 0 to 255 (M, C, S, S) -> float32 of that shape and range.
    """
    enhance, device = kornia_enhance(), pixels.device
    outside = torch.tensor(colour).view(-1, 1, 1).to(device, non_blocking=True)  # (C, 1, 1)
    images = pixels / 255
    for stage, strong in zip(operations.T, strengths.T, strict=True):
        kinds = np.minimum(stage, len(COLOURS))  # (M,): the affine ones are of one kind
        for kind in np.unique(kinds):
            rows = np.flatnonzero(kinds == kind)
            where = _on(device, rows)
            some = images.index_select(0, where)  # (m, C, S, S)
            if kind == len(COLOURS):
                seen = _warp(some - outside, _on(device, _matrices(stage[rows], strong[rows])))
                varied = (seen + outside).clamp(0.0, 1.0)
            else:
                varied = COLOURS[OPERATIONS[kind]](enhance, some, _on(device, strong[rows]))
            images.index_copy_(0, where, varied)
    return images * 255


def _matrices(operations: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Of affine operations (m,), as places in OPERATIONS, with strengths (m,): float32 (m, 6)."""
    matrices = np.empty((len(operations), 6), np.float32)
    for place, entries in enumerate(AFFINE.values(), start=len(COLOURS)):
        rows = np.flatnonzero(operations == place)
        matrices[rows] = np.stack(np.broadcast_arrays(*entries(strengths[rows])), -1)
    return matrices


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Images (m, C, S, S) seen through matrices (m, 6); 0 outside."""
    grid = F.affine_grid(matrices.view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
