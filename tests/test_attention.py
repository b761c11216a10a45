"""Attention against a plain loop, nn.MultiheadAttention and finite differences; the cache; the tap."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
import varlen
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from qkv.attention import Attention, KeyValue, Pattern, attend, rotate
from qkv.errors import InputError
from qkv.kv_cache import Cache
from qkv.layers import rotary
from qkv.ragged import Layout, pack
from qkv.recording import record

CPU = torch.device("cpu")
H, E = 2, 3
D = H * E

PAIRS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=6)
"""(queries, keys) of each sequence: lengths far enough apart to need several dense blocks."""


def layout(lengths, stride: int | None = None) -> Layout:
    return Layout(tuple(lengths), CPU, stride)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    """Equation 1 of Vaswani et al. 2017, one query, one head at a time."""
    out = torch.zeros_like(query)
    q = 0
    key_starts = pattern.keys.starts.tolist()
    for n, (Lq, Lk) in enumerate(zip(pattern.queries.lengths, pattern.keys.lengths, strict=True)):
        for row in range(Lq):
            seen = torch.arange(Lk - Lq + row + 1 if pattern.causal else Lk)
            if n in pattern.masks:
                seen = pattern.masks[n][row].nonzero()[:, 0]
            rows = key_starts[n] + seen
            for h in range(H):
                scores = torch.stack(
                    [query[q, h] @ k / math.sqrt(E) for k in key[rows, h]] or [torch.zeros(())]
                )
                weights = scores.exp() / scores.exp().sum()
                out[q, h] = sum(
                    (w * v for w, v in zip(weights, value[rows, h], strict=False)), torch.zeros(E)
                )
            q += 1
    return out


# ---------------------------------------------------------------- attend


ALIKE = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 30]), st.sampled_from([1, 5, 40])), min_size=3, max_size=8
)
"""Many of equal lengths, in any order."""


@given(PAIRS | ALIKE, st.booleans())
@example([(2, 5), (1, 5), (30, 5), (3, 5)], False)
@example([(1, 5), (1, 4), (1, 60), (1, 6)], False)
def test_attend_is_equation_1_for_every_sequence(pairs, causal: bool):
    lengths = [(q, max(q, k) if causal else k) for q, k in pairs]
    pattern = Pattern(layout(q for q, _ in lengths), layout(k for _, k in lengths), causal)
    query = draw(pattern.queries.tokens, H, E)
    key, value = draw(2, pattern.keys.tokens, H, E, seed=1)
    torch.testing.assert_close(attend(query, key, value, pattern), by_hand(query, key, value, pattern))


@given(PAIRS)
def test_attend_reads_strided_keys_and_nothing_beyond_them(pairs):
    lengths = [(q, max(q, k)) for q, k in pairs]
    stride = max(k for _, k in lengths) + 1
    pattern = Pattern(layout(q for q, _ in lengths), layout((k for _, k in lengths), stride), causal=True)
    query = draw(pattern.queries.tokens, H, E)
    key, value = draw(2, len(lengths) * stride, H, E, seed=1)
    expected = by_hand(query, key, value, pattern)
    free = torch.ones(len(key), dtype=torch.bool).index_fill_(0, pattern.keys.rows, False)
    key[free], value[free] = 1e3, 1e3
    torch.testing.assert_close(attend(query, key, value, pattern), expected)


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([1, 2, 3, 30, 200]), st.booleans()),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 10**6),
)
def test_attend_reads_slots_of_all_lengths_by_their_own_masks(slots, seed: int):
    """Some slots idle, some far longer than their neighbours, some with a mask in place of causality."""
    lengths = [(q, max(q, k)) for q, k, _ in slots]
    stride = max(k for _, k in lengths) + 3
    generator = torch.Generator().manual_seed(seed)
    masks = {i: torch.rand(*lengths[i], generator=generator) < 0.5 for i, (_, _, m) in enumerate(slots) if m}
    for mask in masks.values():
        mask[:, 0] = True  # every token attends itself at least
    queries, keys = layout(q for q, _ in lengths), layout((k for _, k in lengths), stride)
    pattern = Pattern(queries, keys, causal=True, masks=masks)
    query = draw(queries.tokens, H, E)
    key, value = draw(2, len(lengths) * stride, H, E, seed=1)
    expected = by_hand(query, key, value, pattern)
    free = torch.ones(len(key), dtype=torch.bool).index_fill_(0, keys.rows, False)
    key[free], value[free] = 1e3, 1e3
    torch.testing.assert_close(attend(query, key, value, pattern), expected)


@pytest.mark.parametrize("lengths", [[(3, 0)], [(2, 0), (3, 2)], [(1, 0), (1, 5)], [(2, 0), (2, 0)]])
def test_a_sequence_without_keys_gets_zeros(lengths):
    pattern = Pattern(layout(q for q, _ in lengths), layout(k for _, k in lengths))
    query = draw(pattern.queries.tokens, H, E).requires_grad_()
    memory = draw(pattern.keys.tokens, H, E, seed=1).requires_grad_()
    out = attend(query, memory, memory, pattern)
    assert not out[: lengths[0][0]].any()
    out.sum().backward()
    assert query.grad.isfinite().all()
    assert memory.grad.isfinite().all()


def test_a_batch_without_any_tokens_has_an_answer():
    for lengths in [(), (0, 0)]:
        empty = layout(lengths)
        assert attend(draw(0, H, E), draw(0, H, E), draw(0, H, E), Pattern(empty, empty, True)).shape == (
            0,
            H,
            E,
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[(2, 2)], [(1, 3), (0, 2), (2, 2)], [(1, 1), (0, 0), (4, 12)]])
def test_gradients_of_attend_agree_with_finite_differences(lengths, causal: bool):
    pattern = Pattern(layout(q for q, _ in lengths), layout(k for _, k in lengths), causal)
    inputs = [draw(pattern.queries.tokens, H, E), *draw(2, pattern.keys.tokens, H, E, seed=1)]
    assert gradcheck(lambda *x: attend(*x, pattern), [x.requires_grad_() for x in inputs])


def test_gradients_agree_with_finite_differences_where_a_sequence_has_no_keys():
    pattern = Pattern(layout([2, 1, 1]), layout([0, 3, 1]))
    inputs = [draw(4, H, E), *draw(2, 4, H, E, seed=1)]
    assert gradcheck(lambda *x: attend(*x, pattern), [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("equal", [True, False])
def test_dropout_keeps_the_expectation(equal: bool):
    copies = 4000
    lengths = (3,) * copies if equal else (3, 2) * (copies // 2)
    pattern = Pattern(layout(lengths), layout(lengths))
    x = draw(3, H, E)
    many = torch.cat([x[:length] for length in lengths])
    dropped = attend(many, many, many, pattern, dropout=0.5)
    kept = attend(many, many, many, pattern)
    assert not torch.allclose(dropped, kept)
    mean = torch.stack([part for part in dropped.split(lengths) if len(part) == 3]).mean(0)
    torch.testing.assert_close(mean, kept[:3], atol=0.12, rtol=0)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("lengths", [(4, 4), (1, 9, 3)])
def test_bfloat16_is_near_float32(lengths, grad: bool):
    pattern = Pattern(layout(lengths), layout(lengths), causal=True)
    exact = draw(3, pattern.queries.tokens, H, E).float()
    with torch.set_grad_enabled(grad):
        rough = attend(*exact.bfloat16(), pattern)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), attend(*exact, pattern), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("lengths", [(3, 5), (4, 4), (2, 600)])
@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_trains_like_float32_whatever_autocast_does(lengths, causal):
    """By plain products up to 512 keys, by the fused kernel in float32 beyond."""
    pattern = Pattern(layout(lengths), layout(lengths), causal)
    exact = draw(3, sum(lengths), H, E).float().bfloat16().float().requires_grad_()
    rough = exact.detach().bfloat16().requires_grad_()
    direction = draw(sum(lengths), H, E).float()
    with torch.autocast("cpu", torch.bfloat16):
        answer = attend(*rough, pattern)
    assert answer.dtype == torch.bfloat16
    expected = attend(*exact, pattern)
    torch.testing.assert_close(answer.float(), expected, atol=0.05, rtol=0.05)
    (answer.float() * direction).sum().backward()
    (expected * direction).sum().backward()
    error = (rough.grad.float() - exact.grad).norm() / exact.grad.norm()
    assert error < 0.02


def test_patterns_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="1 query sequences, but 2 key sequences"):
        Pattern(layout([1]), layout([1, 1]))
    with pytest.raises(ValueError, match="at least as many keys as queries"):
        Pattern(layout([1, 3]), layout([1, 2]), causal=True)


# ---------------------------------------------------------------- Attention


def pair_of_modules() -> tuple[Attention, nn.MultiheadAttention]:
    """Ours and torch's with the same weights."""
    ours = Attention(D, H).double()
    theirs = nn.MultiheadAttention(D, H, batch_first=True).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.5)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    return ours, theirs


