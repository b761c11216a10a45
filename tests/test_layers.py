"""Positions, blocks against torch's own Transformer layers, and initial weights."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIGS, ids, tiny
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck

from qkv.attention import Pattern
from qkv.config import GPTConfig, ModelConfig, TransformerConfig
from qkv.errors import InputError
from qkv.layers import (
    ACTIVATIONS,
    Block,
    DropPath,
    TokenEmbedding,
    check_lengths,
    init_normal,
    init_xavier,
    sinusoidal,
)
from qkv.models import GPT, Transformer
from qkv.ragged import Layout, Ragged, pack

D = 12


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- positions


@given(st.integers(1, 12), st.integers(1, 40))
def test_sinusoids_are_those_of_the_paper_with_its_dimensions_sorted(dim: int, context: int):
    table = sinusoidal(context, dim)
    assert table.shape == (context, dim)
    for position in {0, context // 2, context - 1}:
        angles = [position / 10000 ** (2 * i / dim) for i in range((dim + 1) // 2)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles[: dim // 2]]
        torch.testing.assert_close(table[position], torch.tensor(expected))


def test_sequences_over_the_limit_are_named():
    check_lengths(pack([[1, 2], []]).layout, 2)
    with pytest.raises(InputError, match="sequence 1 has 3 tokens; this model reads at most 2"):
        check_lengths(pack([[1], [1, 2, 3]]).layout, 2)


# ---------------------------------------------------------------- blocks against torch.nn


def copy_block(ours: Block, theirs: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
    """Give torch's layer the weights of ours."""
    pairs = [(ours.attention, theirs.self_attn)]
    norms = [ours.attention_norm, ours.mlp_norm]
    if ours.cross is not None:
        pairs.append((ours.cross, theirs.multihead_attn))
        norms.insert(1, ours.cross_norm)
    for mine, other in pairs:
        other.in_proj_weight, other.in_proj_bias = mine.qkv.weight, mine.qkv.bias
        other.out_proj.load_state_dict(mine.out.state_dict())
    for i, norm in enumerate(norms, start=1):
        getattr(theirs, f"norm{i}").load_state_dict(norm.state_dict())
    theirs.linear1.load_state_dict(ours.mlp.up.state_dict())
    theirs.linear2.load_state_dict(ours.mlp.down.state_dict())


def torch_transformer(model: Transformer) -> nn.Transformer:
    """torch's whole encoder-decoder with the same weights.

    It always ends its stacks with a norm; the paper's post-norm model, and so ours, does not.
    """
    config = model.config
    theirs = nn.Transformer(
        d_model=config.dim,
        nhead=config.heads,
        num_encoder_layers=config.depth,
        num_decoder_layers=config.depth,
        dim_feedforward=config.mlp_dim,
        dropout=0.0,
        activation=ACTIVATIONS[config.activation],
        layer_norm_eps=config.norm_eps,
        batch_first=True,
        norm_first=config.norm_first,
    ).double()
    for ours, other in zip(model.encoder, theirs.encoder.layers, strict=True):
        copy_block(ours, other)
    for ours, other in zip(model.decoder, theirs.decoder.layers, strict=True):
        copy_block(ours, other)
    for ours, other in [(model.encoder_norm, theirs.encoder), (model.decoder_norm, theirs.decoder)]:
        if config.norm_first:
            other.norm.load_state_dict(ours.state_dict())
        else:
            other.norm = None
    return theirs


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", ["transformer-post-norm", "transformer-pre-norm"])
@given(lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4))
def test_the_whole_transformer_equals_torchs(name: str, lengths: list[tuple[int, int]]):
    model = tiny(name)
    theirs = torch_transformer(model)
    source = pack(ids(s, seed) for seed, (s, _) in enumerate(lengths))
    target = pack(ids(t, 50 + seed) for seed, (_, t) in enumerate(lengths))
    out = model(source, target)

    with torch.no_grad():
        embedded = source.like(model.embed(source.values, source.layout.positions)).split()
        shifted = target.like(model.embed(target.values, target.layout.positions)).split()
    for n, (x, y) in enumerate(zip(embedded, shifted, strict=True)):
        future = torch.ones(len(y), len(y), dtype=torch.bool).triu(1)
        memory = theirs.encoder(x[None])
        torch.testing.assert_close(out.memory.split()[n], memory[0])
        hidden = theirs(x[None], y[None], tgt_mask=future)
        torch.testing.assert_close(out.hidden.split()[n], hidden[0])


