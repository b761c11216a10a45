"""What holds for every model, shown on tiny ones: in float64, so that equal means equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIGS, CONTEXT, DECODERS, EMPTY_ALLOWED, VOCAB, answers, flat, ids, samples, tiny
from torch import Tensor
from torch.autograd import gradcheck

from qkv.attention import Pattern
from qkv.config import BertConfig, GPTConfig, TransformerConfig, ViTConfig
from qkv.errors import InputError
from qkv.kv_cache import Branches, Cache
from qkv.layers import Block
from qkv.models import GPT, Bert, Model, Transformer, ViT, build
from qkv.ragged import Ragged, pack
from qkv.recording import record

SEEDS = st.integers(0, 9)


def batches(smallest: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Lengths of the one or two sequences of each sample, far enough apart for several dense blocks."""
    lengths = st.integers(smallest, 30)
    return st.lists(st.tuples(lengths, lengths), min_size=1, max_size=5)


def smallest(name: str) -> int:
    return 0 if name in EMPTY_ALLOWED else 1


def assert_all_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("name", CONFIGS)
@given(data=st.data(), seed=SEEDS)
def test_an_answer_depends_neither_on_the_other_sequences_nor_on_their_order(name: str, data, seed: int):
    model = tiny(name)
    batch = samples(model, data.draw(batches(smallest(name))), seed)
    with torch.no_grad():
        together = answers(model, batch)
        for sample, answer in zip(batch, together, strict=True):
            assert_all_close(answers(model, [sample])[0], answer)
        order = data.draw(st.permutations(range(len(batch))))
        shuffled = answers(model, [batch[i] for i in order])
    for i, answer in zip(order, shuffled, strict=True):
        assert_all_close(answer, together[i])


@pytest.mark.parametrize("name", CONFIGS)
def test_an_empty_batch_has_an_empty_answer(name: str):
    model = tiny(name)
    if isinstance(model, ViT):
        assert model(torch.zeros(0, 2, 8, 8, dtype=torch.float64)).logits.shape == (0, 3)
    else:
        nothing = pack([])
        out = model(nothing, nothing) if isinstance(model, Transformer) else model(nothing)
        assert len(out.hidden) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_of_no_and_of_one_token_have_finite_values_and_gradients(name: str):
    model = tiny(name)
    least = smallest(name)
    batch = samples(model, [(1, 1), (least, 1), (1, least), (least, least), (5, 3)])
    loss = torch.zeros((), dtype=torch.float64)
    for answer in answers(model, batch):
        for values in answer:
            assert values.isfinite().all()
            loss = loss + values.square().sum()
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_that_was_read_in_inference_mode_can_be_trained_on(name: str):
    model = tiny(name)
    if isinstance(model, ViT):
        given = (torch.zeros(2, 2, 8, 8, dtype=torch.float64),)
    else:
        ids = pack([[1, 2, 3], [4] * 30, [5]])
        given = (ids, ids) if isinstance(model, Transformer) else (ids,)
    with torch.inference_mode():
        model(*given)
    hidden = model(*given).hidden
    values = hidden.values if isinstance(hidden, Ragged) else hidden
    values.square().sum().backward()
    assert next(model.parameters()).grad is not None


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_near_float32(name: str):
    exact, rough = tiny(name, torch.float32), tiny(name, torch.bfloat16)
    lengths = [(5, 9), (20, 1), (1, 3)]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            near, true = answers(rough, samples(rough, lengths)), answers(exact, samples(exact, lengths))
        for a, b in zip(flat(near), flat(true), strict=True):
            assert a.dtype == torch.bfloat16
            scale = b.square().mean().sqrt()
            assert (a.float() - b).square().mean().sqrt() < 0.05 * scale


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_is_near_float32_and_leaves_float32_gradients(name: str):
    model = tiny(name, torch.float32)
    batch = samples(model, [(5, 9), (20, 1)])
    true = answers(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        near = answers(model, batch)
    for a, b in zip(flat(near), flat(true), strict=True):
        assert (a.float() - b).square().mean().sqrt() < 0.05 * b.square().mean().sqrt()
    sum(value.float().square().sum() for value in flat(near)).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        (name, rate)
        for name in ("gpt-pre-norm", "transformer-post-norm", "bert-pretraining", "vit-pre-norm")
        for rate in CONFIGS[name].dropouts
    ],
)
def test_dropout_is_for_training_only(name: str, rate: str):
    model = tiny(replace(CONFIGS[name], **{rate: 0.5}))
    batch = samples(model, [(5, 9)] * 20)
    assert_all_close(flat(answers(model, batch)), flat(answers(model, batch)))
    model.train()
    first, second = flat(answers(model, batch)), flat(answers(model, batch))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------- causality and order


