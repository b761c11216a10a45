"""What the inference benchmarks share: variants of a job, interleaved A B A B, on the GPU if there is one.

A variant loads its model, answers once, then answers for some seconds; the median of its times counts, and of
the passes the median again. On a CPU each pass of a variant is a process of its own: peers and qkv load
libraries that slow each other down in one. On a GPU all share one process, and memory is the GPU's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qkv.fast.native import NativeLinear
from qkv.roofline import peak
from qkv.runtime import pick_device

DEVICE = pick_device()
ON_GPU = DEVICE.type == "cuda"
PRECISIONS = ("fp32", "bf16") if ON_GPU else ("fp32", "bf16", "int8")
"""Of qkv."""
SECONDS = 0.5 if ON_GPU else 4.0
"""How long a variant answers in a pass, after the first time; at least three times."""
PATIENCE = 150.0
"""Seconds that a pass of a variant may take on a CPU, with its loading."""
TORCH = ("qkv", "transformers", "sentence-transformers")
"""What variants' names begin with that need torch. The others' memory is counted without it, though what
prepares their inputs here has it."""

Answer = NDArray[np.generic]
Work = Callable[[], Answer]
"""The job done once; the answer is compared with the reference's."""


@dataclass(frozen=True)
class Job:
    """One comparison. Variants whose names begin with qkv are ours, the others are peers."""

    title: str
    unit: str
    items: int
    """Of the unit, in one answer."""
    variants: Mapping[str, Callable[[], Work]]
    """What loads a model, by name; the first is the reference of all answers."""
    agreement: Callable[[Answer, Answer], str]
    """How near an answer (second) is to the reference's."""
    limit: Callable[[], Mapping[str, float]]
    """Seconds that an answer takes at least here, by the precision that a variant's name ends in."""


def cosines(reference: Answer, answer: Answer) -> str:
    """Of rows of vectors: mean and smallest."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (reference, answer))
    cosine = (a * b).sum(1)
    return f"{cosine.mean():.5f}, {cosine.min():.5f}"


def same_tokens(reference: Answer, answer: Answer) -> str:
    """Of rows of ids: equal ones, up to where a row first differs."""
    return f"{np.mean(np.logical_and.accumulate(reference == answer, axis=1)):.1%}"


def products(multiplications: float) -> dict[str, float]:
    """Seconds that so many multiplications take at least, by precision.

    At the best rate that torch or qkv's own products reach here on large matrices.
    """
    if ON_GPU:
        return {precision: 2 * multiplications / peak(DEVICE, precision) for precision in PRECISIONS}
    seconds: dict[str, float] = {}
    for precision in PRECISIONS:
        linear = NativeLinear(torch.randn(2048, 1024), None, precision)  # type: ignore[arg-type]
        x = torch.randn(1024, 1024)
        rate = 2 * x.numel() * 2048 / _shortest(lambda layer=linear, x=x: layer(x))
        if precision != "int8":
            rate = max(rate, peak(DEVICE, precision))
        seconds[precision] = 2 * multiplications / rate
    return seconds


def _shortest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(20):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def reading(weights: float) -> dict[str, float]:
    """Seconds that reading so many weights from memory takes at least, by precision."""
    block = torch.ones(1 << 28, device=DEVICE)  # larger than any cache
    rate = block.numel() * block.element_size() / _shortest(lambda: block.sum().item())
    sizes = {"fp32": 4, "bf16": 2, "int8": 1}
    return {precision: size * weights / rate for precision, size in sizes.items()}


def main(doc: str | None, jobs: Mapping[str, Callable[[Path, str], Job]], texts: bool = False) -> None:
    """A benchmark's command line. A job is made from a folder for prepared models and a file of texts."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("jobs", nargs="*", choices=[*jobs, []])
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"), help="for prepared models")
    parser.add_argument("--only", nargs="+", default=[""], help="variants whose names contain one of these")
    if texts:
        parser.add_argument("--texts", required=True, help="a file with a sentence a line")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    file = given.texts if texts else ""
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.one:
        variant = _Variant.loaded(jobs[given.jobs[0]](given.folder, file).variants[given.one])
        print(json.dumps(variant.measure()))
        np.save(given.answer, variant.answer)
        return
    for name in given.jobs or jobs:
        command = [sys.executable, sys.argv[0], name, "--folder", str(given.folder)]
        _compare(jobs[name](given.folder, file), command + ["--texts", file] * texts, given)


