"""Training images varied at random: crop, flip, RandAugment, erasing, mixup and CutMix.

What happens to a sample, the partner that it is mixed with included, is drawn on the CPU and depends on
(seed, epoch, index) alone: not on its batch, on how a step is divided, or on the number of devices. The
pixels are worked on where training is, many images at a time. Whatever an image does not cover, or loses by
erasing, has the mean colour, which is 0 once normalised.

Legend: N samples, M images (those of the samples and, behind them, of their partners), C channels, S side in
pixels, R operations of RandAugment, K classes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.config import AugmentConfig
from qkv.errors import InputError
from qkv.images import ImageProcessor, Region

Box = tuple[int, int, int, int]
"""Left, top, right and bottom edge in whole pixels."""

Operation = tuple[str, float]
"""One of OPERATIONS, and its strength from -1 to 1: AutoAugment's full range one way or the other."""

CROP_RATIOS = 3 / 4, 4 / 3
"""Width / height of the parts of photos (Szegedy et al. 2015, 6)."""
ERASED_AREAS, ERASED_RATIOS = (0.02, 0.4), (0.3, 1 / 0.3)
"""Share of the image, and width / height, of what is erased (Zhong et al. 2020)."""


@dataclass(frozen=True)
class Look:
    """How one image looks in one epoch."""

    region: Region | None
    """The part of the file's image to take; None: all of it."""
    shift: tuple[int, int]
    """Where in the padded image its new left and top edges are."""
    mirrored: bool
    """Whether left and right change places."""
    operations: tuple[Operation, ...]
    """R of RandAugment's, first to last."""
    erased: Box
    """What is erased of it; without an area if nothing is."""


@dataclass(frozen=True)
class Mix:
    """What becomes of one sample: outside the box its own image, inside a blend with its partner's."""

    partner: int
    """Index of the sample to mix with."""
    box: Box
    own: float
    """Share of its own image inside the box."""

    def share(self, side: int) -> float:
        """Share of its own image, and so of its own label, in all."""
        return 1 - (1 - self.own) * _area(self.box) / side**2


