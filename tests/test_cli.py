"""The command line as users meet it: every command on a real run, one line and exit code 2 for a mistake."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow
import pytest
import samples
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from qkv.cli import _train_command, _with_data_path, main
from qkv.config import FAMILIES, read_toml
from qkv.errors import InputError
from qkv.pipelines import from_pretrained
from qkv.recipes import FINE_TUNING_RATE, default_recipe

TINY = {
    "gpt": [
        "--model.dim=32",
        "--model.depth=1",
        "--model.heads=2",
        "--model.mlp-dim=64",
        "--model.context=32",
    ],
    "vit": ["--model.dim=32", "--model.depth=1", "--model.heads=2", "--model.mlp-dim=64"],
}
TINY["bert"] = [*TINY["gpt"], "--tokenizer.vocab-size=200"]
TINY["transformer"] = [*TINY["gpt"], "--tokenizer.kind=char"]
TINY["gpt"].append("--tokenizer.kind=char")
STEPS = ["--train.max-steps=3", "--train.batch-tokens=128", "--train.warmup-steps=1"]


class Terminal(StringIO):
    """Standard output that shows colours and boxes."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def qkv(*arguments, text: str = "", stdout: type[StringIO] = StringIO) -> tuple[int, str, str]:
    """Exit code, standard output and error of the command in this process; a traceback fails the test."""
    out, err, code = stdout(), StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.argv", ["qkv", *map(str, arguments)])
        patch.setattr("sys.stdin", StringIO(text))
        patch.setattr("warnings.formatwarning", warnings.formatwarning)
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def succeed(*arguments, text: str = "") -> str:
    code, out, err = qkv(*arguments, text=text)
    assert code == 0, err
    return out


def fail(*arguments) -> str:
    """The last line on standard error of a command that must exit with 2: its one line of complaint."""
    code, _, err = qkv(*arguments)
    assert code == 2, (code, err)
    complaints = [line for line in err.splitlines() if line.startswith("qkv: ")]
    assert err.strip().splitlines()[-1:] == complaints, err
    return complaints[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run of each family, trained for a moment through the command line."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for family, sizes in TINY.items():
        made[family] = folder / family
        data = samples.write(folder, family)
        printed = succeed("train", family, "--data", data, "--out", made[family], *sizes, *STEPS)
        assert json.loads(printed)["run"] == str(made[family])
    data = samples.documents(folder)
    made["masked"] = folder / "masked"
    succeed("train", "bert", "--data", data, "--out", made["masked"], *TINY["bert"], *STEPS)
    return made


def test_help_needs_no_torch():
    code = "import sys; sys.argv = ['qkv', '--help']\ntry:\n from qkv.cli import main; main()\nfinally:\n"
    code += " assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = "demo train plan eval generate translate fill classify tag embed explain export"
    for command in commands.split():
        assert command in done.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_help_explains_every_setting(family):
    text = " ".join(succeed("train", family, "--help").split())
    assert text.startswith(f"usage: qkv train {family} [-h] [OPTIONS]")
    assert "--data is short for --data.path" in text
    assert succeed("train", "--help").startswith("usage: qkv train [-h] [OPTIONS] FAMILY|RECIPE")
    recipe = default_recipe(family)
    for section in ("model", "tokenizer", "data", "train", "lora"):
        for field in fields(getattr(recipe, section)):
            flag = f"--{section}.{field.name.replace('_', '-')}"
            one = r"(?:INT|FLOAT|STR|\{[\w, ]*\})"
            values = rf"(?:{one}|\[{one} \[{one} \.\.\.\]\]|, --\S+)"
            said = re.search(rf" {re.escape(flag)} ?{values} (.*?) ?\(default: ", text)
            assert said and " " in said[1], flag


@pytest.mark.filterwarnings("ignore:.*PyTorch's operators alone")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "auto"])
def test_precisions(runs, precision, tmp_path):
    fast = ("--precision", precision)
    photo = next(Path(read_toml(runs["vit"] / "config.toml").data.path).rglob("*.png"))
    for command in (
        ("embed", runs["bert"], "a fine film"),
        ("classify", runs["bert"], "a fine film"),
        ("classify", runs["vit"], photo),
        ("translate", runs["transformer"], "2 dogs"),
        ("fill", runs["masked"], "a [MASK] film"),
        ("generate", runs["gpt"], "3 bottles", "--max-new-tokens", 4),
    ):
        said = succeed(*command, *fast)
        assert said.strip() and said.count("\n") == succeed(*command).count("\n")
    for name in ("bert", "transformer"):
        exact, rounded = (json.loads(succeed("eval", runs[name], *more)) for more in ((), fast))
        assert rounded["loss"] == pytest.approx(exact["loss"], abs=0.05)
    texts = tmp_path / "texts.txt"
    texts.write_text("a fine film\na dull one\n")
    succeed("embed", runs["bert"], "--data", texts, "-o", tmp_path / "v.npy", *fast)
    exact = [json.loads(succeed("embed", runs["bert"], line)) for line in texts.read_text().splitlines()]
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), exact, atol=0.05)


