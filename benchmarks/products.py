"""The compiled matrix product in all precisions, beside torch's in fp32, by one thread.

usage: python benchmarks/products.py [ARCHITECTURE ...]   (as GCC's -march calls them; default: native)

haswell is AVX2 alone, skylake-avx512 has no VNNI and no BF16, cooperlake has both and no AMX: what this CPU
would do without. Billions of operations a second for so many rows times a matrix of 2,048 x 1,024, the
fastest of a second's trials.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from qkv.fast import native
from qkv.fast.native import NativeLinear, library
from qkv.runtime import shortest

ROWS = (1, 16, 1024)
INPUTS, OUTPUTS = 1024, 2048
CPU = torch.device("cpu")


def rates(layer: nn.Module) -> str:
    """For each number of rows."""
    made = []
    for rows in ROWS:
        x = torch.randn(rows, INPUTS)
        seconds = shortest(lambda x=x: layer(x), CPU, budget=1.0)  # type: ignore[misc]
        made.append(f"{2 * rows * INPUTS * OUTPUTS / seconds / 1e9:,.0f}")
    return " | ".join(made)


def main() -> None:
    torch.set_num_threads(1)
    print(f"| product | {' | '.join(f'{rows:,} rows' for rows in ROWS)} |\n|---|{'---|' * len(ROWS)}")
    with torch.inference_mode():
        linear = nn.Linear(INPUTS, OUTPUTS)
        print(f"| torch fp32 | {rates(linear)} |")
        for architecture in sys.argv[1:] or ["native"]:
            flags = native.FLAGS
            native.FLAGS = tuple(flag.replace("native", architecture) for flag in flags)
            library.cache_clear()
            for precision in native.ORDER:
                layer = NativeLinear(linear.weight, linear.bias, precision)
                print(f"| {architecture} {precision} | {rates(layer)} |", flush=True)
            native.FLAGS = flags


if __name__ == "__main__":
    main()
