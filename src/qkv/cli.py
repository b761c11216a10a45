"""The `qkv` command: subcommands made from typed functions.

A mistake of the user's is one line and exit code 2; an interrupted command exits with 130. torch is
imported only by the commands that need it, so that help is instant.
"""

from __future__ import annotations

import atexit
import gc
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, ParamSpec, TypeVar, cast

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from qkv.config import (
    BEAMS,
    FAMILIES,
    BleuTokenizer,
    Decoding,
    ExplanationMethod,
    Family,
    FigureOptions,
    InferencePrecision,
    RunConfig,
    read_toml,
)
from qkv.errors import InputError
from qkv.recipes import default_recipe, fine_tuning

if TYPE_CHECKING:
    from qkv.output import Output
    from qkv.pipelines import (
        AnyPipeline,
        DecodingOptions,
        Encoder,
        Guess,
        TaggedWord,
        TextGenerator,
        Translator,
    )
    from qkv.stream import Source

P = ParamSpec("P")
Answer = TypeVar("Answer")

Model = Annotated[str, arg(metavar="RUN_OR_HUB_ID")]
Precision = Annotated[
    InferencePrecision | Literal["auto"] | None,
    arg(help="Answer faster, at fp32, bf16 or int8; auto: at the faster one of fp32 and bf16."),
]
Truncate = Annotated[bool, arg(help="Cut texts longer than the context, and say how many.")]
Settings = Annotated[RunConfig, arg(name="")]
Folder = Annotated[Path | None, arg(metavar="FOLDER")]
Texts = Annotated[tuple[str, ...], arg(metavar="TEXT", help_behavior_hint="(none: lines of standard input)")]
Data = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(none)")]
Column = Annotated[str, arg(metavar="NAME", help="Column of a table that has them.")]
Columns = Annotated[
    tuple[str, ...], arg(metavar="NAME", help_behavior_hint="(text, and text_pair if there is one)")
]
Out = Annotated[Path | None, arg(aliases=["-o"], metavar="FILE", help_behavior_hint="(standard output)")]


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
    from qkv.console import TrainingBar, WorkBar
    from qkv.distributed import groups, process_group
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
        with WorkBar(lambda: console) as watch:
            # The first rank decides what the run is; the others read it from the run folder.
            job = new_job(config, watch) if resume is None and ranks.first else None
            if job is not None:
                # What cannot be must not leave a folder.
                groups(ranks, config.train.shard_ranks)
                trackers(config.train.report_to, run)
                begin(job, run)
            ranks.barrier()
            job = job or resumed_job(run, watch)
        observer = Observer()
        if ranks.first:
            of_one = full_rate(job.checkpoint.model, job.train, job.config.train, ranks.device())
            rate = ranks.count * of_one
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
    arguments = _with_data_path(arguments)
    named = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if not named and "--help" not in arguments and "-h" not in arguments:
        raise InputError(f"name what to plan: a recipe file, a preset or one of {', '.join(FAMILIES)}")
    return _configured(plan, named, _planned_config(named or "gpt"), arguments)


def _configured(
    command: Callable[..., None], named: str, config: RunConfig, arguments: list[str]
) -> partial[None]:
    """The command with settings for arguments, whose defaults are those of the config that was named."""
    bound: partial[None] = tyro.cli(
        partial(_deferred(command), config=config),
        args=arguments,
        prog=f"qkv {command.__name__} {named}".rstrip(),
        config=(tyro.conf.AvoidSubcommands,),
    )
    return bound


def _with_data_path(arguments: list[str]) -> list[str]:
    """The setting that `--data` is short for."""
    return [re.sub(r"^--data(?=$|=)", "--data.path", argument) for argument in arguments]


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


def _train_command(arguments: list[str]) -> partial[None]:
    """Parse what follows `qkv train`: the recipe decides which settings there are and their defaults."""
    arguments = _with_data_path(arguments)
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
    command = _configured(train, named, config, arguments)
    asked = cast("RunConfig", command.keywords["config"])
    if named in FAMILIES and asked.init:
        command = _configured(train, named, fine_tuning(config, asked.lora.rank > 0), arguments)
    _check_used(options, asked)
    return command


