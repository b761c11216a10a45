"""What a run will need, before anything is spent: memory, time, and a layout for many GPUs.

The optimiser step of the training loop itself runs on tensors without contents, on a batch as large as
the config's, and a `Meter` counts what it allocates and does.

Legend: T tokens of a batch, N sequences or images, L tokens of a sequence, S side of an image in pixels.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from qkv import attention
from qkv.config import BertConfig, GPTConfig, RunConfig, TransformerConfig, ViTConfig
from qkv.data import bert_head, check_settings
from qkv.data.batches import (
    Batch,
    ImageBatch,
    LabelledBatch,
    LanguageBatch,
    MaskedBatch,
    MultiLabelBatch,
    PairBatch,
    TaggedBatch,
    ValueBatch,
)
from qkv.data.dataset import Dataset
from qkv.errors import InputError
from qkv.hub import Checkpoint
from qkv.hub.folder import locate
from qkv.layers import Block
from qkv.meter import Meter
from qkv.models import allocate, build
from qkv.models.bert import LABELLED
from qkv.ragged import Layout, Ragged
from qkv.roofline import Roofline, measure_roofline
from qkv.runtime import multiplies_bfloat16, pick_device
from qkv.tokenizers import Tokenizer
from qkv.trainer import Trainer

GPU = Roofline(
    "assumed of each GPU, as an H100 sustains it",
    {torch.bfloat16: 400e12, torch.float32: 40e12},
    2e12,
)
"""The rates of a GPU where none is here to be measured."""
USABLE = 0.9
"""Share of a GPU's memory that a step may fill: the rest is for libraries' workspaces and fragmentation."""
NODE = 8
"""GPUs of one machine, within which weights are sharded before they are sharded over all."""


# ---------------------------------------------------------------- the run that is planned


def assume(config: RunConfig, device: torch.device) -> tuple[RunConfig, tuple[str, ...]]:
    """The config with what only data or a machine would decide filled in, and what was assumed.

    Raises InputError for what cannot be planned.
    """
    if config.tasks:
        raise InputError("plans know nothing of several tasks: plan the one that needs most, with data.task")
    if config.lora.rank:
        raise InputError("plans know nothing of adapters, which need less: leave out lora.rank")
    if config.data.task == "contrastive":
        raise InputError("plans know nothing of groups of texts: leave out data.task contrastive")
    model, notes = config.model, []
    if isinstance(model, ViTConfig):
        if not model.image_size:
            side = max(32 // model.patch_size, 1) * model.patch_size
            model = replace(model, image_size=side)
            notes.append(f"images of {side}x{side} pixels")
        if not model.labels:
            model = replace(model, labels=_labels(10))
            notes.append("10 classes")
    else:
        if not config.init and config.tokenizer.path:
            model = replace(model, vocab_size=Tokenizer.load(locate(config.tokenizer.path)).vocab_size)
        elif not config.init and model.vocab_size == type(model)().vocab_size:  # the tokenizer is trained
            char = config.tokenizer.kind == "char"  # takes what occurs
            model = replace(model, vocab_size=256 if char else config.tokenizer.vocab_size)
            notes.append(f"a vocabulary of {model.vocab_size:,} tokens")
        if isinstance(model, BertConfig):
            head = model.head if config.data.task == "auto" else bert_head(config.data.task)
            if head == "regression":
                check_settings("regression", config)
            if head not in LABELLED:
                model = replace(model, head="pretraining", labels=())
            elif head != model.head or not model.labels:
                labels = _labels(1 if head == "regression" else 2)
                model = replace(model, head=head, labels=labels)
                notes.append(f"{len(labels)} {'value' if head == 'regression' else 'classes'}")
    if config.init:
        notes.append(f"the sizes of the config, not those of {config.init}")
    train = config.train
    if train.precision == "auto":
        bf16 = device.type == "cuda" or multiplies_bfloat16(device)
        train = replace(train, precision="bf16" if bf16 else "fp32")
    if train.growth:
        train = replace(train, growth=())
        notes.append("every step at full size, which train.growth makes the last ones")
    return replace(config, model=model, train=train), tuple(notes)


def _labels(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


class SyntheticDataset(Dataset):
    """Samples of the longest kind that the config allows, without meaning.

    Texts of BERT and the Transformer vary in length, so every second one is a token shorter: sequences
    of equal lengths need less memory.
    """

    def __init__(self, config: RunConfig, length: int = 0, samples: int = 0) -> None:
        """length: tokens of a text; 0: the context. samples: how many; 0: those of one optimiser step.

        Raises InputError for a length that the model cannot have.
        """
        model = self.model = config.model
        self.masked_share = config.data.masked_share
        sides = 2 if isinstance(model, TransformerConfig) else 1
        if isinstance(model, ViTConfig):
            if length:
                raise InputError("length is for texts; that of an image follows from model.image_size")
            self.length = (model.image_size // model.patch_size) ** 2
        else:
            self.length = length or model.context
            if not 1 <= self.length <= model.context:
                raise InputError(f"length is {length}; it must be from 1 to model.context {model.context}")
        count = samples or max(config.train.batch_tokens // (sides * self.length), 1)
        self._lengths = np.full(count, self.length)
        if isinstance(model, BertConfig | TransformerConfig):
            self._lengths[1::2] = max(self.length - 1, 1)
        self.costs = sides * self._lengths

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """A batch of the kind that the configured model learns from."""
        model, N = self.model, len(indices)
        layout = Layout(tuple(self._lengths[list(indices)].tolist()), torch.device("cpu"))
        T = layout.tokens

        def texts() -> Ragged:
            return Ragged(_ids(T), layout)

        match model:
            case GPTConfig():
                return LanguageBatch(texts(), _ids(T))
            case TransformerConfig():
                return PairBatch(texts(), texts(), _ids(T))
            case BertConfig(head="classification"):
                return LabelledBatch(texts(), _ids(T), _ids(N))
            case BertConfig(head="multi_label"):
                return MultiLabelBatch(texts(), _ids(T), torch.zeros(N, len(model.labels), dtype=torch.bool))
            case BertConfig(head="regression"):
                return ValueBatch(texts(), _ids(T), torch.zeros(N))
            case BertConfig(head="tagging"):
                return TaggedBatch(texts(), torch.arange(T), texts())
            case BertConfig():
                M = round(self.masked_share * T)
                return MaskedBatch(texts(), _ids(T), torch.arange(M), _ids(M), _ids(N))
            case ViTConfig():
                S = model.image_size
                return ImageBatch(torch.zeros(N, model.channels, S, S), _ids(N))


def _ids(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.long)


def synthetic_trainer(config: RunConfig, length: int = 0, samples: int = 0) -> Trainer:
    """What the training loop would step, on a SyntheticDataset."""
    data = SyntheticDataset(config, length, samples)
    return Trainer(config.train, Checkpoint(build(config.model).to(pick_device())), data)


def run_step(trainer: Trainer) -> None:
    """One optimiser step over all samples."""
    trainer.step(trainer.data(epoch=0, indices=range(len(trainer.dataset))), step=1)


# ---------------------------------------------------------------- one step, counted


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment of an optimiser step at which most are in use."""

    weights: int
    copies: int
    """Weights in the type of the products, and those gathered from other GPUs."""
    gradients: int
    optimizer: int
    """What the optimiser keeps, and an average of the weights."""
    activations: int
    """What the backward pass will need, and passing results."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.copies + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Step:
    """One optimiser step on one device."""

    memory: Memory
    most_activations: int
    """Bytes at any moment, not just at that of `memory`."""
    blocks: tuple[int, ...]
    """Bytes of each block's weights."""
    parameters: int
    tokens: int
    forward_flops: int
    backward_flops: int
    passes: float
    """Seconds of the forward and backward passes."""
    update: float
    """Seconds of clipping and of the optimiser."""


