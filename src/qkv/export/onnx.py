"""ONNX files: the graphs of a checkpoint's model, written, and run in ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkv.errors import need
from qkv.export import padded
from qkv.export.padded import Padded
from qkv.hub import Checkpoint
from qkv.models import GPT, Bert, Transformer

MODEL = "model.onnx"
ENCODER = "encoder_model.onnx"
DECODER = "decoder_model.onnx"
DECODER_WITH_PAST = "decoder_with_past_model.onnx"

_SIZES = {padded.BATCH: 2, padded.LENGTH: 3, padded.SOURCE: 4, padded.PAST: 5, padded.ALL: 8}
"""Sizes of the tensors that a graph is traced with: all differ, so that no two are taken for one."""


def check_installed() -> None:
    """Raise InputError without the packages that write and run ONNX files."""
    need("writing and checking ONNX files", "onnx", "onnx", "onnxscript", "onnxruntime")


def graphs(checkpoint: Checkpoint) -> dict[str, Padded]:
    """The graphs of a checkpoint by file, named as optimum names them.

    GPT's one graph serves whole prompts, with a past of length 0, and single tokens. The Transformer's
    decoder has one for the first tokens, which also reads the encoder's answer, and one for all others.
    """
    model = checkpoint.model
    if isinstance(model, GPT):
        return {MODEL: padded.PaddedGPT(model)}
    if isinstance(model, Bert):
        return {MODEL: padded.PaddedBert(model, checkpoint)}
    if isinstance(model, Transformer):
        return {
            ENCODER: padded.PaddedEncoder(model),
            DECODER: padded.PaddedDecoder(model),
            DECODER_WITH_PAST: padded.PaddedDecoderWithPast(model),
        }
    return {MODEL: padded.PaddedViT(model, checkpoint)}


def write(path: Path, graph: Padded) -> None:
    """Write a graph and its weights to one file; weights over 1.5 GiB to another, `path`.data, beside it."""
    examples = [_example(name, shape) for name, shape in graph.inputs.items()]
    past = tuple(_axes(shape) for name, shape in graph.inputs.items() if _is_past(name))
    others = [_axes(shape) for name, shape in graph.inputs.items() if not _is_past(name)]
    with _silence():
        program = torch.onnx.export(
            graph.eval(),
            tuple(examples),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=(*others, past) if past else tuple(others),  # *past is one argument
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.producer_name = "qkv"
    for node in program.model.graph.all_nodes():  # the source lines that they were traced from
        node.metadata_props.clear()
    program.save(path)


def _is_past(name: str) -> bool:
    return name.startswith(padded.PAST_KEY_VALUES)


def _axes(shape: padded.Shape) -> dict[int, str]:
    """The names of those sizes that differ from call to call."""
    return {i: size for i, size in enumerate(shape) if isinstance(size, str)}


def _example(name: str, shape: padded.Shape) -> Tensor:
    ids = name.endswith(("_ids", "_mask"))
    sizes = [_SIZES[size] if isinstance(size, str) else size for size in shape]
    return torch.zeros(sizes, dtype=torch.long if ids else torch.float32)


@contextmanager
def _silence() -> Iterator[None]:
    """Without the exporter's advice to those who write models."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class Runtime:
    """The files of a folder in ONNX Runtime, each opened when it is first run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sessions: dict[str, Any] = {}

    def run(self, file: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a file's graph answers, by name."""
        session = self._session(file)
        found = session.run(None, {name: values.numpy() for name, values in inputs.items()})
        names = [output.name for output in session.get_outputs()]
        return {name: torch.from_numpy(values) for name, values in zip(names, found, strict=True)}

    def _session(self, file: str) -> Any:
        import onnxruntime

        if file not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            path, providers = str(self.folder / file), ["CPUExecutionProvider"]
            self._sessions[file] = onnxruntime.InferenceSession(path, options, providers=providers)
        return self._sessions[file]
