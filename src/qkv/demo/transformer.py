"""The encoder-decoder on phrases of the Unicode CLDR: dates, times, quantities and money in two languages."""

from __future__ import annotations

import datetime
import random
from collections import Counter
from dataclasses import replace
from typing import cast

import torch

from qkv.config import DataConfig, RunConfig, TokenizerConfig, TrainConfig, TransformerConfig
from qkv.demo.lab import Lab, Part, accuracy, lot, recorded, sharpest, write_table
from qkv.explanations.alignment import align_texts
from qkv.metrics import alignment_error_rate, translation_scores
from qkv.pipelines import Translator, from_pretrained
from qkv.ragged import pack
from qkv.recording import record
from qkv.report.page import Figure, Measure, Scores, table
from qkv.report.pictures import heatmap

RECIPE = RunConfig(
    model=TransformerConfig(dim=128, depth=2, heads=4, mlp_dim=512, dropout=0.0, context=96),
    tokenizer=TokenizerConfig(kind="char"),
    train=TrainConfig(
        max_steps=600,
        batch_tokens=2048,
        learning_rate=2e-3,
        schedule="linear",
        warmup_steps=100,
        eval_steps=150,
    ),
)
SAMPLES = 12_000
SCORED = 500
EXAMPLE = "Thursday, March 5, 1987"

Pairs = list[tuple[str, str]]


def part(lab: Lab) -> Part:
    """Make the data, train, score and show."""
    folder = lab.data("transformer")
    train, valid = make_pairs()
    for name, pairs in (("train", train), ("valid", valid)):
        write_table(folder / f"{name}.csv", ("source", "target"), pairs)
    data = DataConfig(path=str(folder / "train.csv"), valid=str(folder / "valid.csv"))
    run = lab.train("transformer", replace(RECIPE, data=data))
    translator = cast(Translator, from_pretrained(run.folder, device="cpu"))
    scored = valid[:SCORED]
    sources, references = [source for source, _ in scored], [target for _, target in scored]
    translations = translator.translate(sources, num_beams=1)
    words = _dictionary(train)
    answers = {
        "Transformer": translations,
        "word for word": [" ".join(words.get(word, word) for word in source.split()) for source in sources],
        "copy": sources,
        "majority": [Counter(target for _, target in train).most_common(1)[0][0]] * len(sources),
    }
    return Part(
        key="transformer",
        title="Transformer: English to Hungarian dates and quantities",
        lead="Real phrases of the Unicode CLDR by Babel, character by character. Hungarian puts the year "
        "first and the weekday last, counts hours to 24 and writes numbers in its own way. A tenth of the "
        "values never occurs in training.",
        facts={
            **run.facts(),
            "data": f"{len(train):,} pairs, {len(valid):,} held out, {len(scored):,} of them scored",
            "words aligned": _aligned(translator),
        },
        scores=Scores(
            (Measure("exactly right", percent=True), Measure("BLEU", 1), Measure("chrF", 1)),
            {name: _score(texts, references) for name, texts in answers.items()},
            frozenset({"Transformer"}),
        ),
        figures=(run.curve(), _samples(scored, translations), _attention(translator)),
    )


# ---------------------------------------------------------------- data


def make_pairs() -> tuple[Pairs, Pairs]:
    """English phrases with their Hungarian, in random order: to train on, and with values that those lack."""
    train: dict[str, str] = {}
    valid: dict[str, str] = {}
    rng = random.Random(0)
    for _ in range(SAMPLES):
        value, (english, hungarian) = rng.choice(_KINDS)(rng)
        (valid if lot(value) < 0.1 else train)[english] = hungarian
    return list(train.items()), [pair for pair in valid.items() if pair[0] not in train]