class Augmentation:
    """Draws what happens to samples, and does it to their pixels."""

    def __init__(self, config: AugmentConfig, processor: ImageProcessor, classes: int, seed: int) -> None:
        """Raises InputError if kornia is needed and missing, or the padding is wider than the images."""
        self.config = config
        self.processor = processor
        self.classes = classes
        self.seed = seed
        if config.randaugment:
            kornia_enhance()
        if config.crop_padding >= processor.size:
            raise InputError(
                f"augment.crop_padding is {config.crop_padding}; the images have only {processor.size} pixels"
            )

    def looks(self, indices: Sequence[int], epoch: int) -> list[Look]:
        """How the samples look in that epoch."""
        return [self._look(np.random.default_rng((self.seed, epoch, i))) for i in indices]

    def mixes(self, indices: Sequence[int], epoch: int, samples: int) -> list[Mix]:
        """What each sample is mixed with, of a data set of that many; none if nothing is mixed.

        A partner is drawn from all samples, as Zhang et al. 2018 define it, and not from the batch, as their
        code does: so batches of any division agree, at the price of twice as many images to prepare.
        """
        if not self.config.mixup and not self.config.cutmix:
            return []
        return [self._mix(np.random.default_rng((self.seed, epoch, i, 1)), samples) for i in indices]

    def labels(self, labels: Tensor, mixes: Sequence[Mix]) -> Tensor:
        """Classes (M,) -> the same if nothing is mixed, otherwise probabilities of classes (N, K)."""
        if not mixes:
            return labels
        own, other = F.one_hot(labels, self.classes).float().chunk(2)  # (N, K) each
        share = torch.tensor([mix.share(self.processor.size) for mix in mixes])[:, None]  # (N, 1)
        return share * own + (1 - share) * other

    def apply(self, pixels: Tensor, looks: Sequence[Look], mixes: Sequence[Mix]) -> Tensor:
        """uint8 (M, C, S, S) on any device -> normalised float32 (N, C, S, S)."""
        config, device = self.config, pixels.device
        if config.crop_padding or config.flip:
            shifts = torch.tensor([look.shift for look in looks], device=device)
            mirrored = torch.tensor([look.mirrored for look in looks], device=device)
            pixels = crop_and_flip(pixels, shifts, mirrored, config.crop_padding, self.processor.mean)
        if config.randaugment:
            pixels = rand_augment(pixels, [look.operations for look in looks], self.processor.mean)
        images = self.processor.normalize(pixels)
        if config.erasing:
            images = images.masked_fill(inside([look.erased for look in looks], images), 0.0)
        return mix(images, mixes) if mixes else images

    def _look(self, rng: np.random.Generator) -> Look:
        config, side, strength = self.config, self.processor.size, self.config.magnitude / 10
        region = _draw_region(rng, (config.crop_area, 1.0), CROP_RATIOS) if config.crop_area < 1 else None
        places = 2 * config.crop_padding + 1
        shift = _below(rng, places), _below(rng, places)
        mirrored = config.flip and bool(rng.random() < 0.5)
        operations = tuple(
            (OPERATIONS[_below(rng, len(OPERATIONS))], strength if rng.random() < 0.5 else -strength)
            for _ in range(config.randaugment)
        )
        erased = (0, 0, 0, 0)
        if rng.random() < config.erasing:
            erased = _whole(_draw_region(rng, ERASED_AREAS, ERASED_RATIOS), side)
        return Look(region, shift, mirrored, operations, erased)

    def _mix(self, rng: np.random.Generator, samples: int) -> Mix:
        """Zhang et al. 2018, 2, or Yun et al. 2019, equations 1 and 2, with the box wholly in the image."""
        config, side = self.config, self.processor.size
        partner = _below(rng, samples)
        cut = rng.random() < (0.5 if config.mixup and config.cutmix else float(config.cutmix > 0))
        alpha = config.cutmix if cut else config.mixup
        share = float(rng.beta(alpha, alpha))
        if cut:
            return Mix(partner, _whole(Region(1 - share, 1.0, rng.random(), rng.random()), side), own=0.0)
        return Mix(partner, (0, 0, side, side), own=share)


def _below(rng: np.random.Generator, limit: int) -> int:
    """A whole number from 0 up to but without the limit; ten times as fast as `rng.integers`."""
    return int(rng.random() * limit)


def _draw_region(rng: np.random.Generator, areas: tuple[float, float], ratios: tuple[float, float]) -> Region:
    """Area uniform, ratio uniform in its logarithm, place uniform."""
    low, high = ratios
    return Region(
        rng.uniform(*areas), math.exp(rng.uniform(math.log(low), math.log(high))), rng.random(), rng.random()
    )


def _whole(region: Region, side: int) -> Box:
    left, top, right, bottom = (round(edge) for edge in region.box(side, side))
    return left, top, right, bottom


def _area(box: Box) -> int:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


# ---------------------------------------------------------------- places


def crop_and_flip(
    pixels: Tensor, shifts: Tensor, mirrored: Tensor, padding: int, colour: Sequence[float]
) -> Tensor:
    """Pad with the colour (C shares of 255), cut at shifts (M, 2) from left and top, mirror where (M,) says.

    uint8 (M, C, S, S) -> uint8 (M, C, S, S).
    """
    M, C, S, _ = pixels.shape
    width = S + 2 * padding
    fill = torch.tensor(colour, device=pixels.device).mul(255).round().to(pixels.dtype)
    padded = fill.view(1, C, 1, 1).repeat(M, 1, width, width)
    padded[:, :, padding : padding + S, padding : padding + S] = pixels
    line = torch.arange(S, device=pixels.device)
    columns = shifts[:, :1] + torch.where(mirrored[:, None], S - 1 - line, line)  # (M, S)
    rows = shifts[:, 1:] + line  # (M, S)
    cells = rows[:, :, None] * width + columns[:, None]  # (M, S, S)
    cells = cells.flatten(1)[:, None].expand(-1, C, -1)  # (M, C, S * S)
    return padded.flatten(2).gather(2, cells).view_as(pixels)