def assert_same_gradients(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    torch.testing.assert_close(ours.qkv.weight.grad, theirs.in_proj_weight.grad)
    torch.testing.assert_close(ours.qkv.bias.grad, theirs.in_proj_bias.grad)
    torch.testing.assert_close(ours.out.weight.grad, theirs.out_proj.weight.grad)
    torch.testing.assert_close(ours.out.bias.grad, theirs.out_proj.bias.grad)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.booleans())
def test_self_attention_equals_multihead_attention(lengths: list[int], causal: bool):
    ours, theirs = pair_of_modules()
    batch = pack(draw(length, D, seed=i) for i, length in enumerate(lengths))
    out = ours(batch.values, Pattern(batch.layout, batch.layout, causal))
    out.square().sum().backward()

    expected = []
    for x in batch.split():
        forbidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1) if causal else None
        expected.append(theirs(x[None], x[None], x[None], attn_mask=forbidden, need_weights=False)[0][0])
    torch.testing.assert_close(out, torch.cat(expected))
    torch.cat(expected).square().sum().backward()
    assert_same_gradients(ours, theirs)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=6))
def test_cross_attention_equals_multihead_attention(lengths: list[tuple[int, int]]):
    ours, theirs = pair_of_modules()
    batch = pack(draw(q, D, seed=i) for i, (q, _) in enumerate(lengths))
    memory = pack(draw(k, D, seed=100 + i) for i, (_, k) in enumerate(lengths))
    out = ours(batch.values, Pattern(batch.layout, memory.layout), memory=ours.read(memory.values))
    out.square().sum().backward()

    expected = [
        theirs(x[None], m[None], m[None], need_weights=False)[0][0]
        for x, m in zip(batch.split(), memory.split(), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(expected))
    torch.cat(expected).square().sum().backward()
    assert_same_gradients(ours, theirs)


def test_gradients_of_the_module_agree_with_finite_differences():
    attention = pair_of_modules()[0]
    x, memory = draw(6, D), draw(4, D, seed=1)
    target, source = layout([1, 0, 5]), layout([3, 1, 0])

    def forward(x: Tensor, memory: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip((name for name, _ in attention.named_parameters()), weights, strict=True))
        own = torch.func.functional_call(attention, named, (x, Pattern(target, target, causal=True)))
        read = torch.func.functional_call(
            _Read(attention), {f"of.{k}": v for k, v in named.items()}, (memory,)
        )
        pattern = Pattern(target, source)
        crossed = torch.func.functional_call(attention, named, (x, pattern), {"memory": read})
        return own, crossed

    weights = [parameter.detach().clone() for parameter in attention.parameters()]
    assert gradcheck(forward, [value.requires_grad_() for value in (x, memory, *weights)])


class _Read(nn.Module):
    """`Attention.read` as a forward, so that its weights can be swapped."""

    def __init__(self, of: Attention) -> None:
        super().__init__()
        self.of = of

    def forward(self, memory: Tensor) -> KeyValue:
        return self.of.read(memory)


def test_dropout_is_for_training_only():
    attention = Attention(D, H, dropout=0.5).double()
    x, pattern = draw(7, D), Pattern(layout([3, 4]), layout([3, 4]))
    assert not torch.equal(attention(x, pattern), attention(x, pattern))
    attention.eval()
    assert torch.equal(attention(x, pattern), attention(x, pattern))


def test_dim_must_be_divisible_by_heads():
    with pytest.raises(ValueError, match="dim 6 is not divisible by heads 4"):
        Attention(6, 4)


# ---------------------------------------------------------------- cache


def module_outputs(attention: Attention, sequences: list[Tensor]) -> list[Tensor]:
    batch = pack(sequences)
    return batch.like(attention(batch.values, Pattern(batch.layout, batch.layout, causal=True))).split()


@given(st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3), min_size=1, max_size=6))
def test_tokens_in_chunks_equal_tokens_at_once(chunks: list[list[int]]):
    attention = pair_of_modules()[0]
    sequences = [draw(sum(chunk[n] for chunk in chunks), D, seed=n) for n in range(3)]
    expected = module_outputs(attention, sequences)
    cache = Cache(3, 1, 100, CPU)
    done = [0, 0, 0]
    with torch.no_grad():
        for chunk in chunks:
            new = pack(s[d : d + c] for s, d, c in zip(sequences, done, chunk, strict=True))
            pattern, positions = cache.extend(new.layout)
            assert positions.tolist() == [d + i for d, c in zip(done, chunk, strict=True) for i in range(c)]
            out = new.like(attention(new.values, pattern, cache=cache.layers[0])).split()
            for n in range(3):
                torch.testing.assert_close(out[n], expected[n][done[n] : done[n] + chunk[n]])
            done = [d + c for d, c in zip(done, chunk, strict=True)]
            assert cache.lengths == tuple(done)


