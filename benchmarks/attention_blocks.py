"""How long sequences of one attention call should share a dense block: equal lengths only, similar, or all.

usage: python benchmarks/attention_blocks.py SOURCES TARGETS   (two aligned text files, such as Multi30k's)

Prints milliseconds of `attend` forward, and forward with backward, on one batch of about 4,096 tokens
with 4 heads of 32, for self-, causal and cross-attention. Medians; the settings are interleaved.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from itertools import product
from pathlib import Path

import torch

import qkv.attention
from qkv.attention import Pattern, attend
from qkv.ragged import Layout

HEADS, HEAD_DIM, TOKENS, ROUNDS = 4, 32, 4096, 15
SETTINGS = {
    "equal lengths only": (1.0, 0),
    "up to 1.5x": (1.5, 4),
    "up to 2x": (2.0, 4),
    "one block": (1e9, 0),
}


def main(sources: str, targets: str) -> None:
    lines = zip(Path(sources).read_text().splitlines(), Path(targets).read_text().splitlines(), strict=True)
    pairs = [(len(s.split()) + 2, len(t.split()) + 2) for s, t in lines]
    random.Random(0).shuffle(pairs)
    batch, tokens = [], 0
    while tokens < TOKENS:
        batch.append(pairs[len(batch)])
        tokens += sum(batch[-1])
    source, target = (Layout(tuple(lengths), torch.device("cpu")) for lengths in zip(*batch, strict=True))
    kinds = {
        "self": (source, source, False),
        "causal": (target, target, True),
        "cross": (target, source, False),
    }
    times: dict[tuple[str, str, bool], list[float]] = {}
    blocks: dict[tuple[str, str], int] = {}
    for _, (setting, limits), (kind, layouts), backward in product(
        range(ROUNDS), SETTINGS.items(), kinds.items(), (False, True)
    ):
        qkv.attention._SPREAD, qkv.attention._SLACK = limits
        pattern = Pattern(*layouts)
        query = torch.randn(layouts[0].tokens, HEADS, HEAD_DIM, requires_grad=True)
        key = torch.randn(layouts[1].tokens, HEADS, HEAD_DIM, requires_grad=True)
        blocks[setting, kind] = len(pattern.blocks)
        attend(query, key, key, pattern)  # the pattern's index tensors are made once, outside the time
        with torch.set_grad_enabled(backward):
            start = time.perf_counter()
            answer = attend(query, key, key, pattern)
            if backward:
                answer.sum().backward()
        times.setdefault((setting, kind, backward), []).append(time.perf_counter() - start)
    print(
        f"{len(batch)} pairs, {tokens} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for setting, kind in blocks:
        forward, both = (1e3 * statistics.median(times[setting, kind, b]) for b in (False, True))
        made = f"{blocks[setting, kind]:3} blocks"
        print(f"{setting:20} {kind:7} {made}  {forward:6.2f}  {both:6.2f} ms with backward")


if __name__ == "__main__":
    main(*sys.argv[1:])