def _check_used(options: list[str], config: RunConfig) -> None:
    """Raise InputError for a setting on the command line that would do nothing in such a run."""
    named = {option.removeprefix("--").replace(".no-", ".").replace("-", "_"): option for option in options}
    data_decide = ("vocab_size", "head", "labels", "channels", "pad_id", "eos_id")
    idle = {f"model.{name}": "the data decide it" for name in data_decide}
    if config.init:
        own = {field.name for field in fields(config.model)} - {*config.model.dropouts}
        idle |= {f"model.{name}": "with init the model is the checkpoint's" for name in own}
    if config.model.family == "vit":
        idle |= {f"tokenizer.{field.name}": "images have none" for field in fields(config.tokenizer)}
    elif config.init or config.tokenizer.path:
        own = {field.name for field in fields(config.tokenizer)} - {"path"}
        idle |= {f"tokenizer.{name}": "the tokenizer is made already" for name in own}
    if config.data.valid:
        idle["data.valid_fraction"] = "data.valid is held out"
    if config.model.family in ("gpt", "vit"):
        idle["data.truncate"] = "no sample is too long"
    if not config.augment.randaugment:
        idle["augment.magnitude"] = "it is how strong augment.randaugment is"
    for name, option in named.items():
        if name in idle:
            raise InputError(f"{option} would do nothing here, as {idle[name]}: leave it out")


# ---------------------------------------------------------------- use


def evaluate(
    model: Positional[Model],
    data: str = "",
    num_beams: int = BEAMS,
    tokenize: BleuTokenizer = "13a",
    truncate: Truncate = False,
    precision: Precision = None,
) -> None:
    """Score a model on labelled data, as JSON.

    Args:
        model: Run folder, checkpoint folder or hub id.
        data: A file or folder in the form that the model was trained on; default: the run's held-out data.
        num_beams: Beam width of the translations that BLEU and chrF compare.
        tokenize: How sacreBLEU splits them into words; none for text that is tokenised already.
    """
    from qkv.evaluate import score

    print(json.dumps(score(model, data, num_beams, tokenize, precision, truncate), indent=2))


def generate(
    model: Positional[Model],
    texts: Positional[Texts] = (),
    decoding: Annotated[Decoding, arg(name="")] = Decoding(),  # noqa: B008 - frozen
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = (),
    draft: Annotated[str | None, arg(metavar="RUN_OR_HUB_ID")] = None,
    as_json: Annotated[bool, arg(name="json")] = False,
    precision: Precision = None,
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
    generator = cast("TextGenerator", _load(model, "gpt", precision=precision))
    guesser = None if draft is None else cast("TextGenerator", _load(draft, "gpt", precision=precision))
    options = cast("DecodingOptions", asdict(decoding))
    given = list(_lines(texts))
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
    data: Data = None,
    column: Column = "source",
    output: Out = None,
    num_beams: int = BEAMS,
    length_penalty: float = 1.0,
    truncate: Truncate = False,
    precision: Precision = None,
) -> None:
    """Translate texts, one line each.

    Args:
        model: Run folder, checkpoint folder or hub id of an encoder-decoder Transformer.
        texts: What to translate.
        data: A file of texts instead: .jsonl, .csv, .tsv, .parquet, or one text a line.
        output: A .txt file to write. With --data, an interrupted command can be given again to go on.
        num_beams: Beam width; 1 is greedy.
        length_penalty: Hypotheses compete by log-probability / length ** penalty.
    """
    translator = cast("Translator", _load(model, "transformer", precision=precision))
    _answer(
        translator,
        _texts(texts, data, [column], "source"),
        lambda given: translator.translate(
            given, num_beams=num_beams, length_penalty=length_penalty, truncate=truncate
        ),
        lambda answer: " ".join(answer.split("\n")),
        _Target(output, ".txt", (num_beams, length_penalty)),
    )


def fill(
    model: Positional[Model],
    texts: Positional[Texts] = (),
    top_k: int = 5,
    precision: Precision = None,
) -> None:
    """Fill the mask of each text; a JSON line each.

    Args:
        model: Run folder, checkpoint folder or hub id of a BERT with its masked language model head.
        texts: Texts with one mask token, [MASK] in BERT's vocabulary.
        top_k: How many answers.
    """
    encoder = cast("Encoder", _load(model, "bert", precision=precision))
    for text in _lines(texts):
        print(_rows(encoder.fill(text, top_k=top_k)))


