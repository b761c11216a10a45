"""What `qkv plan` predicts beside what a real optimiser step uses, for the four families.

usage: python benchmarks/plan.py            (on the GPU if there is one, otherwise on the CPU)

Every setting runs in a process of its own: the prediction, then five real steps of the training loop. On a
CPU the peak is the sum of the allocations and releases that torch.profiler saw in the first two steps, on a
GPU torch.cuda.max_memory_allocated; the time is the median of the last three.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product

import torch

from qkv.config import BertConfig, GPTConfig, RunConfig, TrainConfig, TransformerConfig, ViTConfig
from qkv.plan import assume, plan, run_step, synthetic_trainer
from qkv.runtime import pick_device

SIZES = {"dim": 192, "depth": 4, "heads": 3, "mlp_dim": 768}
MODELS = {
    "gpt": GPTConfig(**SIZES, context=256, vocab_size=4096),
    "bert": BertConfig(**SIZES, context=128, vocab_size=4096),
    "transformer": TransformerConfig(**SIZES, context=64, vocab_size=4096),
    "vit": ViTConfig(**SIZES, image_size=32, patch_size=4),
}
SETTINGS = list(product(MODELS, ("fp32", "bf16"), ("adamw", "muon"), (1, 4)))


def one(family: str, precision: str, optimizer: str, accumulation: str) -> None:
    """Print [predicted bytes, measured bytes, predicted seconds, measured seconds]."""
    train = TrainConfig(
        batch_tokens=4096,
        precision=precision,
        optimizer=optimizer,
        gradient_accumulation_steps=int(accumulation),
    )
    config = RunConfig(model=MODELS[family], train=train)
    planned = plan(config).placements[0]
    config, _ = assume(config, pick_device())
    times: list[float] = []
    peak = peak_memory(config, times)
    print(json.dumps([planned.memory.total, peak, planned.seconds, statistics.median(times[-3:])]))


def peak_memory(config: RunConfig, times: list[float]) -> int:
    """Most bytes in use in two real steps; appends the seconds of three more."""
    device = pick_device()
    if device.type == "cuda":
        run = real_steps(config)
        next(run)
        torch.cuda.reset_peak_memory_stats()
        next(run)
        peak = torch.cuda.max_memory_allocated()
    else:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler:
            run = real_steps(config)
            next(run)
            next(run)
        peak = profiled_peak(profiler)
    for _ in range(3):
        start = time.perf_counter()
        next(run)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return peak


def real_steps(config: RunConfig) -> Iterator[None]:
    """A step each time."""
    torch.manual_seed(0)
    trainer = synthetic_trainer(config)
    while True:
        run_step(trainer)
        yield


def profiled_peak(profiler: torch.profiler.profile) -> int:
    """The highest running sum of what torch's CPU allocator gave and took back."""
    found = []
    nodes = list(profiler.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag == torch._C._profiler._EventType.Allocation:
            found.append((node.start_time_ns, node.extra_fields.alloc_size))
    live = peak = 0
    for _, size in sorted(found, key=lambda event: event[0]):
        live += size
        peak = max(peak, live)
    return peak


def main() -> None:
    print(f"{pick_device()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    titles = "".join(f"{unit + ' planned':>12}{'measured':>10}{'ratio':>7}" for unit in ("MiB", "ms"))
    print(f"{'':33}{titles}")
    for setting in SETTINGS:
        words = list(map(str, setting))
        done = subprocess.run(
            [sys.executable, __file__, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
        last = done.stdout.decode().strip().splitlines()[-1]
        memory, peak, seconds, took = json.loads(last)
        family, precision, optimizer, accumulation = words
        print(
            f"{family:12}{precision:6}{optimizer:7}{accumulation:>2} parts"
            f"{memory / 2**20:12.1f}{peak / 2**20:10.1f}{memory / peak:7.3f}"
            f"{1e3 * seconds:12.0f}{1e3 * took:10.0f}{seconds / took:7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    one(*sys.argv[1:]) if sys.argv[1:] else main()