def aligned_dates(count: int) -> list[tuple[str, str, list[tuple[int, int]]]]:
    """Dates that training lacks in both languages, and which English word is which Hungarian one."""
    from babel.dates import format_date

    rng = random.Random(1)
    found: list[tuple[str, str, list[tuple[int, int]]]] = []
    while len(found) < count:
        day = _moment(rng).date()
        if lot(day.isoformat()) < 0.1:
            english, hungarian = (format_date(day, "full", locale) for locale in LOCALES)
            # weekday, month, day and year, against year, month, day and weekday
            found.append((english, hungarian, [(0, 3), (1, 1), (2, 2), (3, 0)]))
    return found


Phrase = tuple[str, tuple[str, str]]
"""The value in a form of its own, and the phrase in both languages."""

LOCALES = ("en", "hu")


def _moment(rng: random.Random) -> datetime.datetime:
    minutes = rng.randrange(100 * 365 * 24 * 60)
    return datetime.datetime(1950, 1, 1) + datetime.timedelta(minutes=minutes)


def _date(rng: random.Random) -> Phrase:
    from babel.dates import format_date

    day = _moment(rng).date()
    form = rng.choice(("short", "medium", "long", "full", "full"))
    english, hungarian = (format_date(day, form, locale) for locale in LOCALES)
    return day.isoformat(), (english, hungarian)


def _part_of_date(rng: random.Random) -> Phrase:
    from babel.dates import format_skeleton

    day = _moment(rng).date()
    form = rng.choice(("yMMMM", "MMMEd", "yMMMEd", "yQQQQ", "MMMMd"))
    english, hungarian = (format_skeleton(form, day, locale=locale) for locale in LOCALES)
    return day.isoformat(), (english, hungarian)


def _time(rng: random.Random) -> Phrase:
    from babel.dates import format_datetime, format_time

    moment = _moment(rng)
    form = rng.choice(("short", "medium"))
    show = rng.choice((format_datetime, format_time))
    english, hungarian = (show(moment, form, locale=locale) for locale in LOCALES)
    return moment.isoformat(), (english, hungarian)


def _interval(rng: random.Random) -> Phrase:
    from babel.dates import format_interval

    begin = _moment(rng).date()
    end = begin + datetime.timedelta(days=rng.randrange(1, 300))
    english, hungarian = (format_interval(begin, end, "yMMMd", locale=locale) for locale in LOCALES)
    return begin.isoformat(), (english, hungarian)


def _duration(rng: random.Random) -> Phrase:
    from babel.dates import format_timedelta

    unit, most = rng.choice((("minutes", 59), ("hours", 23), ("days", 6), ("weeks", 4)))
    span = datetime.timedelta(**{unit: rng.choice((-1, 1)) * rng.randint(1, most)})
    english, hungarian = (
        format_timedelta(span, threshold=1, add_direction=True, locale=locale) for locale in LOCALES
    )
    return str(span), (english, hungarian)


_UNITS = [
    "length-kilometer",
    "length-meter",
    "length-centimeter",
    "length-mile",
    "mass-kilogram",
    "mass-gram",
    "mass-tonne",
    "volume-liter",
    "speed-kilometer-per-hour",
    "temperature-celsius",
    "area-hectare",
    "area-square-kilometer",
    "digital-megabyte",
    "digital-gigabyte",
    "duration-year",
    "duration-month",
    "duration-week",
    "duration-day",
    "duration-hour",
    "duration-minute",
    "power-kilowatt",
    "energy-kilojoule",
]


def _number(rng: random.Random) -> float | int:
    size = 10 ** rng.randint(1, 6)
    return rng.choice((rng.randrange(size), rng.randrange(size), rng.randrange(10 * size) / 10))


def _quantity(rng: random.Random) -> Phrase:
    from babel.units import format_unit

    number, unit = _number(rng), rng.choice(_UNITS)
    english, hungarian = (format_unit(number, unit, "long", locale=locale) for locale in LOCALES)
    return str(number), (english, hungarian)