def hidden_of(model: Model, lengths: tuple[int, ...], text: Tensor) -> Tensor:
    """Hidden vectors (T, D) of ids (T,); an encoder-decoder model reads one fixed source."""
    batch = Ragged(text, pack([[0] * n for n in lengths]).layout)
    if isinstance(model, Transformer):
        return model(pack([[1, 2, 3]] * len(lengths)), batch).hidden.values
    return model(batch).hidden.values


@pytest.mark.parametrize("name", DECODERS)
@given(lengths=st.lists(st.integers(2, 25), min_size=1, max_size=4), data=st.data())
def test_a_later_token_never_changes_an_earlier_output(name: str, lengths: list[int], data):
    model = tiny(name)
    text = ids(sum(lengths), 0)
    n = data.draw(st.integers(0, len(lengths) - 1), label="sequence")
    p = data.draw(st.integers(0, lengths[n] - 1), label="position")
    row = sum(lengths[:n]) + p
    changed = text.clone()
    changed[row] = (changed[row] + 1) % VOCAB
    with torch.no_grad():
        before, after = (hidden_of(model, tuple(lengths), t) for t in (text, changed))
    moved = (before != after).any(-1)
    end = sum(lengths[: n + 1])
    torch.testing.assert_close(before[:row], after[:row], atol=1e-12, rtol=0)
    torch.testing.assert_close(before[end:], after[end:], atol=1e-12, rtol=0)
    assert moved[row:end].all()


@pytest.mark.parametrize("name", ["bert-masked-lm", "bert-tagging"])
def test_a_later_token_changes_every_output_of_an_encoder(name: str):
    model = tiny(name)
    before, after = (
        hidden_of(model, (4, 3), torch.tensor(t)) for t in ([1, 2, 3, 4] + [5] * 3, [1, 2, 3, 0] + [5] * 3)
    )
    assert (before != after).any(-1).tolist() == [True] * 4 + [False] * 3


@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=4), seed=SEEDS)
def test_without_positions_bert_is_permutation_equivariant(lengths: list[int], seed: int):
    model = tiny("bert-masked-lm")
    batch = pack(ids(length, seed + i) for i, length in enumerate(lengths))
    segments = ids(sum(lengths), 50 + seed) % 2
    generator = torch.Generator().manual_seed(seed)
    order = batch.layout.starts[batch.layout.owner] + torch.cat(
        [torch.randperm(n, generator=generator) for n in lengths]
    )
    with torch.no_grad():
        model.positions.weight.zero_()
        plain = model(batch, segments).hidden.values
        mixed = model(batch.like(batch.values[order]), segments[order]).hidden.values
    assert_all_close([mixed], [plain[order]])


@pytest.mark.parametrize("name", ["transformer-post-norm", "transformer-pre-norm"])
def test_without_positions_the_encoder_is_permutation_equivariant_and_the_decoder_does_not_see_it(name: str):
    model = tiny(name)
    source, target = ids(9, 0), pack([ids(4, 1)])
    order = torch.randperm(9)
    model.position_table.zero_()
    with torch.no_grad():
        plain, mixed = model(pack([source]), target), model(pack([source[order]]), target)
    assert_all_close([mixed.memory.values], [plain.memory.values[order]])
    assert_all_close([mixed.logits.values], [plain.logits.values])


