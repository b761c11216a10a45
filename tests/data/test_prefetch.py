"""Prefetching is `map`: same results, same order, same errors, and no thread is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkv.data import prefetch


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@given(items=st.lists(st.integers()), depth=st.integers(0, 5))
def test_results_are_those_of_map(items: list[int], depth: int) -> None:
    with prefetch(lambda x: 2 * x, iter(items), depth) as results:
        assert list(results) == [2 * x for x in items]
    assert not _threads()


@given(depth=st.integers(0, 4), read=st.integers(0, 6))
def test_never_more_than_depth_ahead_of_the_reader(depth: int, read: int) -> None:
    taken: list[int] = []
    with prefetch(taken.append, count(), depth) as results:
        for _ in range(read):
            next(results)
            assert len(taken) <= read + depth
    assert taken == list(range(len(taken))) and len(taken) <= read + depth
    assert not _threads()


def test_results_are_made_while_the_reader_is_busy() -> None:
    made = [threading.Event() for _ in range(3)]
    with prefetch(lambda i: made[i].set(), iter(range(3)), depth=2) as results:
        next(results)
        assert made[1].wait(10) and made[2].wait(10)  # the reader asks for nothing


@pytest.mark.parametrize("where", ["make", "items"])
def test_an_error_comes_where_its_result_would_have(where: str) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        if where == "items":
            raise LookupError("three")
        yield from count(3)

    def make(x: int) -> int:
        if x == 3:
            raise LookupError("three")
        return x

    seen = []
    with pytest.raises(LookupError, match="three"), prefetch(make, items()) as results:
        for result in results:
            seen.append(result)  # noqa: PERF402 - the loop is what is tested
    assert seen == [0, 1, 2]
    assert not _threads()


def test_an_interrupted_reader_leaves_no_thread() -> None:
    with pytest.raises(KeyboardInterrupt), prefetch(str, count(), depth=3) as results:
        for result in results:
            if result == "5":
                raise KeyboardInterrupt
    assert not _threads()
