"""ONNX graphs in the engines that people run them with on a CPU, each as it is fastest there.

A graph's batches come one after the other, each by all threads, or as many at once as there are threads,
each by one: the first is for an answer as soon as possible, the second for many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Item = TypeVar("Item")
Result = TypeVar("Result")
Graph = Callable[[Mapping[str, NDArray[np.generic]]], NDArray[np.generic]]
"""Inputs by name -> the first output."""


def arrangements() -> dict[str, int]:
    """How many batches at once, by what it is called in a variant's name."""
    threads = torch.get_num_threads()
    return {"": 1, ", a batch a thread,": threads} if threads > 1 else {"": 1}


def for_all(work: Callable[[Item], Result], batches: Sequence[Item], at_once: int) -> list[Result]:
    """What the work makes of each batch."""
    if at_once == 1:
        return [work(batch) for batch in batches]
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(work, batches))


def onnx_runtime(file: Path, at_once: int) -> Graph:
    """A graph in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() // at_once
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    types = {i.name: np.int32 if "int32" in i.type else np.int64 for i in session.get_inputs()}

    def run(inputs: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic]:
        given = {
            name: inputs[name] if inputs[name].dtype.kind == "f" else inputs[name].astype(kind)
            for name, kind in types.items()
        }
        found: NDArray[np.generic] = session.run(None, given)[0]
        return found

    return run


def openvino(file: Path, precision: str, at_once: int) -> Graph:
    """A graph in OpenVINO, whose products are of that precision: f32 or bf16."""
    import openvino as theirs

    settings = {
        "PERFORMANCE_HINT": "LATENCY" if at_once == 1 else "THROUGHPUT",
        "NUM_STREAMS": at_once,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = theirs.Core().compile_model(file, "CPU", settings)
    free: SimpleQueue[Any] = SimpleQueue()
    for _ in range(at_once):
        free.put(compiled.create_infer_request())

    def run(inputs: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic]:
        request = free.get()
        try:
            found: NDArray[np.generic] = request.infer(dict(inputs))[0]
            return found
        finally:
            free.put(request)

    return run