@pytest.mark.parametrize("name", ["vit-pre-norm", "vit-post-norm"])
def test_without_positions_vit_is_permutation_equivariant(name: str):
    model = tiny(name)
    image = samples(model, [(0, 0)])[0]
    patches = (
        image.unflatten(1, (2, 4)).unflatten(3, (2, 4)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    )  # (P, C, p, p)
    order = torch.tensor([2, 0, 3, 1])
    mixed = patches[order].unflatten(0, (2, 2)).permute(2, 0, 3, 1, 4).reshape(image.shape)
    with torch.no_grad():
        model.positions.zero_()
        plain, moved = model(image[None]), model(mixed[None])
    assert_all_close([moved.logits], [plain.logits])
    assert_all_close([moved.hidden.values[1:]], [plain.hidden.values[1:][order]])


# ---------------------------------------------------------------- cached decoding


SOURCES = [5, 0, 11]
OPERATIONS = st.lists(
    st.sampled_from(["chunk", "chunk", "token", "copy", "truncate"]), min_size=1, max_size=8
)


def begin(model: Model) -> Cache:
    assert isinstance(model, GPT | Transformer)
    cache = model.start(len(SOURCES))
    if isinstance(model, Transformer):
        model.remember(pack(ids(length, 90 + i) for i, length in enumerate(SOURCES)), cache)
    return cache


def cached(model: Model, cache: Cache, new: Ragged) -> Ragged:
    if isinstance(model, Transformer):
        memory = [layer.read() for layer in cache.memory.layers]
        return model.decode(new, memory, Pattern(new.layout, cache.memory.layout), cache)
    return model.features(new, cache)


def recomputed(model: Model, sources: list[int], texts: list[Tensor]) -> list[Tensor]:
    """Hidden vectors of all tokens of each text, without a cache; sources: which one each text has."""
    if isinstance(model, Transformer):
        memory = model.encode(pack(ids(SOURCES[s], 90 + s) for s in sources))
        target = pack(texts)
        return model.decode(target, model.read(memory), Pattern(target.layout, memory.layout)).split()
    return model.features(pack(texts)).split()


@pytest.mark.parametrize("name", DECODERS)
@given(operations=OPERATIONS, data=st.data())
def test_decoding_with_a_cache_equals_recomputing_everything(name: str, operations: list[str], data):
    model = tiny(name)
    with torch.no_grad():
        cache = begin(model)
        texts = [torch.zeros(0, dtype=torch.long) for _ in SOURCES]
        sources = list(range(len(SOURCES)))
        for step, operation in enumerate(operations):
            if operation == "copy":
                donor, slot = data.draw(st.permutations(range(3)), label="slots")[:2]
                length = data.draw(st.integers(0, len(texts[donor])), label="length")
                cache.copy(donor, slot, length)
                texts[slot], sources[slot] = texts[donor][:length], sources[donor]
            elif operation == "truncate":
                texts = [text[: data.draw(st.integers(0, len(text)), label="length")] for text in texts]
                cache.truncate([len(text) for text in texts])
            else:
                room = [1 if operation == "token" else min(20, CONTEXT - len(text)) for text in texts]
                if min(CONTEXT - len(text) for text in texts) < 1:
                    continue
                chunk = [data.draw(st.integers(0, most), label="tokens") for most in room]
                new = pack(ids(length, 10 * step + i) for i, length in enumerate(chunk))
                texts = [torch.cat(pair) for pair in zip(texts, new.split(), strict=True)]
                found = cached(model, cache, new).split()
                full = recomputed(model, sources, texts)
                assert_all_close(found, [f[len(f) - n :] for f, n in zip(full, chunk, strict=True)])
            assert cache.lengths == tuple(len(text) for text in texts)


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
def test_branches_of_a_text_equal_texts_of_their_own(name: str, data):
    """Texts grow, part and end at random in one slot, and their tokens take rows that no other text needs."""
    model = tiny(name)
    prompt = ids(data.draw(st.integers(1, 5), label="prompt"), 7).tolist()
    with torch.no_grad():
        cache = begin(model)
        beside = [ids(3, 8).tolist()]  # a text in another slot, which goes on as texts do
        cached(model, cache, pack([prompt, [], beside[0]]))
        paths = [(list(prompt), list(range(len(prompt))))]  # ids of each text, and the rows that hold them
        for step in range(data.draw(st.integers(1, 6), label="steps")):
            parents = data.draw(st.lists(st.sampled_from(range(len(paths))), min_size=1, max_size=4))
            used = {row for p in parents for row in paths[p][1]}
            rows = [row for row in range(100) if row not in used][: len(parents)]
            new = ids(len(parents), 50 + step).tolist()
            paths = [
                (paths[p][0] + [id], paths[p][1] + [row])
                for p, id, row in zip(parents, new, rows, strict=True)
            ]
            mask = torch.zeros(
                len(paths), 1 + max(row for _, path in paths for row in path), dtype=torch.bool
            )
            for one, (_, path) in zip(mask, paths, strict=True):
                one[path] = True
            branches = {0: Branches(rows, len(prompt) + step, mask)}
            beside[0].append(step)
            wanted = range(len(new) + 1)
            logits = model.head(model.next_hidden(pack([new, [], [step]]), cache, wanted, branches))
            texts = [torch.tensor(text) for text in (*(text for text, _ in paths), beside[0])]
            full = recomputed(model, [0] * len(paths) + [2], texts)
            torch.testing.assert_close(logits, model.head(torch.stack([hidden[-1] for hidden in full])))
        assert cache.lengths == (mask.shape[1], 0, len(beside[0]))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_next_logits_are_those_of_the_last_tokens(name: str, dtype: torch.dtype):
    model = tiny(name, dtype)
    texts = [ids(7, 0), ids(1, 1), ids(33, 2)]
    with torch.no_grad():
        cache = begin(model)
        first = model.head(
            model.next_hidden(pack(text[:-1] if len(text) > 1 else text for text in texts), cache)
        )
        cache.truncate([len(text) - 1 for text in texts])
        step = model.head(model.next_hidden(pack(text[-1:] for text in texts), cache))
        full = model.head(torch.stack([hidden[-1] for hidden in recomputed(model, [0, 1, 2], texts)]))
    assert first.shape == step.shape == (3, VOCAB)
    loose = {"atol": 0.3, "rtol": 0.1} if dtype == torch.bfloat16 else {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(step, full, **loose)


@pytest.mark.parametrize("name", DECODERS)
def test_the_cache_ends_where_the_context_ends(name: str):
    model = tiny(name)
    with torch.no_grad():
        cache = begin(model)
        model.head(model.next_hidden(pack([ids(CONTEXT, 0), ids(1, 1), ids(2, 2)]), cache))
        with pytest.raises(InputError, match=f"sequence 0 has {CONTEXT + 1} tokens"):
            model.head(model.next_hidden(pack([[1], [1], [1]]), cache))


# ---------------------------------------------------------------- the tap


@pytest.mark.parametrize("name", CONFIGS)
@given(data=st.data(), seed=SEEDS)
def test_recorded_attention_explains_what_the_model_did(name: str, data, seed: int):
    model = tiny(name, torch.float32)
    batch = samples(model, data.draw(batches(smallest(name))), seed)
    with torch.no_grad():
        plain = answers(model, batch)
        with record(model) as maps:
            recorded = answers(model, batch)
    for a, b in zip(flat(plain), flat(recorded), strict=True):
        assert torch.equal(a, b)
    assert maps.residual < 1e-4
    for (stack, layer), tap in maps.taps.items():
        for probabilities in maps[stack, layer]:
            assert (probabilities >= 0).all()
            if probabilities.shape[-1]:
                torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:2]))
            if stack == "decoder":
                assert not probabilities.triu(1).any()
        assert len(tap.calls) == 1
        assert model.attentions()[stack][layer].tap is None


