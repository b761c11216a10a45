"""What `qkv eval` says of a run, beside the same figures by hand."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from test_train import Nobody, run_config

from qkv import hub
from qkv.errors import InputError
from qkv.evaluate import score
from qkv.job import new_job, resumed_job
from qkv.models import build
from qkv.pipelines import TextGenerator, Translator, from_pretrained
from qkv.ragged import pack
from qkv.train import train


def trained(folder: Path, family: str, **settings: float) -> str:
    """A run folder."""
    train(new_job(run_config(folder, family, **settings)), folder / "run", Nobody())
    return str(folder / "run")


def test_perplexity_and_bits_per_byte_by_hand(tmp_path: Path) -> None:
    run = trained(tmp_path, "gpt")
    generator = from_pretrained(run)
    assert isinstance(generator, TextGenerator)
    stream = torch.from_numpy(resumed_job(Path(run)).valid.stream.astype("int64"))  # type: ignore[attr-defined]
    context = generator.model.config.context
    nats = 0.0
    for start in range(0, len(stream) - 1, context):
        window = stream[start : start + context + 1]
        with torch.no_grad():
            logits = generator.model(pack([window[:-1]])).logits.values
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    text = generator.tokenizer.decode(stream.tolist())
    found = score(run)
    assert found["perplexity"] == pytest.approx(math.exp(nats / (len(stream) - 1)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)


@pytest.mark.parametrize("tokenize", ["13a", "none"])
def test_bleu_is_sacrebleu_s_of_what_the_run_translates(tokenize: str, tmp_path: Path) -> None:
    run = trained(tmp_path, "transformer", max_steps=100)
    held_out = (tmp_path / "other.en", tmp_path / "other.xx")
    sources = ["small red quick", "old", "blue new, round.", "green large"]
    references = ["SMALL RED QUICK", "OLD", "BLUE NEW ROUND", "RED LARGE"]
    for path, lines in zip(held_out, (sources, references), strict=True):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    translator = from_pretrained(run)
    assert isinstance(translator, Translator)
    translations = translator.translate(sources, num_beams=2)
    found = score(run, ",".join(map(str, held_out)), num_beams=2, tokenize=tokenize)  # type: ignore[arg-type]
    bleu = sacrebleu.corpus_bleu(translations, [references], tokenize=tokenize)
    assert found["bleu"] == pytest.approx(bleu.score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(translations, [references]).score)
    assert found["samples"] == 4 and found["num_beams"] == 2


@pytest.mark.parametrize("change", ["shorter", "longer"])
@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_data_that_have_changed_are_not_called_held_out(family: str, change: str, tmp_path: Path) -> None:
    run = trained(tmp_path, family, max_steps=1)
    score(run)
    (data,) = (*tmp_path.glob("song.txt"), *tmp_path.glob("labelled.csv"))
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[:-20] if change == "shorter" else [*lines, lines[-1]]), encoding="utf-8")
    with pytest.raises(InputError, match=r"changed since it was trained.* score it on others with --data"):
        score(run)
    score(run, str(data))


def test_texts_over_the_context_are_cut_if_asked(tmp_path: Path) -> None:
    run = trained(tmp_path, "bert", max_steps=1)
    (tmp_path / "long.csv").write_text(f"text,label\n{'red ' * 900},bad\nold,good\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"cut them with data.truncate \(qkv eval: --truncate\)"):
        score(run, str(tmp_path / "long.csv"))
    with pytest.warns(UserWarning, match="1 of 2 texts were longer than .* tokens and were cut"):
        assert score(run, str(tmp_path / "long.csv"), truncate=True)["samples"] == 2
    shutil.rmtree(run)
    with pytest.raises(InputError, match="no sample of a gpt is too long: leave truncate out"):
        score(trained(tmp_path, "gpt", max_steps=1), truncate=True)


def test_a_value_a_text_is_no_score_of_two(tmp_path: Path) -> None:
    job = new_job(run_config(tmp_path, "bert"))
    model = build(replace(job.checkpoint.model.config, head="regression", labels=("a", "b")))
    hub.save(tmp_path / "two", hub.Checkpoint(model, job.checkpoint.tokenizer))
    (tmp_path / "values.csv").write_text("text,label\nred,0.5\nold,1.5\n", encoding="utf-8")
    with pytest.raises(InputError, match="gives 2 values, but the data have one a text"):
        score(str(tmp_path / "two"), str(tmp_path / "values.csv"))