def test_an_optimized_model_is_not_saved(runs, tmp_path):
    pipeline = from_pretrained(runs["gpt"])
    assert pipeline.optimize("fp32") is pipeline
    with pytest.raises(InputError, match="no weights to save: load it anew"):
        pipeline.save_pretrained(tmp_path / "out")


def test_generate(runs):
    out = succeed("generate", runs["gpt"], "3 bottles", "--max-new-tokens", 8, "--seed", 1)
    assert out.startswith("3 bottles") and len(out.rstrip("\n")) > len("3 bottles")
    assert out == succeed("generate", runs["gpt"], "3 bottles", "--max-new-tokens", 8, "--seed", 1)


def test_generate_takes_every_setting_of_decoding(runs):
    greedy = succeed("generate", runs["gpt"], "3 b", "--max-new-tokens", 4, "--temperature", 0)
    beams = ["--num-beams", 2, "--length-penalty", 0.5]
    answers = succeed(
        "generate", runs["gpt"], "3 b", "--max-new-tokens", 4, *beams, "--num-return-sequences", 2
    )
    assert greedy.startswith("3 b") and answers.count("3 b") >= 2
    assert (
        fail("generate", runs["gpt"], "3 b", "--top-p", 0)
        == "qkv: top_p is 0.0; it must be above 0 and at most 1"
    )


def test_generate_continues_several_texts_at_once(runs):
    options = ["--max-new-tokens", 6, "--seed", 3]
    texts = ["3 bottles", "", "4 b"]
    one_by_one = [succeed("generate", runs["gpt"], text, *options) for text in texts]
    assert succeed("generate", runs["gpt"], *texts, *options) == "".join(one_by_one)
    assert succeed("generate", runs["gpt"], *options, text="3 bottles\n\n4 b\n") == "".join(one_by_one)
    assert "nothing to work on" in fail("generate", runs["gpt"])


def test_generate_stops_at_texts(runs):
    options = ["--max-new-tokens", 20, "--min-new-tokens", 20, "--seed", 4]
    whole = succeed("generate", runs["gpt"], "3 b", *options)
    stop = whole[8:10]
    wanted = whole[: 3 + whole[3:].index(stop)] + "\n"
    stops = ["--stop", "never seen", "--stop", stop]
    assert succeed("generate", runs["gpt"], "3 b", *options, *stops) == wanted
    assert fail("generate", runs["gpt"], "3 b", "--stop", "") == (
        "qkv: a stop string is empty: every text would end before it begins"
    )


def test_generate_prints_json_for_programs(runs):
    options = ["--max-new-tokens", 5, "--num-return-sequences", 2, "--json", "--logprobs", 2]
    printed = succeed("generate", runs["gpt"], "3 b", "4", *options)
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["prompt"] for line in lines] == ["3 b", "3 b", "4", "4"]
    for line in lines:
        assert line["finish"] in ("length", "eos")
        assert all(len(token["top"]) == 2 and token["logprob"] < 0 for token in line["tokens"])
    assert "give --json too" in fail("generate", runs["gpt"], "3 b", "--logprobs", 2)


def test_generate_guesses_ahead(runs):
    options = ["--max-new-tokens", 12, "--min-new-tokens", 12, "--seed", 2]
    plain = succeed("generate", runs["gpt"], "3 b 3 b", *options)
    assert succeed("generate", runs["gpt"], "3 b 3 b", *options, "--speculate", 3) == plain
    drafted = ["--speculate", 3, "--draft", runs["gpt"], "--json"]
    out = json.loads(succeed("generate", runs["gpt"], "3 b 3 b", *options, *drafted))
    assert [token["guessed"] for token in out["tokens"]].count(True) == 9
    assert "set it, or leave out draft" in fail("generate", runs["gpt"], "3 b", "--draft", runs["gpt"])


