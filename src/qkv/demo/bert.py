"""BERT on the standard library's English: masked words and next sentences, then a labelled task.

Legend: T tokens of a batch, N pairs, M selected tokens, V vocabulary.
"""

from __future__ import annotations

import ast
import inspect
import re
import tokenize
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from qkv.config import BertConfig, DataConfig, RunConfig, TokenizerConfig, TrainConfig
from qkv.data.documents import MaskedDataset
from qkv.demo.counts import Labelled, Overlap, majority_accuracy, masked_word_accuracies, tfidf_accuracy
from qkv.demo.lab import (
    Lab,
    Part,
    Run,
    library,
    lot,
    recorded,
    sharpest,
    write_table,
)
from qkv.pipelines import Encoder, from_pretrained
from qkv.ragged import pack
from qkv.recording import record
from qkv.report.page import Figure, Measure, Scores, filled, table
from qkv.report.pictures import heatmap

PRETRAIN = RunConfig(
    # In short contexts masked words find their neighbours after some 1,000 steps, in long ones far later.
    model=BertConfig(dim=128, depth=2, heads=4, mlp_dim=512, context=32, dropout=0.0, attention_dropout=0.0),
    tokenizer=TokenizerConfig(kind="wordpiece", vocab_size=2048, lowercase=True),
    train=TrainConfig(
        max_steps=2600,
        batch_tokens=1024,
        optimizer="muon",
        learning_rate=4e-3,
        schedule="linear",
        warmup_steps=100,
        eval_steps=650,
    ),
)
FINE_TUNE = TrainConfig(
    max_steps=240, batch_tokens=1024, learning_rate=1e-3, schedule="linear", warmup_steps=30, eval_steps=60
)
DROPOUT = 0.3
"""In fine-tuning, where the texts are few."""
HELD_OUT = 0.2
KINDS = ("class", "function", "module")
SENTENCES = (
    ("Return True if the two objects are ", "equal", "."),
    ("Raise an exception if the file does not ", "exist", "."),
    ("This function returns a list of ", "strings", "."),
)


def part(lab: Lab) -> Part:
    """Make the data, pre-train, fine-tune, score and show."""
    folder = lab.data("bert")
    labelled = _write_data(folder)
    data = DataConfig(path=str(folder / "documents.txt"), valid=str(folder / "documents-valid.txt"))
    pretrained = lab.train("bert", replace(PRETRAIN, data=data))
    data = DataConfig(path=str(folder / "kinds.csv"), valid=str(folder / "kinds-valid.csv"), truncate=True)
    recipe = RunConfig(model=replace(PRETRAIN.model, dropout=DROPOUT), data=data, train=FINE_TUNE)
    tuned = lab.train("bert-kinds", replace(recipe, init=str(pretrained.folder)))
    scratch = lab.train("bert-kinds-from-random", replace(recipe, tokenizer=PRETRAIN.tokenizer))
    rows: dict[str, tuple[float | None, ...]] = {
        "BERT, fine-tuned": (
            tuned.scores["label_accuracy"],
            pretrained.scores["masked_word_accuracy"],
            pretrained.scores["next_sentence_accuracy"],
        ),
        "BERT from random weights": (scratch.scores["label_accuracy"], None, None),
        **_label_baselines(labelled),
        **_pretraining_baselines(pretrained),
    }
    encoder = cast(Encoder, from_pretrained(pretrained.folder, device="cpu"))
    classifier = cast(Encoder, from_pretrained(tuned.folder, device="cpu"))
    sizes = {split: len(rows) for split, rows in labelled.items()}
    return Part(
        key="bert",
        title="BERT: the English of the standard library",
        lead="First masked words and next sentences, on docstrings and on the manual's topics, a fifth of "
        "the source files held out. Then the same weights learn what a docstring describes, a class, a "
        "function or a module, from its first paragraph, on the same split.",
        facts={
            **pretrained.facts(),
            "fine-tuning": f"{sizes['train']:,} texts, {sizes['valid']:,} held out, {tuned.seconds:.0f} s",
        },
        scores=Scores(
            (
                Measure("docstring kind right", percent=True),
                Measure("masked word right", percent=True),
                Measure("next sentence right", percent=True),
            ),
            rows,
            frozenset({"BERT, fine-tuned"}),
        ),
        figures=(
            pretrained.curve("Learning curve: pre-training"),
            tuned.curve("Learning curve: fine-tuning"),
            _classified(classifier, labelled["valid"]),
            _filled(encoder),
            _attention(encoder),
        ),
    )


# ---------------------------------------------------------------- data


LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "__pycache__",
}


