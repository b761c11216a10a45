"""Plans against real steps: memory by torch's profiler, FLOPs by hand and by torch's counter."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import samples
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_cli import fail, succeed
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from qkv.cli import _planned_config
from qkv.config import (
    FAMILIES,
    BertConfig,
    DataConfig,
    GPTConfig,
    LoraConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
    TransformerConfig,
    ViTConfig,
)
from qkv.data import Sampler
from qkv.errors import InputError
from qkv.job import new_job
from qkv.layers import Block
from qkv.meter import Meter, Work
from qkv.models import PRESETS, build
from qkv.objectives import item_counts
from qkv.plan import (
    GPU,
    NODE,
    USABLE,
    Step,
    SyntheticDataset,
    assume,
    measure_step,
    plan,
    run_step,
    synthetic_trainer,
)
from qkv.recipes import default_recipe
from qkv.roofline import Roofline
from qkv.runtime import multiplies_bfloat16
from qkv.tokenizers import train_tokenizer
from qkv.trainer import Trainer

CPU = torch.device("cpu")
SIZES = {"dim": 64, "depth": 1, "heads": 4, "mlp_dim": 256, "dropout": 0.1}
MODELS = {
    "gpt": GPTConfig(**SIZES, context=64, vocab_size=500),
    "bert": BertConfig(**SIZES, context=64, vocab_size=500),
    "transformer": TransformerConfig(**SIZES, context=64, vocab_size=500),
    "vit": ViTConfig(**SIZES, image_size=32, patch_size=4, labels=("a", "b", "c")),
    "rotary": ViTConfig(
        **SIZES, image_size=32, patch_size=4, labels=("a", "b", "c"), position="rotary", qk_norm=True
    ),
    "stem": ViTConfig(**SIZES, image_size=32, patch_size=4, labels=("a", "b", "c"), stem="convolutions"),
}
RATES = Roofline("given", {torch.float32: 1e12, torch.bfloat16: 4e12}, 1e11)


def config(family: str, model: dict | None = None, **changes) -> RunConfig:
    train = TrainConfig(**{"batch_tokens": 1024, "precision": "fp32", **changes})
    return RunConfig(model=replace(MODELS[family], **(model or {})), train=train)


def measured(given: RunConfig, **options) -> Step:
    return measure_step(given, RATES, CPU, **options)


def peak_of(run) -> int:
    """Most bytes that torch's CPU allocator had given out while `run` ran, as its profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    found, nodes = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag == torch._C._profiler._EventType.Allocation:
            found.append((node.start_time_ns, node.extra_fields.alloc_size))
    live = peak = 0
    for _, size in sorted(found, key=lambda event: event[0]):
        live += size
        peak = max(peak, live)
    assert kept
    return peak


# ---------------------------------------------------------------- memory


emulated = pytest.mark.skipif(
    not multiplies_bfloat16(CPU), reason="kernels that emulate bfloat16 take scratch memory of their own"
)


SCRATCH = 0.07 if torch.cpu.get_capabilities().get("amx_bf16") else 0.04
"""Of all memory, what kernels take in bfloat16 for themselves: those of AMX lay matrices out in tiles."""


@pytest.mark.parametrize(
    ("precision", "scratch"), [("fp32", 0.04), pytest.param("bf16", SCRATCH, marks=emulated)]
)
@pytest.mark.parametrize("family", MODELS)
def test_memory_is_that_of_a_real_step(family, precision, scratch):
    """Within 10 % as promised, and in fact closer: kernels' own scratch memory is all that is not seen."""
    given = config(family, precision=precision)

    def run():
        trainer = synthetic_trainer(given)
        run_step(trainer)
        run_step(trainer)
        return trainer

    assert measured(given).memory.total == pytest.approx(peak_of(run), rel=scratch)