def test_the_stacks_of_an_encoder_decoder_model_are_recorded_apart():
    model = tiny("transformer-post-norm")
    source, target = pack([ids(3, 0), ids(5, 1)]), pack([ids(4, 2), ids(2, 3)])
    with record(model) as maps:
        model(source, target)
    shapes = {stack: [tuple(m.shape) for m in maps[stack, 1]] for stack in ("encoder", "decoder", "cross")}
    assert shapes == {
        "encoder": [(2, 3, 3), (2, 5, 5)],
        "decoder": [(2, 4, 4), (2, 2, 2)],
        "cross": [(2, 4, 3), (2, 2, 5)],
    }
    with pytest.raises(KeyError, match="several stacks"):
        maps[0]
    with record(model, stacks=["cross"]) as crossed:
        model(source, target)
    assert torch.equal(crossed[1][0], maps["cross", 1][0])


def test_attention_is_recorded_while_decoding_with_a_cache():
    model = tiny("gpt-rotary", torch.float32)
    texts = [ids(9, 0), ids(5, 1)]
    with torch.no_grad():
        with record(model) as full:
            model(pack(texts))
        cache = model.start(2)
        with record(model) as steps:
            model.head(model.next_hidden(pack(text[:4] for text in texts), cache))
            model.head(model.next_hidden(pack(text[4:] for text in texts), cache))
    assert steps.residual < 1e-5
    for layer in range(2):
        for whole, late in zip(full[layer], steps[layer], strict=True):
            torch.testing.assert_close(late, whole[:, 4:])


