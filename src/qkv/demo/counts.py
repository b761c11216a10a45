"""Models that only count: what a GPT and a BERT have to beat.

Legend: T tokens, M selected tokens, N pairs, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from qkv.data import Sampler
from qkv.data.batches import MaskedBatch
from qkv.data.dataset import Ids
from qkv.data.documents import MaskedDataset
from qkv.demo.lab import accuracy, logistic_regression

Labelled = tuple[Sequence[str], Sequence[str]]
"""Texts and the class of each."""

# ---------------------------------------------------------------- running text


class KneserNey:
    """Interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999, 3): the best plain n-gram model.

    The counts, and the discounts that are derived from counts of counts, are of the training tokens only.
    """

    def __init__(self, stream: Ids, order: int, vocab_size: int) -> None:
        """stream: training token ids. A run of `order` ids is kept as one 64-bit number."""
        if vocab_size**order >= 2**63:
            raise ValueError(f"runs of {order} tokens out of {vocab_size} do not fit 64 bits")
        self.vocab_size = vocab_size
        grams, counts = np.unique(_runs(stream, order, vocab_size), return_counts=True)
        self.levels = [_Level(grams, counts, vocab_size)]
        for shorter in range(order - 1, 0, -1):
            # Below the longest, what counts is after how many different tokens a run occurred (equation 21).
            grams, counts = np.unique(grams % vocab_size**shorter, return_counts=True)
            self.levels.append(_Level(grams, counts, vocab_size))
        self.levels.reverse()

    def log_probabilities(self, stream: Ids) -> np.ndarray:
        """ln of each token's probability after those before it; the first `order` - 1 are not asked for."""
        order = len(self.levels)
        known: np.ndarray | float = 1 / self.vocab_size
        for level, runs in zip(self.levels, self._suffixes(stream, order), strict=True):
            known = level.interpolate(runs, known)
        return np.log(known)

    def _suffixes(self, stream: Ids, order: int) -> Iterator[np.ndarray]:
        runs = _runs(stream, order, self.vocab_size)
        for length in range(1, order + 1):
            yield runs % self.vocab_size**length


