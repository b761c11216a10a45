"""Tiny data of every kind that training reads, learnable in a few dozen steps, written to a folder."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

from PIL import Image

WORDS = ["red", "green", "blue", "round", "square", "small", "large", "old", "new", "quick"]


def write(folder: Path, family: str) -> str:
    """Write the family's data; returns what goes to data.path."""
    return {"gpt": text, "bert": labelled, "transformer": pairs, "vit": images}[family](folder)


def text(folder: Path, lines: int = 300) -> str:
    """A repeating song."""
    path = folder / "song.txt"
    path.write_text("".join(f"{n % 10} bottles hang on the wall\n" for n in range(lines)), encoding="utf-8")
    return str(path)


def documents(folder: Path, count: int = 40) -> str:
    """Documents of several sentences, each about one word."""
    rng = random.Random(0)
    made = []
    for n in range(count):
        topic = WORDS[n % len(WORDS)]
        made.append(
            "\n".join(
                f"the {topic} thing is {rng.choice(['fine', 'awful', *WORDS])} and {topic}" for _ in range(5)
            )
        )
    path = folder / "documents.txt"
    path.write_text("\n\n".join(made) + "\n", encoding="utf-8")
    return str(path)


def labelled(folder: Path, count: int = 120) -> str:
    """Texts whose label is decided by one word in them."""
    rng = random.Random(0)
    path = folder / "labelled.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for n in range(count):
            good = n % 2 == 0
            words = [*rng.choices(WORDS, k=4), "fine" if good else "awful"]
            rng.shuffle(words)
            table.writerow([" ".join(words), "good" if good else "bad"])
    return str(path)


def pairs(folder: Path, count: int = 200) -> str:
    """Word sequences and the same words as capitals."""
    rng = random.Random(0)
    sources = [" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(count)]
    (folder / "train.en").write_text("".join(f"{s}\n" for s in sources), encoding="utf-8")
    (folder / "train.xx").write_text("".join(f"{s.upper()}\n" for s in sources), encoding="utf-8")
    return f"{folder / 'train.en'},{folder / 'train.xx'}"


def images(folder: Path, count: int = 40) -> str:
    """Dark and bright noise, 8 by 8 pixels of grey, in folders of their class."""
    rng = random.Random(0)
    for name, low in (("dark", 0), ("bright", 128)):
        (folder / "images" / name).mkdir(parents=True)
        for n in range(count // 2):
            image = Image.new("L", (8, 8))
            image.putdata([low + rng.randrange(128) for _ in range(64)])
            image.save(folder / "images" / name / f"{n}.png")
    return str(folder / "images")


# ---------------------------------------------------------------- BERT's other tasks


def table(path: Path, rows: list[dict]) -> str:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def multi_label(folder: Path, count: int = 120) -> str:
    """Texts with a word that has two labels, one or none."""
    rng = random.Random(0)
    labels = {"fine": ["good", "kind"], "awful": ["bad"], "plain": []}
    rows = []
    for n in range(count):
        word = list(labels)[n % 3]
        rows.append({"text": f"{rng.choice(WORDS)} {word} {rng.choice(WORDS)}", "label": labels[word]})
    return table(folder / "multi_label.jsonl", rows)


def regression(folder: Path, count: int = 120) -> str:
    """Pairs of texts, whose value is high if the first one has a certain word and low otherwise."""
    rng = random.Random(0)
    rows = []
    for n in range(count):
        words = [*rng.choices(WORDS, k=2), "fine" if n % 2 else "awful"]
        value = 1.5 if n % 2 else -0.5
        rows.append({"text": " ".join(words), "text_pair": rng.choice(WORDS), "label": value})
    return table(folder / "regression.jsonl", rows)


def conll(folder: Path, count: int = 120) -> str:
    """Sentences in which two words begin and go on with an entity, with a middle column of no use."""
    rng = random.Random(0)
    tags = {"red": "B-COL", "green": "I-COL", "old": "B-AGE"}
    sentences = [rng.choices(WORDS, k=rng.randint(2, 6)) for _ in range(count)]
    text = "\n".join("".join(f"{w} x {tags.get(w, 'O')}\n" for w in sentence) for sentence in sentences)
    (folder / "entities.conll").write_text(f"-DOCSTART- -X- O\n\n{text}", encoding="utf-8")
    return str(folder / "entities.conll")


def contrastive(folder: Path, count: int = 120) -> str:
    """Texts of one word, and the same word within others."""
    rng = random.Random(0)
    chosen = [rng.choice(WORDS) for _ in range(count)]
    rows = "".join(f"{w} {n % 7},a {w} one\n" for n, w in enumerate(chosen))
    (folder / "pairs.csv").write_text(f"text,text_pair\n{rows}", encoding="utf-8")
    return str(folder / "pairs.csv")
