"""ViT on scikit-learn's handwritten digits, 8x8 pixels each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image

from qkv.config import AugmentConfig, DataConfig, RunConfig, TrainConfig, ViTConfig
from qkv.demo.counts import majority_accuracy
from qkv.demo.lab import Lab, Part, accuracy, logistic_regression, lot, recorded
from qkv.pipelines import ImageClassifier, from_pretrained
from qkv.recording import record
from qkv.report.page import Figure, Measure, Scores
from qkv.report.pictures import gallery, overlay

RECIPE = RunConfig(
    model=ViTConfig(image_size=0, patch_size=2, dim=64, depth=4, heads=4, mlp_dim=256, dropout=0.1),
    train=TrainConfig(
        max_steps=1000,
        batch_tokens=2048,
        optimizer="muon",
        learning_rate=2e-3,
        warmup_steps=50,
        weight_decay=0.05,
        eval_steps=200,
    ),
    augment=AugmentConfig(crop_padding=1),
)


def part(lab: Lab) -> Part:
    """Make the data, train, score and show."""
    folder = lab.data("vit")
    files = _write_images(folder)
    data = DataConfig(path=str(folder / "train"), valid=str(folder / "valid"))
    run = lab.train("vit", replace(RECIPE, data=data))
    pixels = {split: np.stack([_pixels(path) for path in paths]) for split, paths in files.items()}
    labels = {split: [path.parent.name for path in paths] for split, paths in files.items()}
    flat = {split: images.reshape(len(images), -1) / 240 for split, images in pixels.items()}
    linear = logistic_regression(flat["train"], labels["train"])
    classifier = cast(ImageClassifier, from_pretrained(run.folder, device="cpu"))
    return Part(
        key="vit",
        title="ViT: handwritten digits",
        lead="Scikit-learn's 1,797 digits as PNG files of 8×8 grey pixels, a folder for each class, a fifth "
        "held out. A patch is 2×2 pixels.",
        facts={**run.facts(), "data": f"{len(files['train']):,} images, {len(files['valid']):,} held out"},
        scores=Scores(
            (Measure("digit right", percent=True),),
            {
                "ViT": (run.scores["label_accuracy"],),
                "logistic regression on pixels": (accuracy(linear.predict(flat["valid"]), labels["valid"]),),
                "majority": (majority_accuracy(labels["train"], labels["valid"]),),
            },
            frozenset({"ViT"}),
        ),
        figures=(
            run.curve(),
            _samples(classifier, files["valid"]),
            _attention(classifier, files["valid"]),
        ),
    )


def _write_images(folder: Path) -> dict[str, list[Path]]:
    """One PNG a digit, at split/class/number.png; returns the paths by split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    files: dict[str, list[Path]] = {"train": [], "valid": []}
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "valid" if lot(str(number)) < 0.2 else "train"
        path = folder / split / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).save(path)
        files[split].append(path)
    return files


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def _samples(classifier: ImageClassifier, files: list[Path]) -> Figure:
    """Held-out images, those it gets wrong first."""
    guesses = classifier.classify(files, top_k=1)
    answers = [
        (_pixels(path), guess[0].name, path.parent.name) for path, guess in zip(files, guesses, strict=True)
    ]
    answers.sort(key=lambda answer: answer[1] == answer[2])
    shown = [
        (pixels, said if said == truth else f"{said}, is {truth}", said == truth)
        for pixels, said, truth in answers[:24]
    ]
    wrong = sum(said != truth for _, said, truth in answers)
    return Figure(
        "It reads", gallery(shown), f"Wrong: {wrong} of {len(answers)} held-out images, shown first."
    )


def _attention(classifier: ImageClassifier, files: list[Path]) -> Figure:
    """What the class token of the last layer looks at, for one image of each class."""
    by_class = {path.parent.name: path for path in reversed(files)}
    paths = [by_class[name] for name in sorted(by_class)]
    with record(classifier, layers=[-1], rows=[0]) as maps, torch.inference_mode():
        classifier(torch.stack([classifier.images(path) for path in paths]))
    last = classifier.model.config.depth - 1
    side = classifier.images.size // classifier.model.config.patch_size
    pictures = []
    for path, weights in zip(paths, maps[last], strict=True):
        patches = weights.mean(0)[0, 1:].view(side, side).numpy()  # heads (H, 1, 1 + P) -> (rows, columns)
        pictures.append(overlay(_pixels(path), patches, path.parent.name))
    return Figure(
        "Where the class token looks",
        f'<div class="pairs">{"".join(pictures)}</div>',
        f"Attention of the last layer, mean of its heads, beside each image. {recorded(maps)}",
        wide=True,
    )
