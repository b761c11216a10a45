"""Which engine and precision a model runs with, and the replacement of its modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NoReturn, cast, get_args

import torch
from torch import Tensor, nn

from qkv.attention import Attention, Pattern
from qkv.config import GPTConfig, InferencePrecision, ModelConfig, TransformerConfig
from qkv.errors import InputError
from qkv.fast import native, sample
from qkv.fast.graphs import GraphedStack
from qkv.fast.native import NativeEmbedding, NativeLinear, NativeOutput, NativeStack, UnavailableError
from qkv.fast.packed import PackedEmbedding, PackedLinear, PackedOutput
from qkv.fast.sample import SampledOutput, SampledStack
from qkv.files import measured
from qkv.layers import Block, FeedForward, Output, Stack
from qkv.models import Model
from qkv.models.vit import ConvolutionalStem, PatchEmbedding, ViT
from qkv.ragged import Layout
from qkv.runtime import (
    device_name,
    keep_few_kernels,
    keep_freed_memory,
    multiplies_bfloat16,
    return_freed_memory,
    shortest,
)
from qkv.unread import Unread

Engine = Literal["native", "torch", "graphs"]


@dataclass(frozen=True)
class Road:
    """One way of computing a model's blocks."""

    engine: Engine
    precision: InferencePrecision


def optimize(
    model: Model,
    precision: InferencePrecision | Literal["auto"] = "auto",
    unread: Unread | None = None,
) -> Road:
    """Make a model answer faster, in place; returns the road that it takes from now on.

    precision: of the products with the weights of the blocks, of the output and of an image's patches.
    fp32: as trained. bf16: rounded to 8 bits of mantissa. int8: weights and activations rounded to 8
    bits, with a scale for every token and every output; which inputs are large is seen on random tokens
    or noise, so no data are needed. In both, embeddings of tokens are kept in bf16. auto: fp32 or bf16;
    on a GPU bf16 if it multiplies that. Of several roads it is the one that a trial on this machine found
    fastest, which is remembered in the cache folder. Where there is no compiled code a warning says why,
    and int8 becomes bf16, and both fp32 on a CPU that does not multiply bf16. Weights go once they are
    packed, so the model only answers from then on: it can neither be trained nor saved. unread: what a
    model on the CPU still waits for; each block's is read when the block is packed, so that all weights
    are never in memory as they were trained. Raises InputError if they are packed already, for int8 on a
    GPU, and for a precision that there is not.
    """
    if precision not in (*get_args(InferencePrecision), "auto"):
        raise InputError(f"no precision {precision!r}; there are fp32, bf16, int8 and auto")
    if any(isinstance(module, _QUICK) for module in model.modules()):
        raise InputError("this model is optimized already: load it anew for another precision")
    model.eval().requires_grad_(False)
    unread = unread or Unread({})
    device = next(model.parameters()).device
    if device.type != "cpu":
        if precision == "int8":
            raise InputError("int8 is for CPUs: use bf16 on a GPU")
        half = precision == "bf16" or (precision == "auto" and multiplies_bfloat16(device))
        model.to(torch.bfloat16 if half else torch.float32)
        engine: Engine = "torch"
        if device.type == "cuda":
            engine = "graphs"
            for name in _named(model, Stack):
                _replace(model, name, GraphedStack)
        return Road(engine, "bf16" if half else "fp32")
    keep_few_kernels()
    config = cast(ModelConfig, model.config)
    road = _fastest(_roads(config, precision), config)
    pack = _pack_int8 if road.precision == "int8" else _pack
    pack(model, config, road, unread)
    keep_freed_memory()  # every batch takes and frees the same large blocks
    return road


