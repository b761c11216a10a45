"""Passes that are replayed answer as those that are computed anew.

Without a GPU, a stand-in computes a graph's work again on the same tensors: what a graph is given, reads and
leaves behind is tested everywhere, and that CUDA captures it where there is a GPU.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import varlen
from tiny import CONFIGS, DECODERS, REQUESTS, answers, flat, ids, samples, tiny
from torch import Tensor

from qkv.attention import Pattern
from qkv.config import AnyModelConfig, Decoding
from qkv.decode import generate
from qkv.engine import Engine
from qkv.errors import InputError
from qkv.fast import graphs, optimize
from qkv.fast.graphs import GraphedStack, Pass, RaggedPass, Step
from qkv.fast.roads import Road
from qkv.layers import Stack
from qkv.models import Model
from qkv.ragged import Layout, pack
from qkv.recording import record
from qkv.search import Request

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


class Rerun:
    """Computes instead of replaying."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        self.work, self.answer = work, work()

    def replay(self) -> Tensor:
        return self.answer.copy_(self.work())


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    if not GPU:
        monkeypatch.setattr(graphs.Capture, "__call__", lambda self, work, device: Rerun(work))


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Which graphs are captured."""
    kinds: list[str] = []
    for kind in (Pass, RaggedPass, Step):

        def note(self, *given, begin=kind.__init__, name=kind.__name__):
            kinds.append(name)
            begin(self, *given)

        monkeypatch.setattr(kind, "__init__", note)
    return kinds


def plain(name: AnyModelConfig | str) -> Model:
    return tiny(name, torch.float32).to(DEVICE)


def graphed(name: AnyModelConfig | str) -> Model:
    """The same model with graphs in the place of its stacks."""
    model = plain(name).requires_grad_(False)
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, Stack):
                setattr(parent, child, GraphedStack(module))
    return model


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def on_device(batch: list) -> list:
    return [tuple(x.to(DEVICE) for x in s) if isinstance(s, tuple) else s.to(DEVICE) for s in batch]


@pytest.mark.parametrize("name", CONFIGS)
def test_passes_of_the_same_lengths_are_answered_each_with_its_own(name: str, made: list[str]):
    model, lengths = graphed(name), [(7, 3)] * 3
    for seed in range(4):
        with torch.inference_mode():
            batch = on_device(samples(model, lengths, seed))
            first = flat(answers(model, batch))
            kept = [x.clone() for x in first]
            answers(model, on_device(samples(model, lengths, seed + 10)))
            assert_equal(first, flat(answers(plain(name), batch)))
            assert_equal(first, kept)  # what was answered is not overwritten later
    # An encoder-decoder's decoder without a cache reads a memory, which is another one each time.
    assert made == ["Pass"]


@pytest.mark.parametrize("name", ["gpt-rotary", "bert-masked-lm", "transformer-rotary"])
def test_passes_of_different_lengths_share_one_that_has_room_for_them(
    name: str, made: list[str], monkeypatch
):
    if not GPU:
        varlen.use_stand_in(monkeypatch)
    dtype = torch.bfloat16 if GPU else torch.float32
    config = replace(CONFIGS[name], dim=16)  # heads 8 wide, as the kernel wants them
    model, expected = graphed(config).to(dtype), plain(config)
    for seed, lengths in enumerate([(7, 2, 20), (1, 25, 3, 1), (9, 9, 9, 2), (27, 1, 1, 1), (8, 9, 12)]):
        with torch.inference_mode():
            batch = on_device(samples(model, [(n, n) for n in lengths], seed))
            found = flat(answers(model, batch))
            kept = [x.clone() for x in found]
            answers(model, on_device(samples(model, [(n, n) for n in lengths], seed + 10)))
            for a, b in zip(found, flat(answers(expected, batch)), strict=True):
                assert (a.float() - b).norm() <= (0.1 if GPU else 1e-4) * b.norm().clamp(min=1)
            assert_equal(found, kept)  # what was answered is not overwritten later
    # There are 29 to 32 tokens, of 3 or 4 sequences of at most 16 or 32.
    assert made == ["RaggedPass"] * 2


def test_passes_of_both_kinds_are_told_apart(made: list[str], monkeypatch):
    """16 texts of 4 tokens are no room for 16 tokens in at most 4 texts of at most 4."""
    if not GPU:
        varlen.use_stand_in(monkeypatch)
    config = replace(CONFIGS["bert-masked-lm"], dim=16)
    model = graphed(config).to(torch.bfloat16 if GPU else torch.float32)
    with torch.inference_mode():
        for lengths in [(4,) * 16] * 2 + [(4, 4, 4, 3)] * 2:
            batch = on_device(samples(model, [(n, n) for n in lengths]))
            for a, b in zip(flat(answers(model, batch)), flat(answers(plain(config), batch)), strict=True):
                assert (a.float() - b).norm() <= (0.1 if GPU else 1e-4) * b.norm().clamp(min=1)
    assert made == ["Pass", "RaggedPass"]


@pytest.mark.parametrize("name", ["gpt-pre-norm", "bert-masked-lm"])
def test_where_there_is_no_kernel_for_them_passes_of_different_lengths_are_computed(
    name: str, made: list[str]
):
    model = graphed(name)
    for _ in range(3):
        with torch.inference_mode():
            answers(model, on_device(samples(model, [(7, 3), (1, 9), (20, 2)])))
    assert made == []


def test_positions_are_those_of_the_call_and_not_of_the_one_that_was_captured(made: list[str]):
    layout = Layout((6,), DEVICE)
    x, pattern = torch.randn(6, 12, device=DEVICE), Pattern(layout, layout, causal=True)
    model = graphed("gpt-rotary")
    with torch.inference_mode():
        for spread in (1, 1, 3, 2):
            positions = layout.positions * spread
            found, expected = (m.run(x, positions, pattern) for m in (model, plain("gpt-rotary")))
            assert_equal([found], [expected])
    assert made == ["Pass"]


def test_a_text_without_a_source_attends_nothing(made: list[str]):
    said = []
    for model in (plain("transformer-post-norm"), graphed("transformer-post-norm")):
        with torch.inference_mode():
            cache = model.start(2)
            model.remember(pack([[3, 1, 4], [1, 5]], DEVICE), cache)
            hidden = [model.next_hidden(pack([ids(2, 0), ids(3, 1)], DEVICE), cache)]
            hidden += [model.next_hidden(pack([ids(1, n), ids(1, n + 9)], DEVICE), cache) for n in range(3)]
            cache.memory.truncate([0, 2])
            hidden += [model.next_hidden(pack([ids(1, n), ids(1, n + 9)], DEVICE), cache) for n in range(3)]
        said.append(hidden)
    assert_equal(said[1], said[0])
    assert "Step" in made


def test_what_a_graph_reads_of_its_pattern_lives_as_long_as_it(monkeypatch):
    """A graph knows addresses alone, and what captured its work need not keep the work."""
    seen: list[weakref.ref[Pattern]] = []
    forward = Stack.forward

    def note(self, x, pattern, **given):
        seen.append(weakref.ref(pattern))
        return forward(self, x, pattern, **given)

    def forget(self, work, device):
        answer = work()
        return SimpleNamespace(replay=lambda: answer)

    monkeypatch.setattr(Stack, "forward", note)
    monkeypatch.setattr(graphs.Capture, "__call__", forget)
    model = graphed("gpt-rotary")
    with torch.inference_mode():
        for _ in range(3):
            answers(model, on_device(samples(model, [(5, 1), (5, 1)])))
    gc.collect()
    assert [pattern() is not None for pattern in seen] == [False, True]  # computed, captured, replayed


@pytest.mark.parametrize("name", DECODERS)
def test_decoding_by_steps_that_are_replayed(name: str, made: list[str]):
    inputs = [ids(length, length).tolist() for length in (5, 1, 9, 30)]
    for decoding in (
        Decoding(max_new_tokens=40, temperature=0.0),
        Decoding(max_new_tokens=20, num_beams=3),
        Decoding(max_new_tokens=20, temperature=0.9, seed=3, num_return_sequences=2),
    ):
        made.clear()
        expected, found = (generate(m, inputs, decoding, [1]) for m in (plain(name), graphed(name)))
        assert [[h.ids for h in one] for one in found] == [[h.ids for h in one] for one in expected]
        assert "Step" in made


@pytest.mark.parametrize("name", DECODERS)
def test_requests_of_all_kinds_share_the_slots(name: str, made: list[str]):
    """Beams, samples, guesses and prompts in one step, some slots idle; a second round finds old rows."""
    said = []
    for model in (plain(name), graphed(name)):
        engine = Engine(model, 5)
        tokens = []
        for n, options in enumerate(REQUESTS * 2):
            engine.submit(Request(ids(4 + 3 * n, n).tolist(), Decoding(**options), [1]))
            tokens += engine.step()
        tokens += engine.run()
        said.append([(token.request, token.answer, token.id, token.finish) for token in tokens])
    assert said[0] == said[1]
    assert "Step" in made


def test_sources_that_lie_in_no_cache_are_attended_as_without_graphs():
    found = []
    for model in (graphed("transformer-post-norm"), plain("transformer-post-norm")):
        with torch.inference_mode():
            memory = model.encode(pack([ids(5, 0), ids(3, 1)], DEVICE))
            read, cache = model.read(memory), model.start(2)
            steps = [pack([ids(1, step), ids(1, step + 9)], DEVICE) for step in range(5)]
            found.append(
                [model.decode(s, read, Pattern(s.layout, memory.layout), cache).values for s in steps]
            )
    assert_equal(*found)


def test_what_idle_slots_hold_stays(made: list[str]):
    """Also where there is no row behind it, in a text as long as the context."""
    model = graphed("gpt-pre-norm")
    for held in (model.config.context, 60, 5):
        made.clear()
        cache = model.start(2)
        with torch.inference_mode():
            model.next_hidden(pack([ids(held, 0), ids(3, 1)], DEVICE), cache)
            before = [slots[0, :held].clone() for layer in cache.layers for slots in layer.slots()]
            for step in range(4):
                model.next_hidden(pack([[], ids(1, step)], DEVICE), cache, [0])
            after = [slots[0, :held] for layer in cache.layers for slots in layer.slots()]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert ("Step" in made) == (held < model.config.context)


def test_graphs_go_with_their_cache(made: list[str]):
    model = graphed("gpt-pre-norm")
    generate(model, [[1, 2, 3]], Decoding(max_new_tokens=9, temperature=0.0), [])
    assert "Step" in made
    gc.collect()
    stacks = [module for module in model.modules() if isinstance(module, GraphedStack)]
    assert [len(stack._steps) for stack in stacks] == [0]


@pytest.mark.parametrize("name", DECODERS)
def test_what_a_cache_has_outgrown_goes(name: str, made: list[str]):
    """Graphs of smaller slots would keep their keys and values."""
    engine = Engine(graphed(name), 2)
    engine.submit(Request(ids(20, 1).tolist(), Decoding(max_new_tokens=40, temperature=0.0), []))
    while not made:
        engine.step()
    small = weakref.ref(engine._slots.cache.layers[0].read()[0])
    assert list(engine.run())
    gc.collect()
    assert small() is None


def test_only_the_graphs_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    model = graphed("gpt-pre-norm")
    with torch.inference_mode():
        for length in (3, 4, 5, 3, 3):
            answers(model, on_device(samples(model, [(length, 1)])))
    (stack,) = [module for module in model.modules() if isinstance(module, GraphedStack)]
    assert [key[2] for key in stack._passes._known] == [5, 3]


@pytest.mark.parametrize("name", ["gpt-rotary", "transformer-rotary", "bert-masked-lm", "vit-pre-norm"])
def test_what_is_recorded_is_computed(name: str):
    seen = []
    for model in (plain(name), graphed(name)):
        for _ in range(3):
            with torch.inference_mode(), record(model) as maps:
                answers(model, on_device(samples(model, [(7, 3), (20, 5)])))
        seen.append([m for key in sorted(maps.taps) for call in maps.taps[key].calls for m in call])
    assert_equal(seen[1], seen[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_models_in_half_precision_take_what_those_in_float_take(name: str, made: list[str]):
    """As `optimize` leaves them on a GPU; images are float32."""
    model, lengths = graphed(name).bfloat16(), [(7, 3), (7, 9)]
    with torch.inference_mode():
        batch = on_device(samples(plain(name), lengths))
        for _ in range(3):
            found, expected = flat(answers(model, batch)), flat(answers(plain(name), batch))
            for a, b in zip(found, expected, strict=True):
                assert (a.float() - b).norm() <= 0.05 * b.norm().clamp(min=1)
    assert "transformer" in name or made == ["Pass"]
    if name in DECODERS:
        for options in ({"temperature": 0.0}, {"num_beams": 2}):
            decoding = Decoding(max_new_tokens=9, **options)
            half = plain(name).bfloat16()
            said = [generate(m, [[1, 2, 3], [4]], decoding, [1]) for m in (model, half)]
            assert [[h.ids for h in one] for one in said[0]] == [[h.ids for h in one] for one in said[1]]
        assert "Step" in made


def test_gradients_flow_outside_inference_mode():
    model = graphed("gpt-pre-norm")
    for _ in range(3):
        x = torch.randn(5, 12, device=DEVICE, requires_grad=True)
        layout = Layout((5,), DEVICE)
        model.run(x, layout.positions, Pattern(layout, layout, causal=True)).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_optimize_on_a_gpu_takes_the_road_of_graphs():
    model = plain("gpt-pre-norm")
    assert optimize(model, "auto") == Road("graphs", "bf16")
    with pytest.raises(InputError, match="optimized already"):
        optimize(model, "bf16")
    generate(model, [[1, 2, 3]], Decoding(max_new_tokens=9, temperature=0.0), [])
    with pytest.raises(InputError, match="int8 is for CPUs"):
        optimize(plain("gpt-pre-norm"), "int8")