# ---------------------------------------------------------------- gradients


SMALL = {"dim": 4, "depth": 1, "heads": 2, "mlp_dim": 5, "dropout": 0.0, "attention_dropout": 0.0}
SMALL_TEXT = {**SMALL, "vocab_size": 3, "context": 4}
GRADIENT_CONFIGS = {
    "gpt-post-norm": GPTConfig(**SMALL_TEXT, norm_first=False),
    "gpt-rotary": GPTConfig(**SMALL_TEXT, position="rotary", qk_norm=True),
    "transformer": TransformerConfig(**SMALL_TEXT, activation="silu"),
    "bert-masked-lm": BertConfig(**SMALL_TEXT, norm_eps=1e-5, head="masked_lm"),
    "bert-pretraining": BertConfig(**SMALL_TEXT, norm_eps=1e-5),
    "vit": ViTConfig(**SMALL, norm_eps=1e-5, image_size=4, patch_size=2, channels=1, labels=("a", "b")),
    "vit-rotary": ViTConfig(
        **{**SMALL, "heads": 1},
        norm_eps=1e-5,
        image_size=4,
        patch_size=2,
        channels=1,
        labels=("a", "b"),
        position="rotary",
        qk_norm=True,
    ),
    "vit-convolutions": ViTConfig(
        **SMALL,
        norm_eps=1e-5,
        image_size=4,
        patch_size=2,
        channels=1,
        stem="convolutions",
        labels=("a", "b"),
    ),
}


@pytest.mark.parametrize("name", GRADIENT_CONFIGS)
def test_gradients_agree_with_finite_differences(name: str):
    model = tiny(GRADIENT_CONFIGS[name])
    if isinstance(model, ViT):
        images = torch.randn(2, 1, 4, 6, dtype=torch.float64)  # another grid: through the interpolation
        inputs: tuple = (images,)
    elif isinstance(model, Transformer):
        inputs = (pack([[0, 2], [1], []]), pack([[1], [], [2, 1]]))
    elif model.__class__ is Bert and model.pooler is not None:
        inputs = (pack([[0, 2, 1], [1]]), torch.tensor([0, 1, 1, 0]))
    else:
        inputs = (pack([[0, 2, 1], [], [1]]),)

    def forward(*weights: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip((key for key, _ in model.named_parameters()), weights, strict=True))
        out = torch.func.functional_call(model, named, inputs)
        heads = (getattr(out, head, None) for head in ("logits", "word_logits", "next_logits"))
        return tuple(head.values if isinstance(head, Ragged) else head for head in heads if head is not None)

    weights = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    assert gradcheck(forward, weights)


# ---------------------------------------------------------------- each family's own


def test_build_makes_the_family_of_the_config():
    families = {"gpt": GPT, "bert": Bert, "transformer": Transformer, "vit": ViT}
    for config in CONFIGS.values():
        model = build(config)
        assert type(model) is families[config.family]
        assert model.config == config
        stacks = model.attentions()
        assert all(len(modules) == config.depth for modules in stacks.values())
        assert len([m for m in model.modules() if isinstance(m, Block)]) == sum(
            config.depth for stack in stacks if stack != "cross"
        )


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("vit")])
def test_a_text_longer_than_the_context_is_refused(name: str):
    model = tiny(name)
    long = [pack([ids(2, 0), ids(CONTEXT + 1, 1)])]
    short = [pack([ids(2, 0), ids(2, 1)])]
    calls = [long + short, short + long] if isinstance(model, Transformer) else [long]
    for call in calls:
        with pytest.raises(
            InputError, match=f"sequence 1 has {CONTEXT + 1} tokens; this model reads at most"
        ):
            model(*call)