def _money(rng: random.Random) -> Phrase:
    from babel.numbers import format_currency

    number, currency = _number(rng), rng.choice(("EUR", "USD", "GBP", "HUF", "CHF", "JPY", "CZK", "PLN"))
    form = rng.choice(("standard", "name"))
    english, hungarian = (
        format_currency(number, currency, locale=locale, format_type=form) for locale in LOCALES
    )
    return str(number), (english, hungarian)


_KINDS = (_date, _date, _part_of_date, _time, _interval, _duration, _quantity, _quantity, _money)


# ---------------------------------------------------------------- baselines and scores


def _dictionary(pairs: Pairs) -> dict[str, str]:
    """For each English word, but not for numbers, the Hungarian one with the largest Dice coefficient."""
    english: Counter[str] = Counter()
    hungarian: Counter[str] = Counter()
    together: Counter[tuple[str, str]] = Counter()
    for source, target in pairs:
        ours, theirs = ({w for w in text.split() if not w[0].isdigit()} for text in (source, target))
        english.update(ours)
        hungarian.update(theirs)
        together.update((a, b) for a in ours for b in theirs)
    best: dict[str, tuple[float, str]] = {}
    for (a, b), count in together.items():
        best[a] = max(best.get(a, (0.0, "")), (2 * count / (english[a] + hungarian[b]), b))
    return {word: translation for word, (_, translation) in best.items()}


def _score(texts: list[str], references: list[str]) -> tuple[float, ...]:
    """Share of exact answers, BLEU and chrF."""
    found = translation_scores(texts, references)
    return accuracy(texts, references), cast(float, found["bleu"]), cast(float, found["chrf"])


def _aligned(translator: Translator, count: int = 100) -> str:
    """How well cross-attention tells which word of a date came from which."""
    dates = aligned_dates(count)
    found = [align_texts(translator, english, hungarian) for english, hungarian, _ in dates]
    links = [() if alignment is None else alignment.links for alignment in found]
    rate = alignment_error_rate(links, [gold for *_, gold in dates])
    return f"with an alignment error rate of {rate:.1%} on {count} dates, by attention alone"


# ---------------------------------------------------------------- pictures


def _samples(scored: Pairs, translations: list[str]) -> Figure:
    """The first answers of different lengths, and some wrong ones if there are any."""
    rows = [(source, text, target) for (source, target), text in zip(scored, translations, strict=True)]
    wrong = [row for row in rows if row[1] != row[2]][:3]
    shown = [*rows[:9], *(row for row in wrong if row not in rows[:9])]
    cells = [(source, text, "the same" if text == target else target) for source, text, target in shown]
    return Figure("It translates", table(("English", "the model's Hungarian", "CLDR"), cells), wide=True)


def _attention(translator: Translator) -> Figure:
    """The cross-attention of one head while it writes a date."""
    tokenizer, model = translator.tokenizer, translator.model
    source = tokenizer.encode(EXAMPLE).ids
    answer = translator.translate(EXAMPLE, num_beams=1)
    target = tokenizer.plain(answer)[: model.config.context - 1]
    assert tokenizer.eos_id is not None
    with record(translator, stacks=["cross"]) as maps:
        translator(pack([source]), pack([[model.config.pad_id, *target]]))
    # Row t is what writes target character t; the end token is no part of the text.
    letters = torch.tensor([i != tokenizer.eos_id for i in source]).expand(len(target) + 1, -1).clone()
    layer, head, weights = sharpest(maps, letters)
    rows = [*map(tokenizer.token, target), "end"]
    columns = ["end" if i == tokenizer.eos_id else tokenizer.token(i) for i in source]
    return Figure(
        "Where it looks while it writes",
        heatmap([_visible(r) for r in rows], [_visible(c) for c in columns], weights, "writing", "reading"),
        f"Cross-attention, layer {layer + 1}, head {head + 1}: the sharpest head, writing “{answer}”. "
        f"{recorded(maps)}",
        wide=True,
    )


def _visible(token: str) -> str:
    return "␣" if token.isspace() else token
