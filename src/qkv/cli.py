"""The `qkv` command: subcommands made from typed functions.

A mistake of the user's is one line and exit code 2; an interrupted command exits with 130. torch is
imported only by the commands that need it, so that help is instant.
"""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, cast

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from qkv.config import FAMILIES, AnyModelConfig, BleuTokenizer, Decoding, Family, RunConfig, read_toml
from qkv.errors import InputError
from qkv.recipes import default_recipe

if TYPE_CHECKING:
    from qkv.pipelines import (
        AnyPipeline,
        DecodingOptions,
        Encoder,
        Guess,
        TaggedWord,
        TextGenerator,
        Translator,
    )

P = ParamSpec("P")

Model = Annotated[str, arg(metavar="RUN_OR_HUB_ID")]
Settings = Annotated[RunConfig, arg(name="")]
Folder = Annotated[Path | None, arg(metavar="FOLDER")]
Texts = Annotated[tuple[str, ...], arg(metavar="TEXT", help_behavior_hint="(none: lines of standard input)")]


# ---------------------------------------------------------------- train


def train(
    recipe: Positional[Annotated[str, arg(metavar="FAMILY|RECIPE")]],
    config: Settings = default_recipe("gpt"),  # noqa: B008 - frozen; _train_command gives the recipe's
    out: Folder = None,
    resume: Folder = None,
) -> None:
    """Train a model: `qkv train gpt --data corpus.txt`, where --data is short for --data.path.
    `qkv train FAMILY --help` lists the settings of transformer, bert, gpt or vit with their defaults.

    Args:
        recipe: transformer, bert, gpt or vit for the family's default recipe, or a recipe file (.toml).
        config: Settings.
        out: Run folder to make; default runs/NAME of the recipe.
        resume: Run folder to continue; takes no other argument.
    """
    from qkv.console import PreparationBar, TrainingBar
    from qkv.distributed import process_group
    from qkv.job import new_job, resumed_job
    from qkv.observe import Observer, Observers
    from qkv.report.run import RunReport
    from qkv.roofline import full_rate
    from qkv.trackers import trackers
    from qkv.train import begin
    from qkv.train import train as run_training

    if resume is None and not config.data.path and not config.tasks:
        raise InputError("nothing to train on: give --data PATH")
    run = resume or out or Path("runs") / Path(recipe).stem
    with process_group() as ranks:
        console = _stderr(quiet=not ranks.first)
        with PreparationBar(console) as watch:
            # The first rank decides what the run is; the others read it from the run folder.
            job = new_job(config, watch) if resume is None and ranks.first else None
            if job is not None:
                begin(job, run)
            ranks.barrier()
            job = job or resumed_job(run, watch)
        observer = Observer()
        if ranks.first:
            rate = ranks.count * full_rate(job.checkpoint.model, job.train, job.config.train.precision)
            tracked = trackers(job.config.train.report_to, run)
            observer = Observers([TrainingBar(console, rate), RunReport(job, run, rate), *tracked])
        try:
            done = run_training(job, run, observer, resume=True, ranks=ranks)
        except KeyboardInterrupt:
            observer.say(f"Stopped; continue with: qkv train --resume {run}")
            raise
        if not done.finished:
            observer.say(f"Stopped at step {done.step}; continue with: qkv train --resume {run}")
        elif ranks.first:
            print(json.dumps({"run": str(run), "step": done.best_step, "held_out": done.best_scores}))


