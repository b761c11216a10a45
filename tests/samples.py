"""Tiny data of every kind that training reads, learnable in a few dozen steps, written to a folder."""

from __future__ import annotations

import csv
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
