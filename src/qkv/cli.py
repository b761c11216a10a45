"""The `qkv` command: subcommands made from typed functions.

A mistake of the user's is one line and exit code 2; an interrupted command exits with 130. torch is
imported only by the commands that need it, so that help is instant.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tyro
from tyro.conf import Positional, arg

from qkv.config import FAMILIES, AnyModelConfig, Family, RunConfig, read_toml
from qkv.errors import InputError
from qkv.recipes import default_recipe

if TYPE_CHECKING:
    from qkv.pipelines import AnyPipeline, Encoder, Guess, TextGenerator, Translator

Model = Annotated[str, arg(metavar="RUN_OR_HUB_ID")]
Settings = Annotated[RunConfig, arg(name="")]
Texts = Annotated[tuple[str, ...], arg(metavar="TEXT", help_behavior_hint="(none: lines of standard input)")]


# ---------------------------------------------------------------- train


def train(
    recipe: Positional[str] = "",
    config: Settings = default_recipe("gpt"),  # noqa: B008 - frozen; _train_arguments gives the recipe's
    out: Path | None = None,
    resume: Path | None = None,
) -> None:
    """Train a model: `qkv train gpt --data corpus.txt`. `qkv train FAMILY --help` lists its settings.

    Args:
        recipe: transformer, bert, gpt or vit for the family's default recipe, or a recipe file (.toml).
        config: Settings.
        out: Run folder to make; default runs/NAME of the recipe.
        resume: Run folder to continue; takes no other argument.
    """
    from qkv.console import TrainingBar
    from qkv.train import new_job, resumed_job
    from qkv.train import train as run_training

    if resume is not None:
        job, run = resumed_job(resume), resume
    else:
        if not config.data.path:
            raise InputError("nothing to train on: give --data PATH")
        job, run = new_job(config), out or Path("runs") / Path(recipe).stem
    with TrainingBar(_stderr()) as bar:
        try:
            done = run_training(job, run, bar, resume=resume is not None)
        except KeyboardInterrupt:
            bar.say(f"Stopped; continue with: qkv train --resume {run}")
            raise
    print(json.dumps({"run": str(run), "step": done.best_step, "held_out": done.best_scores}))


def _train_arguments(arguments: list[str]) -> None:
    """Parse `qkv train`: the recipe decides which settings there are and their defaults."""
    named = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if named in FAMILIES:
        config = default_recipe(named)
    elif named:
        config = read_toml(Path(named))
    elif any(a == "--resume" or a.startswith("--resume=") for a in arguments):
        if len(arguments) > 2:
            raise InputError(
                "--resume takes the run folder and nothing else: the run's settings are in its config.toml"
            )
        config = default_recipe("gpt")
    elif "--help" in arguments or "-h" in arguments:
        config = default_recipe("gpt")
    else:
        raise InputError(f"name what to train: a recipe file or one of {', '.join(FAMILIES)}")
    arguments = ["--data.path" + a[6:] if a == "--data" or a.startswith("--data=") else a for a in arguments]
    if any(a.startswith("--init") for a in arguments) and any(a.startswith("--model.") for a in arguments):
        raise InputError("with --init the model is the checkpoint's: remove --model.* settings")

    command = partial(train, config=config)
    tyro.cli(command, args=arguments, prog="qkv train", config=(tyro.conf.AvoidSubcommands,))


# ---------------------------------------------------------------- use


def evaluate(model: Positional[Model], data: str = "", num_beams: int = 5) -> None:
    """Score a model on labelled data, as JSON.

    Args:
        model: Run folder, checkpoint folder or hub id.
        data: A file or folder in the form that the model was trained on; default: the run's held-out data.
        num_beams: Beam width of translations, whose BLEU is measured.
    """
    from qkv.evaluate import score

    print(json.dumps(score(model, data, num_beams), indent=2))


def generate(
    model: Positional[Model],
    prompt: Positional[str] = "",
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
) -> None:
    """Continue a prompt with a GPT; the text appears as it is made.

    Args:
        model: Run folder, checkpoint folder or hub id.
        prompt: What to continue.
        max_new_tokens: At most so many tokens.
        temperature: 0 always takes the likeliest token.
        top_k: Sample among the k likeliest tokens; 0: among all.
        top_p: Sample among the likeliest tokens that have this probability together.
        min_p: Leave out tokens less likely than this share of the likeliest one.
        repetition_penalty: Above 1 makes tokens that occurred less likely.
        num_beams: Beam search of this width instead of sampling.
        seed: Chooses the sample.
    """
    generator = cast("TextGenerator", _load(model, "gpt"))
    pieces = generator.generate(
        prompt,
        stream=True,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
        seed=seed,
    )
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def translate(
    model: Positional[Model], texts: Positional[Texts] = (), num_beams: int = 4, length_penalty: float = 1.0
) -> None:
    """Translate texts, one line each.

    Args:
        model: Run folder, checkpoint folder or hub id of an encoder-decoder Transformer.
        texts: What to translate.
        num_beams: Beam width; 1 is greedy.
        length_penalty: Hypotheses compete by log-probability / length ** penalty.
    """
    translator = cast("Translator", _load(model, "transformer"))
    for line in translator.translate(_lines(texts), num_beams=num_beams, length_penalty=length_penalty):
        print(line)


def fill(model: Positional[Model], texts: Positional[Texts] = (), top_k: int = 5) -> None:
    """Fill the mask of each text; a JSON line each.

    Args:
        model: Run folder, checkpoint folder or hub id of a BERT with its masked language model head.
        texts: Texts with one mask token, [MASK] in BERT's vocabulary.
        top_k: How many answers.
    """
    encoder = cast("Encoder", _load(model, "bert"))
    for text in _lines(texts):
        _print_guesses(encoder.fill(text, top_k=top_k))


def classify(
    model: Positional[Model], inputs: Positional[Texts] = (), pair: str | None = None, top_k: int = 3
) -> None:
    """Name the class of texts or images; a JSON line each.

    Args:
        model: Run folder, checkpoint folder or hub id of a BERT or ViT with a classification head.
        inputs: Texts, or image files.
        pair: Second text, for a model of text pairs.
        top_k: How many classes.
    """
    from qkv.pipelines import ImageClassifier, from_pretrained

    pipeline = from_pretrained(model)
    given = _lines(inputs)
    if isinstance(pipeline, ImageClassifier):
        answers = pipeline.classify(given, top_k=top_k)
    else:
        encoder = cast("Encoder", _of_family(pipeline, model, "bert"))
        answers = encoder.classify(given if pair is None else [(text, pair) for text in given], top_k=top_k)
    for answer in answers:
        _print_guesses(answer)


def embed(
    model: Positional[Model],
    texts: Positional[Texts] = (),
    output: Annotated[Path | None, arg(aliases=["-o"])] = None,
) -> None:
    """Turn texts into vectors: a JSON line each, or a NumPy file.

    Args:
        model: Run folder, checkpoint folder or hub id of a BERT.
        texts: What to embed.
        output: A .npy file for the (N, D) float32 array.
    """
    import numpy as np

    vectors = cast("Encoder", _load(model, "bert")).embed(_lines(texts))
    if output is None:
        for vector in vectors:
            print(json.dumps([round(float(x), 7) for x in vector]))
    else:
        np.save(output, vectors)


def demo(only: tuple[Family, ...] = FAMILIES, out: Path = Path("runs/demo")) -> None:
    """Train all four families on data that this Python installation already holds, in about six minutes.

    Args:
        only: Some of the families.
        out: Folder for the models and report.html.
    """
    from qkv.demo import run_demo

    run_demo(only, out, _stderr())


# ---------------------------------------------------------------- shared


def _print_guesses(guesses: Sequence[Guess]) -> None:
    print(json.dumps([guess._asdict() for guess in guesses], ensure_ascii=False))


def _load(source: str, family: Family) -> AnyPipeline:
    from qkv.pipelines import from_pretrained

    return _of_family(from_pretrained(source), source, family)


def _of_family(pipeline: AnyPipeline, source: str, family: Family) -> AnyPipeline:
    config: AnyModelConfig = pipeline.model.config
    if config.family != family:
        raise InputError(f"{source} is a {config.family} model; this command needs a {family} model")
    return pipeline


def _lines(texts: Sequence[str]) -> list[str]:
    """The texts given, or the lines of standard input."""
    if texts:
        return list(texts)
    if sys.stdin.isatty():
        raise InputError("nothing to work on: give texts, or lines on standard input")
    try:
        return [line.rstrip("\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from None


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "translate": translate,
    "fill": fill,
    "classify": classify,
    "embed": embed,
}


def main() -> None:
    """Run the command line; exits with 0, 2 for a mistake of the user's, or 130 when interrupted."""
    arguments = sys.argv[1:]
    warnings.formatwarning = lambda message, *_: f"qkv: {message}\n"  # without file, line and code
    try:
        if arguments[:1] == ["train"]:
            _train_arguments(arguments[1:])
        else:
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS, args=arguments, prog="qkv", description="Four Transformers, one attention."
            )
    except InputError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        _fail(str(error), 2)


def _fail(message: str, code: Literal[2, 130]) -> None:
    print(f"qkv: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