def inside(boxes: Sequence[Box], images: Tensor) -> Tensor:
    """Which pixels of images (M, C, S, S) are inside each one's box: (M, 1, S, S) bool."""
    line = torch.arange(images.shape[-1], device=images.device)  # (S,)
    edges = torch.tensor(boxes, device=images.device)[:, :, None]  # (M, 4, 1)
    left, top, right, bottom = edges.unbind(1)  # (M, 1) each
    rows = (top <= line) & (line < bottom)  # (M, S)
    columns = (left <= line) & (line < right)
    return (rows[:, :, None] & columns[:, None])[:, None]


def mix(images: Tensor, mixes: Sequence[Mix]) -> Tensor:
    """Images of N samples and of their partners (2N, C, S, S) -> (N, C, S, S)."""
    own, other = images.chunk(2)
    blend = torch.tensor([mix.own for mix in mixes], device=images.device).view(-1, 1, 1, 1)
    share = torch.where(inside([mix.box for mix in mixes], own), blend, 1.0)  # (N, 1, S, S)
    return torch.lerp(other, own, share)


# ---------------------------------------------------------------- RandAugment

AFFINE: Mapping[str, Callable[[float], tuple[float, ...]]] = {
    "rotate": lambda s: _rotation(math.radians(30 * s)),
    "shear_x": lambda s: (1, 0.3 * s, 0, 0, 1, 0),
    "shear_y": lambda s: (1, 0, 0, 0.3 * s, 1, 0),
    "translate_x": lambda s: (1, 0, s * _TRANSLATION, 0, 1, 0),
    "translate_y": lambda s: (1, 0, 0, 0, 1, s * _TRANSLATION),
}
"""Where a pixel's colour comes from, by the operation's strength from -1 to 1: the rows of a 2 x 3 matrix for
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


def _rotation(angle: float) -> tuple[float, ...]:
    sine, cosine = math.sin(angle), math.cos(angle)
    return cosine, -sine, 0, sine, cosine, 0


def kornia_enhance() -> Any:
    """kornia's module of colour operations. Raises InputError if it is not installed."""
    try:
        from kornia import enhance
    except ImportError:
        raise InputError("augment.randaugment uses kornia: pip install 'qkv[vision]'") from None
    return enhance


def rand_augment(
    pixels: Tensor, operations: Sequence[Sequence[Operation]], colour: Sequence[float]
) -> Tensor:
    """R operations on each image, first to last (Cubuk et al. 2020).

    Images whose operations have the same name are worked on together, and all affine ones are one warp, which
    shows the colour (C values from 0 to 1) outside an image.

    Values from 0 to 255 (M, C, S, S) -> float32 of that shape and range.
    """
    enhance = kornia_enhance()
    outside = torch.tensor(colour, device=pixels.device).view(-1, 1, 1)  # (C, 1, 1)
    images = pixels / 255
    for stage in zip(*operations, strict=True):
        groups: dict[str, list[int]] = defaultdict(list)
        for row, (name, _) in enumerate(stage):
            groups["affine" if name in AFFINE else name].append(row)
        for name, rows in groups.items():
            where = torch.tensor(rows, device=images.device)
            some = images[where]  # (m, C, S, S)
            if name == "affine":
                matrices = [AFFINE[name](strength) for name, strength in (stage[row] for row in rows)]
                seen = _warp(some - outside, torch.tensor(matrices, device=images.device))
                varied = (seen + outside).clamp(0.0, 1.0)
            else:
                strengths = torch.tensor([stage[row][1] for row in rows], device=images.device)
                varied = COLOURS[name](enhance, some, strengths)
            images[where] = varied
    return images * 255


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Images (m, C, S, S) seen through matrices (m, 6); 0 outside."""
    grid = F.affine_grid(matrices.view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
