"""What simple counts reach on the data that BERT is scored on.

usage: python benchmarks/baselines.py text RUN          (RUN: a run folder of recipes/bert-english.toml)
       python benchmarks/baselines.py classes TRAIN VALID [--text COLUMN] [--text-pair COLUMN]
       python benchmarks/baselines.py tags TRAIN VALID

text: masked words by the frequency of words, by bigrams with the left neighbour, with the right one and
with both, and next sentences by the words that A and B share; counted on the run's training documents, and
scored on the very pairs, hidden tokens and labels that `qkv eval RUN` scores the model on.
classes: the most frequent class, and logistic regression on TF-IDF vectors of words and pairs of words,
its regularisation chosen by cross-validation on the training data; of a pair of texts the words of both.
tags: each word has the tag that it has most often in the training data, and O if it is not there (the
baseline of the CoNLL shared tasks); precision, recall and F1 of whole entities.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

from qkv.config import DataConfig
from qkv.data import Raw, Samples, read
from qkv.data.documents import MaskedDataset
from qkv.demo.counts import Labelled, Overlap, majority_accuracy, masked_word_accuracies, tfidf_accuracy
from qkv.job import resumed_job
from qkv.metrics import entity_scores


def text_scores(run: Path) -> dict[str, float]:
    """Accuracies of counts, on a run's own held-out pairs."""
    job = resumed_job(run)
    train, valid = job.train, job.valid
    assert isinstance(train, MaskedDataset) and isinstance(valid, MaskedDataset), (
        f"{run} learns no running text"
    )
    found = {f"masked_word_accuracy, {name}": s for name, s in masked_word_accuracies(train, valid).items()}
    follow = {
        "next_sentence_accuracy, either answer": 0.5,
        "next_sentence_accuracy, shared words": Overlap(train).accuracy(valid),
    }
    return found | follow


def class_scores(data: Raw) -> dict[str, float]:
    """Accuracies of the most frequent class and of words."""
    train, valid = labelled(data.train, data.labels), labelled(data.valid, data.labels)
    return {
        "label_accuracy, majority": majority_accuracy(train[1], valid[1]),
        "label_accuracy, TF-IDF and logistic regression": tfidf_accuracy(train, valid),
    }


def labelled(samples: Samples, names: tuple[str, ...]) -> Labelled:
    """Texts, a pair as one, and the names of their classes."""
    columns = (samples.texts, samples.pairs) if samples.pairs else (samples.texts,)
    texts = list(map(" ".join, zip(*columns, strict=True)))
    return texts, [names[label] for label in samples.labels]


def tag_scores(data: Raw) -> dict[str, float]:
    """Entities by the most frequent tag of each word."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for words, tags in zip(data.train.words, data.train.tags, strict=True):
        for word, tag in zip(words, tags, strict=True):
            counts[word][tag] += 1
    usual = {word: data.labels[tags.most_common(1)[0][0]] for word, tags in counts.items()}
    said = [[usual.get(word, "O") for word in words] for words in data.valid.words]
    return entity_scores([[data.labels[tag] for tag in tags] for tags in data.valid.tags], said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("text").add_argument("run", type=Path)
    classes, tags = kinds.add_parser("classes"), kinds.add_parser("tags")
    for kind in (classes, tags):
        kind.add_argument("train")
        kind.add_argument("valid")
    classes.add_argument("--text", default=DataConfig.text)
    classes.add_argument("--text-pair", default=DataConfig.text_pair)
    given = parser.parse_args()
    if given.kind == "text":
        scores = text_scores(given.run)
    elif given.kind == "classes":
        columns = {"text": given.text, "text_pair": given.text_pair, "task": "classification"}
        scores = class_scores(read(DataConfig(path=given.train, valid=given.valid, **columns), "bert"))
    else:
        scores = tag_scores(read(DataConfig(path=given.train, valid=given.valid, task="tagging"), "bert"))
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