@pytest.mark.parametrize(
    ("family", "write"),
    [
        ("gpt", samples.text),
        ("bert", samples.labelled),
        ("bert", samples.documents),
        ("bert", samples.multi_label),
        ("bert", samples.regression),
        ("bert", samples.conll),
        ("transformer", partial(samples.pairs, count=600)),
        ("vit", samples.images),
    ],
)
def test_memory_is_that_of_a_run_on_files(family, write, tmp_path):
    """On real data, and with Muon; texts shorter than the context are planned by their mean length."""
    given = config(family, optimizer="muon")
    given = replace(given, data=DataConfig(path=str(write(tmp_path))))
    if family == "vit":
        given = replace(given, model=replace(given.model, image_size=0))
    else:
        kind = "wordpiece" if family == "bert" else "char"
        given = replace(given, tokenizer=TokenizerConfig(kind=kind, vocab_size=200))
    resolved = []

    def run():
        job = new_job(given)
        trainer = Trainer(job.config.train, job.checkpoint, job.train)
        _, indices = next(Sampler(job.train.costs, given.train.batch_tokens, 0).batches())
        for step in (1, 2):
            trainer.step(trainer.data(0, indices), step)
        resolved.append((job.config, job.train.costs[indices]))
        return trainer

    peak = peak_of(run)
    found, costs = resolved[0]
    length = 0 if family == "vit" else round(costs.mean() / (2 if family == "transformer" else 1))
    planned = measured(found, length=length, samples=len(costs))
    assert planned.tokens == pytest.approx(costs.sum(), rel=0.1)
    assert planned.memory.total == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("family", MODELS)
def test_parts_of_the_memory(family):
    model = build(MODELS[family])
    numbers = sum(p.numel() for p in model.parameters())
    step = measured(config(family, precision="bf16"))
    assert step.parameters == numbers
    assert step.memory.weights == 4 * numbers + sum(4 * b.numel() for b in model.buffers())
    # Two moments of each weight, and a step count of each tensor.
    assert step.memory.optimizer == 8 * numbers + 4 * len(list(model.parameters()))
    # The matrices of the blocks at least are copied, and no weight more than once.
    assert sum(step.blocks) * 0.45 < step.memory.copies <= 2 * numbers
    assert measured(config(family)).memory.copies == 0
    assert step.memory.activations <= step.most_activations
    averaged = measured(config(family, precision="bf16", ema_decay=0.9))
    assert averaged.memory.optimizer == step.memory.optimizer + 4 * numbers + 8  # and a count
    assert averaged.most_activations == step.most_activations


def test_gradients_are_whole_when_a_second_part_runs():
    step = measured(config("gpt", gradient_accumulation_steps=2))
    assert step.memory.gradients == 4 * step.parameters
    assert step.most_activations < 0.7 * measured(config("gpt")).most_activations


