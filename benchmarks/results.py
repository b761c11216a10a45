"""A published result, reproduced: its recipe trained with each seed, scored, and told as rows of a table.

usage: python benchmarks/results.py RESULT --data FOLDER [--seeds 0 1 2 3 4] [--out FOLDER] [--minilm FOLDER]

A seed is trained and scored by `qkv train` and `qkv eval` in processes of their own, whose commands are
printed. What they found is kept in the seed's run folder, as result.json: an interrupted series goes on where
it stopped, and one that is done is only printed. FOLDER holds the data that the results need:

    shakespeare.txt                             tinyshakespeare
    multi30k/{train,valid,test2016}.{en,de}     Multi30k, task 1, as it is
    multi30k/tok/{train,valid,test2016}.{en,de} the same in lower case, tokenised as Moses does
    cifar10/{train,test}.parquet                CIFAR-10, columns image and label
    english/{train,valid}.txt                   documents: a sentence a line, a blank line between documents
    sst2/{train,dev}.csv                        Stanford Sentiment Treebank, columns text and label
    rte/{train,valid}.csv                       RTE, columns premise, hypothesis and label
    conll2002/{train,valid}.conll               CoNLL-2002, Spanish: a word and its tag a line

--minilm names a local copy of all-MiniLM-L6-v2; without it, it comes from the Hub.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from qkv.checkpoint import CONFIG, read_metrics
from qkv.data.batches import LanguageBatch
from qkv.data.dataset import Ids, join, lay
from qkv.data.text import LanguageDataset
from qkv.files import replace_text
from qkv.job import resumed_job
from qkv.models import GPT
from qkv.objectives import Objective
from qkv.pipelines import TextGenerator, from_pretrained

RECIPES, SCRIPTS = Path(__file__).parent.parent / "recipes", Path(__file__).parent
FOUND = "result.json"
"""In a run folder: what is known of it once it is trained and scored."""

Scores = dict[str, float | str]


# ---------------------------------------------------------------- measures beside `qkv eval`


@torch.no_grad()
def estimated_loss(
    model: GPT, stream: Ids, context: int, batches: int = 200, windows: int = 64, seed: int = 0
) -> float:
    """nanoGPT's estimate: the mean loss in nats of random windows of a text.

    stream: ids of the text, (T,). context: tokens of a window. The model's mode decides about dropout.
    """
    rng = np.random.default_rng(seed)
    objective, device = Objective(model), model.tokens.weight.device
    total = 0.0
    for _ in range(batches):
        starts = rng.integers(len(stream) - context, size=windows)
        drawn = [stream[start : start + context + 1].astype(np.int64) for start in starts]
        batch = LanguageBatch(lay([w[:-1] for w in drawn]), join([w[1:] for w in drawn]))
        (term,) = objective.terms(batch.to(device)).values()
        total += term.loss_sum().item() / len(term)
    return total / batches


def random_windows(run: Path) -> Scores:
    """`estimated_loss` of a GPT on its held-out text."""
    valid = resumed_job(run).valid
    generator = from_pretrained(run)
    assert isinstance(valid, LanguageDataset) and isinstance(generator, TextGenerator)
    model = generator.model
    return {"estimated_loss": estimated_loss(model, valid.stream, model.config.context)}


def time_to(loss: float) -> Callable[[Path], Scores]:
    """Seconds of training, evaluations included, until the first held-out loss that is as low."""

    def measure(run: Path) -> Scores:
        reached = (r["seconds"] for r in read_metrics(run) if r.get("valid_loss", math.inf) <= loss)
        return {"seconds_to_loss": next(reached, math.inf)}

    return measure


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Figure:
    """One number of a result."""

    title: str
    key: str
    """What `qkv eval` or a measure calls it."""
    form: str = ".2%"
    published: str = ""
    """What others measured."""


@dataclass(frozen=True)
class Result:
    """A recipe with its data, and what is measured on the run.

    In arguments {data}, {out} and {minilm} stand for what the command line names, {scripts} for this folder.
    """

    recipe: str
    """Its file in recipes/, without the ending."""
    train: tuple[str, ...]
    """What `qkv train` is given beside the recipe, the seed and the run folder."""
    figures: tuple[Figure, ...]
    evaluate: tuple[str, ...] = ()
    """What `qkv eval` is given beside the run folder; nothing: its own held-out data."""
    measures: tuple[Callable[[Path], Scores], ...] = ()
    """What else is measured."""
    after: str = ""
    """A result whose first seed's run this one needs."""
    prepare: tuple[str, ...] = ()
    """A script and its arguments, which makes the data before a seed is trained."""


