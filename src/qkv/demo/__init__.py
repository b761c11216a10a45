"""`qkv demo`: all four families trained on what every Python installation already holds.

Nothing is downloaded. Each family's file makes its data, names its recipe and baselines, and shows
what the trained model does; `report.html` is the page about all of them.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from qkv.config import Family
from qkv.demo import bert, gpt, transformer, vit
from qkv.demo.lab import Lab, Part
from qkv.errors import InputError, need
from qkv.files import replace_text
from qkv.report.page import page

PARTS: dict[Family, Callable[[Lab], Part]] = {
    "gpt": gpt.part,
    "bert": bert.part,
    "transformer": transformer.part,
    "vit": vit.part,
}
NEEDS: dict[Family, tuple[str, ...]] = {
    "gpt": (),
    "bert": ("sklearn",),
    "transformer": ("babel", "sacrebleu"),
    "vit": ("sklearn",),
}
"""Modules of the demo's extra packages."""
SCORES = "scores.json"
MARK = ".qkv-demo"
"""Says that a folder is a demo's, whose runs may be begun afresh."""


def run_demo(only: tuple[Family, ...], out: Path, console: Console, share: float = 1.0) -> None:
    """Train the families, then write `report.html` and `scores.json` into `out`.

    A folder of an earlier demo is begun afresh. share: of each recipe's optimiser steps. Raises
    InputError for a folder that is not a demo's, or if an extra package is missing.
    """
    need("the demo", "demo", *(package for family in only for package in NEEDS[family]))
    _claim(out)
    lab = Lab(out, console, share)
    started = time.monotonic()
    parts: list[Part] = []
    numbers: dict[str, object] = {}
    for family in [family for family in PARTS if family in only]:
        console.rule(family)
        begun = time.monotonic()
        part = PARTS[family](lab)
        seconds = time.monotonic() - begun
        parts.append(part)
        numbers[family] = {"seconds": round(seconds, 1), "held_out": part.scores.plain()}
        for name, row in part.scores.plain().items():
            shown = "  ".join(
                f"{m.name} {m.show(row[m.name])}" for m in part.scores.measures if m.name in row
            )
            console.print(f"  {name}: {shown}", highlight=False, markup=False)
        _write(out, parts, numbers)
    console.print(
        f"{time.monotonic() - started:.0f} s. See {out / 'report.html'}", highlight=False, markup=False
    )


def _claim(out: Path) -> None:
    """Make the folder, or take over that of an earlier demo."""
    if not (out / MARK).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} is there and is no demo's (it has no {MARK}): choose another --out")
        replace_text(out / MARK, "")


def _write(out: Path, parts: list[Part], numbers: dict[str, object]) -> None:
    """The page and the numbers about the families so far."""
    lead = (
        "Trained in minutes on what this Python installation already holds, and scored on data that they "
        f"have not seen, beside honest baselines. Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads."
    )
    replace_text(out / SCORES, json.dumps(numbers, indent=2) + "\n")
    cards, sections = [part.card() for part in parts], [part.section() for part in parts]
    replace_text(out / "report.html", page("Four Transformers, one attention", lead, cards, sections))