def test_a_cache_grows_by_doubling_up_to_the_context_and_keeps_what_it_holds():
    attention = pair_of_modules()[0]
    sequence = draw(100, D)
    expected = module_outputs(attention, [sequence])[0]
    cache = Cache(1, 1, 100, CPU)
    capacities = set()
    with torch.no_grad():
        for i in range(100):
            pattern, _ = cache.extend(layout([1]))
            out = attention(sequence[i : i + 1], pattern, cache=cache.layers[0])
            torch.testing.assert_close(out[0], expected[i])
            capacities.add(cache.capacity)
    assert sorted(capacities) == [32, 64, 100]


def test_a_cache_goes_with_its_last_user():
    """In a cycle it would stay until the garbage collector comes, and with it all keys and values."""
    cache = Cache(1, 2, 40, CPU)
    kept = weakref.ref(cache.layers[1].reserve(draw(0, D).view(0, H, E))[0])
    gc.disable()
    try:
        del cache
        assert kept() is None
    finally:
        gc.enable()


def test_a_cache_refuses_what_it_cannot_do():
    cache = Cache(2, 1, 40, CPU)
    cache.extend(layout([2, 3]))
    with pytest.raises(ValueError, match="fewer tokens"):
        cache.truncate([2, 4])
    with pytest.raises(InputError, match="sequence 1 has 41 tokens; this model reads at most 40"):
        cache.extend(layout([1, 38]))
    assert cache.lengths == (2, 3)