@dataclass
class _Variant:
    """One that is loaded."""

    work: Work
    answer: Answer
    """The last one."""
    first: float
    """Seconds until the first one."""
    held: int
    """Bytes that loading it took."""

    @staticmethod
    def loaded(load: Callable[[], Work]) -> _Variant:
        if not ON_GPU:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        before = _in_use()
        began = time.perf_counter()
        work = load()
        answer = work()
        return _Variant(work, answer, time.perf_counter() - began, _in_use() - before)

    def measure(self) -> dict[str, float]:
        """One pass."""
        times: list[float] = []
        others = _in_use() - self.held
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        while sum(times) < SECONDS or len(times) < 3:
            began = time.perf_counter()
            self.answer = self.work()
            times.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() if ON_GPU else _resident("VmHWM")
        memory = (peak - others) / 2**30
        return {"seconds": statistics.median(times), "first": self.first, "memory": memory}


def _in_use() -> int:
    return torch.cuda.memory_allocated() if ON_GPU else _resident("VmRSS")


def _resident(what: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 2**10 for line in status if line.startswith(what))


def _started(imported: str) -> float:
    """GiB of a Python process that has imported this."""
    code = f"import {imported}; print(open('/proc/self/status').read().partition('VmRSS:')[2].split()[0])"
    return int(subprocess.check_output([sys.executable, "-c", code])) / 2**20


def _compare(job: Job, command: list[str], given: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, float]]] = {}
    answers: dict[str, Answer] = {}
    started = {False: 0.0, True: 0.0}
    if not ON_GPU:
        started = {False: _started("numpy"), True: _started("torch")}
        print(f"Memory begins at {started[False]:.2f} GiB, with torch at {started[True]:.2f}.")
    reference = next(iter(job.variants))
    chosen = [name for name in job.variants if name == reference or any(part in name for part in given.only)]
    loaded: dict[str, _Variant] = {}
    for _ in range(given.passes):
        for name in list(chosen):
            try:
                if ON_GPU:
                    if name not in loaded:
                        loaded[name] = _Variant.loaded(job.variants[name])
                    one = loaded[name].measure()
                    answers[name] = loaded[name].answer
                else:
                    one, answers[name] = _in_a_process(name, command, given.folder / "answer.npy")
            except Exception as error:  # a peer that fails is told of, and the others go on
                print(f"{job.title}, {name}: {str(error).strip().splitlines()[-1:]}", file=sys.stderr)
                chosen.remove(name)
                continue
            one["memory"] += started[name.startswith(TORCH)]
            found.setdefault(name, []).append(one)
    _report(job, found, answers, answers[reference])


def _in_a_process(name: str, command: list[str], path: Path) -> tuple[dict[str, float], Answer]:
    """One pass of a variant. Raises RuntimeError with what it said if it fails, or TimeoutExpired."""
    one = [*command, "--one", name, "--answer", str(path)]
    done = subprocess.run(one, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]), np.load(path)


def _report(
    job: Job, found: dict[str, list[dict[str, float]]], answers: dict[str, Answer], reference: Answer
) -> None:
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in found.items()}
    limits = job.limit()
    fastest = min((s for name, s in seconds.items() if not name.startswith("qkv")), default=float("nan"))
    print(f"\n## {job.title}\n")
    print(f"| variant | {job.unit}/s | spread | x best peer | of limit | agreement | GiB | first s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, value in seconds.items():
        runs = found[name]
        spread = (max(r["seconds"] for r in runs) - min(r["seconds"] for r in runs)) / value
        limit = next((s for precision, s in limits.items() if name.endswith(precision)), None)
        share = "" if limit is None else f"{limit / value:.0%}"
        memory, first = (statistics.median(run[key] for run in runs) for key in ("memory", "first"))
        print(
            f"| {name} | {job.items / value:,.1f} | {spread:.0%} | {fastest / value:.2f} | {share} "
            f"| {job.agreement(reference, answers[name])} | {memory:.2f} | {first:.1f} |",
            flush=True,
        )