@pytest.mark.parametrize("family", ["bert", "transformer"])
def test_checkpointing_computes_blocks_again_instead_of_keeping_them(family):
    given = config(family, {"depth": 3})
    plain, again = measured(given), measured(given, checkpointing=True)
    assert again.most_activations < 0.7 * plain.most_activations
    assert again.forward_flops == plain.forward_flops
    blocks = [0]
    trainer = synthetic_trainer(given)
    for block in (m for m in trainer.model.modules() if isinstance(m, Block)):
        counter = Meter()
        block.register_forward_pre_hook(lambda *_, c=counter: c.__enter__() and None)
        block.register_forward_hook(lambda *_, c=counter: c.__exit__(None, None, None))
        blocks.append(counter)
    batch = trainer.dataset.batch(range(len(trainer.dataset)), 0)
    trainer.objective(batch, item_counts(batch))
    assert again.backward_flops - plain.backward_flops == sum(c.flops("forward") for c in blocks[1:])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_on_gpus_stores_no_probabilities(precision: str):
    """With dropout, too: the activations of a token do not grow with its sequence, as they do on a CPU."""
    model = {"attention_dropout": 0.1, "context": 256}
    given = config("gpt", model, precision=precision)
    short, long = ({"length": n, "samples": 1024 // n} for n in (64, 256))
    on_gpu = [measured(given, gpu_kernels=True, **sizes).most_activations for sizes in (short, long)]
    assert on_gpu[1] == pytest.approx(on_gpu[0], rel=0.02)
    assert measured(given, **long).most_activations > 1.5 * on_gpu[1]
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


# ---------------------------------------------------------------- FLOPs and time


def test_flops_of_a_gpt_by_hand():
    """2 FLOPs for each weight of a matrix and each token, and 4 L D a layer for attention."""
    model = MODELS["gpt"]
    D, F_, L = model.dim, model.mlp_dim, model.context
    step = measured(config("gpt", {"attention_dropout": 0.0}))
    forward = 2 * (model.depth * (4 * D * D + 2 * D * F_) + model.vocab_size * D) + model.depth * 4 * L * D
    assert step.forward_flops == forward * step.tokens
    # The backward pass has two products for each of the forward pass; the fused kernel repeats Q K^T.
    repeated = model.depth * 2 * L * D * step.tokens
    assert step.backward_flops == 2 * step.forward_flops + repeated


@pytest.mark.parametrize("family", MODELS)
def test_flops_are_those_that_torch_counts_in_a_real_step(family):
    given = config(
        family, {"attention_dropout": 0.1}
    )  # attention as plain products: torch counts no CPU kernel
    trainer = synthetic_trainer(given)
    with FlopCounterMode(display=False) as counter:
        run_step(trainer)
    step = measured(given)
    assert step.forward_flops + step.backward_flops == counter.get_total_flops()


@given(flops=st.integers(0, 10**15), traffic=st.integers(0, 10**12), dtype=st.sampled_from(list(RATES.flops)))
def test_roofline(flops, traffic, dtype):
    """Every operator takes as long as the slower of products and memory; operators add up."""
    work = Work("forward", flops, traffic, dtype)
    seconds = RATES.seconds([work])
    assert seconds == max(flops / RATES.flops[dtype], traffic / RATES.bandwidth)
    assert RATES.seconds([work, work]) == 2 * seconds


def test_the_meter_follows_memory_to_its_end():
    with Meter() as meter:
        a = torch.zeros(1000)
        b = a + a
        view = b.view(10, 100).T
        del b
        assert meter.live == 8000
        del view
        assert meter.live == 4000
        a.mul_(2.0)
    assert meter.peak.total == 8000
    assert [w.traffic for w in meter.work] == [4000, 12000, 8000]


# ---------------------------------------------------------------- plans


def test_what_data_would_decide_is_assumed_and_said():
    found, notes = assume(default_recipe("vit"), CPU)
    assert (found.model.image_size, len(found.model.labels)) == (32, 10)
    assert notes == ("images of 32x32 pixels", "10 classes")
    found, notes = assume(default_recipe("gpt"), CPU)
    assert found.model.vocab_size == default_recipe("gpt").tokenizer.vocab_size
    assert len(notes) == 1 and found.train.precision != "auto"
    assert assume(found, CPU) == (found, ())
    tagger = replace(default_recipe("bert"), data=DataConfig(task="tagging"))
    found, notes = assume(tagger, CPU)
    assert (found.model.head, len(found.model.labels), notes[-1]) == ("tagging", 2, "2 classes")
    with pytest.raises(InputError, match=r"train\.r_drop is for classes, not for regression"):
        assume(replace(config("bert", r_drop=1.0), data=DataConfig(task="regression")), CPU)
    with pytest.raises(InputError, match=r"leave out data\.task contrastive"):
        assume(replace(tagger, data=DataConfig(task="contrastive")), CPU)


@given(tokens=st.integers(1, 5000), length=st.integers(1, 64), family=st.sampled_from(FAMILIES))
def test_the_synthetic_batch_is_what_the_sampler_would_take(tokens, length, family):
    given = config(family, batch_tokens=tokens)
    data = SyntheticDataset(given, 0 if family == "vit" else length)
    longest = int(data.costs.max())
    assert len(data) * longest <= tokens or len(data) == 1
    assert (len(data) + 1) * longest > tokens
    item_counts(data.batch(range(len(data)), 0))


def test_layouts():
    given = config("gpt", {"depth": 3}, batch_tokens=64 * 32)
    roomy = plan(given, gpus=16)
    assert [(p.checkpointing, p.shards) for p in roomy.placements] == [
        (again, shards) for again in (False, True) for shards in (1, NODE, 16)
    ]
    assert roomy.chosen == roomy.placements[0] and roomy.roofline == str(GPU)
    assert roomy.tokens == 64 * 32
    for one in roomy.placements:
        assert (
            one.fits and one.sequences * one.gradient_accumulation_steps * roomy.devices * 64 >= roomy.tokens
        )
    plain, hybrid, full = (p.memory for p in roomy.placements[:3])
    assert plain.weights == 16 * full.weights == NODE * hybrid.weights
    assert full.total < hybrid.total < plain.total

    def under(share: float, of: int) -> tuple:
        tight = plan(given, gpus=16, gpu_memory_gib=share * of / USABLE / 2**30)
        assert all(p.memory.total <= share * of for p in tight.placements if p.fits)
        return tight.chosen and (tight.chosen.shards, tight.chosen.checkpointing)

    cheapest = min(p.memory.total for p in roomy.placements)
    assert under(1.01, plain.total) == (1, False)
    assert under(0.01, cheapest) is None
    assert under(1.01, full.total) != (1, False)


def test_accumulation_comes_before_sharding():
    given = config("gpt", batch_tokens=64 * 64)
    whole = plan(given, gpus=1).placements[0]
    tight = plan(given, gpus=1, gpu_memory_gib=0.6 * whole.memory.total / USABLE / 2**30).chosen
    assert tight is not None and tight.gradient_accumulation_steps > 1 and not tight.checkpointing
    assert tight.sequences * tight.gradient_accumulation_steps == whole.sequences == 64


def test_more_gpus_than_sequences_are_said():
    idle = plan(config("gpt"), gpus=32)
    assert idle.tokens == 32 * 64
    assert "a sequence for each GPU, though train.batch_tokens is only 16 sequences" in idle.assumptions


def test_impossible_plans():
    for wrong in ({"gpus": -1}, {"gpu_memory_gib": 0.0}, {"length": 65}, {"length": -1}):
        with pytest.raises(InputError):
            plan(config("gpt"), **wrong)
    with pytest.raises(InputError, match="length is for texts"):
        plan(config("vit"), length=9)
    with pytest.raises(InputError, match="nothing of adapters"):
        plan(replace(config("gpt"), lora=LoraConfig(rank=2)))


def test_steps_that_grow_are_planned_at_full_size():
    whole = config("vit")
    growing = replace(whole, train=replace(whole.train, growth=(0.5, 1.0)))
    found, expected = plan(growing), plan(whole)
    assert (found.chosen.memory, found.training_flops) == (expected.chosen.memory, expected.training_flops)
    assert any("train.growth" in note for note in found.assumptions)


def test_what_a_run_computes_again_is_planned_so():
    whole = config("bert", {"depth": 4})
    again = plan(replace(whole, train=replace(whole.train, gradient_checkpointing=True)))
    assert again.chosen.memory.activations < plan(whole).chosen.memory.activations
    assert again.chosen.checkpointing


# ---------------------------------------------------------------- the command


def test_command(tmp_path):
    sizes = ["--model.dim=32", "--model.depth=1", "--model.heads=2", "--model.mlp-dim=64"]
    said = succeed("plan", "bert", *sizes, "--train.batch-tokens=256")
    assert "parameters" in said and "activations" in said and "Roofline" in said
    told = json.loads(succeed("plan", "vit", *sizes, "--train.batch-tokens=256", "--gpus=2", "--json"))
    assert [p["shards"] for p in told["placements"]] == [1, 2, 1, 2]
    first = told["placements"][0]["memory"]
    assert first["total"] == sum(first[part] for part in first if part != "total")
    assert "chosen" in succeed("plan", "vit", *sizes, "--train.batch-tokens=256", "--gpus=2")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[model]\nfamily = "gpt"\ndim = 32\ndepth = 1\nheads = 2\nmlp_dim = 64\ncontext = 16\n')
    assert json.loads(succeed("plan", recipe, "--gpus=1", "--json"))["assumptions"]
    assert "Roofline" in succeed("plan", recipe, "--data", "corpus.txt")  # as of a command that trains


def test_a_published_size_is_planned_as_it_was_published():
    for name in ("gpt2-xl", "bert-tiny", "vit-b/16", "transformer-big", "transformer-tiny"):
        found = asdict(assume(_planned_config(name), CPU)[0].model)
        assert found | {"labels": ()} == asdict(PRESETS[name]) | {"labels": ()}
    assert _planned_config("gpt") == default_recipe("gpt")


def test_mistakes_are_one_line():
    assert fail("plan").startswith("qkv: name what to plan")
    assert "no recipe file or preset gpt5" in fail("plan", "gpt5")
    assert fail("plan", "gpt", "--length=9999") == (
        "qkv: length is 9999; it must be from 1 to model.context 256"
    )
    assert "did you mean --model.depth" in fail("plan", "gpt", "--model.dept=3")


def test_a_tokenizer_that_is_given_says_how_large_the_vocabulary_is(tmp_path):
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), "gpt", ["abc"])
    tokenizer.save(tmp_path)
    given = config("gpt")
    given = replace(given, model=GPTConfig(), tokenizer=TokenizerConfig(path=str(tmp_path)))
    assumed, _ = assume(given, CPU)
    assert assumed.model.vocab_size == tokenizer.vocab_size
