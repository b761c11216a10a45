"""GPT on the source text of the standard library, beside models that count.

Legend: T tokens of a stream.
"""

from __future__ import annotations

import math
import tokenize
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from qkv.config import DataConfig, GPTConfig, RunConfig, TokenizerConfig, TrainConfig
from qkv.data.text import LanguageDataset
from qkv.demo.counts import KneserNey
from qkv.demo.lab import Lab, Part, library, lot, recorded, sharpest
from qkv.pipelines import TextGenerator, from_pretrained
from qkv.ragged import pack
from qkv.recording import record
from qkv.report.page import Figure, Measure, Scores, continuation
from qkv.report.pictures import heatmap

RECIPE = RunConfig(
    model=GPTConfig(dim=128, depth=3, heads=4, mlp_dim=512, context=256, dropout=0.1, attention_dropout=0.0),
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=1024),
    train=TrainConfig(
        max_steps=900,
        batch_tokens=2048,
        optimizer="muon",
        learning_rate=3e-3,
        schedule="linear",
        warmup_steps=30,
        weight_decay=0.1,
        eval_steps=225,
    ),
)
HELD_OUT, TRAIN = 0.06, 0.17
"""Shares of the library's modules: as much as a GPT can read several times in the demo's minutes."""
PROMPTS = (
    "def __init__(self, name, ",
    "import os\nimport sys\n\ndef main(",
    "    for line in lines:\n        if ",
)
LINE = "    for name, value in sorted(items): print(name, value)"


def part(lab: Lab) -> Part:
    """Make the data, train, score and show."""
    run = lab.train("gpt", _with_data(lab.data("gpt")))
    train, valid = run.job.train, run.job.valid
    assert isinstance(train, LanguageDataset) and isinstance(valid, LanguageDataset)
    model = run.job.config.model
    assert isinstance(model, GPTConfig)
    rows: dict[str, tuple[float | None, ...]] = {
        "GPT": (run.scores["bits_per_byte"], run.scores["perplexity"], run.scores["next_token_accuracy"])
    }
    for name, order in (("unigram counts", 1), ("bigram counts", 2), ("5-gram counts", 5)):
        rows[name] = (
            *counted(train.stream, valid.stream, order, model.vocab_size, valid.size_in_bytes),
            None,
        )
    generator = cast(TextGenerator, from_pretrained(run.folder, device="cpu"))
    return Part(
        key="gpt",
        title="GPT: the source of the standard library",
        lead="One in six modules of this Python's standard library, scored on others. The count models "
        "(interpolated modified Kneser-Ney) read the same training tokens and predict the same others.",
        facts={
            **run.facts(),
            "data": f"{len(train.stream):,} training tokens, {len(valid.stream):,} held out",
        },
        scores=Scores(
            (
                Measure("bits per byte", 3, lower_is_better=True),
                Measure("perplexity of a token", 1, lower_is_better=True),
                Measure("next token right", percent=True),
            ),
            rows,
            frozenset({"GPT"}),
        ),
        figures=(run.curve(), _samples(generator), _attention(generator)),
    )


def _with_data(folder: Path) -> RunConfig:
    """Copy some modules as .txt files, and name their folders in the recipe."""
    for path in sorted(library().glob("*.py")):
        drawn = lot(path.name)
        with tokenize.open(path) as file:  # by the source's own declaration of its encoding
            text = file.read()
        if drawn < HELD_OUT + TRAIN and text.strip():
            copy = folder / ("valid" if drawn < HELD_OUT else "train") / f"{path.name}.txt"
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(text, encoding="utf-8")
    return replace(RECIPE, data=DataConfig(path=str(folder / "train"), valid=str(folder / "valid")))


def counted(
    train: np.ndarray, valid: np.ndarray, order: int, vocab_size: int, size_in_bytes: int
) -> tuple[float, float]:
    """Bits per byte and perplexity of an n-gram model on the tokens of `valid` (T,) but its first."""
    successors = len(valid) - 1
    both = np.concatenate([train, valid]).astype(np.int64)
    model = KneserNey(both[: len(train)], order, vocab_size)
    nats = -float(model.log_probabilities(both[-successors - order + 1 :]).sum())
    return nats / math.log(2) / size_in_bytes, math.exp(nats / successors)


def _samples(generator: TextGenerator) -> Figure:
    """What the model writes behind some beginnings."""
    texts = generator.generate(list(PROMPTS), max_new_tokens=90, temperature=0.7, top_p=0.95, seed=1)
    html = "".join(continuation(prompt, text) for prompt, text in zip(PROMPTS, texts, strict=True))
    return Figure(
        "It goes on", html, "Marked: sampled at temperature 0.7 from the likeliest 95 % (top-p).", wide=True
    )


def _attention(generator: TextGenerator) -> Figure:
    """One head over one line of code."""
    ids = generator.tokenizer.plain(LINE)
    with record(generator) as maps:
        generator(pack([ids]))
    # What looks back further than a few tokens, and not at the first one, is worth seeing.
    distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
    far = (distance > 2) & (torch.arange(len(ids)) > 0)
    layer, head, weights = sharpest(maps, far)
    names = [_visible(generator.tokenizer.decode([i])) for i in ids]
    return Figure(
        "Where a head looks",
        heatmap(names, names, weights, "reading", "earlier tokens"),
        f"Layer {layer + 1}, head {head + 1}: the head that looks back most decidedly. {recorded(maps)}",
        wide=True,
    )


def _visible(token: str) -> str:
    return token.replace(" ", "·").replace("\n", "⏎")
