"""Every code block of the documents runs as it is written, on tiny data and with tiny default models."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import samples
from test_train import Nobody

from qkv import recipes
from qkv.cli import main
from qkv.config import DataConfig, read_toml
from qkv.job import new_job
from qkv.train import train

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(language, code, id=f"{path.name}:{path.read_text()[: block.start()].count(chr(10)) + 1}")
    for path in DOCUMENTS
    for block in re.finditer(r"```(\w+)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    for language, code in [block.groups()]
]


def tiny_recipe(family):
    """The family's default recipe with a model and a batch that take milliseconds."""
    recipe = ORIGINAL(family)
    model = replace(recipe.model, dim=32, depth=2, heads=2, mlp_dim=64)
    if family == "transformer":
        model = replace(model, context=48)
    return short(replace(recipe, model=model, tokenizer=replace(recipe.tokenizer, vocab_size=400)))


def short(recipe):
    """A few small steps of it."""
    return replace(recipe, train=replace(recipe.train, max_steps=3, batch_tokens=512, warmup_steps=1))


ORIGINAL = recipes.default_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the files that the documents name, and the runs of the demo."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("corpus.txt", "other.txt"):
        Path(samples.text(folder)).rename(folder / name)
    samples.documents(folder)
    Path(samples.labelled(folder)).rename(folder / "reviews.csv")
    for part, count in (("test", 3), ("train", 60)):
        source, target = map(Path, samples.pairs(folder, count).split(","))
        source.rename(folder / f"{part}.en")
        target.rename(folder / f"{part}.de")
    samples.conll(folder)
    samples.contrastive(folder)
    Path(samples.images(folder)).rename(folder / "photos")
    (folder / "photo.png").write_bytes((folder / "photos" / "dark" / "0.png").read_bytes())
    demo = {
        "gpt": str(folder / "corpus.txt"),
        "bert": str(folder / "documents.txt"),
        "transformer": f"{folder / 'train.en'},{folder / 'train.de'}",
        "vit": str(folder / "photos"),
    }
    for family, data in demo.items():
        recipe = tiny_recipe(family)
        train(
            new_job(replace(recipe, data=DataConfig(path=data))), folder / "runs" / "demo" / family, Nobody()
        )
    for block in BLOCKS:
        language, code = block.values
        if language == "toml":
            (folder / recipe_name(code)).write_text(code, encoding="utf-8")
    return folder


def recipe_name(code: str) -> str:
    """The file that a recipe's first line names."""
    return re.match(r"# (\S+\.toml)\n", code)[1]


@pytest.mark.parametrize(("language", "code"), BLOCKS)
def test_block_runs(language, code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("qkv.cli.default_recipe", tiny_recipe)
    monkeypatch.setattr("qkv.cli.read_toml", lambda path: short(read_toml(path)))
    if language == "python":
        exec(compile(code, "block", "exec"), {})
    elif language == "bash":
        for line in filter(None, code.splitlines()):
            run_line(line, monkeypatch)
    elif language == "toml":
        new_job(read_toml(Path(recipe_name(code))))
    else:
        assert language == "text"  # a drawing


def run_line(line: str, monkeypatch) -> None:
    given, piped, command = line.partition(" | ")
    words = shlex.split(command if piped else given, comments=True)
    if words[0] == "qkv":
        monkeypatch.setattr("sys.argv", words)
        monkeypatch.setattr("sys.stdin", StringIO(shlex.split(given)[1] + "\n" if piped else ""))
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            try:
                main()
            except SystemExit as end:
                assert not end.code, err.getvalue()
        assert out.getvalue(), line
    elif words[0] == "make":
        assert f"\n{words[1]}: " in (ROOT / "Makefile").read_text()
    elif words[0] == "pip":
        # Making an environment takes minutes; here, what the line names must be there.
        extras = re.search(r"\.\[(.*)\]", words[-1])
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert extras and set(extras[1].split(",")) <= project["optional-dependencies"].keys()
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    elif words[0] == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    else:
        assert words[:3] == ["python", "-m", "venv"], line