def _pack(model: Model, config: ModelConfig, road: Road, unread: Unread) -> None:
    """Replace the modules for a road in fp32 or bf16."""
    if not isinstance(model, ViT):
        unread.into(model.tokens, "tokens.")
        for name in _named(model, Output):
            _replace(model, name, partial(_output, embeddings=model.tokens.weight, road=road))
        if not _share_embeddings(model) and road.precision != "fp32":
            _replace(model, "tokens", lambda tokens: PackedEmbedding(tokens.weight))
    for name in _named(model, Stack):
        _replace(model, name, partial(_stack, name=name, config=config, road=road, unread=unread))
    unread.into(model)
    for name in _to_tokens(model):
        _replace(model, name, partial(_linear, road=road))


def _pack_int8(model: Model, config: ModelConfig, road: Road, unread: Unread) -> None:
    """Replace the modules for the road in int8, while a sample goes through the model."""
    stacks, outputs = _named(model, Stack), _named(model, Output)
    projections = _to_tokens(model)
    if not isinstance(model, ViT):
        unread.into(model.tokens, "tokens.")
        _replace(model, "tokens", lambda tokens: PackedEmbedding(tokens.weight))
    try:
        for name in stacks:
            blocks = _taken(cast(Stack, model.get_submodule(name)), unread, name)
            _replace(model, name, lambda _, blocks=blocks: SampledStack(blocks, config))  # type: ignore[misc]
        for name in outputs:
            _replace(model, name, lambda _: SampledOutput())
        unread.into(model, but=stacks)
        with sample.watched(map(model.get_submodule, (*outputs, *projections))) as largest:
            sample.run(model)
        seen = {name: largest[model.get_submodule(name)] for name in (*outputs, *projections)}
        for name in stacks:
            _replace(model, name, lambda stack: stack.packed)
        for name in outputs:
            embeddings = cast(Tensor, model.get_submodule("tokens").weight)
            made = partial(_output, embeddings=embeddings, road=road, largest=seen[name])
            _replace(model, name, made)
        _share_embeddings(model)
        for name in projections:
            _replace(model, name, partial(_linear, road=road, largest=seen[name]))
    except BaseException:
        for name in (*stacks, *outputs):
            _replace(model, name, lambda _: Halfway())
        raise


def _share_embeddings(model: Model) -> bool:
    """Whether there is a packed output, which embeds tokens from then on: their matrix is kept once."""
    output = next((module for module in model.modules() if isinstance(module, NativeOutput)), None)
    if output is not None:
        _replace(model, "tokens", lambda tokens: NativeEmbedding(output, tokens.dtype))
    return output is not None


def _roads(config: ModelConfig, precision: InferencePrecision | Literal["auto"]) -> list[Road]:
    """Those that compute in this precision here."""
    precisions: list[InferencePrecision] = ["fp32", "bf16"] if precision == "auto" else [precision]
    try:
        native.check(config)
    except UnavailableError as error:
        said = f"qkv runs on PyTorch's operators alone: {error}"
        if precision == "int8" or (precision == "bf16" and not multiplies_bfloat16(torch.device("cpu"))):
            precisions = ["bf16" if multiplies_bfloat16(torch.device("cpu")) else "fp32"]
            said = f"{said}; {precision} needs more than these, so {precisions[0]} is used"
        warnings.warn(said, stacklevel=3)
        return [Road("torch", one) for one in precisions]
    roads = [Road("native", one) for one in precisions]
    return roads + [Road("torch", one) for one in precisions if one != "int8"]


# ---------------------------------------------------------------- the modules


class Halfway(nn.Module):
    """In the place of a module whose weights were being packed when this was interrupted."""

    def forward(self, *_: object, **__: object) -> NoReturn:
        """Raises InputError."""
        raise InputError("optimizing this model was interrupted: load it anew")


_QUICK = (
    Halfway,
    GraphedStack,
    NativeStack,
    NativeEmbedding,
    NativeLinear,
    NativeOutput,
    PackedEmbedding,
    PackedLinear,
    PackedOutput,
)