def test_the_transformer_ties_its_three_matrices_and_scales_embeddings():
    model = tiny("transformer-post-norm")
    assert [key for key, _ in model.named_parameters() if "tokens" in key] == ["tokens.weight"]
    dim = model.config.dim
    expected = model.tokens.weight[3] * dim**0.5 + model.position_table[2]
    torch.testing.assert_close(model.embed(torch.tensor([3]), torch.tensor([2]))[0], expected)
    hidden = torch.randn(2, dim, dtype=torch.float64)
    torch.testing.assert_close(model.head(hidden), hidden @ model.tokens.weight.T + model.logits_bias)


def test_segments_default_to_the_first():
    model = tiny("bert-pretraining")
    batch = pack([ids(3, 0), ids(2, 1)])
    torch.testing.assert_close(
        model(batch).hidden.values, model(batch, torch.zeros(5, dtype=torch.long)).hidden.values
    )
    assert not torch.equal(model(batch).pooled, model(batch, torch.ones(5, dtype=torch.long)).pooled)


@pytest.mark.parametrize(
    ("head", "labels", "present"),
    [
        ("none", (), []),
        ("pooler", (), ["pooled"]),
        ("pretraining", (), ["pooled", "word_logits", "next_logits"]),
        ("masked_lm", (), ["word_logits"]),
        ("classification", ("x", "y"), ["pooled", "class_logits"]),
        ("tagging", ("x", "y"), ["tag_logits"]),
    ],
)
def test_a_bert_says_what_its_head_can_say(head, labels, present: list[str]):
    model = tiny("bert-pretraining")
    pooler = model.pooler.weight
    encoder = model.blocks[0].mlp.up.weight
    model.reset_head(head, labels)
    assert (model.config.head, model.config.labels) == (head, labels)
    out = model(pack([ids(3, 0), ids(2, 1)]))
    optional = ("pooled", "word_logits", "next_logits", "class_logits", "tag_logits")
    assert [key for key in optional if getattr(out, key) is not None] == present
    assert model.blocks[0].mlp.up.weight is encoder
    assert model.pooler is None or model.pooler.weight is pooler
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {key.split(".")[0] for key, _ in build(model.config).named_parameters()} == {
        key.split(".")[0] for key, _ in model.named_parameters()
    }


def test_heads_that_bert_does_not_have_are_named():
    with pytest.raises(InputError, match="a tagging head needs labels"):
        build(BertConfig(**SMALL_TEXT, head="tagging"))
    with pytest.raises(InputError, match="a masked_lm head has no labels"):
        build(BertConfig(**SMALL_TEXT, head="masked_lm", labels=("a",)))
    model = tiny("bert-tagging")
    hidden = model.features(pack([ids(3, 0)]))
    with pytest.raises(InputError, match="no pooler"):
        model.pool(hidden.first())
    with pytest.raises(InputError, match="no masked language model head"):
        model.word_logits(hidden.values)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (12, 4), (4, 20)])
def test_vit_reads_other_image_sizes_as_transformers_does(height: int, width: int):
    model = tiny("vit-pre-norm")
    peer = transformers.models.vit.modeling_vit.ViTEmbeddings(
        transformers.ViTConfig(image_size=8, patch_size=4, num_channels=2, hidden_size=12)
    ).double()
    with torch.no_grad():
        peer.position_embeddings.copy_(model.positions)
        seen = torch.zeros(1, 1 + height * width // 16, 12, dtype=torch.float64)
        expected = peer.interpolate_pos_encoding(seen, height, width)[0]
        expected[0] += model.class_token
        expected[1:] += model.patches.projection.bias  # all there is of a blank patch
        torch.testing.assert_close(model.embed(torch.zeros(1, 2, height, width).double())[0], expected)
    image = torch.randn(2, 2, height, width, dtype=torch.float64)
    assert model(image).hidden.lengths == (1 + height * width // 16,) * 2


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (5, 3), (1, 4)])
def test_vit_turns_patches_as_dinov3_does_and_class_tokens_not_at_all(rows: int, columns: int):
    model = build(replace(CONFIGS["vit-rotary"], dim=48))
    config = transformers.DINOv3ViTConfig(
        hidden_size=48, num_attention_heads=3, patch_size=4, image_size=8, rope_theta=100.0
    )
    peer = transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTRopePositionEmbedding(config).eval()
    images = torch.randn(2, 2, 4 * rows, 4 * columns)
    for turn, theirs, none in zip(model.rotation(images), peer(images), (1.0, 0.0), strict=True):
        first, second = turn.view(2, 1 + rows * columns, 16)
        assert torch.equal(first, second)
        torch.testing.assert_close(first[1:], theirs)
        assert (first[0] == none).all()


