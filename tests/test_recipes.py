"""Recipes can be read, planned and run as they say; results are measured and told as the benchmark says."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
import statistics
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import samples
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_pipelines import encoder
from test_train import run_config
from tiny import tiny

from qkv import cli, hub
from qkv.config import GPTConfig, read_toml, write_toml
from qkv.plan import plan
from qkv.ragged import pack

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def benchmark(name: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


results = benchmark("results")
changes = benchmark("changes")
reviews = benchmark("reviews")
CONFIG = GPTConfig(dim=8, depth=1, heads=2, mlp_dim=16, vocab_size=5, context=6)


def header(recipe: Path) -> str:
    """The comment that a recipe begins with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def commands(recipe: Path) -> list[list[str]]:
    """The `qkv` commands of a recipe's first comment, in words."""
    text = header(recipe).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("  qkv ")]


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch):
    """What `qkv train` makes of its arguments."""
    monkeypatch.chdir(ROOT)
    return cli._train_command(words).keywords["config"]


def by_name(recipe: Path) -> str:
    return recipe.stem


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_a_recipe_names_its_data_set_and_commands_that_can_be_given(recipe, monkeypatch):
    assert "Hugging Face" in " ".join(header(recipe).split())
    trains = [words for words in commands(recipe) if words[1] == "train"]
    assert trains and all(words[1] in ("train", "eval") for words in commands(recipe))
    for words in trains:
        assert words[:3] == ["qkv", "train", f"recipes/{recipe.name}"]
        config = parsed(words[2:], monkeypatch)
        assert all(data.path for data in config.tasks.values()) if config.tasks else config.data.path


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_a_recipe_trains_a_model_that_can_be_saved_and_leaves_the_data_to_the_command(recipe):
    config = read_toml(recipe)
    assert not any(data.path or data.valid for data in (config.data, *config.tasks.values()))
    if not config.init:
        hub.check_savable(config.model)
    assert config.train.warmup_steps < config.train.max_steps
    assert config.train.eval_steps <= config.train.max_steps


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not read_toml(r).init], ids=by_name)
def test_a_recipe_of_fresh_weights_can_be_planned(recipe):
    assert plan(read_toml(recipe), gpus=1).placements


# ---------------------------------------------------------------- results


def test_every_recipe_has_its_results():
    assert {recipe.stem for recipe in RECIPES} == {result.recipe for result in results.RESULTS.values()}


@pytest.mark.parametrize("name", results.RESULTS)
def test_arguments_of_a_result_suit_its_recipe(name, monkeypatch):
    result = results.RESULTS[name]
    words = [
        f"recipes/{result.recipe}.toml",
        *(a.format(data="DATA", out="OUT", minilm="MINILM") for a in result.train),
    ]
    config = parsed(words, monkeypatch)
    assert all(
        data.path.startswith(("DATA/", "OUT/")) for data in (config.tasks or {"": config.data}).values()
    )
    assert config.init or config.model.dim < type(config.model)().dim  # never the defaults' size by oversight
    assert not result.after or result.after in results.RESULTS
    assert not result.prepare or Path(result.prepare[0].format(scripts=results.SCRIPTS)).is_file()


def test_the_estimate_is_the_mean_over_windows_of_the_text():
    model = tiny(CONFIG, torch.float32).eval()
    stream = np.random.default_rng(1).integers(5, size=9)
    found = results.estimated_loss(model, stream, context=6, batches=300, windows=4)
    windows = [torch.tensor(stream[start : start + 7]) for start in range(3)]  # all that there are
    losses = []
    for window in windows:
        chances = model(pack([window[:-1]])).logits.values.log_softmax(-1)
        losses.append(-statistics.mean(chances[i, window[i + 1]].item() for i in range(6)))
    assert min(losses) < found < max(losses)
    # 1,200 draws from three windows: the mean is within four standard errors.
    assert abs(found - statistics.mean(losses)) < 4 * statistics.pstdev(losses) / math.sqrt(1200)


