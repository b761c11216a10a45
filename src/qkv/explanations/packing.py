"""Matrices of weights made small for a page, and what is left out of them.

A weight from 0 to 1 becomes a byte by its square root, so that small weights keep their digits; a matrix of
bytes is deflated and written in base64, which a browser inflates when it is looked at. What would make a page
too large are the many weights next to 0: they are left out, and it is said how small they are.

Legend: L layers, H heads, Uq and Uk units of queries and of keys, S side of a thumbnail.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qkv.explanations.explanation import Attention, Floats, Picture

Bytes = NDArray[np.uint8]

BUDGET = 3_500_000
"""Most bytes that the weights of one page take before base64 adds a third."""
_LEAST = (0.0, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2)
"""Below which weights are left out: the first that keeps the budget, or the last."""
_SIDE = 32


@dataclass(frozen=True)
class PackedAttention:
    """A stack's weights in base64."""

    matrices: tuple[tuple[str, ...], ...]
    """By layer and head, (Uq, Uk) bytes."""
    thumbnails: str
    """The largest weight of each of S x S regions, (L, H, S, S) bytes."""
    thumbnail: tuple[int, int]
    """Rows and columns of each."""


def pack_attention(
    stacks: Iterable[Attention], budget: int, picture: Picture | None = None
) -> tuple[tuple[PackedAttention, ...], float]:
    """Stacks within a budget of bytes, and the weight below which others are left out.

    Thumbnails are of whole matrices; of a picture, of where its class token looks.
    """
    given = tuple(stacks)
    for least in _LEAST:
        levels = [quantise(stack.weights, least) for stack in given]
        room = budget if least < _LEAST[-1] else math.inf
        if (packed := _within(levels, room, picture)) is not None:
            return packed, least
    raise AssertionError("the last has no limit")


def _within(levels: list[Bytes], room: float, picture: Picture | None) -> tuple[PackedAttention, ...] | None:
    """Each stack packed; None as soon as they take more bytes than there is room for."""
    packed, used = [], 0
    for stack in levels:
        whole = stack if picture is None else stack[:, :, 0, 1:].reshape(*stack.shape[:2], *picture.grid)
        small = thumbnails(whole)  # (L, H, S, S)
        heads: list[list[str]] = []
        for layer in stack:
            heads.append([])
            for head in layer:
                heads[-1].append(text := pack(head))
                used += len(text) * 3 // 4
                if used > room:
                    return None
        shape = (small.shape[2], small.shape[3])
        packed.append(PackedAttention(tuple(map(tuple, heads)), pack(small), shape))
        used += len(packed[-1].thumbnails) * 3 // 4
    return None if used > room else tuple(packed)


def quantise(weights: NDArray[np.float16] | Floats, least: float = 0.0) -> Bytes:
    """Weights from 0 to 1 as round(255 sqrt(weight)): at most 0.004 from what they were; 0 below `least`."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    known = np.where(every >= max(least, 0.0), every, 0.0)  # NaN and what is below 0 are 0
    levels = np.rint(255 * np.sqrt(np.minimum(known, 1.0))).astype(np.uint8)
    picked: Bytes = levels[weights.astype(np.float16).view(np.uint16)]  # all there can be, looked up
    return picked


def thumbnails(levels: Bytes) -> Bytes:
    """(L, H, Uq, Uk) to (L, H, S, S): the largest of each region; what is smaller stays as it is."""
    for axis in (2, 3):
        units = levels.shape[axis]
        side = min(units, _SIDE)
        levels = np.maximum.reduceat(levels, np.arange(side) * units // side, axis=axis)
    return levels


def pack(levels: Bytes) -> str:
    """Bytes deflated, in base64."""
    # Only runs, of zeros, are looked for: as small as by thorough search, and up to a hundred times as fast.
    deflate = zlib.compressobj(strategy=zlib.Z_RLE)
    return base64.b64encode(deflate.compress(levels.tobytes()) + deflate.flush()).decode("ascii")
