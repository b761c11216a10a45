"""Training speed of qkv beside what people use, at the same sizes, batches and optimiser.

usage: python benchmarks/train.py [JOB ...] [--passes N] [--nanogpt FOLDER] [--pairs SOURCES,TARGETS]
       python benchmarks/train.py JOB --profile        (which operators take the time of qkv's step)

jobs: gpt-char (6 layers, 384 wide, context 256) and gpt-cpu (4 layers, 128 wide, context 64) beside nanoGPT's
model.py, which FOLDER holds; bert (masked words) and bert-mixed (lengths from 16 to 128) beside transformers;
vit (12 layers, 192 wide, 32 pixels) beside transformers; translation (the paper's tiny model on one batch of
sentence pairs of similar lengths) beside JoeyNMT. Peers run as their authors' defaults run on this machine,
and at other settings of which the best counts. Every measurement has a process of its own; the processes are
interleaved, and the medians of the passes are printed, with the spread, the largest memory, and the share of
this machine's measured peak rate of bfloat16 matrix products: of those that qkv's step has, for peers
too. Of BERT, transformers multiplies the vocabulary for all tokens, qkv for those that are to be found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qkv.config import BertConfig, GPTConfig, TrainConfig, TransformerConfig, ViTConfig
from qkv.data import Dataset
from qkv.data.batches import Batch, ImageBatch, LanguageBatch, MaskedBatch, PairBatch
from qkv.hub import Checkpoint
from qkv.models import build
from qkv.objectives import Objective, item_counts
from qkv.ragged import pack
from qkv.roofline import peak
from qkv.runtime import keep_few_kernels, keep_freed_memory, pick_device
from qkv.trainer import StepData, Trainer

SECONDS = 4.0
"""How long one process steps, after three steps that do not count."""

PEER_SETTINGS: dict[str, dict[str, bool]] = {
    "fp32": {},
    "bf16": {"bf16": True, "fused": True, "malloc": True},
    "bf16, compiled": {"bf16": True, "fused": True, "malloc": True, "compile": True},
}
"""fp32 is what a peer does by itself here; the others also have fused AdamW, and keep memory as qkv does."""
OURS: dict[str, dict[str, Any]] = {
    "qkv": {},
    "qkv, compiled": {"torch_compile": True},
}


@dataclass(frozen=True)
class Job:
    """One comparison: what qkv trains, and the same in a peer."""

    model: Any
    batch: Batch
    tokens: int
    """Tokens, or images, of a step."""
    peer: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]
    """The peer's model, and its loss of the same samples."""
    unit: str = "tokens"


# ---------------------------------------------------------------- the jobs


def jobs(folder: str, pairs: str) -> dict[str, Callable[[], Job]]:
    """What can be compared; each is made when it is asked for."""
    return {
        "gpt-char": lambda: gpt(folder, depth=6, heads=6, dim=384, context=256, sequences=16, dropout=0.2),
        "gpt-cpu": lambda: gpt(folder, depth=4, heads=4, dim=128, context=64, sequences=12, dropout=0.0),
        "bert": lambda: bert([128] * 32),
        "bert-mixed": lambda: bert([random.Random(0).randint(16, 128) for _ in range(57)]),
        "vit": vit,
        "translation": lambda: translation(pairs),
    }


def gpt(folder: str, depth: int, heads: int, dim: int, context: int, sequences: int, dropout: float) -> Job:
    """nanoGPT's two configurations for tinyshakespeare."""
    config = GPTConfig(
        dim=dim, depth=depth, heads=heads, mlp_dim=4 * dim, context=context, vocab_size=65,
        dropout=dropout, attention_dropout=dropout, activation="gelu",
    )  # fmt: skip
    ids = torch.randint(65, (sequences, context + 1))

    def peer() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        sys.path.insert(0, folder)
        import model as theirs

        known = {f.name for f in theirs.GPTConfig.__dataclass_fields__.values()}
        # Later versions of the file have other norms and activations; these are the published ones.
        published = {"use_rmsnorm": False, "use_relu": False, "use_squared_relu": False}
        settings = theirs.GPTConfig(
            block_size=context, vocab_size=65, n_layer=depth, n_head=heads, n_embd=dim, dropout=dropout,
            bias=False, **{name: value for name, value in published.items() if name in known},
        )  # fmt: skip
        return theirs.GPT(settings), lambda net: net(ids[:, :-1], ids[:, 1:].contiguous())[1]

    batch = LanguageBatch(pack(list(ids[:, :-1])), ids[:, 1:].flatten())
    return Job(config, batch, sequences * context, peer)