def test_the_gradients_of_a_whole_transformer_equal_torchs():
    model = tiny("transformer-post-norm")
    theirs = torch_transformer(model)
    source, target = pack([ids(5, 0), ids(9, 1)]), pack([ids(7, 2), ids(3, 3)])
    model(source, target).hidden.values.square().sum().backward()
    with torch.no_grad():
        embedded = source.like(model.embed(source.values, source.layout.positions)).split()
        shifted = target.like(model.embed(target.values, target.layout.positions)).split()
    packed = model.decoder[0].cross.qkv.weight
    first, packed.grad = packed.grad, None
    loss = torch.zeros((), dtype=torch.float64)
    for x, y in zip(embedded, shifted, strict=True):
        future = torch.ones(len(y), len(y), dtype=torch.bool).triu(1)
        loss = loss + theirs(x[None], y[None], tgt_mask=future).square().sum()
    loss.backward()
    torch.testing.assert_close(packed.grad, first)
    for ours, other in zip(model.encoder, theirs.encoder.layers, strict=True):
        torch.testing.assert_close(ours.mlp.up.weight.grad, other.linear1.weight.grad)
        torch.testing.assert_close(ours.mlp_norm.weight.grad, other.norm2.weight.grad)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_an_encoder_block_equals_torchs(activation, norm_first: bool):
    config = replace(CONFIGS["bert-masked-lm"], activation=activation, norm_first=norm_first)
    block = Block(config).double()
    nn.init.normal_(block.attention_norm.weight)
    nn.init.normal_(block.mlp_norm.bias)
    named = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "silu": lambda x: x * x.sigmoid(),
    }
    theirs = nn.TransformerEncoderLayer(
        D, 2, 16, 0.0, named[activation], config.norm_eps, batch_first=True, norm_first=norm_first
    ).double()
    copy_block(block, theirs)
    batch = pack([draw(3, D), draw(8, D, seed=1)])
    out = batch.like(block(batch.values, Pattern(batch.layout, batch.layout)))
    for x, y in zip(batch.split(), out.split(), strict=True):
        torch.testing.assert_close(y, theirs(x[None])[0])


@pytest.mark.parametrize("norm_first", [False, True])
def test_gradients_of_a_block_agree_with_finite_differences(norm_first: bool):
    config = ModelConfig(dim=4, heads=2, depth=1, mlp_dim=5, norm_first=norm_first, dropout=0.0)
    block = Block(config, cross=True).double()
    target, source = Layout((1, 0, 3), torch.device("cpu")), Layout((2, 1, 0), torch.device("cpu"))

    def forward(x: Tensor, key: Tensor, value: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip((name for name, _ in block.named_parameters()), weights, strict=True))
        inputs = {"memory": (key, value), "memory_pattern": Pattern(target, source)}
        return torch.func.functional_call(block, named, (x, Pattern(target, target, causal=True)), inputs)

    values = [draw(4, 4), *draw(2, 3, 2, 2, seed=1), *(p.detach().clone() for p in block.parameters())]
    assert gradcheck(forward, [value.requires_grad_() for value in values])


def test_dropout_sits_on_every_sublayer_and_only_in_training():
    config = ModelConfig(dim=D, heads=2, depth=1, mlp_dim=16, norm_first=True, dropout=0.999)
    block = Block(config, cross=True)
    layout = Layout((50,), torch.device("cpu"))
    pattern = Pattern(layout, layout)
    x = torch.randn(50, D)
    memory = block.cross.read(x)
    out = block(x, pattern, memory=memory, memory_pattern=pattern)
    assert (out == x).float().mean() > 0.98  # nearly nothing joins the residual stream
    block.eval()
    out = block(x, pattern, memory=memory, memory_pattern=pattern)
    assert (out == x).float().mean() < 0.02


# ---------------------------------------------------------------- word dropout