# ---------------------------------------------------------------- rotary positions


def test_rotation_turns_pairs_by_their_angles():
    x = draw(5, H, 4)
    cosine, sine = rotary(torch.arange(5), 4)
    pattern = Pattern(layout([5]), layout([5]))
    attention = Attention(8, 2).double()
    with torch.no_grad():  # queries and keys are x itself, and the answer's queries can be seen by the tap
        attention.qkv.weight.copy_(torch.eye(8, dtype=torch.float64).repeat(3, 1))
        attention.qkv.bias.zero_()
    with record(_Model([attention])) as maps:
        attention(x.flatten(1), pattern, rotation=(cosine, sine))
    turns = torch.arange(5)[:, None] * torch.tensor([1.0, 10000.0**-0.5], dtype=torch.float64)
    spun = torch.complex(x[..., :2], x[..., 2:]) * torch.polar(torch.ones_like(turns), turns)[:, None]
    scores = torch.einsum("qhe,khe->hqk", spun, spun.conj()).real / 2
    torch.testing.assert_close(maps[0][0].double(), scores.softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_rotation_are_autograds(dtype: torch.dtype):
    turn = rotary(torch.arange(5), 4)
    x, up = draw(5, 3, 4).to(dtype), draw(5, 3, 4).to(dtype)
    x.requires_grad_()
    (found,) = torch.autograd.grad(rotate(x, turn), x, up)
    first, second = x.chunk(2, dim=-1)
    cosine, sine = (part.to(dtype).double() for part in turn)
    (expected,) = torch.autograd.grad(x * cosine + torch.cat([-second, first], -1) * sine, x, up.double())
    torch.testing.assert_close(found, expected)
    double = [part.double() for part in (x.detach(), *turn)]
    double[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *turn: rotate(x, turn), double)
    assert torch.autograd.gradgradcheck(lambda x, *turn: rotate(x, turn), double)


def test_rotated_scores_depend_on_distance_alone():
    query, key = draw(2, 1, H, 4)
    patterns = []
    for shift in (0, 7):
        cosine, sine = (x.double() for x in rotary(torch.tensor([shift, shift + 3]), 4))
        turned = rotate(torch.cat([query, key]), (cosine, sine))
        patterns.append((turned[0] * turned[1]).sum(-1))
    torch.testing.assert_close(patterns[0], patterns[1], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- the tap


class _Model:
    """Some attention modules as one stack."""

    def __init__(self, modules: list[Attention]) -> None:
        self.modules = modules

    def attentions(self) -> dict[str, list[Attention]]:
        return {"encoder": self.modules}


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.booleans())
def test_recorded_probabilities_are_those_of_multihead_attention(lengths: list[int], causal: bool):
    ours, theirs = pair_of_modules()
    batch = pack(draw(length, D, seed=i) for i, length in enumerate(lengths))
    with record(_Model([ours])) as maps:
        ours(batch.values, Pattern(batch.layout, batch.layout, causal))
    for x, probabilities in zip(batch.split(), maps[0], strict=True):
        forbidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1) if causal else None
        weights = theirs(x[None], x[None], x[None], attn_mask=forbidden, average_attn_weights=False)[1][0]
        torch.testing.assert_close(probabilities.double(), weights, atol=1e-6, rtol=1e-4)


