"""How far long work is: who does it tells, who shows it listens."""

from __future__ import annotations

from collections.abc import Callable

Watch = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is to do."""


def unwatched(doing: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""