def test_texts_are_cut_on_request(runs):
    for command, family in (("classify", "bert"), ("embed", "bert"), ("translate", "transformer")):
        assert "tokens; the limit is 32" in fail(command, runs[family], "red " * 100)
        with pytest.warns(UserWarning, match="1 of 1 texts were longer than 32 tokens and were cut"):
            out = succeed(command, runs[family], "red " * 100, "--truncate")
        assert out.count("\n") == 1


def test_translate_reads_arguments_or_lines(runs):
    given = succeed("translate", runs["transformer"], "red green", "blue")
    piped = succeed("translate", runs["transformer"], text="red green\nblue\n")
    assert given == piped and given.count("\n") == 2


def test_fill(runs):
    (line,) = succeed("fill", runs["masked"], "the red [MASK] is green", "--top-k", 2).splitlines()
    guesses = json.loads(line)
    assert len(guesses) == 2 and guesses[0].keys() == {"name", "probability"}


def test_classify_texts_and_images(runs):
    lines = succeed("classify", runs["bert"], "red fine green", "awful blue").splitlines()
    assert [{g["name"] for g in json.loads(line)} for line in lines] == [{"good", "bad"}] * 2
    image = next((runs["vit"].parent / "images" / "dark").iterdir())
    (line,) = succeed("classify", runs["vit"], image, "--top-k", 1).splitlines()
    assert json.loads(line)[0]["name"] in ("dark", "bright")


def test_embed_to_lines_and_to_a_file(runs, tmp_path):
    lines = [json.loads(line) for line in succeed("embed", runs["bert"], "red", "green blue").splitlines()]
    succeed("embed", runs["bert"], "red", "green blue", "-o", tmp_path / "v.npy")
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.shape == (2, 32) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, lines, atol=1e-6)


@pytest.mark.parametrize("family", TINY)
def test_eval_on_held_out_data_and_on_a_file(runs, family, tmp_path):
    own = json.loads(succeed("eval", runs[family]))
    held_out = ["--data", samples.write(tmp_path, family)]
    held_out += ["--tokenize=none"] * (family == "transformer")
    given = json.loads(succeed("eval", runs[family], *held_out))
    assert given["samples"] >= own["samples"] and given["loss"] > 0
    if family == "transformer":
        assert "tok:13a" in own["bleu_signature"] and "tok:none" in given["bleu_signature"]


def test_a_run_has_a_page_and_its_tracker_the_numbers(runs, tmp_path):
    assert all((run / "report.html").is_file() for run in runs.values())
    start = ["train", runs["gpt"] / "config.toml", "--out", tmp_path / "run"]
    succeed(*start, "--train.report-to", "tensorboard")
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_train_from_a_recipe_file_with_a_change(runs, tmp_path):
    succeed("train", runs["gpt"] / "config.toml", "--out", tmp_path / "again", "--train.seed=7")
    assert "seed = 7" in (tmp_path / "again" / "config.toml").read_text()


@pytest.mark.parametrize("suffix", ["tsv", "jsonl", "parquet"])
def test_tables_of_labelled_texts_and_of_pairs(suffix, tmp_path):
    with Path(samples.labelled(tmp_path)).open(encoding="utf-8") as file:
        labelled = list(csv.DictReader(file))
    pairs = [{"source": row["text"], "target": row["text"].upper()} for row in labelled]
    for family, rows, score in (("bert", labelled, "label_accuracy"), ("transformer", pairs, "bleu")):
        path = tmp_path / f"{family}.{suffix}"
        columns = list(rows[0])
        if suffix == "tsv":
            path.write_text("".join("\t".join(r) + "\n" for r in (columns, *(r.values() for r in rows))))
        elif suffix == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        succeed("train", family, "--data", path, "--out", tmp_path / family, *TINY[family], *STEPS)
        asked = ["eval", tmp_path / family, "--data", path]
        if family == "bert":
            assert "num_beams and tokenize are for translations" in fail(*asked, "--num-beams", 1)
        else:
            asked += ["--num-beams", 1]
        assert score in json.loads(succeed(*asked))


