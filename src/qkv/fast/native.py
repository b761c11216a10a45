"""Blocks in C++: `cpp/blocks.cpp`, compiled on first use, and the modules that hand tensors to it.

The modules stand in the place of `layers.Stack`, `layers.Output` and `nn.Linear`, take the same arguments and
give the same answers as far as their precision goes. They only answer: they keep packed weights, from which
there is no way back to a checkpoint, and no gradients.

Legend: T tokens of the batch (S of sources), N sequences, D model width, H heads, E = D / H head width.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shlex
import subprocess
import warnings
from array import array
from collections.abc import Iterable, Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from torch import Tensor, nn

from qkv.attention import KeyValue, Pattern, Tap, Tappable
from qkv.config import Activation, ModelConfig
from qkv.config import InferencePrecision as Precision
from qkv.errors import InputError
from qkv.files import cache_folder, reason, sync
from qkv.kv_cache import LayerCache
from qkv.layers import Block

# ---------------------------------------------------------------- the library

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")
WITHOUT_AMX = "-DAMX=0"
"""For a system that does not give its registers to this process."""
FEATURES = ("avx2", "fma3")
"""Of a CPU, as torch calls them."""
ORDER: dict[Precision, int] = {"fp32": 0, "bf16": 1, "int8": 2}
"""Numbers of the enumerations in cpp/."""
ACTIVATIONS: dict[Activation, int] = {"relu": 0, "relu2": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}

FLOORS: dict[Activation, float] = {
    "relu": 0.0,
    "relu2": 0.0,
    "gelu": -0.171,
    "gelu_tanh": -0.171,
    "silu": -0.279,
}
"""What no answer of an activation is below."""


class UnavailableError(Exception):
    """Why there is no compiled code for this machine, in one line."""


@once
def library() -> ctypes.CDLL:
    """The compiled code; built once for a CPU and a version of the source, then kept in the cache folder.

    Raises UnavailableError for a CPU that it is not written for, and where there is no compiler or the folder
    cannot be written, or nothing in it be executed.
    """
    if missing := [name for name in FEATURES if not torch.cpu.get_capabilities().get(name)]:
        raise UnavailableError(f"this CPU lacks {', '.join(missing)}")
    found = _loaded(FLAGS)
    if not found.qkv_allowed():
        found = _loaded((*FLAGS, WITHOUT_AMX))
    found.qkv_packed_bytes.restype = found.qkv_scales.restype = c_int64
    return found


def _loaded(flags: Sequence[str]) -> ctypes.CDLL:
    """The code as it is compiled with these flags."""
    compiler = _compiler()
    key = repr((version(), *flags, compiler, sorted(torch.cpu.get_capabilities().items())))
    path = cache_folder() / "native" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # not compiled yet, or on another system
        _build([*compiler, *flags], path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # a folder from which nothing may be executed
        raise UnavailableError(f"cannot load {path}: {reason(error)}") from None


def _build(command: list[str], path: Path) -> None:
    warnings.warn("compiling for this CPU: ten to twenty seconds, only this time", stacklevel=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as own:  # other processes may be compiling it too
            made = Path(own) / path.name
            _compile(command, made)
            sync(made)
            made.replace(path)
    except OSError as error:
        raise UnavailableError(f"cannot write {path}: {reason(error)}") from None


def check(config: ModelConfig) -> None:
    """Raises UnavailableError for a model of sizes that the code does not take, and as `library` does."""
    head_dim = config.dim // config.heads
    for kind, width, most in (
        ("", config.dim, 8192),
        (" of its heads", head_dim, 256),
        (" of its inner layer", config.mlp_dim, 65536),
    ):
        if width % 16 or width > most:
            raise UnavailableError(
                f"the model's width{kind} is {width}; it needs a multiple of 16 up to {most}"
            )
    library()


def version() -> str:
    """Changes with the sources."""
    files = sorted(SOURCES.iterdir())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _compiler() -> list[str]:
    said = os.environ.get("CXX") or "c++"
    try:
        return shlex.split(said) or ["c++"]
    except ValueError as error:
        raise UnavailableError(f"CXX is {said!r}: {error}") from None


def _compile(command: list[str], out: Path) -> None:
    try:
        subprocess.run(
            [*command, str(SOURCES / "blocks.cpp"), "-o", str(out)],
            check=True,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        raise UnavailableError(f"there is no C++ compiler {command[0]!r}; install one, or set CXX") from None
    except OSError as error:
        raise UnavailableError(f"{command[0]} is no C++ compiler: {reason(error)}; set CXX") from None
    except subprocess.CalledProcessError as error:
        said = next((line for line in error.stderr.splitlines() if "error" in line), "no reason given")
        raise UnavailableError(f"{command[0]} cannot compile {SOURCES.name}/blocks.cpp: {said}") from None


class CMatrix(Structure):
    """`Matrix` of cpp/interface.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "scale", "start", "ease", "bias")),
        ("floor", c_float),
        *((name, c_int32) for name in ("inputs", "outputs")),
    ]