def plan(
    recipe: Positional[Annotated[str, arg(metavar="FAMILY|PRESET|RECIPE")]],
    config: Settings = default_recipe("gpt"),  # noqa: B008 - frozen; _plan_command gives the recipe's
    gpus: int = 0,
    gpu_memory_gib: float = 80.0,
    length: int = 0,
    as_json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Tell what a run will need before it starts: parameters, FLOPs, memory, time, and a layout for GPUs.
    `qkv plan gpt --model.depth 48 --gpus 64`; takes the settings of `qkv train`, and reads no data.

    Args:
        recipe: transformer, bert, gpt or vit, a published size such as gpt2-xl or vit-b/16, or a recipe file.
        config: Settings.
        gpus: Number of GPUs to plan for, which need not be here; 0: the device that is here.
        gpu_memory_gib: Memory of each of these GPUs in GiB.
        length: Tokens of a text; 0: the context, the most there can be.
        as_json: Print JSON: bytes, seconds and FLOPs.
    """
    from rich.console import Console

    from qkv.plan import plan as make_plan

    planned = make_plan(config, gpus, gpu_memory_gib, length)
    if as_json:
        print(json.dumps(planned.as_dict(), indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    for part in planned.describe():
        console.print(part)


def _plan_command(arguments: list[str]) -> Callable[[], None]:
    """Parse what follows `qkv plan`: a family, a published size or a recipe file, and settings."""
    named = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if not named and "--help" not in arguments and "-h" not in arguments:
        raise InputError(f"name what to plan: a recipe file, a preset or one of {', '.join(FAMILIES)}")
    command = partial(_deferred(plan), config=_planned_config(named or "gpt"))
    return tyro.cli(
        command, args=arguments, prog=f"qkv plan {named}".rstrip(), config=(tyro.conf.AvoidSubcommands,)
    )


def _planned_config(named: str) -> RunConfig:
    if named in FAMILIES:
        return default_recipe(named)
    from qkv.models import PRESETS

    if named in PRESETS:
        model = PRESETS[named]
        vocabulary = getattr(model, "vocab_size", None)
        usual = default_recipe(model.family)
        tokenizer = replace(usual.tokenizer, vocab_size=vocabulary) if vocabulary else usual.tokenizer
        return replace(usual, model=model, tokenizer=tokenizer)
    if not Path(named).exists():
        raise InputError(f"no recipe file or preset {named}; the presets are {', '.join(PRESETS)}")
    return read_toml(Path(named))


def _train_command(arguments: list[str]) -> Callable[[], None]:
    """Parse what follows `qkv train`: the recipe decides which settings there are and their defaults."""
    arguments = [re.sub(r"--data(?=$|=)", "--data.path", argument) for argument in arguments]
    options = [argument.partition("=")[0] for argument in arguments]
    if "--resume" in options:
        folder = arguments[0].removeprefix("--resume=") if len(arguments) == 1 else arguments[1]
        if options[0] != "--resume" or len(arguments) != 1 + ("=" not in arguments[0]):
            raise InputError(
                "--resume takes the run folder and nothing else: the run's settings are in its config.toml"
            )
        return partial(train, "", resume=Path(folder))
    named = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if named in FAMILIES:
        config = default_recipe(named)
    elif named:
        config = read_toml(Path(named))
    elif "--help" in options or "-h" in options:
        config = default_recipe("gpt")
    else:
        raise InputError(f"name what to train: a recipe file or one of {', '.join(FAMILIES)}")
    if named in FAMILIES and "--init" in options:  # the model is the checkpoint's, not the recipe's
        made = config.model
        chosen = type(made)(
            dropout=made.dropout, attention_dropout=made.attention_dropout, drop_path=made.drop_path
        )
        config = replace(config, model=chosen)
    command = partial(_deferred(train), config=config)
    return tyro.cli(
        command, args=arguments, prog=f"qkv train {named}".rstrip(), config=(tyro.conf.AvoidSubcommands,)
    )


# ---------------------------------------------------------------- use


def evaluate(
    model: Positional[Model], data: str = "", num_beams: int = 5, tokenize: BleuTokenizer = "13a"
) -> None:
    """Score a model on labelled data, as JSON.

    Args:
        model: Run folder, checkpoint folder or hub id.
        data: A file or folder in the form that the model was trained on; default: the run's held-out data.
        num_beams: Beam width of translations, whose BLEU is measured.
        tokenize: How BLEU splits them into words; none for text that is tokenised already.
    """
    from qkv.evaluate import score

    print(json.dumps(score(model, data, num_beams, tokenize), indent=2))


def generate(
    model: Positional[Model],
    texts: Positional[Texts] = (),
    decoding: Annotated[Decoding, arg(name="")] = Decoding(),  # noqa: B008 - frozen
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = (),
    draft: Annotated[str | None, arg(metavar="RUN_OR_HUB_ID")] = None,
    as_json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Continue texts with a GPT. A single answer appears as it is made; several are made at the same time.

    Args:
        model: Run folder, checkpoint folder or hub id.
        texts: What to continue.
        decoding: How to choose tokens.
        stop: Answers end before this text; may be given several times.
        draft: A smaller GPT with the same tokens, which guesses those that --speculate asks for.
        as_json: Print a JSON line an answer: its text, its tokens, why it ended; with --logprobs, how likely.
    """
    generator = cast("TextGenerator", _load(model, "gpt"))
    guesser = None if draft is None else cast("TextGenerator", _load(draft, "gpt"))
    options = cast("DecodingOptions", asdict(decoding))
    given = _lines(texts)
    if as_json:
        for answer in generator.complete(given, stop_strings=stop, draft=guesser, **options):
            print(json.dumps({"prompt": given[answer.place[0]], **answer.as_dict()}, ensure_ascii=False))
        return
    if decoding.logprobs:
        raise InputError("log-probabilities are printed as JSON: give --json too, or leave out --logprobs")
    if len(given) * decoding.num_return_sequences > 1:
        for answer in generator.complete(given, stop_strings=stop, draft=guesser, **options):
            print(given[answer.place[0]] + answer.text)
        return
    pieces = generator.generate(given[0], stream=True, stop_strings=stop, draft=guesser, **options)
    print(given[0], end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def translate(
    model: Positional[Model],
    texts: Positional[Texts] = (),
    num_beams: int = 4,
    length_penalty: float = 1.0,
    truncate: bool = False,
) -> None:
    """Translate texts, one line each.

    Args:
        model: Run folder, checkpoint folder or hub id of an encoder-decoder Transformer.
        texts: What to translate.
        num_beams: Beam width; 1 is greedy.
        length_penalty: Hypotheses compete by log-probability / length ** penalty.
        truncate: Cut texts longer than the context, and say how many.
    """
    translator = cast("Translator", _load(model, "transformer"))
    lines = translator.translate(
        _lines(texts), num_beams=num_beams, length_penalty=length_penalty, truncate=truncate
    )
    for line in lines:
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
        _print_rows(encoder.fill(text, top_k=top_k))


def classify(
    model: Positional[Model],
    inputs: Positional[Texts] = (),
    pair: Annotated[str | None, arg(metavar="TEXT")] = None,
    top_k: int | None = None,
    truncate: bool = False,
) -> None:
    """Name the class of texts or images, all labels of a multi-label model, or the value of a regression
    model; a JSON line each.

    Args:
        model: Run folder, checkpoint folder or hub id of a BERT or ViT with such a head.
        inputs: Texts, or image files.
        pair: Second text, for a model of text pairs.
        top_k: How many classes; default 5, but all labels of a multi-label model.
        truncate: Cut texts longer than the context, and say how many.
    """
    from qkv.pipelines import ImageClassifier, from_pretrained

    pipeline = from_pretrained(model)
    given = _lines(inputs)
    if isinstance(pipeline, ImageClassifier):
        if pair is not None or truncate:
            raise InputError(f"{model} classifies images: leave out --pair and --truncate")
        answers = pipeline.classify(given, top_k=5 if top_k is None else top_k)
    else:
        encoder = cast("Encoder", _of_family(pipeline, model, "bert"))
        texts = given if pair is None else [(text, pair) for text in given]
        if encoder.model.config.head == "regression":
            for values in encoder.estimate(texts, truncate=truncate).tolist():
                print(json.dumps(dict(zip(encoder.model.config.labels, values, strict=True))))
            return
        answers = encoder.classify(texts, top_k=top_k, truncate=truncate)
    for answer in answers:
        _print_rows(answer)


def tag(model: Positional[Model], texts: Positional[Texts] = (), truncate: bool = False) -> None:
    """Name the tag of each word of texts, with its place in the text; a JSON line each.

    Args:
        model: Run folder, checkpoint folder or hub id of a BERT with a tagging head.
        texts: What to tag.
        truncate: Cut texts longer than the context, and say how many.
    """
    encoder = cast("Encoder", _load(model, "bert"))
    for words in encoder.tag(_lines(texts), truncate=truncate):
        _print_rows(words)


def embed(
    model: Positional[Model],
    texts: Positional[Texts] = (),
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="FILE")] = None,
    truncate: bool = False,
) -> None:
    """Turn texts into vectors: a JSON line each, or a NumPy file.

    Args:
        model: Run folder, checkpoint folder or hub id of a BERT.
        texts: What to embed.
        output: A .npy file for the (N, D) float32 array.
        truncate: Cut texts longer than the context, and say how many.
    """
    import numpy as np

    vectors = cast("Encoder", _load(model, "bert")).embed(_lines(texts), truncate=truncate)
    if output is None:
        for vector in vectors:
            print(json.dumps([round(float(x), 7) for x in vector]))
    else:
        np.save(output, vectors)


