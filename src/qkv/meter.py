"""What code costs on torch tensors: memory, floating-point operations and memory traffic, all counted.

A `Meter` sees every operator that runs inside it. Under FakeTensorMode nothing is computed or allocated,
so the step of a model that fits no machine is counted as exactly as that of a small one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten

_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch counts the kernels of GPUs only.
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}

Phase = Literal["forward", "backward", "update"]
"""Update: what runs without gradients, such as the optimiser."""


@dataclass(frozen=True)
class Work:
    """What one operator does: floating-point operations, bytes read and written, type of its matrices."""

    phase: Phase
    flops: int
    traffic: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Peak:
    """Bytes alive at one moment, and how many of them are gradients and copies of weights."""

    total: int = 0
    gradients: int = 0
    copies: int = 0

    @property
    def rest(self) -> int:
        """Bytes that are neither."""
        return self.total - self.gradients - self.copies


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs in its `with` block.

    It sees tensors as they come and go, not what a kernel needs inside one call. Under FakeTensorMode
    there are no numbers to read back: a truth that code asks for is False, a number 1.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self._sizes: dict[int, int] = {}
        self._copies: set[int] = set()
        self._copied = 0
        self.start(())

    def start(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget all but what is alive; gradients are from now on those of these parameters."""
        self._parameters = list(parameters)
        self._gradients = 0
        self._stale = True
        self.peak = Peak(self.live)
        """The moment with most bytes alive."""
        self.widest = Peak(self.live)
        """The moment with most bytes that are neither gradients nor copies of weights."""
        self.work: list[Work] = []

    def flops(self, *phases: Phase) -> int:
        """Floating-point operations of phases; a multiplication with its addition counts as two."""
        return sum(work.flops for work in self.work if work.phase in phases)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 1.0
        out = func(*args, **kwargs)
        fresh = [t for t in tree_leaves(out) if isinstance(t, Tensor) and self._is_new(t)]
        if fresh or func._schema.is_mutable:
            if func is aten._to_copy.default and isinstance(args[0], nn.Parameter):
                self._copies.add(fresh[0].untyped_storage()._cdata)
                self._copied += fresh[0].untyped_storage().nbytes()
            self._note(func, args, kwargs, out, fresh)
        self._stale = self._stale or _phase() == "backward"
        # Within a step gradients only grow: those last counted are not too many.
        rest = self.live - self._copied - self._gradients
        if fresh and (self.live > self.peak.total or rest > self.widest.rest):
            self._look()
        return out

    def _is_new(self, tensor: Tensor) -> bool:
        """Whether this is the first sight of the tensor's memory; then follow it to its end."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._freed, key).atexit = False
        return True

    def _freed(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.live -= size
        if key in self._copies:
            self._copies.remove(key)
            self._copied -= size

    def _look(self) -> None:
        """Remember this moment if it is a peak."""
        if self._stale:
            gradients = (p.grad for p in self._parameters)
            self._gradients = sum(g.untyped_storage().nbytes() for g in gradients if g is not None)
            self._stale = False
        now = Peak(self.live, self._gradients, self._copied)
        self.peak = max(self.peak, now, key=lambda moment: moment.total)
        self.widest = max(self.widest, now, key=lambda moment: moment.rest)

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any, fresh: Sequence[Tensor]) -> None:
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        changed = [
            named[a.name]
            for a in func._schema.arguments
            if a.name in named and a.alias_info is not None and a.alias_info.is_write
        ]
        written = [*fresh, *(t for t in tree_leaves(changed) if isinstance(t, Tensor))]
        formula = _FLOPS.get(func.overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
        traffic = 0 if "empty" in func.overloadpacket.__name__ else sum(map(_size, read + written))
        if tensors := read or written:
            self.work.append(Work(_phase(), flops, traffic, tensors[0].dtype))


def _phase() -> Phase:
    if torch._C._current_graph_task_id() != -1:
        return "backward"
    return "forward" if torch.is_grad_enabled() else "update"


def _size(tensor: Tensor) -> int:
    """Bytes of the elements, those of an expanded dimension once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
