"""Weights made small: rounded as said, within the budget, the least left out first."""

from __future__ import annotations

import base64
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from explanations import made
from qkv.explanations.explanation import Picture
from qkv.explanations.packing import pack, pack_attention, quantise, thumbnails


def unpack(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights that a page shows, from what `pack` wrote."""
    levels = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(shape)
    return (levels.astype(np.float32) / np.float32(255)) ** 2


shapes = array_shapes(min_dims=2, max_dims=2, max_side=20)
matrices = arrays(np.float16, shapes, elements=st.floats(0, 1, width=16))


@given(matrices)
def test_what_is_unpacked_is_what_was_packed_but_for_the_rounding(weights):
    shown = unpack(pack(quantise(weights)), weights.shape)
    assert np.abs(shown - weights.astype(np.float32)).max() <= 0.004


@given(matrices, st.floats(0, 1))
def test_what_is_left_out_is_what_is_small(weights, least: float):
    levels, small = quantise(weights, least), weights.astype(float) < least
    assert (levels[small] == 0).all()
    assert np.array_equal(levels[~small], quantise(weights)[~small])


@given(st.integers(1, 70), st.integers(1, 70))
def test_a_thumbnail_has_the_largest_weight_of_each_region(rows: int, columns: int):
    levels = np.random.default_rng(0).integers(0, 256, (1, 2, rows, columns), dtype=np.uint8)
    small = thumbnails(levels)
    R, C = min(rows, 32), min(columns, 32)
    assert small.shape == (1, 2, R, C)
    for r in range(R):
        for c in range(C):
            down = slice(r * rows // R, (r + 1) * rows // R)
            across = slice(c * columns // C, (c + 1) * columns // C)
            region = levels[:, :, down, across]
            assert np.array_equal(small[:, :, r, c], region.max((2, 3)))


def test_a_budget_is_kept_by_leaving_out_the_least():
    """All is kept where there is room; with less room, more is left out."""
    read = made.text(*(f" w{i}" for i in range(64)))
    stack = made.attention("encoder", read, read)
    found = []
    for budget in (10**6, 20_000, 8_000):
        (packed,), least = pack_attention([stack], budget)
        texts = [text for layer in packed.matrices for text in layer]
        assert sum(map(len, [*texts, packed.thumbnails])) * 3 / 4 <= budget
        shown = np.stack([unpack(text, (64, 64)) for text in texts]).reshape(stack.weights.shape)
        exact = stack.weights.astype(float)
        kept = np.where(exact >= least, exact, 0)
        assert np.abs(shown - kept).max() <= 0.004
        found.append(least)
    assert found[0] == 0 < found[1] < found[2]


def test_thumbnails_of_an_image_are_where_its_class_token_looks():
    explanation = made.seen()
    picture = explanation.picture
    assert isinstance(picture, Picture)
    (stack,) = explanation.attention
    (packed,), _ = pack_attention([stack], 10**6, picture)
    shown = unpack(packed.thumbnails, (3, 4, *picture.grid))
    assert shown == pytest.approx(stack.weights[:, :, 0, 1:].reshape(3, 4, 6, 6).astype(float), abs=0.004)


def test_a_stack_that_does_not_fit_at_all_is_still_shown():
    read = made.text(*(f" w{i}" for i in range(16)))
    stack = made.attention("encoder", read, read)
    certain = replace(stack, weights=np.broadcast_to(np.eye(16, dtype=np.float16), stack.weights.shape))
    (packed,), least = pack_attention([certain], 1)
    assert least > 0
    assert np.array_equal(unpack(packed.matrices[0][0], (16, 16)), np.eye(16))
