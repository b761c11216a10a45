"""The page of an explanation in a headless Chromium: its size, and how long it takes to write and to paint.

usage: python benchmarks/explanation_page.py [--passes N]   (needs chromium, and playwright of the test extra)

A model of 12 layers x 12 heads over so many tokens, whose attention is the softmax of normal scores, sharper
from head to head: more widely spread than what trained models have, so that little can be left out. The page
is opened from disk in a fresh browser context each time. Times are medians: "first paint" is the browser's
own first-contentful-paint, "ready" is when the script has run, both from the start of navigation; "head" is
from the choice of a head to its text or lines and its matrix.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, sync_playwright

from qkv.explanations.explanation import Attention, Choice, Explanation, Guess, Relevance, Units
from qkv.explanations.page import page

LAYERS, HEADS = 12, 12

MEASURE = """async () => {
  const frame = () => new Promise(requestAnimationFrame);
  while (!performance.getEntriesByName('first-contentful-paint').length) await frame();
  const paint = performance.getEntriesByName('first-contentful-paint')[0].startTime;
  const ready = performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd;
  const buttons = document.querySelectorAll('.heads')[0].querySelectorAll('button');
  const start = performance.now();
  buttons[buttons.length - 1].click();
  while (!document.querySelector('#attention').textContent.includes('Layer 11, head 11')) await frame();
  return [paint, ready, performance.now() - start];
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--passes", type=int, default=7)
    passes = parser.parse_args().passes
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        print("| tokens | MB | written in s | first paint ms | ready ms | head ms |")
        print("|---|---|---|---|---|---|")
        for tokens in (32, 128, 512):
            explanation = explained(tokens)
            start = time.perf_counter()
            html = page(explanation)
            seconds = time.perf_counter() - start
            file = Path(folder) / f"{tokens}.html"
            file.write_text(html, encoding="utf-8")
            rounds = [opened(browser, file) for _ in range(passes + 1)][1:]
            times = " | ".join(f"{statistics.median(one):.0f}" for one in zip(*rounds, strict=True))
            print(f"| {tokens} | {file.stat().st_size / 1e6:.2f} | {seconds:.1f} | {times} |")
        browser.close()


def opened(browser: Browser, file: Path) -> list[float]:
    """First paint, all drawn, and another head drawn, in milliseconds."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    tab = context.new_page()
    tab.goto(file.as_uri())
    tab.locator("h3", has_text="Layer 11, head 0").wait_for()
    found: list[float] = tab.evaluate(MEASURE)
    context.close()
    return found


def explained(tokens: int) -> Explanation:
    """A class of a text of so many tokens."""
    draw = np.random.default_rng(0)
    weights = np.empty((LAYERS, HEADS, tokens, tokens), np.float16)
    for layer in weights:
        for sharpness, head in zip(np.linspace(0.5, 3.5, HEADS), layer, strict=True):
            scores = np.exp(sharpness * draw.normal(size=head.shape))
            head[:] = scores / scores.sum(-1, keepdims=True)
    read = Units("text", tuple(f" word{i}" for i in range(tokens)), (False,) * tokens)
    values = draw.normal(size=tokens).astype(np.float32)
    choice = Choice("yes", 0.9, (Guess("yes", 0.9),), "text", 0, (Relevance("relevance", {"text": values}),))
    stack = Attention("encoder", "text", "text", weights, tuple(range(LAYERS)))
    return Explanation("bert", "random weights", (read,), (choice,), (stack,), 0.0)


if __name__ == "__main__":
    main()