def merge(model: Positional[Model], out: Positional[Path]) -> None:
    """Write the whole model of an adapter, such as a run with --lora.rank makes, as a plain checkpoint.

    Args:
        model: Run folder, or folder or hub id of an adapter in peft's format.
        out: Folder to write.
    """
    from qkv import hub

    hub.merge(model, out)
    print(json.dumps({"folder": str(out)}))


def demo(only: tuple[Family, ...] = FAMILIES, out: Path = Path("runs/demo")) -> None:
    """Train all four families on data that this Python installation already holds, in about six minutes.

    Args:
        only: Some of the families.
        out: Folder for the models and report.html.
    """
    from qkv.demo import run_demo

    run_demo(only, out, _stderr())


# ---------------------------------------------------------------- shared


def _print_rows(rows: Sequence[Guess | TaggedWord]) -> None:
    print(json.dumps([row._asdict() for row in rows], ensure_ascii=False))


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
    lines = list(texts)
    if not lines and not sys.stdin.isatty():
        try:
            lines = [line.rstrip("\n") for line in sys.stdin]
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from None
    if not lines:
        raise InputError("nothing to work on: give texts, or lines on standard input")
    return lines


def _stderr(quiet: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=True, quiet=quiet)


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "plan": plan,
    "eval": evaluate,
    "generate": generate,
    "translate": translate,
    "fill": fill,
    "classify": classify,
    "tag": tag,
    "embed": embed,
    "merge": merge,
}


