"""Sentences of film reviews, labelled by what a classifier says of them and of the review that each is from.

usage: python benchmarks/reviews.py RUN --data TEXT --output TABLE

RUN: of recipes/bert-sst2.toml. TEXT: documents, a sentence a line and a blank line between them, of which
those without capital letters are taken for reviews. TABLE: a .csv file with columns text and label.

To learn one's own answers teaches little that is new (Lee 2013). But a review mostly keeps to one opinion, as
a word in a text mostly keeps to one sense (Yarowsky 1995, 2): what is clear about it tells what its other
sentences mean. A review's score is the mean log-odds of praise of its sentences less the median of all
reviews', as if half of them were praise; reviews near 0 are left out. The log-odds of a sentence are then
`OWN` times its own and `REVIEW` times its review's score, and its label is drawn as probable as they say, so
that what is learnt from it is in the mean what would be learnt from the probability itself.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median

import torch

from qkv.config import DataConfig
from qkv.data import read_held_out
from qkv.pipelines import Encoder, from_pretrained

MOST_ODDS = 4.0
"""The most that one sentence's log-odds count in its review's score."""
LEAST_SCORE = 0.4
"""The least score of a review to learn from, either way."""
OWN, REVIEW = 0.7, 1.5
WORDS = range(4, 61)
"""In a sentence to learn from: a shorter one is a name or a grade, a longer one a paragraph."""


def reviews(location: str) -> list[list[str]]:
    """The sentences of each document without capital letters."""
    documents = read_held_out(location, DataConfig(), "bert", ()).texts
    return [document.split("\n") for document in documents if document == document.lower()]


def log_odds(run: str, sentences: list[str]) -> list[float]:
    """Of praise, the second of the classes that a run tells apart."""
    classifier = from_pretrained(run, precision="auto")
    assert isinstance(classifier, Encoder), f"{run} classifies no texts"
    praise = classifier.model.config.labels[1]
    answers = classifier.classify(sentences, truncate=True)
    chances = torch.tensor([dict(answer)[praise] for answer in answers])
    return chances.logit(eps=1e-4).tolist()


def praised(reviews: Sequence[list[str]], odds: Sequence[list[float]]) -> Iterator[tuple[str, float]]:
    """The sentences of reviews that take a side, and how probably they are praise, from their log-odds."""
    means = [fmean(min(max(one, -MOST_ODDS), MOST_ODDS) for one in review) for review in odds]
    middle = median(means)
    for sentences, own, mean in zip(reviews, odds, means, strict=True):
        score = mean - middle
        if abs(score) >= LEAST_SCORE:
            for sentence, one in zip(sentences, own, strict=True):
                yield sentence, 1 / (1 + math.exp(-OWN * one - REVIEW * score))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    found = reviews(given.data)
    sentences = [sentence for review in found for sentence in review]
    said = iter(log_odds(given.run, sentences))
    odds = [[next(said) for _ in review] for review in found]
    draw = random.Random(0).random
    rows = [
        (sentence, int(draw() < chance))
        for sentence, chance in praised(found, odds)
        if len(sentence.split()) in WORDS
    ]
    with given.output.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("text", "label"))
        table.writerows(rows)
    praise = sum(label for _, label in rows)
    print(
        f"{len(found):,} reviews of {len(sentences):,} sentences: {len(rows):,} labelled, {praise:,} praise"
    )


if __name__ == "__main__":
    main()