def test_vit_cuts_patches_as_a_strided_convolution_does():
    model = tiny("vit-pre-norm")
    projection = model.patches.projection
    kernel = projection.weight.view(12, 2, 4, 4)
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64).transpose(2, 3)  # not contiguous
    cut = torch.nn.functional.conv2d(images, kernel, projection.bias, stride=4).flatten(2).transpose(1, 2)
    seen: list[Tensor] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    hook.remove()
    expected = torch.cat([model.class_token.expand(3, 1, -1), cut], dim=1) + model.positions
    torch.testing.assert_close(seen[0], expected.flatten(0, 1))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 4)])
def test_a_convolutional_stem_is_convolution_norm_activation_and_a_last_matrix(height: int, width: int):
    """Pixel by pixel and by torch's other functions: windows cut out, LayerNorm from its equation."""
    stem = tiny("vit-convolutions").patches
    images = torch.randn(3, 2, height, width, dtype=torch.float64)
    widths = [3, 6, 12]
    assert [tuple(c.weight.shape) for c in stem.convolutions] == [(3, 2, 3, 3), (6, 3, 3, 3), (12, 6, 3, 3)]
    x, size = images, (height, width)
    for i, stride in enumerate((1, 2, 2)):
        convolution, norm = stem.convolutions[i], stem.norms[i]
        windows = torch.nn.functional.unfold(x, 3, padding=1, stride=stride).transpose(1, 2)
        x = windows @ convolution.weight.flatten(1).T + convolution.bias  # (N, pixels, c)
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
        size = (size[0] // stride, size[1] // stride)
        x = (0.5 * x * (1 + torch.erf(x / 2**0.5))).transpose(1, 2).reshape(3, widths[i], *size)
    expected = x.flatten(2).transpose(1, 2) @ stem.last.weight.T + stem.last.bias
    torch.testing.assert_close(stem(images), expected)
    torch.testing.assert_close(stem(images.transpose(2, 3).contiguous().transpose(2, 3)), expected)


def test_blank_areas_do_not_blow_up_the_gradients_of_a_fresh_stem():
    """Padded, erased and unexposed pixels have no variance but that of the biases."""
    model = build(replace(CONFIGS["vit-convolutions"], dim=32, norm_eps=1e-12))
    norms = []
    for images in (torch.randn(4, 2, 8, 8), torch.zeros(4, 2, 8, 8)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images).logits, torch.tensor([0, 1, 2, 0])).backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.patches.parameters()]))
    assert norms[1] < 10 * norms[0]


def test_images_that_vit_cannot_read_and_a_missing_head_are_named():
    model = tiny("vit-pre-norm")
    for shape in [(1, 3, 8, 8), (1, 2, 9, 8), (1, 2, 8, 6)]:
        with pytest.raises(InputError, match="this model reads 2 channels and sides that are multiples of 4"):
            model(torch.zeros(shape, dtype=torch.float64))
    model.reset_head(())
    first = model.features(torch.zeros(1, 2, 8, 8, dtype=torch.float64)).first()
    assert model(torch.zeros(1, 2, 8, 8, dtype=torch.float64)).logits is None
    with pytest.raises(InputError, match="no classification head"):
        model.head(first)
    model.reset_head(("x", "y"))
    assert model.head(first).shape == (1, 2)
    assert model.config.labels == ("x", "y")


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_fresh_body_does_not_depend_on_the_head(name):
    sizes = {"dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8}
    if name == "bert":
        bare = BertConfig(**sizes, vocab_size=9, context=5, head="none")
        headed = replace(bare, head="classification", labels=("a", "b"))
    else:
        bare = ViTConfig(**sizes, image_size=8, patch_size=4, labels=())
        headed = replace(bare, labels=("a", "b"))
    states = []
    for config in (bare, headed):
        torch.manual_seed(0)
        states.append(build(config).state_dict())
    assert states[0].keys() < states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
