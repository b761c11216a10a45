"""What each idea is worth: from a published setting to a recipe's, one change at a time.

usage: python benchmarks/changes.py ROAD --data FOLDER [--seeds 0 1 2] [--out FOLDER]

Every step of a road keeps the changes before it. Its runs are shorter than the recipe's, so that all of them
take minutes with several seeds; they are kept as those of results.py, whose data FOLDER this is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from results import HEADER, RESULTS, SHAKESPEARE, Result, found, rows

ROADS: dict[str, tuple[str, tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "gpt": (
        "gpt-shakespeare-cpu",
        (*SHAKESPEARE, "--train.max-steps", "1000", "--train.eval-steps", "1000"),
        {
            "AdamW, learned positions, GELU": (
                *("--train.optimizer", "adamw", "--model.activation", "gelu"),
                *("--model.position", "learned", "--model.no-qk-norm"),
            ),
            "Muon": ("--train.optimizer", "muon"),
            "rotary positions": ("--model.position", "rotary"),
            "norms of queries and keys": ("--model.qk-norm",),
            "squared ReLU": ("--model.activation", "relu2"),
        },
    ),
}
"""A recipe, what all runs are given, and the settings that each step changes."""


def steps(road: str) -> dict[str, Result]:
    """The runs of a road, by what each adds."""
    recipe, given, changes = ROADS[road]
    settings: dict[str, tuple[str, ...]] = {}
    made = {}
    for title, change in changes.items():
        flags = [i for i, word in enumerate(change) if word.startswith("--")]
        for start, end in zip(flags, [*flags[1:], len(change)], strict=True):
            settings[change[start].replace("--model.no-", "--model.")] = change[start:end]
        every = tuple(word for setting in settings.values() for word in setting)
        made[title] = Result(recipe, (*given, *every), RESULTS[recipe].figures[:1])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("road", choices=ROADS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/changes"))
    given = parser.parse_args()
    print(HEADER)
    for number, (title, result) in enumerate(steps(given.road).items()):
        name = f"{given.road}-{number}"
        try:
            seeds = {seed: found(name, result, seed, given.data, given.out) for seed in given.seeds}
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)  # it has said why
        print(rows(f"{'+ ' if number else ''}{title}", result, seeds), flush=True)


if __name__ == "__main__":
    main()
