"""What it costs to record attention: BERT-base with random weights, 8 texts of 128 tokens.

usage: python benchmarks/record.py [fp32] [bf16] [--rounds 7]

fp32: the model as it is loaded; bf16: made quick, on the road that is fastest here. Medians of rounds in
which all variants take turns, in wall-clock time and in time of the processor, which other programs disturb
less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from qkv import PRESETS, build, pack, record
from qkv.config import InferencePrecision
from qkv.fast import optimize

TEXTS, LENGTH = 8, 128
ASKED: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "one layer": {"layers": [-1]},
    "all layers": {},
    "all layers, in half precision": {"dtype": torch.float16},
    "all layers, one row": {"rows": [0]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("precisions", nargs="*", choices=["fp32", "bf16", []])
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| precision | recorded | ms | added | processor ms | added |")
    print("|---|---|---|---|---|---|")
    for precision in given.precisions or ["fp32", "bf16"]:
        compare(precision, given.rounds)


@torch.inference_mode()
def compare(precision: InferencePrecision, rounds: int) -> None:
    torch.manual_seed(0)
    model = build(PRESETS["bert-base"]).eval()
    if precision != "fp32":
        optimize(model, precision)
    batch = pack(torch.randint(1000, model.config.vocab_size, (TEXTS, LENGTH)))

    def work(asked: dict[str, Any] | None) -> None:
        if asked is None:
            model.features(batch)
        else:
            with record(model, **asked):
                model.features(batch)

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ASKED}
    for number in range(rounds + 1):
        for name, asked in ASKED.items():
            began = time.perf_counter(), time.process_time()
            work(asked)
            if number:  # the first round warms up
                took = time.perf_counter() - began[0], time.process_time() - began[1]
                times[name].append((1e3 * took[0], 1e3 * took[1]))
    before = [statistics.median(each) for each in zip(*times["nothing"], strict=True)]
    for name, rows in times.items():
        wall, processor = (statistics.median(each) for each in zip(*rows, strict=True))
        shares = f"{wall / before[0] - 1:.0%}", f"{processor / before[1] - 1:.0%}"
        print(
            f"| {precision} | {name} | {wall:.0f} | {shares[0]} | {processor:.0f} | {shares[1]} |", flush=True
        )


if __name__ == "__main__":
    main()
