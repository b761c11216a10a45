"""The command line as users meet it: every command on a real run, one line and exit code 2 for a mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import samples
from safetensors.torch import load_file, save_file

from qkv.cli import main

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


def qkv(*arguments, text: str = "") -> tuple[int, str, str]:
    """Exit code, standard output and error of the command in this process; a traceback fails the test."""
    out, err, code = StringIO(), StringIO(), 0
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
    for command in ("demo", "train", "eval", "generate", "translate", "fill", "classify", "embed"):
        assert command in done.stdout


def test_generate(runs):
    out = succeed("generate", runs["gpt"], "3 bottles", "--max-new-tokens", 8, "--seed", 1)
    assert out.startswith("3 bottles") and len(out.rstrip("\n")) > len("3 bottles")
    assert out == succeed("generate", runs["gpt"], "3 bottles", "--max-new-tokens", 8, "--seed", 1)


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
    given = json.loads(succeed("eval", runs[family], "--data", samples.write(tmp_path, family)))
    assert given["samples"] >= own["samples"] and given["loss"] > 0
    assert ("bleu" in own) == (family == "transformer")


def test_train_from_a_recipe_file_with_a_change(runs, tmp_path):
    succeed("train", runs["gpt"] / "config.toml", "--out", tmp_path / "again", "--train.seed=7")
    assert "seed = 7" in (tmp_path / "again" / "config.toml").read_text()


# ---------------------------------------------------------------- mistakes


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
    assert "needs a bert model" in fail("fill", runs["gpt"], "a [MASK]")


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
    assert "nothing else" in fail("train", "--resume", runs["gpt"], "--train.seed=3")
    assert "no config file" in fail("train", "--resume", runs["gpt"].parent)