def bert(lengths: Sequence[int]) -> Job:
    """Masked words and next sentences, 4 layers of width 256; transformers pads to the longest."""
    config = BertConfig(dim=256, depth=4, heads=4, mlp_dim=1024, attention_dropout=0.1)
    texts = [torch.randint(1000, 30000, (length,)) for length in lengths]
    ids = pack(texts)
    T = ids.layout.tokens
    selected = torch.randperm(T)[: round(0.15 * T)].sort().values
    labels, follows = ids.values[selected], torch.randint(2, (len(texts),))
    batch = MaskedBatch(ids, torch.zeros(T, dtype=torch.long), selected, labels, follows)

    def peer() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        from transformers import BertConfig as TheirConfig
        from transformers import BertForPreTraining

        theirs = BertForPreTraining(
            TheirConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
        )
        padded = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # (N, L)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
        where = torch.full_like(ids.values, -100)
        where[selected] = labels
        words = nn.utils.rnn.pad_sequence(
            list(where.split([len(t) for t in texts])), batch_first=True, padding_value=-100
        )
        return (
            theirs,
            lambda net: (
                net(input_ids=padded, attention_mask=mask, labels=words, next_sentence_label=follows).loss
            ),
        )

    return Job(config, batch, T, peer)


def vit() -> Job:
    """128 images of 32 x 32 pixels."""
    labels = tuple("abcdefghij")
    config = ViTConfig(image_size=32, patch_size=4, dim=192, depth=12, heads=3, mlp_dim=768, labels=labels)
    images, classes = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))

    def peer() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        from transformers import ViTConfig as TheirConfig
        from transformers import ViTForImageClassification

        theirs = ViTForImageClassification(
            TheirConfig(
                hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768,
                image_size=32, patch_size=4, num_labels=10,
            )
        )  # fmt: skip
        return theirs, lambda net: net(pixel_values=images, labels=classes).loss

    return Job(config, ImageBatch(images, classes), 128, peer, unit="images")


def translation(pairs: str) -> Job:
    """The tiny Transformer on about 4,096 tokens of sentence pairs of similar lengths, a word a token."""
    config = TransformerConfig(vocab_size=10000, dim=128, depth=4, heads=4, mlp_dim=256, dropout=0.3)
    lengths = sorted(_lengths(pairs))
    middle, sources, targets = len(lengths) // 2, [], []
    for s, t in lengths[middle:]:
        sources.append(torch.randint(4, 10000, (s,)))
        targets.append(torch.randint(4, 10000, (t,)))
        if sum(map(len, sources + targets)) > 4096:
            break
    start, end = torch.tensor([2]), torch.tensor([3])
    inputs = [torch.cat([start, t]) for t in targets]
    batch = PairBatch(
        pack([torch.cat([s, end]) for s in sources]),
        pack(inputs),
        torch.cat([torch.cat([t, end]) for t in targets]),
    )

    def peer() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        return joey(sources, targets)

    return Job(config, batch, sum(len(s) + len(t) + 2 for s, t in zip(sources, targets, strict=True)), peer)


def _lengths(pairs: str) -> list[tuple[int, int]]:
    """Words of both sides of each pair of two aligned files."""
    texts = [Path(name).read_text(encoding="utf-8").splitlines() for name in pairs.split(",")]
    return [(len(s.split()), len(t.split())) for s, t in zip(*texts, strict=True)]


def joey(
    sources: Sequence[Tensor], targets: Sequence[Tensor]
) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """JoeyNMT's model and loss, with its own padded batch."""
    from types import SimpleNamespace

    from joeynmt.batch import Batch as TheirBatch
    from joeynmt.loss import XentLoss
    from joeynmt.model import build_model
    from joeynmt.vocabulary import Vocabulary

    special = SimpleNamespace(
        unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>", sep_token=None,
        unk_id=0, pad_id=1, bos_id=2, eos_id=3, sep_id=None, lang_tags=[],
    )  # fmt: skip
    vocabulary = Vocabulary([f"w{i}" for i in range(9996)], special)
    part = {
        "type": "transformer", "num_layers": 4, "num_heads": 4, "hidden_size": 128, "ff_size": 256,
        "dropout": 0.3, "embeddings": {"embedding_dim": 128, "scale": True},
    }  # fmt: skip
    net = build_model(
        {"encoder": part, "decoder": dict(part), "tied_embeddings": True, "tied_softmax": True},
        vocabulary,
        vocabulary,
    )
    net.loss_function = ("crossentropy", 0.1) if hasattr(type(net), "loss_function") else XentLoss(1, 0.1)
    end = torch.tensor([3])
    source = nn.utils.rnn.pad_sequence(
        [torch.cat([s, end]) for s in sources], batch_first=True, padding_value=1
    )
    target = nn.utils.rnn.pad_sequence(
        [torch.cat([torch.tensor([2]), t, end]) for t in targets], batch_first=True, padding_value=1
    )
    batch = TheirBatch(
        src=source, src_length=torch.tensor([len(s) + 1 for s in sources]), src_prompt_mask=None, trg=target,
        trg_prompt_mask=None, indices=torch.arange(len(source)), device=torch.device("cpu"), pad_index=1,
        eos_index=3,
    )  # fmt: skip

    def loss(model: nn.Module) -> Tensor:
        total, *_ = model(return_type="loss", **vars(batch))
        return total / batch.ntokens

    return net, loss


# ---------------------------------------------------------------- one process


