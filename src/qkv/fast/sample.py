"""How large the inputs of matrices become, seen on a sample that needs no data: int8 rounds by it.

A few inputs of a Transformer are far larger than the others, and always the same ones (Xiao et al. 2023,
"SmoothQuant", 3). They are found with random tokens, too: on MiniLM's vectors as well as with sentences.

Legend: T tokens of the batch, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.attention import Attention, KeyValue, Pattern
from qkv.config import ModelConfig
from qkv.fast.native import Largest, NativeStack
from qkv.layers import Block
from qkv.models import Model
from qkv.models.transformer import Transformer
from qkv.models.vit import ViT
from qkv.ragged import pack
from qkv.runtime import return_freed_memory

TOKENS, LENGTH = 512, 32


@torch.no_grad()
def run(model: Model) -> None:
    """The model on random tokens, or on noise that is smooth as photographs are."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        if isinstance(model, ViT):
            config = model.config
            side, patches = config.image_size, (config.image_size // config.patch_size) ** 2
            images = torch.zeros((), dtype=torch.float32)
            for blur in (1, 4, 16):
                size = (max(TOKENS // patches, 1), config.channels, *[max(side // blur, 1)] * 2)
                noise = torch.randn(size, generator=generator, dtype=torch.float32)
                images = images + F.interpolate(noise, side, mode="bilinear")
            model(images)
            return
        length = min(LENGTH, model.config.context)
        size = (2, TOKENS // length, length)
        first, second = torch.randint(model.config.vocab_size, size, generator=generator).unbind()
        if isinstance(model, Transformer):
            model(pack(first), pack(second))
        else:
            model(pack(first))


@contextmanager
def watched(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """The largest magnitudes of each module's first argument (..., D) while this lasts: (D,)."""
    largest: dict[nn.Module, Tensor] = {}

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        most = reach(inputs[0])
        largest[module] = torch.maximum(largest.get(module, most), most)

    hooks = [module.register_forward_pre_hook(see) for module in modules]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


def reach(x: Tensor) -> Tensor:
    """x (..., D) -> its largest magnitudes (D,)."""
    return x.detach().float().flatten(0, -2).abs().amax(0)


class SampledStack(nn.Module):
    """In the place of a stack: each block is packed for int8 once the sample has gone through it."""

    def __init__(self, blocks: Iterator[Block], config: ModelConfig) -> None:
        super().__init__()
        self.blocks, self.config = blocks, config
        self.packed: NativeStack | None = None

    def forward(
        self,
        x: Tensor,
        pattern: Pattern,
        *,
        rotation: KeyValue | None = None,
        caches: None = None,
        memory: Sequence[Tensor] = (),
        memory_pattern: Pattern | None = None,
    ) -> Tensor:
        """As `layers.Stack`, but for memory, which `read` leaves as it is."""

        def seen() -> Iterator[tuple[Block, Largest]]:
            nonlocal x
            for block in self.blocks:
                with watched(m for m in block.modules() if isinstance(m, Attention | nn.Linear)) as largest:
                    read = block.cross.read(memory[0]) if block.cross is not None else None
                    x = block(
                        x, pattern, rotation=rotation, memory=read, memory_pattern=memory_pattern
                    )  # (T, D)
                if block.cross is not None:
                    largest[block.cross.qkv] = reach(memory[0])
                yield block, largest
                del block, largest  # before the next one comes
                return_freed_memory()

        self.packed = NativeStack(seen(), self.config, "int8")
        return x

    def read(self, memory: Tensor) -> Sequence[Tensor]:
        """Itself."""
        return [memory]


class SampledOutput(nn.Module):
    """In the place of `layers.Output`: its answer is not needed."""

    def forward(self, hidden: Tensor, embeddings: Tensor, bias: Tensor | None = None) -> Tensor:
        """hidden (..., D), embeddings (V, D) -> (..., V), zeros in one place of memory."""
        return hidden.new_zeros(1).expand(*hidden.shape[:-1], len(embeddings))