def test_parquet_of_images(tmp_path):
    files = sorted(Path(samples.images(tmp_path)).glob("*/*.png"))
    rows = [{"image": {"bytes": f.read_bytes(), "path": f.name}, "label": f.parent.name} for f in files]
    path = tmp_path / "images.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    succeed("train", "vit", "--data", path, "--out", tmp_path / "vit", *TINY["vit"], *STEPS)
    assert read_toml(tmp_path / "vit" / "config.toml").model.labels == ("bright", "dark")
    assert json.loads(succeed("eval", tmp_path / "vit", "--data", path))["samples"] == len(files)


def test_fine_tune_a_checkpoint_of_another_size_than_the_recipe(runs, tmp_path):
    data = runs["bert"].parent / "labelled.csv"
    start = ["train", "bert", "--data", data, "--init", runs["masked"], "--out", tmp_path / "tuned", *STEPS]
    assert "with init the model is the checkpoint's" in fail(*start, "--model.depth=5")
    succeed(*start, "--model.dropout=0.3")
    made = read_toml(tmp_path / "tuned" / "config.toml")
    assert (made.model.dim, made.model.dropout, made.model.labels) == (32, 0.3, ("bad", "good"))
    assert made.train.learning_rate == FINE_TUNING_RATE


@pytest.mark.parametrize(
    ("options", "fine_tunes", "rate"),
    [
        (["--init", ""], False, 5e-4),
        (["--init", "x"], True, FINE_TUNING_RATE),
        (["--init=x", "--lora.rank", "0"], True, FINE_TUNING_RATE),
        (["--init=x", "--lora.rank", "2"], True, 5e-4),
    ],
)
def test_the_default_recipe_is_that_of_what_is_begun_from(options, fine_tunes, rate):
    config = _train_command(["bert", "--data", "x", *options]).keywords["config"]
    assert (config.model.dim == 768) == fine_tunes
    assert config.train.learning_rate == rate


def test_adapters_are_trained_used_and_made_whole(runs, tmp_path):
    data, run, out = runs["bert"].parent / "labelled.csv", tmp_path / "run", tmp_path / "out"
    succeed("train", "bert", "--data", data, "--init", runs["bert"], "--lora.rank=2", "--out", run, *STEPS)
    assert (run / "adapter_model.safetensors").is_file() and not (run / "model.safetensors").exists()
    assert read_toml(run / "config.toml").train.learning_rate > FINE_TUNING_RATE
    assert "accuracy" in succeed("eval", run)
    assert json.loads(succeed("export", run, out)) == {"folder": str(out)}
    assert succeed("classify", out, "fine") == succeed("classify", run, "fine")


def test_export(runs, tmp_path):
    assert json.loads(succeed("export", runs["gpt"], tmp_path / "hf", "--format", "hf"))
    asked = ["3 bottles", "--max-new-tokens", 4, "--temperature", 0]
    assert succeed("generate", tmp_path / "hf", *asked) == succeed("generate", runs["gpt"], *asked)
    assert not (tmp_path / "hf" / "state").exists()
    assert "holds a checkpoint, which would be lost" in fail("export", runs["vit"], tmp_path / "hf")
    said = json.loads(succeed("export", runs["vit"], tmp_path / "onnx", "--format", "onnx"))
    assert said["files"] == ["model.onnx"] and 0 <= said["largest_difference"] < 1e-4
    assert (tmp_path / "onnx" / "preprocessor_config.json").is_file()
    assert "has a model.safetensors" in fail("export", runs["vit"], runs["vit"], "--format", "onnx")
    assert "is for ONNX Runtime: name the checkpoint" in fail("classify", tmp_path / "onnx", "x.png")