class CNorm(Structure):
    """`Norm` of cpp/interface.h."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float)]


class CLayer(Structure):
    """`Layer` of cpp/interface.h."""

    _fields_ = [(name, CMatrix) for name in ("qkv", "out", "cross_query", "cross_out", "up", "down")] + [
        (name, CNorm) for name in ("attention", "cross", "mlp", "query", "key")
    ]


class CStack(Structure):
    """`Stack` of cpp/interface.h."""

    _fields_ = [("layers", POINTER(CLayer))] + [
        (name, c_int32) for name in ("precision", "dim", "heads", "mlp_dim", "activation", "norm_first")
    ]


class CBatch(Structure):
    """`Batch` of cpp/interface.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "lengths")),
        *((name, c_int32) for name in ("sequences", "threads", "first", "last", "causal")),
        *(
            (name, c_void_p)
            for name in ("cosine", "sine", "keys", "values", "places", "key_lengths", "masks")
        ),
        *((name, c_int32) for name in ("capacity", "half", "memory_stride", "memory_half")),
        *((name, c_void_p) for name in ("memory_keys", "memory_values", "memory_starts", "memory_lengths")),
        *((name, c_void_p) for name in ("seen_qkv", "seen_answer", "seen_query", "seen_cross")),
    ]


# ---------------------------------------------------------------- linear maps


def _floats(x: Tensor) -> Tensor:
    """What compiled code can read. Raises InputError for what is on a GPU."""
    if x.device.type != "cpu":
        raise InputError("the weights of an optimized model stay on the CPU: load it anew for a GPU")
    return x.float().contiguous()


RARE = 0.5
"""Of the mean reach of inputs, what is taken for those of which a sample showed less: they may have more."""

AT_ONCE = 4096
"""Rows of a matrix that are packed at a time, whole panels: a vocabulary would be in memory twice."""


def _ease(weight: Tensor, largest: Tensor | None) -> Tensor:
    """By what inputs are multiplied, and their columns of weight (outputs, inputs) divided: (inputs,).

    The product stays the same. Inputs and columns become alike in their largest magnitudes (Xiao et al. 2023,
    equation 4 with alpha 1/2).
    """
    own = torch.maximum(weight.amax(0), -weight.amin(0))  # (inputs,)
    if largest is None:
        return torch.ones_like(own, dtype=torch.float32)
    own, largest = (x.float().nan_to_num(0, 0) for x in (own, largest))
    return (own.clamp(min=1e-9) / largest.clamp(min=RARE * largest.mean() + 1e-9)).sqrt()


def _bytes(count: int) -> Tensor:
    """(count,), in large pages where the system gives them, which it does when they are written to."""
    made = torch.empty(count, dtype=torch.uint8, device="cpu")
    library().qkv_huge_pages(c_void_p(made.data_ptr()), c_int64(count))
    return made