def _named(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """Names of the modules of these kinds."""
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _to_tokens(model: nn.Module) -> list[str]:
    """Names of the matrices by which pixels become tokens."""
    patches = (f"{name}.projection" for name in _named(model, PatchEmbedding))
    return [*patches, *(f"{name}.last" for name in _named(model, ConvolutionalStem))]


def _replace(model: nn.Module, name: str, made_of: Callable[[Any], nn.Module]) -> None:
    """Put what is made of a module into its place."""
    parent, _, own = name.rpartition(".")
    where = model.get_submodule(parent)
    module = getattr(where, own)
    setattr(where, own, Halfway())  # stays if this is interrupted
    setattr(where, own, made_of(module))
    del module
    return_freed_memory()  # the weights that are packed now


def _stack(stack: Stack, name: str, config: ModelConfig, road: Road, unread: Unread) -> nn.Module:
    """What takes the place of a stack of that name, whose tensors may still be unread."""
    if road.engine == "native":
        return NativeStack(((block, {}) for block in _taken(stack, unread, name)), config, road.precision)
    if road.precision == "bf16":
        for i, block in enumerate(stack):
            unread.into(block, f"{name}.{i}.")
            for module in block.modules():
                if isinstance(module, Attention | FeedForward):
                    for own, child in list(module.named_children()):
                        if isinstance(child, nn.Linear):
                            setattr(module, own, _linear(child, road))
    return stack


def _taken(stack: Stack, unread: Unread, name: str) -> Iterator[Block]:
    """The blocks of a stack with their weights, first to last; it is left empty."""
    for i in range(len(stack)):
        unread.into(stack[0], f"{name}.{i}.")
        yield cast(Block, stack.pop(0))


def _linear(linear: nn.Linear, road: Road, largest: Tensor | None = None) -> nn.Module:
    """The same one where the road has none of such a width, or none of its own."""
    if road.engine == "native" and linear.in_features % 16 == 0:
        return NativeLinear(linear.weight, linear.bias, road.precision, largest)
    if road.engine == "torch" and road.precision == "bf16":
        return PackedLinear(linear.weight, linear.bias)
    return linear


def _output(output: nn.Module, embeddings: Tensor, road: Road, largest: Tensor | None = None) -> nn.Module:
    if road.engine == "native":
        return NativeOutput(embeddings, road.precision, largest)
    return PackedOutput(embeddings) if road.precision == "bf16" else output


# ---------------------------------------------------------------- the trial


def _fastest(roads: list[Road], config: ModelConfig) -> Road:
    """The road that takes the least time for a block of the model's sizes; measured once on a machine."""
    if len(roads) == 1:
        return roads[0]
    cpu, sizes = device_name(torch.device("cpu")), (config.dim, config.heads, config.mlp_dim)
    kind = "decodes" if _decodes(config) else "reads"
    about = f"{cpu}; torch {torch.__version__}; native {native.version()}; {sizes} {kind}"

    def seconds(road: Road) -> float:
        key = f"{about}; {road.engine} {road.precision}"
        return measured("roads.json", key, lambda: _seconds(road, config))

    return min(roads, key=seconds)


def _decodes(config: ModelConfig) -> bool:
    return isinstance(config, GPTConfig | TransformerConfig)


@torch.inference_mode()
def _seconds(
    road: Road, config: ModelConfig, sequences: int = 16, length: int = 32, budget: float = 0.3
) -> float:
    """How long a block of these sizes takes for so many sequences; of several trials the shortest time.

    If the model decodes, they are read and then as long ones are written, token by token: then a road is fast
    that is fast with few tokens. By one thread: two that wait for each other on a busy machine would be
    measured by how busy it is.
    """
    # A trial that is remembered draws nothing either.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        block = _stack(Stack(replace(config, depth=1)).eval(), "", config, road, Unread({}))

    def once(length: int) -> float:
        layout = Layout((length,) * sequences, torch.device("cpu"))
        x = torch.linspace(-1, 1, layout.tokens * config.dim, device="cpu").view(layout.tokens, -1)
        return shortest(lambda: block(x.clone(), Pattern(layout, layout)), x.device, budget)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return once(length) + (length * once(1) if _decodes(config) else 0.0)
    finally:
        torch.set_num_threads(threads)