def test_scores_stay_on_one_line_and_are_no_output(runs, tmp_path):
    data = runs["masked"].parent / "documents.txt"
    code, out, err = qkv("train", "bert", "--data", data, "--out", tmp_path / "run", *TINY["bert"], *STEPS)
    (line,) = [line for line in err.splitlines() if line.startswith("step 3: held-out loss ")]
    assert code == 0 and len(line) > 80 and "next_sentence_accuracy" in line
    assert json.loads(out)["step"] == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_that_cannot_show_every_character(runs, encoding):
    raw = BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["qkv", "generate", str(runs["gpt"]), "3 \N{SNOWMAN} b"])
        stream = TextIOWrapper(raw, encoding=encoding)
        patch.setattr("sys.stdout", stream)
        patch.setattr("warnings.formatwarning", warnings.formatwarning)
        main()
        stream.flush()
    assert raw.getvalue().startswith(b"3 ? b")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("train gpt --data x --model.heads 3", "model.dim 256 is not divisible by model.heads 3"),
        ("train gpt --data x --train.max-steps 0", "train.max_steps is 0; it must be at least 1"),
        ("train gpt --train.max-stepz 3", "--train.max-stepz, 3; did you mean --train.max-steps?"),
        ("train gpt --train.max-stepz=3", "--train.max-stepz=3; did you mean --train.max-steps?"),
        ("train gpt --train.max-steps x", "--train.max-steps: .*'x'; see qkv train gpt --help"),
        ("train gpt --model.activation sine", "'sine' .*'relu', .*; see qkv train gpt --help"),
        ("train gpt --model.dim", "Missing value .*--model.dim"),
        ("generate x --temperature -1", "temperature is -1.0; it must be 0, or from"),
        ("generate", "Missing from qkv generate: RUN_OR_HUB_ID .*; see qkv generate --help"),
        ("generate x --top-l 3", "--top-l, 3; did you mean --top-[kp]?"),
        ("embed x -o", "Missing value .*--output.*; see qkv embed --help"),
        ("train gpt --data x --lora.rank 4", "lora.rank adapts a trained model: name it with init"),
        ("train gpt --data x --lora.rank 4 --init y --train.optimizer muon", "muon is for whole matrices"),
        ("train bert --data x --model.head masked_lm", "--model.head would do nothing.* the data decide it"),
        ("train gpt --data x --init y --model.depth=12", "--model.depth .* with init the model is the ch"),
        ("train gpt --data x --init y --model.no-qk-norm", "--model.no-qk-norm .* with init the model"),
        ("train vit --data x --tokenizer.path y", "--tokenizer.path would do nothing here, as images have"),
        ("train gpt --data x --init y --tokenizer.vocab-size 9", "the tokenizer is made already: leave"),
        ("train vit --data x --init y --model.image-size 224", "--model.image-size .* with init the model"),
        ("train gpt --data x --data.valid y --data.valid-fraction 0.3", "as data.valid is held out: leave"),
        ("train gpt --data x --data.truncate", "--data.truncate .* as no sample is too long: leave it out"),
        ("train vit --data x --augment.magnitude 7", "how strong augment.randaugment is: leave it out"),
        ("plan gpt --gpu-memory-gib 24", "gpu_memory_gib is of the GPUs that are planned for"),
        ("tran", "tran; there are demo, train, plan, eval, .*, export$"),
        ("", "demo, train, plan, eval.*; see qkv --help"),
    ],
)
@pytest.mark.parametrize("stdout", [StringIO, Terminal])
def test_wrong_arguments_are_one_line(arguments, complaint, stdout, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    code, out, err = qkv(*arguments.split(), stdout=stdout)
    assert (code, out) == (2, "")
    assert re.fullmatch("qkv: [^╭│─\x1b]*\n", err) and re.search(complaint, err), err


def test_images_have_no_second_text(runs):
    image = next((runs["vit"].parent / "images" / "dark").iterdir())
    for option in (["--pair", "x"], ["--truncate"]):
        assert "classifies images" in fail("classify", runs["vit"], image, *option)
    assert "--column names one of a table" in fail("classify", runs["vit"], image, "--column", "x")


def test_nothing_on_standard_input(runs):
    for command, run in (
        ("embed", "bert"),
        ("classify", "bert"),
        ("translate", "transformer"),
        ("fill", "masked"),
    ):
        assert "nothing to work on" in fail(command, runs[run])


def test_standard_input_that_is_not_utf8(runs):
    command = [sys.executable, "-c", "from qkv.cli import main; main()", "embed", runs["bert"]]
    done = subprocess.run(
        command, input=b"red\n\xff\n", capture_output=True, env={**os.environ, "LC_ALL": "C"}
    )
    assert done.returncode == 2 and done.stderr.startswith(b"qkv: standard input is not UTF-8")


def test_lines_of_windows_on_standard_input_are_those_of_a_file(runs, tmp_path):
    command = [sys.executable, "-c", "from qkv.cli import main; main()", "translate", runs["transformer"]]
    said = []
    for text in (b"red fox\nblue dog\n", b"\xef\xbb\xbfred fox\r\nblue dog\r\n"):
        done = subprocess.run(command, input=text, capture_output=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1]


@pytest.mark.parametrize(("target", "code"), [("/dev/full", 2), ("pipe", 1)])
def test_output_that_cannot_be_written_is_no_success(target: str, code: int):
    with Path("/dev/null" if target == "pipe" else target).open("wb") as file:
        command = [sys.executable, "-c", "from qkv.cli import main; main()", "plan", "gpt"]
        out: int | BinaryIO = file
        if target == "pipe":
            read, out = os.pipe()
            os.close(read)
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_without_standard_input_there_is_nothing_to_work_on(runs):
    command = f"{sys.executable} -c 'from qkv.cli import main; main()' embed {runs['bert']} <&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 2 and "nothing to work on" in done.stderr, done.stderr


def test_only_a_whole_data_option_is_short_for_its_path():
    assert _with_data_path(["--data", "a", "--out", "x--data", "--data=b"]) == [
        *("--data.path", "a", "--out", "x--data", "--data.path=b")
    ]


def test_folder_instead_of_a_recipe(runs):
    complaint = fail("train", runs["gpt"])
    assert "is a folder" in complaint and str(runs["gpt"] / "config.toml") in complaint


def test_unknown_setting_in_a_recipe(runs, tmp_path):
    text = (runs["gpt"] / "config.toml").read_text().replace("max_steps", "max_stepz")
    (tmp_path / "r.toml").write_text(text)
    assert "did you mean train.max_steps" in fail("train", tmp_path / "r.toml")


def test_unknown_family_or_recipe(tmp_path):
    assert "no config file" in fail("train", "gtp", "--data", "x")
    assert "recipe file or one of" in fail("train")


def test_missing_data(tmp_path):
    assert "nothing to train on" in fail("train", "gpt")
    assert "nowhere.txt" in fail("train", "gpt", "--data", tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["--train.growth", "0.7", "1"], "is not a multiple of 1"),
        (["--train.torch-compile"], "needs samples of equal length"),
    ],
)
def test_what_cannot_work_leaves_no_folder(setting, message, tmp_path):
    path, run = tmp_path / "a.txt", tmp_path / "run"
    path.write_text("round and round it goes\n" * 50)
    sizes = [
        "--model.context=16",
        "--model.dim=12",
        "--model.heads=2",
        "--model.depth=1",
        "--train.max-steps=1",
    ]
    if "torch-compile" in setting[0]:
        path = tmp_path / "a.csv"
        path.write_text("text,label\n" + "a,1\nb c d,2\n" * 20)
    family = "bert" if path.suffix == ".csv" else "gpt"
    assert message in fail("train", family, "--data", path, "--out", run, *sizes, *setting)
    assert not run.exists()