def classify(
    model: Positional[Model],
    inputs: Positional[Texts] = (),
    data: Data = None,
    column: Columns = (),
    output: Out = None,
    pair: Annotated[str | None, arg(metavar="TEXT")] = None,
    top_k: int | None = None,
    truncate: Truncate = False,
    precision: Precision = None,
) -> None:
    """Name the class of texts or images, all labels of a multi-label model, or the value of a regression
    model; a JSON line each.

    Args:
        model: Run folder, checkpoint folder or hub id of a BERT or ViT with such a head.
        inputs: Texts, or image files.
        data: A file of texts, or of images' paths, instead: .jsonl, .csv, .tsv, .parquet, or one a line. Or a
            folder of images, in the order of their paths.
        column: Columns of a table that have them, and their second texts; default for images: image.
        output: A .jsonl file to write. With --data, an interrupted command can be given again to go on.
        pair: Second text of all, for a model of text pairs.
        top_k: How many classes; default 5, but all labels of a multi-label model.
    """
    from qkv.pipelines import ImageClassifier

    pipeline = _load(model, "bert", "vit", precision=precision)
    target = _Target(output, ".jsonl", (pair, top_k))
    if isinstance(pipeline, ImageClassifier):
        if pair is not None or truncate:
            raise InputError(f"{model} classifies images: leave out --pair and --truncate")
        if len(column) > 1:
            raise InputError(f"images are in one column: name it, not {len(column)}")
        source = _images(inputs, data, column)
        count = 5 if top_k is None else top_k
        _answer(pipeline, source, lambda given: pipeline.classify(given, top_k=count), _rows, target)
        return
    encoder = cast("Encoder", pipeline)
    if pair is not None and len(column) > 1:
        raise InputError("the second text is either --pair or a column: leave one out")
    if len(column) > 2:
        raise InputError(f"texts are in one column, or pairs in two: name them, not {len(column)}")
    perhaps = ["text_pair"] if not column and pair is None else []
    source = _texts(inputs, data, column or ["text"], "text", perhaps)
    gives_values = encoder.model.config.head == "regression"
    if gives_values and top_k is not None:
        raise InputError(f"{model} gives values, not classes: leave out --top-k")

    def ask(given: Iterator[Any]) -> Iterator[Any]:
        texts = given if pair is None else ((text, pair) for text in given)
        if gives_values:
            return encoder.estimate(texts, truncate=truncate)
        return encoder.classify(texts, top_k=top_k, truncate=truncate)

    line = partial(_values, encoder.model.config.labels) if gives_values else _rows
    _answer(encoder, source, ask, line, target)


def tag(
    model: Positional[Model],
    texts: Positional[Texts] = (),
    data: Data = None,
    column: Column = "text",
    output: Out = None,
    truncate: Truncate = False,
    precision: Precision = None,
) -> None:
    """Name the tag of each word of texts, with its place in the text; a JSON line each.

    Words of a .conll file are one text with spaces between them.

    Args:
        model: Run folder, checkpoint folder or hub id of a BERT with a tagging head.
        texts: What to tag.
        data: A file of texts instead: .jsonl, .csv, .tsv, .parquet, or one text a line; or a .conll file,
            whose first column is words, which get a tag each, with blank lines between sentences.
        output: A .jsonl file to write. With --data, an interrupted command can be given again to go on.
    """
    from qkv.data.corpus import SentenceCorpus
    from qkv.data.files import CONLL

    encoder = cast("Encoder", _load(model, "bert", precision=precision))
    if data is not None and data.suffix.lower() == CONLL:
        _check_alone(texts)
        if column != "text":
            _check_table(data)
        source: Source = SentenceCorpus(data)
    else:
        source = _texts(texts, data, [column], "text")
    target = _Target(output, ".jsonl")
    _answer(encoder, source, lambda given: encoder.tag(given, truncate=truncate), _rows, target)


