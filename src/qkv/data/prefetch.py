"""The next batches, made in the background while the step runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

X = TypeVar("X")
Y = TypeVar("Y")

_END = object()


@contextmanager
def prefetch(make: Callable[[X], Y], items: Iterator[X], depth: int = 2) -> Iterator[Iterator[Y]]:
    """`map(make, items)`, computed by one thread that is at most `depth` results ahead of its reader.

    `with prefetch(make, items) as results: for result in results: ...` An exception of `make` or `items` is
    raised where its result would have been. Leaving the block, in whatever way, waits for the result that
    is being made and ends the thread. `make` must be a pure function: it runs while other code does.
    depth 0: no thread, results are computed when they are read.
    """
    made = map(make, items)
    if depth == 0:
        yield made
        return
    with ThreadPoolExecutor(1, "prefetch") as thread:
        pending = deque(thread.submit(next, made, _END) for _ in range(depth))

        def results() -> Iterator[Y]:
            while (result := pending.popleft().result()) is not _END:
                pending.append(thread.submit(next, made, _END))
                yield result  # type: ignore[misc]

        try:
            yield results()
        finally:
            for future in pending:
                future.cancel()
