"""The processes of a run: one, or several that torchrun started, each with a device of its own.

torch calls them ranks. Weights are replicated or sharded over them by FSDP2 (`fully_shard`), in one
mesh of (ranks / shard_ranks, shard_ranks): shard_ranks 1 is data-parallel training with whole copies,
all ranks is ZeRO stage 3 (Rajbhandari et al. 2020, 5), and what is between is a mixture of both.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from qkv.attention import Attention
from qkv.errors import InputError
from qkv.layers import Block
from qkv.runtime import pick_device

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others before it gives them up as lost."""

PATIENCE = timedelta(days=30)
"""The same at a barrier; a rank that is gone is noticed at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is."""

    rank: int = 0
    count: int = 1
    local: int = 0
    """Its number among those on this machine."""
    patient: torch.distributed.ProcessGroup | None = None
    """All of them, waiting for each other as long as it takes."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def device(self) -> torch.device:
        """This rank's device."""
        device = pick_device()
        return torch.device("cuda", self.local) if device.type == "cuda" else device

    def barrier(self) -> None:
        """Wait for all ranks, one of which may be preparing data for hours."""
        if self.count > 1:
            torch.distributed.barrier(self.patient)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of the values, added up over all ranks."""
        return self._reduce(values, "sum")

    def max(self, value: float) -> float:
        """The largest value that a rank gives."""
        return self._reduce([value], "max")[0]

    def failure(self, error: RuntimeError) -> str:
        """What torch's error says of this rank, in one line."""
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return f"rank {self.rank} failed, or lost another rank ({said})"

    def share(self, items: Sequence[T], spare: T) -> list[tuple[T, bool]]:
        """This rank's of the items, and whether they count.

        Sharded weights are gathered by all ranks at once, so each gets equally many: where there is none for
        it, the spare one, which does not count.
        """
        mine = [(item, True) for item in items[self.rank :: self.count]]
        return mine + [(spare, False)] * (math.ceil(len(items) / self.count) - len(mine))

    def gather(self, value: T) -> list[T]:
        """What every rank gives, in their order."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return cast("list[T]", values)

    def _reduce(self, values: Sequence[float], operation: Literal["sum", "max"]) -> list[float]:
        if self.count == 1:
            return list(values)
        ops = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}
        total = torch.tensor(values, dtype=torch.float64, device=self.device())
        torch.distributed.all_reduce(total, ops[operation])
        return cast("list[float]", total.tolist())


ALONE = Ranks()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the ranks that torchrun started; without torchrun this process is alone.

    Among several ranks torch's errors become InputErrors: most tell that another rank is gone, which has
    told its own reason.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    ranks = Ranks(int(os.environ["RANK"]), count, int(os.environ["LOCAL_RANK"]))
    device = ranks.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield replace(ranks, patient=torch.distributed.new_group(backend="gloo", timeout=PATIENCE))
    except RuntimeError as error:
        raise InputError(ranks.failure(error)) from error
    finally:
        torch.distributed.destroy_process_group()


def groups(ranks: Ranks, shard_ranks: int) -> int:
    """How many groups of so many ranks there are. Raises InputError if the ranks cannot be so divided."""
    if ranks.count % shard_ranks:
        raise InputError(
            f"train.shard_ranks is {shard_ranks}, which does not divide the {ranks.count} ranks of this run: "
            "lower it, or start more with torchrun"
        )
    return ranks.count // shard_ranks


def spread(root: nn.Module, ranks: Ranks, shard_ranks: int, bf16: bool) -> None:
    """Divide the weights of an `Objective` over the ranks, in place; each block is gathered on its own.

    bf16: gather them in bfloat16; gradients are added up in float32 in any case, and not averaged.
    Raises InputError if the ranks cannot be divided into groups of shard_ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    shape = (groups(ranks, shard_ranks), shard_ranks)
    mesh = init_device_mesh(ranks.device().type, shape, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    blocks = [module for module in root.modules() if isinstance(module, Block)]
    # Memory is read into keys and values outside the block's own forward pass.
    crosses = [block.cross for block in blocks if isinstance(block.cross, Attention)]
    for module in (*crosses, *blocks, root):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=shard_ranks > 1)
    for cross in crosses:
        register_fsdp_forward_method(cross, "read")
    # `read` gives views, and nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    register_fsdp_forward_method(root, "terms")
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # A step's loss is divided by its items on all ranks, so that gradients are only added up.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; every rank must ask for it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, with its parts where those of another are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