class _Level:
    """The runs of one length: counts, and how much of each context's probability goes to shorter runs."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray, vocab_size: int) -> None:
        self.grams, self.counts, self.vocab_size = grams, counts, vocab_size
        few = np.bincount(counts.clip(max=4), minlength=5)[1:5].clip(
            min=1
        )  # runs that occurred 1, 2, 3, 4 times
        share = few[0] / (few[0] + 2 * few[1])
        steps = np.arange(1, 4)
        discounts = steps - (steps + 1) * share * few[1:] / few[:3]  # equation 17
        # Where hardly any run is rare (single tokens), the estimates mean nothing.
        discounts = np.where((discounts > 0) & (discounts < steps), discounts, steps / 2)
        self.discounts = np.concatenate([[0.0], discounts])[counts.clip(max=3)]
        self.contexts, which = np.unique(grams // vocab_size, return_inverse=True)
        self.totals = np.bincount(which, counts)
        self.freed = np.bincount(which, self.discounts) / self.totals

    def interpolate(self, runs: np.ndarray, shorter: np.ndarray | float) -> np.ndarray:
        """Probability of each run's last token: discounted counts and, for the rest, that by shorter runs."""
        context, seen = _find(self.contexts, runs // self.vocab_size)
        gram, occurred = _find(self.grams, runs)
        own = np.where(occurred, (self.counts - self.discounts)[gram] / self.totals[context], 0.0)
        return np.where(seen, own + self.freed[context] * shorter, shorter)


def _runs(stream: Ids, length: int, vocab_size: int) -> np.ndarray:
    """Each run of `length` tokens as one number, the last token its lowest digit."""
    runs = np.zeros(len(stream) - length + 1, dtype=np.int64)
    for offset in range(length):
        runs = runs * vocab_size + stream[offset : offset + len(runs)]
    return runs


def _find(known: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted number is among the sorted known ones, and whether it is there."""
    places = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return places, known[places] == wanted


# ---------------------------------------------------------------- masked words


class Neighbours:
    """P(word | left) and P(right | word), each with absolute discounting (Ney et al. 1994)."""

    def __init__(self, stream: Ids, vocab_size: int) -> None:
        """stream: training token ids."""
        V = vocab_size
        counts = np.bincount(stream, minlength=V)
        self.occurs = counts > 0  # (V,)
        self.single = ((counts + 0.1) / (counts + 0.1).sum()).astype(np.float32)  # (V,)
        pairs = np.bincount(stream[:-1] * V + stream[1:], minlength=V * V).reshape(V, V)
        once, twice = int((pairs == 1).sum()), int((pairs == 2).sum())
        discount = (once + 1) / (once + 2 * twice + 2)  # one of each beside those that occurred
        total = pairs.sum(1, keepdims=True)  # (V, 1)
        freed = np.where(total, discount * (pairs > 0).sum(1, keepdims=True) / total.clip(1), 1.0)
        next = pairs.astype(np.float32)
        del pairs  # in place from here: with 8,000 tokens each copy is 256 MB
        next -= np.float32(discount)
        next.clip(0, out=next)
        next /= total.clip(1).astype(np.float32)
        next += freed.astype(np.float32) * self.single
        self.next = np.log(next, out=next)  # (V, V): log P(column | row)

    def guesses(self, left: Ids, right: Ids) -> dict[str, Ids]:
        """The likeliest word by its frequency, by its left and right neighbours, and by both, (M,) each."""
        prior = np.log(self.single)
        found: dict[str, list[Ids]] = {}
        for start in range(0, len(left), 256):
            some = slice(start, start + 256)
            before = self.next[left[some]]  # (256, V)
            # What never occurs, such as [MASK], says nothing; on the left smoothing sees to that by itself.
            after = np.where(self.occurs[right[some], None], self.next[:, right[some]].T, 0.0)
            for name, scores in (
                ("unigram", np.broadcast_to(prior, before.shape)),
                ("left bigram", before),
                ("right bigram", prior + after),
                ("both bigrams", before + after),
            ):
                found.setdefault(name, []).append(scores.argmax(1))
        return {name: np.concatenate(parts) for name, parts in found.items()}


def masked_word_accuracies(train: MaskedDataset, valid: MaskedDataset) -> dict[str, float]:
    """The share of the selected tokens that counts of the training text get right, by the kind of counts.

    Tokens, places and labels are those that BERT is scored on.
    """
    neighbours = Neighbours(train.sentences.join(0, len(train.sentences)), len(train.is_text))
    right: Counter[str] = Counter()
    selected = 0
    for batch in _batches(valid):
        ids, places, labels = batch.ids.values.numpy(), batch.selected.numpy(), batch.labels.numpy()
        hidden = ids[places] == valid.mask
        for name, guess in neighbours.guesses(ids[places - 1], ids[places + 1]).items():
            # What is not hidden is the word itself or a random one, as BERT sees too.
            right[name] += int((np.where(hidden, guess, ids[places]) == labels).sum())
        selected += len(labels)
    return {name: count / selected for name, count in right.items()}


def _batches(dataset: MaskedDataset) -> Iterator[MaskedBatch]:
    """All samples as evaluation sees them."""
    for indices in Sampler(dataset.costs, 8192, seed=0).epoch(0):
        yield dataset.batch(indices, epoch=0)


# ---------------------------------------------------------------- next sentences


class Overlap:
    """Whether B follows A, by the cosine of their TF-IDF vectors and a threshold learnt on training pairs."""

    def __init__(self, train: MaskedDataset) -> None:
        V = len(train.is_text)
        occurs = np.zeros(V)
        for document in range(len(train.bounds) - 1):
            occurs[np.unique(train.sentences.join(train.bounds[document], train.bounds[document + 1]))] += 1
        self.weight = np.log((1 + len(train.bounds)) / (1 + occurs)) * train.is_text  # (V,)
        cosine, follows = self._pairs(train)
        order = np.argsort(-cosine)
        # With the first k pairs taken as following: right are those that follow, and all others that do not.
        gained = np.cumsum(np.where(follows[order], 1, -1))
        self.threshold = float(cosine[order][int(gained.argmax())])

    def accuracy(self, dataset: MaskedDataset) -> float:
        """The share of pairs that are told rightly."""
        cosine, follows = self._pairs(dataset)
        return float(((cosine >= self.threshold) == follows).mean())

    def _pairs(self, dataset: MaskedDataset) -> tuple[np.ndarray, np.ndarray]:
        """Each pair's cosine, and whether B follows, (N,) each."""
        cosines, follows = [], []
        for batch in _batches(dataset):
            follows.append(batch.next_labels.numpy() == 0)
            for ids, segments in zip(batch.ids.split(), batch.ids.like(batch.segments).split(), strict=True):
                a, b = (
                    np.bincount(ids[segments == s].numpy(), minlength=len(self.weight)) * self.weight
                    for s in (0, 1)
                )
                cosines.append(a @ b / max(float(np.sqrt((a @ a) * (b @ b))), 1e-9))
        return np.array(cosines), np.concatenate(follows)


# ---------------------------------------------------------------- classes


def majority_accuracy(train: Sequence[str], valid: Sequence[str]) -> float:
    """How often the training data's most frequent class is right."""
    return accuracy([Counter(train).most_common(1)[0][0]] * len(valid), valid)


def tfidf_accuracy(train: Labelled, valid: Labelled) -> float:
    """How often logistic regression on TF-IDF vectors of words and pairs of words is right."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    model = logistic_regression(words.fit_transform(train[0]), train[1])
    return accuracy(model.predict(words.transform(valid[0])), valid[1])