def measure_step(
    config: RunConfig,
    roofline: Roofline,
    device: torch.device,
    *,
    length: int = 0,
    samples: int = 0,
    checkpointing: bool = False,
    gpu_kernels: bool = False,
) -> Step:
    """Count an optimiser step of a config without computing it; `assume` makes the config complete.

    length and samples: as of SyntheticDataset. checkpointing: keep only what enters each block, and
    compute the rest again (Chen et al. 2016). gpu_kernels: attention as on a GPU, whatever the device.
    """
    config = replace(config, train=replace(config.train, gradient_checkpointing=checkpointing))
    with torch.device("meta"):
        model = build(config.model)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        if gpu_kernels:
            stack.enter_context(_gpu_attention(config.train.precision == "bf16"))
        meter = stack.enter_context(Meter())
        allocate(model, lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))
        data = SyntheticDataset(config, length, samples)
        trainer = Trainer(config.train, Checkpoint(model), data)
        _make_state(trainer.optimizers)
        meter.start(model.parameters())
        run_step(trainer)
        weights = _bytes([*model.parameters(), *model.buffers()])
        state = _bytes(
            tree_leaves([[stepper.state for stepper in trainer.optimizers], trainer.average.state])
        )
    done = 1 + max(i for i, work in enumerate(meter.work) if work.phase == "backward")
    peak, update = meter.peak, meter.work[done:]
    seconds = roofline.seconds(update)
    return Step(
        memory=Memory(weights, peak.copies, peak.gradients, state, peak.rest - weights - state),
        most_activations=meter.widest.rest - weights - state,
        blocks=tuple(_bytes(block.parameters()) for block in blocks),
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=int(data.costs.sum()),
        forward_flops=meter.flops("forward"),
        backward_flops=meter.flops("backward"),
        passes=roofline.seconds(meter.work) - seconds,
        update=seconds,
    )