def test_missing_column(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("sentence,label\na,1\nb,2\n")
    message = fail("train", "bert", "--data", path, "--out", tmp_path / "run")
    assert "'text'" in message and "sentence" in message


def test_empty_file(tmp_path):
    (tmp_path / "empty.txt").touch()
    assert "empty" in fail("train", "gpt", "--data", tmp_path / "empty.txt")


def test_file_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà vu\n".encode("latin-1") * 50)
    assert "UTF-8" in fail("train", "gpt", "--data", tmp_path / "latin.txt")


def test_broken_image(tmp_path):
    folder = Path(samples.images(tmp_path))
    (folder / "dark" / "0.png").write_bytes(b"not an image")
    assert "0.png" in fail("train", "vit", "--data", folder, "--out", tmp_path / "run")


def test_label_not_seen_in_training(runs, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label\nred,good\nblue,ugly\n")
    assert "'ugly'" in fail("eval", runs["bert"], "--data", path)


def test_text_longer_than_the_context(runs, tmp_path):
    assert "102 tokens; the limit is 32" in fail("classify", runs["bert"], "red " * 100)
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + "red " * 300 + ",good\nblue,bad\ngreen,bad\n")
    sizes = [*TINY["bert"], *STEPS]
    message = fail("train", "bert", "--data", path, "--out", tmp_path / "r", *sizes)
    assert "data.truncate" in message
    succeed("train", "bert", "--data", path, "--out", tmp_path / "r", "--data.truncate", *sizes)


def test_checkpoint_with_a_missing_tensor(runs, tmp_path):
    folder = shutil.copytree(runs["gpt"], tmp_path / "gpt")
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[3]
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert name.removeprefix("transformer.") in fail("generate", folder, "x")


def test_pickle_checkpoint_is_refused(runs, tmp_path):
    folder = shutil.copytree(runs["gpt"], tmp_path / "gpt")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in fail("generate", folder, "x")


def test_wrong_family_for_a_command(runs):
    assert "is a gpt model; needed is bert" in fail("fill", runs["gpt"], "a [MASK]")


@contextmanager
def nobody() -> Iterator[None]:
    """Without the rights of root, who may write anywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_read_only_run_folder(runs):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to nobody
        Path(name).chmod(0o755)
        run = shutil.copytree(runs["gpt"], Path(name) / "run")
        data = shutil.copy(runs["gpt"].parent / "song.txt", name)
        config = run / "config.toml"
        config.write_text(re.sub("(?m)^path = .*$", f"path = {json.dumps(data)}", config.read_text()))
        for path in (Path(data), run, *run.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with nobody():
            succeed("generate", run, "3 b", "--max-new-tokens", 2)
            succeed("eval", run)
            complaints = [
                fail("train", "--resume", run),
                fail("train", "gpt", "--data", data, "--out", run / "inner", *TINY["gpt"], *STEPS),
            ]
        assert all("Permission denied" in c and "cannot write" in c for c in complaints), complaints
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_unwritable_run_folder(runs, tmp_path):
    (tmp_path / "file").touch()
    data = runs["gpt"].parent / "song.txt"
    assert "cannot write" in fail(
        "train", "gpt", "--data", data, "--out", tmp_path / "file" / "run", *TINY["gpt"], *STEPS
    )
    assert "No such file" in fail("embed", runs["bert"], "red", "-o", tmp_path / "no" / "folder" / "v.npy")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 KB that ends with the test."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True)
    if done.returncode:
        pytest.skip("this machine lets no test mount a small disk")  # needs root
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_no_space_on_disk(runs, small_disk):
    data = runs["gpt"].parent / "song.txt"
    sizes = [a for a in TINY["gpt"] if "dim" not in a]
    message = fail("train", "gpt", "--data", data, "--out", small_disk / "run", *sizes, *STEPS)
    assert "space" in message.lower()


def test_resume_takes_nothing_else(runs):
    for arguments in (
        ["--resume", runs["gpt"], "--train.seed=3"],
        [f"--resume={runs['gpt']}", "--train.seed=3"],
        ["gpt", "--resume", runs["gpt"], "--train.max-steps", 500],
        ["--train.max-steps=500", "--resume", runs["gpt"]],
        ["--resume"],
    ):
        assert "nothing else" in fail("train", *arguments)
    assert "no config file" in fail("train", "--resume", runs["gpt"].parent)
    for arguments in (["--resume", runs["gpt"]], [f"--resume={runs['gpt']}"]):
        assert json.loads(succeed("train", *arguments))["step"] == 3


def test_tagging_and_regression_from_file_to_use(tmp_path):
    made = {}
    for name, data in (("tags", samples.conll(tmp_path)), ("values", samples.regression(tmp_path))):
        made[name] = tmp_path / name
        succeed("train", "bert", "--data", data, "--out", made[name], *TINY["bert"], *STEPS)
    (words,) = map(json.loads, succeed("tag", made["tags"], "red  old").splitlines())
    assert [(w["word"], w["start"], w["end"]) for w in words] == [("red", 0, 3), ("old", 5, 8)]
    assert all({"tag", "probability"} <= w.keys() for w in words)
    lines = succeed("classify", made["values"], "--pair", "new", text="red fine\nawful\n").splitlines()
    assert [list(json.loads(line)) for line in lines] == [["label"], ["label"]]
    assert "no tagging head" in fail("tag", made["values"], "text")
    scores = json.loads(succeed("eval", made["tags"]))
    assert {"tag_accuracy", "precision", "recall", "f1"} <= scores.keys()


def test_what_was_understood_is_said(tmp_path):
    data = samples.contrastive(tmp_path)
    arguments = ["bert", "--data", data, *TINY["bert"], *STEPS]
    _, _, said = qkv("train", *arguments, "--out", tmp_path / "run")
    assert "Contrastive: the second text of each is to be found" in " ".join(said.split())
    assert "data.task regression" not in said
    complaint = fail("train", *arguments, "--data.task=regression", "--out", tmp_path / "other")
    assert "has no column 'label'" in complaint