def _write_data(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Documents of sentences and a table of docstrings with their kinds; returns the table by split."""
    documents: dict[str, list[str]] = {"train": [], "valid": []}
    kinds: dict[str, list[tuple[str, str]]] = {"train": [], "valid": []}
    seen: set[str] = set()
    for path in _source_files():
        split = "valid" if lot(path.relative_to(library()).as_posix()) < HELD_OUT else "train"
        found = list(_docstrings(path))
        lines = [line for _, text in found for line in _sentences(text)]
        if len(lines) > 1:
            documents[split].append("\n".join(lines))
        for kind, text in found:
            paragraph = " ".join(text.split("\n\n")[0].split())
            if len(paragraph) >= 20 and paragraph not in seen:
                seen.add(paragraph)
                kinds[split].append((paragraph, kind))
    for topic, text in _topics().items():
        lines = list(_sentences(text))
        if len(lines) > 1:
            documents["valid" if lot(topic) < HELD_OUT else "train"].append("\n".join(lines))
    for split, suffix in (("train", ""), ("valid", "-valid")):
        (folder / f"documents{suffix}.txt").write_text("\n\n".join(documents[split]), encoding="utf-8")
        kinds[split] = _balanced(kinds[split])
        write_table(folder / f"kinds{suffix}.csv", ("text", "label"), kinds[split])
    return kinds


def _source_files() -> list[Path]:
    folder = library()
    return [p for p in sorted(folder.rglob("*.py")) if not LEFT_OUT & set(p.relative_to(folder).parts)]


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Kind and text of each docstring in a file, methods being functions; none if it is another Python's."""
    try:
        with tokenize.open(path) as file:
            tree = ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function"), text


def _topics() -> dict[str, str]:
    """What `help("...")` says about the language, if this Python has it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return dict(sorted(topics.items()))


_CODE = re.compile(r"^\s*(>>>|\.\. |[-=*~^]{3})|::=|^\s{3,}\S", re.MULTILINE)
_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z\"'`(])")


def _sentences(text: str) -> Iterator[str]:
    """The sentences of the paragraphs that are prose."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if not _CODE.search(paragraph):
            for sentence in _END.split(" ".join(paragraph.split())):
                if len(sentence.split()) >= 4:
                    yield sentence


def _balanced(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """All classes and modules, and of the many functions as many as classes, evenly spaced."""
    functions = [row for row in rows if row[1] == "function"]
    wanted = sum(kind == "class" for _, kind in rows)
    every = max(1.0, len(functions) / max(wanted, 1))
    kept = {functions[int(i * every)] for i in range(int(len(functions) / every))}
    return [row for row in rows if row[1] != "function" or row in kept]


# ---------------------------------------------------------------- baselines


def _label_baselines(labelled: dict[str, list[tuple[str, str]]]) -> dict[str, tuple[float | None, ...]]:
    """What counting words gives, and what always giving the most frequent answer does."""
    train, valid = (_columns(labelled[split]) for split in ("train", "valid"))
    return {
        "TF-IDF of words and pairs, logistic regression": (tfidf_accuracy(train, valid), None, None),
        "majority": (majority_accuracy(train[1], valid[1]), None, 0.5),
    }


def _columns(rows: list[tuple[str, str]]) -> Labelled:
    texts, kinds = zip(*rows, strict=True)
    return texts, kinds


def _pretraining_baselines(run: Run) -> dict[str, tuple[float | None, ...]]:
    """Counts for masked words, overlap of words for next sentences, on the batches that BERT is scored on."""
    train, valid = run.job.train, run.job.valid
    assert isinstance(train, MaskedDataset) and isinstance(valid, MaskedDataset)
    right = masked_word_accuracies(train, valid)
    return {
        "unigram counts": (None, right["unigram"], None),
        "bigram counts, left and right": (None, right["both bigrams"], None),
        "overlap of words between the sentences": (None, None, Overlap(train).accuracy(valid)),
    }


# ---------------------------------------------------------------- pictures


def _classified(classifier: Encoder, rows: list[tuple[str, str]]) -> Figure:
    """Some held-out docstrings with what the model says."""
    shown = [row for kind in KINDS for row in [r for r in rows if r[1] == kind and len(r[0]) < 120][:3]]
    guesses = classifier.classify([text for text, _ in shown], top_k=1, truncate=True)
    cells = [
        (text, kind, f"{guess[0].name}, {guess[0].probability:.0%}")
        for (text, kind), guess in zip(shown, guesses, strict=True)
    ]
    return Figure("It classifies", table(("held-out docstring", "describes a", "BERT says"), cells))


def _filled(encoder: Encoder) -> Figure:
    """Sentences with a gap."""
    html = "".join(
        filled(before, after, encoder.fill(f"{before}[MASK]{after}", top_k=5), truth)
        for before, truth, after in SENTENCES
    )
    return Figure("It fills gaps", html, "Underlined: the word that was hidden from it.")


def _attention(encoder: Encoder) -> Figure:
    """One head over a pair of sentences."""
    encoding = encoder.tokenizer.encode(
        "Return a list of the open files.", "If no file is open, the list is empty."
    )
    names = [encoder.tokenizer.token(i) for i in encoding.ids]
    with record(encoder) as maps:
        encoder(pack([encoding.ids]), torch.tensor(encoding.segments))
    L = len(names)
    words = torch.tensor([name not in ("[CLS]", "[SEP]", ".", ",") for name in names])
    far = (torch.arange(L)[:, None] - torch.arange(L)).abs() > 2
    layer, head, weights = sharpest(maps, far & words & words[:, None])
    return Figure(
        "Where a head looks",
        heatmap(names, names, weights, "reading", "the other words"),
        f"Before fine-tuning, layer {layer + 1}, head {head + 1}: the head that looks most decidedly at "
        f"distant words. {recorded(maps)}",
        wide=True,
    )