def _make_state(steppers: Sequence[torch.optim.Optimizer]) -> None:
    """Step once, as optimisers make their state in their first step."""
    for stepper in steppers:
        for group in stepper.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        stepper.step()
        stepper.zero_grad(set_to_none=True)


def _bytes(values: Iterable[object]) -> int:
    return sum(x.untyped_storage().nbytes() for x in values if isinstance(x, Tensor))


@contextmanager
def _gpu_attention(bf16: bool) -> Iterator[None]:
    """Attention by the fused kernel of GPUs, which with dropout, too, stores no probabilities.

    torch has no GPU's choice of kernels where there is no GPU, so its function is replaced for a while.
    """
    before, products = F.scaled_dot_product_attention, attention._PRODUCTS

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
    ) -> Tensor:
        """As torch's function of that name."""
        if bf16:  # on a CPU, `attend` made them float32
            query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, attn_mask, True, dropout_p, is_causal)[0]  # type: ignore[no-any-return]

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    attention._PRODUCTS = 0  # what CPUs compute in another way
    try:
        yield
    finally:
        F.scaled_dot_product_attention, attention._PRODUCTS = before, products


# ---------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Placement:
    """One way to spread a step over the devices, and what each of them then needs."""

    shards: int
    """Devices that share one copy of the weights, gradients and optimiser state: 1 is replicated (DDP),
    all of them fully sharded (FSDP2), between the two hybrid."""
    checkpointing: bool
    """Whether activations inside blocks are computed again in the backward pass."""
    sequences: int
    """Sequences or images of one micro-batch on one device."""
    gradient_accumulation_steps: int
    memory: Memory
    seconds: float
    """Of a step, communication not counted."""
    fits: bool

    def name(self, devices: int) -> str:
        """What it is called."""
        if devices == 1:
            return "one device"
        if self.shards == 1:
            return "replicated (DDP)"
        return f"sharded {self.shards} ({'FSDP2' if self.shards == devices else 'hybrid'})"