def _data(train: str, valid: str = "") -> tuple[str, ...]:
    return ("--data", train) + (("--data.valid", valid) if valid else ())


def _aligned(folder: str, part: str) -> str:
    return f"{folder}/{part}.en,{folder}/{part}.de"


SHAKESPEARE = _data("{data}/shakespeare.txt")
TOKENISED, CASED = "{data}/multi30k/tok", "{data}/multi30k"
CIFAR = _data("{data}/cifar10/train.parquet")
CIFAR_TEST = _data("{data}/cifar10/test.parquet")
BEAM = ("--num-beams", "5")
"""As in Wu et al. 2021."""
SST2 = "{data}/sst2/train.csv", "{data}/sst2/dev.csv"
RTE = "{data}/rte/train.csv", "{data}/rte/valid.csv"
CONLL = _data("{data}/conll2002/train.conll", "{data}/conll2002/valid.conll")
MINILM = ("--init", "{minilm}")
ENGLISH = "{out}/bert-english/seed-0"
MINI = ("--model.dim", "256", "--model.depth", "4", "--model.heads", "4", "--model.mlp-dim", "1024")
"""The sizes of bert-english."""
FASTER = (
    *("--train.learning-rate", "5e-4", "--train.max-steps", "885", "--train.eval-steps", "885"),
    "--data.truncate",
)
"""Such a net learns at a higher rate than MiniLM; five epochs of SST-2 in its tokens, of which it reads 64:
that cuts 0.2 % of the sentences."""
TEACHER, REVIEWS = "{out}/bert-sst2/seed-0", "{out}/reviews.csv"
ONE_PASS = (
    *("--train.batch-tokens", "2048", "--train.max-steps", "670", "--train.eval-steps", "670"),
    *("--train.warmup-steps", "67", "--data.truncate"),
)
"""Of the sentences of reviews that a classifier has labelled."""
TWO_EPOCHS = (
    *("--train.max-steps", "322", "--train.eval-steps", "322", "--train.warmup-steps", "32"),
    *("--train.learning-rate", "5e-5"),
)
"""Of SST-2, for a net that has learnt from such sentences."""
FROM_SCRATCH = (
    *("--init", "", *MINI, "--model.dropout", "0.3"),
    *("--train.learning-rate", "1e-3", "--train.layer-decay", "1"),
    *("--train.max-steps", "4000", "--train.eval-steps", "4000"),
)
"""Of names in Spanish, 22 epochs in tokens of its own."""

ALL_TEXT = Figure("nats a character, all held-out text", "next_token_loss", ".4f")
WINDOWS = Figure("nats a character, nanoGPT's estimate", "estimated_loss", ".4f")
BLEU, CHRF = Figure("BLEU", "bleu", ".2f"), Figure("chrF", "chrf", ".2f")
RIGHT = Figure("labels right", "label_accuracy")
F1 = Figure("F1 of entities", "f1", ".2%", "81.4 % on testb (best system of 2002)")