def main() -> None:
    """Run the command line; exits with 0, 2 for a mistake of the user's, or 130 when interrupted."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # tests put others there
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_: f"qkv: {message}\n"  # without file, line and code
    try:
        _parse(sys.argv[1:])()
    except InputError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        _fail(str(error), 2)


def _parse(arguments: list[str]) -> Callable[[], None]:
    """The command with its arguments. Raises InputError for arguments that it does not take."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            for name, parse in (("train", _train_command), ("plan", _plan_command)):
                if arguments[:1] == [name]:
                    return parse(arguments[1:])
            commands = {name: _deferred(command) for name, command in COMMANDS.items()}
            about = "Four Transformers, one attention."
            chosen = tyro.extras.subcommand_cli_from_dict(
                commands, args=arguments, prog="qkv", description=about
            )
            return cast("Callable[[], None]", chosen)
    except SystemExit as end:
        if end.code:
            raise InputError(_one_line(complaint.getvalue())) from None
        raise


def _deferred(command: Callable[P, None]) -> Callable[P, Callable[[], None]]:
    """The command for tyro to call, which only binds the arguments: the work is not tyro's to watch."""

    @wraps(command)
    def bind(*args: P.args, **kwargs: P.kwargs) -> Callable[[], None]:
        return partial(command, *args, **kwargs)

    return bind


def _one_line(box: str) -> str:
    """The message of a box that tyro draws: a title, then between rules what is wrong and what helps."""
    plain = re.sub(r"\x1b\[[\d;]*m|│", "", box)
    parts = [" ".join(part.split()) for part in re.split(r"(?m)^(?:[╭╰].*| *[-─]{3,} *)$", plain)]
    message, *hints = parts[1:] or parts
    about = " ".join(hints)
    if ours := re.match(r"Error parsing (?:config\.\w+|decoding): ", message):
        return message[ours.end() :]
    message = message.removeprefix("Error parsing ").removesuffix(".")
    if near := re.search(r"Perhaps you meant: .*?(--[\w.-]+)", about):
        return f"{message}; did you mean {near[1]}?"
    if known := re.search(r"Available subcommands: (.*?) For full", about):
        return f"{message}; there are {known[1]}"
    help_command = re.search(r"qkv .*?--help", about)
    return f"{message}; see {help_command[0] if help_command else 'qkv --help'}"


def _fail(message: str, code: Literal[2, 130]) -> None:
    print(f"qkv: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
