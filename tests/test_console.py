"""What takes long is shown, what does not is not."""

from __future__ import annotations

import io
import re
import sys

import pytest
from rich.console import Console

import qkv.console
from qkv.config import GPTConfig, RunConfig, TrainConfig
from qkv.console import CorpusBar, TrainingBar, WorkBar


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, for the test to set."""
    clock = [100.0]
    monkeypatch.setattr(qkv.console.time, "monotonic", lambda: clock[0])
    return clock


@pytest.mark.parametrize("terminal", [True, False])
def test_only_work_that_takes_long_is_shown(terminal: bool, now: list[float]) -> None:
    out = io.StringIO()
    with WorkBar(lambda: Console(file=out, force_terminal=terminal, width=100)) as bar:
        for done in range(1, 100):
            now[0] += 0.01
            bar("texts tokenised", done, 100)
        assert out.getvalue() == ""
        now[0] += 2
        bar("texts tokenised", 100, 100)
        bar.bar.refresh()
    assert "texts tokenised" in out.getvalue() and "100" in out.getvalue()
    assert terminal or out.getvalue().strip() == "100 of 100 texts tokenised so far"


def test_a_corpus_shows_its_rate_and_leaves_standard_output_alone(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()
    with CorpusBar(lambda: Console(file=out, force_terminal=True, width=100), "bytes", 1000) as bar:
        before = sys.stdout
        for done in range(1, 100):
            now[0] += 0.01
            bar.update(done, 3 * done)
            print(done)
        assert out.getvalue() == ""
        now[0] += 9.01
        bar.update(500, 1500)
        bar.bar.refresh()
        assert sys.stdout is before
        print("an answer")
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", out.getvalue())
    assert " 50% of bytes, 150 answers/s, left" in shown
    assert "0% of bytes, ," not in shown
    assert capsys.readouterr().out.endswith("an answer\n")


def test_the_time_left_of_a_run_counts_slow_steps_and_evaluations(now: list[float]) -> None:
    out = io.StringIO()
    bar = TrainingBar(Console(file=out, force_terminal=True, width=120))
    bar.begin(RunConfig(model=GPTConfig(), train=TrainConfig(max_steps=104)), 3)
    for step, seconds in (
        (4, 500.0),
        (5, 540.0),
        (6, 640.0),
    ):  # of a resumed run; the last with an evaluation
        bar.step(step, {"loss": 2.0, "tokens": 10.0, "seconds": seconds})
        bar.bar.refresh()
    bar.close()
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", out.getvalue())
    assert re.findall(r"([\d:]+) left", shown)[:1] == ["1:06:00"]  # 99 steps of 40 s
    assert re.findall(r"([\d:]+) left", shown)[-1] == "1:54:20"  # 98 of 70 s