@given(PAIRS)
def test_recorded_probabilities_are_probabilities_and_explain_the_answer(pairs):
    attention = pair_of_modules()[0].float()
    batch = pack(draw(q, D, seed=i).float() for i, (q, _) in enumerate(pairs))
    memory = pack(draw(k, D, seed=100 + i).float() for i, (_, k) in enumerate(pairs))
    key, value = attention.read(memory.values)
    with record(_Model([attention])) as maps, torch.no_grad():
        out = attention(batch.values, Pattern(batch.layout, memory.layout), memory=(key, value))
    assert maps.residual < 1e-5
    values = memory.like(value).split()
    for (q, k), probabilities, v, answer in zip(pairs, maps[0], values, batch.like(out).split(), strict=True):
        assert probabilities.shape == (H, q, k)
        assert (probabilities >= 0).all()
        if k:
            torch.testing.assert_close(probabilities.sum(-1), torch.ones(H, q))
        rebuilt = attention.out((probabilities @ v.transpose(0, 1)).transpose(0, 1).flatten(1))
        torch.testing.assert_close(rebuilt, answer, atol=1e-5, rtol=1e-5)


def test_the_residual_shows_an_answer_that_the_probabilities_do_not_explain():
    attention = Attention(D, H, dropout=0.9).double()
    pattern = Pattern(layout([6]), layout([6]))
    with record(_Model([attention])) as maps:
        attention(draw(6, D), pattern)
    assert maps.residual > 1e-2