def test_word_dropout_takes_whole_tokens_in_training_only():
    embedding = TokenEmbedding(50, D, 0.25)
    plain = nn.Embedding(50, D, _weight=embedding.weight.detach())
    tokens = torch.arange(4000) % 50
    found, expected = embedding(tokens), plain(tokens)
    gone = (found == 0).all(1)
    assert torch.equal(found[~gone], expected[~gone])
    assert gone.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(embedding.eval()(tokens), expected)


# ---------------------------------------------------------------- drop path


def test_drop_path_takes_whole_sequences_and_keeps_the_expectation():
    layout = Layout((3, 1, 0, 5) * 500, torch.device("cpu"))
    ones = torch.ones(layout.tokens, D, dtype=torch.float64)
    rows = [row for row in Ragged(DropPath(0.25)(ones, layout), layout).split() if len(row)]
    scales = torch.stack([row[0, 0] for row in rows])
    assert all((row == row[0, 0]).all() for row in rows)
    assert scales.unique().tolist() == [0.0, 1 / 0.75]
    assert scales.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_dropped_sublayer_leaves_the_residual_stream_alone(norm_first: bool):
    """Every sequence is one of the four: each of its two sub-layers is dropped, or scaled."""
    config = ModelConfig(dim=D, heads=2, depth=1, mlp_dim=16, norm_first=norm_first, dropout=0.0)
    block = Block(config, drop_path=0.4).double()
    batch = pack([draw(1 + i % 4, D, seed=i) for i in range(60)])
    out = batch.like(block(batch.values, Pattern(batch.layout, batch.layout))).split()
    seen = set()
    for x, y in zip(batch.split(), out, strict=True):
        layout = Layout((len(x),), x.device)
        for kept in product((0, 1 / 0.6), repeat=2):
            h, norms = x, (block.attention_norm, block.mlp_norm)
            sublayers = (partial(block.attention, pattern=Pattern(layout, layout)), block.mlp)
            for scale, norm, sublayer in zip(kept, norms, sublayers, strict=True):
                h = h + scale * sublayer(norm(h)) if norm_first else norm(h + scale * sublayer(h))
            if torch.allclose(h, y):
                seen.add(kept)
                break
        else:
            pytest.fail("a sequence was dropped in part")
    assert len(seen) == 4


def test_the_rate_rises_linearly_with_depth():
    for name in ("gpt-pre-norm", "transformer-post-norm", "bert-tagging", "vit-pre-norm"):
        model = tiny(replace(CONFIGS[name], depth=4, drop_path=0.3))
        stacks = [m for m in model.children() if isinstance(m, nn.ModuleList)]
        assert len(stacks) == (2 if isinstance(model, Transformer) else 1)
        for stack in stacks:
            assert [block.drop_path.rate for block in stack] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_deeper_models_of_more_rates_are_compiled_no_oftener():
    counts = []
    for depth in (4, 9):
        torch.compiler.reset()
        model = tiny(replace(CONFIGS["vit-pre-norm"], depth=depth, drop_path=0.4), torch.float32).train()
        counter = CompileCounter()
        for block in model.blocks:
            block.compile(backend=counter)
        model(torch.randn(3, 2, 8, 8))
        counts.append(counter.frame_count)
    assert 0 < counts[1] <= counts[0]


# ---------------------------------------------------------------- initial weights


def test_normal_weights_are_those_of_gpt2():
    model = GPT(GPTConfig(dim=64, depth=8, heads=2, mlp_dim=256, vocab_size=500, context=64))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        else:
            joins = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(16) if joins else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name
            assert parameter.abs().max() <= 3 * std, name


def test_without_a_depth_nothing_is_scaled():
    linear = nn.Sequential(nn.Linear(100, 100))
    init_normal(linear)
    assert linear[0].weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_xavier_weights_and_embeddings_of_unit_variance_once_scaled():
    config = TransformerConfig(dim=64, depth=1, heads=2, mlp_dim=128, vocab_size=500, context=8)
    model = Transformer(config)
    assert (model.tokens.weight * math.sqrt(64)).std().item() == pytest.approx(1.0, rel=0.05)
    up = model.encoder[0].mlp.up
    assert up.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (64 + 128)), rel=0.01)
    assert not up.bias.any()


def test_xavier_leaves_linear_maps_without_a_bias_alone():
    linear = nn.Linear(3, 3, bias=False)
    init_xavier(linear)
    assert linear.bias is None