RESULTS = {
    "gpt-shakespeare": Result(
        "gpt-shakespeare",
        SHAKESPEARE,
        (
            replace(ALL_TEXT, published="1.4697 (nanoGPT)"),
            replace(WINDOWS, published="1.4697 (nanoGPT)"),
        ),
        measures=(random_windows,),
    ),
    "gpt-shakespeare-cpu": Result(
        "gpt-shakespeare-cpu",
        SHAKESPEARE,
        (
            replace(ALL_TEXT, published="1.88 (nanoGPT)"),
            replace(WINDOWS, published="1.88 (nanoGPT)"),
            Figure("seconds until 1.88", "seconds_to_loss", ".0f", "about 180 (nanoGPT, laptop)"),
        ),
        measures=(random_windows, time_to(1.88)),
    ),
    "multi30k-en-de": Result(
        "multi30k-en-de",
        _data(_aligned(TOKENISED, "train"), _aligned(TOKENISED, "valid")),
        (replace(BLEU, published="41.02 (Wu et al. 2021)"), CHRF),
        ("--data", _aligned(TOKENISED, "test2016"), *BEAM, "--tokenize", "none"),
    ),
    "multi30k-en-de-cased": Result(
        "multi30k-en-de",
        _data(_aligned(CASED, "train"), _aligned(CASED, "valid")),
        (BLEU, CHRF),
        ("--data", _aligned(CASED, "test2016"), *BEAM),
    ),
    "vit-cifar10": Result(
        "vit-cifar10",
        CIFAR,
        (replace(RIGHT, published="91.4 % (ViT-Lite-7/4, original pixels)"),),
        CIFAR_TEST,
    ),
    "vit-cifar10-conv": Result("vit-cifar10-conv", CIFAR, (RIGHT,), CIFAR_TEST),
    "vit-cifar10-gpu": Result(
        "vit-cifar10-gpu",
        CIFAR,
        (replace(RIGHT, published="93.6 % (Lee et al. 2021, original pixels)"),),
        CIFAR_TEST,
    ),
    "bert-english": Result(
        "bert-english",
        _data("{data}/english/train.txt", "{data}/english/valid.txt"),
        (
            Figure("masked words right", "masked_word_accuracy"),
            Figure("next sentences right", "next_sentence_accuracy"),
            Figure("nats a masked word", "masked_word_loss", ".3f"),
        ),
    ),
    "bert-sst2-english": Result(
        "bert-sst2", (*_data(*SST2), "--init", ENGLISH, *FASTER), (RIGHT,), after="bert-english"
    ),
    "bert-sst2-random": Result(
        "bert-sst2",
        (*_data(*SST2), "--init", "", "--tokenizer.path", ENGLISH, *FASTER, *MINI, "--model.context", "64"),
        (RIGHT,),
        after="bert-english",
    ),
    "bert-sst2": Result(
        "bert-sst2",
        (*_data(*SST2), *MINILM),
        (replace(RIGHT, published="91.5 % (MiniLM-L6), 89.7 % (BERT-small), of ten times the texts"),),
    ),
    "bert-reviews": Result(
        "bert-sst2",
        (*_data(REVIEWS, SST2[1]), *MINILM, *ONE_PASS),
        (RIGHT,),
        after="bert-sst2",
        prepare=("{scripts}/reviews.py", TEACHER, "--data", "{data}/english/train.txt", "--output", REVIEWS),
    ),
    "bert-sst2-reviews": Result(
        "bert-sst2",
        (*_data(*SST2), "--init", "{out}/bert-reviews/seed-0", *TWO_EPOCHS),
        (RIGHT,),
        after="bert-reviews",
    ),
    "bert-ner": Result("bert-ner", (*CONLL, *MINILM), (F1,)),
    "bert-ner-random": Result("bert-ner", (*CONLL, *FROM_SCRATCH), (F1,)),
    "bert-multitask": Result(
        "bert-multitask",
        (
            *("--tasks.sst2.path", SST2[0], "--tasks.sst2.valid", SST2[1]),
            *("--tasks.rte.path", RTE[0], "--tasks.rte.valid", RTE[1]),
            *MINILM,
        ),
        (
            Figure("RTE right, beside SST-2", "rte/label_accuracy"),
            Figure("SST-2 right, beside RTE", "sst2/label_accuracy"),
        ),
    ),
    "bert-rte": Result("bert-rte", (*_data(*RTE), *MINILM), (Figure("RTE right, alone", "label_accuracy"),)),
}


# ---------------------------------------------------------------- running


@dataclass(frozen=True)
class Seed:
    """What is known of one trained seed."""

    scores: Scores
    seconds: float
    """Of training, with its evaluations."""
    machine: str
    commands: tuple[str, ...]