@dataclass(frozen=True)
class Plan:
    """What a run needs."""

    parameters: int
    tokens: int
    """Of one optimiser step, on all devices."""
    max_steps: int
    forward_flops: int
    """Of the forward pass, per token."""
    training_flops: int
    """Of the forward and backward pass, per token."""
    precision: str
    devices: int
    roofline: str
    assumptions: tuple[str, ...]
    placements: tuple[Placement, ...]
    chosen: Placement | None
    """The cheapest that fits: without checkpointing if possible, then with the fewest shards."""

    @property
    def rule_of_thumb(self) -> int:
        """6 N: training FLOPs per token without attention's own products (Kaplan et al. 2020, 2.1)."""
        return 6 * self.parameters

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for programs: bytes, seconds and FLOPs."""
        values = asdict(self) | {"rule_of_thumb": self.rule_of_thumb}
        for one, placement in zip(values["placements"], self.placements, strict=True):
            one["memory"]["total"] = placement.memory.total
            one["chosen"] = placement is self.chosen
        del values["chosen"]
        return values

    def describe(self) -> Iterator[str | Table]:
        """For people: sentences and tables."""
        yield f"{self.parameters:,} parameters; {self.tokens:,} tokens a step; {self.precision}"
        yield (
            f"FLOPs per token: {_short(self.forward_flops)} forward, {_short(self.training_flops)} training "
            f"(6 N: {_short(self.rule_of_thumb)})"
        )
        if self.assumptions:
            yield f"No data were read; assumed: {'; '.join(self.assumptions)}."
        if self.devices > 1:
            layouts = Table("layout", "recompute", box=SIMPLE_HEAD)
            for name in ("micro-batch", "memory", "s/step", "fits"):
                layouts.add_column(name, justify="right")
            for one in self.placements:
                layouts.add_row(
                    one.name(self.devices),
                    "yes" if one.checkpointing else "no",
                    f"{one.sequences} x {one.gradient_accumulation_steps}",
                    _size(one.memory.total),
                    f"{one.seconds:.3g}",
                    "chosen" if one is self.chosen else "yes" if one.fits else "no",
                )
            yield layouts
        if self.chosen is None:
            yield "None of these fits: plan for more GPUs, shorter sequences or a smaller model."
            return
        memory = Table(self.chosen.name(self.devices), box=SIMPLE_HEAD)
        memory.add_column("memory", justify="right")
        for field in fields(self.chosen.memory):
            memory.add_row(field.name, _size(getattr(self.chosen.memory, field.name)))
        memory.add_row("at most at once", _size(self.chosen.memory.total), style="bold")
        yield memory
        seconds = self.chosen.seconds
        apart = f" on {self.devices} GPUs, if none waits for another" if self.devices > 1 else ""
        yield f"At least {seconds:.3g} s a step, {_time(self.max_steps * seconds)} in all{apart}."
        yield f"Roofline: {self.roofline}."


def plan(config: RunConfig, gpus: int = 0, gpu_memory_gib: float = 80.0, length: int = 0) -> Plan:
    """Plan a run on the device that is here, or on GPUs that may not be.

    gpus: how many; 0: the device that is here. length: tokens of a text; 0: the context, the most there
    can be. Raises InputError for a length that the model cannot read, or numbers of GPUs that cannot be.
    """
    if gpus < 0 or not 0 < gpu_memory_gib < float("inf"):
        raise InputError(
            f"gpus is {gpus} and gpu_memory_gib {gpu_memory_gib}; give a count and a positive size"
        )
    if not gpus and gpu_memory_gib != 80.0:
        raise InputError("gpu_memory_gib is of the GPUs that are planned for: give gpus too")
    here = pick_device()
    simulated = gpus > 0 and here.type != "cuda"
    config, assumptions = assume(config, torch.device("cuda") if gpus else here)
    devices = max(gpus, 1)
    sequences = len(SyntheticDataset(config, length))
    if sequences < devices:
        assumptions += (f"a sequence for each GPU, though train.batch_tokens is only {sequences} sequences",)
        sequences = devices
    share = math.ceil(sequences / devices)
    model, train = config.model, config.train
    roofline = GPU if simulated else measure_roofline(here, train.batch_tokens, model.dim, model.mlp_dim)
    limit = gpu_memory_gib * 2**30 * USABLE if gpus else math.inf

    @cache
    def step(accumulation: int, checkpointing: bool) -> Step:
        parts = min(accumulation, 2)  # a third micro-batch needs no more memory than the second
        return measure_step(
            replace(config, train=replace(train, gradient_accumulation_steps=parts)),
            roofline,
            here,
            length=length,
            samples=math.ceil(share / accumulation) * parts,
            checkpointing=checkpointing,
            gpu_kernels=simulated,
        )

    def placement(checkpointing: bool, shards: int, accumulation: int) -> Placement:
        one, micro_batch = step(accumulation, checkpointing), math.ceil(share / accumulation)
        memory = _shard(one, shards, train.precision == "bf16")
        return Placement(
            shards=shards,
            checkpointing=checkpointing,
            sequences=micro_batch,
            gradient_accumulation_steps=accumulation,
            memory=memory,
            seconds=one.passes * share / (micro_batch * min(accumulation, 2)) + one.update / shards,
            fits=memory.total <= limit,
        )

    first = min(train.gradient_accumulation_steps, share)
    more = [first << i for i in range(1, share.bit_length()) if first << i <= share]

    def best(checkpointing: bool, shards: int) -> Placement:
        """With the largest micro-batch that fits, or else the smallest."""
        widest = placement(checkpointing, shards, first)
        if widest.fits or not more:
            return widest
        enough = bisect_left(more, True, key=lambda a: placement(checkpointing, shards, a).fits)
        return placement(checkpointing, shards, more[min(enough, len(more) - 1)])

    checkpointing = (False, True) if gpus else (train.gradient_checkpointing,)
    placements = tuple(best(*way) for way in product(checkpointing, _shards(devices)))
    one = step(first, False)
    return Plan(
        parameters=one.parameters,
        tokens=int(SyntheticDataset(config, length, sequences).costs.sum()),
        max_steps=train.max_steps,
        forward_flops=one.forward_flops // one.tokens,
        training_flops=(one.forward_flops + one.backward_flops) // one.tokens,
        precision=train.precision,
        devices=devices,
        roofline=str(roofline),
        assumptions=assumptions,
        placements=placements,
        chosen=next((placement for placement in placements if placement.fits), None),
    )


def _short(count: int) -> str:
    """Such as 13.1 M."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,}"


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _time(seconds: float) -> str:
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} seconds"


def _shards(devices: int) -> list[int]:
    """Replicated, sharded within a machine, sharded over all."""
    return sorted({1, devices, *([NODE] if devices % NODE == 0 else [])})


def _shard(step: Step, shards: int, bf16: bool) -> Memory:
    """Memory of one of the devices that share the weights.

    FSDP2 gathers what is outside the blocks for the whole step, and two blocks, the one in use and the
    next; and one of them has whole gradients until they are summed over the devices.
    """
    if shards == 1:
        return step.memory
    memory, largest = step.memory, max(step.blocks)
    outside = memory.weights - sum(step.blocks)
    gathered = outside + 2 * largest + max(outside, largest)
    return Memory(
        weights=memory.weights // shards,
        copies=gathered // 2 if bf16 else gathered,
        gradients=4 * step.parameters // shards,
        optimizer=memory.optimizer // shards,
        activations=step.most_activations,
    )
