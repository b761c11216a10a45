"""Explanations made by hand, of known values, for what shows, saves and compares them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qkv.explanations.explanation import (
    Alignment,
    Attention,
    Choice,
    Explanation,
    Faithfulness,
    Guess,
    Method,
    Picture,
    Relevance,
    Units,
)

NASTY = ' </script><script>document.title="hacked"</script><img src=x onerror=alert(1)>'


def text(*units: str, name="text", segments=(), special=("[CLS]", "[SEP]", "</s>")) -> Units:
    """A sequence of these units; a word begins at each leading space."""
    words, count = [], -1
    for i, unit in enumerate(units):
        count += unit not in special and (unit.startswith(" ") or i == 0 or units[i - 1] in special)
        words.append(-1 if unit in special else count)
    return Units(name, units, tuple(unit in special for unit in units), tuple(segments), tuple(words))


def attention(stack, queries: Units, keys: Units, layers=3, heads=4, seed=0) -> Attention:
    """Sharp and soft heads, over what a stack can see."""
    draw = np.random.default_rng(seed)
    Uq, Uk = len(queries.units), len(keys.units)
    scores = draw.normal(size=(layers, heads, Uq, Uk)) * np.linspace(0.5, 3.5, heads)[:, None, None]
    places = np.arange(Uk)[None] - np.arange(Uq)[:, None]  # (Uq, Uk)
    scores[:, 0] -= np.abs(places + 1)
    if stack == "decoder":
        scores = np.where(places > 0, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return Attention(stack, queries.name, keys.name, weights.astype(np.float16), tuple(range(layers)))


def faithfulness(probability: float, good: bool, seed=0, orders=6) -> Faithfulness:
    """Curves that fall and rise soon, or as random orders do."""
    draw = np.random.default_rng(seed)
    shares = np.linspace(0, 1, 11, dtype=np.float32)

    def curves(power, count):
        noise = draw.normal(scale=0.03, size=(count, 11)) * (shares * (1 - shares) * 4)
        return (probability * (1 - shares**power) + noise).clip(0, 1).astype(np.float32)

    sharp = 0.3 if good else 1.0
    return Faithfulness(
        shares,
        curves(sharp, 1)[0],
        curves(1 / sharp, 1)[0][::-1].copy(),
        curves(1.0, orders),
        curves(1.0, orders)[:, ::-1].copy(),
    )


def relevance(method: Method, sequences, seen: int, seed=0, probability=0.9, matrix=None) -> Relevance:
    """Values of the units of the last sequence up to `seen`, and of all others."""
    draw = np.random.default_rng([seed, len(method)])
    values = {}
    for sequence in sequences:
        drawn = draw.normal(size=len(sequence.units)).astype(np.float32)
        if method in ("attention", "rollout", "flow", "relevance"):
            drawn = np.abs(drawn) ** 2
        drawn[np.array(sequence.special)] *= 0.3
        if sequence is sequences[-1]:
            drawn[seen + 1 :] = 0
        values[sequence.name] = drawn
    good = method != "attention"
    return Relevance(method, values, matrix or {}, faithfulness(probability, good, seed))


METHODS: tuple[Method, ...] = ("relevance", "rollout", "integrated_gradients", "attention")


def guesses(*names: str, first=0.82) -> tuple[Guess, ...]:
    rest = (1 - first) / max(len(names) - 1, 1)
    return tuple(Guess(name, first if i == 0 else rest * 0.9 / i) for i, name in enumerate(names))


def lens(depth: int, names, seed=0) -> tuple[tuple[Guess, ...], ...]:
    draw = np.random.default_rng(seed)
    return tuple(
        tuple(
            Guess(names[j], float(p))
            for j, p in zip(draw.permutation(len(names)), (0.5, 0.2, 0.1), strict=False)
        )
        for _ in range(depth)
    )


def classified(*units: str, model="runs/reviews", seed=0, segments=(), layers=3, heads=4) -> Explanation:
    """What a BERT makes of a text or a pair."""
    read = text(*units, segments=segments)
    U = len(units)
    square = np.random.default_rng(seed).random((U, U)).astype(np.float32) ** 3
    relevances = tuple(relevance(method, [read], U, seed, matrix={"encoder": square}) for method in METHODS)
    names = ("positive", "negative", "neutral")
    importance = np.random.default_rng(seed).normal(size=(layers, heads)).astype(np.float32) / 5
    choice = Choice(
        "positive", 0.82, guesses(*names), "text", 0, relevances, lens(layers, names), {"encoder": importance}
    )
    looks = attention("encoder", read, read, layers, heads, seed)
    return Explanation("bert", model, (read,), (choice,), (looks,), 2e-7)


SENTENCE = (
    "[CLS]",
    "a",
    " wonder",
    "fully",
    " fine",
    " film",
    ",",
    " despite",
    " a",
    " dull",
    " start",
    ".",
    "[SEP]",
)


def sentence(**changes) -> Explanation:
    return classified(*SENTENCE, **changes)


def pair() -> Explanation:
    first = ("[CLS]", "two", " dogs", " run", " in", " the", " snow", ".", "[SEP]")
    second = ("animals", " are", " out", "doors", ".", "[SEP]")
    return classified(*first, *second, segments=(0,) * len(first) + (1,) * len(second), model="runs/nli")


def tagged() -> Explanation:
    """What a BERT makes of each word."""
    read = text("[CLS]", "Anna", " lives", " in", " New", " York", ".", "[SEP]")
    tags = ("B-PER", "O", "O", "B-LOC", "I-LOC", "O")
    choices = tuple(
        Choice(
            tag,
            0.9,
            guesses(tag, "B-ORG", first=0.9),
            "text",
            unit,
            (relevance("relevance", [read], 8, unit),),
        )
        for unit, tag in enumerate(tags, start=1)
    )
    return Explanation("bert", "runs/tags", (read,), choices, (attention("encoder", read, read),), 1e-7)


def generated() -> Explanation:
    """What a GPT goes on with behind a prompt."""
    units = ("def", " main", "(", "args", "):", "\n", "    ", "return", " args", ".", "name", "\n")
    read = text(*units[:-1], special=())
    first = 4
    choices = tuple(
        Choice(
            units[unit + 1],
            0.95 - 0.12 * (unit - first),
            guesses(units[unit + 1], " self", " None", "\t", first=0.95 - 0.12 * (unit - first)),
            "text",
            unit,
            tuple(relevance(method, [read], unit, unit) for method in METHODS),
            lens(3, units[-4:], unit),
            {"decoder": np.random.default_rng(unit).normal(size=(3, 4)).astype(np.float32) / 5},
        )
        for unit in range(first, len(units) - 1)
    )
    return Explanation("gpt", "runs/gpt", (read,), choices, (attention("decoder", read, read),), 1e-6)


def translated() -> Explanation:
    """What a Transformer makes of a source."""
    source = text(
        "Two", " dogs", " are", " run", "ning", " through", " the", " snow", ".", "</s>", name="source"
    )
    written = ("</s>", "Zwei", " Hunde", " laufen", " durch", " den", " Schnee", ".", "</s>")
    target = text(*written[:-1], name="target")
    choices = tuple(
        Choice(
            written[unit + 1],
            0.9 - 0.05 * unit,
            guesses(written[unit + 1], " die", " das", first=0.9 - 0.05 * unit),
            "target",
            unit,
            tuple(relevance(method, [source, target], unit, unit) for method in METHODS[:3]),
            lens(3, written[1:5], unit),
            {
                stack: np.random.default_rng(unit).normal(size=(3, 4)).astype(np.float32) / 5
                for stack in ("encoder", "decoder", "cross")
            },
        )
        for unit in range(len(target.units))
    )
    matrix = np.full((6, 7), 0.02, np.float32)  # the full stops belong to the last words
    links = ((0, 0), (1, 1), (3, 2), (4, 3), (5, 4), (6, 5))
    for word, place in links:
        matrix[place, word] = 1.0
    matrix[2, 2] = 0.4
    matrix /= matrix.sum(1, keepdims=True)
    return Explanation(
        "transformer",
        "runs/multi30k",
        (source, target),
        choices,
        (
            attention("encoder", source, source),
            attention("decoder", target, target),
            attention("cross", target, source),
        ),
        3e-7,
        alignment=Alignment(matrix, links, ((2, 1),)),
    )


def seen(height=48, width=60, rows=6, columns=6) -> Explanation:
    """What a ViT makes of an image: a disc on a shaded ground. Patches here need not be squares."""
    y, x = np.mgrid[:height, :width]
    disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 3) ** 2
    ground = np.stack([90 + y, 130 + x, 170 - y], -1)
    pixels = np.where(disc[..., None], np.array([235, 180, 60]), ground).astype(np.uint8)
    units = ("class", *(f"{r},{c}" for r in range(rows) for c in range(columns)))
    read = Units("image", units, (True, *[False] * (rows * columns)))
    centre = (np.mgrid[:rows, :columns] - np.array([rows - 1, columns - 1])[:, None, None] / 2) ** 2
    bump = np.exp(-centre.sum(0) / 3).astype(np.float32).reshape(-1)
    relevances = []
    for method in METHODS[:3]:
        made = relevance(method, [read], len(units))
        values = 0.3 * made.values["image"] / np.abs(made.values["image"]).max()
        values[1:] += bump
        relevances.append(replace(made, values={"image": values.astype(np.float32)}))
    names, importance = ("disc", "square", "cross"), {"encoder": np.full((3, 4), 0.2, np.float32)}
    found = guesses(*names, first=0.91)
    choice = Choice("disc", 0.91, found, "image", 0, tuple(relevances), lens(3, names), importance)
    return Explanation(
        "vit",
        "runs/shapes",
        (read,),
        (choice,),
        (attention("encoder", read, read),),
        1e-7,
        picture=Picture(pixels, (rows, columns)),
    )


def long(units=512, layers=12, heads=12) -> Explanation:
    """A text of many tokens, read by a model of many heads, whose weights are widely spread."""
    tokens = ("[CLS]", *(f" word{i}" for i in range(units - 2)), "[SEP]")
    shallow = classified(*tokens, layers=1, heads=heads)
    one = shallow.attention[0]
    whole = replace(one, weights=one.weights.repeat(layers, axis=0), layers=tuple(range(layers)))
    importance = np.zeros((layers, heads), np.float32)
    choice = replace(shallow.choices[0], head_importance={"encoder": importance})
    return replace(shallow, attention=(whole,), choices=(choice,))
