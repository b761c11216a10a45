"""What each precision costs trained models: the scores of `qkv eval` at fp32, bf16 and int8 side by side.

usage: python benchmarks/int8.py RUN [RUN ...] --data FOLDER

RUN is a run folder as benchmarks/results.py makes them, OUT/RESULT/seed-N, and FOLDER holds its data; the
result says what is scored and which figures count; to those without a loss, which tells small differences
from chance, it is added.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from results import RESULTS, Figure

PRECISIONS = ("fp32", "bf16", "int8")
LOSS = Figure("loss in nats", "loss", ".4f")


def scores(run: Path, data: Path, precision: str) -> dict[str, float]:
    """What `qkv eval` says of a run, in a process of its own. Raises CalledProcessError if it fails."""
    arguments = [argument.format(data=data) for argument in RESULTS[run.parent.name].evaluate]
    command = [sys.executable, "-m", "qkv", "eval", str(run), *arguments, "--precision", precision]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def rows(run: Path, data: Path) -> list[str]:
    """A run's rows of the table, one a figure."""
    found = {precision: scores(run, data, precision) for precision in PRECISIONS}
    figures = list(RESULTS[run.parent.name].figures)
    if not any(figure.key.endswith("loss") for figure in figures):
        figures.append(LOSS)
    lines = []
    for figure in figures:
        if figure.key in found["fp32"]:  # not by a measure of its own
            values = [found[precision][figure.key] for precision in PRECISIONS]
            said = " | ".join(format(value, figure.form) for value in values)
            change = format(values[-1] - values[0], f"+{figure.form}")
            lines.append(f"| {run.parent.name} | {figure.title} | {said} | {change} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    if unknown := [str(run) for run in given.runs if run.resolve().parent.name not in RESULTS]:
        parser.error(f"no result of benchmarks/results.py: {', '.join(unknown)}")
    print(f"| run | figure | {' | '.join(PRECISIONS)} | int8 - fp32 |")
    print("|---|---|---|---|---|---|")
    try:
        for run in given.runs:
            print("\n".join(rows(run.resolve(), given.data)), flush=True)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # it has said why


if __name__ == "__main__":
    main()