def embed(
    model: Positional[Model],
    texts: Positional[Texts] = (),
    data: Data = None,
    column: Column = "text",
    output: Out = None,
    truncate: Truncate = False,
    precision: Precision = None,
) -> None:
    """Turn texts into vectors: a JSON line each, or a NumPy file.

    Args:
        model: Run folder, checkpoint folder or hub id of a BERT.
        texts: What to embed.
        data: A file of texts instead: .jsonl, .csv, .tsv, .parquet, or one text a line.
        output: A .npy file for the (N, D) float32 array. With --data, an interrupted command can be given
            again to go on.
    """
    encoder = cast("Encoder", _load(model, "bert", precision=precision))
    _answer(
        encoder,
        _texts(texts, data, [column], "text"),
        lambda given: encoder.embed(given, truncate=truncate),
        lambda vector: json.dumps([round(float(x), 7) for x in vector]),
        _Target(output, ".npy", dim=encoder.model.config.dim),
    )


def explain(
    model: Positional[Model],
    text: Positional[Annotated[str, arg(metavar="INPUT")]],
    pair: Positional[Annotated[str | None, arg(metavar="SECOND", help_behavior_hint="(none)")]] = None,
    output: Annotated[
        Path | None, arg(aliases=["-o"], metavar="FILE", help_behavior_hint="(a summary)")
    ] = None,
    target: Annotated[str | None, arg(metavar="ANSWER", help_behavior_hint="(the model's own)")] = None,
    methods: Annotated[tuple[ExplanationMethod, ...], arg(help_behavior_hint="(all but flow)")] = (),
    max_new_tokens: int = 16,
    seed: int = 0,
    compare: Annotated[str | None, arg(metavar="RUN_OR_HUB_ID", help_behavior_hint="(none)")] = None,
    compare_input: Annotated[str | None, arg(metavar="INPUT", help_behavior_hint="(none)")] = None,
    options: Annotated[FigureOptions, arg(name="")] = FigureOptions(),  # noqa: B008 - frozen
    as_json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Show why a model answers as it does, and whether the explanation holds up:
    `qkv explain runs/bert "a fine film" -o film.html`.

    Args:
        model: Run folder, checkpoint folder or hub id.
        text: A text, or an image file.
        pair: Second text, for a model of pairs or one that compares texts.
        output: .html for a page to look around in, offline; .png or .svg for a figure; .json for all values.
        target: The answer to explain: a class, what fills a mask, a continuation, a translation; for a tagger
            a word or a tag.
        methods: How to tell what matters; flow is slow.
        max_new_tokens: At most so many tokens of a text are generated and explained.
        seed: Draws the random orders that maps are compared with.
        compare: Another model on the same input, side by side: before and after fine-tuning.
        compare_input: Another input of the same model, side by side.
        options: What a .png or .svg shows.
        as_json: Print all values as JSON, a line an explanation.
    """
    from rich.console import Console

    from qkv import explain as explanation_of  # as a public name it comes faster
    from qkv.console import WorkBar
    from qkv.explanations.explainer import METHODS, RANDOM_ORDERS
    from qkv.explanations.plain import to_json
    from qkv.explanations.save import FIGURES, check_path, save
    from qkv.explanations.summary import summary

    if compare is not None and compare_input is not None:
        raise InputError("two explanations are compared: give --compare or --compare-input, not both")
    if compare_input is not None and pair is not None:
        raise InputError("--compare-input is of single inputs: leave out the second text")
    asked = [(model, text if pair is None else (text, pair))]
    if compare is not None or compare_input is not None:
        other = asked[0][1] if compare_input is None else compare_input
        asked.append((model if compare is None else compare, other))
    if output is not None:
        check_path(output, comparing=len(asked) > 1)
        if as_json:
            raise InputError("answers go to a file or, with --json, to standard output: leave one out")
    drawn = output is not None and output.suffix in FIGURES
    if options != FigureOptions() and not drawn:
        raise InputError(
            f"--figure and what belongs to it are of figures: give -o FILE with {' or '.join(FIGURES)}"
        )
    if drawn and methods:
        raise InputError("a figure shows one map: name its method by --map")
    computed = methods or METHODS
    if drawn:  # no more than the figure shows
        computed = (options.map or "relevance",) if options.figure == "relevance" else ()
    with WorkBar(_stderr) as watch:
        made = [
            explanation_of(
                source,
                given,
                target,
                methods=computed,
                max_new_tokens=max_new_tokens,
                random_orders=0 if drawn else RANDOM_ORDERS,
                seed=seed,
                watch=watch,
            )
            for source, given in asked
        ]
    if output is not None:
        save(made[0], output, made[1] if len(made) > 1 else None, options)
        print(json.dumps({"file": str(output)}))
        return
    console = Console(highlight=False)
    for one in made:
        if as_json:
            print(to_json(one))
            continue
        for part in summary(one):
            console.print(part)


def export(model: Positional[Model], out: Positional[Path], format: Literal["hf", "onnx"] = "hf") -> None:
    """Write a model for other programs: as a plain Hugging Face folder, an adapter as the whole model that it
    makes, or as ONNX files, which ONNX Runtime must answer with as qkv does.

    Args:
        model: Run folder, checkpoint folder or hub id.
        out: Folder to write.
        format: hf for transformers and all that reads its folders; onnx for ONNX Runtime, without Python too.
    """
    from qkv.export import export as write

    print(json.dumps(write(model, out, format)))


def demo(only: tuple[Family, ...] = FAMILIES, out: Path = Path("runs/demo")) -> None:
    """Train all four families on data that this Python installation already holds, in about four minutes.

    Args:
        only: Some of the families.
        out: Folder for the models and report.html.
    """
    from qkv.demo import run_demo

    run_demo(only, out, _stderr())


# ---------------------------------------------------------------- shared


class _Target(NamedTuple):
    """Where answers go: to a file of that suffix, or to standard output; and what they depend on."""

    path: Path | None
    suffix: str
    settings: tuple[object, ...] = ()
    """What beside the model and the input."""
    dim: int = 0
    """Length of the vectors that a .npy file holds."""


def _answer(
    pipeline: AnyPipeline,
    source: Source,
    ask: Callable[[Iterator[Any]], Iterator[Answer]],
    line: Callable[[Answer], str],
    target: _Target,
) -> None:
    """Ask for the answer to each input, and print or write it: a line, or in a .npy file a vector."""
    from qkv.stream import answer_all

    output = None if target.path is None else _output(pipeline, source, target)
    if output is None:
        seen = sys.stdout is not None and sys.stdout.isatty()
        console = partial(_stderr, quiet=seen)  # a bar between lines would be in their way
        answer_all(source, ask, lambda answer: print(line(answer)), None, console)
        return

    def write(answer: Answer) -> None:
        output.write(answer.tobytes() if target.dim else f"{line(answer)}\n".encode())  # type: ignore[attr-defined]

    try:
        with output:
            answer_all(source, ask, write, output, _stderr)
    except BaseException:
        if output.kept:
            said = f"{output.kept:,} answers are kept in {output.part}: the same command goes on from there"
            _stderr().print(said, highlight=False, markup=False, soft_wrap=True)
        raise
    print(json.dumps({"file": str(target.path), "answers": output.done}))


def _output(pipeline: AnyPipeline, source: Source, target: _Target) -> Output:
    """The file that answers go to; work on a source that can be read again can be gone on with."""
    from qkv.output import Output
    from qkv.stream import work

    assert target.path is not None
    if target.path.suffix != target.suffix:
        raise InputError(f"--output writes {target.suffix} files; {target.path} is not called so")
    if target.path.is_dir():
        raise InputError(f"{target.path} is a folder: name a file")
    if source.path is not None and target.path.exists() and target.path.samefile(source.path):
        raise InputError(f"{target.path} is the input itself: write to another file")
    if source.path is not None and target.path.resolve().is_relative_to(source.path.resolve()):
        raise InputError(f"{target.path} is in the folder that is read: write to another one")
    identity = source.identity()
    made_from = None if identity is None else work(pipeline, identity, *target.settings)
    return Output(target.path, made_from, target.dim)


def _texts(
    texts: Sequence[str], data: Path | None, columns: Sequence[str], usual: str, perhaps: Sequence[str] = ()
) -> Source:
    """Texts given, those of a file, or the lines of standard input."""
    from qkv.stream import Given

    if list(columns) != [usual]:
        _check_table(data)
    if data is None:
        return Given(_lines(texts))
    from qkv.data.corpus import TextCorpus

    _check_alone(texts)
    return TextCorpus(data, columns, perhaps)


def _check_table(data: Path | None) -> None:
    """Raise InputError where there are no columns to name."""
    from qkv.data.files import TABLES

    if data is None or data.suffix.lower() not in TABLES:
        raise InputError(f"--column names one of a table: give that ({', '.join(TABLES)}) with --data")


def _images(files: Sequence[str], data: Path | None, columns: Sequence[str]) -> Source:
    """Image files given, those of a folder or named in a file, or named on standard input."""
    from qkv.stream import Given

    if columns:
        _check_table(data)
    if data is None:
        return Given(_lines(files))
    from qkv.data.corpus import ImageCorpus, ImageFolder

    _check_alone(files)
    return ImageFolder(data) if data.is_dir() else ImageCorpus(data, columns or ["image"])


def _check_alone(given: Sequence[str]) -> None:
    if given:
        raise InputError("the input is either --data or given in the command: leave one out")


def _rows(rows: Sequence[Guess | TaggedWord]) -> str:
    return json.dumps([row._asdict() for row in rows], ensure_ascii=False)


def _values(labels: Sequence[str], values: Any) -> str:
    return json.dumps(dict(zip(labels, values.tolist(), strict=True)))


def _load(source: str, *families: Family, precision: Precision = None) -> AnyPipeline:
    """The pipeline of a checkpoint. Raises InputError if it is of none of these families."""
    from qkv import from_pretrained  # as a public name it comes faster

    return from_pretrained(source, families=families, precision=precision)


def _lines(texts: Sequence[str]) -> Iterator[str]:
    """The texts given, or the lines of standard input as they come."""
    yield from texts
    some = bool(texts)
    if not some and sys.stdin is not None and not sys.stdin.isatty():
        try:
            for line in sys.stdin:
                some = True
                yield line.removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8: {error.reason}") from None
    if not some:
        raise InputError("nothing to work on: give texts, or lines on standard input")


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
    "explain": explain,
    "export": export,
}


def main() -> None:
    """Run the command line; exits with 0, 2 for a mistake of the user's, or 130 when interrupted."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # tests put others there
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_: f"qkv: {message}\n"  # without file, line and code
    atexit.register(gc.freeze)  # else Python looks for garbage among all that torch made, just to end
    try:
        _parse(sys.argv[1:])()
        if sys.stdout is not None:
            sys.stdout.flush()  # what a closed pipe or a full disk does not take is known now
    except InputError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except OSError as error:
        _drop_output()
        _fail(str(error), 2)


def _drop_output() -> None:
    """Let what standard output still holds go nowhere when Python ends."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(arguments: list[str]) -> Callable[[], None]:
    """The command with its arguments. Raises InputError for arguments that it does not take."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            for name, parse in (("train", _train_command), ("plan", _plan_command)):
                if arguments[:1] == [name]:
                    return parse(arguments[1:])
            if command := COMMANDS.get(next(iter(arguments), "")):  # to know all of them takes its time
                return tyro.cli(_deferred(command), args=arguments[1:], prog=f"qkv {arguments[0]}")
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


def _deferred(command: Callable[P, None]) -> Callable[P, partial[None]]:
    """The command for tyro to call, which only binds the arguments: the work is not tyro's to watch."""

    @wraps(command)
    def bind(*args: P.args, **kwargs: P.kwargs) -> partial[None]:
        return partial(command, *args, **kwargs)

    return bind


def _one_line(box: str) -> str:
    """The message of a box that tyro draws: a title, then between rules what is wrong and what helps."""
    plain = re.sub(r"\x1b\[[\d;]*m|│", "", box)
    parts = [" ".join(part.split()) for part in re.split(r"(?m)^(?:[╭╰].*| *[-─]{3,} *)$", plain)]
    message, *hints = parts[1:] or parts
    about = " ".join(hints)
    if ours := re.match(r"Error parsing (?:config\.\w+|decoding|options): ", message):
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