def measure(job: Job, variant: str) -> dict[str, float]:
    """Tokens or images a second, the share of the bfloat16 peak, the largest memory, and the last loss."""
    torch.manual_seed(0)
    step = _our_step(job, OURS[variant]) if variant in OURS else _peer_step(job, PEER_SETTINGS[variant])
    began = time.perf_counter()
    for _ in range(3):
        loss = step()
    warm_up = time.perf_counter() - began
    times = []
    while sum(times) < SECONDS:
        start = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - start)
    rate = job.tokens / statistics.median(times)
    memory = next(
        int(line.split()[1]) / 2**20
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return {"rate": rate, "warm_up": warm_up, "memory": memory, "loss": loss}


def _our_step(job: Job, settings: dict[str, Any]) -> Callable[[], float]:
    """The training loop's own step."""
    keep_few_kernels()
    keep_freed_memory()
    smoothing = 0.1 if isinstance(job.batch, PairBatch) else 0.0
    config = TrainConfig(
        precision="bf16",
        torch_compile=settings.get("torch_compile", False),
        learning_rate=1e-4,
        warmup_steps=0,
        label_smoothing_factor=smoothing,
    )
    trainer = Trainer(config, Checkpoint(build(job.model)), cast(Dataset, None))  # batches are given
    data = StepData(0, [(job.batch, True)], job.tokens)
    return lambda: trainer.step(data, 1)["loss"]


def _peer_step(job: Job, settings: dict[str, bool]) -> Callable[[], float]:
    """Forward, backward, clipping, AdamW."""
    if settings.get("malloc"):
        keep_freed_memory()
    net, loss_of = job.peer()
    net.train()
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=1e-4, betas=(0.9, 0.98), fused=settings.get("fused", False)
    )
    run = torch.compile(net) if settings.get("compile") else net

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.get("bf16", False)):
            loss = loss_of(run)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def profile(job: Job) -> None:
    """The operators of twenty steps by their share of the time."""
    step = _our_step(job, OURS["qkv"])
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(20):
            step()
    found = sorted(profiler.key_averages(), key=lambda op: -op.self_cpu_time_total)
    total = sum(op.self_cpu_time_total for op in found)
    for op in found[:15]:
        print(f"{op.self_cpu_time_total / total:6.1%}  {op.key}")


def flops(job: Job) -> float:
    """FLOPs of a training step of qkv's model on the job's batch."""
    from torch.utils.flop_counter import FlopCounterMode

    objective = Objective(build(job.model))
    with FlopCounterMode(display=False) as counter:
        objective(job.batch, item_counts(job.batch)).backward()
    return float(counter.get_total_flops())


# ---------------------------------------------------------------- all of them, interleaved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("jobs", nargs="*")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--nanogpt", default=os.environ.get("NANOGPT", ""))
    parser.add_argument("--pairs", default="")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    known = jobs(given.nanogpt, given.pairs)
    if given.one:
        torch.manual_seed(0)
        random.seed(0)
        print(json.dumps(measure(known[given.jobs[0]](), given.one)))
        return
    if given.profile:
        profile(known[given.jobs[0]]())
        return
    device = pick_device()
    best = peak(device, "bf16")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, bf16 peak {best / 1e12:.2f} TFLOP/s"
    )
    names = given.jobs or [
        name
        for name in known
        if (given.nanogpt or "gpt" not in name) and (given.pairs or name != "translation")
    ]
    for name in names:
        torch.manual_seed(0)
        job = known[name]()
        variants = [*OURS, *PEER_SETTINGS]
        if name in ("bert-mixed", "translation"):
            variants.remove("qkv, compiled")
        found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
        for _ in range(given.passes):
            for variant in variants:
                done = subprocess.run(
                    [sys.executable, __file__, name, "--one", variant, "--nanogpt", given.nanogpt,
                     "--pairs", given.pairs],
                    capture_output=True, text=True,
                )  # fmt: skip
                if done.returncode:
                    print(f"{name}, {variant}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                else:
                    found[variant].append(json.loads(done.stdout.splitlines()[-1]))
        report(name, job, found, best)


def report(name: str, job: Job, found: dict[str, list[dict[str, float]]], best: float) -> None:
    """A table of one job."""
    rates = {v: statistics.median(r["rate"] for r in runs) for v, runs in found.items() if runs}
    peers = {v: rate for v, rate in rates.items() if v in PEER_SETTINGS}
    default, fastest = rates.get("fp32", float("nan")), max(peers.values(), default=float("nan"))
    cost = flops(job) / job.tokens
    print(f"\n## {name}\n")
    print(
        f"| variant | {job.unit}/s | spread | x peer's default | x peer's best | of peak | GiB | warm-up s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for variant, rate in rates.items():
        runs = [r["rate"] for r in found[variant]]
        spread = (max(runs) - min(runs)) / rate
        memory = statistics.median(r["memory"] for r in found[variant])
        warm = statistics.median(r["warm_up"] for r in found[variant])
        who = variant if variant in OURS else f"peer, {variant}"
        print(
            f"| {who} | {rate:,.0f} | {spread:.0%} | {rate / default:.2f} | {rate / fastest:.2f} "
            f"| {rate * cost / best:.0%} | {memory:.2f} | {warm:.1f} |"
        )
    print(flush=True)


if __name__ == "__main__":
    main()