def test_only_what_was_chosen_is_recorded():
    modules = [pair_of_modules()[0] for _ in range(3)]
    x, pattern = draw(9, D), Pattern(layout([4, 5]), layout([4, 5]), causal=True)

    def forward() -> None:
        for module in modules:
            module(x, pattern)

    with record(_Model(modules)) as full:
        forward()
    with record(_Model(modules), layers=[0, -1], heads=[1], rows=[0, -1]) as some:
        forward()
    assert sorted(full.taps) == [("encoder", 0), ("encoder", 1), ("encoder", 2)]
    assert sorted(some.taps) == [("encoder", 0), ("encoder", 2)]
    for layer in (0, 2):
        for chosen, everything in zip(some[layer], full["encoder", layer], strict=True):
            torch.testing.assert_close(chosen, everything[[1]][:, [0, -1]])
    with pytest.raises(KeyError, match="not recorded"):
        some[1]


def test_every_forward_pass_is_kept_and_nothing_stays_on_the_modules():
    attention = pair_of_modules()[0]
    x, pattern = draw(4, D), Pattern(layout([4]), layout([4]))
    before = set(vars(attention))
    with pytest.raises(RuntimeError, match="on purpose"), record(_Model([attention])) as maps:
        attention(x, pattern)
        attention(2 * x, pattern)
        raise RuntimeError("on purpose")
    assert len(maps.tap(0).calls) == 2
    assert torch.equal(maps[0][0], maps.tap(0).calls[1][0])
    attention(x, pattern)
    assert len(maps.tap(0).calls) == 2
    assert attention.tap is None
    assert set(vars(attention)) == before


def test_recording_changes_no_answer():
    attention = pair_of_modules()[0]
    x, pattern = draw(9, D), Pattern(layout([4, 5]), layout([4, 5]))
    plain = attention(x, pattern)
    with record(_Model([attention])) as maps:
        assert torch.equal(attention(x, pattern), plain)
    assert not maps[0][0].requires_grad


def test_what_cannot_be_recorded_is_said_at_once():
    modules = [pair_of_modules()[0] for _ in range(2)]
    model = _Model(modules)
    for choice, error in [
        ({"layers": [2]}, IndexError),
        ({"heads": [H]}, IndexError),
        ({"stacks": ["decoder"]}, KeyError),
    ]:
        with pytest.raises(error), record(model, **choice):
            pass
    with record(model, layers=[1]):
        with pytest.raises(RuntimeError, match="recorded already"), record(model):
            pass
        assert modules[0].tap is None
        assert modules[1].tap is not None
    assert modules[1].tap is None


def test_a_row_that_a_sequence_lacks_is_an_error():
    attention = pair_of_modules()[0]
    with record(_Model([attention]), rows=[2]), pytest.raises(IndexError):
        attention(draw(5, D), Pattern(layout([3, 2]), layout([3, 2])))


# ---------------------------------------------------------------- the road of CUDA


@pytest.mark.parametrize("causal", [False, True])
def test_the_varlen_kernel_is_called_as_its_signature_and_contract_say(causal, monkeypatch):
    """A plain stand-in with the kernel's own signature must give what the dense road gives."""
    pattern = Pattern(layout((2, 1, 4)), layout((3, 5, 4)), causal)
    query, key, value = (torch.randn(n, 2, 8) for n in (7, 12, 12))
    masked = Pattern(layout((2, 1, 4)), layout((3, 5, 4)), causal, {0: torch.eye(2, 3, dtype=torch.bool)})
    dense, by_mask = (attend(query, key, value, p) for p in (pattern, masked))
    varlen.use_stand_in(monkeypatch)
    torch.testing.assert_close(attend(query, key, value, pattern), dense)
    torch.testing.assert_close(attend(query, key, value, masked), by_mask)
    attention, own = Attention(16, 2), Pattern(layout((2, 1, 4)), layout((2, 1, 4)), causal)
    with record(_Model([attention])) as maps:
        attention(torch.randn(7, 16), own)
    assert maps.residual < 1e-5