def test_the_estimate_of_a_single_window_is_its_loss():
    model = tiny(CONFIG, torch.float32).eval()
    stream = np.array([1, 4, 2, 2, 0, 3, 1])
    chances = model(pack([torch.tensor(stream[:-1])])).logits.values.log_softmax(-1)
    expected = -statistics.mean(chances[i, stream[i + 1]].item() for i in range(6))
    assert results.estimated_loss(model, stream, 6, batches=2, windows=3) == pytest.approx(expected, rel=1e-5)


def test_a_row_has_mean_spread_and_every_seed():
    figures = (
        results.Figure("right", "accuracy", ".1%", "90 % (others)"),
        results.Figure("nats", "loss", ".3f"),
    )
    result = results.Result("x", (), figures)
    seeds = {
        seed: results.Seed({"accuracy": right, "loss": 1.25, "signature": "s"}, 60.0 + 60 * seed, "M", ("c",))
        for seed, right in enumerate((0.5, 0.7, 0.9))
    }
    first, second = results.rows("x", result, seeds).splitlines()
    assert first == "| x | right | 70.0% ± 20.0% | 50.0%, 70.0%, 90.0% | 90 % (others) | 2.0 |"
    assert second == "| x | nats | 1.250 ± 0.000 | 1.250, 1.250, 1.250 |  | 2.0 |"
    assert "1.250 (one run)" in results.rows("x", result, {0: seeds[0]})
    told = results.notes(seeds).splitlines()
    assert told[:3] == ["- seeds 0, 1, 2", "- M", "- s"] and told.count("c") == 3
    columns = results.HEADER.splitlines()[0].count("|")
    assert columns == first.count("|")


def test_a_series_trains_scores_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    samples.text(data)
    recipe = run_config(data, "gpt", max_steps=4, eval_steps=2, save_steps=1)
    (tmp_path / "song.toml").write_text(write_toml(replace(recipe, data=type(recipe.data)())))
    result = results.Result(
        "song",
        ("--data", "{data}/song.txt"),
        (results.Figure("nats", "next_token_loss", ".4f"),),
        ("--data", "{data}/song.txt"),
        (results.random_windows, results.time_to(math.inf), results.time_to(-1.0)),
    )
    monkeypatch.setattr(results, "RECIPES", tmp_path)
    monkeypatch.setitem(results.RESULTS, "first", result)
    (tmp_path / "copy.py").write_text("import shutil, sys; shutil.copy(*sys.argv[1:])")
    monkeypatch.setattr(results, "SCRIPTS", tmp_path)
    copied = ("--data", "{out}/first/copied.txt")
    prepare = ("{scripts}/copy.py", "{data}/song.txt", copied[1])
    second = replace(result, train=copied, after="first", prepare=prepare)
    given = []

    run = results._run

    def in_process(command: list[str]) -> str:
        program, *arguments = command
        if program != "qkv":
            return run(command)
        given.append(arguments)
        monkeypatch.setattr("sys.argv", ["qkv", *arguments])
        with redirect_stdout(StringIO()) as output:
            cli.main()
        return output.getvalue()

    monkeypatch.setattr(results, "_run", in_process)
    seed = results.found("second", second, 3, data, out)
    assert [words[0] for words in given] == ["train", "eval"] * 2
    config = read_toml(out / "second" / "seed-3" / "config.toml")
    assert config.train.seed == 3 and (out / "first" / "seed-0").is_dir()
    assert seed.scores["next_token_loss"] > 0 and seed.scores["estimated_loss"] > 0
    assert seed.scores["seconds_to_loss"] == math.inf and seed.seconds > 0
    assert torch.__version__ in seed.machine
    assert re.fullmatch(r"python .*copy\.py .*/data/song\.txt .*/first/copied\.txt", seed.commands[0])
    assert re.fullmatch(r"qkv train .*song\.toml --data .* --train\.seed 3 --out .*", seed.commands[1])
    given.clear()
    (tmp_path / "copy.py").unlink()  # a run that goes on has its data
    assert results.found("second", second, 3, data, out) == seed and not given
    (out / "second" / "seed-3" / results.FOUND).unlink()
    again = results.found("second", second, 3, data, out)
    assert [words[:2] for words in given] == [["train", "--resume"], ["eval", str(out / "second" / "seed-3")]]
    assert json.dumps(again.scores) == json.dumps(seed.scores)