def found(name: str, result: Result, seed: int, data: Path, out: Path, minilm: str = "") -> Seed:
    """Train and score one seed in a folder of that name, as far as that is not done yet.

    Raises CalledProcessError if a command fails.
    """
    run = out / name / f"seed-{seed}"
    if (run / FOUND).exists():
        kept = json.loads((run / FOUND).read_text(encoding="utf-8"))
        return Seed(**kept | {"commands": tuple(kept["commands"])})
    if result.after:
        found(result.after, RESULTS[result.after], 0, data, out, minilm)

    def fill(arguments: Sequence[str]) -> list[str]:
        scripts = os.path.relpath(SCRIPTS)
        return [one.format(data=data, out=out, minilm=minilm, scripts=scripts) for one in arguments]

    scripts = [["python", *fill(result.prepare)]] if result.prepare else []
    recipe = os.path.relpath(RECIPES / f"{result.recipe}.toml")
    training = ["qkv", "train", recipe, *fill(result.train), "--train.seed", str(seed), "--out", str(run)]
    scoring = ["qkv", "eval", str(run), *fill(result.evaluate)]
    resumed = ["qkv", "train", "--resume", str(run)]
    for command in [resumed] if (run / CONFIG).exists() else [*scripts, training]:
        _run(command)
    scores: Scores = json.loads(_run(scoring))
    for measure in result.measures:
        scores |= measure(run)
    commands = tuple(map(shlex.join, [*scripts, training, scoring]))
    seconds = max(record["seconds"] for record in read_metrics(run))
    done = Seed(scores, seconds, machine(), commands)
    replace_text(run / FOUND, json.dumps(asdict(done), indent=2))
    return done


def _run(command: Sequence[str]) -> str:
    """What qkv or Python prints in a process of its own; progress goes to the terminal."""
    print(shlex.join(command), file=sys.stderr, flush=True)
    program, *arguments = command
    words = [sys.executable, *(["-m", "qkv"] if program == "qkv" else []), *arguments]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def machine() -> str:
    """The processor and its cores, or the GPU; threads in use, and torch's version."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
        model = re.search(r"model name\s*: (.+)", cpus)
        device = f"{os.cpu_count()} x {model[1] if model else platform.machine()}"
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


# ---------------------------------------------------------------- telling


HEADER = (
    "| result | figure | mean ± standard deviation | each seed | published | minutes a seed |\n"
    "|---|---|---|---|---|---|"
)


def rows(name: str, result: Result, seeds: dict[int, Seed]) -> str:
    """A result's rows of the table, one a figure."""
    lines = []
    minutes = statistics.mean(seed.seconds for seed in seeds.values()) / 60
    for figure in result.figures:
        values = [float(seed.scores[figure.key]) for seed in seeds.values()]
        mean = format(statistics.mean(values), figure.form)
        spread = f" ± {statistics.stdev(values):{figure.form}}" if len(values) > 1 else " (one run)"
        each = ", ".join(format(value, figure.form) for value in values)
        lines.append(
            f"| {name} | {figure.title} | {mean}{spread} | {each} | {figure.published} | {minutes:.1f} |"
        )
    return "\n".join(lines)


def notes(seeds: dict[int, Seed]) -> str:
    """Machines, signatures of scores, and the commands of each seed."""
    said = [f"seeds {', '.join(map(str, seeds))}", *{seed.machine: None for seed in seeds.values()}]
    scores = [seed.scores.values() for seed in seeds.values()]
    said += {value: None for values in scores for value in values if isinstance(value, str)}
    commands = [command for seed in seeds.values() for command in seed.commands]
    return "\n".join([*(f"- {line}" for line in said), "", "```bash", *commands, "```"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("result", choices=RESULTS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--minilm", default="sentence-transformers/all-MiniLM-L6-v2")
    given = parser.parse_args()
    name, result = given.result, RESULTS[given.result]
    try:
        seeds = {seed: found(name, result, seed, given.data, given.out, given.minilm) for seed in given.seeds}
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # it has said why
    print("\n".join([HEADER, rows(name, result, seeds), "", notes(seeds)]))


if __name__ == "__main__":
    main()