class Room:
    """For the packed weights of many matrices, which alone would not fill their pages."""

    CHUNK = 64 << 20

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, count: int) -> Tensor:
        """(count,), from a multiple of 64 bytes on."""
        if count > len(self._free):
            self._free = _bytes(max(count, self.CHUNK))
        taken, self._free = self._free[:count], self._free[(count + 63) // 64 * 64 :]
        return taken


class NativeLinear(nn.Module):
    """x W^T + bias with packed weights."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        precision: Precision,
        largest: Tensor | None = None,
        floor: float = -math.inf,
        room: Room | None = None,
    ) -> None:
        """weight (outputs, inputs), the inputs a multiple of 16; bias (outputs,).

        room: where they are packed. Only int8 asks for the rest. largest: magnitudes that the inputs reach
        (inputs,). floor: what no input is below; then numbers that do not occur take none of the 256.
        """
        super().__init__()
        self.outputs, self.inputs = weight.shape
        self.order = ORDER[precision]
        int8 = precision == "int8"
        weight = weight.detach()
        self.bias = None if bias is None else bias.detach().float().clone()
        self.floor = floor if int8 and self.bias is not None else -math.inf
        self.ease = _ease(weight, largest) if int8 else None
        code = library()
        size = code.qkv_packed_bytes(self.order, self.outputs, self.inputs)
        self.packed = room.take(size) if room else _bytes(size)
        scales = code.qkv_scales(self.order, self.outputs)
        self.scale = torch.empty(scales, dtype=torch.float32, device="cpu")
        self.start = torch.empty_like(self.scale, dtype=torch.int32)
        for first in range(0, self.outputs, AT_ONCE):
            rows = weight[first : first + AT_ONCE].float().contiguous()
            if self.ease is not None:
                rows = rows / self.ease
                if self.bias is not None and self.floor > -math.inf:
                    scale = rows.abs().amax(1, keepdim=True) / 127
                    rounded = (rows / scale).round().nan_to_num() * scale * self.ease
                    self.bias[first : first + AT_ONCE] += self.floor * rounded.sum(1)
            done = code.qkv_packed_bytes(self.order, first, self.inputs), code.qkv_scales(self.order, first)
            code.qkv_pack(
                self.order,
                c_void_p(rows.data_ptr()),
                *rows.shape,
                c_float(self.floor),
                c_void_p(self.packed[done[0] :].data_ptr()),
                *(c_void_p(x[done[1] :].data_ptr()) for x in (self.scale, self.start)),
                torch.get_num_threads(),
            )

    def matrix(self) -> CMatrix:
        """Where it is; valid while this module lives."""
        tensors = (self.packed, self.scale, self.start, self.ease, self.bias)
        places = (None if x is None else x.data_ptr() for x in tensors)
        return CMatrix(*places, self.floor, self.inputs, self.outputs)

    def check(self, x: Tensor) -> None:
        """Raises ValueError for vectors of another width: the compiled code would read beyond them."""
        if x.shape[-1] != self.inputs:
            raise ValueError(f"vectors of {x.shape[-1]} values for a matrix with {self.inputs} inputs")

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs), float32."""
        self.check(x)
        x = _floats(x)
        out = x.new_empty(*x.shape[:-1], self.outputs)
        rows = x.numel() // self.inputs
        where = c_void_p(x.data_ptr()), rows, c_void_p(out.data_ptr())
        library().qkv_linear(byref(self.matrix()), self.order, *where, torch.get_num_threads())
        return out


class NativeOutput(nn.Module):
    """`layers.Output` with a packed copy of the embeddings."""

    def __init__(self, embeddings: Tensor, precision: Precision, largest: Tensor | None = None) -> None:
        """embeddings (V, D); largest (D,): as of `NativeLinear`."""
        super().__init__()
        self.linear = NativeLinear(embeddings, None, precision, largest)

    def forward(self, hidden: Tensor, embeddings: Tensor, bias: Tensor | None = None) -> Tensor:
        """hidden (..., D), bias (V,) -> logits (..., V); `embeddings` are those that were packed."""
        logits: Tensor = self.linear(hidden)
        return logits if bias is None else logits.add_(bias)

    def likeliest(
        self, hidden: Tensor, embeddings: Tensor, bias: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor]:
        """As `layers.Output.likeliest`, without the logits of all tokens ever being in memory."""
        scores = torch.empty(len(hidden), count, dtype=torch.float32, device="cpu")
        return scores, self._find(hidden, bias, count, scores)

    def best(self, hidden: Tensor, embeddings: Tensor, bias: Tensor | None, count: int) -> Tensor:
        """As `layers.Output.best`."""
        return self._find(hidden, bias, count, None)

    def _find(self, hidden: Tensor, bias: Tensor | None, count: int, scores: Tensor | None) -> Tensor:
        """Ids (R, count), and their log-probabilities where there is a place for them."""
        self.linear.check(hidden)
        hidden = _floats(hidden)
        ids = hidden.new_empty(len(hidden), count, dtype=torch.long)
        matrix = self.linear.matrix()
        if bias is not None:
            bias = bias.float().contiguous()
            matrix.bias = bias.data_ptr()
        where = c_void_p(hidden.data_ptr()), len(hidden), count
        out = None if scores is None else c_void_p(scores.data_ptr()), c_void_p(ids.data_ptr())
        library().qkv_likeliest(byref(matrix), self.linear.order, *where, *out, torch.get_num_threads())
        return ids


class NativeEmbedding(nn.Module):
    """Embeddings that are kept in one place with the matrix of an output: as its packed weights."""

    def __init__(self, output: NativeOutput, dtype: torch.dtype) -> None:
        """dtype: of the answers."""
        super().__init__()
        self.linear = output.linear
        none = torch.empty(0, self.linear.inputs, dtype=dtype, device="cpu")
        self.weight = nn.Parameter(none, requires_grad=False)
        """(0, D): tells type and device; there are no embeddings here."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., D). Raises IndexError for an id that there is not."""
        linear, flat = self.linear, ids.reshape(-1).long().contiguous()
        if len(flat) and not 0 <= flat.min() <= flat.max() < linear.outputs:
            raise IndexError(f"ids from {flat.min()} to {flat.max()} for {linear.outputs} embeddings")
        found = torch.empty(*ids.shape, linear.inputs, dtype=torch.float32, device="cpu")
        where = c_void_p(flat.data_ptr()), len(flat), c_void_p(found.data_ptr())
        library().qkv_unpack(byref(linear.matrix()), linear.order, *where, torch.get_num_threads())
        return found.to(self.weight.dtype)


# ---------------------------------------------------------------- blocks


Largest = Mapping[nn.Module, Tensor]
"""Magnitudes that the inputs of a block's modules reach; `qkv` of cross-attention reads the memory."""


@dataclass
class NativeAttention:
    """What `record` taps of a layer."""

    heads: int
    tap: Tap | None = None


class NativeStack(nn.Module):
    """`layers.Stack` with packed weights; x is overwritten."""

    def __init__(
        self, blocks: Iterable[tuple[Block, Largest]], config: ModelConfig, precision: Precision
    ) -> None:
        """The blocks can come one by one: none is kept."""
        super().__init__()
        self.dim, self.heads = config.dim, config.heads
        self.kept = torch.float32 if precision == "fp32" else torch.bfloat16
        """How keys and values are remembered."""
        self.matrices, self.memory_maps = nn.ModuleList(), nn.ModuleList()
        self.norms: list[tuple[Tensor, Tensor]] = []  # as packed weights, where `.to` does not find them

        room = Room()

        def matrix(weight: Tensor, bias: Tensor, largest: Tensor | None, floor: float = -math.inf) -> CMatrix:
            self.matrices.append(NativeLinear(weight, bias, precision, largest, floor, room))
            return cast(NativeLinear, self.matrices[-1]).matrix()

        def norm(layer: nn.LayerNorm | None) -> CNorm:
            if layer is None:
                return CNorm()
            weight, bias = (x.detach().float().clone() for x in (layer.weight, layer.bias))
            self.norms.append((weight, bias))
            return CNorm(weight.data_ptr(), bias.data_ptr(), layer.eps)

        def packed(one: tuple[Block, Largest]) -> CLayer:
            block, largest = one
            own, cross, D = block.attention, block.cross, config.dim

            def linear(layer: nn.Linear, floor: float = -math.inf) -> CMatrix:
                return matrix(layer.weight, layer.bias, largest.get(layer), floor)

            layer = CLayer(
                qkv=linear(own.qkv),
                out=linear(own.out),
                up=linear(block.mlp.up),
                down=linear(block.mlp.down, FLOORS[config.activation]),
                attention=norm(block.attention_norm),
                mlp=norm(block.mlp_norm),
                query=norm(own.query_norm),
                key=norm(own.key_norm),
            )
            if cross is not None:
                layer.cross_query = matrix(cross.qkv.weight[:D], cross.qkv.bias[:D], largest.get(cross))
                layer.cross_out = linear(cross.out)
                layer.cross = norm(block.cross_norm)
                weight, bias = cross.qkv.weight[D:], cross.qkv.bias[D:]
                reach = largest.get(cross.qkv)
                self.memory_maps.append(NativeLinear(weight, bias, precision, reach, -math.inf, room))
            return layer

        layers = list(map(packed, blocks))  # a loop would hold on to a block while the next one comes
        self.layers = (CLayer * len(layers))(*layers)
        sizes = (config.dim, config.heads, config.mlp_dim)
        self.stack = CStack(
            self.layers, ORDER[precision], *sizes, ACTIVATIONS[config.activation], config.norm_first
        )
        self.own = [NativeAttention(config.heads) for _ in layers]
        self.cross = [NativeAttention(config.heads) for _ in self.memory_maps]

    def forward(
        self,
        x: Tensor,
        pattern: Pattern,
        *,
        rotation: KeyValue | None = None,
        caches: Sequence[LayerCache] | None = None,
        memory: Sequence[KeyValue] = (),
        memory_pattern: Pattern | None = None,
    ) -> Tensor:
        """As `layers.Stack`: x (T, D) -> (T, D), float32."""
        if x.shape != (pattern.queries.tokens, self.dim):
            raise ValueError(f"{tuple(x.shape)} for {pattern.queries.tokens} tokens of {self.dim} values")
        x = _floats(x)
        lengths = array("i", pattern.queries.lengths)
        batch = CBatch(
            x=x.data_ptr(),
            lengths=_address(lengths),
            sequences=len(lengths),
            threads=torch.get_num_threads(),
            causal=pattern.causal,
        )
        kept: list[object] = [lengths]  # what the batch points to
        if rotation is not None:
            turns = [turn.float().contiguous() for turn in rotation]
            batch.cosine, batch.sine = (turn.data_ptr() for turn in turns)
            kept.append(turns)
        if caches is not None:
            like = x.new_empty(0, self.heads, self.dim // self.heads, dtype=self.kept)
            reserved = [layer.reserve(like) for layer in caches]
            keys, values = map(_pointers, zip(*reserved, strict=True))
            cache, key_lengths = caches[0].cache, array("i", pattern.keys.lengths)
            batch.keys, batch.values = _address(keys), _address(values)
            batch.places, batch.capacity = cache.rows.data_ptr(), cache.capacity
            batch.half = reserved[0][0].dtype == torch.bfloat16  # perhaps of before this was packed
            batch.key_lengths = _address(key_lengths)
            kept += [keys, values, key_lengths]
        if pattern.masks:
            masks = array("Q", [0]) * len(lengths)
            for i, mask in pattern.masks.items():
                masks[i] = mask.data_ptr()
            batch.masks = _address(masks)
            kept.append(masks)
        if memory_pattern is not None:
            keys, values = map(_pointers, zip(*memory, strict=True))
            starts, memory_lengths = memory_pattern.keys.starts, array("i", memory_pattern.keys.lengths)
            batch.memory_keys, batch.memory_values = _address(keys), _address(values)
            batch.memory_starts, batch.memory_lengths = starts.data_ptr(), _address(memory_lengths)
            batch.memory_stride = memory[0][0].stride(0)
            batch.memory_half = memory[0][0].dtype == torch.bfloat16
            kept += [keys, values, starts, memory_lengths]
        self._run(batch, x, pattern, caches, memory, memory_pattern)
        return x

    def read(self, memory: Tensor) -> list[KeyValue]:
        """Each layer's keys and values of memory (S, D), for its cross-attention: (S, H, E) each."""
        shape = (-1, 2, self.heads, self.dim // self.heads)
        both = (module(memory).to(self.kept).view(shape) for module in self.memory_maps)
        return [(pair[:, 0], pair[:, 1]) for pair in both]

    def attentions(self) -> list[Tappable]:
        """What can be recorded of self-attention, first layer first."""
        return list(self.own)

    def crosses(self) -> list[Tappable]:
        """What can be recorded of cross-attention, first layer first."""
        return list(self.cross)

    def _run(
        self,
        batch: CBatch,
        x: Tensor,
        pattern: Pattern,
        caches: Sequence[LayerCache] | None,
        memory: Sequence[KeyValue],
        memory_pattern: Pattern | None,
    ) -> None:
        """All layers; those that are recorded end a call, which then shows what their kernels computed on."""
        T, D, shape = len(x), self.dim, (-1, self.heads, self.dim // self.heads)
        depth = len(self.own)
        taps = [(self.own[i].tap, self.cross[i].tap if self.cross else None) for i in range(depth)]
        for i, (own, cross) in enumerate(taps):
            if own is None and cross is None and i + 1 < depth:
                continue
            batch.last = i + 1
            if own is not None:
                packed, answer = x.new_empty(T, 3 * D), x.new_empty(T, D)
                batch.seen_qkv, batch.seen_answer = packed.data_ptr(), answer.data_ptr()
            if cross is not None:
                asked, told = x.new_empty(T, D), x.new_empty(T, D)
                batch.seen_query, batch.seen_cross = asked.data_ptr(), told.data_ptr()
            library().qkv_forward(byref(self.stack), byref(batch))
            if own is not None:
                query, key, value = (part.reshape(shape) for part in packed.chunk(3, dim=1))
                if caches is not None:
                    key, value = caches[i].reserve(key)
                own.see(query, key, value, pattern, answer.view(shape))
            if cross is not None:
                assert memory_pattern is not None
                cross.see(asked.view(shape), *memory[i], memory_pattern, told.view(shape))
            batch.first = batch.last
            batch.seen_qkv = batch.seen_answer = batch.seen_query = batch.seen_cross = None


def _pointers(tensors: Sequence[Tensor]) -> array[int]:
    return array("Q", [x.data_ptr() for x in tensors])


def _address(numbers: array[int]) -> int:
    """Valid while the array lives and keeps its length."""
    return numbers.buffer_info()[0]
