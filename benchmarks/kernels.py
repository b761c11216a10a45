"""What qkv computes in its own way when it trains on a CPU, beside torch's: forward and backward.

usage: python benchmarks/kernels.py

attention: products in bfloat16 beside the fused kernel in float32, which is what its backward pass can do.
dropout: shared random bits beside torch's Bernoulli numbers. cross-entropy: the gradient made with the loss
beside torch's, on bfloat16 logits. Medians of interleaved rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.attention import Pattern, attend
from qkv.dropout import dropout
from qkv.objectives import CrossEntropy
from qkv.ragged import Layout
from qkv.runtime import keep_freed_memory

ROUNDS = 15
CPU = torch.device("cpu")


def main() -> None:
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | torch ms | qkv ms | ratio |")
    print("|---|---|---|---|")
    for sequences, length, rate in ((48, 64, 0.0), (16, 256, 0.0), (16, 256, 0.2), (8, 512, 0.0)):
        name = f"causal attention, {sequences} x {length} tokens, 6 heads of 64, dropout {rate}"
        compare(name, *attentions(sequences, length, rate))
    x = torch.randn(4096, 384).bfloat16().requires_grad_()
    compare("dropout of 4096 x 384", lambda: F.dropout(x, 0.1).sum(), lambda: dropout(x, 0.1).sum())
    for rows, classes, smoothing in (
        (4096, 65, 0.0),
        (4096, 10000, 0.1),
        (600, 30522, 0.0),
        (4096, 50257, 0.0),
    ):
        name = f"cross-entropy, {rows} rows of {classes:,} classes, smoothing {smoothing}"
        compare(name, *entropies(rows, classes, smoothing))


def attentions(sequences: int, length: int, rate: float) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    layout = Layout((length,) * sequences, CPU)
    pattern = Pattern(layout, layout, causal=True)
    q, k, v = (torch.randn(sequences * length, 6, 64).bfloat16().requires_grad_() for _ in range(3))

    def theirs() -> Tensor:
        return attend(q.float(), k.float(), v.float(), pattern, rate).bfloat16().sum()

    return theirs, lambda: attend(q, k, v, pattern, rate).sum()


def entropies(rows: int, classes: int, smoothing: float) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    logits = torch.randn(rows, classes).bfloat16().requires_grad_()
    labels = torch.randint(classes, (rows,))

    def theirs() -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)

    return theirs, lambda: CrossEntropy(logits, labels).loss_sum(smoothing)


def compare(name: str, theirs: Callable[[], Tensor], ours: Callable[[], Tensor]) -> None:
    times: dict[Callable[[], Tensor], list[float]] = {theirs: [], ours: []}
    for number in range(ROUNDS + 1):
        for call in times:
            start = time.perf_counter()
            call().backward()
            if number:  # the first round warms up
                times[call].append(1e3 * (time.perf_counter() - start))
    a, b = (statistics.median(values) for values in times.values())
    print(f"| {name} | {a:.2f} | {b:.2f} | {a / b:.2f} |", flush=True)


if __name__ == "__main__":
    main()