# ---------------------------------------------------------------- sentences of reviews

ODDS = st.floats(-20, 20)


@given(st.lists(st.lists(ODDS, min_size=1, max_size=5), min_size=1, max_size=7))
def test_blame_is_praise_turned_round(odds: list[list[float]]):
    texts = [[f"{i} {j}" for j in range(len(review))] for i, review in enumerate(odds)]
    found = list(reviews.praised(texts, odds))
    turned = list(reviews.praised(texts, [[-one for one in review] for review in odds]))
    assert [sentence for sentence, _ in turned] == [sentence for sentence, _ in found]
    assert [1 - chance for _, chance in turned] == pytest.approx([chance for _, chance in found])


def test_a_doubtful_sentence_is_what_its_review_is_and_reviews_without_a_side_are_left_out():
    texts = [["a", "b", "c"], ["d", "e"], ["f", "g"]]
    found = dict(reviews.praised(texts, [[3.0, 0.0, -9.0], [-3.0, 0.0], [-1.0, 0.0]]))
    assert found.keys() == {"d", "e"}  # the first counts its last as -4 and is in the middle by its means
    assert found["d"] < found["e"] < 0.2
    found = dict(reviews.praised(texts, [[3.0, 0.0, 3.0], [-3.0, 0.0], [0.1, 0.0]]))
    assert found.keys() == {"a", "b", "c", "d", "e"} and found["b"] > 0.9 and found["e"] < 0.1


def test_sentences_of_reviews_become_a_table_to_train_with(tmp_path: Path, monkeypatch, capsys):
    reader = encoder("classification", ("bad", "good"))
    reader.save_pretrained(tmp_path / "net")
    said = [[f"{word} number {i} of it" for i in range(9)] for word in ("fine", "dull", "long")]
    said[0].append("too short")
    text = "\n\n".join(["Not a review.\nso it is left out .", *("\n".join(review) for review in said)])
    (tmp_path / "documents.txt").write_text(text + "\n")
    assert reviews.reviews(str(tmp_path / "documents.txt")) == said
    flat = [sentence for review in said for sentence in review]
    odds = reviews.log_odds(str(tmp_path / "net"), flat)
    expected = [dict(answer)["good"] for answer in reader.classify(flat)]
    assert torch.tensor(odds).sigmoid().tolist() == pytest.approx(expected, abs=2e-2)  # perhaps in bfloat16
    monkeypatch.setattr(reviews, "log_odds", lambda run, _: [9.0] * 10 + [-9.0] * 9 + [0.0] * 9)
    words = ["net", "--data", str(tmp_path / "documents.txt"), "--output", str(tmp_path / "made.csv")]
    monkeypatch.setattr("sys.argv", ["reviews.py", *words])
    reviews.main()
    rows = (tmp_path / "made.csv").read_text().splitlines()
    assert rows == ["text,label", *(f"{s},1" for s in said[0][:9]), *(f"{s},0" for s in said[1])]
    assert "3 reviews of 28 sentences: 18 labelled, 9 praise" in capsys.readouterr().out


@pytest.mark.parametrize("road", changes.ROADS)
def test_a_road_ends_at_its_recipe_and_every_step_changes_something(road, monkeypatch):
    recipe, given, _ = changes.ROADS[road]
    path = f"recipes/{recipe}.toml"
    made = [parsed([path, *result.train], monkeypatch) for result in changes.steps(road).values()]
    assert all(one != other for one, other in pairwise(made))
    assert made[-1] == parsed([path, *given], monkeypatch)
